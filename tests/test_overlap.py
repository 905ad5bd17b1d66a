"""A text that was calibrated on is known again by the checkpoint's fingerprint, another one is not; a damaged fingerprint is refused."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, make_model, write_text

import ptqcli
from ptqcli.calibration.fingerprint import MOST, Fingerprint
from ptqcli.calibration.shingles import overlap, text_fingerprint
from ptqcli.calibration.text import evaluation_ids
from ptqcli.errors import PTQError
from ptqcli.model.kinds import PADDING


def random_ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 1000, (count,), generator=torch.Generator().manual_seed(seed))


def known(ids: torch.Tensor, window: int = 128) -> Fingerprint:
    """The fingerprint of all of ``ids``, cut into windows."""
    found = text_fingerprint(ids[: len(ids) // window * window].view(-1, window), bos=False)
    assert found is not None
    return found


@pytest.mark.parametrize("count", [2_000, 200_000])
@pytest.mark.parametrize("window", [64, 128, 2048])
def test_the_same_text_is_known_another_is_not_and_half_of_one_is_half(count: int, window: int) -> None:
    if window > count:
        pytest.skip("the text has no such window")
    ids, other = random_ids(count, 1), random_ids(count, 2)
    mark = known(ids, window)
    same, foreign, half = (overlap(mark, text) for text in (ids, other, torch.cat([ids[: count // 2], other[: count // 2]])))
    assert same is not None
    assert foreign is not None
    assert half is not None
    assert same.share == pytest.approx(1, abs=0.12)
    assert foreign.share < 0.002  # a hash in 20,000 is that of something else
    assert half.share == pytest.approx(0.5, abs=max(0.05, 4 * half.error))
    assert half.error < 0.03


def test_a_fingerprint_is_bounded_and_settled_by_the_tokens() -> None:
    mark = known(random_ids(300_000, 1))
    assert mark == known(random_ids(300_000, 1))
    assert len(mark.kept()) == MOST
    assert len(mark.hashes) < 6 * MOST
    assert mark.kept() != known(random_ids(300_000, 2)).kept()


def test_order_counts_and_the_beginning_of_windows_does_not() -> None:
    """Tokens of the other order are another text; a token in front of each window, and padding behind it, are no text."""
    ids = random_ids(4_096, 1)
    mark = known(ids)
    backwards = overlap(mark, ids.flip(0))
    assert backwards is not None
    assert backwards.share == 0
    begun = torch.cat([torch.full((32, 1), 7), ids.view(32, 128)], dim=1)
    assert text_fingerprint(begun, bos=True) == mark
    padded = torch.cat([ids.view(32, 128), torch.full((32, 40), PADDING)], dim=1)
    assert text_fingerprint(padded, bos=False) == mark


def test_what_is_too_short_has_none() -> None:
    assert text_fingerprint(torch.ones(4, 7, dtype=torch.long), bos=False) is None
    assert text_fingerprint(torch.ones(4, 9, dtype=torch.long), bos=True) is not None
    assert overlap(known(random_ids(4_096, 1)), random_ids(31, 1)) is None


@pytest.mark.parametrize(
    "damage",
    [
        {"hashes": "no base64"},
        {"hashes": base64.b64encode(b"abc").decode()},
        {"hashes": base64.b64encode(b"\2\0\0\0\1\0\0\0").decode()},
        {"hashes": "A" * 7 * MOST},
        {"bound": 0},
        {"ngram": 10**9},
        {"ngrams": 0},
        {"tokens": 1},
        {"bound": 3},
    ],
)
def test_a_damaged_fingerprint_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(PTQError, match="the fingerprint of the calibration text is damaged"):
        overlap(replace(known(random_ids(4_096, 1)), **damage), random_ids(4_096, 1))  # type: ignore[arg-type]


def test_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    """The report of a run on a text knows that text, and none of its words stands there."""
    make_model(tmp_path / "model", num_hidden_layers=1)
    text = write_text(tmp_path / "text.txt", words=900)
    write_text(tmp_path / "other.txt", words=900, seed=1)
    for _ in range(2):
        options = {"calib": str(text), "nsamples": 30, "seqlen": 64, "scheme": "w4a16-g32"}
        ptqcli.quantize(tmp_path / "model", output=tmp_path / "out", overwrite=True, **options)  # type: ignore[arg-type]
        stored = (tmp_path / "out" / "ptq_report.json").read_text()
        report = json.loads(stored)
    mark = Fingerprint(**report["calibration"]["fingerprint"])
    shares = [overlap(mark, evaluation_ids(str(tmp_path / name), byte_tokenizer())) for name in ("text.txt", "other.txt")]
    assert shares[0] is not None
    assert shares[1] is not None
    assert shares[0].share == pytest.approx(30 * 64 / len(text.read_text()), abs=0.08)
    assert shares[1].share < 0.002
    assert "weight scale" in text.read_text()
    assert "weight scale" not in stored

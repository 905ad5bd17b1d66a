"""``scripts/paper_tables.py``: numbers against the formulas, models recognised, rows that go on, the table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from paper_tables import ORIGINAL, ROWS, TABLES, Bench, chosen_rows, main, numbers_of, published, recognised
from tiny import make_model, write_text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig

WINDOW, WINDOWS = 64, 4


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("paper")
    make_model(place / "model", "opt")
    write_text(place / "text.txt")
    return place


def command_line(place: Path, *more: str) -> list[str]:
    text = str(place / "text.txt")
    sizes = ("--nsamples", "2", "--seqlen", str(WINDOW), "--limit", str(WINDOWS), "--group-size", "32")
    return [str(place / "model"), "--calib", text, "--text", text, *sizes, "--results", str(place / "lines.jsonl"), *more]


@torch.no_grad()
def plain_perplexity(place: Path, change: Any = None) -> float:
    """With transformers' own loss. change: of the weight of each linear but the head."""
    model = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    for name, module in model.named_modules():
        if change is not None and isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.copy_(change(module.weight))
    ids = AutoTokenizer.from_pretrained(place / "model")((place / "text.txt").read_text(), return_tensors="pt")["input_ids"]
    windows = ids[0, : WINDOW * WINDOWS].view(WINDOWS, 1, WINDOW)
    return math.exp(sum(model(input_ids=window, labels=window).loss.item() for window in windows) / WINDOWS)


def rounded(weight: Tensor) -> Tensor:
    """4 bits a row between its least and its greatest, zero among them, as GPTQ's quant.py has it."""
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = torch.round(-low / scale)
    return scale * (torch.clamp(torch.round(weight / scale) + zero, 0, 15) - zero)


def test_numbers_are_those_of_the_formulas(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command_line(workshop, "--rows", "rtn-w4", "llm-int8", "--json"))
    rows = {row["row"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == [ORIGINAL, "rtn-w4", "llm-int8"]
    assert rows[ORIGINAL]["perplexity"] == pytest.approx(plain_perplexity(workshop), rel=1e-4)
    assert rows["rtn-w4"]["perplexity"] == pytest.approx(plain_perplexity(workshop, rounded), rel=1e-3)
    assert rows["rtn-w4"]["perplexity"] != pytest.approx(rows[ORIGINAL]["perplexity"], rel=1e-2)


def test_a_row_that_is_finished_is_not_measured_again(
    workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the model does not allow is tried again, and has its reason in the table."""
    main(command_line(workshop, "--rows", "rtn-w4"))
    lines = (workshop / "lines.jsonl").read_text()
    asked: list[str] = []

    def measure(bench: Bench, name: str) -> dict[str, Any]:
        asked.append(name)
        return original(bench, name)

    original = Bench.measure
    monkeypatch.setattr(Bench, "measure", measure)
    main(command_line(workshop, "--rows", "rtn-w4"))
    assert (asked, (workshop / "lines.jsonl").read_text()) == ([], lines)
    for _ in range(2):
        capsys.readouterr()
        main([*command_line(workshop, "--rows", "rtn-w2-g"), "--group-size", "48"])
    assert asked == [ORIGINAL, "rtn-w2-g", "rtn-w2-g"]
    assert "RTN, 2 bit, groups: " in capsys.readouterr().out


@pytest.mark.slow
def test_every_row_runs(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command_line(workshop, "--rows", *ROWS, "--json"))
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["row"] for row in rows] == list(ROWS)
    assert [row.get("failed") for row in rows if row["perplexity"] is None] == []


@pytest.mark.parametrize(
    ("name", "found", "words"),
    [
        ("opt-125m", "opt-125m", "by its shape and its name"),
        ("facebook_OPT-125M", "opt-125m", "by its shape and its name"),
        ("mine", None, "give --as opt-125m"),
        ("opt-125m-chat", None, "give --as opt-125m"),
    ],
)
def test_a_model_is_recognised(name: str, found: str | None, words: str, tmp_path: Path) -> None:
    OPTConfig().save_pretrained(tmp_path / name)  # transformers' defaults are those of OPT-125M
    model, why = recognised(tmp_path / name)
    assert (model and model["name"], words in why) == (found, True)


def test_another_shape_is_no_published_model(tmp_path: Path) -> None:
    OPTConfig(hidden_size=96).save_pretrained(tmp_path / "opt-125m")
    assert recognised(tmp_path / "opt-125m")[0] is None
    model, _ = recognised(tmp_path / "opt-125m", "opt-125m")
    assert numbers_of(model, "gptq-w4", 128) == ["31.12 [1]"]
    assert numbers_of(model, "gptq-w4-g", 128) == []
    with pytest.raises(SystemExit, match="--as nothing: no numbers of it"):
        recognised(tmp_path / "opt-125m", "nothing")


def test_groups_of_another_size_are_another_row() -> None:
    [model] = [model for model in published() if model["name"] == "llama-2-7b"]
    assert numbers_of(model, "gptq-w3-g", 128) == ["6.43 [1]"]
    assert numbers_of(model, "gptq-w3-g", 64) == []
    assert numbers_of(model, ORIGINAL, 64) == ["5.47 [1]", "5.47 [2]"]


def test_published_rows_are_rows_of_the_tables() -> None:
    for model in published():
        for table in model["tables"]:
            assert set(table["rows"]) <= set(ROWS)
            assert all(isinstance(value, float | int) for value in table["rows"].values())
    assert {row.table for row in ROWS.values()} == {"", *TABLES}


def test_rows_are_chosen() -> None:
    assert chosen_rows(["llm-int8"], None) == [ORIGINAL, "absmax-w8a8", "vector-w8a8", "llm-int8"]
    assert not any(name.startswith("obq") for name in chosen_rows(list(TABLES), None))
    assert chosen_rows([], ["obq-w4"]) == [ORIGINAL, "obq-w4"]
    with pytest.raises(SystemExit, match="--rows nothing"):
        chosen_rows([], ["nothing"])

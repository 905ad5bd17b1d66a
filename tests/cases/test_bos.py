"""Kind: a protocol assumed. Whether windows begin with the beginning-of-sequence token, in calibration and evaluation alike.

Perplexities are compared with one forward pass for every token; windows with texts cut by hand.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from commandline import Ptq, one_line
from tiny import byte_tokenizer, make_model, write_text
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import ptqcli
from ptqcli.calibration.bos import window_bos
from ptqcli.calibration.text import calibration_windows, evaluation_ids
from ptqcli.errors import UsageError
from ptqcli.evaluation.divergence import compare
from ptqcli.evaluation.perplexity import perplexity
from ptqcli.evaluation.windows import Window, plan_windows
from ptqcli.recipe_loading import load_recipe

BOS = 256


def tokenizer(form: str = "$A") -> PreTrainedTokenizerFast:
    """The byte tokenizer, which writes its only special token around a text as ``form`` says."""
    made = byte_tokenizer()
    made._tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<|end|>", BOS)])
    return made


@pytest.mark.parametrize(
    "form, wanted, token",
    [
        ("<|end|> $A", "auto", BOS),
        ("<|end|> $A <|end|>", "auto", BOS),
        ("$A", "auto", None),
        ("$A <|end|>", "auto", None),  # an end of its own is no beginning
        ("$A", "yes", BOS),
        ("<|end|> $A", "yes", BOS),
        ("<|end|> $A", "no", None),
    ],
)
def test_auto_is_what_the_tokenizer_does(form: str, wanted: str, token: int | None) -> None:
    assert window_bos(tokenizer(form), wanted) == token


def test_what_cannot_be_is_refused() -> None:
    without = byte_tokenizer()
    without.bos_token = None
    assert window_bos(without, "auto") is None
    with pytest.raises(UsageError, match="bos yes: the tokenizer has no beginning-of-sequence token"):
        window_bos(without, "yes")
    with pytest.raises(UsageError, match="bos 'perhaps' is unknown; use auto, yes or no"):
        load_recipe(flags={"bos": "perhaps"})


@pytest.mark.parametrize("written, meant", [("yes", "yes"), ("no", "no"), ("auto", "auto"), ("'yes'", "yes"), ("true", "yes")])
def test_a_recipe_file_says_it_in_plain_words(written: str, meant: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"bos: {written}\n")
    assert load_recipe(tmp_path / "recipe.yaml").bos == meant


def test_calibration_windows_begin_with_it_and_hold_the_text_behind_it() -> None:
    docs = ["abcdefghijklmnopqrstuvwx"]
    plain, begun = (
        calibration_windows(docs, tokenizer(), nsamples=3, seqlen=seqlen, seed=5, bos=bos) for seqlen, bos in ((7, None), (8, BOS))
    )
    assert begun[:, 0].tolist() == [BOS] * 3
    assert torch.equal(begun[:, 1:], plain)
    assert begun.shape == (3, 8)
    with pytest.raises(UsageError, match="has 25 tokens, enough for 3 windows of 8, and 4 are asked for"):
        calibration_windows(docs, tokenizer(), nsamples=4, seqlen=8, seed=0, bos=BOS)


def test_evaluation_text_holds_no_special_token(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    assert evaluation_ids(str(tmp_path / "a.txt"), tokenizer("<|end|> $A <|end|>")).tolist() == byte_tokenizer()("ab")["input_ids"]


def test_windows_that_are_begun_score_all_their_text() -> None:
    assert plan_windows(10, 4, None, True) == plan_windows(10, 4, 4, True) == [Window(0, 3, 3), Window(3, 3, 3), Window(6, 3, 3)]
    assert plan_windows(8, 4, 2, True) == [Window(0, 3, 3), Window(2, 3, 2), Window(4, 3, 2), Window(6, 2, 1)]
    with pytest.raises(UsageError, match="the text has 2 tokens, less than one window of 4; give --seqlen 3 or less"):
        plan_windows(2, 4, None, True)


@pytest.mark.parametrize("stride", [1, 2, 5, 10])
@pytest.mark.parametrize("tokens", [11, 12, 40, 41])
def test_overlapping_windows_that_are_begun_score_every_token_once(tokens: int, stride: int) -> None:
    windows = plan_windows(tokens, 12, stride, True)
    scored = [window.start + window.length - back for window in windows for back in range(window.scored, 0, -1)]
    assert scored == list(range(tokens))


@torch.no_grad()
def one_by_one(model: torch.nn.Module, ids: torch.Tensor, seqlen: int, stride: int) -> float:
    """Mean loss with a forward pass for every token, behind BOS and the tokens before it in the first window that holds it."""
    losses = []
    for position in range(len(ids)):
        start = next(start for start in range(0, len(ids), stride) if position < start + seqlen - 1)
        before = torch.cat([torch.tensor([BOS]), ids[start:position]])
        losses.append(-model(input_ids=before[None]).logits[0, -1].double().log_softmax(-1)[ids[position]].item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("stride", [None, 4])
def test_perplexity_is_that_of_one_pass_for_every_token(stride: int | None, batch_size: int, tmp_path: Path) -> None:
    model = make_model(tmp_path, num_hidden_layers=1)
    ids = torch.randint(0, 256, (27,), generator=torch.Generator().manual_seed(3))
    found = perplexity(model, ids, 10, stride, batch_size, bos=BOS)
    assert found.bos
    assert (found.tokens, found.stride) == (27, stride or 9)
    assert found.mean_nll == pytest.approx(one_by_one(model, ids, 10, stride or 9), rel=1e-5)
    both = compare(model, model, ids, 10, stride, batch_size, bos=BOS)
    assert both.model == both.baseline
    assert both.model.mean_nll == pytest.approx(found.mean_nll, rel=1e-6)
    assert not math.isclose(found.mean_nll, perplexity(model, ids, 10, stride, batch_size).mean_nll, rel_tol=1e-3)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    make_model(folder / "model", num_hidden_layers=1)
    tokenizer("<|end|> $A").save_pretrained(folder / "model")
    write_text(folder / "text.txt", 600)
    return folder


SHORT = ("--calib", "text.txt", "--nsamples", "4", "--seqlen", "16")


def test_reports_and_output_state_it_and_it_changes_the_codes(ptq: Ptq, at_work: Path, tmp_path: Path) -> None:
    reports, weights = {}, {}
    for bos in ("auto", "yes", "no"):
        assert ptq("quantize", "model", *SHORT, "--bos", bos, "--output", tmp_path / bos).code == 0
        reports[bos] = json.loads((tmp_path / bos / "ptq_report.json").read_text())
        weights[bos] = ptqcli.open_checkpoint(tmp_path / bos).weight("model.layers.0.mlp.down_proj").codes
    assert [report["recipe"]["bos"] for report in reports.values()] == ["auto", "yes", "no"]
    assert [report["calibration"]["bos"] for report in reports.values()] == [True, True, False]
    assert torch.equal(weights["auto"], weights["yes"])
    assert not torch.equal(weights["auto"], weights["no"])

    shown = {bos: ptq("eval", tmp_path / "auto", "--ppl", "text.txt", "--seqlen", "16", "--bos", bos, "--json") for bos in ("auto", "no")}
    results = {bos: json.loads(answer.out)["results"][0] for bos, answer in shown.items()}
    assert (results["auto"]["bos"], results["no"]["bos"]) == (True, False)
    assert results["auto"]["perplexity"] != results["no"]["perplexity"]
    [same] = ptqcli.evaluate(tmp_path / "auto", "text.txt", seqlen=16, bos="yes")
    assert same.perplexity == results["auto"]["perplexity"]
    assert same.baseline_perplexity == results["auto"]["baseline_perplexity"]
    assert "each with the beginning-of-sequence token in front" in shown["auto"].err
    assert "beginning-of-sequence" not in shown["no"].err


def test_a_tokenizer_without_the_token_refuses_it_before_any_work(ptq: Ptq, workshop: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "model", num_hidden_layers=1)
    without = byte_tokenizer()
    without.bos_token = None
    without.save_pretrained(tmp_path / "model")
    for command in ("quantize", "eval"):
        text = ("--calib" if command == "quantize" else "--ppl", workshop / "text.txt")
        answer = ptq(command, tmp_path / "model", "--bos", "yes", *text, "--seqlen", "16")
        assert answer.code == 2
        assert "the tokenizer has no beginning-of-sequence token" in one_line(answer)

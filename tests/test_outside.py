"""Output heads and embeddings in codes: against rounding by hand, the solver on inputs that are collected here, and other readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Ptq, one_line
from safetensors.torch import load_file
from tiny import make_model, token_ids, write_text
from torch import Tensor
from transformers import AutoModelForCausalLM

from ptqcli import solve
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.formats.sources import open_source
from ptqcli.numerics.ranges import SquaredError
from ptqcli.numerics.scheme import UNUSUAL_BITS, Scheme
from ptqcli.numerics.weight import round_to_nearest
from ptqcli.pipeline import outside
from ptqcli.pipeline.clock import Clock
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.prepare import prepare
from ptqcli.pipeline.progress import NoProgress
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources
from ptqcli.runtime import load_quantized
from ptqcli.runtime.embedding import PackedEmbedding

TABLE, HEAD = "model.embed_tokens", "lm_head"


def request(folder: Path, **changes: Any) -> Recipe:
    return Recipe(**{"algo": "gptq", "scheme": "w4a16-g32", "calib": str(folder / "text.txt"), "nsamples": 4, "seqlen": 32, **changes})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(token_ids(24)).logits
    return found


def dequantized(folder: Path, model: Any) -> Any:
    """A plain model with what the codes in ``folder`` stand for."""
    tensors = open_source(folder, allow_requantize=True).tensors
    config = type(model.config)(**{**model.config.to_dict(), "tie_word_embeddings": False})
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.load_state_dict({name: tensors.read(name) for name in tensors.names}, strict=True)
    return plain


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def workshop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("outside")
    model = make_model(folder / "model", tie_word_embeddings=request.param)
    write_text(folder / "text.txt")
    return folder, model


@pytest.mark.parametrize("asked", [{"lm_head": "W8", "embeddings": "W4"}, {"lm_head": "w4a16-g16-asym"}, {"embeddings": "W8"}])
def test_head_and_embedding_are_written_and_run(workshop: tuple[Path, Any], tmp_path: Path, asked: dict[str, str]) -> None:
    folder, model = workshop
    report = quantize(folder / "model", request(folder, algo="rtn", **asked), tmp_path / "out")
    found = load_quantized(tmp_path / "out")
    assert isinstance(found.get_input_embeddings(), PackedEmbedding) == ("embeddings" in asked)
    wanted = logits(dequantized(tmp_path / "out", model))
    assert (logits(found) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (wanted - logits(model)).abs().max() > 1e-3 * wanted.abs().max()
    packed = open_checkpoint(tmp_path / "out")
    assert (HEAD in packed.schemes, TABLE in packed.schemes) == ("lm_head" in asked, "embeddings" in asked)
    assert {layer.name for layer in report.layers} == packed.schemes.keys()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == report.bytes_after
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    original = model.state_dict()
    for name in (HEAD, TABLE):
        if name not in packed.schemes:
            assert torch.equal(stored[f"{name}.weight"], original[f"{name}.weight"])


def test_rows_of_an_embedding_are_rounded_in_their_groups(workshop: tuple[Path, Any], tmp_path: Path, monkeypatch: Any) -> None:
    folder, model = workshop
    monkeypatch.setattr(outside, "OUTSIDE_PIECE", 64 * 100)  # of 257 rows
    quantize(folder / "model", request(folder, algo="rtn", embeddings="w3a16-g16"), tmp_path / "out")
    weight = model.get_input_embeddings().weight.detach()
    wanted = round_to_nearest(weight, Scheme.parse("w3a16-g16"), torch.float32, SquaredError())
    found = open_checkpoint(tmp_path / "out").weight(TABLE)
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.scale, wanted.scale)
    rows = load_quantized(tmp_path / "out").get_input_embeddings()(token_ids(9))
    assert torch.equal(rows, torch.nn.functional.embedding(token_ids(9), wanted.dequantize(torch.float32)))
    assert not torch.equal(rows, torch.nn.functional.embedding(token_ids(9), wanted.dequantize(torch.float32).roll(1, 0)))


def test_the_head_is_solved_for_what_reaches_it(workshop: tuple[Path, Any], tmp_path: Path, monkeypatch: Any) -> None:
    folder, model = workshop
    monkeypatch.setattr(outside, "OUTSIDE_PIECE", 64 * 100)
    recipe = request(folder, lm_head="w4a16-g32", embeddings="W4")
    quantize(folder / "model", recipe, tmp_path / "out")
    ready = prepare(
        folder / "model",
        recipe,
        tmp_path / "other",
        overwrite=False,
        resources=Resources(),
        data_dir=None,
        progress=NoProgress(),
        clock=Clock(),
    )
    assert ready.calibration is not None
    plain, inputs = dequantized(tmp_path / "out", model), []
    plain.lm_head.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    with torch.no_grad():
        plain(ready.calibration.windows)
    weight = model.lm_head.weight.detach()
    wanted = solve(weight, "w4a16-g32", inputs=inputs[0], scale_dtype=torch.float32)
    found = open_checkpoint(tmp_path / "out").weight(HEAD)
    assert (found.codes == wanted.codes).float().mean() > 0.995  # the order of sums differs
    rounded = solve(weight, "w4a16-g32", "rtn", scale_dtype=torch.float32)
    assert (found.codes == rounded.codes).float().mean() < 0.9
    x = inputs[0].flatten(0, 1)
    errors = [float((x @ (each.dequantize() - weight).t()).norm()) for each in (found, rounded)]
    assert errors[0] < 0.9 * errors[1]


def test_transformers_reads_a_quantized_head(workshop: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = workshop
    quantize(folder / "model", request(folder, algo="rtn", lm_head="w4a16-g32"), tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ours = logits(load_quantized(tmp_path / "out"))
    assert (logits(model) - ours).abs().max() < 1e-4 * ours.abs().max()


@pytest.mark.parametrize("algo", ["rtn", "gptq", "awq+gptq"])
def test_a_head_alone(workshop: tuple[Path, Any], tmp_path: Path, algo: str) -> None:
    folder, model = workshop
    quantize(folder / "model", request(folder, algo=algo, ignore=(".",), lm_head="w4a16-g32"), tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").schemes.keys() == {HEAD}
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    wanted = logits(dequantized(tmp_path / "out", model))
    for found in (theirs, load_quantized(tmp_path / "out")):
        assert (logits(found) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (wanted - logits(model)).abs().max() > 1e-3 * wanted.abs().max()


def test_who_reads_a_head_is_in_the_plan(workshop: tuple[Path, Any], tmp_path: Path, ptq: Ptq) -> None:
    flags = ["--algo", "rtn", "--scheme", "w4a16-g32", "--dry-run", "--output", tmp_path / "out"]
    told, silent = (ptq("quantize", workshop[0] / "model", *flags, *more).out for more in (["--lm-head", "W8"], []))
    assert "SGLang loaded it without an error" in " ".join(told.split())
    assert "SGLang" not in silent


def test_transformers_fails_on_a_quantized_embedding_as_is_said(workshop: tuple[Path, Any], tmp_path: Path, ptq: Ptq) -> None:
    folder, _ = workshop
    flags = ["--algo", "rtn", "--embeddings", "W8", "--output", tmp_path / "out"]
    answer = ptq("quantize", folder / "model", *flags)
    assert answer.code == 0, answer.err
    assert "transformers fails on it" in " ".join((answer.out + answer.err).split())
    with pytest.raises(AttributeError, match="weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert ptq("eval", tmp_path / "out", "--ppl", folder / "text.txt", "--seqlen", "32").code == 0


def test_an_embedding_that_scales_what_it_looks_up(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "gemma3")
    write_text(tmp_path / "text.txt")
    quantize(tmp_path / "model", request(tmp_path, algo="rtn", embeddings="W8", lm_head="W8"), tmp_path / "out")
    wanted = logits(dequantized(tmp_path / "out", model))
    assert (logits(load_quantized(tmp_path / "out")) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--lm-head", "W9"), "--lm-head W9"),
        (("--embeddings", "w8a8"), "integer weights beside 16-bit activations"),
        (("--lm-head", "nf4-g64"), "integer weights beside 16-bit activations"),
        (("--lm-head", "w4a16-g48"), "group size 48 does not divide its 64 columns"),
        (("--lm-head", "W4", "--format", "gptq"), "lm_head: gptq holds codes of the linears in the blocks only"),
        (("--embeddings", "W4", "--format", "awq"), "leave --embeddings out"),
        (("--lm-head", "W8", "--finish", "kl"), "leave --lm-head or --finish out"),
        (("--override", "lm_head:bits=8"), "--lm-head W8"),
        (("--lm-head", "none"), "--lm-head none: is no scheme; give one such as W8, W4"),
        (("--lm-head", "W4-g32"), "did you mean"),
        (("--ignore", ".", "--lm-head", "W4", "--adapter-rank", "4"), "leave --adapter-rank out"),
    ],
)
def test_what_cannot_be(workshop: tuple[Path, Any], tmp_path: Path, ptq: Ptq, flags: tuple[str, ...], told: str) -> None:
    folder, _ = workshop
    answer = ptq("quantize", folder / "model", "--algo", "rtn", "--scheme", "w4a16-g32", *flags, "--output", tmp_path / "out")
    assert answer.code == 2
    assert told in one_line(answer)
    assert not (tmp_path / "out").exists()


def test_a_mix_of_types_says_what_becomes_of_them(workshop: tuple[Path, Any], tmp_path: Path, ptq: Ptq) -> None:
    answer = ptq("quantize", workshop[0] / "model", "--format", "gguf", "--lm-head", "W8", "--output", tmp_path / "out")
    assert answer.code == 2
    assert "--gguf-type" in one_line(answer)


@pytest.mark.parametrize("bits", [bits if bits == 5 else pytest.param(bits, marks=pytest.mark.slow) for bits in UNUSUAL_BITS])
def test_widths_between_four_and_eight(workshop: tuple[Path, Any], tmp_path: Path, ptq: Ptq, bits: int) -> None:
    folder, model = workshop
    asked = ["--calib", folder / "text.txt", "--nsamples", "4", "--seqlen", "32", "--wbits", str(bits), "--group-size", "32"]
    answer = ptq("quantize", folder / "model", *asked, "--output", tmp_path / "out")
    assert answer.code == 0, answer.err
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ours = logits(load_quantized(tmp_path / "out"))
    assert (logits(theirs) - ours).abs().max() < 1e-4 * ours.abs().max()
    moved = (ours - logits(model)).norm() / logits(model).norm()
    assert 0 < moved < {5: 0.3, 6: 0.15, 7: 0.08}[bits]
    for other in ("gptq", "awq", "bitsandbytes", "gguf"):
        refused = ptq("quantize", folder / "model", *asked, "--format", other, "--output", tmp_path / other)
        assert refused.code == 2
        assert other in one_line(refused).lower()


@pytest.mark.parametrize(
    "asked",
    [
        {"options": {"gptq": {"target": "original"}}},
        pytest.param({"algo": "rotate+gptq"}, marks=pytest.mark.slow),
        {"algo": "awq+gptq", "adapter_rank": 4},
        pytest.param({"algo": "autoround", "options": {"autoround": {"iters": 2}}}, marks=pytest.mark.slow),
    ],
    ids=["target", "rotate", "awq", "autoround"],
)
def test_beside_other_parts(workshop: tuple[Path, Any], tmp_path: Path, asked: dict[str, Any]) -> None:
    folder, model = workshop
    report = quantize(folder / "model", request(folder, lm_head="W8", embeddings="W8", **asked), tmp_path / "out")
    errors = {layer.name: layer.relative_error for layer in report.layers}
    assert 0 < errors[HEAD] < 0.02
    assert 0 < errors[TABLE] < 0.02
    wanted = logits(dequantized(tmp_path / "out", model))
    assert (logits(load_quantized(tmp_path / "out")) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_other_commands_on_such_a_checkpoint(workshop: tuple[Path, Any], tmp_path: Path, ptq: Ptq) -> None:
    folder, _ = workshop
    quantize(folder / "model", request(folder, algo="rtn", embeddings="w8a16-g32"), tmp_path / "out")
    refused = ptq("convert", tmp_path / "out", "--to", "gptq", "--output", tmp_path / "other")
    assert refused.code == 2
    assert "model.embed_tokens: gptq holds codes of the linears in the blocks only" in one_line(refused)
    refused = ptq("tune-scales", tmp_path / "out", "--output", tmp_path / "other")
    assert refused.code == 2
    assert "model.embed_tokens is quantized" in one_line(refused)
    shown = ptq("inspect", tmp_path / "out")
    assert shown.code == 0
    assert "model.embed_tokens" in shown.out
    again = ptq("quantize", tmp_path / "out", "--algo", "rtn", "--allow-requantize", "--output", tmp_path / "again")
    assert again.code == 0, again.err
    assert "embed_tokens.weight" in " ".join(load_file(tmp_path / "again" / "model.safetensors"))

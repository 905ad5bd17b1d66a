"""Kind: results that depend on how many windows run together, without a word.

Evaluation: perplexities of packed models are the same for every batch size, up to the order of sums. Calibration: the batch size changes
the last digits and with them codes, which the help says and the report keeps. Layers also run inside ``torch.autocast``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commandline import Ptq
from ptq_kernels import TorchInt4WeightOnly, TorchInt8WeightOnly
from tiny import make_model, token_ids, write_text
from transformers import AutoModelForCausalLM

import ptqcli
from ptqcli.evaluation import perplexity as module
from ptqcli.evaluation.perplexity import perplexity
from ptqcli.runtime.layers import expanding

SCHEMES = ["w4a16-g32", "w4a16-g64-asym", "w8a16-row", "w3a16-g32", "w8a8", "w8a8-static", "w8a8-act-tensor", "llm-int8"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    make_model(folder / "model", dtype=torch.bfloat16, num_hidden_layers=1, hidden_size=128, intermediate_size=256)
    text = str(write_text(folder / "text.txt", 600))
    for scheme in SCHEMES:
        algo = "llm-int8" if "int8" in scheme else "rtn"
        ptqcli.quantize(folder / "model", output=folder / scheme, algo=algo, scheme=scheme, calib=text, nsamples=2, seqlen=32)
    return folder


def loaded(workshop: Path, scheme: str) -> torch.nn.Module:
    return ptqcli.load_quantized(workshop / scheme)


@pytest.mark.parametrize("scheme", SCHEMES[:6])
def test_perplexity_does_not_depend_on_the_batch_size(scheme: str, workshop: Path) -> None:
    """Batches of 32 to 512 tokens, on both sides of where the layers take another kernel."""
    model, ids = loaded(workshop, scheme), token_ids(512, 1)[0]
    found = [perplexity(model, ids, 32, batch_size=size).mean_nll for size in (1, 2, 3, 4, 8, 16)]
    assert max(found) == pytest.approx(min(found), rel=1e-6)


def test_without_that_the_batch_size_would_show(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr(module, "expanding", lambda model: nullcontext())
    model, ids = loaded(workshop, "w4a16-g32"), token_ids(512, 1)[0]
    one, many = (perplexity(model, ids, 32, batch_size=size).mean_nll for size in (1, 16))
    assert one != pytest.approx(many, rel=1e-6)


def test_what_is_measured_is_the_rounded_weight_that_transformers_expands(workshop: Path) -> None:
    """A model of plain linears with the dequantized weights in bfloat16 has the very perplexity."""
    packed = ptqcli.load_quantized(workshop / "w4a16-g32", fuse=False)
    plain, ids = AutoModelForCausalLM.from_pretrained(workshop / "model", dtype=torch.bfloat16), token_ids(256, 1)[0]
    checkpoint = ptqcli.open_checkpoint(workshop / "w4a16-g32")
    for name in checkpoint.schemes:
        plain.get_submodule(name).weight.data = checkpoint.weight(name).dequantize()
    assert perplexity(packed, ids, 32).mean_nll == pytest.approx(perplexity(plain, ids, 32).mean_nll, rel=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES[6:])
def test_where_tokens_of_a_call_change_each_other_windows_run_one_by_one(scheme: str, workshop: Path) -> None:
    model, ids = loaded(workshop, scheme), token_ids(512, 1)[0]
    alone, together = (perplexity(model, ids, 32, batch_size=size).mean_nll for size in (1, 16))
    assert perplexity(model, ids, 32).mean_nll == alone != together


def test_the_layers_are_as_before_afterwards(workshop: Path) -> None:
    model = loaded(workshop, "w4a16-g32")
    layers = [layer for layer in model.modules() if isinstance(layer, (TorchInt4WeightOnly, TorchInt8WeightOnly))]
    assert layers
    with expanding(model):
        assert all(layer.always_expand for layer in layers)
    assert not any(layer.always_expand for layer in layers)


@pytest.mark.parametrize("tokens", [1, 40, 120])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_models_run_inside_autocast(scheme: str, tokens: int, workshop: Path) -> None:
    model, ids = loaded(workshop, scheme), token_ids(tokens, 1)
    with torch.no_grad():
        expected = model(ids).logits.float()
        with torch.autocast("cpu", torch.bfloat16):
            found = model(ids).logits.float()
        half = loaded(workshop, scheme).float()
        with torch.autocast("cpu", torch.bfloat16):
            wide = half(ids).logits.float()
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert wide.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_a_layer_inside_autocast_takes_what_a_norm_hands_on(dtype: torch.dtype, given: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (32, 64), generator=generator, dtype=torch.uint8)
    layers = [
        TorchInt4WeightOnly(codes, torch.rand(32, 2, generator=generator).to(dtype) + 0.1, None, 32, torch.rand(32).to(dtype)),
        TorchInt8WeightOnly(codes.view(torch.int8), torch.rand(32, generator=generator).to(dtype), torch.rand(32).to(dtype)),
    ]
    x = torch.randn(200, 64, generator=generator).to(given)
    for layer in layers:
        for rows in (x[:1], x):
            with torch.autocast("cpu", torch.bfloat16):
                found = layer(rows)
            assert found.dtype == dtype
            assert torch.equal(found, layer(rows.to(dtype)))
        if given != dtype:
            with pytest.raises(TypeError, match="x must be"):
                layer(x)


def test_the_help_says_what_the_batch_size_changes_and_the_report_has_it(ptq: Ptq, workshop: Path, tmp_path: Path) -> None:
    assert "other codes of equal quality" in " ".join(ptq("quantize", "--help").out.split())
    flags = ("--calib", workshop / "text.txt", "--nsamples", "4", "--seqlen", "32")
    kept, codes = [], []
    for number, size in enumerate(("1", "4", None)):
        out = tmp_path / str(number)
        answer = ptq("quantize", workshop / "model", *flags, *(() if size is None else ("--batch-size", size)), "--output", out)
        assert answer.code == 0, answer.err
        kept.append(json.loads((out / "ptq_report.json").read_text())["calibration"])
        codes.append(ptqcli.open_checkpoint(out).weight("model.layers.0.mlp.down_proj").codes)
    assert [each["batch_size"] for each in kept] == [1, 4, 128]
    assert {each["dtype"] for each in kept} == {"bfloat16"}
    assert torch.equal(codes[1], codes[2])  # four windows in one pass either way

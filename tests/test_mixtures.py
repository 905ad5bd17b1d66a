"""Mixtures of experts: the result is what transformers computes with the dequantized matrices, fused or not, in its own model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from mixtures import EXPERTS, MIXTURES
from safetensors.torch import load_file, save_file
from tiny import make_model, token_ids, write_text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ptqcli.pipeline.pipeline import quantize
from ptqcli.recipe import Override, Recipe
from ptqcli.resources import Resources
from ptqcli.runtime import load_quantized

# Where files hold a stack of matrices: what a single matrix is called here -> the stack, and whether that holds the transpose.
STACKS = {
    "gpt_oss": (r"(.*\.experts)\.(\d+)\.(gate_up_proj|down_proj)", r"\1.\3", True),
    "llama4": (r"(.*\.experts)\.(\d+)\.(gate_up_proj|down_proj)", r"\1.\3", True),
    "jetmoe": (r"(.*\.(?:input|output)_linear)\.(\d+)()", r"\1.weight", False),
}
GRANITE = {"gate_up_proj": "input_linear.weight", "down_proj": "output_linear.weight"}
QUICK = ["mixtral", "qwen3_moe", "gpt_oss"]


@pytest.fixture(autouse=True)
def _known_mixtures(monkeypatch):
    for name, entry in MIXTURES.items():
        monkeypatch.setitem(tiny.ARCHITECTURES, name, entry)


def recipe_for(folder: Path, algo: str, **changes) -> Recipe:
    text = str(write_text(folder / "text.txt"))
    return Recipe(**{"algo": algo, "group_size": 32, "calib": text, "nsamples": 8, "seqlen": 48, **changes})


def quantized(folder: Path, kind: str, algo: str, **changes):
    """A tiny model of ``kind`` in folder/model, and the report of quantizing it into folder/out."""
    make_model(folder / "model", kind)
    return quantize(folder / "model", recipe_for(folder, algo, **changes), folder / "out", resources=Resources(batch_size=4))


def library_weights(out: Path) -> dict[str, Tensor]:
    """Every packed matrix as the compressed-tensors library reads it, by the name of its linear in the file."""
    stored = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    group = next(iter(config["config_groups"].values()))
    scheme = QuantizationScheme(targets=["Linear"], weights=group["weights"], format=group["format"])
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    names = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
    keys = ("weight_packed", "weight_scale", "weight_shape")
    return {name: library.decompress({key: stored[f"{name}.{key}"] for key in keys}, scheme)["weight"] for name in names}


def truth(folder: Path, kind: str) -> nn.Module:
    """transformers' own model of the original's files, in which the dequantized matrices have been put; it has its own fused parameters."""
    tensors = load_file(folder / "model" / "model.safetensors")
    tensors |= {name: value for name, value in load_file(folder / "out" / "model.safetensors").items() if name in tensors}  # biases
    for name, weight in library_weights(folder / "out").items():
        if f"{name}.weight" in tensors:
            assert tensors[f"{name}.weight"].shape == weight.shape
            tensors[f"{name}.weight"] = weight
            continue
        stack, index, turned = in_stack(kind, name)
        tensors[stack][index].copy_(weight.t() if turned else weight)
    shutil.copytree(folder / "model", folder / "truth")
    for key in tensors:
        tensors[key] = tensors[key].contiguous()
    save_file(tensors, folder / "truth" / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(folder / "truth", output_loading_info=True)
    assert not info["missing_keys"]
    return model.eval()


def in_stack(kind: str, name: str) -> tuple[str, int, bool]:
    if kind == "granitemoe":
        path, number, leaf = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)", name).groups()
        return f"{path}.{GRANITE[leaf]}", int(number), False
    pattern, stack, turned = STACKS[kind]
    found = re.fullmatch(pattern, name)
    return found.expand(stack), int(found[2]), turned


@torch.no_grad()
def assert_is_the_dequantized_model(folder: Path, kind: str) -> None:
    ids = token_ids()
    expected = truth(folder, kind)(input_ids=ids, use_cache=False).logits
    found = load_quantized(folder / "out")(input_ids=ids, use_cache=False).logits
    bound = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=bound)
    original = AutoModelForCausalLM.from_pretrained(folder / "model")(input_ids=ids, use_cache=False).logits
    assert float((original - expected).abs().max()) > 50 * bound


@pytest.mark.parametrize("algo", ["rtn", "gptq"])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in MIXTURES])
def test_quantized_mixtures_are_the_dequantized_models(kind, algo, tmp_path):
    report = quantized(tmp_path, kind, algo)
    experts = [layer for layer in report.layers if layer.tokens is not None]
    assert len(experts) % EXPERTS == 0
    assert bool(experts) == (algo == "gptq")
    assert all(0 < layer.relative_error < 0.2 for layer in report.layers)
    assert_is_the_dequantized_model(tmp_path, kind)


@torch.no_grad()
def test_transformers_reads_experts_in_one_scheme_and_the_plan_says_where_it_does_not(tmp_path):
    report = quantized(tmp_path, "mixtral", "gptq")
    assert [reader.refusal for reader in report.readers if reader.name == "transformers"] == [None]
    ids = token_ids()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=ids, use_cache=False).logits
    ours = load_quantized(tmp_path / "out")(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))
    for number, (changes, reason) in enumerate(
        [
            ({"overrides": (Override(pattern=r"layers\.0\.", bits=8),)}, "unless all are in one symmetric scheme"),
            ({"ignore": (r"experts\.0\.",)}, "unless all are in one symmetric scheme"),
            ({"format": "gptq"}, "unless all are in one symmetric scheme"),
            ({"overrides": (Override(pattern=r"w2", group_size=16),), "group_size": 32}, "it does with --group-size 16"),
        ]
    ):
        other = quantize(tmp_path / "model", recipe_for(tmp_path, "rtn", **changes), tmp_path / str(number))
        assert [reason in reader.refusal for reader in other.readers if reader.name == "transformers"] == [True]
        assert load_quantized(tmp_path / str(number))(input_ids=ids, use_cache=False).logits.isfinite().all()
    make_model(tmp_path / "stacked", "gpt_oss")
    stacked = quantize(tmp_path / "stacked", recipe_for(tmp_path, "rtn"), tmp_path / "gpt_oss")
    assert ["does not find single experts" in reader.refusal for reader in stacked.readers if reader.name == "transformers"] == [True]


def test_one_wrong_code_is_seen(tmp_path):
    quantized(tmp_path, "mixtral", "rtn")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    packed = next(name for name in tensors if name.endswith("experts.2.w2.weight_packed"))
    expected = truth(tmp_path, "mixtral")
    tensors[packed] = tensors[packed] ^ 0x7
    save_file(tensors, file, metadata={"format": "pt"})
    ids = token_ids()
    with torch.no_grad():
        found = load_quantized(tmp_path / "out")(input_ids=ids, use_cache=False).logits
        wanted = expected(input_ids=ids, use_cache=False).logits
    assert not torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))

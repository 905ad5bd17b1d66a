"""Blocks with state spaces or convolutions: what is a linear is quantized, the rest arrives, and so does what no class builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dequantized import dequantized
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tiny import TOKENS, byte_tokenizer, make_model, write_text

import ptqcli
from ptqcli.pipeline.prepare import plan_run
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources

WIDTH = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_d_ssm": 128, "mamba_chunk_size": 16}
# name: (configuration class, its arguments, linears, a parameter that stays)
HYBRIDS: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "falcon_h1": ("FalconH1Config", {**WIDTH, **STATES, "head_dim": 16}, 3 * 9, "mamba.conv1d.weight"),
    "lfm2": (
        "Lfm2Config",
        {**WIDTH, "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16, "block_ff_dim": 128},
        2 * 5 + 7,
        "conv.conv.weight",
    ),
    "mamba2": (
        "Mamba2Config",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 32, "n_groups": 1, "state_size": 16, "chunk_size": 16},
        2 * 2,
        "mixer.conv1d.weight",
    ),
}


@torch.no_grad()
def make(folder: Path, name: str) -> Any:
    config, arguments, _, _ = HYBRIDS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**arguments, **TOKENS})).float().eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() == 2 and key.endswith("weight"):
            parameter.normal_(std=0.5 if "emb" in key else 1.0 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("name", HYBRIDS)
def test_linears_are_quantized_and_the_rest_stays(name: str, tmp_path: Path) -> None:
    _, _, linears, kept = HYBRIDS[name]
    model = make(tmp_path / "model", name)
    before = logits(model)
    text = str(write_text(tmp_path / "text.txt"))
    recipe = Recipe(algo="gptq", group_size=16, calib=text, nsamples=4, seqlen=32)
    _, plan = plan_run(tmp_path / "model", recipe, Resources())
    assert any(kept in note and "stay as they are" in note for note in plan.notes)
    ptqcli.quantize(tmp_path / "model", recipe, output=tmp_path / "out")
    packed, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert len([key for key in packed if key.endswith(".weight_packed")]) == linears
    plain = [key for key in original if key in packed]
    assert any(key.endswith(kept) for key in plain)
    assert all(torch.equal(original[key], packed[key]) for key in plain)
    expected = logits(dequantized(tmp_path / "out", model))
    torch.testing.assert_close(logits(ptqcli.load_quantized(tmp_path / "out")), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(before, expected, rtol=1e-2, atol=1e-2)
    if name != "mamba2" or Version(transformers.__version__) >= Version("5.23"):  # the plan says so
        choice = transformers.CompressedTensorsConfig(dequantize=True)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=choice).eval()
        torch.testing.assert_close(logits(theirs), expected, rtol=1e-3, atol=1e-3)


def test_tensors_that_no_class_builds_arrive(tmp_path: Path) -> None:
    """Layers that predict several tokens, a head of another kind, a buffer of an old version: bit for bit, and the plan names them."""
    make_model(tmp_path / "model", num_hidden_layers=2)
    file = tmp_path / "model" / "model.safetensors"
    more = {
        "model.layers.2.mtp.eh_proj.weight": torch.randn(64, 128),
        "score.weight": torch.randn(2, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(8),
        "model.steps": torch.tensor([3], dtype=torch.int64),
    }
    save_file({**load_file(file), **more}, file, {"format": "pt"})
    recipe = Recipe(algo="rtn", group_size=16)
    _, plan = plan_run(tmp_path / "model", recipe, Resources())
    assert any("copied as they are" in note and "mtp" in note for note in plan.notes)
    ptqcli.quantize(tmp_path / "model", recipe, output=tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype for name, tensor in more.items())
    assert logits(ptqcli.load_quantized(tmp_path / "out")).isfinite().all()

"""Scales below zero, everywhere a scale is read.

A signed grid puts the largest weight of a group on the lowest code whatever its sign is, so about half of all scales are negative. Whoever
takes a scale for a size (its logarithm, its magnitude, a clamp above zero) mirrors such a group or refuses the file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import packed
import pytest
import torch
from commandline import Ptq
from layers import random_codes, random_inputs, random_layer, signs
from packed import (
    STATIC,
    TENSOR,
    TOKEN,
    by_transformers,
    change_tensor,
    everything,
    llama,
    logits,
    random_model,
    relative_error,
    w8a8,
    write_checkpoint,
)
from ptq_kernels import LLMInt8Linear, ReferenceWeightOnly, TorchInt4WeightOnly, TorchInt8WeightOnly, W8A8Linear
from torch import Tensor, nn

from ptqcli.errors import PTQError
from ptqcli.formats.compressed_tensors import COMPRESSED_TENSORS
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight, round_to_nearest
from ptqcli.runtime.load import load_quantized

SYMMETRIC = [Scheme(bits, group) for bits in (2, 3, 4, 8) for group in (32, -1)]
ASYMMETRIC = [Scheme(bits, 32, symmetric=False) for bits in (2, 3, 4, 8)]
DOWN = "model.layers.1.mlp.down_proj"


def shares_below_zero(folder: Path) -> list[float]:
    """Of the stored scales, by linear."""
    shares: list[float] = []

    def look(tensors: dict[str, Tensor]) -> None:
        shares.extend(float((scale < 0).float().mean()) for name, scale in tensors.items() if name.endswith(".weight_scale"))

    change_tensor(folder, look)
    return shares


def drop_signs(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith(".weight_scale"):
            tensor.abs_()


def mirrored(weight: QuantizedWeight) -> QuantizedWeight:
    """The same values with every scale's sign changed, which zero points allow."""
    top = weight.scheme.levels - 1
    return replace(weight, codes=top - weight.codes, zero=top - weight.zero, scale=-weight.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SYMMETRIC, ids=str)
def test_transformers_and_we_agree(tmp_path: Path, scheme: Scheme, dtype: torch.dtype) -> None:
    """In bfloat16 the reference agrees, see test_runtime.py."""
    model = random_model(llama(dtype))
    write_checkpoint(tmp_path, model, everything(scheme))
    assert all(0.3 < share < 0.7 for share in shares_below_zero(tmp_path))
    theirs = logits(by_transformers(tmp_path))
    assert relative_error(logits(load_quantized(tmp_path, kernel="reference", fuse=False)), theirs) < 1e-3
    assert relative_error(logits(load_quantized(tmp_path)), theirs) < (1e-3 if dtype == torch.float32 else 2e-2)
    assert relative_error(logits(model), theirs) < 1e-3
    change_tensor(tmp_path, drop_signs)
    assert relative_error(logits(load_quantized(tmp_path)), theirs) > 0.1


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("scheme", ASYMMETRIC, ids=str)
def test_with_zero_points(tmp_path: Path, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitted scales are positive there; refitted ones need not be."""
    monkeypatch.setattr(packed, "round_to_nearest", lambda *arguments: mirrored(round_to_nearest(*arguments)))
    model = random_model(llama())
    write_checkpoint(tmp_path, model, everything(scheme))
    assert set(shares_below_zero(tmp_path)) == {1.0}
    theirs = logits(by_transformers(tmp_path, dequantize=True))
    assert relative_error(logits(load_quantized(tmp_path)), theirs) < 1e-3
    assert relative_error(logits(model), theirs) < 1e-3
    change_tensor(tmp_path, drop_signs)
    assert relative_error(logits(load_quantized(tmp_path)), theirs) > 0.1


@pytest.mark.parametrize("scheme", [w8a8(TOKEN), w8a8(TENSOR), w8a8(STATIC), w8a8(TOKEN, 0), Scheme(4, -1, activations=TOKEN)], ids=str)
def test_with_8_bit_activations(tmp_path: Path, scheme: Scheme) -> None:
    write_checkpoint(tmp_path, random_model(llama()), everything(scheme))
    assert any(share > 0 for share in shares_below_zero(tmp_path))
    theirs = logits(by_transformers(tmp_path))
    assert relative_error(logits(load_quantized(tmp_path)), theirs) < 3e-2  # an input at the border of two codes, see test_runtime.py
    change_tensor(tmp_path, drop_signs)
    assert relative_error(logits(load_quantized(tmp_path)), theirs) > 0.1


@pytest.mark.parametrize("scheme", [*SYMMETRIC, *ASYMMETRIC, w8a8(TOKEN)], ids=str)
def test_what_is_stored_comes_back(tmp_path: Path, scheme: Scheme, ptq: Ptq) -> None:
    model = random_model(llama(layers=2))
    write_checkpoint(tmp_path, model, everything(scheme))
    change_tensor(tmp_path, lambda tensors: tensors[f"{DOWN}.weight_scale"].neg_())
    expected = model.get_submodule(DOWN).weight
    found = open_checkpoint(tmp_path).weight(DOWN).dequantize()
    assert torch.equal(found, -expected)
    assert ptq("inspect", tmp_path).code == 0


LAYERS: dict[str, Any] = {
    **{
        f"reference {bits}": lambda scale, bits=bits: ReferenceWeightOnly(random_codes(48, 128, bits), scale(48, 4), None, bits, 32)
        for bits in (2, 3, 4, 8)
    },
    "torch int4": lambda scale: TorchInt4WeightOnly(random_codes(48, 128, 4), scale(48, 4), None, 32),
    "torch int8": lambda scale: TorchInt8WeightOnly(random_codes(48, 128, 8).view(torch.int8), scale(48, 1).flatten()),
    "w8a8": lambda scale: W8A8Linear(random_codes(48, 128, 8).view(torch.int8), scale(48, 1).flatten()),
    "w8a8, reference": lambda scale: W8A8Linear(random_codes(48, 128, 8).view(torch.int8), scale(48, 1).flatten(), reference=True),
    "llm.int8": lambda scale: LLMInt8Linear(
        random_codes(48, 128, 8).view(torch.int8), scale(48, 1).flatten(), torch.tensor([], dtype=torch.int32), scale(48, 0), 6.0
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_all_signs_changed_gives_the_negative_output(name: str, tokens: int, dtype: torch.dtype) -> None:
    """To the last bit: changing a sign rounds nothing."""

    def layer(sign: int) -> nn.Module:
        made: nn.Module = LAYERS[name](lambda rows, groups: random_layer(rows, max(groups, 1) * 32, 4, 32, dtype).scale[:, :groups] * sign)
        return made

    x = random_inputs(tokens, 128, dtype=dtype)
    assert torch.equal(layer(-1)(x), -layer(1)(x))
    assert layer(1)(x).abs().max() > 0


def test_random_layers_have_both_signs() -> None:
    """All other tests of kernels stand on them."""
    assert 0.4 < float((random_layer(64, 256, 4, 32).scale < 0).float().mean()) < 0.6
    assert set(signs(8, 8).unique().tolist()) == {-1, 1}


def test_another_dtype(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, random_model(llama(torch.bfloat16)), everything(Scheme(4, 32)))
    wide = logits(load_quantized(tmp_path, dtype=torch.float32))
    assert relative_error(logits(load_quantized(tmp_path, dtype=torch.float16)), wide) < 1e-2
    change_tensor(tmp_path, lambda tensors: tensors[f"{DOWN}.weight_scale"][3, 1].fill_(-1e-9))
    with pytest.raises(PTQError, match=r"down_proj: its scales leave the range of torch.float16; load the model in another dtype"):
        load_quantized(tmp_path, dtype=torch.float16)
    change_tensor(tmp_path, lambda tensors: tensors[f"{DOWN}.weight_scale"][3, 1].fill_(-6e4))
    with pytest.raises(PTQError, match="leave the range"):
        load_quantized(tmp_path, dtype=torch.float16)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scheme", [Scheme(2, 32), Scheme(8, -1)], ids=str)
def test_a_scale_whose_values_pass_the_end_of_its_dtype_is_not_written(sign: int, scheme: Scheme) -> None:
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    for share, fits in ((0.99, True), (1.01, False)):
        scale = torch.full((4, scheme.group_count(64)), sign * share * 65504 / scheme.middle, dtype=torch.float16)
        weight = QuantizedWeight(codes=codes, scale=scale, zero=torch.full_like(scale, scheme.middle, dtype=torch.uint8), scheme=scheme)
        if fits:
            COMPRESSED_TENSORS.pack("m", weight)
            continue
        with pytest.raises(PTQError, match=r"m: its weights come so close to the end of torch.float16"):
            COMPRESSED_TENSORS.pack("m", weight)

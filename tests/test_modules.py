"""The layers on the Triton operators: what they hold, that they refuse what does not fit, that they compile whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ptq_kernels import LLMInt8Linear, TritonWeightOnly, W8A8Linear
from ptq_kernels.reference import int8_linear, int_mm_is_fast_and_exact, llm_int8_linear
from torch import Tensor, nn

ROWS, COLUMNS = 70, 192


def codes(bits: int) -> Tensor:
    return torch.randint(0, 1 << bits, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)


def weight_only(bits: int, group_size: int, dtype: torch.dtype, asymmetric: bool = False, g_idx: Tensor | None = None) -> TritonWeightOnly:
    generator = torch.Generator().manual_seed(0)
    groups = 1 if group_size == -1 else COLUMNS // group_size
    scale = torch.rand(ROWS, groups, generator=generator).add(0.5).to(dtype)
    zero = torch.randint(0, 1 << bits, (ROWS, groups), generator=generator, dtype=torch.uint8) if asymmetric else None
    return TritonWeightOnly(codes(bits), scale, zero, bits, group_size, torch.randn(ROWS, generator=generator).to(dtype), g_idx)


def truth(x: Tensor, bits: int, group_size: int, dtype: torch.dtype, asymmetric: bool, g_idx: Tensor) -> Tensor:
    """float64 from the same numbers."""
    generator = torch.Generator().manual_seed(0)
    groups = 1 if group_size == -1 else COLUMNS // group_size
    scale = torch.rand(ROWS, groups, generator=generator).add(0.5).to(dtype).double()
    zero = torch.full((ROWS, groups), 1 << (bits - 1))
    if asymmetric:
        zero = torch.randint(0, 1 << bits, (ROWS, groups), generator=generator, dtype=torch.uint8)
    bias = torch.randn(ROWS, generator=generator).to(dtype).double()
    weight = (codes(bits).double() - zero.double()[:, g_idx]) * scale[:, g_idx]
    return x.double() @ weight.T + bias


def inputs(dtype: torch.dtype, tokens: int = 5) -> Tensor:
    return torch.randn(2, tokens, COLUMNS, generator=torch.Generator().manual_seed(tokens)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits, group_size", [(4, 32), (4, 64), (4, -1), (8, 32), (8, -1), (4, COLUMNS)])
def test_weight_only(bits: int, group_size: int, asymmetric: bool, dtype: torch.dtype) -> None:
    layer = weight_only(bits, group_size, dtype, asymmetric)
    x = inputs(dtype)
    per_group = COLUMNS if group_size == -1 else group_size
    expected = truth(x, bits, group_size, dtype, asymmetric, torch.arange(COLUMNS) // per_group)
    assert (layer(x).double() - expected).norm() < 4e-3 * expected.norm()
    assert layer.kernel == "reference"
    layer.packed[0, 0, :, 0] ^= 8
    assert (layer(x).double() - expected).norm() > 4e-3 * expected.norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_of_a_group_need_not_be_neighbours(bits: int) -> None:
    g_idx = (torch.arange(COLUMNS) * 5 % 6).to(torch.int32)
    layer = weight_only(bits, 32, torch.bfloat16, True, g_idx)
    x = inputs(torch.bfloat16)
    expected = truth(x, bits, 32, torch.bfloat16, True, g_idx.long())
    assert (layer(x).double() - expected).norm() < 4e-3 * expected.norm()
    assert (weight_only(bits, 32, torch.bfloat16, True)(x).double() - expected).norm() > 4e-3 * expected.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits must be one of"),
        ({"group_size": 48}, "group_size must be one of"),
        ({"group_size": 64}, "scale must have shape"),
        ({"scale": torch.ones(ROWS, 6)}, "stored in 16 bits, not as torch.float32"),
        ({"codes": codes(8)}, r"codes must be below 2\^4"),
        ({"bias": torch.ones(ROWS)}, "bias must be torch.bfloat16"),
        ({"g_idx": torch.zeros(COLUMNS, dtype=torch.int32)}, "g_idx must give each of 6 groups 32 columns"),
        ({"g_idx": torch.arange(COLUMNS)}, "g_idx must be int32"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_a_weight_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"codes": codes(4), "scale": torch.ones(ROWS, 6).bfloat16(), "zero": None, "bits": 4, "group_size": 32}
    TritonWeightOnly(**arguments)
    with pytest.raises((TypeError, ValueError), match=message):
        TritonWeightOnly(**{**arguments, **change})


def int8_layers() -> list[nn.Module]:
    generator = torch.Generator().manual_seed(0)
    signed, scale = codes(8).view(torch.int8), torch.rand(ROWS, generator=generator).bfloat16()
    bias = torch.randn(ROWS, generator=generator).bfloat16()
    index, kept = torch.tensor([3, 8], dtype=torch.int32), torch.randn(ROWS, 2, generator=generator).bfloat16()
    static = torch.tensor([0.02]).bfloat16()
    return [
        W8A8Linear(signed, scale, bias=bias),
        W8A8Linear(signed, scale[:1], None, False),
        W8A8Linear(signed, scale, static, False, bias),
        LLMInt8Linear(signed, scale, index, kept, 2.5, True, bias),
        LLMInt8Linear(signed, scale, index, kept),
    ]


def test_integer_layers_are_the_reference_on_a_cpu() -> None:
    x = inputs(torch.bfloat16)
    for layer in int8_layers():
        assert layer.kernel == ("torch" if int_mm_is_fast_and_exact() else "reference")
        if isinstance(layer, W8A8Linear):
            expected = int8_linear(x, layer.codes, layer.scale, layer.input_scale, layer.per_token, layer.bias)
        else:
            given = (layer.codes, layer.scale, layer.outlier_index, layer.outlier_weight, layer.threshold, layer.per_token, layer.bias)
            expected = llm_int8_linear(x, *given)
        assert torch.equal(layer(x), expected)
        layer.reference = True
        assert layer.kernel == "reference"
        assert torch.equal(layer(x), expected)


def test_slots_are_made_at_load_and_not_stored() -> None:
    layer = int8_layers()[-1]
    assert layer.slots.tolist()[:9] == [-1, -1, -1, 0, -1, -1, -1, -1, 1]
    assert "slots" not in layer.state_dict()


@pytest.mark.parametrize("place", range(7))
def test_layers_compile_whole(place: int) -> None:
    layer = [weight_only(4, 64, torch.bfloat16), weight_only(8, -1, torch.bfloat16, True), *int8_layers()][place]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 4, 9):
        x = inputs(torch.bfloat16, tokens)
        assert torch.equal(compiled(x), layer(x))


def test_what_print_shows() -> None:
    shown = repr(nn.ModuleList([weight_only(4, 64, torch.bfloat16), *int8_layers()]))
    assert "TritonWeightOnly(in_features=192, out_features=70, bits=4, group_size=64, bias=True, kernel=reference)" in shown
    assert "inputs=static" in shown
    assert "threshold=2.5, outliers=2" in shown

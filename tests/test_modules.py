"""The layers on the Triton operators: what they hold, that they refuse what does not fit, that they compile whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import Layer, exact_output, random_codes, random_inputs, random_layer
from ptq_kernels import LLMInt8Linear, TritonWeightOnly, W8A8Linear
from ptq_kernels.reference import int8_linear, int_mm_is_fast_and_exact, llm_int8_linear
from torch import Tensor, nn

ROWS, COLUMNS = 70, 192


def stored(bits: int, group_size: int, dtype: torch.dtype, asymmetric: bool) -> Layer:
    return random_layer(ROWS, COLUMNS, bits, group_size, dtype, not asymmetric)


def weight_only(bits: int, group_size: int, dtype: torch.dtype, asymmetric: bool = False, g_idx: Tensor | None = None) -> TritonWeightOnly:
    codes, scale, zero, bias = stored(bits, group_size, dtype, asymmetric)
    return TritonWeightOnly(codes, scale, zero, bits, group_size, bias, g_idx)


def inputs(dtype: torch.dtype, tokens: int = 5) -> Tensor:
    return random_inputs(2, tokens, COLUMNS, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits, group_size", [(4, 32), (4, 64), (4, -1), (8, 32), (8, -1), (4, COLUMNS)])
def test_weight_only(bits: int, group_size: int, asymmetric: bool, dtype: torch.dtype) -> None:
    layer = weight_only(bits, group_size, dtype, asymmetric)
    x = inputs(dtype)
    expected = exact_output(x, stored(bits, group_size, dtype, asymmetric), bits)
    assert (layer(x).double() - expected).norm() < 4e-3 * expected.norm()
    assert layer.kernel == "reference"
    layer.packed[0, 0, :, 0] ^= 8
    assert (layer(x).double() - expected).norm() > 4e-3 * expected.norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_of_a_group_need_not_be_neighbours(bits: int) -> None:
    g_idx = (torch.arange(COLUMNS) * 5 % 6).to(torch.int32)
    layer = weight_only(bits, 32, torch.bfloat16, True, g_idx)
    x = inputs(torch.bfloat16)
    expected = exact_output(x, stored(bits, 32, torch.bfloat16, True), bits, g_idx)
    assert (layer(x).double() - expected).norm() < 4e-3 * expected.norm()
    assert (weight_only(bits, 32, torch.bfloat16, True)(x).double() - expected).norm() > 4e-3 * expected.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits must be one of"),
        ({"group_size": 48}, "group_size must be one of"),
        ({"group_size": 64}, "scale must have shape"),
        ({"scale": torch.ones(ROWS, 6)}, "stored in 16 bits, not as torch.float32"),
        ({"codes": random_codes(ROWS, COLUMNS, 8)}, r"codes must be below 2\^4"),
        ({"bias": torch.ones(ROWS)}, "bias must be torch.bfloat16"),
        ({"g_idx": torch.zeros(COLUMNS, dtype=torch.int32)}, "g_idx must give each of 6 groups 32 columns"),
        ({"g_idx": torch.arange(COLUMNS)}, "g_idx must be int32"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_a_weight_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"codes": random_codes(ROWS, COLUMNS, 4), "scale": torch.ones(ROWS, 6).bfloat16(), "zero": None}
    arguments |= {"bits": 4, "group_size": 32}
    TritonWeightOnly(**arguments)
    with pytest.raises((TypeError, ValueError), match=message):
        TritonWeightOnly(**{**arguments, **change})


def int8_layers() -> list[nn.Module]:
    codes, scales, _, bias = stored(8, -1, torch.bfloat16, False)
    signed, scale = codes.view(torch.int8), scales[:, 0]
    index, kept = torch.tensor([3, 8], dtype=torch.int32), random_inputs(ROWS, 2, dtype=torch.bfloat16)
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

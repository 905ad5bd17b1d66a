"""The plain torch kernels: layout both ways, float64 and integer truth, the contract at the door, and an import that touches no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import exact_weight, random_codes, random_inputs, random_layer
from ptq_kernels import (
    LLMInt8Linear,
    ReferenceWeightOnly,
    W8A8Linear,
    int8_linear,
    llm_int8_linear,
    reference,
    signed_codes,
    weight_only_linear,
)
from ptq_kernels.layout import CODES_PER_BYTE, pack_codes, packed_width, unpack_codes
from torch import Tensor
from torch.nn import functional

GOLDEN = Path(__file__).parent / "golden" / "ct_int_quantized.safetensors"
WIDTHS = tuple(CODES_PER_BYTE)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@given(bits=st.sampled_from(WIDTHS), rows=st.integers(1, 9), columns=st.integers(1, 70), seed=st.integers(0, 2**31))
@settings(max_examples=100)
def test_unpack_is_the_inverse_of_pack(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, packed_width(columns, bits))
    assert torch.equal(unpack_codes(packed, bits, columns), codes)
    per_byte = CODES_PER_BYTE[bits]
    for column in range(columns):
        byte = packed[:, column // per_byte] >> (bits * (column % per_byte))
        assert torch.equal(byte & ((1 << bits) - 1), codes[:, column])


def test_the_layout_is_the_documented_one() -> None:
    codes = torch.tensor([[1, 2, 3, 0, 2]], dtype=torch.uint8)
    assert pack_codes(codes, 2).tolist() == [[0b00_11_10_01, 0b10]]
    assert pack_codes(codes, 4).tolist() == [[0x21, 0x03, 0x02]]
    assert pack_codes(codes, 3).tolist() == codes.tolist()
    assert pack_codes(codes, 8).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_copies(bits: int) -> None:
    codes = random_codes(2, 8, bits)
    packed = pack_codes(codes, bits)
    before = packed.clone()
    codes.zero_()
    assert torch.equal(packed, before)


@pytest.mark.parametrize(
    ("codes", "bits", "error", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int32), 4, TypeError, "codes must be uint8"),
        (torch.zeros(2, dtype=torch.uint8), 4, ValueError, "codes must be"),
        (torch.full((2, 2), 16, dtype=torch.uint8), 4, ValueError, r"codes must be below 2\^4, found 16"),
        (torch.zeros(2, 2, dtype=torch.uint8), 9, ValueError, "bits must be one of"),
    ],
)
def test_what_cannot_be_packed(codes: Tensor, bits: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack_codes(codes, bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_signed_codes_are_less_the_middle(bits: int) -> None:
    codes = torch.arange(1 << bits, dtype=torch.uint8).unsqueeze(0)
    signed = signed_codes(codes, bits)
    assert signed.dtype == torch.int8
    assert signed.tolist() == [list(range(-(1 << (bits - 1)), 1 << (bits - 1)))]
    with pytest.raises(TypeError, match="codes must be uint8"):
        signed_codes(signed, bits)


def case(
    bits: int, dtype: torch.dtype, rows: int, columns: int, group_size: int, symmetric: bool, shape: tuple[int, ...]
) -> dict[str, Any]:
    """Arguments of ``weight_only_linear``; signed inputs and biases."""
    layer = random_layer(rows, columns, bits, group_size, dtype, symmetric)
    return {
        "x": random_inputs(*shape, columns, dtype=dtype),
        "packed": pack_codes(layer.codes, bits),
        "scale": layer.scale,
        "zero": layer.zero,
        "bits": bits,
        "group_size": group_size,
        "bias": layer.bias,
    }


def exact_output(arguments: dict[str, Any], index: Tensor) -> Tensor:
    """``weight_only_linear`` with float64 weights and products; the weight is rounded once to the dtype of x."""
    x, bits = arguments["x"], arguments["bits"]
    codes = unpack_codes(arguments["packed"], bits, x.shape[-1])
    weight = exact_weight(codes, arguments["scale"], arguments["zero"], bits, index).to(x.dtype).double()
    out = torch.einsum("...k,nk->...n", x.double(), weight)
    return out if arguments["bias"] is None else out + arguments["bias"].double()


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


SHAPES = [  # rows, columns, group size, shape of x before K
    (48, 64, 32, (7,)),
    (5, 33, 11, (2, 3)),
    (1, 30, -1, (1,)),
    (17, 7, 1, ()),
    (3, 5, 5, (0, 4)),
]


@pytest.mark.parametrize(("rows", "columns", "group_size", "shape"), SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_against_float64(
    bits: int, dtype: torch.dtype, symmetric: bool, rows: int, columns: int, group_size: int, shape: tuple[int, ...]
) -> None:
    arguments = case(bits, dtype, rows, columns, group_size, symmetric, shape)
    index = torch.arange(columns) // (columns if group_size == -1 else group_size)
    found = weight_only_linear(**arguments)
    expected = exact_output(arguments, index)
    assert found.dtype == dtype
    assert found.shape == (*shape, rows)
    if found.numel():
        assert relative_error(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("change", ["packed", "scale", "zero", "bias", "x"])
def test_one_change_is_noticed(bits: int, change: str) -> None:
    """The twin of the test above: with one number moved by its smallest step, the float64 truth is missed."""
    arguments = case(bits, torch.float32, 48, 64, 32, False, (7,))
    expected = exact_output(arguments, torch.arange(64) // 32)
    tensor = arguments[change]
    tensor.view(-1)[3] = (tensor.view(-1)[3] ^ 1) if tensor.dtype == torch.uint8 else tensor.view(-1)[3] * 1.01
    assert relative_error(weight_only_linear(**arguments), expected) > TOLERANCE[torch.float32]


@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_in_any_group(symmetric: bool) -> None:
    arguments = case(4, torch.float32, 6, 40, 8, symmetric, (3,))
    index = torch.randperm(40, generator=torch.Generator().manual_seed(1)) // 8
    found = weight_only_linear(**arguments, g_idx=index.int())
    assert relative_error(found, exact_output(arguments, index)) < 1e-5
    assert relative_error(weight_only_linear(**arguments), exact_output(arguments, index)) > 1e-2


def test_a_symmetric_weight_may_bring_its_zero_points() -> None:
    arguments = case(3, torch.bfloat16, 6, 40, 8, True, (3,))
    without = weight_only_linear(**arguments)
    arguments["zero"] = torch.full((6, 5), 4, dtype=torch.uint8)
    assert torch.equal(weight_only_linear(**arguments), without)


def test_scales_of_another_dtype_are_used_unrounded() -> None:
    arguments = case(4, torch.bfloat16, 6, 40, 8, False, (3,))
    arguments["scale"] = arguments["scale"].float() + 1e-5
    expected = exact_output(arguments, torch.arange(40) // 8)
    assert relative_error(weight_only_linear(**arguments), expected) < TOLERANCE[torch.bfloat16]


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integer x": ({"x": torch.ones(2, 64, dtype=torch.int32)}, TypeError, "x must be floating point"),
    "group": ({"group_size": 24}, ValueError, "group_size 24 does not divide the 64 columns of x"),
    "zero group": ({"group_size": 0}, ValueError, "group_size 0 does not divide"),
    "bits": ({"bits": 9}, ValueError, "bits must be one of"),
    "packed dtype": ({"packed": torch.zeros(48, 32, dtype=torch.int32)}, TypeError, "packed must be torch.uint8"),
    "packed width": ({"packed": torch.zeros(48, 64, dtype=torch.uint8)}, ValueError, r"packed must have shape \[48, 32\]"),
    "scale dtype": ({"scale": torch.ones(48, 2, dtype=torch.int32)}, TypeError, "scale must be floating point"),
    "scale shape": ({"scale": torch.ones(48, 4)}, ValueError, r"scale must have shape \[48, 2\], not \[48, 4\]"),
    "zero dtype": ({"zero": torch.ones(48, 2)}, TypeError, "zero must be torch.uint8"),
    "zero shape": ({"zero": torch.ones(2, 48, dtype=torch.uint8)}, ValueError, "zero must have shape"),
    "bias dtype": ({"bias": torch.ones(48).half()}, TypeError, "bias must be torch.float32"),
    "bias shape": ({"bias": torch.ones(1)}, ValueError, "bias must have shape"),
    "g_idx dtype": ({"g_idx": torch.zeros(64)}, TypeError, "g_idx must be torch.int32"),
    "g_idx shape": ({"g_idx": torch.zeros(2, dtype=torch.int32)}, ValueError, "g_idx must have shape"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_the_contract_names_the_argument(kind: str) -> None:
    change, error, message = WRONG[kind]
    arguments = {**case(4, torch.float32, 48, 64, 32, False, (2,)), **change}
    with pytest.raises(error, match=message):
        weight_only_linear(**arguments)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_layer_is_the_function(bits: int, symmetric: bool) -> None:
    arguments = case(bits, torch.float32, 6, 40, 8, symmetric, (3,))
    codes = unpack_codes(arguments["packed"], bits, 40)
    layer = ReferenceWeightOnly(codes, arguments["scale"], arguments["zero"], bits, 8, arguments["bias"])
    assert torch.equal(layer(arguments["x"]), weight_only_linear(**arguments))
    assert list(layer.parameters()) == []
    assert f"in_features=40, out_features=6, bits={bits}, group_size=8, bias=True" in repr(layer)


def test_the_layer_checks_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="scale must have shape"):
        ReferenceWeightOnly(random_codes(6, 40, 4), torch.ones(6, 2), None, 4, 8)


def test_the_layer_moves_and_casts_as_modules_do() -> None:
    arguments = case(4, torch.float32, 6, 40, 8, False, (3,))
    layer = ReferenceWeightOnly(unpack_codes(arguments["packed"], 4, 40), arguments["scale"], arguments["zero"], 4, 8, arguments["bias"])
    layer.to(torch.bfloat16)
    assert layer.packed.dtype == torch.uint8
    assert layer.scale.dtype == torch.bfloat16
    assert layer(arguments["x"].bfloat16()).dtype == torch.bfloat16
    assert layer.to("meta")(arguments["x"].bfloat16().to("meta")).shape == (3, 6)


# Integer products.

EXTREMES = torch.tensor([-128, -127, -1, 0, 1, 126, 127], dtype=torch.int8)


def integers(rows: int, columns: int, seed: int, extreme: bool = False) -> Tensor:
    drawn = random_codes(rows, columns, 8, seed)
    return EXTREMES[drawn.long() % len(EXTREMES)] if extreme else drawn.view(torch.int8)


def integer_truth(left: Tensor, right: Tensor) -> Tensor:
    return left.long() @ right.long().t()


@pytest.fixture(params=["torch", "chunks"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as this CPU does it, once as one does whose integer product is not exact."""
    if request.param == "chunks":
        monkeypatch.setattr(reference, "int_mm_is_fast_and_exact", lambda: False)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (1, 5), (2, 3), (7, 1), (63, 33), (129, 65), (1025, 9), (2051, 3)])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 16, 17, 64])
def test_integer_products_are_exact(tokens: int, columns: int, rows: int) -> None:
    for extreme in (False, True):
        left, right = integers(tokens, columns, 1, extreme), integers(rows, columns, 2, extreme)
        found = reference.integer_product(left, right)
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), integer_truth(left, right))


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("columns", [70_000, reference.TOO_MANY_COLUMNS - 1])
@pytest.mark.parametrize(("left", "right"), [(-128, -128), (127, -128), (-128, 127), (127, 127)])
def test_long_sums_are_exact(columns: int, left: int, right: int) -> None:
    """Sums beyond what float32 holds, up to the largest that 32 bits hold; one code changed by 1 shows in them."""
    x, w = torch.full((2, columns), left, dtype=torch.int8), torch.full((3, columns), right, dtype=torch.int8)
    w[1, columns // 2] += 1 if right < 0 else -1
    found = reference.integer_product(x, w).long()
    assert torch.equal(found, integer_truth(x, w))
    assert int(found[0, 0] - found[0, 1]) == (-left if right < 0 else left)
    assert found.abs().max() > 2**24


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_a_cpu_without_integer_instructions(isa: str) -> None:
    """oneDNN, told to use older instructions only, adds pairs of products with 16-bit saturation, which must not show."""
    code = (
        "import torch; from ptq_kernels.reference import integer_product\n"
        "for value in (-128, 127):\n"
        "    x = torch.full((17, 65), value, dtype=torch.int8)\n"
        "    for w in (x, -1 - x):\n"
        "        assert torch.equal(integer_product(x, w).long(), x.long() @ w.long().t())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa})


@pytest.mark.parametrize(("kind", "per_token"), [("act_token_sym", True), ("act_tensor_sym_dyn", False)])
def test_inputs_are_quantized_as_by_the_library(kind: str, per_token: bool) -> None:
    from safetensors.torch import load_file

    golden = load_file(GOLDEN)
    x, fake = golden["x"], golden[f"{kind}.fake_quant"]
    unit = torch.eye(32, dtype=torch.int8)
    assert torch.equal(int8_linear(x, unit, torch.ones(1), None, per_token), fake)
    if not per_token:
        assert torch.equal(int8_linear(x, unit, torch.ones(1), golden[f"{kind}.scale"], False), fake)
    x[0, 1, 3] += 2 * golden[f"{kind}.scale"].amax()
    assert not torch.equal(int8_linear(x, unit, torch.ones(1), None, per_token), fake)


def int8_case(
    dtype: torch.dtype, tokens: int = 7, columns: int = 64, rows: int = 48, inputs: str = "token", per_row: bool = True
) -> dict[str, Any]:
    """Arguments of ``int8_linear``; signed inputs and biases."""
    layer = random_layer(rows, columns, 8, -1, dtype)
    return {
        "x": random_inputs(tokens, columns, dtype=dtype, seed=0),
        "codes": layer.codes.view(torch.int8),
        "scale": layer.scale[: rows if per_row else 1, 0],
        "input_scale": torch.tensor([0.01], dtype=dtype) if inputs == "static" else None,
        "per_token": inputs == "token",
        "bias": layer.bias,
    }


def exact_int8_output(x: Tensor, codes: Tensor, scale: Tensor, input_scale: Tensor | None, per_token: bool, bias: Tensor) -> Tensor:
    """``int8_linear`` with NumPy's float32 for the codes of ``x``, int64 sums and float64 from there.

    Codes from float64 would differ: the largest input of a token stands at 127.5 steps, right between two of them.
    """
    values = x.float().numpy()
    largest = np.abs(values).max(axis=1 if per_token else None, keepdims=True)
    step = largest / np.float32(127.5) if input_scale is None else input_scale.float().numpy()
    codes_of_x = np.rint(values / np.where(step == 0, np.float32(1), step)).clip(-128, 127).astype(np.int64)
    sums = torch.from_numpy(codes_of_x) @ codes.long().t()
    return sums.double() * torch.from_numpy(step).double() * scale.double() + bias.double()


INT8_TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
INPUTS = ("token", "tensor", "static")


@pytest.mark.parametrize(("columns", "rows"), [(63, 33), (1, 7), (5, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17, 64])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_against_float64(dtype: torch.dtype, inputs: str, tokens: int, columns: int, rows: int) -> None:
    for per_row in (True, False):
        arguments = int8_case(dtype, tokens, columns, rows, inputs, per_row)
        found = int8_linear(**arguments)
        assert found.dtype == dtype
        assert found.shape == (tokens, rows)
        assert relative_error(found, exact_int8_output(**arguments)) < INT8_TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("inputs", "change"), [*((i, c) for i in INPUTS for c in ("x", "codes", "scale", "bias")), ("static", "input_scale")]
)
def test_one_change_to_int8_is_noticed(inputs: str, change: str) -> None:
    """The twin of the test above."""
    arguments = int8_case(torch.float32, inputs=inputs)
    expected = exact_int8_output(**arguments)
    first = arguments[change].view(-1)
    first[0] = first[0] ^ 1 if change == "codes" else first[0] * 1.01 + 0.05
    assert relative_error(int8_linear(**arguments), expected) > INT8_TOLERANCE[torch.float32]


def test_int8_leading_dimensions_and_empty_inputs() -> None:
    arguments = int8_case(torch.float32, tokens=6)
    flat = int8_linear(**arguments)
    assert torch.equal(int8_linear(**{**arguments, "x": arguments["x"].view(2, 3, 64)}), flat.view(2, 3, 48))
    assert torch.equal(int8_linear(**{**arguments, "x": arguments["x"][4]}), flat[4])
    for per_token in (True, False):
        assert int8_linear(**{**arguments, "x": torch.ones(0, 4, 64), "per_token": per_token}).shape == (0, 4, 48)


@pytest.mark.parametrize("inputs", INPUTS)
def test_zeros_give_the_bias_and_nan_stays_nan(inputs: str) -> None:
    arguments = int8_case(torch.bfloat16, inputs=inputs)
    arguments["x"].zero_()
    assert torch.equal(int8_linear(**arguments), arguments["bias"].expand(7, 48))
    arguments["x"][3] = 1e-40  # so small that its scale is zero in float32
    assert torch.equal(int8_linear(**arguments), arguments["bias"].expand(7, 48))
    if inputs != "static":
        arguments["x"][2, 5] = torch.nan
        assert int8_linear(**arguments)[2].isnan().all()


def llm_int8_case(dtype: torch.dtype, kept: list[int], bias: bool = True) -> dict[str, Any]:
    """Arguments of ``llm_int8_linear`` with 16-bit columns that are not the dequantized ones, and inputs up to about 3."""
    arguments = int8_case(dtype)
    del arguments["input_scale"]
    arguments["outlier_index"] = torch.tensor(kept, dtype=torch.int32)
    arguments["outlier_weight"] = random_inputs(48, len(kept), dtype=dtype, seed=2)
    arguments["bias"] = arguments["bias"] if bias else None
    return arguments


ALL = list(range(64))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_column_an_outlier_is_the_16_bit_product(dtype: torch.dtype, bias: bool) -> None:
    arguments = llm_int8_case(dtype, ALL, bias)
    expected = functional.linear(arguments["x"], arguments["outlier_weight"], arguments["bias"])
    assert torch.equal(llm_int8_linear(**arguments), expected)
    assert torch.equal(llm_int8_linear(**arguments, threshold=1e-3), expected)
    arguments["outlier_weight"][2, 5] *= 1.01
    assert not torch.equal(llm_int8_linear(**arguments), expected)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_outlier_is_the_int8_product(dtype: torch.dtype, per_token: bool) -> None:
    arguments = {**llm_int8_case(dtype, []), "per_token": per_token}
    expected = int8_linear(**{name: arguments[name] for name in ("x", "codes", "scale", "bias")}, per_token=per_token)
    assert torch.equal(llm_int8_linear(**arguments), expected)
    assert torch.equal(llm_int8_linear(**arguments, threshold=6.0), expected)
    kept = {**llm_int8_case(dtype, [3, 9]), "per_token": per_token}
    assert torch.equal(llm_int8_linear(**kept, threshold=6.0), expected)
    assert not torch.equal(llm_int8_linear(**kept), expected)


def exact_split(arguments: dict[str, Any], columns: list[int]) -> Tensor:
    """``llm_int8_linear`` in float64 with ``columns`` split off, their weights taken one by one."""
    x, codes, scale, bias = (arguments[name] for name in ("x", "codes", "scale", "bias"))
    kept = arguments["outlier_index"].tolist()
    below = x.clone()
    below[:, columns] = 0
    out = exact_int8_output(below, codes, scale, None, arguments["per_token"], bias)
    for column in columns:
        dequantized = (codes[:, column].float() * scale.float()).to(x.dtype)
        weight = arguments["outlier_weight"][:, kept.index(column)] if column in kept else dequantized
        out += x[:, column, None].double() * weight.double()
    return out


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_split_against_float64(dtype: torch.dtype, per_token: bool) -> None:
    arguments = {**llm_int8_case(dtype, [3, 9, 40]), "per_token": per_token}
    arguments["x"][2, 9], arguments["x"][5, 40], arguments["x"][0, 17] = 50.0, -20.0, 6.5
    arguments["x"][1, 3] = 6.0  # at the threshold is not above it
    for threshold, columns in ((None, [3, 9, 40]), (6.0, [9, 17, 40]), (19.0, [9, 40])):
        found, expected = llm_int8_linear(**arguments, threshold=threshold), exact_split(arguments, columns)
        assert found.dtype == dtype
        assert relative_error(found, expected) < INT8_TOLERANCE[dtype]
        if dtype != torch.float32:  # rounded once, so nearly all numbers are the nearest ones
            assert (found == expected.to(dtype)).float().mean() > 0.99
        assert relative_error(found, exact_split(arguments, columns[:-1])) > INT8_TOLERANCE[dtype]


@pytest.mark.parametrize("change", ["x", "codes", "scale", "outlier_weight", "bias"])
@pytest.mark.parametrize("threshold", [None, 6.0])
def test_one_change_to_a_split_is_noticed(threshold: float | None, change: str) -> None:
    """The twin of the test above."""
    arguments = llm_int8_case(torch.float32, [3, 9])
    arguments["x"][2, [3, 9]] = 50.0
    expected = exact_split(arguments, [3, 9])
    first = arguments[change].view(-1)
    first[0] = first[0] ^ 1 if change == "codes" else first[0] * 1.01 + 0.05
    assert relative_error(llm_int8_linear(**arguments, threshold=threshold), expected) > INT8_TOLERANCE[torch.float32]


WRONG_INT8: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integer x": ({"x": torch.ones(2, 64, dtype=torch.int8)}, TypeError, "x must be floating point"),
    "unsigned codes": ({"codes": torch.zeros(48, 64, dtype=torch.uint8)}, TypeError, "codes must be torch.int8"),
    "width": ({"codes": torch.zeros(48, 60, dtype=torch.int8)}, ValueError, r"codes must have shape \[48, 64\]"),
    "scale dtype": ({"scale": torch.ones(48, dtype=torch.int32)}, TypeError, "scale must be floating point"),
    "scale shape": ({"scale": torch.ones(48, 1)}, ValueError, r"scale must have shape \[48\], not \[48, 1\]"),
    "input scale per token": ({"input_scale": torch.ones(1)}, ValueError, "per_token must be False with an input_scale"),
    "input scale": ({"input_scale": torch.ones(2), "per_token": False}, ValueError, r"input_scale must have shape \[1\]"),
    "bias dtype": ({"bias": torch.ones(48).half()}, TypeError, "bias must be torch.float32"),
    "bias shape": ({"bias": torch.ones(1)}, ValueError, "bias must have shape"),
    "sums too long": (
        {"x": torch.ones(1, 1 << 17), "codes": torch.zeros(48, 1, dtype=torch.int8).expand(48, 1 << 17)},
        ValueError,
        "x must have fewer than 131072 columns",
    ),
}
WRONG_SPLIT: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "codes": ({"codes": torch.zeros(48, 64)}, TypeError, "codes must be torch.int8"),
    "index dtype": ({"outlier_index": torch.zeros(2)}, TypeError, "outlier_index must be torch.int32"),
    "index shape": ({"outlier_index": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, r"outlier_index must have shape \[2\]"),
    "weight dtype": ({"outlier_weight": torch.ones(48, 2, dtype=torch.int8)}, TypeError, "outlier_weight must be floating point"),
    "weight shape": ({"outlier_weight": torch.ones(2, 48)}, ValueError, r"outlier_weight must have shape \[48, 2\]"),
    "threshold": ({"threshold": 0.0}, ValueError, "threshold must be positive, not 0.0"),
    "no threshold": ({"threshold": torch.nan}, ValueError, "threshold must be positive, not nan"),
}
WRONG_LAYER: dict[str, tuple[dict[str, Any], str]] = {
    "beyond": ({"outlier_index": torch.tensor([3, 64], dtype=torch.int32)}, "outlier_index must hold rising columns below 64"),
    "negative": ({"outlier_index": torch.tensor([-1, 3], dtype=torch.int32)}, "outlier_index must hold rising columns"),
    "falling": ({"outlier_index": torch.tensor([9, 3], dtype=torch.int32)}, "outlier_index must hold rising columns"),
    "twice": ({"outlier_index": torch.tensor([3, 3], dtype=torch.int32)}, "outlier_index must hold rising columns"),
    "flat codes": ({"codes": torch.zeros(64, dtype=torch.int8)}, r"codes must be \[N, K\], not \[64\]"),
}


@pytest.mark.parametrize("kind", WRONG_INT8)
def test_the_int8_contract_names_the_argument(kind: str) -> None:
    change, error, message = WRONG_INT8[kind]
    arguments = {**int8_case(torch.float32), **change}
    with pytest.raises(error, match=message):
        int8_linear(**arguments)
    if "x" not in change:
        del arguments["x"]
        if kind not in ("width", "bias dtype"):  # a layer takes both from what it is given
            with pytest.raises(error, match=message):
                W8A8Linear(**arguments)


@pytest.mark.parametrize("kind", WRONG_SPLIT)
def test_the_split_contract_names_the_argument(kind: str) -> None:
    change, error, message = WRONG_SPLIT[kind]
    arguments = {**llm_int8_case(torch.float32, [3, 9]), **change}
    with pytest.raises(error, match=message):
        llm_int8_linear(**arguments)
    del arguments["x"]
    with pytest.raises(error, match=message):
        LLMInt8Linear(**arguments)


@pytest.mark.parametrize("kind", WRONG_LAYER)
def test_the_split_layer_checks_its_columns(kind: str) -> None:
    change, message = WRONG_LAYER[kind]
    arguments = {**llm_int8_case(torch.float32, [3, 9]), **change}
    del arguments["x"]
    with pytest.raises(ValueError, match=message):
        LLMInt8Linear(**arguments)


@pytest.mark.parametrize("inputs", INPUTS)
def test_the_int8_layer_is_the_function(inputs: str) -> None:
    arguments = int8_case(torch.float32, inputs=inputs)
    x = arguments.pop("x")
    layer = W8A8Linear(**arguments)
    assert torch.equal(layer(x), int8_linear(x, **arguments))
    assert list(layer.parameters()) == []
    assert f"in_features=64, out_features=48, inputs={inputs}, bias=True" in repr(layer)
    layer.to(torch.bfloat16)
    assert layer.codes.dtype == torch.int8
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer.to("meta")(x.bfloat16().to("meta")).shape == (7, 48)


@pytest.mark.parametrize("threshold", [None, 2.5])
def test_the_split_layer_is_the_function(threshold: float | None) -> None:
    arguments = llm_int8_case(torch.float32, [3, 9])
    x = arguments.pop("x")
    layer = LLMInt8Linear(**arguments, threshold=threshold)
    assert torch.equal(layer(x), llm_int8_linear(x, **arguments, threshold=threshold))
    assert list(layer.parameters()) == []
    assert f"in_features=64, out_features=48, inputs=token, threshold={threshold}, outliers=2, bias=True" in repr(layer)
    layer.to(torch.bfloat16)
    assert layer.outlier_index.dtype == torch.int32
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_importing_touches_no_gpu() -> None:
    code = "import sys, torch, ptq_kernels; assert not torch.cuda.is_initialized(); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

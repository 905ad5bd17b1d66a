"""The plain torch kernels: layout both ways, float64 truth, the contract at the door, and an import that touches no GPU."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ptq_kernels import WeightOnlyLinear, weight_only_linear
from ptq_kernels.layout import CODES_PER_BYTE, pack_codes, packed_width, unpack_codes
from torch import Tensor

WIDTHS = tuple(CODES_PER_BYTE)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


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
        (torch.zeros(2, 2, dtype=torch.uint8), 5, ValueError, "bits must be one of"),
    ],
)
def test_what_cannot_be_packed(codes: Tensor, bits: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack_codes(codes, bits)


def exact_weight(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, index: Tensor) -> Tensor:
    """The weight in float64, column by column."""
    centre = torch.full(scale.shape, 2.0 ** (bits - 1), dtype=torch.float64) if zero is None else zero.double()
    columns = [(codes[:, k].double() - centre[:, g]) * scale[:, g].double() for k, g in enumerate(index.tolist())]
    return torch.stack(columns, dim=1)


def case(
    bits: int, dtype: torch.dtype, rows: int, columns: int, group_size: int, symmetric: bool, shape: tuple[int, ...], seed: int = 0
) -> dict[str, Any]:
    """Arguments of ``weight_only_linear``; signed inputs and biases."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else columns // group_size
    return {
        "x": torch.randn(*shape, columns, generator=generator).to(dtype),
        "packed": pack_codes(random_codes(rows, columns, bits, seed), bits),
        "scale": (torch.rand(rows, groups, generator=generator) * 0.1 + 0.01).to(dtype),
        "zero": None if symmetric else random_codes(rows, groups, bits, seed + 1),
        "bits": bits,
        "group_size": group_size,
        "bias": torch.randn(rows, generator=generator).to(dtype),
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
    "bits": ({"bits": 5}, ValueError, "bits must be one of"),
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
    layer = WeightOnlyLinear(codes, arguments["scale"], arguments["zero"], bits, 8, arguments["bias"])
    assert torch.equal(layer(arguments["x"]), weight_only_linear(**arguments))
    assert list(layer.parameters()) == []
    assert f"in_features=40, out_features=6, bits={bits}, group_size=8, bias=True" in repr(layer)


def test_the_layer_checks_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="scale must have shape"):
        WeightOnlyLinear(random_codes(6, 40, 4), torch.ones(6, 2), None, 4, 8)


def test_the_layer_moves_and_casts_as_modules_do() -> None:
    arguments = case(4, torch.float32, 6, 40, 8, False, (3,))
    layer = WeightOnlyLinear(unpack_codes(arguments["packed"], 4, 40), arguments["scale"], arguments["zero"], 4, 8, arguments["bias"])
    layer.to(torch.bfloat16)
    assert layer.packed.dtype == torch.uint8
    assert layer.scale.dtype == torch.bfloat16
    assert layer(arguments["x"].bfloat16()).dtype == torch.bfloat16
    assert layer.to("meta")(arguments["x"].bfloat16().to("meta")).shape == (3, 6)


def test_importing_touches_no_gpu() -> None:
    code = "import sys, torch, ptq_kernels; assert not torch.cuda.is_initialized(); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""bitsandbytes files: against the vectors and checkpoints of the library both ways, solvers on its grids, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import correlated_layer, random_codes, refused_when_damaged
from packed import change_tensor
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import ptqcli
from ptqcli.checkpoint.tensors import MemoryTensors
from ptqcli.errors import PTQError, UsageError
from ptqcli.finishing.student import Student
from ptqcli.formats import LinearSpec, find_format, other_codes
from ptqcli.formats.bitsandbytes import BITSANDBYTES
from ptqcli.formats.compressed_tensors import COMPRESSED_TENSORS
from ptqcli.formats.gguf_encode import holding_type
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.numerics.double_quant import DoubleScales, dynamic_map
from ptqcli.numerics.elements import CODEBOOKS, FP4, NF4
from ptqcli.numerics.ranges import MinMax, SquaredError
from ptqcli.numerics.scheme import AUTO_GROUP, ActivationScheme, OutlierSplit, Scheme, usual_schemes
from ptqcli.numerics.weight import OutlierColumns, QuantizedWeight, round_to_nearest
from ptqcli.recipe import Override
from ptqcli.runtime import load_quantized
from ptqcli.runtime.layers import kernels_in, quantized_linear
from ptqcli.solvers.gptq import GPTQ
from ptqcli.solvers.obq import OBQ
from ptqcli.solvers.rtn import RTN

GOLDEN = Path(__file__).parent / "golden"
CASES = {"nf4": "nf4-g64", "fp4": "fp4-g64", "nf4_dq": "nf4-g64-double"}
INT8 = Scheme.parse("w8a8-outliers6")


def vectors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "bitsandbytes.safetensors")


def golden(case: str) -> dict[str, Tensor]:
    """The tensors of a case as those of the linear ``m``."""
    found = {name.removeprefix(f"{case}."): tensor for name, tensor in vectors().items() if name.startswith(f"{case}.")}
    found.pop("dequantized", None)
    if case == "int8":
        return {f"m.{leaf}": tensor for leaf, tensor in found.items()}
    return {f"m.weight.{leaf}" if leaf != "weight" else "m.weight": tensor for leaf, tensor in found.items()}


def assert_same_weight(left: QuantizedWeight, right: QuantizedWeight) -> None:
    assert left.scheme == right.scheme
    for field in ("codes", "scale", "zero"):
        assert torch.equal(getattr(left, field), getattr(right, field)), field
    assert (left.double is None) == (right.double is None)
    if left.double is not None and right.double is not None:
        assert left.double.offset == right.double.offset
        assert all(torch.equal(getattr(left.double, part), getattr(right.double, part)) for part in ("codes", "absmax", "levels"))


# Vectors of the library


@pytest.mark.parametrize("case", CASES)
def test_golden_vectors_are_read_and_written(case: str) -> None:
    expected, scheme = golden(case), Scheme.parse(CASES[case])
    weight = BITSANDBYTES.unpack("m", expected.__getitem__, scheme)
    assert torch.equal(weight.dequantize(), vectors()[f"{case}.dequantized"])
    written = BITSANDBYTES.pack("m", weight)
    assert written.keys() == expected.keys() == set(BITSANDBYTES.tensor_names("m", scheme))
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    weight.codes[5, 1] ^= 4
    assert not torch.equal(BITSANDBYTES.pack("m", weight)["m.weight"], expected["m.weight"])
    assert not torch.equal(weight.dequantize(), vectors()[f"{case}.dequantized"])


def test_golden_vectors_of_8_bits_are_read_and_written() -> None:
    expected = golden("int8")
    weight = BITSANDBYTES.unpack("m", expected.__getitem__, INT8)
    exact = expected["m.weight"].double() * expected["m.SCB"].double().unsqueeze(1) / 127
    torch.testing.assert_close(weight.dequantize().double(), exact, rtol=2e-7, atol=0)
    written = BITSANDBYTES.pack("m", weight)
    assert torch.equal(written["m.weight"], expected["m.weight"])
    torch.testing.assert_close(written["m.SCB"], expected["m.SCB"], rtol=1.2e-7, atol=0)
    assert (written["m.weight_format"].dtype, written["m.weight_format"].shape, written["m.weight_format"].item()) == (torch.uint8, (), 0)
    expected["m.weight"][0, 0] += 1
    assert not torch.equal(BITSANDBYTES.unpack("m", expected.__getitem__, INT8).codes, weight.codes)


@pytest.mark.parametrize("case", ["nf4", "fp4"])
def test_rounding_gives_the_codes_of_the_library(case: str) -> None:
    weight = RTN(scale_search="minmax").solve(vectors()["input"], None, Scheme.parse(CASES[case]), torch.float32).weight
    for name, tensor in BITSANDBYTES.pack("m", weight).items():
        assert torch.equal(tensor, golden(case)[name]), name


def test_doubly_quantized_scales_are_those_of_the_library_and_the_codes_are_chosen_for_them() -> None:
    """The library chooses codes for the scales before they are rounded, and so some that are not nearest."""
    exact, expected = vectors()["input"], golden("nf4_dq")
    weight = RTN(scale_search="minmax").solve(exact, None, Scheme.parse("nf4-g64-double"), torch.float32).weight
    written = BITSANDBYTES.pack("m", weight)
    assert {name for name, tensor in written.items() if not torch.equal(tensor, expected[name])} == {"m.weight"}
    assert torch.equal(weight.codes, nearest(exact, weight.scale, NF4.levels))
    theirs = BITSANDBYTES.unpack("m", expected.__getitem__, weight.scheme)
    assert 0 < (weight.codes != theirs.codes).sum() < 16
    assert (weight.dequantize() - exact).norm() < (theirs.dequantize() - exact).norm()


def nearest(exact: Tensor, scale: Tensor, levels: tuple[float, ...]) -> Tensor:
    """By trying every level: uint8 [out, in]."""
    values = torch.tensor(levels).double() * scale.double().repeat_interleave(exact.shape[1] // scale.shape[1], dim=1).unsqueeze(-1)
    return (values - exact.double().unsqueeze(-1)).abs().argmin(dim=-1).to(torch.uint8)


def test_the_map_of_scales_is_that_of_the_library() -> None:
    assert torch.equal(dynamic_map(), golden("nf4_dq")["m.weight.nested_quant_map"])


def test_levels_are_those_of_the_library() -> None:
    assert torch.equal(torch.tensor(NF4.levels), golden("nf4")["m.weight.quant_map"])
    assert torch.equal(torch.tensor(FP4.levels), golden("fp4")["m.weight.quant_map"].sort().values)


# Checkpoints of transformers and the library


def expected_logits(name: str) -> Tensor:
    return load_file(GOLDEN / "ckpt" / "expected_logits.safetensors")[name]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(1, 17).unsqueeze(0)).logits[0]
    return found.float()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_a_checkpoint_in_nf4_has_its_logits() -> None:
    model = load_quantized(GOLDEN / "ckpt" / "bnb_nf4_dq", dtype=torch.float32)
    assert kernels_in(model) == {"NF4 reference": 14}
    assert relative(logits(model), expected_logits("bnb_nf4_dq")) < 1e-5
    model.get_submodule("model.layers.1.mlp.down_proj").packed[0, 0] ^= 8
    assert relative(logits(model), expected_logits("bnb_nf4_dq")) > 1e-5


def test_a_scale_below_the_range_of_the_model_is_no_reason_to_refuse_it(tmp_path: Path) -> None:
    """It stays in float32, and what it stands for becomes zero."""
    tiny.make_model(tmp_path / "model")
    ptqcli.quantize(tmp_path / "model", output=tmp_path / "out", algo="rtn", format="bitsandbytes", scheme="nf4-g64")
    absmax = "model.layers.1.mlp.down_proj.weight.absmax"
    change_tensor(tmp_path / "out", lambda tensors: tensors[absmax][0].fill_(1e-20))
    load_quantized(tmp_path / "out", dtype=torch.float16)
    change_tensor(tmp_path / "out", lambda tensors: tensors[absmax][0].fill_(1e20))
    with pytest.raises(PTQError, match=r"down_proj: its scales leave the range of torch\.float16"):
        load_quantized(tmp_path / "out", dtype=torch.float16)


class TheirLinear(nn.Module):
    """What bitsandbytes computes in 8 bits, without outliers: inputs in float16, 127 steps to the largest of a token."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()
        assert float(exact.abs().max()) < 6
        largest = exact.abs().amax(dim=-1, keepdim=True)
        return functional.linear((exact * (127 / largest)).round() * (largest / 127), self.weight.dequantize(torch.float32)).to(x.dtype)


def test_a_checkpoint_in_8_bits_has_its_logits() -> None:
    """But for the noise of rounded inputs, which the last bit of a float16 grows into; less of it with inputs rounded as there.

    ``tests/loaders`` compares layer by layer.
    """
    packed = open_checkpoint(GOLDEN / "ckpt" / "bnb_int8")
    assert set(packed.schemes.values()) == {INT8}
    expected = expected_logits("bnb_int8")
    noise = relative(expected_logits("tiny"), expected)
    model = load_quantized(packed.folder)
    assert kernels_in(model).keys() <= {"LLM.int8 torch", "LLM.int8 reference"}
    assert relative(logits(model), expected) < 1.2 * noise
    for name in packed.schemes:
        model.set_submodule(name, TheirLinear(packed.weight(name)))
    assert relative(logits(model), expected) < 0.75 * noise
    model.get_submodule("model.layers.1.mlp.down_proj").weight.scale[7] *= -1
    assert relative(logits(model), expected) > 1.5 * noise


# The inverse pair


@st.composite
def four_bits(draw: st.DrawFn) -> QuantizedWeight:
    codebook, double = draw(st.sampled_from(list(CODEBOOKS))), draw(st.booleans())
    scheme = Scheme(4, draw(st.sampled_from([32, 64, 128])), codebook=codebook, double=double)
    rows, groups, seed = draw(st.integers(1, 40)), draw(st.integers(1, 9)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, groups, generator=generator) + draw(st.sampled_from([0, 0.01, 100]))
    doubled = DoubleScales.of(scale.flatten()) if double else None
    return QuantizedWeight(
        codes=random_codes(rows, groups * scheme.group_size, 4, seed),
        scale=scale.clamp(min=1e-9) if doubled is None else doubled.scale().view(rows, groups),
        zero=torch.full((rows, groups), 8, dtype=torch.uint8),
        scheme=scheme,
        double=doubled,
    )


@st.composite
def eight_bits(draw: st.DrawFn) -> QuantizedWeight:
    threshold = draw(st.sampled_from([None, 6.0, 4.5]))
    scheme = Scheme(8, -1, activations=ActivationScheme(), outliers=None if threshold is None else OutlierSplit(threshold))
    rows, columns, seed = draw(st.integers(1, 40)), draw(st.integers(1, 90)), draw(st.integers(0, 2**31))
    scale = torch.randn(rows, 1, generator=torch.Generator().manual_seed(seed))
    outliers = None if threshold is None else OutlierColumns(torch.zeros(1, dtype=torch.int32), torch.ones(rows, 1))
    zero = torch.full((rows, 1), 128, dtype=torch.uint8)
    codes = random_codes(rows, columns, 8, seed)
    return BITSANDBYTES.held(QuantizedWeight(codes=codes, scale=scale, zero=zero, scheme=scheme, outliers=outliers))


@given(weight=st.one_of(four_bits(), eight_bits()))
@settings(max_examples=200, deadline=None)
def test_unpack_is_the_inverse_of_pack(weight: QuantizedWeight) -> None:
    tensors = BITSANDBYTES.pack("a.b", weight)
    assert tuple(tensors) == BITSANDBYTES.tensor_names("a.b", weight.scheme)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert BITSANDBYTES.stored_linears([*tensors, "c.weight", "norm.weight"]) == ["a.b"]
    rows, columns = weight.codes.shape
    spec = LinearSpec(name="a.b", scheme=weight.scheme, out_features=rows, in_features=columns, scale_dtype=torch.float32)
    spread = 16 if weight.scheme.double else 0  # the digits of an offset
    assert abs(BITSANDBYTES.stored_bytes(spec) - sum(tensor.nbytes for tensor in tensors.values())) <= spread
    assert BITSANDBYTES.refusal(spec) is None
    back = BITSANDBYTES.unpack("a.b", tensors.__getitem__, weight.scheme)
    assert_same_weight(back, weight)
    assert_same_weight(BITSANDBYTES.held(back), back)


@given(weight=four_bits())
@settings(max_examples=30, deadline=None)
def test_every_element_stands_where_the_formula_says(weight: QuantizedWeight) -> None:
    """``quant_map[code] * absmax``, codes high half first, blocks one after the other, absmax by the formula of its 8 bits."""
    tensors = BITSANDBYTES.pack("m", weight)
    part: Callable[[str], Tensor] = lambda name: tensors[f"m.weight.{name}"]  # noqa: E731
    state = json.loads(bytes(part(f"quant_state.bitsandbytes__{weight.scheme.codebook}").tolist()))
    absmax = part("absmax").double()
    if weight.scheme.double:
        blocks = torch.arange(len(absmax)) // state["nested_blocksize"]
        absmax = part("nested_quant_map").double()[absmax.long()] * part("nested_absmax").double()[blocks] + state["nested_offset"]
    codes = [half for byte in tensors["m.weight"].flatten().tolist() for half in (byte >> 4, byte & 15)]
    values = part("quant_map").double()[codes] * absmax.repeat_interleave(state["blocksize"])
    torch.testing.assert_close(weight.dequantize(torch.float64).flatten(), values, rtol=1e-5, atol=1e-6)
    assert state["shape"] == list(weight.codes.shape)


@pytest.mark.parametrize("scheme", ["nf4-g64", "nf4-g64-double", "fp4-g64", "fp4-g64-double"])
def test_blocks_of_zeros_stay_zero(scheme: str) -> None:
    exact = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    exact[3, :64] = 0
    weight = round_to_nearest(exact, Scheme.parse(scheme), torch.float32, MinMax())
    back = BITSANDBYTES.unpack("m", BITSANDBYTES.pack("m", weight).__getitem__, weight.scheme)
    assert_same_weight(back, weight)
    assert not back.dequantize()[3, :64].any()
    assert relative(back.dequantize(), exact) < 0.15
    if not weight.scheme.double:  # as the library writes such a block
        tensors = BITSANDBYTES.pack("m", weight)
        tensors["m.weight.absmax"] = tensors["m.weight.absmax"].index_fill(0, torch.tensor(6), 0.0)
        assert_same_weight(BITSANDBYTES.unpack("m", tensors.__getitem__, weight.scheme), weight)


def test_a_row_of_zeros_in_8_bits_stays_zero() -> None:
    tensors = {"m.weight": torch.ones(2, 4, dtype=torch.int8), "m.SCB": torch.tensor([0.0, 127.0])}
    weight = BITSANDBYTES.unpack("m", tensors.__getitem__, INT8)
    assert weight.dequantize().tolist() == [[0.0] * 4, [1.0] * 4]
    assert weight.scale.tolist() == [[1.0], [1.0]]


# Solvers on these grids


def column_loop(weight: Tensor, hessian: Tensor, scale: Tensor, levels: tuple[float, ...]) -> Tensor:
    """GPTQ's Algorithm 1 with given scales [out, groups], columns by falling diagonal, in float64: codes uint8 [out, in]."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    left, codes = weight.double()[:, order].clone(), torch.empty(weight.shape, dtype=torch.uint8)
    for j, column in enumerate(order.tolist()):
        values = scale[:, column // (weight.shape[1] // scale.shape[1])].double().unsqueeze(1) * torch.tensor(levels).double()
        code = (values - left[:, j : j + 1]).abs().argmin(dim=1)
        codes[:, column] = code
        error = (left[:, j] - values.gather(1, code.unsqueeze(1)).squeeze(1)) / factor[j, j]
        left[:, j + 1 :] -= torch.outer(error, factor[j, j + 1 :])
    return codes


@pytest.mark.parametrize("name", ["nf4-g64", "nf4-g32-double", "fp4-g64-double"])
def test_gptq_equals_the_textbook(name: str) -> None:
    weight, hessian = correlated_layer(12, 128, 600, torch.float64, 0, spread=1)
    scheme, solver = Scheme.parse(name), GPTQ(polish=0, scale_search="minmax", damp=0.01)
    found = solver.solve(weight, solver.prepare(hessian, "m"), scheme, torch.float32).weight
    scale = round_to_nearest(weight, scheme, torch.float32, MinMax()).scale
    assert torch.equal(found.scale, scale)
    damped = hessian.matrix + 0.01 * hessian.matrix.diagonal().mean() * torch.eye(128)
    truth = column_loop(weight, damped, scale, scheme.element.levels)  # type: ignore[attr-defined]
    if scheme.codebook == "fp4":  # whose zero has two codes
        assert torch.equal(torch.tensor(FP4.levels)[found.codes.long()], torch.tensor(FP4.levels)[truth.long()])
    else:
        assert torch.equal(found.codes, truth)
    assert not torch.equal(found.codes, nearest(weight, scale, scheme.element.levels))  # type: ignore[attr-defined]


@pytest.mark.parametrize("solver", [GPTQ(), GPTQ(polish=0), GPTQ(act_order=False), OBQ()], ids=["gptq", "unpolished", "in order", "obq"])
@pytest.mark.parametrize("name", ["nf4-g64", "nf4-g64-double", "fp4-g64-double"])
def test_the_hessian_lowers_the_objective(solver: Any, name: str) -> None:
    weight, hessian = correlated_layer(24, 192, 600, torch.float32, 0, spread=1)
    scheme = Scheme.parse(name)

    def objective(quantized: QuantizedWeight) -> float:
        error = (weight - quantized.dequantize(torch.float32)).double()
        return float((error @ hessian.matrix.double() * error).sum())

    found = solver.solve(weight, solver.prepare(hessian, "m"), scheme, torch.float32).weight
    assert objective(found) < 0.8 * objective(RTN().solve(weight, None, scheme, torch.float32).weight)
    assert_same_weight(BITSANDBYTES.unpack("m", BITSANDBYTES.pack("m", found).__getitem__, scheme), found)


def test_the_search_of_ranges_lowers_the_error() -> None:
    exact = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    for name in ("nf4-g64", "nf4-g64-double"):
        errors = [
            relative(round_to_nearest(exact, Scheme.parse(name), torch.float32, each()).dequantize(), exact)
            for each in (SquaredError, MinMax)
        ]
        assert errors[0] < errors[1]


def test_solving_one_matrix_takes_scales_in_float32() -> None:
    exact = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    assert ptqcli.solve(exact, "nf4-g64-double", "rtn").scale.dtype == torch.float32
    with pytest.raises(UsageError, match="float32 before they are rounded to 8 bits"):
        ptqcli.solve(exact, "nf4-g64-double", "rtn", scale_dtype=torch.bfloat16)


# Schemes


@pytest.mark.parametrize("name", [*usual_schemes(), "nf4", "fp4-double", "nf4-row", "fp4-g7", "nf4-row-double"])
def test_names_of_schemes_are_an_inverse_pair(name: str) -> None:
    scheme = Scheme.parse(name)
    assert str(scheme) == name
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.parse(name.upper()) == scheme


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nf4-g64-asym", "nf4 has 4 bits, no zero points"),
        ("nf4-static", "nf4 leaves activations as they are"),
        ("fp4-outliers6", "fp4 leaves activations as they are"),
        ("nf4-tensor", "one scale for the whole matrix"),
        ("w4a16-g64-double", "scales of integers are not doubly quantized"),
        ("nf5-g64", "is no number format"),
    ],
)
def test_names_of_no_scheme(name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Scheme.parse(name)


def test_schemes_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="codebook 'nf3' is unknown"):
        Scheme(4, 64, codebook="nf3")
    with pytest.raises(UsageError, match="nf4 has 4 bits"):
        Scheme(8, 64, codebook="nf4")


def test_groups_of_codebooks_that_choose_themselves() -> None:
    scheme = Scheme.parse("nf4-double")
    assert scheme.group_size == AUTO_GROUP
    assert [str(scheme.resolved(width)) for width in (256, 96, 48)] == ["nf4-g64-double", "nf4-g32-double", "nf4-g16-double"]


def test_overrides_keep_a_codebook_until_they_change_the_bits() -> None:
    scheme = Scheme.parse("nf4-g64-double")
    assert str(Override("x", group_size=32).apply(scheme)) == "nf4-g32-double"
    assert str(Override("x", bits=8).apply(scheme)) == "w8a16-g64"
    with pytest.raises(UsageError, match="nf4 has 4 bits, no zero points"):
        Override("x", symmetric=False).apply(scheme)


# Layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["nf4-g64", "fp4-g64-double"])
def test_a_layer_multiplies_by_the_weight_in_its_dtype(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = round_to_nearest(torch.randn(48, 128, generator=generator), Scheme.parse(name), torch.float32, MinMax())
    bias, x = torch.randn(48, generator=generator), torch.randn(5, 3, 128, generator=generator).to(dtype)
    layer = quantized_linear(weight, bias, dtype)
    expected = functional.linear(x, weight.dequantize(dtype), bias.to(dtype))
    assert layer.kernel == "reference"
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x[:, :1]), functional.linear(x[:, :1], weight.dequantize(dtype), bias.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype == dtype
    layer.packed[0, 0] ^= 8
    assert not torch.equal(layer(x), expected)
    for kernel in ("torch", "triton"):
        with pytest.raises(UsageError, match="not codes of"):
            quantized_linear(weight, None, dtype, kernel=kernel)


# Refusals


def spec_of(scheme: str, rows: int = 64, columns: int = 128, name: str = "m", **others: Any) -> LinearSpec:
    return LinearSpec(name=name, scheme=Scheme.parse(scheme), out_features=rows, in_features=columns, scale_dtype=torch.float32, **others)


@pytest.mark.parametrize(
    ("scheme", "columns", "reason"),
    [
        ("w4a16-g64", 128, "holds nf4, fp4 and 8 bits with a scale a row, not w4a16-g64; give --scheme nf4-g64, or w8a8-outliers6"),
        ("w8a16-row", 128, "rounds the inputs of 8-bit weights to 8 bits, too; give --scheme w8a8-outliers6 or w8a8, not w8a16-row"),
        ("w8a8-tensor", 128, "8 bits with a scale a row, not w8a8-tensor"),
        ("w8a8-static", 128, "computes a scale for each token when a layer runs, unlike w8a8-static"),
        ("w8a8-act-tensor", 128, "computes a scale for each token"),
        ("w8a8-outliers6-static", 128, "no threshold says w8a8-outliers6-static"),
        ("w8a8", 1 << 17, "can exceed 32 bits"),
        ("nf4-row", 128, "has blocks of 32, 64, 128, .* weights, not nf4-row; give --scheme nf4-g64"),
        ("nf4-g16", 128, "has blocks of 32"),
        ("nf4-g64", 96, "blocks of 64 weights would run from one row into the next, since its 96 inputs are no multiple"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(scheme: str, columns: int, reason: str) -> None:
    assert re.search(reason, str(BITSANDBYTES.refusal(spec_of(scheme, columns=columns))))


def test_negative_scales_and_what_has_them_are_held() -> None:
    assert BITSANDBYTES.refusal(spec_of("w8a8-outliers6", signed_scales=True)) is None
    assert "needs a column index" in str(BITSANDBYTES.refusal(spec_of("nf4-g64", moving_groups=True)))


def test_formats_of_integers_hold_other_codes() -> None:
    nf4 = Scheme.parse("nf4-g64")
    weight = round_to_nearest(torch.ones(32, 64), nf4, torch.float32, MinMax())
    for name in ("compressed-tensors", "gptq", "awq"):
        assert (
            other_codes(find_format(name), nf4) == f"{name} holds integers, not codes of nf4; give --format bitsandbytes, or --scheme w4a16"
        )
        assert other_codes(find_format(name), Scheme(4, 64)) is None
    assert other_codes(BITSANDBYTES, nf4) is None
    with pytest.raises(PTQError, match="m: holds codes of nf4, and the format holds integers"):
        COMPRESSED_TENSORS.pack("m", weight)


def test_one_file_has_one_scheme_and_names_that_are_no_ends_of_others() -> None:
    one = spec_of("nf4-g64", name="a.up")
    assert BITSANDBYTES.joint_refusal([one, spec_of("nf4-g128", name="a.b")], ["lm_head", "a.u"]) is None
    mixed = BITSANDBYTES.joint_refusal([one, spec_of("nf4-g64-double", name="a.b")], [])
    assert mixed == "bitsandbytes has one scheme for all linears, not nf4-g64 (a.up) and nf4-g64-double (a.b); give one, or skip the rest"
    for plain in ("up", "a"):
        assert f"leave a.up as it is, like {plain}," in str(BITSANDBYTES.joint_refusal([one], ["lm_head", plain]))


def state(**changes: Any) -> Tensor:
    told = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 128], **changes}
    return torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)


STATE = "m.weight.quant_state.bitsandbytes__nf4"
NESTED = {"nested_blocksize": 256, "nested_dtype": "float32"}
DAMAGE: dict[str, tuple[dict[str, Tensor], str]] = {
    "codes of another shape": ({"m.weight": torch.zeros(255, 1, dtype=torch.uint8)}, r"m\.weight: expected uint8 \[256, 1\]"),
    "codes of another type": ({"m.weight": torch.zeros(128, 1, dtype=torch.bfloat16)}, "stored in another type"),
    "too few scales": ({"m.weight.absmax": torch.ones(7)}, r"m\.weight\.absmax: expected floating \[8\], found float32 \[7\]"),
    "scales in bytes": ({"m.weight.absmax": torch.ones(8, dtype=torch.uint8)}, r"absmax: expected floating"),
    "a scale that is no number": ({"m.weight.absmax": torch.full((8,), torch.nan)}, r"absmax: holds NaN or infinity"),
    "an infinite scale": ({"m.weight.absmax": torch.full((8,), torch.inf)}, r"absmax: holds NaN or infinity"),
    "other levels": ({"m.weight.quant_map": torch.linspace(-1, 1, 16)}, r"quant_map: holds other levels than those of nf4"),
    "no JSON": ({STATE: torch.full((9,), 255, dtype=torch.uint8)}, f"{STATE}: is no JSON"),
    "deep JSON": ({STATE: torch.full((4000,), 91, dtype=torch.uint8)}, f"{STATE}: is no JSON"),
    "a number": ({STATE: torch.tensor([49], dtype=torch.uint8)}, f"{STATE}: is 1, no JSON object"),
    "too much JSON": ({STATE: torch.full((5000,), 32, dtype=torch.uint8)}, "at most 4096 bytes"),
    "JSON in floats": ({STATE: torch.ones(4)}, "expected JSON in uint8"),
    "another type": ({STATE: state(quant_type="fp4")}, "quant_type 'fp4' is not read; what is read: nf4"),
    "another block": ({STATE: state(blocksize=96)}, "blocksize 96 is not read"),
    "a block that is no number": ({STATE: state(blocksize=True)}, "blocksize True is not read"),
    "another dtype": ({STATE: state(dtype="float64")}, "dtype 'float64' is not read"),
    "a shape of three": ({STATE: state(shape=[2, 2, 128])}, "shape is .*, not two numbers"),
    "a negative shape": ({STATE: state(shape=[-4, 128])}, "not two numbers"),
    "a huge shape": ({STATE: state(shape=[2**60, 128])}, "not two numbers"),
    "rows that share a block": ({STATE: state(shape=[8, 32])}, "would run from one row into the next"),
    "an offset that was not asked for": ({STATE: state(nested_offset=0.5, **NESTED)}, "tells of nf4-g64-double"),
    "an offset that is no number": ({STATE: state(nested_offset="1", **NESTED)}, "no offset"),
    "an infinite offset": ({STATE: state(nested_offset=1e300, **NESTED)}, "no offset"),
    "another nested block": ({STATE: state(nested_offset=0.5, nested_blocksize=128)}, "nested_blocksize 128 is not read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_tensors_are_refused_by_name(kind: str) -> None:
    changed, message = DAMAGE[kind]
    scheme = Scheme.parse("nf4-g64")
    tensors = BITSANDBYTES.pack("m", round_to_nearest(torch.randn(4, 128), scheme, torch.float32, MinMax()))
    refused_when_damaged(BITSANDBYTES, scheme, tensors, lambda stored: stored.update(changed), message)


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        ("absmax", torch.zeros(7, dtype=torch.uint8), r"absmax: expected uint8 \[8\], found uint8 \[7\]"),
        ("nested_absmax", torch.ones(2), r"nested_absmax: expected floating \[1\]"),
        ("nested_absmax", torch.full((1,), torch.inf), "nested_absmax: holds NaN or infinity"),
        ("nested_absmax", torch.full((1,), 3e38), "absmax: stands for scales that are not finite"),
        ("nested_quant_map", torch.ones(255), r"nested_quant_map: expected floating \[256\]"),
    ],
)
def test_damaged_scales_of_scales_are_refused_by_name(leaf: str, value: Tensor, message: str) -> None:
    scheme = Scheme.parse("nf4-g64-double")
    tensors = BITSANDBYTES.pack("m", round_to_nearest(torch.randn(4, 128), scheme, torch.float32, MinMax()))
    if "not finite" in message:
        tensors["m.weight.nested_quant_map"] = torch.full((256,), 2.0)
    with pytest.raises(PTQError, match=message):
        BITSANDBYTES.unpack("m", {**tensors, f"m.weight.{leaf}": value}.__getitem__, scheme)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"m.weight": torch.ones(4, 8)}, r"m\.weight: expected int8 \[out, in\], found float32"),
        ({"m.weight": torch.ones(4, dtype=torch.int8)}, r"expected int8 \[out, in\]"),
        ({"m.SCB": torch.ones(3)}, r"m\.SCB: expected floating \[4\]"),
        ({"m.SCB": torch.full((4,), torch.nan)}, r"m\.SCB: holds NaN or infinity"),
        ({"m.weight_format": torch.tensor(1, dtype=torch.uint8)}, "order of a GPU's tiles are not read"),
        ({"m.weight_format": torch.zeros(2, dtype=torch.uint8)}, "m.weight_format: expected one uint8 of 0"),
    ],
)
def test_damaged_tensors_of_8_bits_are_refused_by_name(changed: dict[str, Tensor], message: str) -> None:
    tensors = {
        "m.weight": torch.ones(4, 8, dtype=torch.int8),
        "m.SCB": torch.ones(4),
        "m.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    refused_when_damaged(BITSANDBYTES, INT8, tensors, lambda stored: stored.update(changed), message)


def test_scales_that_are_not_those_of_the_scheme_are_not_written() -> None:
    weight = round_to_nearest(torch.randn(4, 128), Scheme.parse("nf4-g64-double"), torch.float32, MinMax())
    for broken in (replace(weight, double=None), replace(weight, scale=weight.scale * 2), replace(weight, scheme=Scheme.parse("nf4-g64"))):
        with pytest.raises(PTQError, match="m: its scales are not those that its scheme"):
            BITSANDBYTES.pack("m", broken)
    columns = OutlierColumns(torch.zeros(1, dtype=torch.int32), torch.ones(2, 1))
    eight = QuantizedWeight(
        codes=random_codes(2, 4, 8), scale=torch.ones(2, 1), zero=torch.full((2, 1), 128, dtype=torch.uint8), scheme=INT8, outliers=columns
    )
    with pytest.raises(PTQError, match="m: has columns in 16 bit"):
        BITSANDBYTES.pack("m", eight)
    BITSANDBYTES.pack("m", BITSANDBYTES.held(eight))


# What config.json says

FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
EIGHT = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}


def eight(**others: Tensor) -> MemoryTensors:
    return MemoryTensors({"a.weight": torch.ones(4, 8, dtype=torch.int8), "a.SCB": torch.ones(4), **others})


@pytest.mark.parametrize(
    ("threshold", "scheme"), [({}, "w8a8-outliers6"), ({"llm_int8_threshold": 4}, "w8a8-outliers4"), ({"llm_int8_threshold": 0.0}, "w8a8")]
)
def test_a_threshold_is_a_scheme(threshold: dict[str, Any], scheme: str) -> None:
    entry = {**EIGHT, **threshold}
    assert BITSANDBYTES.recognises(entry)
    assert BITSANDBYTES.recognises({key: value for key, value in entry.items() if key != "quant_method"})
    assert BITSANDBYTES.schemes(entry, eight(), {"x.a": "a", "lm_head": "lm_head"}) == {"x.a": Scheme.parse(scheme)}
    described = BITSANDBYTES.describe([spec_of(scheme)], ["lm_head"])["config.json"]["quantization_config"]
    assert described["llm_int8_threshold"] == float(threshold.get("llm_int8_threshold", 6.0))
    assert type(described["llm_int8_threshold"]) is float
    assert described["llm_int8_skip_modules"] == ["lm_head"]
    assert BITSANDBYTES.schemes(described, eight(), {"x.a": "a"}) == {"x.a": Scheme.parse(scheme)}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**EIGHT, "llm_int8_threshold": "6"}, "llm_int8_threshold '6' is not read"),
        ({**EIGHT, "llm_int8_threshold": -1.0}, "llm_int8_threshold -1.0 is not read"),
        ({**EIGHT, "llm_int8_threshold": float("nan")}, "llm_int8_threshold nan is not read"),
        ({**EIGHT, "llm_int8_threshold": True}, "llm_int8_threshold True is not read"),
        ({**EIGHT, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight is not read"),
        (FOUR, "load_in_8bit is False, but there are weights that are stored so"),
    ],
)
def test_entries_that_are_not_read(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(PTQError, match=message):
        BITSANDBYTES.schemes(entry, eight(), {"x.a": "a"})


def test_states_that_are_not_read() -> None:
    tensors = BITSANDBYTES.pack("a", round_to_nearest(torch.randn(4, 128), Scheme.parse("nf4-g64"), torch.float32, MinMax()))
    name = "a.weight.quant_state.bitsandbytes__nf4"
    assert BITSANDBYTES.schemes(FOUR, MemoryTensors(tensors), {"x.a": "a"}) == {"x.a": Scheme.parse("nf4-g64")}
    for changed, message in (
        ({f"{name[:-3]}fp4": tensors[name]}, "2 quant states are stored for it, not one"),
        ({name: torch.zeros(1 << 20, dtype=torch.uint8)}, "takes 1048576 bytes, which no quant state does"),
    ):
        with pytest.raises(PTQError, match=message):
            BITSANDBYTES.schemes(FOUR, MemoryTensors({**tensors, **changed}), {"x.a": "a"})
    without = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(PTQError, match="0 quant states are stored for it"):
        BITSANDBYTES.schemes(FOUR, MemoryTensors(without), {"x.a": "a"})
    with pytest.raises(PTQError, match="load_in_4bit is False, but there are weights that are stored so"):
        BITSANDBYTES.schemes(EIGHT, MemoryTensors(tensors), {"x.a": "a"})


def test_a_model_that_would_be_quantized_while_it_loads_is_refused(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "quantization_config": FOUR}))
    with pytest.raises(PTQError, match="nothing in the files is quantized; take the entry out"):
        open_checkpoint(tmp_path / "m")


# Whole runs


@pytest.mark.parametrize(
    ("scheme", "algo"),
    [("nf4-g64", "rtn"), ("nf4-g64-double", "gptq"), ("fp4-g32-double", "awq+obq"), ("w8a8-outliers6", "rtn"), ("w8a8", "gptq")],
)
def test_a_run_writes_what_its_runtime_reads(tmp_path: Path, scheme: str, algo: str) -> None:
    model = tiny.make_model(tmp_path / "model", dtype=torch.bfloat16)
    options: dict[str, Any] = {"calib": str(tiny.write_text(tmp_path / "text.txt")), "nsamples": 4, "seqlen": 32}
    ptqcli.quantize(tmp_path / "model", output=tmp_path / "out", algo=algo, format="bitsandbytes", scheme=scheme, **options)
    packed = open_checkpoint(tmp_path / "out")
    assert {str(found) for found in packed.schemes.values()} == {scheme}
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert entry["bnb_4bit_compute_dtype"] == "bfloat16"
    assert "lm_head" in entry["llm_int8_skip_modules"]
    loaded = load_quantized(tmp_path / "out")
    ids = tiny.token_ids()
    with torch.no_grad():
        found, expected = loaded(ids).logits.float(), model(ids).logits.float()
    assert 1e-4 < relative(found, expected) < (0.1 if scheme.startswith("w8") else 0.7)


def test_only_what_moves_by_itself_is_tuned(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "model")
    ptqcli.quantize(tmp_path / "model", output=tmp_path / "out", algo="rtn", format="bitsandbytes", scheme="nf4-g32-double")
    student = Student(tmp_path / "out", torch.device("cpu"), torch.float32, "model.layers", vectors=True)
    assert not student.scales
    assert student.vectors
    with pytest.raises(UsageError, match="doubly quantized scales do not move one by one"):
        Student(tmp_path / "out", torch.device("cpu"), torch.float32, "model.layers", vectors=False)


@pytest.mark.parametrize("algo", ["autoround", "omniquant", "let+gptq"])
def test_what_learns_the_rounding_of_integers_is_refused(tmp_path: Path, algo: str) -> None:
    tiny.make_model(tmp_path / "model")
    with pytest.raises(UsageError, match="of integers, not of scheme nf4-g64"):
        ptqcli.quantize(tmp_path / "model", output=tmp_path / "out", algo=algo, format="bitsandbytes", scheme="nf4-g64")


def test_readers_are_told() -> None:
    readers = {reader.name: reader for reader in BITSANDBYTES.readers([spec_of("nf4-g64")], "AutoModelForCausalLM", [])}
    assert "from_pretrained({folder})" in readers["transformers"].code
    assert "bitsandbytes" in readers["peft"].needs
    assert "0.33" in str(readers["vLLM"].refusal)
    assert len(BITSANDBYTES.notes([spec_of("w8a8-outliers6")])) == len(BITSANDBYTES.notes([spec_of("w8a8")])) + 1


def test_other_formats_take_it_only_rounded_anew(tmp_path: Path) -> None:
    """Converted, too, codes of a codebook are no integers."""
    tiny.make_model(tmp_path / "model")
    ptqcli.quantize(tmp_path / "model", output=tmp_path / "out", algo="rtn", format="bitsandbytes", scheme="nf4-g64")
    with pytest.raises(UsageError, match="compressed-tensors holds integers, not codes of nf4"):
        ptqcli.convert(tmp_path / "out", "compressed-tensors", output=tmp_path / "converted")
    assert holding_type(Scheme.parse("nf4-g64"), 128) is None
    assert holding_type(Scheme.parse("w4a16-g64"), 128) == "Q4_0"


def test_what_other_formats_hold_in_8_bits_is_converted_as_it_is(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "model", dtype=torch.bfloat16)
    ptqcli.quantize(tmp_path / "model", output=tmp_path / "out", algo="rtn", scheme="w8a8")
    ptqcli.convert(tmp_path / "out", "bitsandbytes", output=tmp_path / "there")
    ptqcli.convert(tmp_path / "there", "compressed-tensors", output=tmp_path / "back")
    first, there, back = (open_checkpoint(tmp_path / name) for name in ("out", "there", "back"))
    assert {str(scheme) for scheme in there.schemes.values()} == {"w8a8"}
    for name in first.schemes:
        for other in (there, back):
            assert torch.equal(first.weight(name).codes, other.weight(name).codes)
            assert torch.equal(first.weight(name).scale.float(), other.weight(name).scale.float())

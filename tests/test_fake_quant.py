"""FakeQuantLinear computes what the runtime's layers compute, lets gradients through, and the errors of the report are measured with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from packed import STATIC, TENSOR, TOKEN, w8a8
from ptq_kernels.layout import pack_codes
from ptq_kernels.reference import int8_linear, llm_int8_linear, weight_only_linear
from textbook import textbook_codes, textbook_grid
from torch import Tensor, nn

from ptqcli.calibration.statistics import InputStatistics, StatisticsRequest
from ptqcli.numerics.fake_quant import FakeQuantLinear
from ptqcli.numerics.ranges import MinMax
from ptqcli.numerics.scheme import OutlierSplit, Scheme
from ptqcli.numerics.weight import OutlierColumns, QuantizedWeight, round_to_nearest
from ptqcli.solvers.error import error_in_scheme, relative_error

OUT, IN, TOKENS = 24, 40, 30
DYNAMIC, FIXED = OutlierSplit(6.0), OutlierSplit(6.0, dynamic=False)
LARGE = [3, 17]  # columns of the inputs with outliers

WEIGHT_ONLY = [Scheme(2, 8), Scheme(3, 8, symmetric=False), Scheme(4, 20), Scheme(8, -1)]
INTEGER = [w8a8(TOKEN), w8a8(TENSOR), w8a8(STATIC), w8a8(TENSOR, 0), Scheme(4, -1, activations=TOKEN)]
SPLIT = [w8a8(TOKEN, split=DYNAMIC), w8a8(TENSOR, 0, split=DYNAMIC), w8a8(TOKEN, split=FIXED), w8a8(TENSOR, split=FIXED)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_inputs(seed: int = 1) -> Tensor:
    """[2, 15, in], outliers in two columns of one token each."""
    inputs = random(2, TOKENS // 2, IN, seed=seed).clamp(-4, 4)
    inputs[0, 2, LARGE[0]], inputs[1, 7, LARGE[1]] = -31.0, 9.0
    return inputs


def quantized_weight(scheme: Scheme, listed: tuple[int, ...] = (3, 20)) -> QuantizedWeight:
    """A random matrix in ``scheme``, scales in bfloat16. listed: the columns that are kept in 16 bit, if the scheme splits some off."""
    weight = random(OUT, IN)
    quantized = round_to_nearest(weight, scheme, torch.bfloat16, MinMax())
    if scheme.activations is not None and not scheme.activations.dynamic:
        quantized = replace(quantized, input_scale=torch.tensor([0.02], dtype=torch.bfloat16))
    if scheme.outliers is not None:
        index = torch.tensor(listed)
        if not scheme.outliers.dynamic:
            quantized.codes[:, index] = scheme.middle
        columns = OutlierColumns(index.to(torch.int32), (1.5 * weight[:, index]).bfloat16())
        quantized = replace(quantized, outliers=columns)
    return quantized


def by_the_runtime(quantized: QuantizedWeight, inputs: Tensor, bias: Tensor) -> Tensor:
    """The output of the reference of the runtime's layers, float32."""
    scheme = quantized.scheme
    if scheme.activations is None:
        # in float32 a layer would keep the weight of a bfloat16 model wider than that model does
        packed, scale = pack_codes(quantized.codes, scheme.bits), quantized.scale
        eye = torch.eye(IN, dtype=torch.bfloat16)
        weight = weight_only_linear(eye, packed, scale, quantized.zero, scheme.bits, scheme.columns_per_group(IN)).t().float()
        return inputs @ weight.t() + bias
    codes = (quantized.codes.int() - scheme.middle).to(torch.int8)
    scale = quantized.scale[:, 0] if scheme.group_size else quantized.scale[:1, 0]
    if scheme.outliers is None:
        return int8_linear(inputs, codes, scale, quantized.input_scale, scheme.activations.per_token, bias)
    columns, threshold = quantized.outliers, scheme.outliers.threshold if scheme.outliers.dynamic else None
    assert columns is not None
    return llm_int8_linear(inputs, codes, scale, columns.index, columns.weight, threshold, scheme.activations.per_token, bias)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("scheme", WEIGHT_ONLY + INTEGER + SPLIT, ids=str)
def test_it_computes_what_the_runtime_computes(scheme: Scheme) -> None:
    quantized, inputs, bias = quantized_weight(scheme), some_inputs(), random(OUT, seed=2)
    expected = by_the_runtime(quantized, inputs, bias)
    assert relative(FakeQuantLinear.of(quantized, bias)(inputs), expected) < 1e-6
    # the twins: one wrong code, and inputs that are not rounded
    quantized.codes[1, 1] ^= 1
    assert relative(FakeQuantLinear.of(quantized, bias)(inputs), expected) > 1e-4
    quantized.codes[1, 1] ^= 1
    if scheme.activations is not None:
        assert relative(nn.functional.linear(inputs, quantized.dequantize(torch.float32), bias), expected) > 1e-4


def test_columns_of_a_dynamic_split_follow_the_inputs() -> None:
    """Column 20 is listed but holds no outlier in this call, so its codes count; column 17 holds one but has no 16-bit weights."""
    quantized, inputs = quantized_weight(SPLIT[0]), some_inputs()
    layer = FakeQuantLinear.of(quantized)
    split = replace(quantized, scheme=SPLIT[2])  # the same columns, fixed
    assert relative(FakeQuantLinear.of(split)(inputs), layer(inputs)) > 1e-2
    small = inputs.clamp(-4, 4)
    assert torch.equal(layer(small), FakeQuantLinear.of(replace(quantized, outliers=None, scheme=INTEGER[0]))(small))
    assert torch.equal(layer(small[0, 0]), layer(small[0, :1])[0])


def test_inputs_are_divided_first() -> None:
    quantized, inputs, divisor = quantized_weight(INTEGER[0]), some_inputs(), random(IN, seed=4).exp()
    layer = FakeQuantLinear(quantized.dequantize(torch.float32), divisor=divisor, activations=TOKEN)
    assert relative(layer(inputs), by_the_runtime(quantized, inputs / divisor, torch.zeros(OUT))) < 1e-6
    assert torch.equal(layer.matrix(), layer.weight / divisor)


def test_a_narrow_input_gets_a_narrow_output() -> None:
    layer, inputs = FakeQuantLinear.of(quantized_weight(INTEGER[0])), some_inputs().bfloat16()
    assert torch.equal(layer(inputs), layer(inputs.float()).bfloat16())


# Gradients


@pytest.mark.parametrize(
    "arguments",
    [{}, {"activations": TOKEN}, {"activations": TENSOR}, {"activations": STATIC, "input_scale": torch.tensor([0.02])}],
    ids=["none", "token", "tensor", "static"],
)
def test_gradients_pass_straight_through_the_rounding(arguments: dict[str, Any]) -> None:
    """For a learner: dL/dW = (dL/dy)^T round(x / d), dL/dx = (dL/dy) W / d, but 0 beyond a fixed range."""
    divisor, inputs, towards = random(IN, seed=4).exp(), some_inputs(), random(2, TOKENS // 2, OUT, seed=5)
    parameter, bias, asked = nn.Parameter(random(OUT, IN)), nn.Parameter(random(OUT, seed=2)), inputs.clone().requires_grad_()
    layer = FakeQuantLinear(parameter * 2, bias, divisor=divisor, **arguments)
    output = layer(asked)
    (output * towards).sum().backward()
    with torch.no_grad():
        assert torch.equal(output, layer(inputs)), "asking for gradients changes nothing"
        seen = FakeQuantLinear(torch.eye(IN), divisor=divisor, **arguments)(inputs)
    flat = towards.flatten(0, 1)
    torch.testing.assert_close(parameter.grad, 2 * flat.t() @ seen.flatten(0, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, flat.sum(0), rtol=1e-4, atol=1e-4)
    expected = towards @ (2 * parameter.detach()) / divisor
    inside = (inputs / divisor).abs() <= 0.02 * 128
    if "input_scale" in arguments:
        assert 0 < (~inside).sum() < inside.numel() / 2
        expected = expected * inside
    torch.testing.assert_close(asked.grad, expected, rtol=1e-4, atol=1e-4)


def test_outliers_meet_the_weights_that_are_kept_and_these_do_not_learn() -> None:
    parameter, inputs = nn.Parameter(random(OUT, IN)), some_inputs().requires_grad_()
    kept = OutlierColumns(torch.tensor([3, 20], dtype=torch.int32), random(OUT, 2, seed=7))
    FakeQuantLinear(parameter, activations=TOKEN, threshold=6.0, kept=kept)(inputs).sum().backward()
    assert parameter.grad is not None
    assert [column for column in range(IN) if not parameter.grad[:, column].any()] == [3]
    torch.testing.assert_close(parameter.grad[0, 17], inputs.detach()[..., 17].sum(), rtol=1e-4, atol=1e-4)
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad[0, 0, 3], kept.weight[:, 0].sum())


# Errors


def statistics_of(inputs: Tensor, **needs: bool) -> InputStatistics:
    statistics = InputStatistics.empty(IN, StatisticsRequest(**needs), TOKENS, torch.device("cpu"))
    statistics.add(inputs)
    return statistics


def rounded_by_hand(x: Tensor, scheme: Scheme, largest: Tensor) -> Tensor:
    """x, float32 [tokens, in], in 8 bits, token by token. largest: what a fixed scale comes from, which is stored in bfloat16.

    The largest of a token lies on the border between two codes, so the quotients are those of float32.
    """
    assert scheme.activations is not None
    rows = []
    for row in x:
        step = (row if scheme.activations.per_token else x).abs().max() / 127.5
        if not scheme.activations.dynamic:
            step = (largest / 127.5).bfloat16().float()
        rows.append((row / step).round().clamp(-128, 127).double() * step.double())
    return torch.stack(rows)


def error_by_hand(weight: Tensor, scheme: Scheme, inputs: Tensor) -> float:
    """|W x - fq(x)| / |W x| in float64 of a matrix rounded to nearest in ``scheme``, scales in bfloat16."""
    x, weight = inputs.flatten(0, -2).double(), weight.double()
    large = torch.zeros(IN, dtype=torch.bool)
    if scheme.outliers is not None:
        large = (x.abs() > scheme.outliers.threshold).any(dim=0)
    on_grid = ~large if scheme.outliers is not None and not scheme.outliers.dynamic else torch.ones(IN, dtype=torch.bool)
    expected, found = x @ weight.t(), torch.zeros(len(x), OUT, dtype=torch.float64)
    kept = weight[:, on_grid]
    values = torch.zeros_like(weight)
    if scheme.group_size == 0:
        scale, zero = textbook_grid(kept.reshape(1, -1), scheme, torch.bfloat16)
        values[:, on_grid] = (textbook_codes(kept, scale, zero, scheme) - zero) * scale
    else:
        width = scheme.columns_per_group(kept.shape[1])
        groups = []
        for start in range(0, kept.shape[1], width):
            scale, zero = (value.unsqueeze(1) for value in textbook_grid(kept[:, start : start + width], scheme, torch.bfloat16))
            groups.append((textbook_codes(kept[:, start : start + width], scale, zero, scheme) - zero) * scale)
        values[:, on_grid] = torch.cat(groups, dim=1)
    seen, values = x, values if scheme.activations else values.float().bfloat16().double()
    if scheme.activations is not None:
        seen = rounded_by_hand(torch.where(large, 0.0, x).float(), scheme, inputs.abs().max())
    found = (
        seen @ torch.where(large, 0.0, values).t() + torch.where(large, x, 0.0) @ torch.where(large, weight.bfloat16().double(), 0.0).t()
    )
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("scheme", WEIGHT_ONLY + INTEGER + SPLIT, ids=str)
@pytest.mark.parametrize("hessian", [False, True], ids=["samples", "hessian"])
def test_the_error_in_a_scheme_is_that_of_its_formula(scheme: Scheme, hessian: bool) -> None:
    weight, inputs = random(OUT, IN), some_inputs()
    statistics = statistics_of(inputs, hessian=hessian, samples=not hessian or scheme.activations is not None, magnitudes=True)
    found = error_in_scheme(weight, scheme, statistics, torch.bfloat16)
    assert found == pytest.approx(error_by_hand(weight, scheme, inputs), rel=1e-4)
    assert found != pytest.approx(error_by_hand(weight, scheme, some_inputs(seed=9)), rel=1e-4)
    if scheme.activations is not None and scheme.bits == 8 and scheme.outliers is None:  # the inputs' rounding counts as well
        assert found > 1.5 * error_in_scheme(weight, Scheme(8, -1), statistics, torch.bfloat16)


def test_a_wider_scheme_has_a_smaller_error() -> None:
    statistics = statistics_of(some_inputs(), samples=True)
    errors = [error_in_scheme(random(OUT, IN), Scheme(bits, 8), statistics, torch.bfloat16) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 20 * errors[-1]


def test_without_calibration_it_is_the_error_of_the_weight() -> None:
    weight, quantized = random(OUT, IN), quantized_weight(WEIGHT_ONLY[2])
    expected = relative(quantized.dequantize(torch.bfloat16), weight)
    assert relative_error(weight, FakeQuantLinear.of(quantized), None) == pytest.approx(expected, rel=1e-4)


def test_a_bias_does_not_count_and_nothing_of_nothing_is_no_error() -> None:
    weight, quantized = random(OUT, IN), quantized_weight(INTEGER[0])
    statistics = statistics_of(some_inputs(), samples=True)
    plain, biased = (relative_error(weight, FakeQuantLinear.of(quantized, bias), statistics) for bias in (None, random(OUT, seed=2)))
    assert biased == pytest.approx(plain, rel=1e-3)
    nothing = statistics_of(torch.zeros(1, TOKENS, IN), samples=True)
    assert relative_error(weight, FakeQuantLinear.of(quantized), nothing) == 0

"""Grids and codes against float64 arithmetic written a second time."""

import pytest
import torch
from textbook import textbook_codes, textbook_grid

from ptqcli.errors import UsageError
from ptqcli.numerics.grids import encode, fit
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.solvers.rtn import RTN

KINDS = {
    "both signs": lambda w: w,
    "positive": lambda w: w.abs() + 0.1,
    "negative": lambda w: -w.abs() - 0.1,
    "one outlier": lambda w: torch.where(torch.arange(w.shape[1]) == 3, 50.0, w),
    "tiny": lambda w: w * 1e-4,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grids_and_codes_are_the_textbook_ones(bits, symmetric, scale_dtype, search, kind):
    weights = KINDS[kind](torch.randn(20, 32, generator=torch.Generator().manual_seed(bits), dtype=torch.float64))
    scheme = Scheme(bits, 32, symmetric)
    grid = fit(weights, scheme, scale_dtype, search)
    scale, zero = textbook_grid(weights, scheme, scale_dtype, search)
    assert torch.equal(grid.scale[:, 0], scale)
    assert torch.equal(grid.zero[:, 0], zero)
    assert torch.equal(encode(weights, grid, scheme), textbook_codes(weights, scale[:, None], zero[:, None], scheme))


@pytest.mark.parametrize("bits, rise", [(8, 0.012), (4, 0.2)])
def test_float16_holds_the_scales_of_small_weights(bits, rise):
    """Scales below float16's smallest normal number, 6e-5, lose little; held at that number they would lose most codes."""
    weights = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 5e-4
    rounded = RTN("mse").solve(weights, None, Scheme(bits, 128), torch.float16).weight
    assert float(rounded.scale.float().max()) < (6.1e-5 if bits == 8 else 1)
    assert float((rounded.dequantize(torch.float32) - weights).norm() / weights.norm()) < rise


def test_rounding_is_the_textbook_group_by_group():
    weights = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    scheme = Scheme(3, 32, symmetric=False)
    rounded = RTN("minmax").solve(weights, None, scheme, torch.float32).weight
    for group in range(3):
        columns = slice(group * 32, group * 32 + 32)
        scale, zero = textbook_grid(weights[:, columns].double(), scheme, torch.float32)
        codes = textbook_codes(weights[:, columns].double(), scale[:, None], zero[:, None], scheme)
        assert torch.equal(rounded.codes[:, columns].double(), codes)
        values = (codes - zero[:, None]) * scale[:, None]
        torch.testing.assert_close(rounded.dequantize(torch.float64)[:, columns], values, rtol=1e-6, atol=0)


def test_dequantize_follows_the_column_index():
    scheme = Scheme(4, 2)
    codes = torch.tensor([[1, 9, 15, 0]], dtype=torch.uint8)
    scale, zero = torch.tensor([[1.0, 10.0]]), torch.full((1, 2), 8, dtype=torch.uint8)
    neighbours = QuantizedWeight(codes, scale, zero, scheme)
    moved = QuantizedWeight(codes, scale, zero, scheme, torch.tensor([1, 0, 1, 0], dtype=torch.int32))
    assert neighbours.dequantize().tolist() == [[-7, 1, 70, -80]]
    assert moved.dequantize().tolist() == [[-70, 1, 70, -8]]


def test_schemes_that_do_not_exist_are_refused():
    for bits, group, message in [(5, 32, "5 bits"), (4, 0, "group size 0"), (4, -2, "group size -2")]:
        with pytest.raises(UsageError, match=message):
            Scheme(bits, group)
    with pytest.raises(UsageError, match="does not divide 100"):
        Scheme(4, 32).group_count(100)

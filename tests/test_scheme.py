"""Grids and codes against float64 arithmetic written a second time."""

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies
from textbook import textbook_codes, textbook_grid

from ptqcli.errors import UsageError
from ptqcli.numerics import ranges
from ptqcli.numerics.elements import Codebook, Int
from ptqcli.numerics.grids import Grid
from ptqcli.numerics.ranges import SEARCHES, Clipped, MinMax, range_search, takes_sign
from ptqcli.numerics.scheme import AUTO_GROUP, EXAMPLES, SUPPORTED_BITS, ActivationScheme, OutlierSplit, Scheme, usual_schemes
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.solvers.rtn import RTN
from ptqcli.suggest import did_you_mean

KINDS = {
    "both signs": lambda w: w,
    "positive": lambda w: w.abs() + 0.1,
    "negative": lambda w: -w.abs() - 0.1,
    "one outlier": lambda w: torch.where(torch.arange(w.shape[1]) == 3, 50.0, w),
    "tiny": lambda w: w * 1e-4,
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 19])
def test_a_large_matrix_is_searched_in_pieces_with_the_same_result(monkeypatch, symmetric, rows):
    weights = torch.randn(20, 32, generator=torch.Generator().manual_seed(rows))
    scheme = Scheme(3, 32, symmetric)
    whole = range_search("mse").fit(weights, scheme, torch.float16)
    monkeypatch.setattr(ranges, "PIECE", {"cpu": rows * 32 + 5})
    pieces = range_search("mse").fit(weights, scheme, torch.float16)
    assert torch.equal(pieces.scale, whole.scale)
    assert torch.equal(pieces.zero, whole.zero)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric, signed", [(True, True), (True, False), (False, True)], ids=["signed", "unsigned", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grids_and_codes_are_the_textbook_ones(bits, symmetric, signed, scale_dtype, search, kind):
    weights = KINDS[kind](torch.randn(20, 32, generator=torch.Generator().manual_seed(bits), dtype=torch.float64))
    scheme = Scheme(bits, 32, symmetric)
    grid = range_search(search, signed).fit(weights, scheme, scale_dtype)
    scale, zero = textbook_grid(weights, scheme, scale_dtype, search, signed=signed)
    assert torch.equal(grid.scale[:, 0], scale)
    assert torch.equal(grid.zero[:, 0], zero)
    assert torch.equal(grid.nearest(weights), textbook_codes(weights, scale[:, None], zero[:, None], scheme))


@pytest.mark.parametrize("bits, rise", [(8, 0.012), (4, 0.2)])
def test_float16_holds_the_scales_of_small_weights(bits, rise):
    """Scales below float16's smallest normal number, 6e-5, lose little; held at that number they would lose most codes."""
    weights = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 5e-4
    rounded = RTN("mse").solve(weights, None, Scheme(bits, 128), torch.float16).weight
    assert float(rounded.scale.float().abs().max()) < (6.1e-5 if bits == 8 else 1)
    assert float((rounded.dequantize(torch.float32) - weights).norm() / weights.norm()) < rise


def test_rounding_is_the_textbook_group_by_group():
    weights = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    scheme = Scheme(3, 32, symmetric=False)
    rounded = RTN("minmax").solve(weights, None, scheme, torch.float32).weight
    for group in range(3):
        columns = slice(group * 32, group * 32 + 32)
        scale, zero = textbook_grid(weights[:, columns].double(), scheme, torch.float32, "minmax")
        codes = textbook_codes(weights[:, columns].double(), scale[:, None], zero[:, None], scheme)
        assert torch.equal(rounded.codes[:, columns].double(), codes)
        values = (codes - zero[:, None]) * scale[:, None]
        torch.testing.assert_close(rounded.dequantize(torch.float64)[:, columns], values, rtol=1e-6, atol=0)


def test_dequantize_follows_the_column_index():
    scheme = Scheme(4, 2)
    codes = torch.tensor([[1, 9, 15, 0]], dtype=torch.uint8)
    scale, zero = torch.tensor([[1.0, 10.0]]), torch.full((1, 2), 8, dtype=torch.uint8)
    neighbours = QuantizedWeight(codes=codes, scale=scale, zero=zero, scheme=scheme)
    moved = QuantizedWeight(codes=codes, scale=scale, zero=zero, scheme=scheme, g_idx=torch.tensor([1, 0, 1, 0], dtype=torch.int32))
    assert neighbours.dequantize().tolist() == [[-7, 1, 70, -80]]
    assert moved.dequantize().tolist() == [[-70, 1, 70, -8]]


def test_schemes_that_do_not_exist_are_refused():
    for bits, group, message in [(9, 32, "9 bits"), (4, 0, "group size 0"), (4, -2, "group size -2")]:
        with pytest.raises(UsageError, match=message):
            Scheme(bits, group)
    with pytest.raises(UsageError, match="does not divide 100"):
        Scheme(4, 32).group_count(100)


# Names


def every_scheme():
    """All schemes that exist: of what is drawn, the combinations that ``Scheme`` takes."""
    thresholds = strategies.floats(0, 1e38, exclude_min=True, exclude_max=True)
    activations = strategies.sampled_from([None, TOKEN, TENSOR, STATIC])
    splits = strategies.none() | strategies.builds(OutlierSplit, thresholds, strategies.booleans())
    groups = strategies.sampled_from([-1, 0, AUTO_GROUP]) | strategies.integers(1, 10**6)
    drawn = strategies.tuples(strategies.sampled_from(SUPPORTED_BITS), groups, strategies.booleans(), activations, splits)
    return drawn.map(made).filter(lambda scheme: scheme is not None)


TOKEN, TENSOR, STATIC = ActivationScheme(), ActivationScheme(per_token=False), ActivationScheme(per_token=False, dynamic=False)


def made(parts):
    try:
        return Scheme(*parts)
    except UsageError:
        return None


@given(every_scheme())
def test_name_and_scheme_are_an_inverse_pair(scheme):
    name = str(scheme)
    assert Scheme.parse(name) == scheme
    assert Scheme.parse(f" {name.upper()} ") == scheme
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-+."), "a folder may be called so"


def test_no_two_schemes_share_a_name():
    parts = itertools.product(
        SUPPORTED_BITS,
        (-1, 0, 32, 128, AUTO_GROUP),
        (True, False),
        (None, TOKEN, TENSOR, STATIC),
        (None, OutlierSplit(), OutlierSplit(6.5, False)),
    )
    schemes = {scheme for scheme in map(made, parts) if scheme is not None}
    assert len({str(scheme) for scheme in schemes}) == len(schemes) > 60


@pytest.mark.parametrize(
    "text, name, scheme",
    [
        ("w4a16", "w4a16", Scheme(4, AUTO_GROUP)),
        ("w4a16-g64-sym", "w4a16-g64", Scheme(4, 64)),
        ("W4A16-G64-ASYM", "w4a16-g64-asym", Scheme(4, 64, symmetric=False)),
        ("w4a16-row", "w4a16-row", Scheme(4, -1)),
        ("w3a16-row-asym", "w3a16-row-asym", Scheme(3, -1, symmetric=False)),
        ("w8a8-row", "w8a8", Scheme(8, -1, activations=TOKEN)),
        ("w8a8-tensor", "w8a8-tensor", Scheme(8, 0, activations=TOKEN)),
        ("w8a8-act-tensor", "w8a8-act-tensor", Scheme(8, -1, activations=TENSOR)),
        ("w8a8-tensor-act-tensor", "w8a8-tensor-act-tensor", Scheme(8, 0, activations=TENSOR)),
        ("w4a8-static", "w4a8-static", Scheme(4, -1, activations=STATIC)),
        ("llm-int8", "w8a8-outliers6", Scheme(8, -1, activations=TOKEN, outliers=OutlierSplit(6.0))),
        ("LLM-int8-static", "w8a8-outliers6-static", Scheme(8, -1, activations=TOKEN, outliers=OutlierSplit(6.0, dynamic=False))),
        ("w8a8-outliers4.50", "w8a8-outliers4.5", Scheme(8, -1, activations=TOKEN, outliers=OutlierSplit(4.5))),
        ("w8a8-outliers1e-6", "w8a8-outliers1e-06", Scheme(8, -1, activations=TOKEN, outliers=OutlierSplit(1e-6))),
    ],
)
def test_short_forms_and_what_they_are_called(text, name, scheme):
    assert Scheme.parse(text) == scheme
    assert str(scheme) == name


WRONG = [
    "",
    "w4",
    "int8",
    "w4a16-",
    "w4a16-g0",
    "w4a16-asym-g64",
    "llm-int84.5",
    "w8a8-outliersinf",
    "w8a8-static-static",
    "w²a16",
    "w4a16\n-row",
]


@pytest.mark.parametrize("text", WRONG)
def test_other_names_are_refused_with_examples(text):
    with pytest.raises(UsageError) as refused:
        Scheme.parse(text)
    expected = f"scheme {text!r} is no number format; write one such as {', '.join(EXAMPLES)}{did_you_mean(text, usual_schemes())}"
    assert str(refused.value) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("w9a16", "9 bits per weight"),
        ("w5a8", "5 bits per weight is not supported beside 8-bit activations"),
        ("w4a4", "4 bits per activation"),
        ("w4a16-tensor", "group size 0"),
        ("w8a8-g128", "not group size 128"),
        ("w8a8-asym", "symmetric weights"),
        ("w4a16-static", "leave -static out"),
        ("w4a16-outliers6", "8-bit activations"),
        ("w8a8-static-outliers6", "not static ones"),
        ("w8a8-outliers0", "positive number"),
    ],
)
def test_names_of_schemes_that_do_not_exist_are_refused(text, message):
    with pytest.raises(UsageError, match=f"scheme '{text}': .*{message}"):
        Scheme.parse(text)


def test_a_name_needs_no_torch():
    code = "import sys; from ptqcli.numerics.scheme import Scheme; str(Scheme.parse('w4a16')); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Elements and grids


@pytest.mark.parametrize("element", [Int(3), Codebook((-1.0, -0.25, 0.0, 0.5, 2.0))], ids=str)
def test_the_nearest_code_is_the_nearest_value(element):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(7, 300, generator=generator, dtype=torch.float64) * 3
    scale = torch.rand(7, 1, generator=generator, dtype=torch.float64) + 0.2
    scale[3] *= -1  # a scale may have a sign
    zero = torch.full((7, 1), 2.0, dtype=torch.float64)
    grid = Grid(element, scale, zero)
    codes, miss = grid.nearest_with_miss(weights)
    count = 8 if isinstance(element, Int) else 5
    values = torch.stack([grid.decode(torch.full_like(weights, code)) for code in range(count)])  # [code, rows, columns]
    assert torch.equal(codes, (values - weights).abs().argmin(dim=0).double())
    assert torch.equal(codes, grid.nearest(weights))
    assert torch.equal(grid.round(weights), values.gather(0, codes.long()[None])[0])
    torch.testing.assert_close(miss * scale, grid.round(weights) - weights)
    found = torch.empty_like(weights)
    grid.subtract(codes, weights, out=found)
    torch.testing.assert_close(found, weights - grid.round(weights))
    inside = (weights > values.amin(dim=0)) & (weights < values.amax(dim=0))
    assert 100 < inside.sum() < inside.numel() - 100
    assert (miss.abs()[inside] <= element.slack + 1e-12).all()


def test_values_of_elements():
    zero = torch.tensor(2.0)
    assert Int(2).decode(torch.arange(4.0), zero).tolist() == [-2, -1, 0, 1]
    assert Codebook((-1.0, 0.5, 3.0)).decode(torch.arange(3.0), zero).tolist() == [-1, 0.5, 3]
    assert (Int(2).span, Codebook((-1.0, 0.5, 3.0)).span) == (3, 4)
    for levels in [(1.0,), (0.0, 0.0), (1.0, 0.0), (0.0, float("nan"))]:
        with pytest.raises(UsageError, match="rising numbers"):
            Codebook(levels)


@pytest.mark.parametrize("symmetric, signed", [(True, True), (True, False), (False, True)], ids=["signed", "unsigned", "asym"])
def test_clipped_reaches_as_far_as_its_limits_and_no_farther_than_the_weights(symmetric, signed):
    weights = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))  # two groups of 32
    limits = weights.abs().reshape(6, 2, 32).amax(dim=2) * torch.tensor([0.5, 2.0])
    scheme = Scheme(4, 32, symmetric)
    stacked = Clipped(limits, signed).fit(weights.reshape(12, 32), scheme, torch.float32)
    for group in range(2):
        part = weights[:, group * 32 : group * 32 + 32]
        alone = Clipped(limits, signed).fit(part, scheme, torch.float32, slice(group, group + 1))
        assert torch.equal(alone.scale, stacked.scale.reshape(6, 2)[:, group : group + 1])
        expected = MinMax(signed).fit(part.clamp(-limits[:, group : group + 1], limits[:, group : group + 1]), scheme, torch.float32)
        torch.testing.assert_close(alone.scale.abs(), expected.scale.abs())  # of clamped weights several are the largest
        assert torch.equal(alone.scale < 0, (part.gather(1, part.abs().argmax(dim=1, keepdim=True)) > 0) & takes_sign(scheme, signed))
        assert torch.equal(alone.zero, expected.zero)
    whole = Clipped(limits[:, :1], signed).fit(weights, Scheme(8, 0, activations=TOKEN), torch.float32)
    assert whole.scale.shape == (6, 1)
    step = limits[:, 0].max() / 128 * -weights.view(-1)[weights.abs().argmax()].sign() if signed else limits[:, 0].max() * 2 / 255
    torch.testing.assert_close(whole.scale, step.expand(6, 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_signed_grid_puts_the_largest_weight_on_the_lowest_code(bits):
    weights = torch.randn(50, 32, generator=torch.Generator().manual_seed(bits))
    grid = MinMax().fit(weights, Scheme(bits, 32), torch.float32)
    rows, places = torch.arange(50), weights.abs().argmax(dim=1)
    largest = weights[rows, places]
    assert (grid.nearest(weights)[rows, places] == 0).all()
    torch.testing.assert_close(grid.round(weights)[rows, places], largest)
    assert torch.equal(grid.scale[:, 0].sign(), -largest.sign())
    assert 10 < (grid.scale < 0).sum() < 40
    unsigned = MinMax(signed=False).fit(weights, Scheme(bits, 32), torch.float32)
    torch.testing.assert_close(grid.scale.abs() / unsigned.scale, torch.full((50, 1), 1 - 2.0**-bits))


def test_which_schemes_take_signed_scales():
    assert takes_sign(Scheme(4, 32), True)
    assert not takes_sign(Scheme(4, 32), False)
    assert not takes_sign(Scheme(4, 32, symmetric=False), True)


def test_searches_by_name():
    assert set(SEARCHES) == {"minmax", "mse"}
    with pytest.raises(UsageError, match="scale search 'best' is unknown; use minmax or mse"):
        range_search("best")

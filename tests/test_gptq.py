"""GPTQ against the textbook: the same codes as the paper's column-by-column form in float64 with the inverse."""

import functools
from dataclasses import dataclass

import pytest
import torch
from layers import correlated_layer
from textbook import excess_rounding, textbook_gptq, textbook_values
from torch.utils._python_dispatch import TorchDispatchMode

from ptqcli.calibration.statistics import Hessian
from ptqcli.errors import PTQError, UsageError
from ptqcli.numerics.elements import Codebook
from ptqcli.numerics.scheme import ActivationScheme, Scheme
from ptqcli.solvers import gptq
from ptqcli.solvers.gptq import LEAF
from ptqcli.solvers.rtn import RTN

GPTQ = functools.partial(gptq.GPTQ, polish=0)  # what error feedback alone finds


def layer(out=24, columns=192, tokens=600, dtype=torch.float64, seed=0):
    return correlated_layer(out, columns, tokens, dtype, seed, spread=1)


def solve(solver, weight, hessian, scheme, scale_dtype=torch.float32):
    return solver.solve(weight, solver.prepare(hessian, "layer"), scheme, scale_dtype)


CASES = [
    pytest.param(bits, group, symmetric, order, static, search, id=f"w{bits}g{group}{'sym' if symmetric else 'asym'}-{name}-{search}")
    for bits, group in [(2, 16), (3, 32), (4, 64), (4, 96), (4, 192), (8, 48), (3, -1)]
    for symmetric in (True, False)
    for name, order, static in [("plain", False, True), ("act", True, True), ("classic", True, False)]
    for search in (["minmax", "mse"] if bits == 3 else ["minmax"])
]


@pytest.mark.parametrize("bits, group, symmetric, order, static, search", CASES)
def test_codes_equal_the_textbook(bits, group, symmetric, order, static, search):
    assert 16 < LEAF < 48, "the cases must hold groups smaller and larger than the internal block"
    weight, hessian = layer()
    scheme = Scheme(bits, group, symmetric)
    ours = solve(GPTQ(0.01, order, static, search), weight, hessian, scheme).weight
    truth = textbook_gptq(weight, hessian.matrix, scheme, torch.float32, 0.01, order, static, search)
    assert torch.equal(ours.codes, truth.codes)
    assert torch.equal(ours.scale, truth.scale)
    assert torch.equal(ours.zero, truth.zero)
    if static or not order or group in (-1, weight.shape[1]):
        assert ours.g_idx is None
    else:
        assert torch.equal(ours.g_idx, truth.g_idx)


# Dettmers et al. 2023, "QLoRA", appendix E
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NormalFloat(Scheme):
    """Codes that count the levels of NF4."""

    element = Codebook(NF4)


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("order, static", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("group", [16, 64, -1])
def test_codes_of_a_codebook_equal_the_textbook(group, order, static, search):
    weight, hessian = layer()
    scheme = NormalFloat(4, group)
    ours = solve(GPTQ(0.01, order, static, search), weight, hessian, scheme).weight
    truth = textbook_gptq(weight, hessian.matrix, scheme, torch.float32, 0.01, order, static, search, levels=NF4)
    assert torch.equal(ours.codes, truth.codes)
    assert torch.equal(ours.scale, truth.scale)
    index = torch.arange(192) // (192 // truth.scale.shape[1]) if truth.g_idx is None else truth.g_idx.long()
    values = textbook_values(truth.codes, truth.scale.double()[:, index], truth.zero, NF4)
    torch.testing.assert_close(ours.dequantize(torch.float64), values, rtol=1e-6, atol=0)
    assert not torch.equal(ours.codes, solve(GPTQ(0.01, order, static, search), weight, hessian, Scheme(4, group)).weight.codes)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_scales_are_rounded_before_codes_are_chosen(scale_dtype):
    weight, hessian = layer()
    scheme = Scheme(4, 64)
    ours = solve(GPTQ(scale_search="minmax"), weight, hessian, scheme, scale_dtype).weight
    truth = textbook_gptq(weight, hessian.matrix, scheme, scale_dtype, 0.01, True, True, "minmax")
    assert ours.scale.dtype == scale_dtype
    assert torch.equal(ours.codes, truth.codes)
    assert torch.equal(ours.scale, truth.scale)


def test_the_comparison_notices_one_flipped_code():
    weight, hessian = layer()
    scheme = Scheme(4, 64)
    ours = solve(GPTQ(act_order=False, scale_search="minmax"), weight, hessian, scheme).weight
    assert excess_rounding(weight, hessian.matrix, ours, 0.01) < 1e-6
    ours.codes[3, 17] ^= 1
    assert excess_rounding(weight, hessian.matrix, ours, 0.01) > 1e-3
    assert not torch.equal(ours.codes, textbook_gptq(weight, hessian.matrix, scheme, torch.float32, 0.01, search="minmax").codes)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("group", [32, 64, -1])
def test_float32_differs_from_the_textbook_by_ties_only(group, order):
    weight, hessian = layer(out=32, columns=256, dtype=torch.float32)
    ours = solve(GPTQ(act_order=order), weight, hessian, Scheme(4, group)).weight
    assert excess_rounding(weight, hessian.matrix, ours, 0.01, order) < 2e-3


@pytest.mark.parametrize("damp", [0.01, 0.0])
@pytest.mark.parametrize("order", [False, True])
def test_a_column_never_activated_is_rounded_to_nearest_and_counted(order, damp):
    weight, hessian = layer()
    hessian.sums[:, 40] = 0
    hessian.sums[40, :] = 0
    scheme = Scheme(4, -1)
    solution = solve(GPTQ(damp, order, scale_search="minmax"), weight, hessian, scheme)
    truth = textbook_gptq(weight, hessian.matrix, scheme, torch.float32, damp, order, True, "minmax")
    assert torch.equal(solution.weight.codes, truth.codes)
    assert torch.equal(solution.weight.codes[:, 40], solve(RTN("minmax"), weight, None, scheme).weight.codes[:, 40])
    assert solution.notes.never_activated == 1
    assert not solution.notes.damp_raised


def test_a_rank_deficient_hessian_is_damped_as_the_textbook_does():
    weight, hessian = layer(tokens=50)
    assert torch.linalg.matrix_rank(hessian.matrix) <= 50
    scheme = Scheme(3, 64)
    solution = solve(GPTQ(act_order=False, scale_search="minmax"), weight, hessian, scheme)
    truth = textbook_gptq(weight, hessian.matrix, scheme, torch.float32, 0.01, search="minmax")
    assert torch.equal(solution.weight.codes, truth.codes)
    assert solution.notes.damp == 0.01


def test_damping_is_raised_and_reported_when_the_hessian_is_not_positive_definite():
    weight, hessian = layer(tokens=50)
    hessian.sums -= 0.002 * hessian.matrix.diagonal().mean() * torch.eye(192, dtype=torch.float64)
    solution = solve(GPTQ(damp=0.0), weight, hessian, Scheme(4, 64))
    assert solution.notes.damp_raised
    assert solution.notes.damp == pytest.approx(0.01)


def test_a_hopeless_hessian_is_an_error_that_names_the_layer():
    weight, hessian = layer()
    hessian.sums = -hessian.sums
    with pytest.raises(PTQError, match="layer"):
        solve(GPTQ(), weight, hessian, Scheme(4, 64))


def test_all_zero_groups_give_zeros_and_are_counted():
    weight, hessian = layer()
    weight[5, 64:128] = 0
    for solver in (GPTQ(), GPTQ(act_order=False), RTN()):
        solution = solve(solver, weight, hessian, Scheme(4, 64))
        assert solution.notes.zero_groups == 1
        assert torch.isfinite(solution.weight.dequantize()).all()
    assert (solve(RTN(), weight, None, Scheme(4, 64)).weight.dequantize()[5, 64:128] == 0).all()


def test_options_out_of_range_are_refused():
    with pytest.raises(UsageError, match="damp"):
        GPTQ(damp=-0.1)
    weight, hessian = layer()
    with pytest.raises(UsageError, match="does not divide"):
        solve(GPTQ(), weight, hessian, Scheme(4, 100))
    with pytest.raises(UsageError, match="scale search"):
        solve(GPTQ(scale_search="best"), weight, hessian, Scheme(4, 64))


def test_gptq_beats_rounding_in_output_error():
    weight, hessian = layer()
    scheme = Scheme(3, 64)
    errors = {}
    for name, solver in {"rtn": RTN(), "plain": GPTQ(act_order=False), "act": GPTQ()}.items():
        solved = solve(solver, weight, hessian, scheme).weight.dequantize(torch.float64)
        errors[name] = hessian.output_energy(weight - solved)
    assert errors["plain"] < 0.8 * errors["rtn"]
    assert errors["act"] < errors["plain"]


@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize(("order", "static"), [(True, True), (False, True), (True, False)], ids=["act", "plain", "classic"])
@pytest.mark.parametrize("bits", [2, 3])
def test_of_both_searches_each_row_keeps_the_better(bits, order, static, group):
    weight, hessian = layer(out=40)
    scheme = Scheme(bits, group)
    damped = hessian.matrix.double() + 0.01 * hessian.matrix.double().diagonal().mean() * torch.eye(192, dtype=torch.float64)

    def row_losses(search):
        found = solve(GPTQ(0.01, order, static, search, polish=0), weight, hessian, scheme).weight
        error = weight - found.dequantize(torch.float64)
        return ((error @ damped) * error).sum(dim=1)

    minmax, mse, both = (row_losses(search) for search in ("minmax", "mse", "auto"))
    torch.testing.assert_close(both, torch.minimum(minmax, mse), rtol=1e-6, atol=0)
    assert (minmax < mse).any()
    assert (mse < minmax).any()


def test_with_one_scale_for_the_matrix_all_rows_keep_the_same_search():
    weight, hessian = layer(out=40)
    scheme = Scheme(8, 0, activations=ActivationScheme())
    scales = [solve(GPTQ(scale_search=search, polish=0), weight, hessian, scheme).weight.scale for search in ("minmax", "mse", "auto")]
    assert torch.equal(scales[2], scales[0]) or torch.equal(scales[2], scales[1])
    assert (scales[2] == scales[2][0]).all()


class Products(TorchDispatchMode):
    """Counts the floating operations of matrix products."""

    count = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("addmm", "addmm_", "addmv_", "mm", "bmm", "mv"):
            left, right = args[-2:]
            self.count += 2 * left.numel() * (right.shape[-1] if right.dim() > 1 else 1)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("polish", [0, 3])
@pytest.mark.parametrize("out, columns", [(512, 512), (256, 1024)])
def test_the_work_that_is_told_is_that_of_its_products(out, columns, polish):
    hessian = Hessian.zeros(columns, torch.device("cpu"))
    hessian.add(torch.randn(2 * columns, columns, generator=torch.Generator().manual_seed(0)))
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(1))
    solver = GPTQ(polish=polish)
    prepared = solver.prepare(hessian, "a test")
    with Products() as products:
        solver.solve(weight, prepared, Scheme(4, 128), torch.bfloat16)
    told = solver.work(out, columns) - columns**3 / 3  # the factorisation is no product
    assert 0.7 * told < products.count < 1.3 * told, (told, products.count)

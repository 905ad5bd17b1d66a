"""How W' depends on what is learned: against the papers' formulas, written here a second time in float64."""

import pytest
import torch
from layers import correlated_layer

from ptqcli.errors import UsageError
from ptqcli.numerics.ranges import Clipped, MinMax
from ptqcli.numerics.scheme import ActivationScheme, OutlierSplit, Scheme
from ptqcli.numerics.weight import round_to_nearest
from ptqcli.solvers import LinearTask, SolveNotes
from ptqcli.solvers.autoround import AutoRound, ScaledSignRound, SignRound, SignSGD, masked_loss, searched_grid
from ptqcli.solvers.flexround import ElementDivision, FlexRound
from ptqcli.solvers.gptq import GPTQ
from ptqcli.solvers.obq import OBQ
from ptqcli.solvers.omniquant import Clipping, OmniQuant
from ptqcli.solvers.rounding import Start, centred

OUT, COLUMNS = 6, 32
STEP, MARGIN = 1e-7, 1e-5  # of finite differences; by which they widen the range
SCHEMES = [Scheme(2, 16), Scheme(3, 8), Scheme(4, -1), Scheme(2, 16, symmetric=False), Scheme(3, 8, symmetric=False)]
SCHEMES += [Scheme(8, 0, activations=ActivationScheme())]


def start_of(scheme, seed=0, dtype=torch.float64, ranges=None):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, COLUMNS, generator=generator, dtype=torch.float64).to(dtype)
    weight[1, :16] = weight[1, :16].abs()  # a group on one side of zero
    task = LinearTask(name="weight", weight=weight, scheme=scheme, scale_dtype=dtype, ranges=ranges)
    importance = torch.rand(COLUMNS, generator=generator, dtype=torch.float64).to(dtype) + 0.1
    return Start(task=task, weight=weight, importance=importance, notes=SolveNotes())


def disturbed(rounding, spread=0.2, seed=1):
    """Every parameter moved by up to ``spread``, downwards, so that it stays where it may be."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in rounding.parameters():
        parameter.data -= spread * torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
    return rounding


def column_groups(scheme):
    """The columns of each group."""
    width = COLUMNS if scheme.group_size < 1 else scheme.group_size
    return [slice(first, first + width) for first in range(0, COLUMNS, width)]


def at(parameter, row, group):
    """A parameter of a group, which all groups may share."""
    return float(parameter.detach()[min(row, parameter.shape[0] - 1), min(group, parameter.shape[1] - 1), 0])


def grid_by_hand(weights, lower, upper, scheme):
    """s and z of a group [columns] whose range is shrunk to ``lower`` of its low end and ``upper`` of its high one."""
    low, high = lower * min(float(weights.min()), 0.0), upper * max(float(weights.max()), 0.0)
    if scheme.symmetric:
        m = low if -low > high else high
        return -m / 2 ** (scheme.bits - 1), 2 ** (scheme.bits - 1)
    s = (high - low) / (2**scheme.bits - 1)
    return s, round(-low / s)


def by_hand(scheme, weight, scale_and_zero, units):
    """W' and codes, one weight at a time."""
    result, codes = torch.empty_like(weight), torch.empty_like(weight)
    for row in range(OUT):
        for group, columns in enumerate(column_groups(scheme)):
            s, z = scale_and_zero(row, group, weight if scheme.group_size == 0 else weight[row, columns])
            for j in range(columns.start, columns.stop):
                codes[row, j] = min(max(round(units(row, j, s)) + z, 0), 2**scheme.bits - 1)
                result[row, j] = s * (codes[row, j] - z)
    return result, codes


def signround(start):
    """Version 1 and its formula."""
    ours = disturbed(SignRound(start))
    offset = ours.offset.detach().reshape(OUT, COLUMNS)

    def grid(row, group, weights):
        return grid_by_hand(weights, at(ours.beta, row, group), at(ours.alpha, row, group), start.task.scheme)

    return ours, by_hand(start.task.scheme, start.weight, grid, lambda i, j, s: float(start.weight[i, j] / s + offset[i, j]))


def clipping(start):
    """OmniQuant's and its formula."""
    ours = disturbed(Clipping(start), spread=3.0)

    def grid(row, group, weights):
        lower, upper = (1 / (1 + 2.718281828459045 ** -at(each, row, group)) for each in (ours.l, ours.u))
        return grid_by_hand(weights, lower, upper, start.task.scheme)

    return ours, by_hand(start.task.scheme, start.weight, grid, lambda i, j, s: float(start.weight[i, j] / s))


def division(start):
    """FlexRound's and its formula; s0 from the grid that it begins with."""
    ours = disturbed(ElementDivision(start))
    s2, s3 = ours.d2.detach().exp().reshape(OUT, COLUMNS), ours.d3.detach().exp().flatten()

    def grid(row, group, weights):
        return at(ours.scale, row, group) * 2.718281828459045 ** at(ours.d1, row, group), int(at(ours.zero, row, group))

    return ours, by_hand(start.task.scheme, start.weight, grid, lambda i, j, s: float(start.weight[i, j] / (s * s2[i, j] * s3[i])))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("method", [signround, clipping, division])
def test_the_weight_is_what_the_formula_says(method, scheme):
    start = start_of(scheme)
    ours, (truth, codes) = method(start)
    found = ours.quantized()
    torch.testing.assert_close(ours().detach(), truth, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.codes, codes.to(torch.uint8))
    torch.testing.assert_close(found.dequantize(torch.float64), truth, rtol=1e-6, atol=1e-6)
    assert found.scale.shape == (OUT, len(column_groups(scheme)))
    if scheme.group_size == 0:
        assert found.scale.unique().numel() == 1
    plain = type(ours)(start).quantized()
    assert not torch.equal(plain.codes, found.codes), "what is learned must matter for this to prove anything"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("method", [signround, clipping, division])
def test_gradients_are_those_of_the_formula_with_what_rounding_added_held_fixed(method, scheme):
    """The straight-through estimator is the derivative of s (clip(u + r + z) - z), r = round(u) - u held fixed: finite differences of that.

    Codes at the ends are within the range: only weights that the clip has moved have no gradient of their own.
    """
    ours, _ = method(start_of(scheme))
    scale, zero = (each.detach() for each in ours.grid())
    units = ours.units(scale).detach()
    rest = units.round() - units
    exact = exact_zero(ours).detach()
    weights = torch.randn(OUT, COLUMNS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def smooth():
        s, _ = ours.grid()
        z = exact_zero(ours) + (zero - exact)
        codes = (ours.units(s) + rest + z).clamp(-MARGIN, scheme.levels - 1 + MARGIN)
        return float((((codes - z) * s).reshape(OUT, COLUMNS) * weights).sum().detach())

    (ours() * weights).sum().backward()
    assert sum(bool(parameter.grad.any()) for parameter in ours.parameters()) >= len(list(ours.parameters())) / 2
    for name, parameter in ours.named_parameters():
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        for place in range(0, flat.numel(), max(1, flat.numel() // 16)):
            kept, slopes = float(flat[place]), []
            for step in (STEP, -STEP):
                flat[place] = kept + step
                slopes.append(smooth())
            flat[place] = kept
            assert float(grad[place]) == pytest.approx((slopes[0] - slopes[1]) / (2 * STEP), rel=1e-4, abs=1e-3), (name, place)


def exact_zero(rounding):
    """The zero point before it is rounded; the zero point where nothing learns it."""
    if rounding.scheme.symmetric or isinstance(rounding, ElementDivision):
        return rounding.grid()[1]
    lower, upper = (rounding.beta, rounding.alpha) if isinstance(rounding, SignRound) else (rounding.l.sigmoid(), rounding.u.sigmoid())
    low, high = lower * rounding.low, upper * rounding.high
    return -low / ((high - low) / (rounding.scheme.levels - 1))


def test_one_step_of_signround_by_hand():
    """y = W' x, one row, one group: dL/dW' = 2 (y - t) x, dL/dV = s dL/dW' inside the range, dL/ds = sum of dL/dW' (q - w/s)."""
    scheme, rate = Scheme(2, 4), 0.125
    weight = torch.tensor([[0.9, -0.2, 0.35, -1.0]], dtype=torch.float64)
    x, target = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64), 0.3
    task = LinearTask(name="weight", weight=weight, scheme=scheme, scale_dtype=torch.float64)
    ours = SignRound(Start(task=task, weight=weight, importance=x.square(), notes=SolveNotes()))
    s = 0.5  # low end -1.0 is the larger: it gets the code -2
    assert float(ours.grid()[0].detach()) == s
    q = [1.0, 0.0, 1.0, -2.0]  # 1.8 rounds to 2 and is clipped to 1; -.4, .7, -2
    assert torch.equal(ours().detach(), s * torch.tensor([q], dtype=torch.float64))
    output = sum(s * q[j] * float(x[j]) for j in range(4))
    slopes = [2 * (output - target) * float(x[j]) for j in range(4)]
    inside = [0, 1, 1, 1]
    d_offset = [s * slopes[j] * inside[j] for j in range(4)]
    d_scale = sum(slopes[j] * (q[j] - inside[j] * float(weight[0, j]) / s) for j in range(4))
    optimizer = SignSGD([{"params": list(ours.parameters()), "lr": rate}])
    (ours()[0] @ x - target).square().backward()
    torch.testing.assert_close(ours.offset.grad.flatten(), torch.tensor(d_offset, dtype=torch.float64))
    assert float(ours.beta.grad) == pytest.approx(d_scale * 0.5)  # s = beta / 2
    assert float(ours.alpha.grad) == 0
    optimizer.step()
    signs = [(d > 0) - (d < 0) for d in d_offset]
    torch.testing.assert_close(ours.offset.detach().flatten(), torch.tensor([-rate * sign for sign in signs], dtype=torch.float64))
    assert float(ours.beta.detach()) == 1 - rate * ((d_scale > 0) - (d_scale < 0))
    assert float(ours.alpha.detach()) == 1


def test_the_rates_fall_in_a_line_to_half_a_step_together():
    ours = AutoRound(iters=50)
    rounding = SignRound(start_of(Scheme(4, 16)))
    rate = ours.optimizer(rounding, 50).param_groups[0]["lr"]
    assert rate == 1 / 50
    assert sum(rate * ours.decay(step / 50) for step in range(50)) == pytest.approx(0.5, abs=0.011)
    assert AutoRound(iters=50, lr=0.3).optimizer(rounding, 50).param_groups[0]["lr"] == 0.3


def test_parameters_stay_where_they_may_be():
    ours, scaled = SignRound(start_of(Scheme(4, 16))), ScaledSignRound(start_of(Scheme(4, 16)))
    for rounding, most in ((ours, 1.0), (scaled, 2.0)):
        for push in (3.0, -5.0):
            for parameter in rounding.parameters():
                parameter.data += push
            rounding.project()
            bound = max(push, 0) and most
            assert {float(parameter.detach().abs().max()) for name, parameter in rounding.named_parameters() if name != "offset"} == {bound}
            assert float(rounding.offset.detach().abs().max()) == 0.5
            assert torch.isfinite(rounding()).all()


@pytest.mark.parametrize("scheme", [Scheme(2, 16), Scheme(3, 8), Scheme(4, -1), Scheme(3, 16, symmetric=False)], ids=str)
def test_the_weighted_search_finds_the_best_of_all_candidates(scheme):
    start = start_of(scheme)
    scale, zero = (each.detach() for each in searched_grid(SignRound(start), start.importance))
    for row in range(OUT):
        for group, columns in enumerate(column_groups(scheme)):
            weights, importance = start.weight[row, columns], start.importance[columns]

            def error(s, z, weights=weights, importance=importance):
                codes = ((weights / s).round() + z).clamp(0, 2**scheme.bits - 1)
                return float(((s * (codes - z) - weights).square() * importance).sum())

            if scheme.symmetric:
                n, (d, most) = 2 ** (scheme.bits - 1), ((0.01, 90) if scheme.bits == 2 else (0.0075 * 2 ** (scheme.bits - 1), 100))
                m = float(weights[weights.abs().argmax()])
                tried = [error(-m / (n - i * d), n) for i in range(-most, most + 1)]
            else:
                grids = [grid_by_hand(weights, 1 - 0.05 * step, 1 - 0.05 * step, scheme) for step in range(14)]
                tried = [error(*grid) for grid in grids]
            assert error(float(scale[row, group, 0]), float(zero[row, group, 0])) == pytest.approx(min(tried), rel=1e-9)
            assert max(tried) > 1.1 * min(tried)


def test_the_mask_leaves_out_the_largest_of_each_thousand():
    generator = torch.Generator().manual_seed(0)
    output, target = (torch.randn(2, 50, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    squares = (output - target).square().flatten().sort().values
    assert float(masked_loss(output, target)) == pytest.approx(float(squares[:-4].sum()) / 100, rel=1e-6)
    assert float(masked_loss(output, target)) != pytest.approx(float(squares[:-3].sum()) / 100, rel=1e-6)
    narrow, wide = AutoRound(version="2").loss(output, target, 3), AutoRound(version="2").loss(output, target, 4)
    assert float(narrow) == float(masked_loss(output, target))
    assert float(wide) == pytest.approx(float(squares.sum()) / 100, rel=1e-6) == float(AutoRound().loss(output, target, 2))


@pytest.mark.parametrize("scheme", [Scheme(2, 16), Scheme(3, -1), Scheme(4, 8, symmetric=False)], ids=str)
@pytest.mark.parametrize("solver", [GPTQ(), GPTQ(act_order=False), OBQ()])
def test_an_anchor_rounds_to_the_codes_of_the_solver(solver, scheme):
    weight, hessian = correlated_layer(8, 64, 300, torch.float64, 0, 0.5)
    weight[2, :16] = 0
    matrix = hessian.matrix.clone()
    solution = solver.solve(weight, solver.prepare(hessian, "here"), scheme, torch.float32)
    anchor = centred(weight, solution.weight, matrix, solution.notes.damp)
    task = LinearTask(name="weight", weight=weight, scheme=scheme, scale_dtype=torch.float32)
    start = Start(task=task, weight=anchor, importance=torch.ones(64), notes=solution.notes, codes=solution.weight)
    for rounding in (AutoRound().rounding(start), FlexRound().rounding(start)):
        found = rounding.quantized()
        assert torch.equal(found.codes, solution.weight.codes)
        assert torch.equal(found.scale, solution.weight.scale)
        assert torch.equal(found.zero, solution.weight.zero)

    # T is where the objective tr(e H e^T) of one code, the others as they are, has its least value
    groups = 64 // solution.weight.scale.shape[1]
    scale = solution.weight.scale.double().repeat_interleave(groups, dim=1)
    q = solution.weight.codes.double() - solution.weight.zero.double().repeat_interleave(groups, dim=1)
    damped = matrix + solution.notes.damp * matrix.diagonal().mean() * torch.eye(64)

    def objective(row, column, code):
        codes = q[row].clone()
        codes[column] = code
        error = weight[row] - scale[row] * codes
        return float(error @ damped @ error)

    moved = 0
    for row, column in ((0, 3), (1, 40), (5, 63), (7, 0)):
        offset = float(anchor[row, column] / scale[row, column] - q[row, column])
        best = float(q[row, column]) + offset
        here = objective(row, column, best)
        if abs(offset) < 0.49 - 1e-9:
            moved += abs(offset) > 1e-3
            assert here <= min(objective(row, column, best + step) for step in (-1e-3, 1e-3))
        else:
            assert objective(row, column, best + 1e-3 * (1 if offset > 0 else -1)) < here
    assert moved


def test_groups_of_zeros_stay_zero_and_ranges_of_transforms_are_kept():
    limits = torch.full((OUT, 2), 0.7, dtype=torch.float64)
    start = start_of(Scheme(3, 16), ranges=Clipped(limits))
    clipped = round_to_nearest(start.weight, Scheme(3, 16), torch.float64, Clipped(limits))
    for rounding in (AutoRound().rounding(start), FlexRound().rounding(start)):
        assert torch.equal(rounding.quantized().scale, clipped.scale)
        assert torch.equal(rounding.quantized().codes, clipped.codes)
    empty = start_of(Scheme(3, 16))
    empty.weight[:, 16:] = 0
    for learner in (AutoRound(), AutoRound(version="2"), FlexRound(), OmniQuant()):
        found = learner.rounding(empty).quantized()
        assert not found.dequantize()[:, 16:].any()
        assert (found.scale[:, 1] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_those_that_the_file_holds(dtype):
    start = start_of(Scheme(4, 16), dtype=torch.float32)
    task = LinearTask(name="weight", weight=start.weight, scheme=Scheme(4, 16), scale_dtype=dtype)
    start = Start(task=task, weight=start.weight, importance=start.importance, notes=SolveNotes())
    for learner in (AutoRound(), AutoRound(version="2"), FlexRound(), OmniQuant()):
        rounding = disturbed(learner.rounding(start))
        scale = rounding.grid()[0].detach()
        assert torch.equal(scale.to(dtype).float(), scale)
        assert torch.equal(rounding.quantized().dequantize(torch.float32), rounding().detach())
        assert rounding.quantized().scale.dtype == dtype


def test_rounding_begins_where_min_max_ranges_leave_it():
    start = start_of(Scheme(4, 16, symmetric=False))
    plain = round_to_nearest(start.weight, Scheme(4, 16, symmetric=False), torch.float64, MinMax())
    assert torch.equal(AutoRound().rounding(start).quantized().codes, plain.codes)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"iters": 0}, "iters 0 is not valid"),
        ({"lr": -1.0}, "lr -1.0 is not valid"),
        ({"batch_size": 0}, "learn batch 0 is not valid"),
        ({"learn_window": 0}, "learn window 0 is not valid"),
        ({"start": "gptp"}, "start 'gptp' is unknown; use rtn, gptq or obq; did you mean 'gptq'?"),
        ({"version": "3"}, "autoround version '3' is unknown; use 1 or 2"),
        ({"damp": -1.0}, "damp -1.0 is out of range"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        AutoRound(**options)


def test_what_it_cannot_learn_is_said():
    split = Scheme(8, -1, activations=ActivationScheme(), outliers=OutlierSplit())
    assert "outlier columns; give --outliers none" in AutoRound().refusal(split)
    assert AutoRound().refusal(Scheme(8, -1, activations=ActivationScheme())) is None

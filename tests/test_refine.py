"""Polishing against float64 mathematics that shares nothing with it: explicit inputs, least squares, every code of every column tried."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from layers import correlated_layer
from textbook import damped, textbook_values

from ptqcli.calibration.statistics import Hessian
from ptqcli.errors import UsageError
from ptqcli.numerics.elements import Codebook
from ptqcli.numerics.ranges import MinMax
from ptqcli.numerics.scheme import WHOLE_MATRIX, ActivationScheme, Scheme
from ptqcli.numerics.weight import QuantizedWeight, round_to_nearest
from ptqcli.solvers import refine
from ptqcli.solvers.gptq import GPTQ
from ptqcli.solvers.obq import OBQ
from ptqcli.solvers.per_matrix import PerMatrix
from ptqcli.solvers.refine import Refinement, descend, polished
from ptqcli.solvers.rtn import RTN

LEVELS = (-1.0, -0.7, -0.4, -0.25, -0.1, 0.0, 0.3, 0.9)
DAMP = 0.01


@dataclass(frozen=True)
class Levels(Scheme):
    """Codes that count LEVELS."""

    element = Codebook(LEVELS)


SCHEMES = [
    Scheme(2, 16),
    Scheme(3, 32),
    Scheme(4, 64, symmetric=False),
    Scheme(2, 16, symmetric=False),
    Scheme(8, 32),
    Scheme(4, -1),
    Scheme(8, WHOLE_MATRIX, activations=ActivationScheme()),
    Scheme(4, WHOLE_MATRIX, activations=ActivationScheme()),
    Levels(3, 16),
]
IDS = [f"{type(scheme).__name__}-{scheme.bits}-{scheme.group_size}-{scheme.symmetric}" for scheme in SCHEMES]


def layer(dtype=torch.float64, out=12, columns=64, seed=0):
    """A matrix and its damped Hessian."""
    weight, hessian = correlated_layer(out, columns, 300, dtype, seed, spread=1)
    return weight, damped(hessian.matrix, DAMP).to(dtype)


def rounded(weight, scheme, scale_dtype=torch.float64):
    return round_to_nearest(weight, scheme, scale_dtype, MinMax())


def in_moving_groups(weight, scheme, scale_dtype=torch.float64, seed=3):
    """Rounded to nearest with groups of columns from all over the matrix."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed))
    quantized = rounded(weight[:, order], scheme, scale_dtype)
    place = torch.argsort(order)
    g_idx = (place // scheme.columns_per_group(weight.shape[1])).to(torch.int32)
    return QuantizedWeight(codes=quantized.codes[:, place], scale=quantized.scale, zero=quantized.zero, scheme=scheme, g_idx=g_idx)


def group_of(quantized):
    columns = quantized.codes.shape[1]
    if quantized.g_idx is not None:
        return quantized.g_idx.long()
    return torch.arange(columns) // (columns // quantized.scale.shape[1])


def values(quantized):
    """What the codes stand for, float64 [out, in]."""
    index = group_of(quantized)
    levels = LEVELS if isinstance(quantized.scheme, Levels) else None
    return textbook_values(quantized.codes.double(), quantized.scale.double()[:, index], quantized.zero.double()[:, index], levels)


def losses(weight, hessian, quantized):
    """The objective of each row, float64."""
    error = weight.double() - values(quantized)
    return torch.einsum("rj,jk,rk->r", error, hessian.double(), error)


def total(weight, hessian, quantized):
    return float(losses(weight, hessian, quantized).sum())


def changed(quantized, **fields):
    """A copy that shares no memory, with other ``fields``."""
    parts = {name: getattr(quantized, name).clone() for name in ("codes", "scale", "zero")}
    return QuantizedWeight(**{**parts, "scheme": quantized.scheme, "g_idx": quantized.g_idx, **fields})


@pytest.mark.parametrize("start", [rounded, in_moving_groups], ids=["neighbours", "moving"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
@pytest.mark.parametrize(
    "dtype, scale_dtype", [(torch.float64, torch.float64), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
)
def test_no_half_of_a_round_ever_raises_the_loss(scheme, start, dtype, scale_dtype):
    slack = 1e-12 if dtype == torch.float64 else 1e-5
    for seed in range(4):
        weight, hessian = layer(dtype, seed=seed)
        work = Refinement(weight, hessian, start(weight, scheme, scale_dtype))
        loss = first = losses(weight, hessian, work.result())
        for half in [work.refit, lambda: descend([work])] * 3:  # noqa: B023
            half()
            after = losses(weight, hessian, work.result())
            if scheme.group_size == WHOLE_MATRIX:
                assert after.sum() <= loss.sum() * (1 + slack)
            else:
                assert (after <= loss * (1 + slack)).all()
            loss = after
        assert loss.sum() < first.sum() * 0.9, "rounding to nearest leaves a lot to gain"
        assert work.result().scale.dtype == scale_dtype
        assert (work.result().scale != 0).all()


def test_a_code_or_a_scale_moved_away_raises_the_loss():
    """The twin of the test above: what it compares would notice."""
    weight, hessian = layer()
    for seed in range(10):
        found = polished(weight, hessian, rounded(weight, Scheme(3, 16)), 30)
        row, column = seed, seed * 5
        codes, scale = found.codes.clone(), found.scale.clone()
        codes[row, column] ^= 1
        scale[row, column // 16] *= 1.001
        loss = losses(weight, hessian, found)[row]
        assert losses(weight, hessian, changed(found, codes=codes))[row] > loss * (1 + 1e-5)
        assert losses(weight, hessian, changed(found, scale=scale))[row] > loss * (1 + 1e-9)


@pytest.mark.parametrize("start", [rounded, in_moving_groups], ids=["neighbours", "moving"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_refitted_scales_are_the_least_squares_solution(scheme, start):
    """``inputs`` are rows whose second moment is the Hessian; their outputs are fitted, one column of the design for each scale."""
    weight, hessian = layer()
    inputs = torch.linalg.cholesky(hessian).t()  # X, X^T X = H
    quantized = start(weight, scheme)
    work = Refinement(weight, hessian, quantized)
    work.refit()
    found, index, groups = work.result().scale, group_of(quantized), quantized.scale.shape[1]
    units = values(changed(quantized, scale=torch.ones_like(quantized.scale)))  # c
    design = torch.stack([inputs @ (units * (index == g)).t() for g in range(groups)])  # [groups, inputs, out]
    outputs = inputs @ weight.t()
    if scheme.group_size == WHOLE_MATRIX:
        truth = torch.linalg.lstsq(design.reshape(1, -1).t(), outputs.reshape(-1, 1)).solution.expand(len(weight), 1)
    else:
        truth = torch.linalg.lstsq(design.permute(2, 1, 0), outputs.t().unsqueeze(2)).solution.squeeze(2)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=0)
    assert (found / quantized.scale - 1).abs().max() > 4e-4, "the scales before would pass, too"


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_descent_ends_where_no_single_code_could_be_better(scheme):
    weight, hessian = layer(out=6)
    start = rounded(weight, scheme)
    work = Refinement(weight, hessian, start)
    for _ in range(60):
        before = work.result().codes
        descend([work])
        if torch.equal(before, work.result().codes):
            break
    else:
        pytest.fail("descent does not end")
    assert torch.equal(work.result().scale, start.scale)
    assert best_gain(weight, hessian, work.result()) < 1e-9
    assert best_gain(weight, hessian, start) > 1e-3, "so would the start"


def best_gain(weight, hessian, quantized):
    """The largest share of its loss that a row would save with one other code."""
    gain, loss = 0.0, losses(weight, hessian, quantized)
    trials = [values(changed(quantized, codes=torch.full_like(quantized.codes, code))) for code in range(quantized.scheme.levels)]
    error = weight - values(quantized)
    for column in range(weight.shape[1]):
        other = error.repeat(len(trials), 1, 1)  # [codes, out, in]
        other[:, :, column] = weight[:, column] - torch.stack(trials)[:, :, column]
        gain = max(gain, float((1 - torch.einsum("crj,jk,crk->cr", other, hessian, other) / loss).max()))
    return gain


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("start", [rounded, in_moving_groups], ids=["neighbours", "moving"])
@pytest.mark.parametrize("scheme", [Scheme(3, 16), Scheme(2, 32, symmetric=False), Levels(3, 16)], ids=["sym", "asym", "levels"])
def test_one_pass_gives_the_codes_of_the_plain_loop(scheme, start, block, monkeypatch):
    monkeypatch.setattr(refine, "BLOCK", block)
    weight, hessian = layer()
    quantized = start(weight, scheme)
    work = Refinement(weight, hessian, quantized)
    descend([work])
    truth = plain_descent(weight, hessian, quantized)
    assert torch.equal(work.result().codes, truth)
    assert not torch.equal(truth, quantized.codes)
    assert not torch.equal(truth, plain_descent(weight, hessian, quantized, descending=False)), "any order would do"


def plain_descent(weight, hessian, quantized, descending=True):
    """One pass: for each column the code, of all there are, that leaves the least loss."""
    best = changed(quantized)
    for column in torch.argsort(hessian.diagonal(), descending=descending, stable=True).tolist():
        tried = []
        for code in range(quantized.scheme.levels):
            best.codes[:, column] = code
            tried.append(losses(weight, hessian, best))
        best.codes[:, column] = torch.stack(tried).argmin(dim=0).to(torch.uint8)
    return best.codes


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_rows_refitted_piece_by_piece_get_the_same_scales(scheme, monkeypatch):
    weight, hessian = layer()
    whole = polished(weight, hessian, rounded(weight, scheme), 2)
    monkeypatch.setattr(refine, "ROWS", 5)
    pieces = polished(weight, hessian, rounded(weight, scheme), 2)
    assert torch.equal(pieces.codes, whole.codes)
    torch.testing.assert_close(pieces.scale, whole.scale, rtol=1e-12, atol=0)


def test_zero_groups_and_groups_of_zero_codes_keep_their_scales():
    weight, hessian = layer()
    weight[3], weight[5, 16:32] = 0, 0
    start = rounded(weight, Scheme(3, 16))
    start.codes[7, 32:48] = 4
    work = Refinement(weight, hessian, start)
    work.refit()
    found = work.result().scale
    assert (found == start.scale).nonzero().tolist() == [[3, 0], [3, 1], [3, 2], [3, 3], [5, 1], [7, 2]]
    found = polished(weight, hessian, start, 3)
    assert torch.isfinite(found.scale).all()
    assert (values(found)[3] == 0).all()


def test_a_scale_takes_the_sign_that_its_codes_ask_for():
    weight, hessian = layer()
    start = rounded(weight, Scheme(4, 16, symmetric=False))
    mirrored = changed(start, codes=15 - start.codes, zero=15 - start.zero)
    work, straight = Refinement(weight, hessian, mirrored), Refinement(weight, hessian, start)
    work.refit()
    straight.refit()
    assert (work.result().scale < 0).all()
    torch.testing.assert_close(work.result().scale, -straight.result().scale, rtol=1e-4, atol=0)


def test_no_scale_of_an_unsigned_grid_becomes_negative():
    """Whatever its codes ask for: of a row whose scales would change their sign, all stay."""
    weight, hessian = layer()
    start = rounded(weight, Scheme(4, 16, symmetric=False))
    mirrored = changed(start, codes=15 - start.codes, zero=15 - start.zero)
    work = Refinement(weight, hessian, mirrored, signed=False)
    work.refit()
    assert torch.equal(work.result().scale, mirrored.scale)
    free, kept = Refinement(weight, hessian, start), Refinement(weight, hessian, start, signed=False)
    free.refit()
    kept.refit()
    assert torch.equal(kept.result().scale, free.result().scale)


@pytest.mark.parametrize(
    ("solver", "symmetric", "seed"), [(GPTQ, True, 6), (GPTQ, False, 6), (OBQ, True, 6), (OBQ, False, 6), (RTN, True, 2), (RTN, False, 6)]
)
def test_solvers_keep_scales_positive_where_grids_are_unsigned(solver, symmetric, seed):
    """On layers where polishing, left alone, would turn a few of them."""
    weight, hessian = correlated_layer(48, 64, 300, torch.float64, seed, spread=2)
    objective = damped(hessian.matrix, DAMP)
    plain, full = (
        made.solve(weight, made.prepare(hessian, "layer"), Scheme(2, 8, symmetric), torch.float32).weight
        for made in (partial(solver, scale_search="minmax", signed=False)(polish=rounds) for rounds in (0, 3))
    )
    assert (polished(weight, objective, plain, 3).scale < 0).any()
    assert (full.scale > 0).all()
    assert total(weight, objective, full) < 0.98 * total(weight, objective, plain)
    if not symmetric:  # a zero point has no use for a sign
        made = solver(scale_search="minmax", polish=3)
        assert torch.equal(made.solve(weight, made.prepare(hessian, "layer"), Scheme(2, 8, False), torch.float32).weight.scale, full.scale)


def test_a_mirrored_solution_is_polished_in_the_same_way():
    weight, hessian = layer()
    start = rounded(weight, Scheme(4, 16, symmetric=False))
    mirrored = changed(start, codes=15 - start.codes, zero=15 - start.zero, scale=-start.scale)
    found = polished(weight, hessian, start, 3)
    torch.testing.assert_close(values(polished(weight, hessian, mirrored, 3)), values(found), rtol=1e-9, atol=1e-12)


def test_rows_that_rounding_of_the_scales_would_worsen_keep_them():
    """The loss after a refit in bfloat16 is at a minimum in float64; all rows that moved have gained, and few can move a second time."""
    weight, hessian = layer()
    start = rounded(weight, Scheme(8, -1), torch.bfloat16)
    work = Refinement(weight, hessian, start)
    work.refit()
    moved = (work.result().scale != start.scale).squeeze(1)
    assert 0 < moved.sum() < len(weight)
    gained = losses(weight, hessian, work.result()) < losses(weight, hessian, start)
    assert torch.equal(gained, moved)


def test_no_scale_becomes_too_small_for_its_dtype():
    """The weights are so small beside their scales that next to nothing would serve their codes best."""
    weight, hessian = layer(torch.float32)
    start = rounded(weight, Scheme(4, 16), torch.float16)
    work = Refinement(weight * 1e-9, hessian, start)
    work.refit()
    assert torch.equal(work.result().scale, start.scale)
    wider = Refinement(weight * 1e-9, hessian, changed(start, scale=start.scale.float()))
    wider.refit()
    assert (wider.result().scale.abs() < 1e-3 * start.scale.float().abs()).all()


def test_columns_without_activation_are_rounded_to_nearest():
    weight, hessian = layer()
    hessian[:, 5], hessian[5, :] = 0, 0
    hessian[5, 5] = DAMP
    found = polished(weight, hessian, rounded(weight, Scheme(4, 16)), 3)
    nearest = (weight[:, 5] / found.scale[:, 0] + 8).round().clamp(0, 15)
    assert torch.equal(found.codes[:, 5], nearest.to(torch.uint8))


def test_nothing_that_was_handed_in_is_changed():
    weight, hessian = layer(torch.float32)
    start = GPTQ().solve(weight, GPTQ().prepare(Hessian(hessian.clone()), "layer"), Scheme(3, 16), torch.bfloat16).weight
    kept = weight.clone(), hessian.clone(), start.codes.clone(), start.scale.clone()
    found = polished(weight, hessian, start, 2)
    assert all(map(torch.equal, kept, (weight, hessian, start.codes, start.scale)))
    assert not torch.equal(found.codes, start.codes)
    assert polished(weight, hessian, start, 0) is start


@pytest.mark.parametrize("rounds", [-1, 101])
def test_a_number_of_rounds_that_makes_no_sense_is_refused(rounds):
    with pytest.raises(UsageError, match=f"polish {rounds} is out of range; give 0 to 100 rounds"):
        GPTQ(polish=rounds)


@pytest.mark.parametrize(
    ("solver", "scheme"),
    [
        (GPTQ, Scheme(3, 16)),
        (partial(GPTQ, static_groups=False), Scheme(3, 16)),
        (partial(GPTQ, act_order=False), Scheme(4, -1, symmetric=False)),
        (OBQ, Scheme(2, 32)),
        (RTN, Scheme(3, 16)),
    ],
    ids=["gptq", "moving groups", "plain order", "obq", "rtn"],
)
def test_solvers_polish_what_they_found(solver, scheme):
    weight, hessian = correlated_layer(12, 64, 300, torch.float64, 0, spread=1)
    hessian.sums[5, :], hessian.sums[:, 5] = 0, 0
    plain, full = (
        made.solve(weight, made.prepare(hessian, "layer"), scheme, torch.float32) for made in (solver(polish=0), solver(polish=3))
    )
    objective = damped(hessian.matrix, DAMP)
    expected = polished(weight, objective, plain.weight, 3)
    assert torch.equal(full.weight.codes, expected.codes)
    torch.testing.assert_close(full.weight.scale, expected.scale, rtol=1e-6, atol=0)
    assert (full.weight.g_idx is None) == (plain.weight.g_idx is None)
    assert total(weight, objective, full.weight) < 0.98 * total(weight, objective, plain.weight)
    assert (full.notes.damp, full.notes.never_activated, full.notes.zero_groups) == (DAMP, 1, 0)


def test_rounding_needs_statistics_only_to_be_polished():
    assert PerMatrix(RTN(polish=1)).needs.hessian
    assert not PerMatrix(RTN()).needs.hessian
    for solver in (RTN, GPTQ, OBQ):
        with pytest.raises(UsageError, match="polish -1 is out of range"):
            solver(polish=-1)


@pytest.mark.parametrize("solver", [GPTQ, OBQ, RTN])
def test_memory_of_polishing_is_told(solver):
    told = [solver(polish=rounds).workspace_bytes(4096, 4096) for rounds in (0, 1, 3)]
    assert told[0] < told[1] == told[2]
    assert told[1] - told[0] < 3 * 4 * 4096**2 + refine.polish_bytes(4096, 4096)


def test_polishing_stays_within_the_memory_that_is_told():
    weight, hessian = layer(torch.float32, out=256, columns=512)
    start = rounded(weight, Scheme(3, 32), torch.float32)
    most = largest_allocation(lambda: polished(weight, hessian, start, 1))
    told = refine.polish_bytes(*weight.shape, Scheme(3, 32), moving=False)
    assert 0.5 * told < most <= told
    told = refine.polish_bytes(*weight.shape)
    moving = in_moving_groups(weight, Scheme(3, 32), torch.float32)
    assert largest_allocation(lambda: polished(weight, hessian, moving, 1)) <= told


def largest_allocation(work):
    """Most bytes of tensors alive at once that ``work`` has allocated, as torch's profiler saw them come and go."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    alive = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most

"""OBQ against a brute-force greedy search in float64 that inverts what is left of the Hessian at every step."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from layers import correlated_layer
from textbook import textbook_codes, textbook_grid, textbook_values
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptqcli
import ptqcli.solvers.obq as obq
from ptqcli.calibration.builtin import documents
from ptqcli.calibration.statistics import Hessian
from ptqcli.errors import PTQError, UsageError
from ptqcli.numerics.elements import Codebook
from ptqcli.numerics.ranges import Clipped
from ptqcli.numerics.scheme import ActivationScheme, Scheme
from ptqcli.solvers.rtn import RTN

OBQ = partial(obq.OBQ, polish=0)  # what the greedy order alone finds

DEMO = Path(ptqcli.__file__).parent / "demo"


def layer(out=6, columns=16, tokens=40, dtype=torch.float64, seed=0):
    return correlated_layer(out, columns, tokens, dtype, seed, spread=0.5)


def solve(solver, weight, hessian, scheme, **arguments):
    return solver.solve(weight, solver.prepare(hessian, "layer"), scheme, torch.float32, **arguments)


def brute_force(weight, hessian, scheme, damp=0.01, search="mse", levels=None):
    """Codes [out, in] of the paper's greedy search, weights beyond their grid first; every inverse is taken anew."""
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    width = scheme.columns_per_group(weight.shape[1])
    scale, zero = torch.empty_like(weight), torch.empty_like(weight)
    for start in range(0, weight.shape[1], width):
        if scheme.group_size == 0:
            grid = textbook_grid(weight.reshape(1, -1), scheme, torch.float32, search, levels)
        else:
            grid = textbook_grid(weight[:, start : start + width], scheme, torch.float32, search, levels)
        scale[:, start : start + width], zero[:, start : start + width] = grid[0][:, None], grid[1][:, None]
    return torch.stack([_greedy(*row, hessian, scheme, levels) for row in zip(weight, scale, zero, strict=True)]).to(torch.uint8)


def _greedy(weight, scale, zero, hessian, scheme, levels):
    half_step = 0.5 if levels is None else max(b - a for a, b in pairwise(levels)) / 2
    weight, codes = weight.clone(), torch.zeros_like(weight)
    left = list(range(len(weight)))
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        nearest = textbook_codes(weight, scale, zero, scheme, levels)
        error = textbook_values(nearest, scale, zero, levels) - weight
        beyond = {column: abs(float(error[column] / scale[column])) for column in left}
        chosen = max(left, key=beyond.__getitem__)
        if beyond[chosen] <= half_step + 1e-12:
            chosen = min(left, key=lambda column: float(error[column] ** 2 / inverse[left.index(column), left.index(column)]))
        place = left.index(chosen)
        codes[chosen] = nearest[chosen]
        weight[left] += error[chosen] / inverse[place, place] * inverse[:, place]
        left.remove(chosen)
    return codes


CASES = [Scheme(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (4, 8, -1) for symmetric in (True, False)]
CASES += [Scheme(8, 0, activations=ActivationScheme())]


@pytest.mark.parametrize("scheme", CASES, ids=str)
@pytest.mark.parametrize("block", [pytest.param(1, marks=pytest.mark.slow), 5, 64])
def test_codes_equal_the_brute_force_search(scheme, block, monkeypatch):
    monkeypatch.setattr(obq, "BLOCK", block)
    for seed in range(4):
        for search in ("minmax", "mse"):
            weight, hessian = layer(out=4, columns=(16, 8)[seed % 2], seed=seed)
            ours = solve(OBQ(scale_search=search), weight, hessian, scheme).weight
            truth = brute_force(weight, hessian.matrix, scheme, search=search)
            assert torch.equal(ours.codes, truth)
            truth[1, 3] ^= 1
            assert not torch.equal(ours.codes, truth)


FP4 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Float4(Scheme):
    element = Codebook(FP4)


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("group", [4, -1])
def test_codes_of_a_codebook_equal_the_brute_force_search(group, search):
    for seed in range(4):
        weight, hessian = layer(out=4, seed=seed)
        scheme = Float4(4, group)
        ours = solve(OBQ(scale_search=search), weight, hessian, scheme).weight
        assert torch.equal(ours.codes, brute_force(weight, hessian.matrix, scheme, search=search, levels=FP4))


@pytest.mark.parametrize("signed, share", [(False, 0.6), (True, 0.8)])
def test_the_greedy_order_is_not_plain_rounding(signed, share):
    """A signed grid serves rounding, which loses nearly twice as much without it, more than it serves the greedy order."""
    weight, hessian = layer(out=64)
    solved = [solve(solver("minmax", signed), weight, hessian, Scheme(3, 8)).weight for solver in (partial(OBQ, 0.01), RTN)]
    errors = [hessian.output_energy(weight - codes.dequantize(torch.float64)) for codes in solved]
    assert errors[0] < share * errors[1]


@pytest.mark.parametrize("workspace", [0, 100_000])
def test_rows_in_small_batches_get_the_same_codes(workspace, monkeypatch):
    weight, hessian = layer(out=24, columns=96, tokens=300)
    whole = solve(OBQ(), weight, hessian, Scheme(3, 32)).weight.codes
    monkeypatch.setattr(obq, "WORKSPACE", workspace)
    assert torch.equal(solve(OBQ(), weight, hessian, Scheme(3, 32)).weight.codes, whole)


def test_progress_rises_to_the_number_of_weights(monkeypatch):
    monkeypatch.setattr(obq, "WORKSPACE", 0)
    monkeypatch.setattr(obq, "BLOCK", 10)
    weight, hessian = layer(out=3, columns=32)
    seen = []
    solve(OBQ(), weight, hessian, Scheme(4, -1), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(row * 32 + done, 96) for row in range(3) for done in range(1, 33)]


@pytest.mark.parametrize("damp", [0.01, 0.0])
def test_a_column_never_activated_is_rounded_to_nearest_and_counted(damp):
    weight, hessian = layer(tokens=100)
    hessian.sums[:, 5] = 0
    hessian.sums[5, :] = 0
    solution = solve(OBQ(damp=damp), weight, hessian, Scheme(4, -1))
    assert torch.equal(solution.weight.codes[:, 5], solve(RTN("minmax"), weight, None, Scheme(4, -1)).weight.codes[:, 5])
    assert solution.notes.never_activated == 1
    assert not solution.notes.damp_raised


def test_damping_is_raised_and_reported_when_the_hessian_is_not_positive_definite():
    weight, hessian = layer(tokens=5)
    hessian.sums -= 0.002 * hessian.matrix.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    solution = solve(OBQ(damp=0.0), weight, hessian, Scheme(4, 8))
    assert solution.notes.damp_raised
    assert solution.notes.damp == pytest.approx(0.01)
    assert torch.equal(solution.weight.codes, brute_force(weight, hessian.matrix, Scheme(4, 8), search="minmax"))


def test_a_hopeless_hessian_and_wrong_options_are_refused():
    weight, hessian = layer()
    with pytest.raises(UsageError, match="does not divide"):
        solve(OBQ(), weight, hessian, Scheme(4, 5))
    with pytest.raises(UsageError, match="damp"):
        OBQ(damp=-1)
    hessian.sums = -hessian.sums
    with pytest.raises(PTQError, match="layer"):
        solve(OBQ(), weight, hessian, Scheme(4, 8))


def test_zero_groups_give_zeros_and_are_counted():
    weight, hessian = layer()
    weight[2] = 0
    weight[4, 8:] = 0
    solution = solve(OBQ(), weight, hessian, Scheme(4, 8))
    assert solution.notes.zero_groups == 3
    values = solution.weight.dequantize()
    assert torch.isfinite(values).all()
    assert (values[2] == 0).all()


def test_no_grid_reaches_beyond_its_limit():
    weight, hessian = layer()
    scheme = Scheme(4, 8)
    limit = weight.abs().reshape(6, 2, 8).amax(dim=2) * torch.tensor([0.7, 2.0], dtype=torch.float64)
    scale = solve(OBQ(), weight, hessian, scheme, ranges=Clipped(limit)).weight.scale.double()
    unlimited = solve(OBQ(scale_search="minmax"), weight, hessian, scheme).weight.scale.double()
    assert torch.allclose(scale[:, 0], 0.7 * unlimited[:, 0], rtol=1e-6)
    assert torch.equal(scale[:, 1], unlimited[:, 1])


def test_the_workspace_holds_what_one_batch_allocates():
    rows = obq._rows_at_once(4096, 4)
    assert rows > 1
    assert OBQ().workspace_bytes(4096, 4096) <= obq.WORKSPACE + 3.5 * 4096**2 * 4
    assert OBQ().workspace_bytes(8, 64) < 1e6


@pytest.fixture(scope="module")
def demo_layer():
    """The first query projection of the demo model and its Hessian, float64, over a part of the built-in calibration text."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(DEMO)("\n".join(documents("calibration")[:20]))["input_ids"][: 16 * 512]
    linear = model.model.layers[0].self_attn.q_proj
    hessian = Hessian.zeros(256, torch.device("cpu"), torch.float64)
    linear.register_forward_pre_hook(lambda _, inputs: hessian.add(inputs[0]))
    with torch.no_grad():
        model(torch.tensor(ids).reshape(-1, 512))
    return linear.weight.detach().double(), hessian


def test_on_the_demo_model_the_error_is_far_below_rounding_and_float32_agrees_with_float64(demo_layer):
    weight, hessian = demo_layer
    scheme = Scheme(4, 128)
    single = Hessian(hessian.matrix.float())
    errors = {
        "rtn": solve(RTN("mse"), weight, None, scheme),
        "float64": solve(OBQ(), weight, hessian, scheme),
        "float32": solve(OBQ(), weight.float(), single, scheme),
    }
    errors = {name: hessian.output_energy(weight - solution.weight.dequantize(torch.float64)) for name, solution in errors.items()}
    assert errors["float64"] < 0.4 * errors["rtn"]
    assert errors["float32"] == pytest.approx(errors["float64"], rel=0.01)

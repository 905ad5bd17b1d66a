"""The original's output as the target: W* against float64 least squares on the tokens themselves, the paired walk against hooks on two
whole models, and the shares against a search over all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, write_text
from torch import Tensor
from transformers import AutoModelForCausalLM

from ptqcli.calibration.paired import is_held_out
from ptqcli.calibration.statistics import InputStatistics, Pairs, StatisticsRequest
from ptqcli.errors import UsageError
from ptqcli.numerics.scheme import Scheme
from ptqcli.pipeline import texts
from ptqcli.pipeline.pipeline import quantize
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources
from ptqcli.runtime import load_quantized
from ptqcli.solvers import LinearTask, Stage, ignore_progress
from ptqcli.solvers.damping import Damped, factorise
from ptqcli.solvers.gptq import GPTQ
from ptqcli.solvers.per_matrix import StageWork
from ptqcli.solvers.target import Aim, Factors, Moments, aim_at

OUT, IN, TOKENS, WINDOWS = 12, 16, 20, 16


class Seen:
    """Random inputs x of a linear in the quantized model, f in the original, drift d, in windows; the linear writes with factor 0.5."""

    def __init__(self, seed: int = 0, offset: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        mix = draw(IN, IN)
        self.f = draw(WINDOWS * TOKENS, IN) @ mix + offset
        self.x = self.f + 0.3 * draw(WINDOWS * TOKENS, IN) @ mix + 0.1 * offset
        self.d = (self.f - self.x) @ draw(IN, OUT) * 0.2 + 0.5 * draw(WINDOWS * TOKENS, OUT)
        self.weight, self.bias = draw(OUT, IN), draw(OUT)
        self.held = torch.tensor([is_held_out(window, WINDOWS) for window in range(WINDOWS)]).repeat_interleave(TOKENS)

    def statistics(self, writes: bool = True) -> InputStatistics:
        needs = StatisticsRequest(hessian=True, sums=True, pairs=True, original=True)
        statistics = InputStatistics.empty(IN, needs, len(self.x), torch.device("cpu"))
        statistics.pairs = Pairs.empty(IN, OUT if writes else None, torch.device("cpu"))
        for part in torch.arange(len(self.x)).split(3 * TOKENS):
            statistics.add(self.x[part].float())
            drift = self.d[part].float() if writes else None
            statistics.pairs.add(self.x[part].float(), self.f[part].float(), drift, self.held[part])
        return statistics

    def moments(self, writes: bool = True) -> tuple[Moments, Moments]:
        seen = self.statistics(writes)
        factor = 0.5 if writes else None
        held = seen.pairs.held
        return Moments.of(seen.hessian, seen.sums, seen.pairs, factor), Moments.of(held.hessian, held.sums, held.pairs, factor)

    def wanted(self, writes: bool, alpha: float = 1, beta: float = 1) -> Tensor:
        """[tokens, out]: what the linear is to give."""
        given = (self.x + alpha * (self.f - self.x)) @ self.weight.t()
        return given + beta * self.d / 0.5 if writes else given


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.4, 0.0), (0.1, 0.7)])
def test_without_damping_it_is_the_least_squares_solution(writes: bool, centred: bool, alpha: float, beta: float) -> None:
    seen = Seen(offset=2.0)
    moments, held = seen.moments(writes)
    found = aim_at(seen.weight.float(), moments, held, Aim(alpha, beta, 0.0), "here", centred)
    x, wanted = seen.x, seen.wanted(writes, alpha, beta)
    if centred:
        x, wanted = x - x.mean(0), wanted - wanted.mean(0)
    expected = torch.linalg.lstsq(x, wanted).solution.t()
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-4, atol=1e-4)
    assert (found.weight.double() - seen.weight).abs().max() > 0.01, "the target has to move the weight"


def test_damping_draws_it_back_as_a_ridge_does() -> None:
    seen = Seen()
    moments, held = seen.moments()
    found = aim_at(seen.weight.float(), moments, held, Aim(1.0, 1.0, 0.3), "here", centred=False)
    ridge = 0.3 * float((seen.x**2).sum(0).mean())
    rows = torch.cat([seen.x, ridge**0.5 * torch.eye(IN, dtype=torch.float64)])
    wanted = torch.cat([seen.wanted(True), ridge**0.5 * seen.weight.t()])
    torch.testing.assert_close(found.weight.double(), torch.linalg.lstsq(rows, wanted).solution.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_the_shares_are_the_best_of_all_on_the_held_out_tokens(writes: bool, seed: int) -> None:
    seen = Seen(seed)
    moments, held = seen.moments(writes)
    others = ~seen.held
    found = aim_at(seen.weight.float(), moments, held, Aim(None, None, 0.05), "here", centred=False)

    def error(alpha: float, beta: float) -> float:
        """On held-out tokens, with W* of the others."""
        x = seen.x[others]
        ridge = 0.05 * float((x**2).sum(0).mean())
        damped = x.t() @ x + ridge * torch.eye(IN, dtype=torch.float64)
        A = torch.linalg.solve(damped, ((seen.f[others] - x) @ seen.weight.t()).t().matmul(x).t()).t()
        B = torch.linalg.solve(damped, (seen.d[others] / 0.5).t().matmul(x).t()).t() if writes else 0
        return float((seen.wanted(writes)[seen.held] - seen.x[seen.held] @ (seen.weight + alpha * A + beta * B).t()).square().sum())

    steps = [step / 20 for step in range(21)]
    best = min(error(alpha, beta) for alpha in steps for beta in (steps if writes else [0]))
    assert error(found.alpha, found.beta or 0) <= best * (1 + 1e-5)
    assert (found.beta is None) == (not writes)
    assert best < 0.99 * error(0, 0), "there has to be something to gain"


@pytest.mark.parametrize(("keep", "factored"), [(True, 4), (False, 8)])
def test_linears_of_one_stage_share_the_factors(keep: bool, factored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, calls = Seen(offset=2.0), []
    moments, held = seen.moments()
    weights = [seen.weight.float(), 3 * seen.weight.float()]
    aim = Aim(None, None, 0.01)
    alone = [aim_at(weight, moments, held, aim, "here", centred) for centred in (True, False) for weight in weights]

    def counted(hessian: Tensor, damp: float, where: str) -> Damped:
        calls.append(where)
        return factorise(hessian, damp, where)

    monkeypatch.setattr("ptqcli.solvers.target.factorise", counted)
    factors = Factors(keep)
    found = [aim_at(weight, moments, held, aim, "here", centred, factors) for centred in (True, False) for weight in weights]
    assert len(calls) == factored
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(found, alone, strict=True))


def test_noise_is_not_made_up_for() -> None:
    """Inputs that differ by nothing that the linear's inputs tell of: the shares stay small."""
    seen = Seen()
    generator = torch.Generator().manual_seed(5)
    seen.d = torch.randn(seen.d.shape, generator=generator, dtype=torch.float64)
    moments, held = seen.moments()
    assert aim_at(seen.weight.float(), moments, held, Aim(None, None, 0.01), "here", centred=False).beta < 0.3


def test_a_single_window_chooses_nothing() -> None:
    seen = Seen()
    with pytest.raises(UsageError, match=r"here: alpha and beta are chosen on held-out windows, and there is one window; give more"):
        aim_at(seen.weight.float(), seen.moments()[0], None, Aim(None, 1.0, 0.01), "here", centred=False)


def test_which_windows_are_held_out() -> None:
    assert [window for window in range(24) if is_held_out(window, 24)] == [7, 15, 23]
    assert [window for window in range(3) if is_held_out(window, 3)] == [2]
    assert not is_held_out(0, 1)


@pytest.mark.parametrize("target", ["quantized", "original"])
def test_a_corrected_bias_is_the_best_one(target: str) -> None:
    """Whatever the codes: no other bias leaves less of the output error."""
    seen = Seen(offset=3.0)
    shares = {"alpha": 0.8, "beta": 0.6} if target == "original" else {}
    solver = GPTQ(target=target, **shares)
    task = LinearTask(
        name="linear",
        weight=seen.weight.float(),
        scheme=Scheme(3, 8),
        scale_dtype=torch.float32,
        bias=seen.bias.float(),
        writes=0.5,
    )
    solution = StageWork(solver, Stage((task,), seen.statistics())).solve(task, ignore_progress)
    wanted = seen.wanted(True, **shares) if shares else seen.x @ seen.weight.t()
    given = seen.x @ solution.weight.dequantize(torch.float32).double().t()
    torch.testing.assert_close(solution.bias.double(), seen.bias + (wanted - given).mean(0), rtol=1e-4, atol=1e-4)
    assert solution.notes.bias_corrected
    plain = StageWork(GPTQ(target=target, **shares, correct_bias=False), Stage((task,), seen.statistics())).solve(task, ignore_progress)
    assert plain.bias is None

    def error(found: Any, bias: Tensor) -> float:
        return float((wanted + seen.bias - seen.x @ found.weight.dequantize(torch.float32).double().t() - bias).square().sum())

    assert error(solution, solution.bias.double()) < 0.98 * error(plain, seen.bias)


# The walk


def inputs_of(model: Any, ids: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What the modules of a whole model receive, float64 [tokens, in]; "stream LAYER" is what comes before a block."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, kwargs, name=name: seen.setdefault(name, []).append(
                (args[0] if args else kwargs["hidden_states"]).double()
            ),
            with_kwargs=True,
        )
        for name in names
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double().flatten(0, -2) for name, parts in seen.items()}


@pytest.mark.parametrize("budget", [2**32, 0], ids=["suspended", "repeated"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon"])
def test_pairs_are_what_two_whole_models_show(architecture: str, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every statistic of the second block, taken while the run goes on, against hooks on the original and on the finished checkpoint."""
    make_model(tmp_path / "model", architecture)
    text = write_text(tmp_path / "text.txt")
    recipe = load_recipe(
        flags={"algo": "gptq", "wbits": 2, "group_size": 16, "target": "original", "calib": str(text), "nsamples": 9, "seqlen": 24}
    )
    kept: dict[str, InputStatistics] = {}
    windows: list[Tensor] = []
    solve = StageWork.solve

    def noting(self: StageWork, task: LinearTask, tell: Any) -> Any:
        kept[task.name] = self.statistics
        return solve(self, task, tell)

    monkeypatch.setattr(StageWork, "solve", noting)

    make = texts.calibration_windows
    monkeypatch.setattr(texts, "calibration_windows", lambda *args, **rest: windows.append(make(*args, **rest)) or windows[0])
    report = quantize(tmp_path / "model", recipe, tmp_path / "out", resources=Resources(batch_size=4, activation_budget=budget))
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    quantized = load_quantized(tmp_path / "out", kernel="reference")
    writers = {"llama": ("self_attn.o_proj", "mlp.down_proj"), "gpt2": ("attn.c_proj", "mlp.c_proj")}.get(
        architecture, ("self_attention.dense", "mlp.dense_4h_to_h")
    )
    for layer in report.layers:
        name, seen = layer.name, kept[layer.name]
        local = name.split(".", 3)[3]
        blocks = name[: -len(local) - 1]
        f, x = (inputs_of(model, windows[0], [name])[name] for model in (original, quantized))
        torch.testing.assert_close(seen.pairs.cross.double(), f.t() @ x, rtol=1e-3, atol=1e-3 * float((f.t() @ x).abs().max()))
        held = torch.tensor([is_held_out(window, 9) for window in range(9)]).repeat_interleave(24)
        torch.testing.assert_close(seen.pairs.held.hessian.matrix.double(), x[held].t() @ x[held], rtol=1e-3, atol=1e-2)
        assert (seen.pairs.drift is not None) == (local in writers)
        assert (layer.beta is not None) == (local in writers)
        assert 0 <= layer.alpha <= 1
        if seen.pairs.drift is None:
            continue
        drift = inputs_of(original, windows[0], [blocks])[blocks] - inputs_of(quantized, windows[0], [blocks])[blocks]
        if local == writers[1]:
            first = f"{blocks}.{writers[0]}"
            drift = drift + outputs(original, windows[0], first) - outputs(quantized, windows[0], first)
        expected = drift.t() @ x
        torch.testing.assert_close(seen.pairs.drift.double(), expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def outputs(model: Any, ids: Tensor, name: str) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _module, _args, output: seen.append(output.double()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0].flatten(0, -2)

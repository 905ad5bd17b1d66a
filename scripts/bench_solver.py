"""Time our GPTQ solve against the textbook form, on one weight and one Hessian in one run.

    python scripts/bench_solver.py --size 4096 --bits 4 --group-size 128

The textbook form is the one published with the paper (Frantar et al. 2022, Algorithm 1): Cholesky factor of the
damped Hessian, its inverse, the upper Cholesky factor of the inverse, then blocks of 128 columns with a rank-one
update after each column and one product after each block; all in float32. It differs from the original code in
one line: a group that starts inside a block is fitted on weights that hold that block's error feedback, as ours
are, since otherwise the two would solve different problems.

Both run once to warm up, then take turns. Their codes are then judged in float64: given the codes before it,
each code must be the nearest one up to what float32 can tell apart. Two sets of codes that pass are equal up to
rounding ties, and what follows from a tie: the columns after it see another error. With ``--polish ROUNDS``, polishing what our solve
found is timed, too, and what it leaves of the squared output error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ptqcli.calibration.statistics import Hessian
from ptqcli.numerics.grids import Grid
from ptqcli.numerics.ranges import MinMax
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.solvers.gptq import GPTQ
from ptqcli.solvers.refine import polished

if TYPE_CHECKING:
    from collections.abc import Iterator

TEXTBOOK_BLOCK = 128
SCALE_DTYPE = torch.bfloat16

# What each torch operation of our solve is there for; everything else is rounding.
OUR_STEPS = {
    "linalg_cholesky_ex": "Cholesky",
    "addmm_": "products between blocks",
    "addmv_": "feedback inside a block",
    "linalg_solve_triangular": "weights left for a group",
}


@dataclass(frozen=True)
class Problem:
    """weight: float32 [out, in]. hessian: float32 [in, in], not damped. damp: share of the mean diagonal."""

    weight: Tensor
    hessian: Tensor
    scheme: Scheme
    damp: float
    act_order: bool
    polish: int


@dataclass(frozen=True)
class Comparison:
    """seconds: median. shares: of the time, by step. excess: code steps by which the worst code misses the nearest one."""

    our_seconds: float
    textbook_seconds: float
    speedup: float
    our_shares: dict[str, float]
    textbook_shares: dict[str, float]
    differing_codes: float
    differing_scales: float
    our_excess: float
    textbook_excess: float
    error_ratio: float
    polish_seconds: float
    polish_error_ratio: float


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        comparison = compare(make_problem(options), options.repeats)
    if options.json:
        print(json.dumps({"options": vars(options), **asdict(comparison)}, indent=2))
    else:
        show(comparison, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="input features")
    parser.add_argument("--rows", type=int, help="output features (default: as many as input features)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asym", action="store_true", help="with zero points")
    parser.add_argument("--act-order", action="store_true", help="in both, with groups fixed beforehand")
    parser.add_argument("--polish", type=int, default=0, metavar="ROUNDS", help="also polish our solution")
    parser.add_argument("--damp", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each; the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.rows = options.rows or options.size
    if options.group_size % TEXTBOOK_BLOCK and TEXTBOOK_BLOCK % options.group_size:
        parser.error(f"--group-size must divide {TEXTBOOK_BLOCK} or be a multiple of it: the textbook form's blocks")
    return parser.parse_args(namespace=options)


def make_problem(options: argparse.Namespace) -> Problem:
    """A weight and the second moment of inputs like a trained model's.

    Their variance falls as a power of the direction's rank, and a few channels are far larger than the others.
    """
    generator = torch.Generator().manual_seed(options.seed)
    size, tokens = options.size, 2 * options.size
    spectrum = torch.arange(1, size + 1).pow(-0.5)
    mixing = torch.randn(size, size, generator=generator) * spectrum.unsqueeze(1)  # [directions, channels]
    inputs = torch.randn(tokens, size, generator=generator) @ mixing  # [tokens, channels]
    inputs[:, torch.randperm(size, generator=generator)[: max(1, size // 256)]] *= 10
    return Problem(
        weight=0.02 * torch.randn(options.rows, size, generator=generator),
        hessian=inputs.t() @ inputs,
        scheme=Scheme(options.bits, options.group_size, not options.asym),
        damp=options.damp,
        act_order=options.act_order,
        polish=options.polish,
    )


def compare(problem: Problem, repeats: int) -> Comparison:
    """Time both, alternating, and judge what they return."""
    watch = Stopwatch()
    forms: dict[str, Callable[[], QuantizedWeight]] = {
        "ours": lambda: our_solve(problem),
        "textbook": lambda: textbook_solve(problem, watch),
    }
    found = {name: solve() for name, solve in forms.items()}
    watch.seconds.clear()
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, solve in forms.items():
            start = time.perf_counter()
            solve()
            times[name].append(time.perf_counter() - start)
    ours, textbook = found["ours"], found["textbook"]
    our_seconds, textbook_seconds = (statistics.median(times[name]) for name in ("ours", "textbook"))
    judge = Judge(problem)
    start = time.perf_counter()
    better = polish(problem, ours)
    polish_seconds = time.perf_counter() - start
    return Comparison(
        our_seconds=our_seconds,
        textbook_seconds=textbook_seconds,
        speedup=textbook_seconds / our_seconds,
        our_shares=our_shares(problem),
        textbook_shares=as_shares(watch.seconds),
        differing_codes=share_differing(ours.codes, textbook.codes),
        differing_scales=share_differing(ours.scale, textbook.scale),
        our_excess=judge.excess(ours),
        textbook_excess=judge.excess(textbook),
        error_ratio=judge.error(ours) / judge.error(textbook),
        polish_seconds=polish_seconds,
        polish_error_ratio=judge.error(better) / judge.error(ours),
    )


def our_solve(problem: Problem) -> QuantizedWeight:
    solver = GPTQ(damp=problem.damp, act_order=problem.act_order, scale_search="minmax", polish=0)
    prepared = solver.prepare(Hessian(problem.hessian), "benchmark")
    return solver.solve(problem.weight, prepared, problem.scheme, SCALE_DTYPE).weight


def polish(problem: Problem, found: QuantizedWeight) -> QuantizedWeight:
    hessian = problem.hessian.clone()
    hessian.diagonal().add_(problem.damp * hessian.diagonal().mean())
    return polished(problem.weight, hessian, found, problem.polish)


def our_shares(problem: Problem) -> dict[str, float]:
    """Share of each step of our solve, from one more run in which every torch operation is timed."""
    with OperationTimes() as times:
        our_solve(problem)
    return as_shares(times.seconds)


class OperationTimes(TorchDispatchMode):
    """Seconds by the step that an operation belongs to; the Python between operations is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        start = time.perf_counter()
        result = operation(*args, **(kwargs or {}))
        step = OUR_STEPS.get(operation.overloadpacket.__name__, "rounding and the rest")
        self.seconds[step] += time.perf_counter() - start
        return result


def textbook_solve(problem: Problem, watch: Stopwatch) -> QuantizedWeight:
    """The published form, float32. ``watch`` collects the time of its steps."""
    scheme, columns = problem.scheme, problem.weight.shape[1]
    width = scheme.columns_per_group(columns)
    weight = problem.weight.clone()  # [out, in]
    hessian = problem.hessian.clone()
    hessian.diagonal().add_(problem.damp * hessian.diagonal().mean())
    order = processing_order(problem)
    grids: list[Grid] = []
    if problem.act_order:
        grids = [MinMax().fit(group, scheme, SCALE_DTYPE) for group in weight.split(width, dim=1)]
        weight, hessian = weight[:, order], hessian[order][:, order]
    group_of = (order // width).tolist()

    with watch.step("Cholesky"):
        factor = torch.linalg.cholesky(hessian)
    with watch.step("inverse"):
        factor = torch.cholesky_inverse(factor)
    with watch.step("Cholesky of the inverse"):
        factor = torch.linalg.cholesky(factor, upper=True)  # U: H^-1 = U^T U

    codes = torch.empty_like(weight)
    for low in range(0, columns, TEXTBOOK_BLOCK):
        high = min(low + TEXTBOOK_BLOCK, columns)
        with watch.step("columns of a block"):
            block = weight[:, low:high].clone()
            triangle = factor[low:high, low:high]
            errors = torch.empty_like(block)
            for i, column in enumerate(range(low, high)):
                if not problem.act_order and column % width == 0:
                    ahead = torch.cat([block[:, i:], weight[:, high : column + width]], dim=1)[:, :width]
                    grids.append(MinMax().fit(ahead, scheme, SCALE_DTYPE))
                grid = grids[group_of[column]]
                code = grid.nearest(block[:, i : i + 1])  # [out, 1]
                error = (block[:, i : i + 1] - grid.decode(code)) / triangle[i, i]
                block[:, i:] -= error @ triangle[i : i + 1, i:]
                errors[:, i : i + 1] = error
                codes[:, column : column + 1] = code
        with watch.step("product after a block"):
            weight[:, high:] -= errors @ factor[low:high, high:]

    return QuantizedWeight(
        codes=codes[:, torch.argsort(order)].to(torch.uint8),
        scale=torch.cat([grid.scale for grid in grids], dim=1).to(SCALE_DTYPE),
        zero=torch.cat([grid.zero for grid in grids], dim=1).to(torch.uint8),
        scheme=scheme,
    )


def processing_order(problem: Problem) -> Tensor:
    """Column of each step."""
    if problem.act_order:
        return torch.argsort(problem.hessian.diagonal(), descending=True, stable=True)
    return torch.arange(problem.hessian.shape[0])


class Stopwatch:
    """Seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


class Judge:
    """GPTQ's own rule for codes already chosen, in float64.

    With ``U`` as above and ``W'`` the weights that the codes stand for, the scaled errors of the recursion are
    ``E = (W - W') U^-1``, and column ``j`` held ``w'_j + e_j U_jj`` when it was rounded. ``U^-1`` is the upper
    triangular factor of the damped Hessian itself, ``H = U^-1 U^-T``, so nothing is inverted here.
    """

    def __init__(self, problem: Problem) -> None:
        self.weight = problem.weight.double()
        self.hessian = problem.hessian.double()
        self.order = processing_order(problem)
        damped = self.hessian.clone()
        damped.diagonal().add_(problem.damp * damped.diagonal().mean())
        backwards = self.order.flip(0)
        self.inverse_factor = torch.linalg.cholesky(damped[backwards][:, backwards]).flip(0, 1)  # U^-1

    def excess(self, quantized: QuantizedWeight) -> float:
        """Code steps by which the worst code lies farther from its value than the nearest code does."""
        read_back = quantized.dequantize(torch.float64)
        errors = (self.weight - read_back)[:, self.order] @ self.inverse_factor / self.inverse_factor.diagonal()
        index = torch.arange(read_back.shape[1]) // (read_back.shape[1] // quantized.scale.shape[1])
        scale, zero = quantized.scale.double()[:, index], quantized.zero.double()[:, index]
        value = (read_back + errors[:, torch.argsort(self.order)]) / scale + zero
        nearest = value.round().clamp_(0, quantized.scheme.levels - 1)
        return float(((quantized.codes - value).abs() - (nearest - value).abs()).max())

    def error(self, quantized: QuantizedWeight) -> float:
        """Squared output error on the calibration inputs, ``tr((W - W') H (W - W')^T)``."""
        difference = self.weight - quantized.dequantize(torch.float64)
        return float(((difference @ self.hessian) * difference).sum())


def share_differing(one: Tensor, other: Tensor) -> float:
    return float((one != other).double().mean())


def as_shares(seconds: dict[str, float]) -> dict[str, float]:
    """Shares of the sum, the largest first."""
    total = sum(seconds.values())
    return {name: seconds[name] / total for name in sorted(seconds, key=seconds.__getitem__, reverse=True)}


def show(comparison: Comparison, options: argparse.Namespace) -> None:
    scheme = Scheme(options.bits, options.group_size, not options.asym)
    table = Table(title=f"GPTQ solve, {options.rows} x {options.size}, {scheme}, {options.threads} threads")
    for heading in ("form", "seconds", "share of its steps"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for name, seconds, shares in (
        ("textbook", comparison.textbook_seconds, comparison.textbook_shares),
        ("ours", comparison.our_seconds, comparison.our_shares),
    ):
        steps = "\n".join(f"{share:6.1%}  {step}" for step, share in shares.items())
        table.add_row(name, f"{seconds:.2f}", steps, end_section=True)
    console = Console()
    console.print(table)
    console.print(f"ours is {comparison.speedup:.2f} times as fast")
    console.print(
        f"codes that differ: {comparison.differing_codes:.3%}, scales: {comparison.differing_scales:.3%}; "
        f"farthest from the nearest code, in code steps: ours {comparison.our_excess:.1e}, "
        f"textbook {comparison.textbook_excess:.1e}"
    )
    console.print(f"squared output error, ours / textbook: {comparison.error_ratio:.6f}")
    if options.polish:
        times = comparison.polish_seconds / comparison.our_seconds
        console.print(
            f"{options.polish} rounds of polishing: {comparison.polish_seconds:.2f} s, {times:.1f} times our solve; "
            f"squared output error, polished / not: {comparison.polish_error_ratio:.4f}"
        )


if __name__ == "__main__":
    main()

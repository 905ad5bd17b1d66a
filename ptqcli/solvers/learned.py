"""Learned rounding: the codes of a window of blocks, learned together so that the blocks give what they gave.

Rounding to nearest is best for each weight and not for the output. AdaRound (Nagel et al. 2020) therefore learns which way each weight is
rounded, BRECQ (Li et al. 2021) from the output of a whole block, and AutoRound, FlexRound and OmniQuant differ in little more than how
the rounded weights W' depend on what is learned, and in the optimizer. Each of those is a ``Rounding`` in a file of its own; this is what
they share. With X the original model's hidden states before the window and Y the quantized model's, both over all calibration tokens,

    minimise  |F(X; W) - F(Y; W')|^2

over all matrices of the window F at once: the targets are the original's, the inputs those that the quantized model will see. A step takes
``batch`` calibration windows; round() passes gradients as if it were the identity (Bengio et al. 2013, the straight-through estimator).

The published codes keep the iteration with the least loss on its own batch, which is as much the batch's merit. Here some calibration
windows are never learned from: the best iteration on those is kept, the start among them, so that on them the result is never worse.

A window of two blocks slides by one (CBQ, Ding et al. 2023, section 3.2): the first block is then final, the second is learned again with
the third, from where it stands. CBQ's loss and its low-rank rounding are left out.

Learning starts from rounding, or from the codes of a solver ("Anchor" below). Gradients of W' are summed over the batch first and then
taken through one matrix after the other, so that only one matrix at a time has a graph.
"""

from __future__ import annotations

import copy
import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ptqcli.calibration.statistics import InputStatistics, StatisticsRequest
from ptqcli.errors import PTQError, UsageError
from ptqcli.numerics.activations import static_scale
from ptqcli.numerics.elements import Int
from ptqcli.numerics.fake_quant import FakeQuantLinear
from ptqcli.numerics.ranges import MinMax, RangeSearch
from ptqcli.numerics.scheme import Scheme
from ptqcli.options import check_choices, option
from ptqcli.solvers import Batch, BlockSolver, BlockWork, CalibrationBatches, LinearTask, MatrixSolver, Solution, SolveNotes, Stage
from ptqcli.solvers.damping import check_damp, damp_option
from ptqcli.solvers.gptq import GPTQ
from ptqcli.solvers.obq import OBQ
from ptqcli.solvers.rounding import Rounding, Start, centred, zero_groups
from ptqcli.solvers.scale_search import signed_option

STARTS = ("rtn", "gptq", "obq")
# One calibration window in so many is held out, but not more than HELD_OUT.
HELD_OUT_SHARE, HELD_OUT = 8, 16
# How often the held-out windows are looked at in a run; the last iteration is among them.
LOOKS = 10


@dataclass(frozen=True, kw_only=True)
class BlockLearner(BlockSolver):
    """What the solvers that learn share, and its options.

    iters: steps for each window. lr: learning rate. batch_size: calibration windows in a step. learn_window: blocks learned together.
    learn_seed: of the order of the calibration windows. signed: as of the other solvers. None stands for what the method's paper has.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    shares: ClassVar[bool] = True
    iters: int | None = option(None, "steps of learning for each window of blocks; the paper's number where none is given")
    lr: float | None = option(None, "learning rate, where it is not to be the paper's")
    batch_size: int | None = option(None, "calibration windows in a step of learning; the paper's where none is given", flag="learn-batch")
    learn_window: int = option(1, "blocks learned together; of several, all but the first are learned again with the next", metavar="1|2")
    learn_seed: int = option(0, "seed of the order in which calibration windows are learned from")
    signed: bool = signed_option()

    def __post_init__(self) -> None:
        check_choices(self)
        for what, value in (("iters", self.iters), ("learn batch", self.batch_size), ("learn window", self.learn_window)):
            if value is not None and value < 1:
                raise UsageError(f"{what} {value} is not valid; give a whole number from 1 on")
        if self.lr is not None and not 0 < self.lr < 1e3:
            raise UsageError(f"lr {self.lr} is not valid; give a positive number below 1000")

    # What a method says

    @abstractmethod
    def rounding(self, start: Start) -> Rounding:
        """How a matrix is rounded, as a function of what is learned."""

    @abstractmethod
    def optimizer(self, rounding: Rounding, steps: int) -> torch.optim.Optimizer:
        """What learns its parameters, at the rates of the first of so many ``steps``."""

    @abstractmethod
    def steps(self, windows: int) -> int:
        """How many steps, on so many calibration windows."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """Calibration windows in a step."""

    def decay(self, share: float) -> float:
        """What the learning rates are multiplied by when that share of the steps is done."""
        return 1.0

    def loss(self, output: Tensor, target: Tensor, bits: int) -> Tensor:
        """Of the window's output [windows, tokens, features]. bits: of the narrowest matrix.

        Summed over features, so that gradients keep clear of the smallest numbers of 16-bit dtypes, and of Adam's epsilon.
        """
        return (output.float() - target.float()).square().sum(dim=-1).mean()

    def solver(self) -> MatrixSolver | None:
        """Whose codes it starts from, None for rounding."""
        return None

    # What the pipeline asks

    @property
    def needs(self) -> StatisticsRequest:
        """Both streams, and what the start needs."""
        return StatisticsRequest(original=True, samples=True, hessian=self.solver() is not None)

    @property
    def ranges(self) -> RangeSearch:
        """What transforms are to expect: full ranges, from which learning starts."""
        return MinMax(self.signed)

    @property
    def window(self) -> int:
        """Blocks learned together."""
        return self.learn_window

    @property
    def overlap(self) -> int:
        """All but the first come again."""
        return self.learn_window - 1

    def refusal(self, scheme: Scheme) -> str | None:
        """Outlier columns, which no published method learns around, and codes that are no integers with scales of their own."""
        if scheme.outliers is not None:
            return f"{self.name} does not learn beside outlier columns; give --outliers none, or choose gptq or rtn"
        if not isinstance(scheme.element, Int) or scheme.blocks is not None:
            return f"{self.name} learns the rounding of integers, not of scheme {scheme}; choose gptq or rtn"
        return None

    def notes(self, windows: int) -> list[str]:
        """That nothing is held out, where there is but one window."""
        if windows > 1:
            return []
        return [f"with one calibration window {self.name} can hold none out, and keeps its last iteration, good or bad"]

    def workspace_bytes(self, out_features: int, in_features: int, scheme: Scheme | None = None) -> int:
        """One matrix with its graph and its gradient, and what the start takes."""
        solver = self.solver()
        graph = 8 * out_features * in_features * 4
        return graph if solver is None else max(graph, solver.workspace_bytes(out_features, in_features, scheme) + in_features**2 * 4)

    def window_bytes(self, weights: int, features: int, tokens: int) -> int:
        """For each weight its value, offset, best offset, rounded value and gradient; what a batch's passes keep for the gradients."""
        return 5 * weights * 4 + 2 * features * tokens * 4

    # The work

    def solve(self, work: BlockWork) -> None:
        """Learn and place every linear of the window."""
        batches = work.batches()
        roundings = self._begin(work)
        if not roundings:
            return  # every linear of the window stays as it is
        student = Student(work, roundings)
        learning = _Learning(self, work, student, batches)
        with torch.enable_grad():
            learning.run()
        codes = {name: (rounding.quantized, rounding.start.notes) for name, rounding in roundings.items()}
        work.place_each([[name] for name in codes], lambda names: [Solution(codes[name][0](), codes[name][1]) for name in names])
        work.carried.clear()
        later = tuple(f"{path}." for path in work.paths[work.final :])
        work.carried.update({name: rounding for name, rounding in roundings.items() if name.startswith(later)} if later else {})

    def _begin(self, work: BlockWork) -> dict[str, Rounding]:
        """The matrices as they start, in running order; those carried over go on from where they stand."""
        roundings: dict[str, Rounding] = {}
        for stage in work.stages():
            shared = _Shared(self.solver(), self.signed, stage)
            for task in stage.linears:
                kept = work.carried.get(task.name)
                if kept is None:
                    start, solution = shared.start(task)
                    if solution is not None:
                        work.place(task.name, solution)  # later stages are to see it
                    kept = self.rounding(start)
                roundings[task.name] = kept
        return roundings


@dataclass(frozen=True, kw_only=True)
class SolverStart(BlockLearner):
    """A learner that can start from the codes of a solver. damp: of that solver."""

    start: str = option("rtn", "codes that learning starts from", choices=STARTS)
    damp: float = damp_option()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damp(self.damp)

    def solver(self) -> MatrixSolver | None:
        """See ``BlockLearner``."""
        return None if self.start == "rtn" else {"gptq": GPTQ, "obq": OBQ}[self.start](damp=self.damp, signed=self.signed)


class _Shared:
    """The starts of the linears of one stage, which share the solver's preparation."""

    def __init__(self, solver: MatrixSolver | None, signed: bool, stage: Stage) -> None:
        self.solver, self.signed, self.statistics = solver, signed, stage.statistics
        where = ", ".join(task.name for task in stage.linears)
        self.prepared = None if solver is None else solver.prepare(self._statistics.hessian, where)

    @property
    def _statistics(self) -> InputStatistics:
        assert self.statistics is not None
        return self.statistics

    def start(self, task: LinearTask) -> tuple[Start, Solution | None]:
        """Where a linear starts, and the solution that this is, None for rounding."""
        importance = self._statistics.sampled().square().mean(dim=0)
        notes = SolveNotes(never_activated=int((importance == 0).sum()), zero_groups=zero_groups(task.weight, task.scheme))
        scale = self._input_scale(task)
        plain = Start(task=task, weight=task.weight, importance=importance, notes=notes, signed=self.signed, input_scale=scale)
        if self.solver is None:
            return plain, None
        assert self._statistics.hessian is not None
        solution = self.solver.solve(task.weight, self.prepared, task.scheme, task.scale_dtype, task.ranges)
        weight = replace(solution.weight, input_scale=scale)
        target = centred(task.weight, weight, self._statistics.hessian.matrix, solution.notes.damp or 0.0)
        return replace(plain, weight=target, codes=weight, notes=solution.notes), replace(solution, weight=weight)

    def _input_scale(self, task: LinearTask) -> Tensor | None:
        if task.scheme.activations is None or task.scheme.activations.dynamic:
            return None
        assert self._statistics.largest is not None
        return static_scale(self._statistics.largest, task.scale_dtype)


class Student:
    """A copy of the window whose linears compute with what is learned.

    blocks: the copy. layers: its linears by their paths in the model, with the ``Rounding`` of each.
    """

    def __init__(self, work: BlockWork, roundings: dict[str, Rounding]) -> None:
        self.blocks = copy.deepcopy(work.module)
        self.layers: dict[str, tuple[FakeQuantLinear, Rounding]] = {}
        for name, rounding in roundings.items():
            place, path = next((place, path) for place, path in enumerate(work.paths) if name.startswith(path + "."))
            local = name[len(path) + 1 :]
            layer = _layer(self.blocks[place].get_submodule(local), rounding)
            self.blocks[place].set_submodule(local, layer)
            self.layers[name] = layer, rounding
        self.bits = min(rounding.start.task.scheme.bits for rounding in roundings.values())

    @torch.no_grad()
    def refresh(self, gradients: bool) -> None:
        """Give the linears the weights that hold now, rounded as the file will have them."""
        for layer, rounding in self.layers.values():
            layer.weight = rounding.stored(rounding()).to(layer.weight.dtype).requires_grad_(gradients)

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that is learned."""
        for _, rounding in self.layers.values():
            yield from rounding.parameters()


def _layer(linear: nn.Module, rounding: Rounding) -> FakeQuantLinear:
    """In the dtype of the block, which holds rounded weights as the file will; 8-bit inputs are rounded in float32."""
    start = rounding.start
    dtype = linear.get_parameter("weight").dtype if start.task.scheme.activations is None else torch.float32
    bias = linear.bias
    return FakeQuantLinear(
        start.weight.to(dtype),
        None if bias is None else bias.detach().to(dtype),  # type: ignore[operator]
        activations=start.task.scheme.activations,
        input_scale=None if start.input_scale is None else start.input_scale.to(dtype),
    )


class _Learning:
    """The steps of one window."""

    def __init__(self, learner: BlockLearner, work: BlockWork, student: Student, batches: CalibrationBatches) -> None:
        self.learner, self.work, self.student, self.batches = learner, work, student, batches
        self.held, self.drawn = split(batches, learner.learn_seed, learner.batch)
        self.count = learner.steps(sum(map(len, batches.windows)))
        self.where = " and ".join(work.paths)
        self.optimizers = {name: learner.optimizer(rounding, self.count) for name, (_, rounding) in student.layers.items()}
        self.rates = {name: [group["lr"] for group in each.param_groups] for name, each in self.optimizers.items()}

    def run(self) -> None:
        """All steps; then the best iteration is back in the roundings."""
        best, kept = self.held_out_loss(), self._copy()
        look = max(1, self.count // LOOKS)
        for step in range(self.count):
            self._step(step)
            if (step + 1) % look == 0 or step + 1 == self.count:
                loss = self.held_out_loss()
                if loss < best or not self.held:
                    best, kept = loss, self._copy()
                self.work.progress(self.where, step + 1, self.count, f"held-out loss {loss:.4g}" if self.held else "")
        for parameter, value in zip(self.student.parameters(), kept, strict=True):
            parameter.data.copy_(value)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean over the windows that are held out, of the codes as they would be placed now. Raises PTQError if it is not finite."""
        self.student.refresh(gradients=False)
        windows = self.held or self.batches.windows[:1]
        losses = [self._loss(batch) * len(batch.inputs) for batch in map(self.batches.of, windows) if len(batch.inputs)]
        total = torch.stack(losses).sum() if losses else torch.zeros((), device=next(self.student.parameters()).device)
        self.work.add_up([total])
        loss = float(total) / sum(map(len, windows))
        if not loss < float("inf"):
            raise PTQError(f"{self.where}: the output is not finite while {self.learner.name} learns; lower --lr, or give --dtype float32")
        return loss

    def _loss(self, batch: Batch) -> Tensor:
        assert batch.targets is not None
        return self.learner.loss(batch.run(list(self.student.blocks)), batch.targets, self.student.bits)

    def _step(self, step: int) -> None:
        self.student.refresh(gradients=True)
        passes = next(self.drawn)
        for windows in passes:
            batch = self.batches.of(windows)
            if len(batch.inputs):  # else other processes have all of them
                (self._loss(batch) * (len(batch.inputs) / len(windows)) / len(passes)).backward()
        decay = self.learner.decay(step / self.count)
        weights = {name: layer.weight for name, (layer, _) in self.student.layers.items()}
        read = torch.tensor([weight.grad is not None for weight in weights.values()], dtype=torch.int64)
        self.work.add_up([read])
        for name, weight in itertools.compress(weights.items(), read.tolist()):  # nothing reads the output of the others
            grad = torch.zeros_like(weight, dtype=torch.float32) if weight.grad is None else weight.grad.float()
            self.work.add_up([grad])
            self._descend(self.optimizers[name], self.rates[name], self.student.layers[name][1], grad, decay)

    def _descend(self, optimizer: torch.optim.Optimizer, rates: Sequence[float], rounding: Rounding, grad: Tensor, decay: float) -> None:
        rounding().backward(grad)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * decay
        optimizer.step()
        optimizer.zero_grad()
        rounding.project()

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.student.parameters()]


def split(batches: CalibrationBatches, seed: int, size: int) -> tuple[list[Sequence[int]], Iterator[list[Sequence[int]]]]:
    """The windows that are held out, in batches, and without end those of each step: about ``size`` windows, in one pass or several.

    Held out are the last batches, about one window in HELD_OUT_SHARE; none where there is but one batch. All others are gone through
    in an order drawn anew each time, window by window where they mix, else batch by batch.
    """
    groups = list(batches.windows)
    total = sum(map(len, groups))
    held: list[Sequence[int]] = []
    while len(groups) > 1 and sum(map(len, held)) < min(HELD_OUT, max(1, total // HELD_OUT_SHARE)):
        held.insert(0, groups.pop())
    return held, _steps(groups, batches.mixes, seed, max(1, size // len(groups[0])))


def _steps(groups: list[Sequence[int]], mixes: bool, seed: int, passes: int) -> Iterator[list[Sequence[int]]]:
    generator = torch.Generator().manual_seed(seed)
    each = len(groups[0])
    waiting: list[Sequence[int]] = []
    while True:
        while len(waiting) < passes:
            if mixes:
                windows = [window for group in groups for window in group]
                order = [windows[place] for place in torch.randperm(len(windows), generator=generator).tolist()]
                waiting += [order[place : place + each] for place in range(0, len(order) - each + 1, each)]
            else:
                waiting += [groups[place] for place in torch.randperm(len(groups), generator=generator).tolist()]
        yield waiting[:passes]
        waiting = waiting[passes:]

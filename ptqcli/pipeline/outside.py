"""The output head and the embedding, which stand outside the blocks, on their way to codes.

The embedding W [tokens, hidden] is only looked up, so nothing is known of it but its numbers: each row is rounded in groups along it. It
comes first, and the blocks are calibrated behind it. The head is a linear that reads what the final norm makes of the hidden states behind
the last block: the model itself is run on these once more, up to the head, and the solver works on the Hessian of what arrives there. Both
have as many rows as there are tokens, so they are solved a piece of rows at a time, which changes nothing: given the Hessian, rows are
independent of each other.

A pair that shares one matrix gets one each. Codes that suit the head's inputs are not those that suit a table, and transformers does not
load a head that shares a packed matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ptqcli.calibration.statistics import InputStatistics, StatisticsRequest
from ptqcli.checkpoint.tensors import NewTensor
from ptqcli.errors import UsageError
from ptqcli.estimate import OUTSIDE_PIECE, PlannedLinear
from ptqcli.formats import Format
from ptqcli.model.linears import EMBEDDING
from ptqcli.model.rewritten import Rewrite, RewrittenSource
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.whole import given_hidden
from ptqcli.numerics.fake_quant import FakeQuantLinear
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.pipeline.loaded import Run
from ptqcli.pipeline.report import LayerReport
from ptqcli.plan import Plan
from ptqcli.recipe import Recipe
from ptqcli.solvers import LinearTask, MatrixSolver, Solution, Stage
from ptqcli.solvers.error import relative_error
from ptqcli.solvers.per_matrix import PerMatrix, StageWork
from ptqcli.solvers.rtn import RTN


def untied(skeleton: Skeleton, recipe: Recipe) -> Skeleton:
    """The model with a head of its own, if the recipe quantizes head or embedding and they share one matrix; else as it is.

    Raises UsageError for a class that ties them whatever its configuration says.
    """
    model: Any = skeleton.model
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if (recipe.head_scheme or recipe.embedding_scheme) is None or head is None:
        return skeleton
    head, embedding = (next(name for name, module in model.named_modules() if module is each) for each in (head, embedding))
    stored = skeleton.stored_name(f"{embedding}.weight")
    if skeleton.stored_name(f"{head}.weight") != stored:
        return skeleton
    own = {f"{head}.weight": NewTensor(stored, lambda read: read(stored))}
    rewrite = Rewrite(tensors=own, config={"tie_word_embeddings": False}, done="head and embedding have a matrix each")
    behind = Skeleton(RewrittenSource(skeleton.source, rewrite), recipe.blocks)
    if behind.stored_name(f"{head}.weight") == stored or getattr(behind.model, "all_tied_weights_keys", {}):
        raise UsageError(f"{head}: shares its weight with {embedding} in every model of its class; leave --lm-head and --embeddings out")
    return behind


def untied_note(chosen: Format, plan: Plan, opened: Skeleton, skeleton: Skeleton) -> str:
    """What it costs that head and embedding no longer share one matrix."""
    head: Any = skeleton.model.get_output_embeddings()  # type: ignore[operator]
    name = next(name for name, module in skeleton.model.named_modules() if module is head)
    packed = next((chosen.stored_bytes(linear.spec) for linear in plan.linears if linear.name == name), None)
    size = skeleton.nbytes(f"{name}.weight") if packed is None else packed
    what = f"{name} and the embedding share one matrix, and will not any more"
    return f"{what}: {size / 1e6:,.1f} MB more than if they could share what becomes of it, in all {_change(plan, opened)}"


def _change(plan: Plan, opened: Skeleton) -> str:
    return f"{opened.total_bytes / 1e6:,.1f} MB before and about {plan.bytes_after / 1e6:,.1f} MB afterwards"


class OutsideWork:
    """Head and embedding of a run. windows: int64 [windows, tokens], None without calibration. dtype: of the calibration passes.

    packed: what is stored in place of their weights, by the stored names of these, as far as they have codes.
    """

    def __init__(self, run: Run, windows: Tensor | None, dtype: torch.dtype) -> None:
        self._run, self._windows, self._dtype = run, windows, dtype
        self._planned = [linear for linear in run.plan.linears if linear.spec.outside]
        self.packed: dict[str, Mapping[str, Tensor]] = {}

    def quantize_embedding(self) -> None:
        """Round it, and let what is calibrated from now on see what became of it."""
        for linear in self._planned:
            if linear.spec.kind == EMBEDDING:
                weight = self._solve(linear, RTN(), None)
                self._run.skeleton.put(self._stored(linear), weight.dequantize(linear.dtype).cpu())

    def quantize_head(self) -> None:
        """Solve it for what reaches it from the hidden states behind the last block."""
        for linear in self._planned:
            if linear.spec.kind != EMBEDDING:
                solver = _solver(self._run)
                self._solve(linear, solver, self._statistics(linear, solver))

    def _stored(self, linear: PlannedLinear) -> str:
        return self._run.skeleton.stored_name(f"{linear.name}.weight")

    def _solve(self, linear: PlannedLinear, solver: MatrixSolver, statistics: InputStatistics | None) -> QuantizedWeight:
        run, stored = self._run, self._stored(linear)
        run.progress.phase(f"quantizing {linear.name}")
        matrix = run.skeleton.source.tensors.read(stored).to(run.resources.device)
        rows = max(1, OUTSIDE_PIECE // matrix.shape[1])
        pieces = [matrix[start : start + rows] for start in range(0, len(matrix), rows)]
        tasks = [
            LinearTask(name=linear.name, weight=piece.float(), scheme=linear.scheme, scale_dtype=linear.scale_dtype) for piece in pieces
        ]
        work = StageWork(solver, Stage(tuple(tasks), statistics))
        told = partial(run.progress.layer_progress, linear.name)

        def solve(number: int) -> Solution:
            task, tasks[number] = tasks[number], replace(tasks[number], weight=tasks[number].weight[:0])  # float32 is needed once
            return work.solve(task, told)

        solutions = list(run.ranks.divided([float(len(piece)) for piece in pieces], solve))
        weight = run.format.held(_joined([solution.weight for solution in solutions]))
        if run.ranks.first:
            self.packed[stored] = run.format.pack(stored.removesuffix(".weight"), weight.to(torch.device("cpu")))
            self._note(linear, solutions, relative_error(matrix.float(), FakeQuantLinear.of(weight), statistics))
        return weight

    def _note(self, linear: PlannedLinear, solutions: Sequence[Solution], error: float) -> None:
        bits = 8 * sum(tensor.nbytes for tensor in self.packed[self._stored(linear)].values())
        notes = replace(solutions[0].notes, zero_groups=sum(solution.notes.zero_groups for solution in solutions))
        self._run.layers.append(
            LayerReport(
                name=linear.name,
                scheme=str(linear.scheme),
                bits_per_weight=bits / (linear.site.in_features * linear.site.out_features),
                relative_error=error,
                outlier_share=None,
                **asdict(notes),
            )
        )
        self._run.note(self._run.layers[-1])
        self._run.progress.layer_done(linear.name, error)

    def _statistics(self, linear: PlannedLinear, solver: MatrixSolver) -> InputStatistics | None:
        streams, windows = self._run.streams, self._windows
        if streams is None or windows is None:
            return None
        needs = PerMatrix(solver).needs
        needs |= StatisticsRequest(samples=not needs.hessian)
        share = streams.share
        before = share.first * windows.shape[1]
        seen = InputStatistics.empty(linear.site.in_features, needs, windows.numel(), self._run.resources.device, before, torch.float64)
        skeleton, device, own = self._run.skeleton, self._run.resources.device, windows[share.first : share.stop]
        with skeleton.loaded_outside(device, self._dtype) as model, _stopping_at(model.get_submodule(linear.name), seen):
            for start, stop in streams.recording.batches:
                with given_hidden(skeleton, streams.quantized.inputs[start:stop].to(device, copy=True)):
                    try:
                        skeleton.kind.call(model, own[start:stop].to(device))
                    except _Reached:
                        continue
        if self._run.ranks.size > 1:
            seen.merge(self._run.ranks)
        seen.settle()
        seen.check_finite(linear.name)
        return seen


class _Reached(Exception):
    """The head has been given its inputs; what it would make of them is not wanted."""


@contextmanager
def _stopping_at(head: nn.Module, seen: InputStatistics) -> Iterator[None]:
    def stop(_head: nn.Module, inputs: Any) -> None:
        seen.add(inputs[0])
        raise _Reached

    hook = head.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def _solver(run: Run) -> MatrixSolver:
    """The run's, aimed at the head's own output; rounding to nearest where it works on blocks."""
    if not isinstance(run.solver, PerMatrix):
        return RTN()
    solver = run.solver.solver
    if solver.aim is None or not is_dataclass(solver):
        return solver
    own: MatrixSolver = replace(solver, target="quantized", alpha="auto", beta="auto")
    return own


def _joined(pieces: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The rows of all pieces."""
    return replace(
        pieces[0],
        codes=torch.cat([piece.codes for piece in pieces]),
        scale=torch.cat([piece.scale for piece in pieces]),
        zero=torch.cat([piece.zero for piece in pieces]),
    )

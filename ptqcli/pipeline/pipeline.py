"""The one loop over blocks: plan, calibrate, solve, write. The only caller of the rooms around it.

A block's weights come from the file when its turn comes and leave when its quantized tensors are written, so memory holds a few blocks
and the activations, whatever the number of blocks. The checkpoint grows in a folder of its own, a finished shard at a time, and takes its
final name when everything is in it: an interrupted run leaves nothing that looks whole.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptqcli.calibration.shingles import text_fingerprint
from ptqcli.checkpoint.directory import Directory
from ptqcli.estimate import windows_per_batch
from ptqcli.finishing.tune_scales import TuneScales
from ptqcli.formats import find_format
from ptqcli.model.skeleton import Unit
from ptqcli.model.source import ModelSource
from ptqcli.pipeline.block import WindowWork
from ptqcli.pipeline.clock import Clock
from ptqcli.pipeline.folder import growing
from ptqcli.pipeline.halving import Batches
from ptqcli.pipeline.journal import Committed, Journal, fingerprint
from ptqcli.pipeline.loaded import LoadedBlock, Run
from ptqcli.pipeline.log import Event, RunLog
from ptqcli.pipeline.memory import peak_memory, return_freed_memory
from ptqcli.pipeline.outside import OutsideWork
from ptqcli.pipeline.prepare import Output, Prepared, prepare
from ptqcli.pipeline.progress import NoProgress, Progress
from ptqcli.pipeline.ranks import Ranks
from ptqcli.pipeline.report import CalibrationReport, Report, RewriteReport, TuningReport, make_report, text_report
from ptqcli.pipeline.rewriting import proved
from ptqcli.pipeline.streams import record, record_again
from ptqcli.pipeline.tuning import rewrite, tune
from ptqcli.pipeline.written import WrittenUnits
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources
from ptqcli.solvers.per_matrix import PerMatrix, as_block_solver


def quantize(
    model: Path | ModelSource,
    recipe: Recipe,
    output: Output,
    *,
    overwrite: bool = False,
    restart: bool = False,
    resources: Resources | None = None,
    data_dir: Path | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Report:
    """Quantize ``model``, a folder as a rule, into the new checkpoint folder ``output``, which a function may name by the plan.

    What an earlier run of the same request has finished is gone on from, unless ``restart``. ranks: the processes that share the run, None
    for this one alone. Each of them calls this with the same request and gets the same report; the first one writes. on_event: is given
    what the log tells.
    Raises UsageError for a request that cannot work and PTQError for work that failed; either way ``output`` is as it was, and what is
    finished is kept beside it.
    """
    resources, clock = resources or Resources(), Clock()
    ranks = ranks or Ranks()
    folder = model if isinstance(model, Path) else model.folder
    progress = log = RunLog(progress or NoProgress(), str(model if isinstance(model, Path) else model.where), resources.device, on_event)
    ready = prepare(
        model, recipe, output, overwrite=overwrite, resources=resources, data_dir=data_dir, progress=progress, clock=clock, ranks=ranks
    )
    resources = ready.resources
    with clock.measure("plan"):
        rewritten = ranks.from_first(lambda: proved(ready.skeleton, ready.plan, resources.device, progress))
    journal = _journal(ready, folder, resources, restart) if ranks.first else None
    if ranks.size > 1:
        progress.phase(f"{ranks.size} processes share the work")
    with ExitStack() as held, torch.no_grad():
        growing_folder = held.enter_context(_growing(ready, folder, overwrite, journal, ranks))
        if growing_folder is not None:
            held.enter_context(log.kept_in(growing_folder))
        work = _Quantization(ready, resources, growing_folder, log, clock, journal, ranks)
        work.run()
        report = ranks.from_first(lambda: work.finish(folder, rewritten))
        log.finished(report, ready.output, clock.spent)
    return replace(
        report,
        output=str(ready.output),
        seconds=time.perf_counter() - clock.start,
        peak_memory_bytes=peak_memory(resources.device),
        seconds_by_step=clock.spent,
    )


@contextmanager
def _growing(ready: Prepared, model: Path | None, overwrite: bool, journal: Journal | None, ranks: Ranks) -> Iterator[Directory | None]:
    """The folder in which the output grows; None in a process that does not write, which waits until it is in its place."""
    if not ranks.first:
        yield None
        ranks.wait()
        return
    with growing(ready.output, model, overwrite, ready.plan.disk_bytes, ready.inputs, journal) as folder:
        yield folder
    ranks.wait()


def _journal(ready: Prepared, model: Path | None, resources: Resources, restart: bool) -> Journal | None:
    """What the run notes of itself; None for one that nothing could go on from: of a model in memory, and where blocks leave keys and
    values for later ones, which are only in memory."""
    plan = ready.plan
    if plan.needs_calibration and any(shape.exchanged for shape in ready.skeleton.shapes):
        return None
    batch_size = windows_per_batch(plan.recipe, plan.texts.windows, plan.seqlen, resources)
    dtype = resources.calibration_dtype(plan.linears[0].dtype)
    asked = fingerprint(ready, model, batch_size, dtype, resources.device)
    return None if asked is None else Journal(asked, restart)


def seconds_needed(ready: Prepared, progress: Progress) -> float | None:
    """How long the blocks take that were prepared for, by the first, which is quantized and thrown away; nothing is written.

    None where there is nothing to measure: the weights are not there, or the text that the model would write.
    """
    plan, skeleton, found = ready.plan, ready.skeleton, ready.calibration
    if ready.declared or (plan.needs_calibration and (found is None or len(found.windows) < plan.texts.windows)):
        return None
    start = time.perf_counter()
    log = RunLog(progress, skeleton.where, ready.resources.device)
    work = _Quantization(ready, ready.resources, None, log, Clock(), None, Ranks())
    with torch.no_grad():
        if found is not None:
            work._record()
        recorded = time.perf_counter()
        count = min(work.state.solver.window, len(skeleton.blocks))
        final = max(1, count - work.state.solver.overlap)
        work._quantize_window(range(count), final)
    sizes = [skeleton.unit_bytes(unit) for unit in skeleton.units]
    return recorded - start + (time.perf_counter() - recorded) * sum(sizes) / sum(sizes[:final])


class _Quantization:
    """One run. Units are written in the order of the model: what runs before the blocks, each block, what is left."""

    def __init__(
        self,
        ready: Prepared,
        resources: Resources,
        folder: Directory | None,
        progress: RunLog,
        clock: Clock,
        journal: Journal | None,
        ranks: Ranks,
    ) -> None:
        self.journal, self.ranks = journal, ranks
        self.skeleton, self.plan, self.calibration = ready.skeleton, ready.plan, ready.calibration
        self.progress, self.clock, self.folder = progress, clock, folder
        plan = self.plan
        self.state = Run(
            skeleton=self.skeleton,
            plan=plan,
            format=find_format(plan.recipe.format),
            resources=resources,
            solver=as_block_solver(plan.recipe.solver()),
            transforms=plan.recipe.transforms(),
            progress=progress,
            ranks=ranks,
            note=progress.note,
        )
        self.written = None if folder is None else WrittenUnits(self.state, folder)
        self.dtype = resources.calibration_dtype(plan.linears[0].dtype)
        size = windows_per_batch(plan.recipe, plan.texts.windows, plan.seqlen, resources)
        self.batches = Batches(self.state, size, self.calibration is not None and ranks.size == 1)
        self.resumes = ranks.from_first(lambda: journal is not None)
        self.waiting: dict[int, LoadedBlock] = {}  # blocks of the last window that come again in the next one
        self.carried: dict[str, Any] = {}

    def run(self) -> None:
        """Everything up to the last tensor."""
        outside = OutsideWork(self.state, None if self.calibration is None else self.calibration.windows, self.dtype)
        with self.clock.measure("solve"):
            outside.quantize_embedding()
        found = self.ranks.from_first(lambda: None if self.journal is None else self.journal.found)
        if found is not None:
            self.batches.halve_as(found.halved_at)
        if found is not None and found.all_written:
            self._go_on(found)
            return
        if self.calibration is not None:
            self.batches.work(self._record, self._record, 0)
        if found is None:
            self._carry_over(self.skeleton.before, outside)
        else:
            self._go_on(found)
        solver, blocks = self.state.solver, range(len(self.skeleton.blocks))
        window, start = min(solver.window, len(blocks)), 0 if found is None else found.blocks
        while start < len(blocks):
            indices = blocks[start : start + window]
            final = len(indices) if indices.stop == blocks.stop else window - solver.overlap
            self.batches.work(partial(self._quantize_window, indices, final), self._record, start, bool(self.waiting))
            start += final
            self.commit(start)
        with self.clock.measure("solve"):
            self.batches.work(outside.quantize_head, self._record, len(blocks))
        self._carry_over(self.skeleton.after, outside)
        self.commit(len(blocks), all_written=True)

    def _carry_over(self, unit: Unit, outside: OutsideWork) -> None:
        if self.written is not None:
            with self.clock.measure("write"):
                self.written.carry_over(unit, outside.packed)

    def commit(self, blocks: int, all_written: bool = False) -> None:
        """Note that so many blocks are finished, unless a later window starts from what is only in memory."""
        if not self.resumes or self.waiting:
            return
        if self.journal is None or self.folder is None or self.written is None:  # the first process notes it
            if self.state.streams is not None and not all_written:
                self.state.streams.hand_over()
            return
        with self.clock.measure("write"):
            committed = Committed(
                asked=self.journal.asked,
                blocks=blocks,
                count=len(self.skeleton.blocks),
                all_written=all_written,
                shards=self.written.shards,
                files={file: self.folder.made[file] for file, _ in self.written.shards},
                layers=self.state.layers,
                folds=self.state.folds,
                halved_at=self.batches.halved_at,
            )
            self.journal.commit(self.folder, committed, None if all_written else self.state.streams, self.state.adapters)

    def drop_journal(self) -> None:
        """What is finished is about to change."""
        if self.journal is not None and self.folder is not None:
            self.journal.drop(self.folder)

    def _go_on(self, found: Committed) -> None:
        """Everything as it was behind the blocks that are finished."""
        states = None if found.all_written else self.state.streams
        if self.journal is None or self.folder is None or self.written is None:
            if states is not None:
                states.restore()
            return
        self.progress.goes_on(found.blocks, found.count)
        self.progress.phase(f"going on behind {found.blocks} of {found.count} blocks, which {self.folder.path} holds")
        self.written.restore(found.shards)
        self.state.layers[:], self.state.folds[:] = found.layers, found.folds
        self.state.adapters.update(self.journal.read_adapters(self.folder))
        if states is not None:
            self.journal.read_states(self.folder, states)

    def finish(self, model: Path | None, rewritten: RewriteReport | None) -> Report:
        """Make a checkpoint of the tensors, which are all there; for the process that writes."""
        assert self.written is not None
        source, state = None if model is None else str(model.resolve()), self.state
        report = make_report(self.plan, source, state.layers, state.folds, self.written.bytes, self._calibration_report())
        with self.clock.measure("write"):
            self.written.finish_tensors(lambda: self.commit(len(self.skeleton.blocks), all_written=True), self.drop_journal)
            report = replace(report, bytes_after=self.written.bytes)
        if self.plan.recipe.finish != "none":
            self.drop_journal()
            with self.clock.measure("tune"):
                report = replace(report, tuning=self._tune())
        with self.clock.measure("write"):
            return self.written.finish(replace(report, rewritten=rewritten))

    def _tune(self) -> TuningReport:
        """Tune the scales of the checkpoint in the folder, whose tensors are all there."""
        assert self.calibration is not None
        assert self.folder is not None
        self.state.streams = None  # their memory is needed
        changed, report = tune(
            self.folder.path,
            self.skeleton,
            self.calibration.windows,
            self.calibration.bos,
            TuneScales(),
            self.plan.recipe,
            self.state.resources,
            self.folder.path,
            self.progress,
        )
        rewrite(self.folder, changed)
        return report

    def _calibration_report(self) -> CalibrationReport | None:
        """What the codes depend on beside the request, None where nothing was calibrated."""
        found = self.calibration
        if found is None:
            return None
        return CalibrationReport(
            seqlen=self.plan.seqlen,
            bos=found.bos,
            skipped_rows=found.skipped_rows,
            batch_size=self.batches.size,
            dtype=str(self.dtype).removeprefix("torch."),
            texts=[text_report(share, found.known.get(share)) for share in found.shares],
            sampling=found.sampling,
            halved_at=self.batches.halved_at,
            fingerprint=text_fingerprint(found.windows, found.bos),
        )

    def _record(self) -> None:
        """How the model calls its blocks on the calibration windows, in batches that may have become smaller meanwhile."""
        assert self.calibration is not None
        state, windows = self.state, self.calibration.windows
        self.progress.phase("recording how the model calls its blocks")
        with self.clock.measure("record"):
            original, excerpts = state.solver.needs.original, bool(state.transforms) or state.solver.needs.pairs
            if state.streams is not None:
                record_again(state.streams, self.skeleton, windows, self.batches.size, self.dtype, excerpts)
                return
            state.streams = record(
                self.skeleton,
                windows,
                self.batches.size,
                self.dtype,
                state.resources,
                self._scratch(),
                original,
                excerpts,
                self.ranks,
                not isinstance(state.solver, PerMatrix),
            )

    def _scratch(self) -> Path:
        """Where hidden states go that memory does not hold: into the output, if that is on this machine."""
        folder = self.ranks.from_first(lambda: None if self.folder is None else self.folder.path)
        return folder if folder is not None and folder.is_dir() else Path(tempfile.gettempdir())

    def _quantize_window(self, indices: Sequence[int], final: int) -> None:
        """Load and solve the blocks ``indices``, write and release the first ``final`` of them."""
        count = len(self.skeleton.blocks)
        self.progress.block_started(indices[0], count)
        with self.clock.measure("load"):
            new = [LoadedBlock(self.state, index, self._load(index)) for index in indices if index not in self.waiting]
            blocks = [*self.waiting.values(), *new]
        work = WindowWork(self.state, blocks, final, self.carried)
        with self.clock.measure("solve"):
            if self.state.streams is not None and not self.state.solver.needs.pairs:  # which runs both models' blocks side by side
                self.state.streams.follow([block.block for block in new if block.block is not None], [block.index for block in new])
            self.state.solver.solve(work)
            finished = work.finish()
        with self.clock.measure("write"):
            for block, tensors in zip(blocks, finished, strict=False):  # without those that wait
                if self.written is not None:
                    self.written.write(tensors)
                self.skeleton.release(self.skeleton.units[block.index])
        if self.state.streams is not None:
            self.state.streams.advance()
        self.waiting = {block.index: block for block in blocks[final:]}
        del work, blocks, new, finished  # before the next block is loaded
        return_freed_memory()
        self.progress.block_done(indices[final - 1], count)

    def _load(self, index: int) -> nn.Module | None:
        """The block, if anything runs through it: without calibration its matrices are read one by one."""
        return None if self.state.streams is None else self.skeleton.load_block(index, self.state.resources.device, self.dtype)

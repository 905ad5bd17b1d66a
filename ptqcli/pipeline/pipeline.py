"""The one loop over blocks: plan, calibrate, solve, write. The only caller of the rooms around it.

A block's weights come from the file when its turn comes and leave when its quantized tensors are written, so memory holds a few blocks
and the activations, whatever the number of blocks. The checkpoint grows in a folder of its own, a finished shard at a time, and takes its
final name when everything is in it: an interrupted run leaves nothing that looks whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptqcli.calibration.text import calibration_windows, documents
from ptqcli.checkpoint.writer import CheckpointWriter, write_json
from ptqcli.formats import find_format
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.model.skeleton import Skeleton, Unit
from ptqcli.model.source import ModelFolder, ModelSource
from ptqcli.pipeline.block import WindowWork
from ptqcli.pipeline.clock import Clock
from ptqcli.pipeline.folder import check_output, growing
from ptqcli.pipeline.loaded import Run
from ptqcli.pipeline.memory import peak_memory, return_freed_memory
from ptqcli.pipeline.progress import NoProgress, Progress
from ptqcli.pipeline.report import REPORT_NAME, Report, make_report
from ptqcli.pipeline.streams import record
from ptqcli.plan import Plan, make_plan
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources
from ptqcli.solvers.per_matrix import as_block_solver

# Of tensors that are only carried over, so many bytes are in memory at once, or the largest of them.
CARRIED_BYTES = 1 << 30


def plan_run(model: Path | ModelSource, recipe: Recipe, resources: Resources) -> tuple[Skeleton, Plan]:
    """Open the model and decide everything that can be decided without its weights."""
    skeleton = Skeleton(ModelFolder(model) if isinstance(model, Path) else model, recipe.blocks)
    return skeleton, make_plan(recipe, skeleton, resources)


def quantize(
    model: Path | ModelSource,
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    resources: Resources | None = None,
    data_dir: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Quantize ``model``, a folder as a rule, into the new checkpoint folder ``output``.

    Raises UsageError for a request that cannot work and PTQError for work that failed; either way ``output`` is as it was.
    """
    resources, progress, clock = resources or Resources(), progress or NoProgress(), Clock()
    folder = model if isinstance(model, Path) else model.folder
    check_output(output, folder, overwrite)
    with clock.measure("plan"):
        skeleton, plan = plan_run(model, recipe, resources)
    progress.planned(plan)
    with growing(output, overwrite, plan.disk_bytes) as growing_folder, torch.no_grad():
        work = _Quantization(skeleton, plan, resources, growing_folder, progress, clock)
        work.run(data_dir)
        report = make_report(plan, None if folder is None else str(folder.resolve()), work.state.layers, work.state.folds, work.bytes_after)
        write_json(growing_folder / REPORT_NAME, report.stored())
    return replace(
        report,
        output=str(output),
        seconds=time.perf_counter() - clock.start,
        peak_memory_bytes=peak_memory(resources.device),
        seconds_by_step=clock.spent,
    )


class _Quantization:
    """One run. Units are written in the order of the model: what runs before the blocks, each block, what is left."""

    def __init__(self, skeleton: Skeleton, plan: Plan, resources: Resources, folder: Path, progress: Progress, clock: Clock) -> None:
        self.skeleton, self.plan, self.progress, self.clock, self.folder = skeleton, plan, progress, clock, folder
        limit = {} if resources.max_shard_bytes is None else {"max_shard_bytes": resources.max_shard_bytes}
        self.writer = CheckpointWriter(folder, **limit)
        self.state = Run(
            skeleton=skeleton,
            plan=plan,
            format=find_format(plan.recipe.format),
            resources=resources,
            solver=as_block_solver(plan.recipe.solver()),
            transforms=plan.recipe.transforms(),
            progress=progress,
        )
        self.dtype = resources.calibration_dtype(plan.linears[0].scale_dtype)
        self.bytes_after = 0

    def run(self, data_dir: Path | None) -> None:
        """Everything but the report."""
        if self.plan.needs_calibration:
            self._calibrate(data_dir)
        self._carry_over(self.skeleton.before)
        window = self.state.solver.window
        for start in range(0, len(self.skeleton.blocks), window):
            self._quantize_window(range(len(self.skeleton.blocks))[start : start + window])
        self._carry_over(self.skeleton.after)
        with self.clock.measure("write"):
            self.writer.finish()
            self.skeleton.source.write_auxiliary(self.folder)
            for file, entries in self._described().items():
                write_json(self.folder / file, entries)
            open_checkpoint(self.folder)  # as a reader would, before the folder gets its name

    def _calibrate(self, data_dir: Path | None) -> None:
        """Read the calibration text and record how the model calls its blocks on it."""
        recipe, state = self.plan.recipe, self.state
        self.progress.phase(f"reading calibration text from {recipe.calib}")
        with self.clock.measure("text"):
            texts = documents(recipe.calib, "calibration", data_dir)
            windows = calibration_windows(texts, self.skeleton.source.tokenizer(), recipe.nsamples, self.plan.seqlen, recipe.seed)
        self.progress.phase("recording how the model calls its blocks")
        with self.clock.measure("record"):
            original, excerpts = state.solver.needs.original, bool(state.transforms)
            state.streams = record(self.skeleton, windows, self.dtype, state.resources, self.folder, original, excerpts)

    def _quantize_window(self, indices: Sequence[int]) -> None:
        """Load, solve, write and release the blocks ``indices``."""
        count = len(self.skeleton.blocks)
        self.progress.block_started(indices[0], count)
        with self.clock.measure("load"):
            blocks = [self._load(index) for index in indices]
        work = WindowWork(self.state, indices, blocks)
        with self.clock.measure("solve"):
            if self.state.streams is not None:
                self.state.streams.follow([block for block in blocks if block is not None], indices)
            self.state.solver.solve(work)
            finished = work.finish()
        with self.clock.measure("write"):
            for index, tensors in zip(indices, finished, strict=True):
                self._write(tensors)
                self.skeleton.release(self.skeleton.units[index])
        if self.state.streams is not None:
            self.state.streams.advance()
        del work, blocks, finished  # before the next block is loaded
        return_freed_memory()
        self.progress.block_done(indices[-1], count)

    def _load(self, index: int) -> nn.Module | None:
        """The block, if anything runs through it: without calibration its matrices are read one by one."""
        return None if self.state.streams is None else self.skeleton.load_block(index, self.state.resources.device, self.dtype)

    def _carry_over(self, unit: Unit) -> None:
        """Write the tensors of ``unit`` as they were stored."""
        with self.clock.measure("write"):
            for names in self._pieces(unit):
                self._write({name: self.skeleton.read_stored(name) for name in names})
                self.skeleton.release(Unit(unit.name, names))

    def _pieces(self, unit: Unit) -> Iterator[tuple[str, ...]]:
        piece: list[str] = []
        for name in unit.stored:
            if piece and self.skeleton.unit_bytes(Unit(unit.name, (*piece, name))) > CARRIED_BYTES:
                yield tuple(piece)
                piece = []
            piece.append(name)
        if piece:
            yield tuple(piece)

    def _write(self, tensors: dict[str, Tensor]) -> None:
        self.writer.write(tensors)
        self.bytes_after += sum(tensor.nbytes for tensor in tensors.values())

    def _described(self) -> dict[str, dict[str, Any]]:
        """File name -> its JSON: the model's own config.json and what the format adds, there and elsewhere."""
        left = [*(name for name, _ in self.plan.skipped), *self.plan.outside]
        added = self.state.format.describe([linear.spec for linear in self.plan.linears], left)
        return {**added, "config.json": {**self.skeleton.source.config_json(), **added.get("config.json", {})}}

"""The one loop over blocks: plan, calibrate, solve, write. The only caller of the rooms around it.

A block's weights come from the file when its turn comes and leave when its quantized tensors are written, so memory holds a few blocks
and the activations, whatever the number of blocks. The checkpoint grows in a folder of its own and takes its final name when
everything is in it: an interrupted run leaves nothing that looks whole.
"""

from __future__ import annotations

import ctypes
import functools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptqcli.calibration.record import Recording, record_calls
from ptqcli.calibration.statistics import InputStatistics, Needs
from ptqcli.calibration.text import calibration_windows, documents
from ptqcli.calibration.walk import CalibratedBlock
from ptqcli.checkpoint.auxiliary import copy_companions, load_tokenizer
from ptqcli.checkpoint.writer import CheckpointWriter, write_json
from ptqcli.errors import PTQError
from ptqcli.estimate import TRIED_TOKENS, PlannedLinear
from ptqcli.formats import compressed_tensors
from ptqcli.model.linears import linear_weight
from ptqcli.model.skeleton import Skeleton
from ptqcli.pipeline.folder import _growing, check_output
from ptqcli.pipeline.progress import Listener, Silent
from ptqcli.pipeline.report import REPORT_NAME, FoldReport, LayerReport, Report
from ptqcli.plan import Plan, make_plan
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources
from ptqcli.solvers import Solution, Stage, Target, lift, needs_of
from ptqcli.transforms.block import FoldedBlock, FoldNote, Treatment
from ptqcli.transforms.folds import Found, find_folds, proven

# Tokens of the two window beginnings on which folds are looked for and proved.
PROBE_TOKENS = 12


class Clock:
    """Seconds spent on each kind of work."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.spent: dict[str, float] = {}

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Add the time inside the context to ``kind``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.spent[kind] = self.spent.get(kind, 0.0) + time.perf_counter() - begin


def plan_run(model: Path, recipe: Recipe, resources: Resources) -> tuple[Skeleton, Plan]:
    """Open the model and decide everything that can be decided without its weights."""
    skeleton = Skeleton(model, recipe.blocks)
    return skeleton, make_plan(recipe, skeleton, resources)


def quantize(
    model: Path,
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    resources: Resources | None = None,
    data_dir: Path | None = None,
    listener: Listener | None = None,
) -> Report:
    """Quantize the model folder ``model`` into the new checkpoint folder ``output``.

    Raises UsageError for a request that cannot work and PTQError for work that failed; either way ``output`` is as it was.
    """
    resources, listener, clock = resources or Resources(), listener or Silent(), Clock()
    check_output(output, model, overwrite)
    with clock.measure("plan"):
        skeleton, plan = plan_run(model, recipe, resources)
    listener.planned(plan)
    with _growing(output, overwrite, plan.disk_bytes) as folder, torch.no_grad():
        run = _Run(skeleton, plan, resources, folder, listener, clock)
        if plan.needs_calibration:
            run.calibrate(data_dir)
        run.quantize_blocks()
        with clock.measure("write"):
            run.write_rest()
            report = run.report(model)
            write_json(folder / REPORT_NAME, report.stored())
    return replace(
        report,
        output=str(output),
        seconds=time.perf_counter() - clock.start,
        peak_memory_bytes=_peak_memory(resources.device),
        seconds_by_step=clock.spent,
    )


class _Run:
    """The state of one run: what is open, what is planned, what is done."""

    def __init__(self, skeleton: Skeleton, plan: Plan, resources: Resources, folder: Path, listener: Listener, clock: Clock) -> None:
        self.skeleton, self.plan, self.resources = skeleton, plan, resources
        self.folder, self.listener, self.clock = folder, listener, clock
        limit = {} if resources.max_shard_bytes is None else {"max_shard_bytes": resources.max_shard_bytes}
        self.writer = CheckpointWriter(folder, **limit)
        self.dtype = resources.calibration_dtype(plan.linears[0].scale_dtype)
        self.recording: Recording | None = None
        self.transforms = plan.recipe.transforms()
        self.layers: list[LayerReport] = []
        self.folds: list[FoldReport] = []
        self.written: set[str] = set()
        self.bytes_after = 0

    def calibrate(self, data_dir: Path | None) -> None:
        """Read the calibration text and record how the model calls its blocks on it."""
        recipe, seqlen = self.plan.recipe, self.plan.seqlen
        self.listener.stage(f"reading calibration text from {recipe.calib}")
        with self.clock.measure("text"):
            tokenizer = load_tokenizer(self.skeleton.folder)
            texts = documents(recipe.calib, "calibration", data_dir)
            windows = calibration_windows(texts, tokenizer, recipe.nsamples, seqlen, recipe.seed)
        largest = int(windows.max())
        if largest >= self.skeleton.model.get_input_embeddings().num_embeddings:  # type: ignore[operator]
            raise PTQError(f"{self.skeleton.folder}: the tokenizer gives token {largest}, which the model's embedding does not have")
        self.listener.stage("recording how the model calls its blocks")
        with self.clock.measure("record"):
            self.recording = record_calls(
                self.skeleton,
                windows,
                self.resources.windows_per_batch(seqlen),
                self.resources.device,
                self.dtype,
                self.resources.activation_budget,
                self.folder,
                self._excerpts(len(windows)) if self.transforms else None,
            )

    def _excerpts(self, count: int) -> dict[str, tuple[Sequence[int], int]]:
        seqlen = self.plan.seqlen
        tried = min(count, max(1, TRIED_TOKENS // seqlen))
        return {
            "probe": (range(min(2, count)), min(PROBE_TOKENS, seqlen)),
            "tried": (range(0, count // tried * tried, count // tried), seqlen),
        }

    def quantize_blocks(self) -> None:
        """Load, solve, write and release one block after the other."""
        solve_block = lift(self.plan.recipe.solver())
        count = len(self.skeleton.blocks)
        for index in range(count):
            self.listener.block_started(index, count)
            with self.clock.measure("load"):
                block = self._load(index)
            work = _BlockWork(self, block, index)
            with self.clock.measure("solve"):
                solve_block(work)
            with self.clock.measure("write"):
                self._write_block(index, work)
            self.skeleton.release_block(index)
            del work, block  # before the next block is loaded
            _return_freed_memory()
            self.listener.block_done(index, count)

    def _load(self, index: int) -> nn.Module | None:
        """The block, if anything runs through it: without calibration its matrices are read one by one."""
        return None if self.recording is None else self.skeleton.load_block(index, self.resources.device, self.dtype)

    def _write_block(self, index: int, work: _BlockWork) -> None:
        rewritten = work.rewritten()
        names = [name for name in self.skeleton.block_disk_names(index) if name not in self.written]
        rest = {name: rewritten[name] if name in rewritten else self.skeleton.reader.read(name) for name in names}
        self._write({**work.tensors, **rest})
        self.written.update(rest)

    def write_rest(self) -> None:
        """Everything outside the blocks, as it was stored, then the files that make the folder a checkpoint."""
        for name in self.skeleton.reader.names:
            if name not in self.written:
                self._write({name: self.skeleton.reader.read(name)})
        self.writer.finish()
        copy_companions(self.skeleton.folder, self.folder)
        write_json(self.folder / "config.json", self._config())

    def _write(self, tensors: dict[str, Tensor]) -> None:
        self.writer.write(tensors)
        self.bytes_after += sum(tensor.nbytes for tensor in tensors.values())

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.skeleton.folder / "config.json").read_text(encoding="utf-8"))
        schemes = {linear.name: linear.scheme for linear in self.plan.linears}
        left = [*(name for name, _ in self.plan.skipped), *self.plan.outside]
        conv1d = any(linear.site.transposed for linear in self.plan.linears)
        config["quantization_config"] = compressed_tensors.quantization_config(schemes, left, conv1d)
        return config

    def report(self, source: Path) -> Report:
        """What has been done so far, as a report."""
        sizes = {linear.name: linear.site.in_features * linear.site.out_features for linear in self.plan.linears}
        bits = sum(layer.bits_per_weight * sizes[layer.name] for layer in self.layers)
        return Report(
            source=str(source.resolve()),
            recipe=self.plan.recipe.stored(),
            layers=self.layers,
            skipped=list(self.plan.skipped),
            bytes_before=self.plan.bytes_before,
            bytes_after=self.bytes_after,
            bits_per_weight=bits / sum(sizes.values()),
            error_kind="output" if self.plan.needs_calibration else "weight",
            folds=self.folds,
        )


class _BlockWork:
    """One loaded block as the block solver sees it (``solvers.BlockRun``), after the transforms have had their turn."""

    def __init__(self, run: _Run, block: nn.Module | None, index: int) -> None:
        self.run, self.block, self.index = run, block, index
        self.prefix = run.skeleton.block_prefix(index)
        self.tensors: dict[str, Tensor] = {}
        self.planned = {linear.site.local: linear for linear in run.plan.linears if linear.site.block == index}
        self.statistics: InputStatistics | None = None
        self.folded: FoldedBlock | None = None

    def stages(self) -> Iterator[Stage]:
        """Every stage with its statistics, after all earlier stages have been placed."""
        stages = self.run.plan.stages[self.index]
        recording, resources = self.run.recording, self.run.resources
        if recording is None or self.block is None:
            for stage in stages:
                yield self._stage(stage)
            return
        calls = recording.calls[self.index]
        calibrated = CalibratedBlock(self.block, stages, calls, recording, resources.device, resources.activation_budget)
        for number, statistics in self._passes(calibrated, recording):
            statistics.check_finite(self.planned[stages[number][0]].name)
            self.statistics = statistics
            yield self._stage(stages[number])
        self.statistics = None

    def _passes(self, calibrated: CalibratedBlock, recording: Recording) -> Iterator[tuple[int, InputStatistics]]:
        """One pass for the solver, and one before it for all transforms together. Calibrating at once, the solver shares the first."""
        wanted, sequential = self._solver_needs(), self.run.plan.recipe.sequential
        needs = Needs() if sequential else wanted
        for transform in self.run.transforms:
            needs |= transform.needs
        statistics = calibrated.observe(needs) if self.run.transforms or not sequential else []
        if self.run.transforms:
            statistics = self._transform(statistics, recording)
        return calibrated.sequential(wanted) if sequential else calibrated.at_once(statistics)

    def _solver_needs(self) -> Needs:
        hessian = self.run.plan.recipe.solver().needs_hessian
        needs = Needs(hessian=hessian, samples=not hessian)  # the samples are for the report's errors
        for linear in self.planned.values():
            needs |= needs_of(linear.scheme)
        return needs

    def _transform(self, statistics: Sequence[InputStatistics], recording: Recording) -> list[InputStatistics]:
        """Apply the transforms to the block; return the statistics as they are behind them."""
        assert self.block is not None
        stages = self.run.plan.stages[self.index]
        for stage, seen in zip(stages, statistics, strict=True):
            seen.check_finite(self.planned[stage[0]].name)
        probe, tried = (self._excerpt_run(recording, name) for name in ("probe", "tried"))
        listener, prefix = self.run.listener, self.prefix  # closures over self would keep every finished block alive
        listener.detail(f"{prefix}: looking for folds")
        found = proven(self.block, find_folds(self.block, probe), probe)
        self.folded = FoldedBlock(
            self.block,
            found.folds,
            order=[local for stage in self.run.skeleton.shapes[self.index].stages for local in stage],
            treatments={local: Treatment(linear.scheme, linear.scale_dtype) for local, linear in self.planned.items()},
            inputs={local: seen for stage, seen in zip(stages, statistics, strict=True) for local in stage},
            stored=functools.partial(_stored, self.run.skeleton, prefix, self.run.resources.device),
            run=lambda block: tried(block, torch.float32),
            scale_search=self.run.plan.recipe.scale_search,
            tell=lambda text: listener.detail(f"{prefix}: {text}"),
        )
        notes = [(transform.name, note) for transform in self.run.transforms for note in transform.apply(self.folded)]
        for transform in self.run.transforms:
            transform.finish(self.folded)
        behind = [self.folded.inputs(stage[0]) for stage in stages]
        self.folded.release()
        self._note_folds(found, notes)
        return behind

    def _excerpt_run(self, recording: Recording, name: str) -> Callable[[nn.Module, torch.dtype], Tensor]:
        excerpt, device = recording.excerpts[name], self.run.resources.device
        hidden, call = excerpt.hidden(recording.activations).to(device), excerpt.calls[self.index]

        def run(block: nn.Module, dtype: torch.dtype) -> Tensor:
            return call.cast(dtype).run(block, hidden.to(dtype, copy=True))  # a copy: a block may change its input in place

        return run

    def _note_folds(self, found: Found, notes: Sequence[tuple[str, FoldNote]]) -> None:
        report = self.run.folds.append
        for fold in found.folds:
            mine = [(name, note) for name, note in notes if note.producer == fold.producer and note.readers == fold.readers]
            choices = tuple((name, note.choice, note.error) for name, note in mine)
            readers = tuple(f"{self.prefix}.{reader}" for reader in fold.readers)
            reason = None if choices else "none of its readers is quantized"
            report(FoldReport(f"{self.prefix}.{fold.producer}", readers, choices, reason))
        for producer, reason in found.dropped:
            report(FoldReport(self.prefix if producer == "block" else f"{self.prefix}.{producer}", (), left_alone=reason))
        read = {reader for fold in found.folds for reader in fold.readers}
        alone = tuple(f"{self.prefix}.{local}" for local in self.planned if local not in read)
        if alone:
            report(FoldReport(None, alone, left_alone="nothing that feeds them can be scaled"))

    def _stage(self, names: tuple[str, ...]) -> Stage:
        return Stage(tuple(self._target(self.planned[local]) for local in names), self.statistics)

    def _target(self, linear: PlannedLinear) -> Target:
        local = linear.site.local
        if self.folded is not None:
            weight = self.folded.weight(local)
        else:
            stored = _stored(self.run.skeleton, self.prefix, self.run.resources.device, f"{local}.weight")
            weight = (stored.t() if linear.site.transposed else stored).float()
        if not torch.isfinite(weight).all():
            raise PTQError(f"{linear.name}: the weight holds NaN or infinity; the model file is broken")
        limit = None if self.folded is None else self.folded.limits.get(local)
        return Target(linear.name, weight, linear.scheme, linear.scale_dtype, limit)

    def rewritten(self) -> dict[str, Tensor]:
        """The parameters that transforms have changed and that are not quantized, by the names under which they are stored."""
        if self.folded is None:
            return {}
        changed = self.folded.rewritten().items()
        return {self.run.skeleton.disk_name(f"{self.prefix}.{local}"): tensor.cpu() for local, tensor in changed}

    def progress(self, target: Target, done: int, total: int) -> None:
        """Pass on how far the work on one linear is."""
        self.run.listener.layer_progress(target.name, done, total)

    def place(self, target: Target, solution: Solution) -> None:
        """Pack the codes for the file and put their values into the block."""
        linear = next(planned for planned in self.planned.values() if planned.name == target.name)
        values = solution.weight.dequantize(linear.scale_dtype)  # [out, in]
        if self.block is not None:
            linear_weight(self.block.get_submodule(linear.site.local)).copy_(values)
        disk_name = self.run.skeleton.disk_name(f"{linear.name}.weight")
        weight = solution.weight.to(torch.device("cpu"))
        packed = compressed_tensors.pack(disk_name.removesuffix(".weight"), weight)
        self.tensors.update(packed)
        self.run.written.add(disk_name)
        error = _relative_error(target.weight, values.float(), self.statistics)
        self._note(linear, solution, error, sum(tensor.nbytes for tensor in packed.values()) * 8)
        self.run.listener.layer_done(linear.name, error)

    def _note(self, linear: PlannedLinear, solution: Solution, error: float, bits: int) -> None:
        outliers = solution.notes.outlier_columns
        self.run.layers.append(
            LayerReport(
                name=linear.name,
                scheme=linear.scheme.describe(),
                bits_per_weight=bits / (linear.site.in_features * linear.site.out_features),
                relative_error=error,
                outlier_share=None if outliers is None else outliers / linear.site.in_features,
                **asdict(solution.notes),
            )
        )


def _stored(skeleton: Skeleton, prefix: str, device: torch.device, local: str) -> Tensor:
    """A parameter of the block at ``prefix`` as the file has it."""
    return skeleton.reader.read(skeleton.disk_name(f"{prefix}.{local}")).to(device)


def _relative_error(weight: Tensor, quantized: Tensor, statistics: InputStatistics | None) -> float:
    difference = weight - quantized
    if statistics is None:
        error, whole = difference.square().sum(), weight.square().sum()
    elif statistics.hessian is not None:
        hessian = statistics.hessian.matrix
        error, whole = ((difference @ hessian) * difference).sum(), ((weight @ hessian) * weight).sum()
    else:
        inputs = statistics.sampled()
        error, whole = (inputs @ difference.t()).square().sum(), (inputs @ weight.t()).square().sum()
    return float((error.clamp(min=0) / whole).sqrt()) if whole > 0 else 0.0


def _return_freed_memory() -> None:
    """Ask the C library to give freed memory back to the system, where it can (glibc).

    It keeps freed tensors of up to 32 MB for reuse, but in pieces that the next block's do not fit: from 8 to 32 blocks of 12 MB the
    peak rose by 40 % without this.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _peak_memory(device: torch.device) -> int:
    """Peak bytes of this process on ``device``."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would also count a parent process that was larger when it forked
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

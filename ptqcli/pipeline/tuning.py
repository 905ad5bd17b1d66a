"""Tuning the scales of a checkpoint: of one that lies on the disk, into a new folder, and of one that is about to be finished, in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ptqcli
from ptqcli.calibration.shingles import text_fingerprint
from ptqcli.calibration.sources import read_calib
from ptqcli.calibration.text import source_path
from ptqcli.checkpoint.auxiliary import auxiliary_files, belongs_to_a_checkpoint, copy_auxiliary_files
from ptqcli.checkpoint.checksums import write_checksums
from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.tensors import INDEX_FILE, SafetensorsFolder
from ptqcli.checkpoint.writer import safetensors_pieces, write_json
from ptqcli.errors import PTQError, UsageError
from ptqcli.estimate import LIBRARY_BYTES, TEXT_READER_BYTES
from ptqcli.finishing.estimate import tuning_bytes
from ptqcli.finishing.student import Student, check_tunable
from ptqcli.finishing.teacher import Teacher
from ptqcli.finishing.tune_scales import EVALUATIONS, WINDOWS, Outcome, TuneScales, Tuning, check_windows, windows_at_once
from ptqcli.formats import LinearSpec
from ptqcli.formats.packed_checkpoint import PackedCheckpoint, open_checkpoint
from ptqcli.formats.sources import open_source
from ptqcli.model.positions import most_tokens
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder
from ptqcli.pipeline.card import CARD_NAME, is_card, tuned_card
from ptqcli.pipeline.folder import check_room, growing
from ptqcli.pipeline.memory import peak_memory
from ptqcli.pipeline.output import check_output
from ptqcli.pipeline.progress import Progress
from ptqcli.pipeline.report import REPORT_NAME, TuningReport, read_report, read_source
from ptqcli.pipeline.texts import TextMaker
from ptqcli.plan_memory import allowed_bytes, with_budget
from ptqcli.plan_notes import check_finish
from ptqcli.plan_texts import ChooseTexts, PlannedTexts
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources, process_bytes

LONGEST_WINDOW = 512  # where no other is asked for; the loss needs the logits of a window at once
CONFIG_FILES = ("config.json", "quantize_config.json", INDEX_FILE)


@dataclass(frozen=True, kw_only=True)
class TuningPlan:
    """What is about to be done. original: what the checkpoint is tuned to. activation_budget: bytes of activations held in memory."""

    checkpoint: Path
    original: Path
    output: Path
    options: TuneScales
    request: Recipe
    texts: PlannedTexts
    seqlen: int
    scales: int
    disk_bytes: int
    memory_bytes: int
    activation_budget: int


@dataclass(frozen=True, kw_only=True)
class TunedCheckpoint:
    """What became of it."""

    output: str
    tuning: TuningReport
    seconds: float
    peak_memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)


def tune_scales(
    checkpoint: Path,
    output: Path,
    options: TuneScales,
    request: Recipe,
    *,
    model: Path | None = None,
    overwrite: bool = False,
    resources: Resources,
    data_dir: Path | None = None,
    progress: Progress,
    on_plan: Callable[[TuningPlan], None] | None = None,
) -> TunedCheckpoint:
    """Tune the scales of ``checkpoint`` to its original ``model`` (None: where its report says that it came from) into ``output``.

    request: the windows (calib, nsamples, seqlen, seed, bos) and blocks; nothing else of it counts.
    Raises UsageError for a request that cannot work and PTQError for work that failed; either way ``output`` is as it was.
    """
    start = time.perf_counter()
    packed = open_checkpoint(checkpoint)
    check_tunable(packed, options.norms)
    origin = _original(checkpoint, model)
    sources = [source_path(share.source) for share in read_calib(request.calib)]
    inputs = [path for path in (checkpoint, *sources, data_dir) if path is not None and path.exists()]
    check_output(output, origin, overwrite, inputs)
    source = ModelFolder(checkpoint)
    skeleton = Skeleton(open_source(origin, allow_requantize=True), request.blocks)
    _check_pair(packed, skeleton)
    maker = TextMaker(recipe=request, skeleton=skeleton, resources=resources, data_dir=data_dir, progress=progress)
    plan = _plan(packed, skeleton, origin, output, options, request, maker.choose, resources)
    check_windows(plan.texts.windows)
    if on_plan is not None:
        on_plan(plan)
    check_room(output, plan.disk_bytes)
    resources = replace(resources, activation_budget=plan.activation_budget)
    calibration = maker.make(plan.texts, plan.seqlen, rehearsal=False)
    windows, bos = calibration.windows, calibration.bos
    with growing(output, origin, overwrite, plan.disk_bytes, inputs) as folder, torch.no_grad():
        changed, report = tune(checkpoint, skeleton, windows, bos, options, request, resources, folder.path, progress)
        progress.phase("writing the checkpoint, and comparing it with what was written")
        _write(packed, source, changed, report, origin, folder)
        skeleton.source.check_unchanged()
    spent = time.perf_counter() - start
    return TunedCheckpoint(output=str(output), tuning=report, seconds=spent, peak_memory_bytes=peak_memory(resources.device))


def tune(
    checkpoint: Path,
    skeleton: Skeleton,
    windows: Tensor,
    bos: bool,
    options: TuneScales,
    request: Recipe,
    resources: Resources,
    scratch: Path,
    progress: Progress,
) -> tuple[dict[str, Tensor], TuningReport]:
    """The tensors of ``checkpoint`` that tuning changes, by their stored names, and what is to be said of it.

    skeleton: its original. windows: int64 [windows, tokens]. scratch: folder for hidden states. Call under ``torch.no_grad``.
    """
    dtype = resources.calibration_dtype(open_checkpoint(checkpoint).config.dtype)
    progress.phase("running the original model")
    teacher = Teacher(skeleton, windows, dtype, resources, scratch)
    student = Student(checkpoint, resources.device, dtype, skeleton.blocks_name, options.norms)
    batch = windows_at_once(resources, windows.shape[1])
    run = Tuning(student, teacher, options, batch, request.seed)
    outcome = run.run(_telling(progress, run))
    return student.stored(), _report(outcome, options, request, windows, bos, batch, dtype)


def rewrite(folder: Directory, changed: Mapping[str, Tensor]) -> None:
    """Put the tensors ``changed`` into the files of a checkpoint that was made in ``folder``, one file at a time."""
    tensors = SafetensorsFolder(folder.path)
    for file, names in tensors.by_file.items():
        if changed.keys() & set(names):
            folder.write(f"{file}.tmp", safetensors_pieces(_with(tensors, names, changed)))
            folder.remove(file)
            folder.rename(f"{file}.tmp", file)
    folder.sync()


def _with(tensors: SafetensorsFolder, names: Sequence[str], changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: changed[name] if name in changed else tensors.read(name) for name in names}


def _original(checkpoint: Path, model: Path | None) -> Path:
    origin = model or read_source(checkpoint)
    if origin is None:
        raise UsageError(f"{checkpoint}: does not say what model it was made from; name it with --model")
    if not origin.exists():
        raise UsageError(f"{origin}, which the checkpoint came from, is gone; name it with --model")
    return origin


def _check_pair(packed: PackedCheckpoint, skeleton: Skeleton) -> None:
    """The two must be one model: the same blocks with the same linears, and one vocabulary."""
    blocks = {f"{skeleton.block_prefix(index)}." for index in range(len(skeleton.blocks))}
    strange = next((name for name in packed.schemes if not any(name.startswith(block) for block in blocks)), None)
    ours, theirs = (each.get_text_config().vocab_size for each in (packed.config, skeleton.config))
    if strange is not None or ours != theirs:
        why = f"has no {strange}" if strange is not None else f"has a vocabulary of {theirs} tokens, and the checkpoint one of {ours}"
        raise UsageError(f"{skeleton.where}: {why}, so it is not what {packed.folder} was made from; name that with --model")


def _plan(
    packed: PackedCheckpoint,
    skeleton: Skeleton,
    origin: Path,
    output: Path,
    options: TuneScales,
    request: Recipe,
    choose_texts: ChooseTexts,
    resources: Resources,
) -> TuningPlan:
    check_finish(skeleton)
    longest = most_tokens(skeleton.model)
    seqlen = request.seqlen or min(LONGEST_WINDOW, longest or LONGEST_WINDOW)
    if longest is not None and seqlen > longest:
        raise UsageError(f"seqlen {seqlen} is longer than the model's {longest} positions; use --seqlen {longest} or less")
    texts = choose_texts(seqlen)
    specs = [packed.spec(name) for name in packed.schemes]
    resources = with_budget(resources, lambda tried: _memory(specs, skeleton, texts.windows, seqlen, tried))
    needed = max(texts.memory_bytes, _memory(specs, skeleton, texts.windows, seqlen, resources))
    _check_fits(needed, resources)
    return TuningPlan(
        checkpoint=packed.folder,
        original=origin,
        output=output,
        options=options,
        request=request,
        texts=texts,
        seqlen=seqlen,
        scales=sum(spec.out_features * spec.scheme.group_count(spec.in_features) for spec in specs),
        disk_bytes=packed.tensors.total_bytes,
        memory_bytes=needed,
        activation_budget=resources.budget,
    )


def _check_fits(needed: int, resources: Resources) -> None:
    allowed = allowed_bytes(resources)
    if needed > allowed:
        room = f"{allowed / 2**30:.2f} GiB are {'allowed by --memory' if resources.memory is not None else 'free'}"
        raise PTQError(f"tuning takes about {needed / 2**30:.2f} GiB of memory, and {room}; give fewer or shorter windows (--seqlen)")


def _memory(specs: Sequence[LinearSpec], skeleton: Skeleton, nsamples: int, seqlen: int, resources: Resources) -> int:
    """Peak of tuning; on a GPU the peak there, without what libraries hold."""
    needed = tuning_bytes(specs, skeleton, nsamples, seqlen, resources)
    return needed if resources.device.type != "cpu" else process_bytes() + LIBRARY_BYTES + TEXT_READER_BYTES + needed


def _telling(progress: Progress, run: Tuning) -> Callable[[int, int, float], None]:
    began = time.perf_counter()

    def on_step(done: int, total: int, loss: float) -> None:
        if done == 0:
            # A step runs each of its windows forwards twice and backwards once, which is as much as twice forwards.
            a_window = (time.perf_counter() - began) / len(run.held_out)
            minutes = a_window * (total * WINDOWS * 4 + EVALUATIONS * len(run.held_out)) / 60
            progress.phase(f"tuning scales in {total} steps, about {max(minutes, 1):.0f} min; held-out KL {loss:.5f} at the start")
        progress.step(done, total, f"held-out KL {loss:.5f}")

    return on_step


def _report(
    outcome: Outcome, options: TuneScales, request: Recipe, windows: Tensor, bos: bool, batch: int, dtype: torch.dtype
) -> TuningReport:
    return TuningReport(
        **asdict(options),
        calib=request.calib,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        bos=bos,
        seed=request.seed,
        held_out=outcome.held_out,
        kl_before=outcome.before,
        kl_after=outcome.after,
        best_step=outcome.best_step,
        batch_size=batch,
        dtype=str(dtype).removeprefix("torch."),
        fingerprint=text_fingerprint(windows, bos),
    )


def _write(
    packed: PackedCheckpoint, source: ModelFolder, changed: Mapping[str, Tensor], tuning: TuningReport, origin: Path, folder: Directory
) -> None:
    """The checkpoint ``packed`` with its ``changed`` tensors; its other files go along, but for an adapter, which fits the old scales."""
    old = packed.folder
    present = [name for name in CONFIG_FILES if (old / name).is_file()]
    copy_auxiliary_files(old, [*auxiliary_files(old), *present], folder)
    tensors = SafetensorsFolder(old)
    for file, names in tensors.by_file.items():
        folder.write(file, safetensors_pieces(_with(tensors, names, changed)))
    report = read_report(old) or {"source": str(origin.resolve()), "recipe": {}, "layers": []}
    write_checksums(folder)
    files = [name for name in folder.made_names() if belongs_to_a_checkpoint(name)]
    write_json(folder, REPORT_NAME, {**report, "ptqcli": ptqcli.__version__, "tuning": asdict(tuning), "files": files})
    card = old / CARD_NAME
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if is_card(text):
        folder.write(CARD_NAME, [tuned_card(text, tuning).encode()])
    folder.check()
    open_checkpoint(folder.path)
    source.check_unchanged()

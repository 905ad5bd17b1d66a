"""What ``ptq quantize`` shows: the plan, how far it is, and what came out."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqcli.cli.console import Output, path_text, size_text, time_text
from ptqcli.cli.doctor import lacking
from ptqcli.cli.progress import Tracker
from ptqcli.cli.report import LAYER_COLUMNS, layer_row
from ptqcli.cli.signals import clean_up_first, stop_if_interrupted
from ptqcli.pipeline.report import REPORT_NAME

if TYPE_CHECKING:
    from ptqcli.formats import Reader
    from ptqcli.pipeline.prepare import Prepared
    from ptqcli.pipeline.report import Report, TuningReport
    from ptqcli.plan import Plan

WORST_LAYERS = 5
MOST_CHOICES = 4
ADAPTER = "adapter"  # of ptqcli.checkpoint.auxiliary, whose import takes torch along; a test compares the two


class QuantizeProgress:
    """Listens to the pipeline and tells a tracker."""

    def __init__(self, model: Path, words: Output, tracker: Tracker) -> None:
        self._model, self._words, self._tracker = model, words, tracker
        self._errors: list[float] = []

    def planned(self, plan: Plan, output: Path) -> None:
        clean_up_first()
        show_plan(plan, self._model, output, self._words)

    def phase(self, text: str) -> None:
        self._tracker.say(text)

    def remark(self, text: str) -> None:
        self._tracker.remark(text)

    def block_started(self, index: int, count: int) -> None:
        self._errors.clear()
        if index == 0:
            self._tracker.say(f"quantizing {count} blocks")

    def detail(self, text: str) -> None:
        self._tracker.note(text)

    def layer_progress(self, name: str, done: int, total: int, note: str = "") -> None:
        self._tracker.part(name, done, total, note)

    def layer_done(self, name: str, error: float) -> None:
        stop_if_interrupted()
        self._errors.append(error)
        self._tracker.note(f"{name}  error {error:.4f}")

    def block_done(self, index: int, count: int) -> None:
        worst = f", largest error {max(self._errors):.4f}" if self._errors else ""
        self._tracker.step(index + 1, count, f"{len(self._errors)} linears{worst}")

    def step(self, done: int, total: int, text: str) -> None:
        stop_if_interrupted()
        self._tracker.part("tuning scales", done, total)  # the steps of this command are blocks


def show_plan(plan: Plan, model: Path, target: Path, words: Output) -> None:
    """What is about to happen, and what it needs."""
    words.facts(
        [
            ("model", path_text(model)),
            ("output", path_text(target)),
            *plan.summary_rows(),
            ("size", f"{size_text(plan.bytes_before)} now, {size_text(plan.bytes_after)} afterwards"),
            ("disk needed", f"{size_text(plan.disk_bytes)} while it is written"),
            ("memory needed", f"about {size_text(plan.memory_bytes)} in all{_activations(plan)}"),
        ]
    )


def _activations(plan: Plan) -> str:
    """Whether they are on the disk, of which they have their part, too."""
    return f", with {size_text(plan.activations_on_disk)} of activations on disk" if plan.activations_on_disk else ""


def plan_as_json(ready: Prepared) -> dict[str, Any]:
    """What a dry run found, for ``--json``."""
    plan = ready.plan
    return {
        "output": str(ready.output),
        "recipe": plan.recipe.stored(),
        "linears": [{"name": linear.name, "scheme": str(linear.scheme)} for linear in plan.linears],
        "skipped": plan.skipped,
        "outside": plan.outside,
        "seqlen": plan.seqlen,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "disk_bytes": plan.disk_bytes,
        "memory_bytes": plan.memory_bytes,
        "notes": plan.notes,
        "allocation": None if plan.allocation is None else asdict(plan.allocation),
    }


def _transformed(report: Report) -> list[tuple[str, str]]:
    """What transforms did, one row each, and what they had to leave alone."""
    used = [fold for fold in report.folds if fold.left_alone is None]
    left = [fold for fold in report.folds if fold.left_alone is not None]
    rows = []
    if report.rewritten is not None:
        proof = f"proved: the logits move by {report.rewritten.difference:.0e} of themselves"
        rows.append(("rewritten", "; ".join([*report.rewritten.done, proof])))
    if not report.folds:
        return rows
    linears = {layer.name for layer in report.layers}
    reached = linears & {reader for fold in used for reader in fold.readers}
    rows.append(("folds", f"{len(used)} found and proved; they reach {len(reached)} of {len(linears)} linears"))
    for name in dict.fromkeys(name for fold in used for name, *_ in fold.choices):
        choices = Counter(choice for fold in used for part, choice, _ in fold.choices if part == name)
        more = ", ..." if len(choices) > MOST_CHOICES else ""
        rows.append((name, ", ".join(f"{choice} x {count}" for choice, count in choices.most_common(MOST_CHOICES)) + more))
    if left:
        more = f", and {len(left) - 1} more in {REPORT_NAME}" if len(left) > 1 else ""
        rows.append(("left alone", f"{left[0].producer or ', '.join(left[0].readers)}: {left[0].left_alone}{more}"))
    return rows


def _handled(report: Report) -> list[tuple[str, str]]:
    """What the solver had to handle anywhere, one row for all layers; nothing if there was nothing."""
    raised = sum(layer.damp_raised for layer in report.layers)
    unreached = [layer.name for layer in report.layers if layer.inputs_all_zero]
    pooled = [layer.name for layer in report.layers if layer.pooled]
    inputs = sum(layer.never_activated for layer in report.layers if not layer.inputs_all_zero)
    groups = sum(layer.zero_groups for layer in report.layers)
    found = [
        f"damping raised in {raised} linears" if raised else "",
        f"{len(unreached)} linears rounded to nearest, since all their inputs were zero (first {unreached[0]})" if unreached else "",
        f"{len(pooled)} linears of experts with the statistics of all, since few tokens reached them (first {pooled[0]})" if pooled else "",
        f"{inputs} input columns never activated" if inputs else "",
        f"{groups} groups of zeros" if groups else "",
    ]
    told = ", ".join(text for text in found if text)
    return [("handled", told)] if told else []


def _outliers(report: Report) -> list[tuple[str, str]]:
    shares = {layer.name: layer.outlier_share for layer in report.layers if layer.outlier_share is not None}
    if not shares:
        return []
    most = max(shares, key=lambda name: shares[name])
    return [
        (
            "outlier columns",
            f"{sum(shares.values()) / len(shares):.2%} of a linear's columns on average, at most {shares[most]:.2%} ({most})",
        )
    ]


def _adapter(report: Report) -> list[tuple[str, str]]:
    """What the adapter takes of the errors."""
    pairs = [(layer.relative_error, layer.adapter_error) for layer in report.layers if layer.adapter_error is not None]
    if not pairs:
        return []
    without, beside = (sum(errors) / len(pairs) for errors in zip(*pairs, strict=True))
    return [("adapter", f"rank {report.recipe['adapter_rank']} in {ADAPTER}/; mean error {without:.4f} without it, {beside:.4f} with it")]


def _tuning(report: Report) -> list[tuple[str, str]]:
    return [] if report.tuning is None else [("held-out KL", tuning_text(report.tuning))]


def tuning_text(tuning: TuningReport) -> str:
    """What tuning the scales has brought."""
    if not tuning.best_step:
        return f"{tuning.kl_before:.5f}; no step of tuning was better than the start, and all scales are as they were"
    share = tuning.kl_after / tuning.kl_before
    return f"{tuning.kl_before:.5f} before tuning, {tuning.kl_after:.5f} after ({share:.0%}), of step {tuning.best_step}"


def show_report(report: Report, words: Output) -> None:
    """What was written, and how each kind of thing fared."""
    worst = sorted(report.layers, key=lambda layer: -layer.relative_error)[:WORST_LAYERS]
    words.table(
        f"Worst layers by relative {report.error_kind} error",
        LAYER_COLUMNS,
        (layer_row(asdict(layer)) for layer in worst),
    )
    share = report.bytes_after / report.bytes_before
    words.say()
    words.facts(
        [
            ("written", path_text(Path(report.output))),
            ("size", f"{size_text(report.bytes_before)} before, {size_text(report.bytes_after)} after ({share:.0%})"),
            ("bits per weight", f"{report.bits_per_weight:.3f} in the quantized linears, everything stored for them counted"),
            *_transformed(report),
            *_outliers(report),
            *_adapter(report),
            *_tuning(report),
            *([] if report.allocation is None else report.allocation.rows()),
            *_handled(report),
            ("time", time_text(report.seconds)),
            ("peak memory", size_text(report.peak_memory_bytes)),
        ]
    )
    words.say()
    words.facts(next_steps(path_text(Path(report.output)), report.readers, bool(report.recipe["adapter_rank"]), report.writes))


def next_steps(folder: str, readers: Sequence[Reader], adapter: bool, writes: bool = True) -> Iterator[tuple[str, str]]:
    """What a person types next. writes: whether the model does."""
    quoted = shlex.quote(folder)
    yield "measure it", f"ptq eval {quoted}"
    if adapter:
        yield "with adapter", f"ptq eval {quoted} --adapter"
    if writes:
        yield "let it speak", f'ptq generate {quoted} "text"'
    for reader in readers:
        if reader.refusal is not None:
            yield f"not in {reader.name}", reader.refusal
            continue
        missing = lacking(reader.needs)
        first = f"   # first: pip install {shlex.join(missing)}" if missing else ""
        yield f"in {reader.name}", reader.code_for(folder).splitlines()[-1] + first

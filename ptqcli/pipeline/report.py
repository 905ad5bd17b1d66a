"""What a run did."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import ptqcli
from ptqcli.calibration.fingerprint import Fingerprint
from ptqcli.errors import PTQError
from ptqcli.formats import Reader
from ptqcli.sensitivity.allocation import Allocation
from ptqcli.untrusted import read_json, shown

if TYPE_CHECKING:  # the commands that show a report must not wait for torch
    from ptqcli.calibration.familiar import Familiarity
    from ptqcli.calibration.sources import Share
    from ptqcli.plan import Plan

REPORT_NAME = "ptq_report.json"
LOG_TEXT, LOG_JSON = LOGS = "ptq_log.txt", "ptq_log.jsonl"  # how the run went, see ``log``; no two runs write the same
PARTIAL = ".partial"  # ends the name of the folder in which a checkpoint grows
REPORT_KEYS = {"source", "ptqcli", "recipe", "layers"}  # what is read without asking whether it is there


# What is shown of the recipe, which is stored whole.
RECIPE_TYPES: dict[str, Any] = {"algo": str, "calib": str, "nsamples": int | None}
CONVERTED_TYPES: dict[str, Any] = {"relative_errors": dict[str, float]}  # of what `ptq convert` adds


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One quantized linear. relative_error: ``|W X - Y|_F / |W X|_F`` over the calibration inputs, with ``Y`` the output of the quantized
    linear, its inputs rounded where they will be; with an algorithm that needs no calibration, ``|W - W'|_F / |W|_F``. inputs_all_zero:
    calibration saw no other input, so that whatever the solver, each weight was rounded to nearest. adapter_error: as relative_error, with
    the adapter, None without one. rounded_anew: ``|W' - W|_F / |W|_F`` from what the codes stood for before `ptq convert --requantize`
    rounded them once more; relative_error is still that of the run before. tokens: how many reached it in calibration, if it is of an
    expert; pooled: these were too few, and it got the statistics of all experts of its block. The other fields are those of
    ``solvers.SolveNotes``."""

    name: str
    scheme: str
    bits_per_weight: float
    relative_error: float
    never_activated: int
    zero_groups: int
    damp: float | None
    damp_raised: bool
    outlier_columns: int | None
    outlier_share: float | None
    alpha: float | None = None
    beta: float | None = None
    bias_corrected: bool = False
    inputs_all_zero: bool = False
    adapter_error: float | None = None
    rounded_anew: float | None = None
    tokens: int | None = None
    pooled: bool = False


@dataclass(frozen=True, kw_only=True)
class FoldReport:
    """What transforms did with one fold of one block, or why they left it alone. The names are paths in the model.

    choices: (transform, what it chose, the block's squared error relative to no scaling or None if not measured). left_alone: the reason,
    None for a fold that was used; producer is None for linears that no fold reaches.
    """

    producer: str | None
    readers: tuple[str, ...]
    choices: tuple[tuple[str, str, float | None], ...] = ()
    left_alone: str | None = None


@dataclass(frozen=True, kw_only=True)
class RewriteReport:
    """What the transforms of the whole model did. done: a line for each. difference: of the logits to those of the model, relative to them,
    in the run that proved it."""

    done: list[str]
    difference: float


@dataclass(frozen=True, kw_only=True)
class TextReport:
    """One of the texts that were calibrated on. loss, expected_loss: of the model there, see ``calibration.familiar``; None where they
    were not measured, as on text that the model wrote itself."""

    source: str
    windows: int
    loss: float | None = None
    expected_loss: float | None = None


def text_report(share: Share, known: Familiarity | None) -> TextReport:
    """``share``, and how well the model knows it."""
    loss, expected = (None, None) if known is None else (known.loss, known.expected)
    return TextReport(source=share.source, windows=share.windows or 0, loss=loss, expected_loss=expected)


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """How the calibration text was run through the model; with the request, the model and the machine it settles the codes.

    seqlen: tokens in a window. bos: whether each begins with the beginning-of-sequence token. skipped_rows: rows of tables that hold no
    text. batch_size: windows in one forward pass, at the end. halved_at: how many blocks were finished each time that it was halved, since
    memory ran out. dtype: of the passes. texts: what auto became, too. sampling: how the model wrote. fingerprint: by which the text is
    known again, None of windows that are too short for it.
    """

    seqlen: int
    bos: bool
    skipped_rows: int
    batch_size: int
    dtype: str
    texts: list[TextReport] = field(default_factory=list)
    sampling: dict[str, float] | None = None
    halved_at: list[int] = field(default_factory=list)
    fingerprint: Fingerprint | None = None


@dataclass(frozen=True, kw_only=True)
class TuningReport:
    """How the scales were tuned end to end, see ``finishing.tune_scales``.

    steps, lr, norms: its options. calib, nsamples, seqlen, bos, seed: the windows, of which held_out were not trained on. kl_before,
    kl_after: mean KL to the original on these, in nats a token. best_step: the step whose scales are kept, 0 where none was better than
    the start. batch_size: windows run at once. dtype: in which the model ran. fingerprint: as in ``CalibrationReport``.
    """

    steps: int
    lr: float
    norms: bool
    calib: str
    nsamples: int
    seqlen: int
    bos: bool
    seed: int
    held_out: int
    kl_before: float
    kl_after: float
    best_step: int
    batch_size: int
    dtype: str
    fingerprint: Fingerprint | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run did.

    source: the folder that the model came from, None for one in memory. recipe: the request, every option of every part with it.
    layers: the quantized linears, in running order. skipped: (name, reason) of those in the blocks that were left alone.
    bytes_before, bytes_after: of the weights. bits_per_weight: mean over the quantized linears, scales and the like included.
    error_kind: output or weight, see ``LayerReport``. folds: what transforms of blocks did. rewritten: what those of the whole model did,
    None without one. calibration: None where there was none. tuning: None for scales that are as the solver left them; the errors of the
    layers are those before it. allocation: what became of a budget, None without one.
    readers: how other programs load the checkpoint, which its model card tells. files: what is in the folder beside the report and the
    card; anything else in it is not ours to replace.
    output, seconds, peak_memory_bytes, seconds_by_step describe the run, not the checkpoint, and are not stored in it; nor are readers, and
    writes, whether the model writes text.
    """

    source: str | None
    recipe: dict[str, Any]
    layers: list[LayerReport]
    skipped: list[tuple[str, str]]
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    error_kind: str
    folds: list[FoldReport] = field(default_factory=list)
    rewritten: RewriteReport | None = None
    readers: tuple[Reader, ...] = ()
    writes: bool = True
    files: list[str] = field(default_factory=list)
    calibration: CalibrationReport | None = None
    tuning: TuningReport | None = None
    allocation: Allocation | None = None
    output: str = ""
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    seconds_by_step: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)

    def stored(self) -> dict[str, Any]:
        """What is written beside the checkpoint: the same bytes for the same work."""
        volatile = ("readers", "writes", "output", "seconds", "peak_memory_bytes", "seconds_by_step")
        allocation = {} if self.allocation is None else {"allocation": self.allocation.stored()}
        return {"ptqcli": ptqcli.__version__, **{k: v for k, v in self.to_json().items() if k not in volatile}, **allocation}


def make_report(
    plan: Plan,
    source: str | None,
    layers: list[LayerReport],
    folds: list[FoldReport],
    bytes_after: int,
    calibration: CalibrationReport | None,
) -> Report:
    """The report of a run. source: the folder that the model came from, None for one in memory."""
    sizes = {linear.name: linear.site.in_features * linear.site.out_features for linear in plan.linears}
    bits = sum(layer.bits_per_weight * sizes[layer.name] for layer in layers)
    return Report(
        source=source,
        recipe=plan.recipe.stored(),
        layers=layers,
        skipped=list(plan.skipped),
        bytes_before=plan.bytes_before,
        bytes_after=bytes_after,
        bits_per_weight=bits / sum(sizes.values()),
        error_kind="output" if plan.needs_calibration else "weight",
        folds=folds,
        readers=plan.readers,
        writes=plan.writes,
        calibration=calibration,
        allocation=plan.allocation,
    )


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report in ``folder``, or of a file that is a whole checkpoint the one beside it; None for what `ptq quantize` did not write.

    Raises PTQError for a damaged one.
    """
    path = (folder.parent if folder.is_file() else folder) / REPORT_NAME
    if not path.is_file():
        return None
    report = read_json(path)
    if not report.keys() >= REPORT_KEYS:
        raise PTQError(f"{path}: not a report of ptq quantize; delete it, or quantize again")
    wrong = _wrong(report, {**get_type_hints(Report), "ptqcli": str, "converted": dict[str, Any]}) or _wrong(report["recipe"], RECIPE_TYPES)
    wrong = wrong or _wrong(report.get("converted", {}), CONVERTED_TYPES)
    if wrong is not None:
        raise PTQError(f"{path}: {wrong}, which no report of ptq quantize says; delete it, or quantize again")
    return report if path.parent == folder or folder.name in report.get("files", ()) else None


def folder_of(checkpoint: Path) -> Path:
    """The folder of a checkpoint, also where that is one file with its report beside it; a file alone is what it is."""
    return checkpoint.parent if checkpoint.is_file() and read_report(checkpoint) is not None else checkpoint


def _wrong(entry: Mapping[str, Any], hints: Mapping[str, Any]) -> str | None:
    """What in ``entry`` is not of the type that its key has among ``hints``; keys that are not there, or not known, may be."""
    unfit = next((key for key, hint in hints.items() if key in entry and not _fits(entry[key], hint)), None)
    return None if unfit is None else f"{unfit} is {shown(entry[unfit])}"


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value``, from JSON, is what a field annotated with ``hint`` becomes there."""
    inner = get_args(hint)
    if get_origin(hint) in (types.UnionType, Union):
        return any(_fits(value, each) for each in inner)
    if is_dataclass(hint):
        needed = {each.name for each in fields(hint) if each.default is MISSING and each.default_factory is MISSING}
        return isinstance(value, dict) and value.keys() >= needed and _wrong(value, get_type_hints(hint)) is None
    if get_origin(hint) is list or inner[1:] == (...,):
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if get_origin(hint) is dict:  # JSON has no other keys than strings
        return isinstance(value, dict) and all(_fits(each, inner[1]) for each in value.values())
    if get_origin(hint) is tuple:
        return isinstance(value, list) and len(value) == len(inner) and all(map(_fits, value, inner))
    if hint is float:
        return type(value) in (int, float) and not abs(value) > 1e300  # NaN is one of ours
    if hint is int:
        return type(value) is int and abs(value) < 2**63
    return hint is Any or type(value) is (get_origin(hint) or hint)


def read_source(folder: Path) -> Path | None:
    """The model folder that a checkpoint was made from, as its report says; it may be gone by now."""
    source = (read_report(folder) or {}).get("source")
    return Path(source) if isinstance(source, str) else None

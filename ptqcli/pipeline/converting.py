"""A checkpoint in another format: the same codes, scales and zero points where that format holds them.

Where it does not, the conversion is refused by name, before anything is written, unless another scheme is named in which those linears are
rounded anew; what that costs is measured, ``|W' - W|_F / |W|_F`` between what the codes stood for and what the new ones stand for.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ptqcli
from ptqcli.adapters.files import CONFIG_FILE, TENSOR_FILE, read_adapter
from ptqcli.checkpoint.auxiliary import ADAPTER, belongs_to_a_checkpoint, copy_auxiliary_files
from ptqcli.checkpoint.checksums import write_checksums
from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.writer import CheckpointWriter, write_json
from ptqcli.errors import UsageError
from ptqcli.formats import Format, LinearSpec, Reader, find_format, no_place, other_codes
from ptqcli.formats.dequantized import DequantizedModel
from ptqcli.formats.packed_checkpoint import PackedCheckpoint, check_schemes, open_checkpoint
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.ranges import SquaredError
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight, round_to_nearest
from ptqcli.pipeline.card import CARD_NAME, converted_card, stored_facts
from ptqcli.pipeline.folder import check_room, growing
from ptqcli.pipeline.output import check_output
from ptqcli.pipeline.progress import Progress
from ptqcli.pipeline.report import REPORT_NAME, read_report

SHARD_BYTES = 2_000_000_000  # of tensors that are in memory at once, or the largest of them


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """What is about to be done. schemes: of the linears as they are. specs: the linears as they will be. anew: those that are rounded anew,
    and why."""

    checkpoint: Path
    output: Path
    source_format: str
    target: Format
    schemes: Mapping[str, Scheme]
    specs: dict[str, LinearSpec]
    anew: dict[str, str]
    notes: tuple[str, ...]
    readers: tuple[Reader, ...]
    untouched: tuple[str, ...]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What became of it. errors: relative error of each linear that was rounded anew. bytes_before, bytes_after: of all tensors."""

    output: str
    source_format: str
    format: str
    linears: int
    errors: dict[str, float]
    bytes_before: int
    bytes_after: int
    seconds: float
    readers: tuple[Reader, ...] = field(default=())

    @property
    def error(self) -> float | None:
        """The mean relative error of the linears that were rounded anew, None if none was."""
        return sum(self.errors.values()) / len(self.errors) if self.errors else None

    def to_json(self) -> dict[str, Any]:
        """Everything but the readers, as plain values."""
        kept = {name: value for name, value in vars(self).items() if name != "readers"}
        return {**kept, "relative_error": self.error}


def convert(
    checkpoint: Path,
    to: str,
    output: Path,
    *,
    requantize: str | None = None,
    overwrite: bool = False,
    progress: Progress,
    on_plan: Callable[[ConversionPlan], None] | None = None,
) -> Converted:
    """Write the quantized model in ``checkpoint`` into the new folder ``output``, in the format ``to``.

    requantize: a scheme for the linears that the format cannot hold as they are; None refuses them.
    Raises UsageError for what cannot work and PTQError for work that failed; either way ``output`` is as it was.
    """
    start = time.perf_counter()
    target, scheme = find_format(to), None if requantize is None else Scheme.parse(requantize)
    check_output(output, checkpoint, overwrite)
    packed = open_checkpoint(checkpoint)
    if packed.format.name == target.name:
        raise UsageError(f"{checkpoint}: is {target.name} already; name another format with --to")
    source = DequantizedModel(packed)
    plan = _plan(packed, Skeleton(source), target, scheme, output)
    if on_plan is not None:
        on_plan(plan)
    needed = max(plan.bytes_before, plan.bytes_after)  # outlier columns are not counted beforehand
    check_room(output, needed)
    with growing(output, checkpoint, overwrite, needed, [checkpoint]) as folder, torch.no_grad():
        work = _Conversion(packed, plan, folder, progress)
        work.write_tensors()
        source.write_auxiliary(folder)
        described = target.describe(list(plan.specs.values()), plan.untouched)
        for file, entries in {"config.json": {}, **described}.items():
            write_json(folder, file, {**source.config_json(), **entries} if file == "config.json" else entries)
        _copy_adapter(plan, folder)
        progress.phase("comparing the checkpoint on the disk with what was written")
        _write_about(plan, work, folder)
        folder.check()
        check_schemes(open_checkpoint(folder.path), {name: spec.scheme for name, spec in plan.specs.items()})
        source.check_unchanged()
    return Converted(
        output=str(output),
        source_format=plan.source_format,
        format=target.name,
        linears=len(plan.specs),
        errors=work.errors,
        bytes_before=plan.bytes_before,
        bytes_after=work.bytes,
        seconds=time.perf_counter() - start,
        readers=plan.readers,
    )


def _plan(packed: PackedCheckpoint, skeleton: Skeleton, target: Format, scheme: Scheme | None, output: Path) -> ConversionPlan:
    specs, anew = {}, {}
    for name in packed.schemes:
        stored = packed.spec(name)
        dtype = target.scale_dtype(stored.scale_dtype, stored.scheme)
        spec = replace(stored, aliases=skeleton.aliases(name), scale_dtype=dtype, moving_groups=_moves_groups(packed, name))
        if spec.outside and no_place(target) is not None:
            raise UsageError(f"{packed.folder}: {name}: {no_place(target)}")
        reason = other_codes(target, spec.scheme) or target.refusal(spec) or _inexact(packed, stored, spec, target)
        if reason is not None:
            spec = _rounded_anew(spec, stored.scale_dtype, target, scheme, reason, packed.folder)
            anew[name] = reason
        specs[name] = spec
    untouched = skeleton.plain_names(specs)
    reason = target.joint_refusal(list(specs.values()), untouched)
    if reason is not None:
        raise UsageError(f"{packed.folder}: {reason}")
    for group in skeleton.fused_groups:
        reason = target.fused_refusal({name: specs[name].scheme if name in specs else None for name in group})
        if reason is not None:
            raise UsageError(f"{packed.folder}: {reason}")
    chosen = list(specs.values())
    tried = target.trial([model for model, _ in skeleton.classes], chosen)
    plain = sum(packed.tensors.nbytes(name) for name in packed.plain_tensors)
    return ConversionPlan(
        checkpoint=packed.folder,
        output=output,
        source_format=packed.format.name,
        target=target,
        schemes=packed.schemes,
        specs=specs,
        anew=anew,
        notes=(*target.notes(chosen), *tried),
        readers=tuple(target.readers(chosen, skeleton.loaded_as, tried)),
        untouched=untouched,
        bytes_before=packed.tensors.total_bytes,
        bytes_after=plain + sum(map(target.stored_bytes, chosen)),
    )


def _moves_groups(packed: PackedCheckpoint, name: str) -> bool:
    """Whether the groups of a linear are not neighbouring columns; only an index of them says so."""
    return f"{packed.stored_linear(name)}.g_idx" in packed.tensors.names and packed.weight(name).g_idx is not None


def _inexact(packed: PackedCheckpoint, stored: LinearSpec, spec: LinearSpec, target: Format) -> str | None:
    """Why a linear is not what it was in the format, although that holds its scheme: columns in 16 bit, scales of a wider dtype."""
    if spec.scheme.outliers is not None:
        weight = packed.weight(spec.name)
        if weight.outliers is not None and len(weight.outliers.index) and target.held(weight).outliers is None:
            return f"{len(weight.outliers.index)} of its columns are stored in 16 bit, too, which {target.name} does not keep"
    if stored.scale_dtype == spec.scale_dtype:
        return None
    scale = packed.weight(spec.name).scale
    if torch.equal(scale.to(spec.scale_dtype).to(scale.dtype), scale):
        return None
    have, takes = (str(dtype).removeprefix("torch.") for dtype in (stored.scale_dtype, spec.scale_dtype))
    return f"its scales are {have}, and {target.name} stores {takes}, which does not hold them"


def _rounded_anew(spec: LinearSpec, dtype: torch.dtype, target: Format, scheme: Scheme | None, reason: str, where: Path) -> LinearSpec:
    if scheme is None:
        raise UsageError(
            f"{where}: {target.name} does not hold {spec.name} as it is: {reason}; --requantize SCHEME rounds such linears anew, at a loss"
        )
    resolved = scheme.resolved(spec.in_features)
    new = replace(spec, scheme=resolved, scale_dtype=target.scale_dtype(dtype, resolved), moving_groups=False)
    new.scheme.group_count(spec.in_features)
    still = other_codes(target, new.scheme) or target.refusal(new)
    if still is not None:
        raise UsageError(f"{where}: {target.name} does not hold {spec.name} in {new.scheme} either: {still}; name another scheme")
    return new


class _Conversion:
    """The tensors on their way. bytes: of all that are written. errors: relative, of what was rounded anew."""

    def __init__(self, packed: PackedCheckpoint, plan: ConversionPlan, folder: Directory, progress: Progress) -> None:
        self._packed, self._plan, self._progress = packed, plan, progress
        self._writer = CheckpointWriter(folder)
        self.bytes, self.errors = 0, dict[str, float]()

    def write_tensors(self) -> None:
        """All of them, a shard at a time."""
        shard: dict[str, Tensor] = {}
        size = 0
        for tensors in self._all():
            added = sum(tensor.nbytes for tensor in tensors.values())
            if shard and size + added > SHARD_BYTES:
                self._writer.write(shard)
                shard, size = {}, 0
            shard.update(tensors)
            size += added
            self.bytes += added
        self._writer.write(shard)
        self._writer.finish()

    def _all(self) -> Iterator[dict[str, Tensor]]:
        for name in self._packed.plain_tensors:
            yield {name: self._packed.tensors.read(name)}
        self._progress.phase(f"converting {len(self._plan.specs)} linears")
        for done, name in enumerate(self._plan.specs, start=1):
            yield self._plan.target.pack(self._packed.stored_linear(name), self._converted(name))
            self._progress.step(done, len(self._plan.specs), name)

    def _converted(self, name: str) -> QuantizedWeight:
        weight, spec, target = self._packed.weight(name), self._plan.specs[name], self._plan.target
        new = target.held(replace(weight, scale=weight.scale.to(spec.scale_dtype)))  # the same codes, if that is all
        if name not in self._plan.anew:
            return new
        exact = weight.dequantize(torch.float32)
        if spec.scheme != weight.scheme or weight.g_idx is not None:
            new = target.held(round_to_nearest(exact, spec.scheme, spec.scale_dtype, SquaredError()))
        difference, size = (float(each.norm()) for each in (new.dequantize(torch.float32) - exact, exact))
        self.errors[name] = difference / size if size else 0.0
        return new


def _copy_adapter(plan: ConversionPlan, folder: Directory) -> None:
    """An adapter corrects the error of these very codes, so it goes along where all of them stay."""
    adapter = plan.checkpoint / ADAPTER
    if adapter.is_dir() and not plan.anew:
        read_adapter(adapter)
        copy_auxiliary_files(plan.checkpoint, [f"{ADAPTER}/{file}" for file in (CONFIG_FILE, TENSOR_FILE)], folder)


def _write_about(plan: ConversionPlan, work: _Conversion, folder: Directory) -> None:
    """The report and the card: those of the checkpoint with what has changed, or new ones for a checkpoint of another program."""
    old = read_report(plan.checkpoint)
    write_checksums(folder)
    files = [name for name in folder.made_names() if belongs_to_a_checkpoint(name)]
    report = old or {"source": str(plan.checkpoint.resolve()), "recipe": {"algo": "none", "calib": "none", "nsamples": None}, "layers": []}
    bits = 8 * sum(map(plan.target.stored_bytes, plan.specs.values())) / sum(map(_weights, plan.specs.values()))
    changed = {
        "ptqcli": ptqcli.__version__,
        "recipe": {**report["recipe"], "format": plan.target.name},
        "layers": [_layer(layer, plan, work.errors) for layer in report["layers"]],
        "bits_per_weight": bits,
        "bytes_after": work.bytes,
        "converted": {"from": plan.source_format, "relative_errors": work.errors},
        "files": files,
    }
    write_json(folder, REPORT_NAME, {**report, **changed})
    counts = Counter(sorted(str(spec.scheme) for spec in plan.specs.values()))
    card = plan.checkpoint / CARD_NAME
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    formats = plan.source_format, plan.target.name
    schemes = sorted(map(str, {*plan.schemes.values()})), list(counts)
    facts = stored_facts(counts, bits, report.get("bytes_before", 0), work.bytes)
    folder.write(CARD_NAME, [converted_card(text, plan.checkpoint, formats, schemes, facts, work.errors, plan.readers).encode()])


def _layer(layer: Mapping[str, Any], plan: ConversionPlan, errors: Mapping[str, float]) -> dict[str, Any]:
    spec = plan.specs.get(layer["name"])
    if spec is None:
        return dict(layer)
    anew = {"rounded_anew": errors[spec.name]} if spec.name in errors else {}
    return {**layer, "scheme": str(spec.scheme), "bits_per_weight": 8 * plan.target.stored_bytes(spec) / _weights(spec), **anew}


def _weights(spec: LinearSpec) -> int:
    return spec.out_features * spec.in_features

"""What is to be done, before anything is done.

A ``Recipe`` is the request: it comes from a YAML file, from flags, or from both (flags win), and both meet in ``load_recipe``.
``make_plan`` confronts it with a model's skeleton and decides for every linear whether it is quantized and in which scheme. Whatever
cannot work is refused there, by name, before a weight is read: a group that does not divide, a pattern that matches nothing, parts of
one fused matrix in different schemes, something that the format cannot hold.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ptqcli.errors import PTQError, UsageError
from ptqcli.estimate import PlannedLinear, _bytes_after, _mapped_bytes, _memory_bytes, _needs_calibration
from ptqcli.formats import compressed_tensors
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.scheme import Scheme
from ptqcli.recipe import ACTIVATION_SCALES, Recipe
from ptqcli.resources import Resources

DEFAULT_SEQLEN = 2048

PICKABLE_GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Plan:
    """Every decision that can be made before a weight is read.

    skipped: (name, reason) of linears inside the blocks that stay as they are. outside: linears outside the blocks. stages: for each
    block, the local names of its planned linears, grouped by input tensor in running order. The bytes are estimates: bytes_before and
    bytes_after of the weights now and afterwards, disk_bytes of the room that the run needs (the parts and the joined file stand side by
    side at the end), memory_bytes of the peak beyond what Python and torch need themselves.
    """

    recipe: Recipe
    linears: tuple[PlannedLinear, ...]
    skipped: tuple[tuple[str, str], ...]
    outside: tuple[str, ...]
    stages: tuple[tuple[tuple[str, ...], ...], ...]
    seqlen: int
    bytes_before: int
    bytes_after: int
    disk_bytes: int
    memory_bytes: int
    notes: tuple[str, ...] = field(default=())

    @property
    def needs_calibration(self) -> bool:
        """Whether anything looks at calibration text at all."""
        return _needs_calibration(self.recipe, self.linears)

    def schemes(self) -> dict[Scheme, int]:
        """How many linears each scheme has."""
        counts: dict[Scheme, int] = {}
        for linear in self.linears:
            counts[linear.scheme] = counts.get(linear.scheme, 0) + 1
        return counts

    def summary_rows(self) -> list[tuple[str, str]]:
        """(what, value) pairs that tell a person what is about to happen."""
        recipe = self.recipe
        schemes = ", ".join(f"{scheme.describe()} x {count}" for scheme, count in self.schemes().items())
        rows = [("algorithm", recipe.algo), ("linears", schemes), ("blocks", str(len(self.stages)))]
        if self.skipped:
            rows.append(("left as they are", _list_names([f"{name} ({reason})" for name, reason in self.skipped])))
        if self.needs_calibration:
            rows.append(("calibration", f"{recipe.nsamples} windows of {self.seqlen} tokens from {recipe.calib}"))
        rows.append(("format", recipe.format))
        rows += [("note", note) for note in self.notes]
        return rows


def make_plan(recipe: Recipe, skeleton: Skeleton, resources: Resources) -> Plan:
    """Decide about every linear of the model. Raises UsageError, by name, for everything that cannot work."""
    linears, skipped = _choose(recipe, skeleton)
    outside = _outside(skeleton)
    _check_patterns_match(recipe, skeleton, outside)
    if not linears:
        raise UsageError("nothing is left to quantize: every linear is ignored or skipped")
    _check_groups(linears)
    _check_runs_once(linears, skeleton)
    _check_format(recipe, linears)
    stages = _planned_stages(linears, skeleton)
    _check_fused(linears, skeleton)
    seqlen = recipe.seqlen or min(DEFAULT_SEQLEN, model_length(skeleton.config) or DEFAULT_SEQLEN)
    _check_length(seqlen, skeleton)
    after = _bytes_after(linears, skeleton)
    memory = _memory_bytes(recipe, linears, skeleton, seqlen, resources)
    return Plan(
        recipe=recipe,
        linears=tuple(linears),
        skipped=tuple(skipped),
        outside=tuple(outside),
        stages=stages,
        seqlen=seqlen,
        bytes_before=skeleton.reader.total_bytes,
        bytes_after=after,
        disk_bytes=2 * after + _mapped_bytes(recipe, linears, seqlen, resources),
        memory_bytes=memory,
        notes=tuple(_notes(linears, skeleton)),
    )


def model_length(config: Any) -> int | None:
    """The longest input that the model's config names, or None."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def _choose(recipe: Recipe, skeleton: Skeleton) -> tuple[list[PlannedLinear], list[tuple[str, str]]]:
    linears, skipped = [], []
    for site in skeleton.linears:
        scheme, reason = _scheme_for(recipe, site.name)
        if site.local in skeleton.shapes[site.block].unused:
            reason = reason or "never runs"
        if reason is not None:
            skipped.append((site.name, reason))
            continue
        dtype = skeleton.reader.dtype(skeleton.disk_name(f"{site.name}.weight"))
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise PTQError(f"{site.name}: is stored as {dtype}, which is already quantized or not a weight; start from the original model")
        linears.append(PlannedLinear(site, scheme, dtype))
    return linears, skipped


def _scheme_for(recipe: Recipe, name: str) -> tuple[Scheme, str | None]:
    scheme = recipe.default_scheme
    reason = "ignored" if any(re.search(pattern, name) for pattern in recipe.ignore) else None
    for override in recipe.overrides:
        if re.search(override.pattern, name):
            scheme = override.apply(scheme)
            reason = "skipped" if override.skip else (None if reason == "skipped" else reason)
    return scheme, reason


def _outside(skeleton: Skeleton) -> list[str]:
    inside = {site.name for site in skeleton.linears}
    return [name for name, module in skeleton.model.named_modules() if isinstance(module, torch.nn.Linear) and name not in inside]


def _check_patterns_match(recipe: Recipe, skeleton: Skeleton, outside: Sequence[str]) -> None:
    names = [site.name for site in skeleton.linears]
    for override in recipe.overrides:
        if not any(re.search(override.pattern, name) for name in names):
            raise UsageError(f"override '{override.pattern}' matches no linear; the linears are named like {names[0]}")
    for pattern in recipe.ignore:
        if not any(re.search(pattern, name) for name in (*names, *outside)):
            raise UsageError(f"ignore '{pattern}' matches no linear; the linears are named like {names[0]}")


def _check_groups(linears: Sequence[PlannedLinear]) -> None:
    for linear in linears:
        columns = linear.site.in_features
        if columns % linear.scheme.columns_per_group(columns):
            fitting = [str(group) for group in PICKABLE_GROUPS if columns % group == 0]
            raise UsageError(
                f"group size {linear.scheme.group_size} does not divide the {columns} input features of {linear.name}; "
                f"use --group-size {' or '.join([*fitting, '-1'])}, or override or ignore that layer"
            )


def _check_runs_once(linears: Sequence[PlannedLinear], skeleton: Skeleton) -> None:
    for linear in linears:
        if linear.site.local in skeleton.shapes[linear.site.block].repeated:
            raise UsageError(f"{linear.name} runs more than once within its block, which is not supported; add it to --ignore")


def _check_format(recipe: Recipe, linears: Sequence[PlannedLinear]) -> None:
    for linear in linears:
        moving = recipe.solver().moves_groups(linear.scheme)
        reason = compressed_tensors.refusal(linear.scheme, linear.site.in_features, linear.site.out_features, moving)
        if reason is not None:
            raise UsageError(f"{linear.name}: {reason}")


def _planned_stages(linears: Sequence[PlannedLinear], skeleton: Skeleton) -> tuple[tuple[tuple[str, ...], ...], ...]:
    planned = {(linear.site.block, linear.site.local) for linear in linears}
    blocks = []
    for index, shape in enumerate(skeleton.shapes):
        kept = (tuple(local for local in stage if (index, local) in planned) for stage in shape.stages)
        blocks.append(tuple(stage for stage in kept if stage))
    return tuple(blocks)


def _check_fused(linears: Sequence[PlannedLinear], skeleton: Skeleton) -> None:
    """Servers run the linears of one module that read one tensor (q, k, v; gate, up) as a single matrix in a single scheme."""
    described = {(linear.site.block, linear.site.local): linear.scheme.describe() for linear in linears}
    for index, shape in enumerate(skeleton.shapes):
        for stage in shape.stages:
            together: dict[str, str] = {}  # module -> its first linear in this stage
            for local in stage:
                first = together.setdefault(local.rpartition(".")[0], local)
                one, other = (described.get((index, name), "left as it is") for name in (first, local))
                if one != other:
                    prefix = skeleton.block_prefix(index)
                    raise UsageError(
                        f"{prefix}.{first} ({one}) and {prefix}.{local} ({other}) read the same input and are run as one matrix by vLLM; "
                        "give them the same scheme, or leave all of them as they are"
                    )


def _check_length(seqlen: int, skeleton: Skeleton) -> None:
    longest = model_length(skeleton.config)
    if longest is not None and seqlen > longest:
        raise UsageError(f"seqlen {seqlen} is longer than the model's {longest} positions; use --seqlen {longest} or less")


def _notes(linears: Sequence[PlannedLinear], skeleton: Skeleton) -> list[str]:
    notes = []
    unused = skeleton.names.unmatched
    if unused:
        notes.append(f"copied as they are, since transformers' model has no use for them: {_list_names(unused)}")
    if any(not linear.scheme.symmetric for linear in linears):
        notes.append("asymmetric: vLLM reads it; transformers needs CompressedTensorsConfig(dequantize=True)")
    if any(linear.scheme.outliers is not None for linear in linears):
        notes.append("outlier columns: only ptqcli reads them, transformers refuses the file; their size is known only after calibration")
    notes += _activation_notes(linears)
    if any(linear.site.transposed for linear in linears):
        notes.append("Conv1D layers: ptqcli and vLLM read them from this format, transformers does not")
    others = ", ".join(sorted({linear.site.kind for linear in linears} - {"Linear", "Conv1D"}))
    if others and all(linear.scheme.activations is None for linear in linears):
        notes.append(f"{others} layers: transformers may need CompressedTensorsConfig(dequantize=True) to run them")
    elif others:
        notes.append(
            f"{others} layers: transformers cannot run them with 8-bit activations, and with dequantize=True it drops the rounding"
        )
    return notes


def _activation_notes(linears: Sequence[PlannedLinear]) -> list[str]:
    schemes = {linear.scheme: linear.scheme.activations for linear in linears if linear.scheme.activations is not None}
    notes = []
    if any(activations == ACTIVATION_SCALES["tensor"] for activations in schemes.values()):
        notes.append("activations scaled per tensor at run time: transformers and ptqcli compute them, vLLM does not")
    narrow = [scheme for scheme in schemes if scheme.bits < 8]
    if narrow:
        notes.append(f"{narrow[0].bits}-bit codes beside 8-bit activations take a byte each, so the file is no smaller than with --wbits 8")
    if any(scheme.bits != 4 or schemes[scheme] != ACTIVATION_SCALES["token"] for scheme in narrow):
        notes.append("of weights below 8 bits beside 8-bit activations, vLLM reads only 4 bits with --act-scales token")
    return notes


def _list_names(names: Sequence[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

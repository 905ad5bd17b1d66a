"""What config.json and quantize_config.json say of a GPTQ checkpoint, written for all of its readers and read from those of others.

One scheme stands in the entry itself; what differs from it, in ``dynamic``: a regular expression, matched from the start of a module's
name, behind ``+:`` (or nothing) with other ``bits``, ``group_size`` or ``sym``, or behind ``-:`` for what is not quantized. The first that
matches counts. GPTQModel, vLLM and SGLang read that; optimum, through which transformers loads the format, does not. It takes every linear
of the blocks for quantized but where ``modules_in_block_to_quantize`` names those that are, by the ends of their names, and so does vLLM
by any part of the name. So where something in the blocks stays as it is both are written, with whole names where blocks differ.

vLLM and SGLang look for the linears that they join (``joined``) under the name of the whole, so an expression for it is written, too.

Which linears are quantized in a file of another program is told by its tensors, not by these keys.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ptqcli.errors import PTQError, UsageError
from ptqcli.formats import LinearSpec
from ptqcli.formats.joined import JOINED
from ptqcli.numerics.scheme import SUPPORTED_BITS, WHOLE_ROW, Scheme
from ptqcli.patterns import found
from ptqcli.untrusted import shown

METHOD = "gptq"
V1, V2 = "gptq", "gptq_v2"  # values of checkpoint_format

# Where optimum looks for the blocks by itself.
KNOWN_BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers")
# What would change the layout of one module alone.
LAYOUT_KEYS = ("checkpoint_format", "format", "method", "pack_dtype", "quant_method")

_BLOCK = re.compile(r"(.+?)\.\d+\.(.+)")


def layout(config: Mapping[str, Any]) -> Any:
    """What ``config`` says of the layout: V1, V2 or another name. Without a word it is V1, as in AutoGPTQ."""
    return config.get("checkpoint_format") or config.get("format") or V1


def quantization_config(specs: Sequence[LinearSpec], untouched: Sequence[str], version: str) -> dict[str, Any]:
    """The entry of config.json, and all of quantize_config.json. version: V1 or V2. untouched: as in ``Format.describe``.

    Raises UsageError if nothing is quantized.
    """
    if not specs:
        raise UsageError("no linear layer is quantized, so there is nothing to describe")
    usual = Counter(spec.scheme for spec in specs).most_common(1)[0][0]
    entry: dict[str, Any] = {
        "quant_method": METHOD,
        "checkpoint_format": version,
        **_numbers(usual),
        "desc_act": any(spec.moving_groups for spec in specs),
        "lm_head": False,
        "pack_dtype": "int32",
    }
    blocks = _blocks(specs)
    if len(blocks) == 1 and blocks[0] not in KNOWN_BLOCKS:
        entry["block_name_to_quantize"] = blocks[0]
    skipped = skipped_inside(specs, untouched)
    others = [spec for spec in specs if spec.scheme != usual]
    dynamic = left_alone(skipped) | {
        f"+:^{re.escape(name)}$": _numbers(spec.scheme) for spec in others for name in _and_wholes(_every_name([spec]))
    }
    if dynamic:
        entry["dynamic"] = dynamic
    if skipped:
        entry["modules_in_block_to_quantize"] = [_named_by_ends(_every_name(specs), skipped)]
    return entry


def skipped_inside(specs: Sequence[LinearSpec], untouched: Sequence[str]) -> list[str]:
    """Those of ``untouched`` that stand in the blocks, which readers would take for quantized."""
    blocks = _blocks(specs)
    return [name for name in untouched if any(name.startswith(f"{block}.") for block in blocks)]


def left_alone(skipped: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What ``dynamic`` says of linears that are not quantized."""
    return {f"-:^{re.escape(name)}$": {} for name in _and_wholes(skipped)}


def _every_name(specs: Sequence[LinearSpec]) -> list[str]:
    return [name for spec in specs for name in (spec.name, *spec.aliases)]


def _blocks(specs: Sequence[LinearSpec]) -> list[str]:
    """The paths of the lists of blocks, by any name that readers may know."""
    return sorted({parts[1] for name in _every_name(specs) if (parts := _BLOCK.fullmatch(name))})


def _numbers(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}


def _and_wholes(names: Iterable[str]) -> Iterator[str]:
    """Each name, and that of the whole which servers make of the linear and its neighbours."""
    for name in names:
        yield name
        path, _, leaf = name.rpartition(".")
        yield from (f"{path}.{whole}" for whole, parts in JOINED.items() if leaf in parts)


def _named_by_ends(names: Sequence[str], skipped: Sequence[str]) -> list[str]:
    """What stands behind the number of the block in ``names``, or all of them if that is also the end of a name in ``skipped``."""
    ends = list(dict.fromkeys(parts[2] if (parts := _BLOCK.fullmatch(name)) else name for name in names))
    return list(names) if any(name.endswith(end) for name in skipped for end in ends) else ends


def schemes_of(config: Mapping[str, Any], version: str, quantized: Mapping[str, str]) -> dict[str, Scheme]:
    """The scheme of each linear in ``quantized``, paths in the model with stored names, all of which have codes in the file.

    Raises PTQError, naming the key, for what is not read: another layout than ``version``, other widths, a layout for one module alone.
    """
    try:
        return _schemes(config, version, quantized)
    except (TypeError, AttributeError, UsageError) as error:
        raise PTQError(f"quantization_config: {error}") from error


def _schemes(config: Mapping[str, Any], version: str, quantized: Mapping[str, str]) -> dict[str, Scheme]:
    told = {"checkpoint_format": layout(config), "is_marlin_format": config.get("is_marlin_format"), "pack_dtype": config.get("pack_dtype")}
    for key, read in (("checkpoint_format", (version,)), ("is_marlin_format", (None, False)), ("pack_dtype", (None, "int32"))):
        if told[key] not in read:
            raise PTQError(f"quantization_config: {key} {shown(told[key])} is not read; what is read: {V1} and {V2} in int32")
    usual = _scheme(config, Scheme(4, WHOLE_ROW), ("bits", "group_size"))
    overrides = _overrides(config.get("dynamic"), usual)
    places = list(dict.fromkeys([*quantized, *quantized.values()]))
    hits = found([pattern for pattern, _ in overrides], places, from_start=True)
    schemes = {}
    for name, stored in quantized.items():
        first = next((scheme for pattern, scheme in overrides if not hits[pattern].isdisjoint((name, stored))), usual)
        if first is None:
            raise PTQError(f"{name}: has codes in the file, but quantization_config says under dynamic that it is not quantized")
        schemes[name] = first
    return schemes


def _overrides(dynamic: Any, usual: Scheme) -> list[tuple[str, Scheme | None]]:
    """Patterns with what they select: another scheme, or None for what stays as it is."""
    if dynamic is not None and not isinstance(dynamic, Mapping):
        raise PTQError(f"quantization_config: dynamic is {shown(dynamic)}, not patterns with what they change")
    overrides: list[tuple[str, Scheme | None]] = []
    for pattern, changes in (dynamic or {}).items():
        if pattern.startswith("-:"):
            overrides.append((pattern[2:], None))
            continue
        if not isinstance(changes, Mapping) or not changes.keys().isdisjoint(LAYOUT_KEYS):
            raise PTQError(f"quantization_config: dynamic: {shown(pattern)} with {shown(changes)} is not read")
        overrides.append((pattern.removeprefix("+:"), _scheme(changes, usual)))
    return overrides


def _scheme(entry: Mapping[str, Any], usual: Scheme, needed: Sequence[str] = ()) -> Scheme:
    """``usual`` with what ``entry`` says otherwise."""
    bits, size, symmetric = entry.get("bits", usual.bits), entry.get("group_size", usual.group_size), entry.get("sym", usual.symmetric)
    for key in needed:
        if key not in entry:
            raise PTQError(f"quantization_config: lacks {key}")
    if type(bits) is not int or bits not in SUPPORTED_BITS:
        raise PTQError(f"quantization_config: bits {shown(bits)} are not read; what is read: {', '.join(map(str, SUPPORTED_BITS))}")
    if type(size) is not int or not (size == WHOLE_ROW or size > 0):
        raise PTQError(f"quantization_config: group_size {shown(size)} is not read; it is a number of columns, or -1 for whole rows")
    if type(symmetric) is not bool:
        raise PTQError(f"quantization_config: sym is {shown(symmetric)}, not true or false")
    return replace(usual, bits=bits, group_size=size, symmetric=symmetric)

"""``compressed-tensors``, format ``pack-quantized``: integer weights of 2, 3, 4 or 8 bits, read by transformers and vLLM as they are.

A linear ``m`` with ``W[out, in]`` and ``G`` groups is stored as

    m.weight_packed       int32 [out, ceil(in * bits / 32)]   codes, a bit string along each row (see ``bitstream``)
    m.weight_scale        float [out, G]                      in the model's dtype
    m.weight_shape        int64 [2]                           out, in
    m.weight_zero_point   int32 [ceil(out * bits / 32), G]    asymmetric only; a bit string down each column

and ``config.json`` says which module has which scheme. Zero points and codes are the unsigned ones of ``ptqcli.scheme``: the library
speaks of signed numbers but adds 2^(bits-1) to them before it packs.

What a reader would get silently wrong, and what is done about it here:

- Without ``quantization_status: compressed`` transformers loads random weights and only warns. It is always written, and a file
  without it is refused.
- Versions of the library before 0.18 packed 3-bit codes ten to a word, under the same names. Such a file has another width and is
  refused by name.
- A linear of class ``Conv1D`` (GPT-2) is passed over by compressed-tensors inside transformers, which then leaves it random with
  a warning. The entry for such a model carries a key that compressed-tensors does not know and therefore refuses, so that
  transformers stops with an error that shows the key.
- vLLM runs q, k and v, and gate and up, as one matrix and takes the first one's scheme for all.

Left out: activation quantization, the ``int-quantized`` format, floating-point weights, per-tensor scales (vLLM has none of them for
packed weights), and classic act-order with its ``weight_g_idx``, which the library dropped in 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ptqcli.errors import PTQError, UsageError
from ptqcli.formats import bitstream
from ptqcli.scheme import QuantizedWeight, Scheme

NAME = "compressed-tensors"
FORMAT = "pack-quantized"

# The version of the library whose layout is written. Older than 0.18 would announce the other layout of 3-bit codes.
LAYOUT_VERSION = "0.20.0"

# compressed-tensors fails on a key of a group that it does not know, and shows it; this one tells the reader what is the matter.
CONV1D_KEY = "conv1d_unknown_to_compressed_tensors"


def refusal(scheme: Scheme, in_features: int, out_features: int, moving_groups: bool = False) -> str | None:
    """Why this format cannot hold a matrix [out_features, in_features] in ``scheme``, or None if it can.

    moving_groups: the groups are not neighbouring columns (act-order without static groups), so that an index is needed.
    """
    if in_features < 1 or out_features < 1:
        return f"a matrix of {out_features} x {in_features} has no weights"
    if in_features % scheme.columns_per_group(in_features):
        return f"group size {scheme.group_size} does not divide its {in_features} input features"
    if moving_groups and scheme.group_size != -1:
        return f"act-order whose groups move needs a column index, which {NAME} cannot hold; use static groups"
    return None


def tensor_names(name: str, scheme: Scheme) -> tuple[str, ...]:
    """Names of the tensors that hold the linear ``name``, in the order of the module docstring."""
    names = (f"{name}.weight_packed", f"{name}.weight_scale", f"{name}.weight_shape")
    return names if scheme.symmetric else (*names, f"{name}.weight_zero_point")


def stored_linears(names: Iterable[str]) -> list[str]:
    """The linears that are stored in this format among the tensor ``names`` of a checkpoint."""
    return [name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed")]


def pack(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The stored tensors of the linear ``name``. Raises PTQError if the format cannot hold ``weight``."""
    out_features, in_features = weight.codes.shape
    scheme = weight.scheme
    reason = refusal(scheme, in_features, out_features, moving_groups=weight.g_idx is not None)
    if reason is not None:
        raise PTQError(f"{name}: {reason}")
    tensors = [
        bitstream.pack(weight.codes, scheme.bits),
        weight.scale.contiguous(),
        torch.tensor([out_features, in_features], dtype=torch.int64),
    ]
    if scheme.symmetric:
        if not bool((weight.zero == scheme.middle).all()):
            raise PTQError(f"{name}: a symmetric weight has zero points other than {scheme.middle}")
    else:
        tensors.append(bitstream.pack(weight.zero.t(), scheme.bits).t().contiguous())
    return dict(zip(tensor_names(name, scheme), tensors, strict=True))


def unpack(name: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedWeight:
    """Inverse of ``pack``: the linear ``name`` from stored tensors, which ``read`` returns by name.

    Raises PTQError, naming the tensor, when a dtype or shape does not fit ``scheme``; whatever ``read`` raises passes through.
    """
    packed, scale, shape = (read(stored) for stored in tensor_names(name, scheme)[:3])
    if shape.shape != (2,) or shape.dtype not in (torch.int32, torch.int64):
        raise PTQError(f"{name}.weight_shape: expected two integers, found {_describe(shape)}")
    out_features, in_features = shape.tolist()
    reason = refusal(scheme, in_features, out_features)
    if reason is not None:
        raise PTQError(f"{name}: {reason}")
    groups = scheme.group_count(in_features)
    _expect_words(f"{name}.weight_packed", packed, (out_features, bitstream.word_count(in_features, scheme.bits)))
    if tuple(scale.shape) != (out_features, groups) or not scale.is_floating_point():
        expected = f"floating {[out_features, groups]}"
        raise PTQError(f"{name}.weight_scale: expected {expected}, found {_describe(scale)}")
    codes = bitstream.unpack(packed, scheme.bits, in_features)
    if scheme.symmetric:
        return QuantizedWeight(codes, scale, torch.full(scale.shape, scheme.middle, dtype=torch.uint8), scheme)
    words = read(f"{name}.weight_zero_point")
    _expect_words(f"{name}.weight_zero_point", words, (bitstream.word_count(out_features, scheme.bits), groups))
    zero = bitstream.unpack(words.t(), scheme.bits, out_features).t().contiguous()
    return QuantizedWeight(codes, scale, zero, scheme)


def _expect_words(name: str, words: Tensor, shape: tuple[int, int]) -> None:
    if tuple(words.shape) != shape or words.dtype != torch.int32:
        raise PTQError(
            f"{name}: expected int32 {list(shape)}, found {_describe(words)}; "
            "the file is damaged or was packed by compressed-tensors before 0.18"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def quantization_config(schemes: Mapping[str, Scheme], ignored: Sequence[str], conv1d: bool = False) -> dict[str, Any]:
    """The ``quantization_config`` entry of config.json.

    schemes: the scheme of each quantized linear by module name. ignored: module names of all other linears, the output head too.
    conv1d: some quantized linears are ``Conv1D``, so that transformers has to be stopped. Raises UsageError if nothing is quantized.
    """
    if not schemes:
        raise UsageError("no linear layer is quantized, so there is nothing to describe")
    names: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        names.setdefault(scheme, []).append(name)
    # A class target reaches modules that vLLM has fused under a name of its own; with several schemes only names are exact.
    targets = {scheme: ["Linear"] if len(names) == 1 else listed for scheme, listed in names.items()}
    groups = {f"group_{number}": _group(scheme, targets[scheme], conv1d) for number, scheme in enumerate(names)}
    return {
        "quant_method": NAME,
        "format": FORMAT,
        "quantization_status": "compressed",
        "version": LAYOUT_VERSION,
        "config_groups": groups,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _group(scheme: Scheme, targets: list[str], conv1d: bool) -> dict[str, Any]:
    per_row = scheme.group_size == -1
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if per_row else "group",
        "group_size": None if per_row else scheme.group_size,
        "dynamic": False,
    }
    group = {
        "targets": targets,
        "format": FORMAT,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {**group, CONV1D_KEY: True} if conv1d else group


def schemes_of(config: Mapping[str, Any], linear_names: Iterable[str]) -> dict[str, Scheme]:
    """The scheme of each quantized linear, from a ``quantization_config`` entry written here or by llm-compressor.

    linear_names: module names of all linears of the model; those that no target reaches, or that ``ignore`` lists, are left out.
    Targets are an exact name, ``re:`` and a regular expression matched from the start of the name, or the class ``Linear``, and win
    in this order, as in compressed-tensors. Raises PTQError, naming the key, for everything that is not read.
    """
    try:
        _refuse_unread(config)
        targets = _targets(config)
        ignore = config.get("ignore") or []
        ordered = sorted(targets, key=lambda target: (target == "Linear", target.startswith("re:"), target))
        matched = {
            name: next((target for target in ordered if _matches(name, target)), None)
            for name in linear_names
            if not any(_matches(name, pattern) for pattern in ignore)
        }
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise PTQError(f"quantization_config is malformed: {error!r}") from error
    return {name: targets[target] for name, target in matched.items() if target is not None}


def _matches(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target in (name, "Linear")


def _refuse_unread(config: Mapping[str, Any]) -> None:
    method = config.get("quant_method")
    if method != NAME:
        raise PTQError(f"quantization_config: quant_method {method} is not read; expected {NAME}")
    status = config.get("quantization_status")
    if status != "compressed":
        raise PTQError(f"quantization_config: quantization_status is {status}; only 'compressed' files can be loaded")
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            raise PTQError(f"quantization_config: {key} is not supported")
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise PTQError(f"quantization_config: sparsity_config with format {sparsity['format']} is not supported")


def _targets(config: Mapping[str, Any]) -> dict[str, Scheme]:
    """Target -> scheme over all groups; of two groups with the same target the later one counts, as in compressed-tensors."""
    targets = {}
    for name, group in config["config_groups"].items():
        scheme = _group_scheme(name, group, config.get("format"))
        targets.update(dict.fromkeys(group["targets"], scheme))
    return targets


def _group_scheme(name: str, group: Any, default_format: str | None) -> Scheme:
    if not isinstance(group, Mapping):
        raise PTQError(f"quantization_config: {name} names a preset instead of its numbers, which is not read")
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise PTQError(f"quantization_config: {name} has {key}; only weight-only schemes are read")
    found = group.get("format") or default_format
    if found != FORMAT:
        raise PTQError(f"quantization_config: {name} has format {found}; only {FORMAT} is read")
    weights = group["weights"]
    for key, read in (("type", ("int",)), ("dynamic", (False, None)), ("actorder", (None, False, "weight", "static"))):
        if weights.get(key, read[0]) not in read:
            raise PTQError(f"quantization_config: {name} has weights with {key} {weights[key]}, which is not read")
    for key, kind in (("num_bits", int), ("symmetric", bool)):
        if not isinstance(weights.get(key, True), kind):
            raise PTQError(f"quantization_config: {name} has weights with {key} {weights[key]!r}, which is not read")
    try:
        return Scheme(weights["num_bits"], _group_size(name, weights), weights.get("symmetric", True))
    except UsageError as error:
        raise PTQError(f"quantization_config: {name}: {error}") from error


def _group_size(name: str, weights: Mapping[str, Any]) -> int:
    """Group size of a weights entry, -1 for whole rows; the strategy may be left out when the size tells it."""
    size = weights.get("group_size")
    strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(size, "group")
    if strategy == "channel":
        return -1
    if strategy == "group" and isinstance(size, int):
        return size
    raise PTQError(f"quantization_config: {name} has strategy {strategy}, group_size {size}, which is not read")

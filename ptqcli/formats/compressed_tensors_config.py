"""The ``quantization_config`` entry of config.json: which linear of a compressed-tensors checkpoint has which scheme.

Written as the library writes it, one group for each scheme, and read back from files of this program and of llm-compressor. What the
tensors look like is told in ``compressed_tensors``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ptqcli.errors import PTQError, UsageError
from ptqcli.numerics.scheme import WHOLE_MATRIX, WHOLE_ROW, ActivationScheme, OutlierSplit, Scheme
from ptqcli.patterns import found
from ptqcli.untrusted import one_line, shown

NAME = "compressed-tensors"
PACKED = "pack-quantized"
INTEGER = "int-quantized"
READ_AS_INTEGER = (INTEGER, "naive-quantized")  # the same tensors under an older name
MIXED = "mixed-precision"

# The version of the library whose layout is written. Older than 0.18 would announce the other layout of 3-bit codes.
LAYOUT_VERSION = "0.20.0"

# compressed-tensors fails on a key of a group that it does not know, and shows it; these tell the reader what is the matter.
CONV1D_KEY = "conv1d_unknown_to_compressed_tensors"
OUTLIERS_KEY = "outlier_columns_unknown_to_compressed_tensors"

GROUP_KEYS = {"targets", "format", "weights", "input_activations", "output_activations", CONV1D_KEY, OUTLIERS_KEY}


def stored_as(scheme: Scheme) -> str:
    """The library's name for the way in which ``scheme`` is stored."""
    return PACKED if scheme.activations is None else INTEGER


def quantization_config(
    schemes: Mapping[str, Scheme], ignored: Sequence[str], conv1d: bool = False, outside: Sequence[str] = ()
) -> dict[str, Any]:
    """The ``quantization_config`` entry of config.json.

    schemes: the scheme of each quantized linear by module name. ignored: module names of all other matrices, the output head too.
    conv1d: some quantized linears are ``Conv1D``, so that transformers has to be stopped. outside: those in no block.
    Raises UsageError if nothing is quantized,
    PTQError if a name stands for a quantized linear in one class of readers and for another matrix elsewhere.
    """
    if not schemes:
        raise UsageError("no linear layer is quantized, so there is nothing to describe")
    for name in sorted(schemes.keys() & set(ignored)):
        raise PTQError(f"{name}: is quantized in one of the classes that read the file and is not in another; {NAME} cannot say so")
    names: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        names.setdefault(scheme, []).append(name)
    # A class target reaches modules that vLLM has fused under a name of its own; with several schemes only names are exact. Head and
    # embedding are of other classes there.
    targets = {scheme: ["Linear", *outside] if len(names) == 1 else listed for scheme, listed in names.items()}
    groups = {f"group_{number}": _group(scheme, targets[scheme], conv1d) for number, scheme in enumerate(names)}
    formats = {stored_as(scheme) for scheme in names}
    return {
        "quant_method": NAME,
        "format": formats.pop() if len(formats) == 1 else MIXED,
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
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": {WHOLE_ROW: "channel", WHOLE_MATRIX: "tensor"}.get(scheme.group_size, "group"),
        "group_size": scheme.group_size if scheme.group_size > 0 else None,
        "dynamic": False,
    }
    group: dict[str, Any] = {
        "targets": targets,
        "format": stored_as(scheme),
        "weights": weights,
        "input_activations": None if scheme.activations is None else _input_entry(scheme.activations),
        "output_activations": None,
    }
    if conv1d:
        group[CONV1D_KEY] = True
    if scheme.outliers is not None:
        group[OUTLIERS_KEY] = {"threshold": scheme.outliers.threshold, "dynamic": scheme.outliers.dynamic}
    return group


def _input_entry(activations: ActivationScheme) -> dict[str, Any]:
    return {
        "num_bits": activations.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "token" if activations.per_token else "tensor",
        "group_size": None,
        "dynamic": activations.dynamic,
    }


def schemes_of(config: Mapping[str, Any], linear_names: Iterable[str]) -> dict[str, Scheme]:
    """The scheme of each quantized linear, from a ``quantization_config`` entry written here or by llm-compressor.

    linear_names: module names of all linears of the model; those that no target reaches, or that ``ignore`` lists, are left out.
    Targets are an exact name, ``re:`` and a regular expression matched from the start of the name, or the class ``Linear``, and win
    in this order, as in compressed-tensors. Raises PTQError, naming the key, for everything that is not read.
    """
    try:
        _refuse_unread(config)
        targets, names = _targets(config), list(linear_names)
        ignored = set().union(*_reached(_strings(config.get("ignore") or [], "ignore"), names).values())
        ordered = sorted(targets, key=lambda target: (target == "Linear", target.startswith("re:"), target))
        reached = _reached(ordered, names)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise PTQError(f"quantization_config is malformed: {type(error).__name__}: {one_line(error)}") from error
    except UsageError as error:
        raise PTQError(f"quantization_config: {error}") from error
    target_of = {name: target for target in reversed(ordered) for name in reached[target]}
    return {name: targets[target_of[name]] for name in names if name in target_of and name not in ignored}


def _reached(targets: Iterable[str], names: Sequence[str]) -> dict[str, frozenset[str]]:
    """Which of ``names`` each target reaches."""
    listed = list(targets)
    hits = found([target.removeprefix("re:") for target in listed if target.startswith("re:")], names, from_start=True)
    exact = {"Linear": frozenset(names), **{name: frozenset([name]) for name in names}}
    return {target: hits[target[3:]] if target.startswith("re:") else exact.get(target, frozenset()) for target in listed}


def _strings(value: Any, key: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise PTQError(f"quantization_config: {key} is {shown(value)}, not a list of names")
    return value


def _refuse_unread(config: Mapping[str, Any]) -> None:
    status = config.get("quantization_status")
    if status != "compressed":
        raise PTQError(f"quantization_config: quantization_status is {shown(status)}; only 'compressed' files can be loaded")
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            raise PTQError(f"quantization_config: {key} is not supported")
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise PTQError(f"quantization_config: sparsity_config with format {shown(sparsity['format'])} is not supported")


def _targets(config: Mapping[str, Any]) -> dict[str, Scheme]:
    """Target -> scheme over all groups; of two groups with the same target the later one counts, as in compressed-tensors."""
    targets = {}
    for name, group in config["config_groups"].items():
        if not isinstance(group, Mapping):
            raise PTQError(f"quantization_config: {name}: names a preset instead of its numbers, which is not read")
        try:
            scheme = _group_scheme(group, group.get("format") or config.get("format"))
        except (PTQError, UsageError) as error:
            raise PTQError(f"quantization_config: {name}: {error}") from error
        targets.update(dict.fromkeys(_strings(group["targets"], f"{name}: targets"), scheme))
    return targets


def _group_scheme(group: Mapping[str, Any], layout: str | None) -> Scheme:
    unknown = sorted(group.keys() - GROUP_KEYS)
    if unknown:
        raise PTQError(f"the key {unknown[0]} is not read")
    if group.get("output_activations") is not None:
        raise PTQError("output_activations are not read")
    weights = group["weights"]
    _expect("weights", weights, type=("int",), dynamic=(False, None), actorder=(None, False, "weight", "static"))
    _expect("weights", weights, symmetric=(True, False))
    if type(weights["num_bits"]) is not int:
        raise PTQError(f"weights with num_bits {shown(weights['num_bits'])} are not read")
    activations = _activations(group.get("input_activations"))
    if layout == PACKED:
        if activations is not None:
            raise PTQError(f"input_activations are read in format {INTEGER}, not in {PACKED}")
        return Scheme(weights["num_bits"], _group_size(weights, ("channel", "group")), weights.get("symmetric", True))
    if layout not in READ_AS_INTEGER:
        raise PTQError(f"format {shown(layout)} is not read; expected {PACKED} or {INTEGER}")
    if activations is None:
        raise PTQError(f"format {layout} without input_activations is not read; expected {PACKED}")
    _expect("weights beside input_activations", weights, symmetric=(True,))
    split = group.get(OUTLIERS_KEY)
    outliers = None
    if split is not None:
        if type(split["threshold"]) not in (int, float) or type(split["dynamic"]) is not bool:
            raise PTQError(f"{OUTLIERS_KEY} is {shown(split)}, which is not read")
        outliers = OutlierSplit(split["threshold"], split["dynamic"])
    return Scheme(weights["num_bits"], _group_size(weights, ("channel", "tensor")), True, activations, outliers)


def _activations(entry: Mapping[str, Any] | None) -> ActivationScheme | None:
    if entry is None:
        return None
    what = "input_activations"
    _expect(what, entry, num_bits=(8,), type=("int",), symmetric=(True,), dynamic=(False, True), actorder=(None, False))
    _expect(what, entry, strategy=("tensor", "token", None))
    return ActivationScheme(8, entry.get("strategy") == "token", entry.get("dynamic", False))


def _group_size(weights: Mapping[str, Any], read: tuple[str, str]) -> int:
    """Group size of a weights entry whose strategy is among ``read``; the strategy may be left out when the size tells it."""
    size = weights.get("group_size")
    strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(size, "group")
    if strategy in read and strategy != "group":
        return WHOLE_ROW if strategy == "channel" else WHOLE_MATRIX
    if strategy in read and type(size) is int and size > 0:
        return size
    raise PTQError(f"weights with strategy {shown(strategy)}, group_size {shown(size)} are not read here")


def _expect(what: str, entry: Mapping[str, Any], **read: tuple[Any, ...]) -> None:
    """Each value of ``entry`` is among those given, of the same type; left out, it is the first of them, as in the library."""
    for key, values in read.items():
        given = entry.get(key, values[0])
        if not any(given == value and type(given) is type(value) for value in values):
            raise PTQError(f"{what} with {key} {shown(given)} are not read")

"""``awq``: 4-bit weights as AutoAWQ lays them out for its matrix product (GEMM); read, too, as it lays them out for vectors (GEMV).

A linear ``m`` with ``W[out, in]`` and ``G`` groups is stored as

    m.qweight   int32 [in, out / 8]   codes along each row, eight to a word in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up
    m.qzeros    int32 [G, out / 8]    zero points, in the same order
    m.scales    float [G, out]        float16, or bfloat16 in a bfloat16 model

    w[o, i] = (code[i, o] - zero[i // g, o]) * scales[i // g, o]

Zero points are stored as they are. A symmetric weight has 8 everywhere, and is told by that when it is read: ``zero_point`` in the
configuration is true for both, since vLLM has its fast kernels for that only.

GEMV files (``awq_gemv``) have ``qweight`` [out, in / 8], ``qzeros`` [out, words] and ``scales`` [out, 8 * words] in the plain order of
``bitstream``, with so many words that all groups have room and more, as their kernel wants it. Few programs read them; none is written.

One group size holds for the whole file; what stays as it is, stands in ``modules_to_not_convert``, which servers take for parts of names,
and in the blocks also under ``dynamic`` (``gptq_config``).

Left out: other widths, which AutoAWQ does not have; files repacked for Marlin and the layout ``gemv_fast``; refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ptqcli.checkpoint.tensors import TensorSource
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats import Format, LinearSpec, Reader, awq_readers, bitstream, gptq_config, joined
from ptqcli.formats.stored import DAMAGED, describe, expect_floats, expect_scales, expect_words, expect_writable, reach
from ptqcli.numerics.scheme import WHOLE_ROW, Scheme
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.untrusted import shown

METHOD = "awq"
GEMM, GEMV = "gemm", "gemv"
BITS = 4
IN_WORD = 8  # elements
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BACK = (0, 4, 1, 5, 2, 6, 3, 7)  # the inverse of ORDER
MIDDLES = -0x77777778  # a word of eights, 0x88888888


class Awq(Format):
    """The format (``ptqcli.formats.Format``), for matrix products."""

    name = "awq"
    packages: Mapping[str, str] = {"gptqmodel": "loads the checkpoints, by itself or for transformers; ptq itself does not need it"}
    version = GEMM

    def scale_dtype(self, weights: torch.dtype, scheme: Scheme) -> torch.dtype:
        """float16, in which readers look for scales, unless the model is bfloat16."""
        return torch.float16 if weights == torch.float32 else weights

    def refusal(self, spec: LinearSpec) -> str | None:
        """Why this format cannot hold a linear, or None if it can."""
        return _refusal(spec.scheme, spec.out_features, spec.in_features, spec.moving_groups)

    def fused_refusal(self, group: Mapping[str, Scheme | None]) -> str | None:
        """Why linears that read one tensor inside one module cannot differ as they do, or None if all is well."""
        return joined.fused_refusal(group)

    def joint_refusal(self, specs: Sequence[LinearSpec], untouched: Sequence[str]) -> str | None:
        """Why linears, each of which this format can hold, cannot stand in one file, or None if they can."""
        sizes = {spec.scheme.group_size: spec.name for spec in specs}
        if len(sizes) > 1:
            told = " and ".join(f"{size} ({name})" for size, name in list(sizes.items())[:2])
            return f"awq has one group size for all linears, not {told}; give one, or --format gptq"
        names = [name for spec in specs for name in (spec.name, *spec.aliases)]
        for plain in untouched:
            other = next((name for name in names if plain in name), None)
            if other is not None:
                return f"readers of awq files would leave {other} as it is, like {plain}, which its name holds; give --format gptq"
        return None

    def notes(self, specs: Sequence[LinearSpec]) -> list[str]:
        """What a user should know of the readers of such linears, one sentence each."""
        return awq_readers.notes(specs)

    def readers(self, specs: Sequence[LinearSpec], auto_class: str, tried: Sequence[str]) -> list[Reader]:
        """transformers, GPTQModel, vLLM and SGLang."""
        return awq_readers.readers(specs, auto_class)

    def stored_bytes(self, spec: LinearSpec) -> int:
        """Bytes of a linear's stored tensors."""
        rows, columns, groups = spec.out_features, spec.in_features, spec.scheme.group_count(spec.in_features)
        return rows * (columns + groups) // 2 + groups * rows * spec.scale_dtype.itemsize

    def tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """Names of the tensors that hold the linear ``name``, in the order of the module docstring."""
        return tuple(f"{name}.{leaf}" for leaf in ("qweight", "qzeros", "scales"))

    def pack(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The stored tensors of the linear ``name``. Raises PTQError if the format cannot hold ``weight``."""
        out_features, in_features = weight.codes.shape
        reason = _refusal(weight.scheme, out_features, in_features, weight.g_idx is not None)
        if reason is not None:
            raise PTQError(f"{name}: {reason}")
        expect_writable(name, weight)
        tensors = _interleaved(weight.codes.t()), _interleaved(weight.zero.t()), weight.scale.t().contiguous()
        return dict(zip(self.tensor_names(name, weight.scheme), tensors, strict=True))

    def unpack(self, name: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedWeight:
        """Inverse of ``pack``: the linear ``name`` from stored tensors, which ``read`` returns by name.

        Raises PTQError, naming the tensor, when a dtype or a shape does not fit ``scheme``; what ``read`` raises passes through.
        """
        words = _expect_matrix(f"{name}.qweight", read(f"{name}.qweight"))
        in_features, out_features = words.shape[0], words.shape[1] * IN_WORD
        groups = _groups(name, scheme, out_features, in_features)
        scale, zeros = read(f"{name}.scales"), read(f"{name}.qzeros")
        expect_scales(f"{name}.scales", scale, (groups, out_features), reach(scheme))
        expect_words(f"{name}.qzeros", zeros, (groups, out_features // IN_WORD))
        return _weight(name, _in_order(words).t().contiguous(), scale.t().contiguous(), _in_order(zeros).t().contiguous(), scheme)

    def describe(self, specs: Sequence[LinearSpec], untouched: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The entry of config.json, and quantize_config.json, which says the same. Raises UsageError if nothing is quantized."""
        if not specs:
            raise UsageError("no linear layer is quantized, so there is nothing to describe")
        entry: dict[str, Any] = {
            "quant_method": METHOD,
            "bits": BITS,
            "group_size": specs[0].scheme.group_size,
            "zero_point": True,
            "version": GEMM,
            "modules_to_not_convert": list(untouched) or None,
        }
        skipped = gptq_config.skipped_inside(specs, untouched)
        if skipped:
            entry["dynamic"] = gptq_config.left_alone(skipped)  # GPTQModel looks nowhere else, and would leave random numbers there
        return {"config.json": {"quantization_config": entry}, "quantize_config.json": entry}

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether an entry of config.json, or a file of its own, is of this layout; old files of AutoAWQ name no method."""
        method = config.get("quant_method") or (METHOD if "w_bit" in config else None)
        return method == METHOD and (_layout(config) == GEMV) == (self.version == GEMV)

    def schemes(self, config: Mapping[str, Any], tensors: TensorSource, linears: Mapping[str, str]) -> dict[str, Scheme]:
        """The scheme of each linear among ``linears`` that has codes among ``tensors``, whose zero points are looked at.

        Raises PTQError, naming the key, for everything that is not read.
        """
        size, names = self._group_size(config), set(tensors.names)
        quantized = set(self.stored_linears(names))
        symmetric = {stored: f"{stored}.qzeros" in names and _all_eights(tensors.read(f"{stored}.qzeros")) for stored in quantized}
        return {name: Scheme(BITS, size, symmetric[stored]) for name, stored in linears.items() if stored in quantized}

    def stored_linears(self, names: Iterable[str]) -> list[str]:
        """The quantized linears among the tensor ``names`` of a checkpoint."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in names if name.endswith((".qweight", ".qzeros"))))

    def _group_size(self, config: Mapping[str, Any]) -> int:
        bits, size, layout = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size")), _layout(config)
        if layout != self.version:
            raise PTQError(f"quantization_config: version {shown(layout)} is not read; what is read: {GEMM} and {GEMV}")
        if type(bits) is not int or bits != BITS:
            raise PTQError(f"quantization_config: bits {shown(bits)} are not read; AWQ has {BITS}")
        if type(size) is not int or not (size == WHOLE_ROW or size > 0):
            raise PTQError(f"quantization_config: group_size {shown(size)} is not read; it is a number of columns, or -1 for whole rows")
        dynamic = config.get("dynamic")
        if dynamic and not (isinstance(dynamic, Mapping) and all(pattern.startswith("-:") for pattern in dynamic)):
            raise PTQError(f"quantization_config: dynamic {shown(dynamic)} is not read; AWQ files have one scheme")
        return size


class AwqGemv(Awq):
    """The layout for products with one vector, which is read only."""

    name = "awq_gemv"
    version = GEMV

    def refusal(self, spec: LinearSpec) -> str | None:
        """It is not written."""
        return "awq_gemv is read, not written; give --format awq"

    def pack(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Raises PTQError: it is not written."""
        raise PTQError(f"{name}: awq_gemv is read, not written; give --format awq")

    def unpack(self, name: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedWeight:
        """As ``Awq.unpack``, from the layout for vectors."""
        words = _expect_matrix(f"{name}.qweight", read(f"{name}.qweight"))
        out_features, in_features = words.shape[0], words.shape[1] * IN_WORD
        groups = _groups(name, scheme, out_features, in_features)
        scale, zeros = read(f"{name}.scales"), _expect_matrix(f"{name}.qzeros", read(f"{name}.qzeros"))
        width = max(zeros.shape[1], bitstream.word_count(groups, BITS))
        expect_words(f"{name}.qzeros", zeros, (out_features, width))
        expect_floats(f"{name}.scales", scale, (out_features, width * IN_WORD))
        scale = scale[:, :groups].contiguous()
        expect_scales(f"{name}.scales", scale, (out_features, groups), reach(scheme))
        zero = bitstream.unpack(zeros, BITS, groups)
        return _weight(name, bitstream.unpack(words, BITS, in_features), scale, zero, scheme)


AWQ, AWQ_GEMV = Awq(), AwqGemv()


def _layout(config: Mapping[str, Any]) -> Any:
    """What ``config`` says of the layout, in small letters; without a word it is GEMM."""
    found = config.get("version") or config.get("checkpoint_format") or config.get("format") or GEMM
    return found.lower() if isinstance(found, str) else found


def _refusal(scheme: Scheme, out_features: int, in_features: int, moving_groups: bool = False) -> str | None:
    """Why no file of this format can hold a matrix [out_features, in_features] in ``scheme``, or None."""
    if scheme.activations is not None or scheme.bits != BITS:
        return f"awq holds 4-bit weights with activations of 16 bits, not {scheme}; give --format compressed-tensors"
    if in_features < 1 or out_features < 1 or out_features % IN_WORD:
        return f"awq packs multiples of {IN_WORD} outputs, not {out_features}; use --ignore, or --format compressed-tensors"
    if in_features % scheme.columns_per_group(in_features):
        return f"group size {scheme.group_size} does not divide its {in_features} input features"
    if moving_groups and scheme.group_size > 0:
        return "act-order whose groups move needs a column index, which awq cannot hold; use static groups, or --format gptq"
    return None


def _groups(name: str, scheme: Scheme, out_features: int, in_features: int) -> int:
    """Groups in a row of a stored matrix. Raises PTQError if there is no such matrix in ``scheme``."""
    reason = _refusal(scheme, out_features, in_features)
    if reason is not None:
        raise PTQError(f"{name}: {reason}")
    return scheme.group_count(in_features)


def _expect_matrix(name: str, words: Tensor) -> Tensor:
    if words.dim() != 2 or words.dtype != torch.int32:
        raise PTQError(f"{name}: expected an int32 matrix, found {describe(words)}; {DAMAGED}")
    return words


def _interleaved(values: Tensor) -> Tensor:
    """uint8 [rows, columns] as int32 [rows, columns / 8], the elements of each word in ORDER."""
    rows, columns = values.shape
    return bitstream.pack(values.reshape(rows, -1, IN_WORD)[:, :, ORDER].reshape(rows, columns), BITS)


def _in_order(words: Tensor) -> Tensor:
    """Inverse of ``_interleaved``."""
    rows, width = words.shape
    return bitstream.unpack(words, BITS, width * IN_WORD).view(rows, -1, IN_WORD)[:, :, BACK].reshape(rows, -1)


def _weight(name: str, codes: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> QuantizedWeight:
    if scheme.symmetric and not bool((zero == scheme.middle).all()):
        raise PTQError(f"{name}.qzeros: holds zero points other than {scheme.middle}, and its scheme is symmetric; {DAMAGED}")
    return QuantizedWeight(codes=codes, scale=scale, zero=zero, scheme=scheme)


def _all_eights(words: Tensor) -> bool:
    """Whether every zero point in ``words`` is 8, that of a symmetric scheme."""
    return bool((words == MIDDLES).all())

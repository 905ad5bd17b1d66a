"""``gptq`` and ``gptq_v2``: integer weights as AutoGPTQ wrote them first and GPTQModel writes them now.

A linear ``m`` with ``W[out, in]`` and ``G`` groups, of 2, 3, 4 or 8 bits, is stored as

    m.qweight   int32 [in * bits / 32, out]   codes, a bit string down each column (see ``bitstream``)
    m.qzeros    int32 [G, out * bits / 32]    zero points, a bit string along each row; version 1 stores them less one
    m.scales    float [G, out]                float16, or bfloat16 in a bfloat16 model
    m.g_idx     int32 [in]                    group of each column; left out, groups are neighbouring columns

    w[o, i] = (code[i, o] - zero[g_idx[i], o]) * scales[g_idx[i], o]

so that act-order whose groups move (``desc_act``) keeps its columns where they were. With equal codes ``qweight`` is the transpose of
compressed-tensors' ``weight_packed``.

Version 1 holds zero points from 1 on: what becomes of 0 differs from writer to writer, and what a reader makes of it as well. Symmetric
schemes, whose zero points are 2^(bits-1), are written so; those with zero points in version 2, which stores them as they are. Files of
others in version 1 are read as GPTQModel reads them: 1 is added to every zero point at once, as to one number a word, so that what one
writer's subtraction borrowed from the next element is given back; at 3 bits, where elements cross words, to each by itself.

GPTQModel alone reads all of this; ``gptq_readers`` says what the others take.

Left out: 5, 6 and 7 bits and the planar layout ``gptq_p`` of GPTQModel, and files repacked for Marlin, all of which are refused by name;
and matrices that are no multiple of 32 in both directions, whose ends no reader pads alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ptqcli.checkpoint.tensors import TensorSource
from ptqcli.errors import PTQError
from ptqcli.formats import Format, LinearSpec, Reader, bitstream, gptq_config, gptq_readers, joined
from ptqcli.formats.gptq_config import V1, V2
from ptqcli.formats.stored import DAMAGED, describe, expect_scales, expect_words, expect_writable, reach
from ptqcli.numerics.scheme import SUPPORTED_BITS, Scheme
from ptqcli.numerics.weight import QuantizedWeight

MULTIPLE = 32  # of inputs and outputs


class Gptq(Format):
    """The format (``ptqcli.formats.Format``) in one of its versions, V1 or V2."""

    packages: Mapping[str, str] = {
        "gptqmodel": "loads the checkpoints, by itself or for transformers; ptq itself does not need it",
        "optimum": "lets transformers load the checkpoints",
    }
    optional = ("g_idx",)

    def __init__(self, version: str) -> None:
        self.name = version

    def scale_dtype(self, weights: torch.dtype, scheme: Scheme) -> torch.dtype:
        """float16, in which readers look for scales, unless the model is bfloat16."""
        return torch.float16 if weights == torch.float32 else weights

    def refusal(self, spec: LinearSpec) -> str | None:
        """Why this format cannot hold a linear, or None if it can."""
        return self._refusal(spec.scheme, spec.out_features, spec.in_features)

    def fused_refusal(self, group: Mapping[str, Scheme | None]) -> str | None:
        """Why linears that read one tensor inside one module cannot differ as they do, or None if all is well."""
        return joined.fused_refusal(group)

    def notes(self, specs: Sequence[LinearSpec]) -> list[str]:
        """What a user should know of the readers of such linears, one sentence each."""
        return gptq_readers.notes(specs)

    def readers(self, specs: Sequence[LinearSpec], auto_class: str, tried: Sequence[str]) -> list[Reader]:
        """transformers, GPTQModel, vLLM and SGLang."""
        return gptq_readers.readers(specs, auto_class)

    def stored_bytes(self, spec: LinearSpec) -> int:
        """Bytes of a linear's stored tensors."""
        rows, columns, bits, groups = spec.out_features, spec.in_features, spec.scheme.bits, spec.scheme.group_count(spec.in_features)
        return (rows * columns + groups * rows) * bits // 8 + groups * rows * spec.scale_dtype.itemsize + 4 * columns

    def tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """Names of the tensors that hold the linear ``name``, in the order of the module docstring."""
        return tuple(f"{name}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx"))

    def pack(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The stored tensors of the linear ``name``. Raises PTQError if the format cannot hold ``weight``."""
        scheme, (out_features, in_features) = weight.scheme, weight.codes.shape
        reason = self._refusal(scheme, out_features, in_features)
        if reason is not None:
            raise PTQError(f"{name}: {reason}")
        expect_writable(name, weight)
        zero = weight.zero - 1 if self.name == V1 else weight.zero
        groups = _neighbours(in_features, weight.scale.shape[1]) if weight.g_idx is None else weight.g_idx
        tensors = (
            bitstream.pack(weight.codes, scheme.bits).t().contiguous(),
            bitstream.pack(zero.t().contiguous(), scheme.bits),
            weight.scale.t().contiguous(),
            groups,
        )
        return dict(zip(self.tensor_names(name, scheme), tensors, strict=True))

    def unpack(self, name: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedWeight:
        """Inverse of ``pack``: the linear ``name`` from stored tensors, which ``read`` returns by name.

        Raises PTQError, naming the tensor, when a dtype, a shape or a value does not fit ``scheme``; what ``read`` raises passes through.
        """
        words = read(f"{name}.qweight")
        if words.dim() != 2 or words.dtype != torch.int32 or words.shape[0] % scheme.bits:
            raise PTQError(f"{name}.qweight: expected int32 [in * {scheme.bits} / 32, out], found {describe(words)}; {DAMAGED}")
        in_features, out_features = words.shape[0] // scheme.bits * 32, words.shape[1]
        reason = _no_place(scheme, out_features, in_features)
        if reason is not None:
            raise PTQError(f"{name}: {reason}")
        groups = scheme.group_count(in_features)
        scale, zeros = read(f"{name}.scales"), read(f"{name}.qzeros")
        expect_scales(f"{name}.scales", scale, (groups, out_features), reach(scheme))
        expect_words(f"{name}.qzeros", zeros, (groups, out_features * scheme.bits // 32))
        zero = _zero_points(zeros, scheme.bits, out_features, self.name).t().contiguous()
        if scheme.symmetric and not bool((zero == scheme.middle).all()):
            raise PTQError(f"{name}.qzeros: holds zero points other than {scheme.middle}, and quantization_config says sym; {DAMAGED}")
        return QuantizedWeight(
            codes=bitstream.unpack(words.t(), scheme.bits, in_features),
            scale=scale.t().contiguous(),
            zero=zero,
            scheme=scheme,
            g_idx=_group_index(f"{name}.g_idx", read, in_features, groups),
        )

    def describe(self, specs: Sequence[LinearSpec], untouched: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The entry of config.json, and quantize_config.json, which says the same. Raises UsageError if nothing is quantized."""
        entry = gptq_config.quantization_config(specs, untouched, self.name)
        return {"config.json": {"quantization_config": entry}, "quantize_config.json": entry}

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether an entry of config.json, or a quantize_config.json, is of this version; files of AutoGPTQ name no method."""
        method = config.get("quant_method") or (gptq_config.METHOD if "desc_act" in config else None)
        return method == gptq_config.METHOD and (gptq_config.layout(config) == V2) == (self.name == V2)

    def schemes(self, config: Mapping[str, Any], tensors: TensorSource, linears: Mapping[str, str]) -> dict[str, Scheme]:
        """The scheme of each linear among ``linears`` that has codes among ``tensors``.

        Raises PTQError, naming the key, for everything that is not read.
        """
        quantized = set(self.stored_linears(tensors.names))
        return gptq_config.schemes_of(config, self.name, {name: stored for name, stored in linears.items() if stored in quantized})

    def stored_linears(self, names: Iterable[str]) -> list[str]:
        """The quantized linears among the tensor ``names`` of a checkpoint."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in names if name.endswith((".qweight", ".qzeros"))))

    def _refusal(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        if self.name == V1 and not scheme.symmetric:
            return f"version 1 of the format has no place for zero points of 0; give --format {V2}, or --sym"
        return _no_place(scheme, out_features, in_features)


GPTQ, GPTQ_V2 = Gptq(V1), Gptq(V2)


def _no_place(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why no file of this format can hold a matrix [out_features, in_features] in ``scheme``, or None."""
    if scheme.activations is not None:
        return "gptq holds weights with activations of 16 bits; give --abits 16, or --format compressed-tensors"
    if scheme.bits not in SUPPORTED_BITS:
        return f"gptq holds {', '.join(map(str, SUPPORTED_BITS))} bits, not {scheme.bits}; give --format compressed-tensors"
    if in_features < 1 or out_features < 1 or in_features % MULTIPLE or out_features % MULTIPLE:
        shape = f"{out_features} outputs and {in_features} inputs"
        return f"gptq packs multiples of {MULTIPLE}, not {shape}; leave it as it is (--ignore), or give --format compressed-tensors"
    if in_features % scheme.columns_per_group(in_features):
        return f"group size {scheme.group_size} does not divide its {in_features} input features"
    return None


def _neighbours(columns: int, groups: int) -> Tensor:
    """Group of each column where groups are neighbouring columns, int32 [columns]."""
    return torch.arange(columns, dtype=torch.int32) // (columns // groups)


def _zero_points(words: Tensor, bits: int, out_features: int, version: str) -> Tensor:
    """Zero points [G, out] from int32 [G, out * bits / 32]."""
    if version == V2:
        return bitstream.unpack(words, bits, out_features)
    if bits == 3:
        return (bitstream.unpack(words, bits, out_features) + 1) % 8
    ones = bitstream.pack(torch.ones(1, out_features, dtype=torch.uint8), bits)
    return bitstream.unpack(words + ones, bits, out_features)  # a word that overflows wraps around


def _group_index(name: str, read: Callable[[str], Tensor], columns: int, groups: int) -> Tensor | None:
    """The stored group of each column, None where groups are neighbours. Raises PTQError unless all groups are of one size."""
    try:
        index = read(name)
    except LookupError:
        return None
    if tuple(index.shape) != (columns,) or index.dtype != torch.int32:
        raise PTQError(f"{name}: expected int32 {[columns]}, found {describe(index)}; {DAMAGED}")
    smallest, largest = map(int, index.aminmax())
    if smallest < 0 or largest >= groups:
        raise PTQError(f"{name}: holds {smallest if smallest < 0 else largest}, but there are the groups 0 to {groups - 1}; {DAMAGED}")
    sizes = index.bincount(minlength=groups)
    if not bool((sizes == columns // groups).all()):
        raise PTQError(f"{name}: gives group {int(sizes.argmax())} {int(sizes.max())} columns, not {columns // groups}; {DAMAGED}")
    return None if torch.equal(index, _neighbours(columns, groups)) else index

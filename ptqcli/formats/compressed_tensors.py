"""``compressed-tensors``: integer weights as transformers and vLLM read them, in two of the library's formats.

``pack-quantized`` holds weight-only schemes, 2 to 8 bits. A linear ``m`` with ``W[out, in]`` and ``G`` groups is stored as

    m.weight_packed       int32 [out, ceil(in * bits / 32)]   codes, a bit string along each row (see ``bitstream``)
    m.weight_scale        float [out, G]                      in the model's dtype
    m.weight_shape        int64 [2]                           out, in
    m.weight_zero_point   int32 [ceil(out * bits / 32), G]    asymmetric only; a bit string down each column

``int-quantized`` holds schemes whose activations are 8-bit integers, too:

    m.weight              int8 [out, in]                      signed codes, one a byte at every width
    m.weight_scale        float [out, 1], or [1]              per row, or for the whole matrix (group size 0)
    m.input_scale         float [1]                           static activations only
    m.outlier_index       int32 [k]                           outlier split only: columns in 16 bit, rising; k may be 0
    m.outlier_weight      float [out, k]                      their values, in the model's dtype

``config.json`` says which module has which scheme (``compressed_tensors_config``). Signed numbers are the unsigned ones of
``ptqcli.numerics.scheme`` less 2^(bits-1); before it packs, the library adds that again, so that packed words hold the unsigned ones.
``m.weight_scale`` marks a quantized linear in both formats; ``m.weight`` alone is that of a plain one.

What its readers get wrong, and what is done about it, stands in ``compressed_tensors_readers``.

Left out: weight-only ``int-quantized``, which vLLM has no kernel for; asymmetric activations; packed weights with activations or with one
scale per tensor, the latter unknown to vLLM; floating-point weights; and classic act-order with its ``weight_g_idx``, which the
library dropped in 0.19.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptqcli.checkpoint.tensors import TensorSource
from ptqcli.errors import PTQError
from ptqcli.formats import Format, LinearSpec, Reader, bitstream, compressed_tensors_config, compressed_tensors_readers, joined
from ptqcli.formats.compressed_tensors_config import NAME
from ptqcli.formats.stored import DAMAGED, describe, expect_floats, expect_scales, expect_words, expect_writable, middle, reach
from ptqcli.numerics.scheme import WHOLE_MATRIX, Scheme
from ptqcli.numerics.weight import OutlierColumns, QuantizedWeight

# Products of two 8-bit codes reach 2^14; this many of them no longer fit the 32-bit sums of every integer kernel.
TOO_MANY_PRODUCTS = 1 << 17

OTHERWISE_PACKED = f"{DAMAGED} or was packed by compressed-tensors before 0.18"


class CompressedTensors(Format):
    """The format (``ptqcli.formats.Format``) of both kinds of file; a checkpoint may mix them."""

    name = NAME
    outside = True
    packages: Mapping[str, str] = {NAME: "lets transformers load the checkpoints; ptq itself does not need it"}

    def refusal(self, spec: LinearSpec) -> str | None:
        """Why this format cannot hold a linear, or None if it can."""
        return _refusal(spec.scheme, spec.out_features, spec.in_features, spec.moving_groups)

    def fused_refusal(self, group: Mapping[str, Scheme | None]) -> str | None:
        """Why linears that read one tensor inside one module cannot differ as they do, or None if all is well."""
        return joined.fused_refusal(group)

    def notes(self, specs: Sequence[LinearSpec]) -> list[str]:
        """What a user should know of the readers of such linears, one sentence each."""
        return compressed_tensors_readers.notes(specs)

    def trial(self, classes: Sequence[nn.Module], specs: Sequence[LinearSpec]) -> list[str]:
        """What transformers would do with such linears in this very model, in one sentence or none."""
        return compressed_tensors_readers.trial(classes, specs, {spec.name for spec in specs if spec.scheme.activations is None})

    def assembled_by_transformers(self, specs: Sequence[LinearSpec]) -> bool:
        """It expands and joins them while it reads: of several schemes it expands all as one, some without an error."""
        first = specs[0].scheme
        return all(spec.scheme == first for spec in specs) and first.symmetric and first.activations is None

    def readers(self, specs: Sequence[LinearSpec], auto_class: str, tried: Sequence[str]) -> list[Reader]:
        """transformers and vLLM, with the versions that these schemes need."""
        return compressed_tensors_readers.readers(specs, auto_class, bool(tried))

    def stored_bytes(self, spec: LinearSpec) -> int:
        """Bytes of a linear's stored tensors, those of outlier columns left out."""
        return sum(math.prod(shape) * itemsize for shape, itemsize in _stored_shapes(spec))

    def tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """Names of the tensors that hold the linear ``name``, in the order of the module docstring."""
        return tuple(f"{name}.{leaf}" for leaf in _leaves(scheme))

    def pack(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The stored tensors of the linear ``name``. Raises PTQError if the format cannot hold ``weight``."""
        scheme = weight.scheme
        out_features, in_features = weight.codes.shape
        reason = _refusal(scheme, out_features, in_features, weight.g_idx is not None)
        if reason is not None:
            raise PTQError(f"{name}: {reason}")
        expect_writable(name, weight)
        tensors = _packed_tensors(weight) if scheme.activations is None else _integer_tensors(name, weight)
        return dict(zip(self.tensor_names(name, scheme), tensors, strict=True))

    def unpack(self, name: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedWeight:
        """Inverse of ``pack``: the linear ``name`` from stored tensors, which ``read`` returns by name.

        Raises PTQError, naming the tensor, when a dtype, a shape or an index does not fit ``scheme``; what ``read`` raises passes through.
        """
        return _read_packed(name, read, scheme) if scheme.activations is None else _read_integers(name, read, scheme)

    def describe(self, specs: Sequence[LinearSpec], untouched: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The entry of config.json. Raises UsageError if nothing is quantized."""
        schemes = {name: spec.scheme for spec in specs for name in (spec.name, *spec.aliases)}
        conv1d = any(spec.kind == "Conv1D" for spec in specs)
        outside = [name for spec in specs if spec.outside for name in (spec.name, *spec.aliases)]
        entry = compressed_tensors_config.quantization_config(schemes, untouched, conv1d, outside)
        return {"config.json": {"quantization_config": entry}}

    def schemes(self, config: Mapping[str, Any], tensors: TensorSource, linears: Iterable[str]) -> dict[str, Scheme]:
        """The scheme of each quantized linear among ``linears``: all of it stands in ``config``.

        Raises PTQError, naming the key, for everything that is not read.
        """
        return compressed_tensors_config.schemes_of(config, linears)

    def stored_linears(self, names: Iterable[str]) -> list[str]:
        """The quantized linears, of either kind, among the tensor ``names`` of a checkpoint."""
        marks = (".weight_packed", ".weight_scale")
        return list(dict.fromkeys(name.rpartition(".")[0] for name in names if name.endswith(marks)))


COMPRESSED_TENSORS = CompressedTensors()


def _refusal(scheme: Scheme, out_features: int, in_features: int, moving_groups: bool = False) -> str | None:
    """Why no file of this format can hold a matrix [out_features, in_features] in ``scheme``, or None."""
    if in_features < 1 or out_features < 1:
        return f"a matrix of {out_features} x {in_features} has no weights"
    if in_features % scheme.columns_per_group(in_features):
        return f"group size {scheme.group_size} does not divide its {in_features} input features"
    if moving_groups and scheme.group_size > 0:
        return f"act-order whose groups move needs a column index, which {NAME} cannot hold; use static groups"
    if scheme.activations is not None and in_features >= TOO_MANY_PRODUCTS:
        return f"integer sums over its {in_features} input features can exceed 32 bits; leave its activations in 16 bits"
    return None


def _stored_shapes(spec: LinearSpec) -> list[tuple[tuple[int, ...], int]]:
    """Shape and bytes an element of each stored tensor but the outlier columns."""
    scheme, rows, columns, scale = spec.scheme, spec.out_features, spec.in_features, spec.scale_dtype.itemsize
    if scheme.activations is not None:
        scales = 1 if scheme.group_size == WHOLE_MATRIX else rows
        static = [] if scheme.activations.dynamic else [((1,), scale)]
        return [((rows, columns), 1), ((scales,), scale), *static]
    groups = scheme.group_count(columns)
    zero = [] if scheme.symmetric else [((bitstream.word_count(rows, scheme.bits), groups), 4)]
    return [((rows, bitstream.word_count(columns, scheme.bits)), 4), ((rows, groups), scale), ((2,), 8), *zero]


def _leaves(scheme: Scheme) -> list[str]:
    if scheme.activations is None:
        return ["weight_packed", "weight_scale", "weight_shape", *([] if scheme.symmetric else ["weight_zero_point"])]
    static = [] if scheme.activations.dynamic else ["input_scale"]
    split = [] if scheme.outliers is None else ["outlier_index", "outlier_weight"]
    return ["weight", "weight_scale", *static, *split]


def _packed_tensors(weight: QuantizedWeight) -> list[Tensor]:
    bits = weight.scheme.bits
    tensors = [
        bitstream.pack(weight.codes, bits),
        weight.scale.contiguous(),
        torch.tensor(weight.codes.shape, dtype=torch.int64),
    ]
    if not weight.scheme.symmetric:
        tensors.append(bitstream.pack(weight.zero.t(), bits).t().contiguous())
    return tensors


def _read_packed(name: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedWeight:
    packed, scale, shape = (read(f"{name}.{leaf}") for leaf in _leaves(scheme)[:3])
    if shape.shape != (2,) or shape.dtype not in (torch.int32, torch.int64):
        raise PTQError(f"{name}.weight_shape: expected two integers, found {describe(shape)}")
    out_features, in_features = shape.tolist()
    _expect_readable(name, scheme, out_features, in_features)
    groups = scheme.group_count(in_features)
    expect_words(f"{name}.weight_packed", packed, (out_features, bitstream.word_count(in_features, scheme.bits)), OTHERWISE_PACKED)
    expect_scales(f"{name}.weight_scale", scale, (out_features, groups), reach(scheme))
    codes = bitstream.unpack(packed, scheme.bits, in_features)
    if scheme.symmetric:
        return QuantizedWeight(codes=codes, scale=scale, zero=middle(scale, scheme), scheme=scheme)
    words = read(f"{name}.weight_zero_point")
    expect_words(f"{name}.weight_zero_point", words, (bitstream.word_count(out_features, scheme.bits), groups), OTHERWISE_PACKED)
    zero = bitstream.unpack(words.t(), scheme.bits, out_features).t().contiguous()
    return QuantizedWeight(codes=codes, scale=scale, zero=zero, scheme=scheme)


def _integer_tensors(name: str, weight: QuantizedWeight) -> list[Tensor]:
    scheme, scale = weight.scheme, weight.scale.contiguous()
    if scheme.group_size == WHOLE_MATRIX:
        if not bool((scale == scale[0]).all()):
            raise PTQError(f"{name}: a weight with one scale for the whole matrix has several")
        scale = scale[0].clone()
    parts = [weight.input_scale]
    parts += [None, None] if weight.outliers is None else [weight.outliers.index, weight.outliers.weight.contiguous()]
    present = [part for part in parts if part is not None]
    if len(present) != len(_leaves(scheme)) - 2 or (weight.outliers is None) != (scheme.outliers is None):
        raise PTQError(f"{name}: the input scale or the outlier columns do not go with its scheme, {scheme}")
    # An unsigned byte wraps around; read as signed it is the difference.
    return [(weight.codes - scheme.middle).view(torch.int8), scale, *present]


def _read_integers(name: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedWeight:
    signed = read(f"{name}.weight")
    if signed.dim() != 2 or signed.dtype != torch.int8:
        raise PTQError(f"{name}.weight: expected int8 codes [out, in], found {describe(signed)}")
    out_features, in_features = signed.shape
    _expect_readable(name, scheme, out_features, in_features)
    codes = signed.view(torch.uint8) + scheme.middle
    if int(codes.max()) >= scheme.levels:
        raise PTQError(f"{name}.weight: holds codes outside of {scheme.bits} bits")
    scale = read(f"{name}.weight_scale")
    if scheme.group_size == WHOLE_MATRIX and scale.numel() == 1:  # [1] or [1, 1]
        scale = scale.reshape(1, 1).expand(out_features, 1).clone()
    expect_scales(f"{name}.weight_scale", scale, (out_features, 1), reach(scheme))
    input_scale = None
    if "input_scale" in _leaves(scheme):
        input_scale = read(f"{name}.input_scale")
        expect_scales(f"{name}.input_scale", input_scale, (1,), reach(scheme))
        if input_scale.item() < 0:
            raise PTQError(f"{name}.input_scale: holds {input_scale.item():g}, and a scale of inputs is positive; the file is damaged")
    outliers = None if scheme.outliers is None else _read_outliers(name, read, out_features, in_features)
    return QuantizedWeight(codes=codes, scale=scale, zero=middle(scale, scheme), scheme=scheme, input_scale=input_scale, outliers=outliers)


def _read_outliers(name: str, read: Callable[[str], Tensor], out_features: int, in_features: int) -> OutlierColumns:
    index, weight = read(f"{name}.outlier_index"), read(f"{name}.outlier_weight")
    if index.dim() != 1 or index.dtype != torch.int32:
        raise PTQError(f"{name}.outlier_index: expected int32 [columns], found {describe(index)}")
    columns = index.tolist()
    if columns != sorted(set(columns)) or not all(0 <= column < in_features for column in columns):
        raise PTQError(f"{name}.outlier_index: expected rising columns below {in_features}, found others; the file is damaged")
    expect_floats(f"{name}.outlier_weight", weight, (out_features, len(columns)))
    return OutlierColumns(index, weight)


def _expect_readable(name: str, scheme: Scheme, out_features: int, in_features: int) -> None:
    reason = _refusal(scheme, out_features, in_features)
    if reason is not None:
        raise PTQError(f"{name}: {reason}")

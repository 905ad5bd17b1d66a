"""``compressed-tensors``: integer weights as transformers and vLLM read them, in two of the library's formats.

``pack-quantized`` holds weight-only schemes, 2, 3, 4 or 8 bits. A linear ``m`` with ``W[out, in]`` and ``G`` groups is stored as

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

What a reader would get silently wrong, and what is done about it here:

- Without ``quantization_status: compressed`` transformers loads random weights and only warns. It is always written, and a file
  without it is refused.
- Versions of the library before 0.18 packed 3-bit codes ten to a word, under the same names. Such a file has another width and is
  refused by name.
- A linear of class ``Conv1D`` (GPT-2) is passed over by compressed-tensors inside transformers, which then leaves it random with
  a warning. The entry for such a model carries a key that compressed-tensors does not know and therefore refuses, so that
  transformers stops with an error that shows the key.
- The outlier split is an extension of this program: transformers and vLLM would leave the 16-bit columns out of the product. A key
  of the same kind, which also holds the threshold, stops them.
- vLLM runs q, k and v, and gate and up, as one matrix and takes the first one's scheme for all.

What a reader refuses by itself, and is written all the same: transformers needs ``dequantize=True`` for asymmetric packed weights since
0.18 of the library; vLLM has no dynamic activations per tensor, and of the narrower weights with 8-bit activations only 4 bits per
token.

Left out: weight-only ``int-quantized``, which vLLM has no kernel for; asymmetric activations; packed weights with activations or with one
scale per tensor, the latter unknown to vLLM; floating-point weights; and classic act-order with its ``weight_g_idx``, which the
library dropped in 0.19.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ptqcli.errors import PTQError
from ptqcli.formats import bitstream
from ptqcli.formats.compressed_tensors_config import CONV1D_KEY, INTEGER, NAME, OUTLIERS_KEY, PACKED, quantization_config, schemes_of
from ptqcli.numerics.scheme import WHOLE_MATRIX, Scheme
from ptqcli.numerics.weight import OutlierColumns, QuantizedWeight

__all__ = [
    "CONV1D_KEY",
    "INTEGER",
    "NAME",
    "OUTLIERS_KEY",
    "PACKED",
    "pack",
    "quantization_config",
    "refusal",
    "schemes_of",
    "stored_linears",
    "tensor_names",
    "unpack",
]

# Products of two 8-bit codes reach 2^14; this many of them no longer fit the 32-bit sums of every integer kernel.
TOO_MANY_PRODUCTS = 1 << 17


def refusal(scheme: Scheme, in_features: int, out_features: int, moving_groups: bool = False) -> str | None:
    """Why this format cannot hold a matrix [out_features, in_features] in ``scheme``, or None if it can.

    moving_groups: the groups are not neighbouring columns (act-order without static groups), so that an index is needed.
    """
    if in_features < 1 or out_features < 1:
        return f"a matrix of {out_features} x {in_features} has no weights"
    if in_features % scheme.columns_per_group(in_features):
        return f"group size {scheme.group_size} does not divide its {in_features} input features"
    if moving_groups and scheme.group_size > 0:
        return f"act-order whose groups move needs a column index, which {NAME} cannot hold; use static groups"
    if scheme.activations is not None and in_features >= TOO_MANY_PRODUCTS:
        return f"integer sums over its {in_features} input features can exceed 32 bits; leave its activations in 16 bits"
    return None


def tensor_names(name: str, scheme: Scheme) -> tuple[str, ...]:
    """Names of the tensors that hold the linear ``name``, in the order of the module docstring."""
    return tuple(f"{name}.{leaf}" for leaf in _leaves(scheme))


def _leaves(scheme: Scheme) -> list[str]:
    if scheme.activations is None:
        return ["weight_packed", "weight_scale", "weight_shape", *([] if scheme.symmetric else ["weight_zero_point"])]
    static = [] if scheme.activations.dynamic else ["input_scale"]
    split = [] if scheme.outliers is None else ["outlier_index", "outlier_weight"]
    return ["weight", "weight_scale", *static, *split]


def stored_linears(names: Iterable[str]) -> list[str]:
    """The linears that are stored in either format among the tensor ``names`` of a checkpoint."""
    marks = (".weight_packed", ".weight_scale")
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names if name.endswith(marks)))


def pack(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The stored tensors of the linear ``name``. Raises PTQError if the format cannot hold ``weight``."""
    out_features, in_features = weight.codes.shape
    scheme = weight.scheme
    reason = refusal(scheme, in_features, out_features, moving_groups=weight.g_idx is not None)
    if reason is not None:
        raise PTQError(f"{name}: {reason}")
    if scheme.symmetric and not bool((weight.zero == scheme.middle).all()):
        raise PTQError(f"{name}: a symmetric weight has zero points other than {scheme.middle}")
    tensors = _packed_tensors(weight) if scheme.activations is None else _integer_tensors(name, weight)
    return dict(zip(tensor_names(name, scheme), tensors, strict=True))


def unpack(name: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedWeight:
    """Inverse of ``pack``: the linear ``name`` from stored tensors, which ``read`` returns by name.

    Raises PTQError, naming the tensor, when a dtype, a shape or an index does not fit ``scheme``; whatever ``read`` raises passes through.
    """
    return _read_packed(name, read, scheme) if scheme.activations is None else _read_integers(name, read, scheme)


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
    packed, scale, shape = (read(stored) for stored in tensor_names(name, scheme)[:3])
    if shape.shape != (2,) or shape.dtype not in (torch.int32, torch.int64):
        raise PTQError(f"{name}.weight_shape: expected two integers, found {_describe(shape)}")
    out_features, in_features = shape.tolist()
    _expect_readable(name, scheme, in_features, out_features)
    groups = scheme.group_count(in_features)
    _expect_words(f"{name}.weight_packed", packed, (out_features, bitstream.word_count(in_features, scheme.bits)))
    _expect_floats(f"{name}.weight_scale", scale, (out_features, groups))
    codes = bitstream.unpack(packed, scheme.bits, in_features)
    if scheme.symmetric:
        return QuantizedWeight(codes, scale, _middle(scale, scheme), scheme)
    words = read(f"{name}.weight_zero_point")
    _expect_words(f"{name}.weight_zero_point", words, (bitstream.word_count(out_features, scheme.bits), groups))
    zero = bitstream.unpack(words.t(), scheme.bits, out_features).t().contiguous()
    return QuantizedWeight(codes, scale, zero, scheme)


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
        raise PTQError(f"{name}.weight: expected int8 codes [out, in], found {_describe(signed)}")
    out_features, in_features = signed.shape
    _expect_readable(name, scheme, in_features, out_features)
    codes = signed.view(torch.uint8) + scheme.middle
    if int(codes.max()) >= scheme.levels:
        raise PTQError(f"{name}.weight: holds codes outside of {scheme.bits} bits")
    scale = read(f"{name}.weight_scale")
    if scheme.group_size == WHOLE_MATRIX and scale.numel() == 1:  # [1] or [1, 1]
        scale = scale.reshape(1, 1).expand(out_features, 1).clone()
    _expect_floats(f"{name}.weight_scale", scale, (out_features, 1))
    input_scale = None
    if f"{name}.input_scale" in tensor_names(name, scheme):
        input_scale = read(f"{name}.input_scale")
        _expect_floats(f"{name}.input_scale", input_scale, (1,))
    outliers = None if scheme.outliers is None else _read_outliers(name, read, out_features, in_features)
    return QuantizedWeight(codes, scale, _middle(scale, scheme), scheme, None, input_scale, outliers)


def _read_outliers(name: str, read: Callable[[str], Tensor], out_features: int, in_features: int) -> OutlierColumns:
    index, weight = read(f"{name}.outlier_index"), read(f"{name}.outlier_weight")
    if index.dim() != 1 or index.dtype != torch.int32:
        raise PTQError(f"{name}.outlier_index: expected int32 [columns], found {_describe(index)}")
    columns = index.tolist()
    if columns != sorted(set(columns)) or not all(0 <= column < in_features for column in columns):
        raise PTQError(f"{name}.outlier_index: expected rising columns below {in_features}, found others; the file is damaged")
    _expect_floats(f"{name}.outlier_weight", weight, (out_features, len(columns)))
    return OutlierColumns(index, weight)


def _middle(scale: Tensor, scheme: Scheme) -> Tensor:
    return torch.full(scale.shape, scheme.middle, dtype=torch.uint8)


def _expect_readable(name: str, scheme: Scheme, in_features: int, out_features: int) -> None:
    reason = refusal(scheme, in_features, out_features)
    if reason is not None:
        raise PTQError(f"{name}: {reason}")


def _expect_floats(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise PTQError(f"{name}: expected floating {list(shape)}, found {_describe(tensor)}")


def _expect_words(name: str, words: Tensor, shape: tuple[int, int]) -> None:
    if tuple(words.shape) != shape or words.dtype != torch.int32:
        raise PTQError(
            f"{name}: expected int32 {list(shape)}, found {_describe(words)}; "
            "the file is damaged or was packed by compressed-tensors before 0.18"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

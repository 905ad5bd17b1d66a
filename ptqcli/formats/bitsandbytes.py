"""``bitsandbytes``: what transformers loads with ``load_in_4bit`` and ``load_in_8bit``, and peft trains adapters on (QLoRA).

A linear ``m`` with ``W[out, in]`` in NF4 or FP4 is stored as

    m.weight                                   uint8 [out * in / 2, 1]   codes, row after row, the first of two in the high half of a byte
    m.weight.absmax                            float32 [blocks]          scales, a block being a group; or, doubly quantized, uint8
    m.weight.quant_map                         float32 [16]              the levels, in the order of the stored codes
    m.weight.nested_absmax, .nested_quant_map  float32                   of doubly quantized scales (``numerics.double_quant``)
    m.weight.quant_state.bitsandbytes__nf4     uint8                     JSON: the block size, the shape, the offset of the scales

    w = quant_map[code] * absmax        computed in float32

Blocks run through the flattened matrix, which makes them groups of neighbouring columns where their size divides ``in``; others are
refused. NF4's codes count its levels; FP4's are sign, exponent and fraction, and zero has two of them, as it has in the element ``FP4``.

In 8 bits (Dettmers et al. 2022, LLM.int8) it is

    m.weight          int8 [out, in]
    m.SCB             float32 [out]        127 times the scale of each row
    m.weight_format   uint8 []             0, for plain rows

Its kernels round the inputs to 8 bits as well, each token by itself, but for the columns in which one exceeds ``llm_int8_threshold``; a
threshold of 0 leaves no such columns out. So the file is ``w8a8-outliers`` with that threshold, or ``w8a8`` for 0, and there is no w8a16.
The columns that are left out meet the 8-bit weights, read back: weights in 16 bit have no place in the file, and ``held`` drops them. Its
grid for inputs has 127 steps to the largest magnitude where ours has 127.5, so that logits agree but for the noise of that rounding.

Scales may be negative, and codes -128: CPU and CUDA kernels only multiply by ``SCB`` and ``absmax`` (``int8_vectorwise_dequant``,
``kdequant_mm_int32_fp16``, ``dequantize_4bit``), and sum products of any two bytes in 32 bits.

Scales are float32 whatever the model's dtype is. ``SCB`` of a scale is rounded; ``held`` gives the scale that a reader finds, a last bit
off in one row of 128. Blocks and rows of zeros, whose absmax is 0 in files of bitsandbytes, are read as codes of zero with scale 1.

Left out: storage types but uint8 (``bnb_4bit_quant_storage``), levels other than the library's, which its kernels would not look at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ptqcli.checkpoint.tensors import TensorSource
from ptqcli.errors import PTQError
from ptqcli.formats import Format, LinearSpec, Reader, bitsandbytes_config, bitsandbytes_readers
from ptqcli.formats.bitsandbytes_config import STATE, STATE_MARKS, QuantState, refusal
from ptqcli.formats.stored import DAMAGED, describe, expect_floats, middle
from ptqcli.numerics.double_quant import BLOCK, DoubleScales, too_small, usable
from ptqcli.numerics.elements import CODEBOOKS
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import OutlierColumns, QuantizedWeight

# What bitsandbytes calls the codes of each element.
CODES = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}
STEPS = 127  # of SCB


class BitsAndBytes(Format):
    """The format (``ptqcli.formats.Format``), in 4 and in 8 bits; a file has one of them."""

    name = bitsandbytes_config.METHOD
    packages: Mapping[str, str] = {"bitsandbytes": "lets transformers load the checkpoints; ptq itself does not need it"}
    optional = ("weight_format",)
    codebooks = True

    def scale_dtype(self, weights: torch.dtype, scheme: Scheme) -> torch.dtype:
        """float32, in which all of its kernels compute with them."""
        return torch.float32

    def refusal(self, spec: LinearSpec) -> str | None:
        """Why this format cannot hold a linear, or None if it can."""
        return refusal(spec.scheme, spec.out_features, spec.in_features, spec.moving_groups)

    def joint_refusal(self, specs: Sequence[LinearSpec], untouched: Sequence[str]) -> str | None:
        """Why linears, each of which this format can hold, cannot stand in one file, or None if they can."""
        return bitsandbytes_config.joint_refusal(specs, untouched)

    def notes(self, specs: Sequence[LinearSpec]) -> list[str]:
        """What a user should know of the readers of such linears, one sentence each."""
        return bitsandbytes_readers.notes(specs)

    def readers(self, specs: Sequence[LinearSpec], auto_class: str, tried: Sequence[str]) -> list[Reader]:
        """transformers, peft and vLLM."""
        return bitsandbytes_readers.readers(specs, auto_class)

    def stored_bytes(self, spec: LinearSpec) -> int:
        """Bytes of a linear's stored tensors; the number of digits of a doubly quantized weight's offset is guessed."""
        rows, columns, scheme = spec.out_features, spec.in_features, spec.scheme
        if scheme.codebook is None:
            return rows * columns + 4 * rows + 1
        groups = rows * scheme.group_count(columns)
        state = QuantState.of(scheme, (rows, columns), 0.1234567890123456 if scheme.double else None)
        scales = groups + 4 * (-(-groups // BLOCK) + 256) if scheme.double else 4 * groups
        return rows * columns // 2 + scales + 4 * scheme.levels + len(state.json())

    def tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """Names of the tensors that hold the linear ``name``."""
        if scheme.codebook is None:
            return tuple(f"{name}.{leaf}" for leaf in ("SCB", "weight_format", "weight"))
        nested = ("nested_absmax", "nested_quant_map") if scheme.double else ()
        return (*(f"{name}.weight.{part}" for part in ("absmax", "quant_map", *nested, STATE + scheme.codebook)), f"{name}.weight")

    def held(self, weight: QuantizedWeight) -> QuantizedWeight:
        """``weight`` as it is read back: in 8 bits without columns in 16 bit, its scales rounded as SCB holds them."""
        if weight.scheme.codebook is not None:
            return weight
        scale = weight.scale.float() * STEPS / STEPS
        return replace(weight, scale=scale, outliers=_no_columns(weight.codes, weight.scheme))

    def pack(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The stored tensors of the linear ``name``. Raises PTQError if the format cannot hold ``weight``."""
        scheme, (out_features, in_features) = weight.scheme, weight.codes.shape
        reason = refusal(scheme, out_features, in_features, weight.g_idx is not None)
        if reason is not None:
            raise PTQError(f"{name}: {reason}")
        tensors = _eight_bits(name, weight) if scheme.codebook is None else _four_bits(name, weight, scheme.codebook)
        return dict(zip(self.tensor_names(name, scheme), tensors, strict=True))

    def unpack(self, name: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedWeight:
        """Inverse of ``pack``: the linear ``name`` from stored tensors, which ``read`` returns by name.

        Raises PTQError, naming the tensor, when a dtype, a shape or a value does not fit ``scheme``; what ``read`` raises passes through.
        """
        if scheme.codebook is None:
            return _read_eight_bits(name, read, scheme)
        return _read_four_bits(f"{name}.weight", read, scheme, scheme.codebook)

    def describe(self, specs: Sequence[LinearSpec], untouched: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The entry of config.json. Raises UsageError if nothing is quantized."""
        return {"config.json": {"quantization_config": bitsandbytes_config.quantization_config(specs, untouched)}}

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether an entry of config.json is of this format; old ones name no method."""
        method = config.get("quant_method")
        return method == self.name or (method is None and True in (config.get("load_in_4bit"), config.get("load_in_8bit")))

    def schemes(self, config: Mapping[str, Any], tensors: TensorSource, linears: Mapping[str, str]) -> dict[str, Scheme]:
        """The scheme of each linear among ``linears`` that is quantized among ``tensors``.

        Raises PTQError, naming the key or the tensor, for everything that is not read.
        """
        return bitsandbytes_config.schemes_of(config, tensors, linears, set(self.stored_linears(tensors.names)))

    def stored_linears(self, names: Iterable[str]) -> list[str]:
        """The quantized linears among the tensor ``names`` of a checkpoint."""
        marks = (".SCB", ".weight.absmax", ".weight.quant_map", *(f".weight.{mark}" for mark in STATE_MARKS))
        return list(dict.fromkeys(name.removesuffix(mark) for name in names for mark in marks if name.endswith(mark)))


BITSANDBYTES = BitsAndBytes()


def _no_columns(codes: Tensor, scheme: Scheme) -> OutlierColumns | None:
    """The split of a scheme that has one, without columns in 16 bit."""
    if scheme.outliers is None:
        return None
    return OutlierColumns(codes.new_empty(0, dtype=torch.int32), codes.new_empty(len(codes), 0, dtype=torch.float32))


def _eight_bits(name: str, weight: QuantizedWeight) -> list[Tensor]:
    if weight.outliers is not None and weight.outliers.index.numel():
        raise PTQError(f"{name}: has columns in 16 bit, for which bitsandbytes has no place")
    scb = weight.scale.float().flatten() * STEPS
    if not bool(torch.isfinite(scb).all()):
        raise PTQError(f"{name}: its scales come so close to the end of float32 that bitsandbytes cannot hold them")
    # An unsigned byte wraps around; read as signed it is the difference.
    return [scb, torch.zeros((), dtype=torch.uint8), (weight.codes - weight.scheme.middle).view(torch.int8).contiguous()]


def _read_eight_bits(name: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedWeight:
    signed = read(f"{name}.weight")
    if signed.dim() != 2 or signed.dtype != torch.int8:
        raise PTQError(f"{name}.weight: expected int8 [out, in], found {describe(signed)}; {DAMAGED}")
    out_features, in_features = signed.shape
    _expect_place(name, scheme, out_features, in_features)
    _expect_plain_rows(f"{name}.weight_format", read)
    scb = _finite(f"{name}.SCB", read(f"{name}.SCB"), (out_features,))
    scale = (scb / STEPS).unsqueeze(1)
    codes = torch.where(too_small(scale), scheme.middle, signed.view(torch.uint8) + scheme.middle)
    scale = usable(scale)
    return QuantizedWeight(codes=codes, scale=scale, zero=middle(scale, scheme), scheme=scheme, outliers=_no_columns(codes, scheme))


def _expect_plain_rows(name: str, read: Callable[[str], Tensor]) -> None:
    try:
        layout = read(name)
    except LookupError:
        return
    if layout.numel() != 1 or layout.dtype != torch.uint8 or layout.item() != 0:
        raise PTQError(f"{name}: expected one uint8 of 0, found {describe(layout)}; files in the order of a GPU's tiles are not read")


def _four_bits(name: str, weight: QuantizedWeight, codebook: str) -> list[Tensor]:
    scheme, double = weight.scheme, weight.double
    state = QuantState.of(scheme, tuple(weight.codes.shape), None if double is None else double.offset)
    if (double is None) == scheme.double or (double is not None and not torch.equal(double.scale(), weight.scale.float().flatten())):
        raise PTQError(f"{name}: its scales are not those that its scheme, {scheme}, rounds them to")
    codes = torch.tensor(CODES[codebook], dtype=torch.uint8)[weight.codes.flatten().long()]
    packed = (codes[::2] << 4 | codes[1::2]).unsqueeze(1)
    text = torch.tensor(list(state.json()), dtype=torch.uint8)
    if double is None:
        return [weight.scale.float().flatten(), _levels(codebook), text, packed]
    return [double.codes, _levels(codebook), double.absmax, double.levels.clone(), text, packed]


def _levels(codebook: str) -> Tensor:
    """What bitsandbytes' codes stand for, float32 [16]."""
    return torch.empty(16).index_copy_(0, torch.tensor(CODES[codebook]), torch.tensor(CODEBOOKS[codebook].levels))


def _read_four_bits(name: str, read: Callable[[str], Tensor], scheme: Scheme, codebook: str) -> QuantizedWeight:
    """name: of the ``weight``."""
    state = QuantState.read(f"{name}.{STATE}{codebook}", read(f"{name}.{STATE}{codebook}"))
    out_features, in_features = state.shape
    if state.scheme != scheme:
        raise PTQError(f"{name}.{STATE}{codebook}: tells of {state.scheme}, not of {scheme}; {DAMAGED}")
    _expect_place(name, scheme, out_features, in_features)
    if not torch.equal(read(f"{name}.quant_map"), _levels(codebook)):
        raise PTQError(f"{name}.quant_map: holds other levels than those of {codebook}; bitsandbytes would not look at them")
    blocks = out_features * scheme.group_count(in_features)
    double = _read_double(name, read, blocks, state.offset) if scheme.double else None
    absmax = _finite(f"{name}.absmax", read(f"{name}.absmax"), (blocks,)) if double is None else double.values()
    scale, codes = usable(absmax), _read_codes(name, read(name), out_features * in_features, codebook)
    codes = torch.where(too_small(absmax).unsqueeze(1), _code_of_zero(codebook), codes.view(blocks, -1))
    scale = scale.view(out_features, -1)
    return QuantizedWeight(
        codes=codes.view(out_features, in_features), scale=scale, zero=middle(scale, scheme), scheme=scheme, double=double
    )


def _read_codes(name: str, packed: Tensor, count: int, codebook: str) -> Tensor:
    """uint8 [count], in the order of the levels."""
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (count // 2, 1):
        raise PTQError(f"{name}: expected uint8 {[count // 2, 1]}, found {describe(packed)}; {DAMAGED}, or stored in another type")
    codes = torch.cat([packed >> 4, packed & 15], dim=1).flatten()
    return torch.tensor(CODES[codebook]).argsort().to(torch.uint8)[codes.long()]


def _code_of_zero(codebook: str) -> int:
    return CODEBOOKS[codebook].levels.index(0.0)


def _read_double(name: str, read: Callable[[str], Tensor], blocks: int, offset: float | None) -> DoubleScales:
    codes = read(f"{name}.absmax")
    if codes.dtype != torch.uint8 or tuple(codes.shape) != (blocks,):
        raise PTQError(f"{name}.absmax: expected uint8 {[blocks]}, found {describe(codes)}; {DAMAGED}")
    absmax = _finite(f"{name}.nested_absmax", read(f"{name}.nested_absmax"), (-(-blocks // BLOCK),))
    levels = _finite(f"{name}.nested_quant_map", read(f"{name}.nested_quant_map"), (256,))
    double = DoubleScales(codes=codes, absmax=absmax, offset=0.0 if offset is None else offset, levels=levels)
    if not bool(torch.isfinite(double.values()).all()):
        raise PTQError(f"{name}.absmax: stands for scales that are not finite; {DAMAGED}")
    return double


def _finite(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``tensor`` as float32. Raises PTQError unless it is floating of ``shape``, and finite."""
    expect_floats(name, tensor, shape)
    if not bool(torch.isfinite(tensor.float()).all()):
        raise PTQError(f"{name}: holds NaN or infinity; {DAMAGED}")
    return tensor.float()


def _expect_place(name: str, scheme: Scheme, out_features: int, in_features: int) -> None:
    reason = refusal(scheme, out_features, in_features)
    if reason is not None:
        raise PTQError(f"{name}: {reason}")

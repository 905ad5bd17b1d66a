"""What config.json, and the JSON beside each 4-bit weight, say of a bitsandbytes checkpoint.

The entry of config.json is a ``BitsAndBytesConfig`` of transformers: how linears would be quantized if they were not yet, which modules
stay as they are (``llm_int8_skip_modules``), from which input on a column is left out in 8 bits (``llm_int8_threshold``), in which dtype
4-bit layers compute. transformers takes a name in the list for the beginning or the end of a module's, at a dot in front.

Which linears of a file are quantized is told by its tensors; what each of 4 bits is, by its own JSON, the *quant state*.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptqcli.checkpoint.tensors import TensorSource
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats import LinearSpec
from ptqcli.formats.stored import DAMAGED, describe
from ptqcli.numerics.double_quant import BLOCK
from ptqcli.numerics.scheme import CODEBOOKS, WHOLE_ROW, ActivationScheme, OutlierSplit, Scheme
from ptqcli.untrusted import shown

METHOD = "bitsandbytes"
STATE = "quant_state.bitsandbytes__"
STATE_MARKS = tuple(STATE + codebook for codebook in CODEBOOKS)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = ("float32", "float16", "bfloat16")

DEFAULT_THRESHOLD = 6.0
MOST_STATE_BYTES = 4096  # real ones take some 170
TOO_MANY_PRODUCTS = 1 << 17  # of two bytes, for sums in 32 bits


def refusal(scheme: Scheme, out_features: int, in_features: int, moving_groups: bool = False) -> str | None:
    """Why no file of this format can hold a matrix [out_features, in_features] in ``scheme``, or None."""
    if in_features < 1 or out_features < 1:
        return f"a matrix of {out_features} x {in_features} has no weights"
    if scheme.codebook is None:
        return _not_eight_bits(scheme, in_features)
    if scheme.group_size not in BLOCK_SIZES:
        return f"bitsandbytes has blocks of {', '.join(map(str, BLOCK_SIZES))} weights, not {scheme}; give --scheme {scheme.codebook}-g64"
    if in_features % scheme.group_size:
        return f"blocks of {scheme.group_size} weights would run from one row into the next, since its {in_features} inputs are no multiple"
    if moving_groups:
        return "act-order whose groups move needs a column index, which bitsandbytes cannot hold; use static groups"
    return None


def _not_eight_bits(scheme: Scheme, in_features: int) -> str | None:
    if scheme.bits != 8 or not scheme.symmetric or scheme.group_size != WHOLE_ROW:
        return f"bitsandbytes holds nf4, fp4 and 8 bits with a scale a row, not {scheme}; give --scheme nf4-g64, or w8a8-outliers6"
    if scheme.activations is None:
        return f"bitsandbytes rounds the inputs of 8-bit weights to 8 bits, too; give --scheme w8a8-outliers6 or w8a8, not {scheme}"
    if scheme.activations != ActivationScheme():
        return f"bitsandbytes computes a scale for each token when a layer runs, unlike {scheme}; give --scheme w8a8-outliers6 or w8a8"
    if scheme.outliers is not None and not scheme.outliers.dynamic:
        return f"bitsandbytes finds outliers when a layer runs, and no threshold says {scheme}; give --scheme w8a8-outliers6"
    if in_features >= TOO_MANY_PRODUCTS:
        return f"integer sums over its {in_features} input features can exceed 32 bits; give --scheme nf4-g64"
    return None


def joint_refusal(specs: Sequence[LinearSpec], untouched: Sequence[str]) -> str | None:
    """Why linears cannot stand in one file, or None if they can. untouched: as in ``Format.describe``."""
    kinds: dict[object, LinearSpec] = {}
    for spec in specs:
        scheme = spec.scheme
        kinds.setdefault((scheme.codebook, scheme.double, scheme.outliers), spec)
    if len(kinds) > 1:
        one, other = (f"{spec.scheme} ({spec.name})" for spec in list(kinds.values())[:2])
        return f"bitsandbytes has one scheme for all linears, not {one} and {other}; give one, or skip the rest"
    for name in (name for spec in specs for name in (spec.name, *spec.aliases)):
        plain = next((plain for plain in untouched if f"{name}.".startswith(f"{plain}.") or name.endswith(plain)), None)
        if plain is not None:
            return f"transformers would leave {name} as it is, like {plain}, with which its name begins or ends; quantize both or neither"
    return None


def quantization_config(specs: Sequence[LinearSpec], untouched: Sequence[str]) -> dict[str, Any]:
    """The entry of config.json, with the keys that transformers writes. Raises UsageError if nothing is quantized."""
    if not specs:
        raise UsageError("no linear layer is quantized, so there is nothing to describe")
    scheme, four = specs[0].scheme, specs[0].scheme.codebook is not None
    compute = str(specs[0].weight_dtype or torch.float32).removeprefix("torch.")
    threshold = DEFAULT_THRESHOLD if four else 0.0 if scheme.outliers is None else float(scheme.outliers.threshold)
    return {
        "quant_method": METHOD,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_quant_type": scheme.codebook or "fp4",
        "bnb_4bit_use_double_quant": scheme.double,
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": threshold,
        "llm_int8_skip_modules": list(untouched),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def schemes_of(
    config: Mapping[str, Any], tensors: TensorSource, linears: Mapping[str, str], quantized: AbstractSet[str]
) -> dict[str, Scheme]:
    """The scheme of each linear among ``linears``, paths in the model with stored names, that is in ``quantized``.

    Raises PTQError, naming the key or the tensor, for what is not read, and for a file in which nothing is quantized yet.
    """
    if not quantized:
        raise PTQError(
            "quantization_config: says that bitsandbytes is to quantize the model while it is loaded, and nothing in the files is "
            "quantized; take the entry out, and run ptq quantize --format bitsandbytes"
        )
    names = set(tensors.names)
    in_eight = {stored for stored in quantized if f"{stored}.SCB" in names}
    eight = _eight_bits(config) if in_eight else None
    _expect_kind(config, "load_in_4bit", quantized - in_eight)
    found = {}
    for name, stored in linears.items():
        if stored in in_eight and eight is not None:
            found[name] = eight
        elif stored in quantized:
            found[name] = _four_bits(tensors, names, f"{stored}.weight")
    return found


def _eight_bits(config: Mapping[str, Any]) -> Scheme:
    _expect_kind(config, "load_in_8bit", {"."})
    threshold = config.get("llm_int8_threshold", DEFAULT_THRESHOLD)
    if type(threshold) not in (int, float) or not 0 <= threshold < 1e38:
        raise PTQError(f"quantization_config: llm_int8_threshold {shown(threshold)} is not read; it is a number from 0 on")
    if config.get("llm_int8_has_fp16_weight"):
        raise PTQError("quantization_config: llm_int8_has_fp16_weight is not read")
    return Scheme(8, WHOLE_ROW, True, ActivationScheme(), OutlierSplit(float(threshold)) if threshold else None)


def _expect_kind(config: Mapping[str, Any], key: str, quantized: AbstractSet[str]) -> None:
    if quantized and config.get(key) is not True:
        raise PTQError(f"quantization_config: {key} is {shown(config.get(key))}, but there are weights that are stored so; {DAMAGED}")


def _four_bits(tensors: TensorSource, names: AbstractSet[str], weight: str) -> Scheme:
    stored = [f"{weight}.{mark}" for mark in STATE_MARKS if f"{weight}.{mark}" in names]
    if len(stored) != 1:
        raise PTQError(f"{weight}: {len(stored)} quant states are stored for it, not one; {DAMAGED}")
    if tensors.nbytes(stored[0]) > MOST_STATE_BYTES:
        raise PTQError(f"{stored[0]}: takes {tensors.nbytes(stored[0])} bytes, which no quant state does; {DAMAGED}")
    return QuantState.read(stored[0], tensors.read(stored[0])).scheme


@dataclass(frozen=True)
class QuantState:
    """What a 4-bit weight's JSON says. dtype: of the weight before. offset: of doubly quantized scales, None for others."""

    codebook: str
    block: int
    shape: tuple[int, int]
    dtype: str = "float32"
    offset: float | None = None

    @classmethod
    def of(cls, scheme: Scheme, shape: tuple[int, ...], offset: float | None) -> QuantState:
        """That of a weight in ``scheme``."""
        rows, columns = shape
        return cls(scheme.codebook or "", scheme.columns_per_group(columns), (rows, columns), offset=offset)

    def json(self) -> bytes:
        """As bitsandbytes writes it."""
        told: dict[str, Any] = {"quant_type": self.codebook, "blocksize": self.block, "dtype": self.dtype, "shape": list(self.shape)}
        if self.offset is not None:
            told |= {"nested_blocksize": BLOCK, "nested_dtype": "float32", "nested_offset": self.offset}
        return json.dumps(told).encode()

    @classmethod
    def read(cls, name: str, tensor: Tensor) -> QuantState:
        """Inverse of ``json``. Raises PTQError, naming the tensor, for anything that bitsandbytes does not write, or that is not read."""
        if tensor.dim() != 1 or tensor.dtype != torch.uint8 or tensor.numel() > MOST_STATE_BYTES:
            raise PTQError(f"{name}: expected JSON in uint8 of at most {MOST_STATE_BYTES} bytes, found {describe(tensor)}; {DAMAGED}")
        try:
            told = json.loads(bytes(tensor.tolist()))
        except (ValueError, RecursionError) as error:
            raise PTQError(f"{name}: is no JSON; {DAMAGED}") from error
        if not isinstance(told, dict):
            raise PTQError(f"{name}: is {shown(told)}, no JSON object; {DAMAGED}")
        shape, offset = told.get("shape"), told.get("nested_offset")
        _expect(name, told, "quant_type", (name.rpartition(STATE)[2],))
        _expect(name, told, "blocksize", BLOCK_SIZES)
        _expect(name, told, "dtype", DTYPES)
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and 0 < size < 1 << 31 for size in shape):
            raise PTQError(f"{name}: shape is {shown(shape)}, not two numbers; {DAMAGED}")
        if offset is not None:
            _expect(name, told, "nested_blocksize", (BLOCK,))
            _expect(name, told, "nested_dtype", ("float32",))
            if type(offset) not in (int, float) or not math.isfinite(offset) or abs(offset) > torch.finfo(torch.float32).max:
                raise PTQError(f"{name}: nested_offset is {shown(offset)}, which is no offset; {DAMAGED}")
        rows, columns = shape
        return cls(told["quant_type"], told["blocksize"], (rows, columns), told["dtype"], None if offset is None else float(offset))

    @property
    def scheme(self) -> Scheme:
        """What the weight's numbers are."""
        return Scheme(4, self.block, codebook=self.codebook, double=self.offset is not None)


def _expect(name: str, told: Mapping[str, Any], key: str, read: tuple[Any, ...]) -> None:
    found = told.get(key)
    if not any(found == value and type(found) is type(value) for value in read):
        raise PTQError(f"{name}: {key} {shown(found)} is not read; what is read: {', '.join(map(str, read))}")

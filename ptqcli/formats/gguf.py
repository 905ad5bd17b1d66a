"""Matrices of a GGUF file as quantized weights, where a block type holds one of the schemes.

    Q4_0    w = d (q - 8),   groups of 32, d fp16       w4a16-g32
    Q8_0    w = d q,         groups of 32, d fp16       w8a16-g32

These run as they are, packed. All other types run on numbers that are decoded when the model is loaded: in Q4_1, Q5_1 and most K-quants
zero need not be among the values of a group, which a scheme's zero point, a whole number, cannot say; the rest have groups with two scales.
The way to a file is ``formats.gguf_export``, since one is written as a whole and not beside a config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqcli.checkpoint.gguf_blocks import BLOCK_TYPES, decode, encode
from ptqcli.checkpoint.gguf_file import GGUFFile
from ptqcli.checkpoint.tensors import TensorSource
from ptqcli.errors import PTQError
from ptqcli.formats import Format, LinearSpec
from ptqcli.model.gguf import GGUFTensors
from ptqcli.model.gguf_config import read_config
from ptqcli.numerics.blocks import LEGACY_TYPES, LegacyBlocks
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight

PACKED_SCHEMES = {"Q4_0": Scheme(4, 32), "Q8_0": Scheme(8, 32)}


class GGUFBlocks(Format):
    """The pair ``pack`` and ``unpack`` for one matrix. Its only tensor is called ``NAME.q4_0`` or ``NAME.q8_0``, see ``GGUFTensors``."""

    name = "gguf"

    def refusal(self, spec: LinearSpec) -> str | None:
        """See ``Format``."""
        if spec.scheme not in PACKED_SCHEMES.values():
            return f"its blocks hold {' and '.join(map(str, PACKED_SCHEMES.values()))}, not {spec.scheme}"
        return None

    def stored_bytes(self, spec: LinearSpec) -> int:
        """See ``Format``."""
        return spec.out_features * BLOCK_TYPES[_type_of(spec.scheme)].row_bytes(spec.in_features)

    def tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """See ``Format``."""
        return (f"{name}.{_type_of(scheme).lower()}",)

    def pack(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See ``Format``. Scales are rounded to fp16. Raises PTQError for another scheme."""
        kind = BLOCK_TYPES[_type_of(weight.scheme)]
        codes = weight.codes.unflatten(1, (-1, kind.columns))
        return {
            f"{name}.{kind.name.lower()}": encode(LegacyBlocks(kind=LEGACY_TYPES[kind.name], codes=codes, d=weight.scale.to(torch.float16)))
        }

    def unpack(self, name: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedWeight:
        """See ``Format``. A block whose scale is 0 holds zeros, and gets the scale 1. Raises PTQError for scales that are not finite."""
        kind = BLOCK_TYPES[_type_of(scheme)]
        blocks = decode(kind, read(f"{name}.{kind.name.lower()}"))
        assert isinstance(blocks, LegacyBlocks)
        if not torch.isfinite(blocks.d).all():
            raise PTQError(f"{name}: a block has a scale that is no finite number; the file is damaged")
        empty = blocks.d == 0
        return QuantizedWeight(
            codes=torch.where(empty[..., None], blocks.middle, blocks.codes).to(torch.uint8).flatten(1),
            scale=torch.where(empty, 1, blocks.d),
            zero=torch.full(blocks.d.shape, blocks.middle, dtype=torch.uint8),
            scheme=scheme,
        )

    def describe(self, specs: Sequence[LinearSpec], untouched: Sequence[str]) -> dict[str, dict[str, Any]]:
        """See ``Format``: the file says it of each tensor."""
        return {}

    def schemes(self, config: Mapping[str, Any], tensors: TensorSource, linears: Mapping[str, str]) -> dict[str, Scheme]:
        """See ``Format``."""
        stored = set(tensors.names)
        found = ((name, on_disk, scheme) for name, on_disk in linears.items() for scheme in PACKED_SCHEMES.values())
        return {name: scheme for name, on_disk, scheme in found if self.tensor_names(on_disk, scheme)[0] in stored}

    def stored_linears(self, names: Iterable[str]) -> list[str]:
        """See ``Format``."""
        suffixes = tuple(f".{kind.lower()}" for kind in PACKED_SCHEMES)
        return [name.rpartition(".")[0] for name in names if name.endswith(suffixes)]


GGUF_BLOCKS = GGUFBlocks()


def _type_of(scheme: Scheme) -> str:
    """The block type of a scheme. Raises PTQError if none holds it."""
    for kind, held in PACKED_SCHEMES.items():
        if held == scheme:
            return kind
    raise PTQError(f"no block type of GGUF files holds {scheme} as a quantized weight")


def decoded_note(path: Path) -> str | None:
    """What a user should know of how the matrices of a file run, None if all of its codes do so packed."""
    kinds = {tensor.kind.name for tensor in GGUFFile(path).stored.values() if tensor.kind.quantized and len(tensor.shape) == 2}
    decoded = sorted(kinds - PACKED_SCHEMES.keys())
    if not decoded:
        return None
    return f"{path}: {', '.join(decoded)} are decoded when the model is loaded; only {' and '.join(PACKED_SCHEMES)} run packed"


def open_tensors(path: Path) -> tuple[Any, GGUFTensors]:
    """Configuration and tensors of a file, those of PACKED_SCHEMES as blocks."""
    file = GGUFFile(path)
    config = read_config(file)
    return config, GGUFTensors(file, config, PACKED_SCHEMES)

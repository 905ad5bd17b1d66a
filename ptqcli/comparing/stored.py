"""What a model takes on the disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.formats.gguf import open_tensors
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.model.config import load_config
from ptqcli.model.gguf import is_gguf
from ptqcli.model.quantized import scaled_floats
from ptqcli.model.source import ModelFolder


@dataclass(frozen=True, kw_only=True)
class StoredSize:
    """bytes: of all tensors. bits_per_weight: mean over the quantized matrices, scales and the like included; None where there is none.
    schemes: how many matrices have each, of a GGUF file by ggml's names of types."""

    bytes: int
    bits_per_weight: float | None = None
    schemes: Mapping[str, int] = field(default_factory=dict)


def stored_size(model: Path) -> StoredSize:
    """Of a folder or a GGUF file, packed or not. Raises PTQError for one that is damaged."""
    if is_gguf(model):
        tensors = open_tensors(model)[1]
        names = [name for name in tensors.names if tensors.is_quantized(name)]
        weights = sum(prod(tensors.weight_shape(name)) for name in names)
        return StoredSize(
            bytes=tensors.stored_bytes(),
            bits_per_weight=sum(map(tensors.block_bytes, names)) * 8 / weights if weights else None,
            schemes=Counter(map(tensors.block_type, names)),
        )
    quantized = getattr(load_config(model), "quantization_config", None) is not None
    if not quantized or scaled_floats(ModelFolder(model)) is not None:  # FP8 and the like run as numbers
        return StoredSize(bytes=SafetensorsFolder(model).total_bytes)
    packed = open_checkpoint(model)
    specs = [packed.spec(name) for name in packed.schemes]
    weights = sum(spec.out_features * spec.in_features for spec in specs)
    return StoredSize(
        bytes=packed.tensors.total_bytes,
        bits_per_weight=sum(map(packed.nbytes, packed.schemes)) * 8 / weights if weights else None,
        schemes=Counter(str(scheme) for scheme in packed.schemes.values()),
    )

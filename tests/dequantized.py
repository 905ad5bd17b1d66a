"""The truth about a packed folder: the numbers that the compressed-tensors library itself reads from it, in transformers' own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from ptqcli.checkpoint.tensors import SafetensorsFolder


def dequantized(folder: Path, model: Any) -> Any:
    """``model`` with the numbers of ``folder``, whose codes have 4 bits in groups of 16."""
    reader = SafetensorsFolder(folder)
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    state = model.state_dict()
    for name in [name.removesuffix(".weight_packed") for name in reader.names if name.endswith(".weight_packed")]:
        parts = {leaf: reader.read(f"{name}.{leaf}") for leaf in ("weight_packed", "weight_scale", "weight_shape")}
        weights = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=16)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
        state[f"{name}.weight"] = library.decompress(parts, scheme)["weight"]
    for name in reader.names:
        if name in state:
            state[name] = reader.read(name)
    model.load_state_dict(state)
    return model

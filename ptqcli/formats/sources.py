"""The one way to open a model that is to be worked on, whatever its weights are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ptqcli.formats.dequantized import DequantizedModel
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.model.gguf import GGUFModel, is_gguf
from ptqcli.model.quantized import ScaledModel, already_quantized, scaled_floats
from ptqcli.model.source import ModelFolder, ModelSource
from ptqcli.untrusted import shown


def open_source(path: Path, allow_requantize: bool = False) -> ModelSource:
    """The model in a folder, or of a GGUF file. Weights that are stored in fewer bits are what they stand for, each made when it is read.

    allow_requantize: one whose weights are quantized already is taken, too; FP8 always is.
    Raises PTQError or UsageError, see ``ModelFolder``, ``GGUFModel`` and ``open_checkpoint``.
    """
    if is_gguf(path):
        return GGUFModel(path, allow_requantize)
    folder = ModelFolder(path)
    entry = getattr(folder.config, "quantization_config", None)
    if entry is None:
        return folder
    scaled = scaled_floats(folder)
    if scaled is not None:
        return ScaledModel(folder, scaled, allow_requantize)
    if not allow_requantize:
        raise already_quantized(str(path), shown(entry.get("quant_method")) if isinstance(entry, Mapping) else shown(entry))
    packed = open_checkpoint(path)
    return DequantizedModel(packed, packed.config.dtype)

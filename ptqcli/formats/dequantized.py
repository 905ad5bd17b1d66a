"""A quantized checkpoint as a plain model: every linear has a ``weight`` again, which is dequantized when it is read."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.tensors import TensorSource
from ptqcli.formats.packed_checkpoint import PackedCheckpoint
from ptqcli.model.gguf import GGUFModel, is_gguf
from ptqcli.model.quantized import not_quantized, requantized_note
from ptqcli.model.source import ModelFolder, ModelSource


class DequantizedTensors(TensorSource):
    """The tensors of a checkpoint with the weight of each quantized linear in ``dtype``, None for that of its scales."""

    def __init__(self, packed: PackedCheckpoint, dtype: torch.dtype | None = None) -> None:
        self._packed, self._dtype = packed, dtype
        self._linears = {f"{packed.stored_linear(name)}.weight": name for name in packed.schemes}

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted({*self._packed.plain_tensors, *self._linears}))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of ``name``. Raises PTQError, here and below, if there is no such tensor."""
        if name not in self._linears:
            return self._packed.tensors.shape(name)
        spec = self._packed.spec(self._linears[name])
        shape = (spec.out_features, spec.in_features)
        return shape[::-1] if spec.kind == "Conv1D" else shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of ``name``."""
        if name not in self._linears:
            return self._packed.tensors.dtype(name)
        return self._dtype or self._packed.spec(self._linears[name]).scale_dtype

    def read(self, name: str) -> Tensor:
        """The tensor ``name``. Raises PTQError for damaged codes."""
        if name not in self._linears:
            return self._packed.tensors.read(name)
        linear = self._linears[name]
        value = self._packed.weight(linear).dequantize(self.dtype(name))
        return value.t().contiguous() if self._packed.spec(linear).kind == "Conv1D" else value


class DequantizedModel:
    """The model in a quantized checkpoint, a ``ModelSource``. dtype: as in ``DequantizedTensors``."""

    def __init__(self, packed: PackedCheckpoint, dtype: torch.dtype | None = None) -> None:
        path = packed.folder
        self._files: ModelSource = GGUFModel(path, allow_requantize=True) if is_gguf(path) else ModelFolder(path)
        counts = Counter(map(str, packed.schemes.values()))
        self.packed = packed
        self.notes = (requantized_note(f"{packed.format.name}: {', '.join(f'{name} x {count}' for name, count in counts.items())}"),)
        self.folder: Path | None = packed.folder
        self.where, self.config = self._files.where, copy.deepcopy(self._files.config)
        self.config.quantization_config = None
        self.tensors = DequantizedTensors(packed, dtype)

    def tokenizer(self) -> Any:
        """The tokenizer. Raises PTQError when there is none."""
        return self._files.tokenizer()

    def config_json(self) -> dict[str, Any]:
        """What stands in config.json, but for what tells readers that the model is quantized."""
        return not_quantized(self._files.config_json())

    def write_auxiliary(self, folder: Directory) -> None:
        """Put the files beside the weights into ``folder``."""
        self._files.write_auxiliary(folder)

    def check_unchanged(self) -> None:
        """Raise PTQError, naming the file, if one that the model is read from has changed."""
        self._files.check_unchanged()

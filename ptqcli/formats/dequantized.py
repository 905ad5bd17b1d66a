"""A quantized checkpoint as a plain model: every linear has a ``weight`` again, which is dequantized when it is read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.tensors import TensorSource
from ptqcli.formats.packed_checkpoint import PackedCheckpoint
from ptqcli.model.source import ModelFolder

QUANTIZATION_KEYS = ("quantization_config", "compression_config")


class DequantizedTensors(TensorSource):
    """The tensors of a checkpoint with the weight of each quantized linear in the dtype of its scales."""

    def __init__(self, packed: PackedCheckpoint) -> None:
        self._packed = packed
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
        return self._packed.spec(self._linears[name]).scale_dtype if name in self._linears else self._packed.tensors.dtype(name)

    def read(self, name: str) -> Tensor:
        """The tensor ``name``. Raises PTQError for damaged codes."""
        if name not in self._linears:
            return self._packed.tensors.read(name)
        linear = self._linears[name]
        value = self._packed.weight(linear).dequantize(self.dtype(name))
        return value.t().contiguous() if self._packed.spec(linear).kind == "Conv1D" else value


class DequantizedModel:
    """The model in a quantized checkpoint, a ``ModelSource``."""

    def __init__(self, packed: PackedCheckpoint) -> None:
        self._files = ModelFolder(packed.folder)
        self.folder: Path | None = packed.folder
        self.where, self.config = self._files.where, copy.deepcopy(self._files.config)
        self.config.quantization_config = None
        self.tensors = DequantizedTensors(packed)

    def tokenizer(self) -> Any:
        """The tokenizer. Raises PTQError when there is none."""
        return self._files.tokenizer()

    def config_json(self) -> dict[str, Any]:
        """What stands in config.json, but for what tells readers that the model is quantized."""
        return {key: value for key, value in self._files.config_json().items() if key not in QUANTIZATION_KEYS}

    def write_auxiliary(self, folder: Directory) -> None:
        """Put the files beside the weights into ``folder``."""
        self._files.write_auxiliary(folder)

    def check_unchanged(self) -> None:
        """Raise PTQError, naming the file, if one that the model is read from has changed."""
        self._files.check_unchanged()

"""A model of which only config.json is there: enough to plan a run, on a machine that has no room for the weights."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ptqcli.checkpoint.tensors import NoTensorError, TensorSource
from ptqcli.errors import PTQError
from ptqcli.model.config import build_named_class, build_on_meta
from ptqcli.model.source import ModelFolder
from ptqcli.untrusted import shown

# Tensors that such a model may have: the largest public ones, of 200,000, store each expert by itself.
MOST_TENSORS = 250_000

# How the names of files end that hold weights, or tell where they are.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def is_declared(folder: Path) -> bool:
    """Whether ``folder`` has a config.json and no weights, in whatever form."""
    return (folder / "config.json").is_file() and not any(path.name.endswith(WEIGHTS) for path in folder.iterdir())


class DeclaredModel(ModelFolder):
    """The folder as a model whose tensors have names, shapes and dtypes, those of transformers' class, and cannot be read."""

    notes: tuple[str, ...] = ("planned from config.json alone: neither weights nor a calibration text were looked at",)

    @cached_property
    def tensors(self) -> TensorSource:  # type: ignore[override]
        """Those that the class has. Raises PTQError for a config that transformers cannot build or that asks for too much."""
        named = self.config_json().get("architectures")
        name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
        model = None if name is None else build_named_class(self.config, name, MOST_TENSORS)
        model = build_on_meta(self.config, MOST_TENSORS) if model is None else model
        kept = model.state_dict().keys()
        parameters = {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()] if name in kept}
        dtype = getattr(self.config, "dtype", None)
        if not isinstance(dtype, torch.dtype):
            raise PTQError(f"{self.where}/config.json: has dtype {shown(dtype)}; to plan without weights, give the one that they have")
        told = {name: (tuple(each.shape), dtype if each.is_floating_point() else each.dtype) for name, each in parameters.items()}
        return DeclaredTensors(told)

    def check_unchanged(self) -> None:
        """Nothing of it is read twice."""


class DeclaredTensors(TensorSource):
    """Names with shapes and dtypes."""

    def __init__(self, told: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._told = told

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self._told))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of ``name``. Raises PTQError, here and below, if there is no such tensor."""
        return self._entry(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of ``name``."""
        return self._entry(name)[1]

    def read(self, name: str) -> Tensor:
        """Raises PTQError."""
        raise PTQError(f"tensor {name} cannot be read: only config.json is there")

    def _entry(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        if name not in self._told:
            raise NoTensorError(f"the model's class has no tensor {name}")
        return self._told[name]

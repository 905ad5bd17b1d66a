"""Where a model comes from: its configuration, its tensors, and the files beside them."""

from __future__ import annotations

import copy
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ptqcli.checkpoint.auxiliary import auxiliary_files, copy_auxiliary_files, load_tokenizer
from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.tensors import MemoryTensors, SafetensorsFolder, Stamp, TensorSource
from ptqcli.errors import PTQError
from ptqcli.model.config import load_config, read_config
from ptqcli.temporary import temporary_folder


class ModelSource(Protocol):
    """A model to quantize, wherever it is. where: what messages call it. folder: where it is on disk, None if it is not.

    notes: what a person should know of its weights beforehand, a line each.
    """

    @property
    def where(self) -> str: ...

    @property
    def folder(self) -> Path | None: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    @property
    def config(self) -> Any:
        """The transformers configuration."""

    @property
    def tensors(self) -> TensorSource:
        """The stored tensors."""

    def tokenizer(self) -> Any:
        """The tokenizer. Raises PTQError when there is none."""

    def config_json(self) -> dict[str, Any]:
        """What stands in config.json."""

    def write_auxiliary(self, folder: Directory) -> None:
        """Put tokenizer, generation config, chat template and the like into ``folder``."""

    def check_unchanged(self) -> None:
        """Raise PTQError, naming the file, if one that the model is read from is not what it was when the model was opened."""


class ModelFolder:
    """A local folder with config.json and safetensors.

    Raises PTQError or UsageError for one that holds no model, an adapter, or links to files that are elsewhere, see ``auxiliary_files``.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.folder: Path | None = folder
        self._folder = folder
        self.where = str(folder)
        before = Stamp(folder / "config.json")
        self.config = load_config(folder)
        self._auxiliary = auxiliary_files(folder)
        self._stamps = [before, *(Stamp(folder / name) for name in self._auxiliary)]

    @cached_property
    def tensors(self) -> SafetensorsFolder:
        """The tensors of its safetensors files. Raises PTQError for missing or damaged ones."""
        return SafetensorsFolder(self._folder)

    def tokenizer(self) -> Any:
        """The tokenizer in the folder. Raises PTQError when there is none."""
        return load_tokenizer(self._folder, self.config)

    def config_json(self) -> dict[str, Any]:
        """What stands in config.json, but for keys that select code."""
        return read_config(self._folder)

    def write_auxiliary(self, folder: Directory) -> None:
        """Copy the files beside the weights."""
        copy_auxiliary_files(self._folder, self._auxiliary, folder)

    def check_unchanged(self) -> None:
        """Raise PTQError, naming it, if a file was replaced, cut or written to since the model was opened."""
        self.tensors.check_unchanged()
        for stamp in self._stamps:
            stamp.check()


class ModelInMemory:
    """A loaded transformers model; nothing of it is changed. tokenizer: its own, needed where there is calibration text.

    Raises PTQError for one that is quantized already.
    """

    where = "the model in memory"
    folder: Path | None = None
    notes = ()

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        if getattr(model, "hf_quantizer", None) is not None:
            raise PTQError(f"{self.where} is quantized already; start from the original")
        self.config = copy.deepcopy(model.config)
        if type(model).__module__.startswith("transformers."):
            self.config.architectures = [type(model).__name__]
        self._model, self._tokenizer = model, tokenizer

    @cached_property
    def tensors(self) -> TensorSource:
        """Its parameters and buffers, each that several modules share once. Raises PTQError for parameters without values."""
        named: dict[str, Tensor] = {}
        seen: set[tuple[int, torch.Size]] = set()
        for name, tensor in self._model.state_dict().items():
            if tensor.is_meta:
                raise PTQError(f"{self.where}: {name} holds no values; load the model whole, without offloading")
            if (tensor.data_ptr(), tensor.shape) not in seen:
                seen.add((tensor.data_ptr(), tensor.shape))
                named[name] = tensor
        return MemoryTensors(named)

    def tokenizer(self) -> Any:
        """The tokenizer that was given. Raises PTQError when none was."""
        if self._tokenizer is None:
            raise PTQError(f"{self.where} needs its tokenizer for the calibration text; give tokenizer=")
        return self._tokenizer

    def config_json(self) -> dict[str, Any]:
        """What transformers would write into config.json."""
        values: dict[str, Any] = json.loads(self.config.to_json_string(use_diff=True))
        return {"architectures": [type(self._model).__name__], **values, "dtype": str(self._model.dtype).removeprefix("torch.")}

    def write_auxiliary(self, folder: Directory) -> None:
        """Save tokenizer and generation config."""
        with temporary_folder() as saved:
            for part in (self._tokenizer, getattr(self._model, "generation_config", None)):
                if part is not None:
                    part.save_pretrained(saved)
            copy_auxiliary_files(saved, auxiliary_files(saved), folder)

    def check_unchanged(self) -> None:
        """Nothing of it is on disk."""

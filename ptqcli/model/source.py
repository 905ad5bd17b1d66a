"""Where a model comes from: its configuration, its tensors, and the files beside them."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ptqcli.checkpoint.auxiliary import copy_auxiliary_files, load_tokenizer
from ptqcli.checkpoint.tensors import SafetensorsFolder, TensorSource
from ptqcli.model.config import load_config


class ModelSource(Protocol):
    """A model to quantize, wherever it is. where: what messages and the report call it."""

    @property
    def where(self) -> str: ...

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

    def write_auxiliary(self, folder: Path) -> None:
        """Put tokenizer, generation config, chat template and the like into ``folder``."""


class ModelFolder:
    """A local folder with config.json and safetensors. Raises PTQError or UsageError for one that holds no model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where = str(folder)
        self.config = load_config(folder)

    @cached_property
    def tensors(self) -> TensorSource:
        """The tensors of its safetensors files. Raises PTQError for missing or damaged ones."""
        return SafetensorsFolder(self.folder)

    def tokenizer(self) -> Any:
        """The tokenizer in the folder. Raises PTQError when there is none."""
        return load_tokenizer(self.folder)

    def config_json(self) -> dict[str, Any]:
        """What stands in config.json."""
        values: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return values

    def write_auxiliary(self, folder: Path) -> None:
        """Copy the files beside the weights."""
        copy_auxiliary_files(self.folder, folder)

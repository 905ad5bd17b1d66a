"""A model of which some tensors, and some values of its configuration, are others than those that are stored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.tensors import NewTensor, RewrittenTensors, TensorSource, WidenedTensors
from ptqcli.model.source import ModelSource


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """What changes of a model that goes on computing what it computed.

    tensors: by their stored names. config: values of the configuration, of that of the text model too where it has one. notes: what a
    person should know beforehand, a line each. done: what was done, in a line.
    """

    tensors: Mapping[str, NewTensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    done: str


class RewrittenSource:
    """``source`` with ``rewrite`` done to it when its tensors are read."""

    def __init__(self, source: ModelSource, rewrite: Rewrite) -> None:
        self.original, self.rewrite = source, rewrite
        self.where, self.folder, self.notes = source.where, source.folder, source.notes
        self.config = copy.deepcopy(source.config)
        for part in (self.config, self.config.get_text_config()):
            for key, value in rewrite.config.items():
                setattr(part, key, value)

    @cached_property
    def tensors(self) -> TensorSource:
        """Its tensors, those of the rewrite made when they are read."""
        return RewrittenTensors(self.original.tensors, self.rewrite.tensors)

    def tokenizer(self) -> Any:
        """The tokenizer. Raises PTQError when there is none."""
        return self.original.tokenizer()

    def config_json(self) -> dict[str, Any]:
        """What stands in config.json, with the changes."""
        values = {**self.original.config_json(), **self.rewrite.config}
        for key, part in values.items():
            if isinstance(part, dict) and self._is_text_config(part):
                values[key] = {**part, **self.rewrite.config}
        return values

    def _is_text_config(self, part: Mapping[str, Any]) -> bool:
        text = self.config.get_text_config()
        return text is not self.config and part.get("model_type") == text.model_type

    def write_auxiliary(self, folder: Directory) -> None:
        """Put the files beside the weights into ``folder``."""
        self.original.write_auxiliary(folder)

    def check_unchanged(self) -> None:
        """Raise PTQError, naming the file, if one that the model is read from has changed."""
        self.original.check_unchanged()


class WidenedSource:
    """``source`` as if its tensors were stored in float32."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self.where, self.folder, self.config, self.notes = source.where, source.folder, source.config, source.notes
        self.tensors: TensorSource = WidenedTensors(source.tensors)
        self.tokenizer, self.config_json = source.tokenizer, source.config_json
        self.write_auxiliary, self.check_unchanged = source.write_auxiliary, source.check_unchanged

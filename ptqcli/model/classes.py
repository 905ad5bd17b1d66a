"""The classes that readers build of one model's files: the auto class's, which may be a part of it, and the one that config.json names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ptqcli.errors import PTQError
from ptqcli.model.config import build_named_class, build_on_meta
from ptqcli.model.kinds import ModelKind
from ptqcli.model.names import DiskNames


@dataclass(frozen=True)
class ModelClasses:
    """Models on the meta device with the names of their tensors; the first is the one to work on.

    unbuilt: why the class that config.json names is not among them, or None. only_named: it is the only one that finds its tensors.
    """

    built: Sequence[tuple[nn.Module, DiskNames]]
    unbuilt: str | None = None
    only_named: bool = False

    def loaded_as(self, kind: ModelKind) -> str:
        """The class of transformers that loads the first from its files."""
        return type(self.built[0][0]).__name__ if self.only_named else kind.auto_class


def build_classes(config: Any, stored: Sequence[str], named: object) -> ModelClasses:
    """The classes of a model with the tensors ``stored``; named: what ``architectures`` of config.json says.

    It is the auto class's that is worked on, unless only the one that config.json names, with an output head like that, finds all of its
    tensors. Raises PTQError if transformers cannot build that of the auto class.
    """
    model = build_on_meta(config, len(stored))
    first = (model, DiskNames(model, stored))
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else type(model).__name__
    if name == type(model).__name__:
        return ModelClasses([first])
    try:
        other = build_named_class(config, name, len(stored))
    except PTQError as error:
        return ModelClasses([first], str(error))
    if other is None:
        return ModelClasses([first], f"transformers has no class {name} for it, which config.json names")
    second = (other, DiskNames(other, stored))
    if first[1].missing and not second[1].missing and other.get_output_embeddings() is not None:  # type: ignore[operator]
        return ModelClasses([second], only_named=True)
    return ModelClasses([first, second])

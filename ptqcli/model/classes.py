"""The classes that readers build of one model's files: the auto class's, which may be a part of it, and the one that config.json names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ptqcli.checkpoint.stacked import StackPart
from ptqcli.errors import PTQError
from ptqcli.model.config import build_named_class, build_on_meta
from ptqcli.model.experts import separate_experts
from ptqcli.model.kinds import ModelKind, kind_of
from ptqcli.model.names import DiskNames


@dataclass(frozen=True)
class ModelClasses:
    """Models on the meta device with the names of their tensors; the first is the one to work on.

    unbuilt: why the class that config.json names is not among them, or None. only_named: it is the only one that finds its tensors.
    cut: tensors that take the places of stored stacks in the names, see ``experts``.
    """

    built: Sequence[tuple[nn.Module, DiskNames]]
    unbuilt: str | None = None
    only_named: bool = False
    cut: Mapping[str, StackPart] = field(default_factory=dict)

    def loaded_as(self, kind: ModelKind) -> str:
        """The class of transformers that loads the first from its files."""
        return type(self.built[0][0]).__name__ if self.only_named else kind.auto_class


def build_classes(config: Any, stored: Sequence[str], named: object) -> ModelClasses:
    """The classes of a model with the tensors ``stored``; named: what ``architectures`` of config.json says.

    It is the auto class's that is worked on, unless only the one that config.json names, with an output head like that, finds all of its
    tensors. Raises PTQError if transformers cannot build that of the auto class.
    """
    model = build_on_meta(config, len(stored))
    kind = kind_of(config)
    cut = separate_experts(model, kind, stored)
    matrices = _unstacked(stored, cut)
    first = (model, DiskNames(model, matrices))
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else type(model).__name__
    if name == type(model).__name__:
        return ModelClasses([first], cut=cut)
    try:
        other = build_named_class(config, name, len(stored))
    except PTQError as error:
        return ModelClasses([first], str(error), cut=cut)
    if other is None:
        return ModelClasses([first], f"transformers has no class {name} for it, which config.json names", cut=cut)
    if first[1].missing:  # what was cut for a class that does not fit is not cut for the other
        cut, matrices = {}, list(stored)
    added = separate_experts(other, kind, matrices)
    cut = {**cut, **added}
    second = (other, DiskNames(other, _unstacked(matrices, added)))
    if first[1].missing and not second[1].missing and other.get_output_embeddings() is not None:  # type: ignore[operator]
        return ModelClasses([second], only_named=True, cut=cut)
    return ModelClasses([first, second], cut=cut)


def _unstacked(stored: Sequence[str], cut: Mapping[str, StackPart]) -> list[str]:
    """The tensors that there are when those of ``cut`` are in the places of their stacks."""
    return sorted({*stored, *cut} - {part.stack for part in cut.values()})

"""Names of parameters in memory and in the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ptqcli.errors import PTQError


class DiskNames:
    """Parameter and buffer names in memory -> tensor names in the file.

    unmatched: tensors that the model has no use for. missing: parameters that the file has no tensor for.
    """

    def __init__(self, model: nn.Module, stored: Sequence[str]) -> None:
        memory = set(model.state_dict())
        prefix = getattr(model, "base_model_prefix", "") + "."
        renamings, conversions = declared_changes(model)
        self._disk: dict[str, str] = {}
        self.unmatched: list[str] = []
        self._assembled: list[str] = []
        self._twice: list[tuple[str, str, str]] = []  # parameter, and the two tensors that are stored for it
        for name in stored:
            target = next((t for t in candidates(name, prefix, renamings) if t in memory), None)
            if target in self._disk:
                self._twice.append((target, self._disk[target], name))
            elif target is not None:
                self._disk[target] = name
            elif any(conversion.rename_source_key(name)[1] is not None for conversion in conversions):
                self._assembled.append(name)
            else:
                self.unmatched.append(name)
        # Parameters that are one; the file holds one of the two, most often but not always the source.
        tied = [*getattr(model, "all_tied_weights_keys", {}).items(), *_same_modules(model)]
        for name, twin in (*((source, target) for target, source in tied), *tied):
            if name in memory and twin in self._disk:
                self._disk.setdefault(name, self._disk[twin])
        self.missing = [name for name, _ in model.named_parameters() if name not in self._disk]

    def refuse_assembled(self) -> None:
        """Raises PTQError if transformers makes a parameter of the model from several stored tensors."""
        for name in self._assembled:
            raise PTQError(f"tensor {name}: transformers assembles this parameter from several stored tensors, which is not supported yet")

    def refuse_twice(self) -> None:
        """Raises PTQError if two stored tensors, under an old and a new name, are one parameter of the model: readers differ in which they
        take."""
        for name, first, second in self._twice:
            raise PTQError(f"tensors {first} and {second} are both stored for {name}; remove the one that is not meant")

    def disk(self, name: str) -> str | None:
        """Stored name of ``name``, or None."""
        return self._disk.get(name)

    def items(self) -> list[tuple[str, str]]:
        """Pairs (name in memory, stored name)."""
        return list(self._disk.items())


def declared_changes(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """What transformers does with the tensors of a file on loading it as ``model``: renamings, and converters, which make others."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    declared = get_model_conversion_mapping(model)
    renamings = [entry for entry in declared if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in declared if isinstance(entry, WeightConverter)]


def _same_modules(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of a parameter of a module that stands in several places, each with the first of them."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        source = first.setdefault(id(parameter), name)
        if source != name:
            yield name, source


def candidates(name: str, prefix: str, renamings: Sequence[Any]) -> Iterator[str]:
    """What the stored tensor ``name`` may be called in the model; prefix: of its base model, with the dot."""
    renamed = name
    for renaming in renamings:
        renamed = renaming.rename_source_key(renamed)[0]
    for candidate in (name, renamed):
        yield candidate
        yield prefix + candidate
        yield candidate.removeprefix(prefix)

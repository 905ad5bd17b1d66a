"""Names of parameters in memory and in the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ptqcli.errors import PTQError


class DiskNames:
    """Parameter and buffer names in memory -> tensor names in the file."""

    def __init__(self, model: nn.Module, stored: Sequence[str]) -> None:
        memory = set(model.state_dict())
        prefix = getattr(model, "base_model_prefix", "") + "."
        renamings, conversions = _declared_renamings(model)
        self._disk: dict[str, str] = {}
        self.unmatched: list[str] = []
        for name in stored:
            target = next((t for t in _candidates(name, prefix, renamings) if t in memory), None)
            if target is None:
                self._refuse_conversion(name, conversions)
                self.unmatched.append(name)
            else:
                self._disk.setdefault(target, name)
        for tied, source in _tied(model, memory):
            # The file holds one of the two, most often but not always the embedding.
            for name, twin in ((tied, source), (source, tied)):
                if twin in self._disk:
                    self._disk.setdefault(name, self._disk[twin])

    @staticmethod
    def _refuse_conversion(name: str, conversions: Sequence[Any]) -> None:
        for conversion in conversions:
            if conversion.rename_source_key(name)[1] is not None:
                raise PTQError(
                    f"tensor {name}: transformers assembles this parameter from several stored tensors, which is not supported yet"
                )

    def disk(self, name: str) -> str | None:
        """Stored name of ``name``, or None."""
        return self._disk.get(name)

    def items(self) -> list[tuple[str, str]]:
        """Pairs (name in memory, stored name)."""
        return list(self._disk.items())


def _declared_renamings(model: nn.Module) -> tuple[list[Any], list[Any]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    declared = get_model_conversion_mapping(model)
    renamings = [entry for entry in declared if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in declared if isinstance(entry, WeightConverter)]


def _candidates(name: str, prefix: str, renamings: Sequence[Any]) -> Iterator[str]:
    renamed = name
    for renaming in renamings:
        renamed = renaming.rename_source_key(renamed)[0]
    for candidate in (name, renamed):
        yield candidate
        yield prefix + candidate
        yield candidate.removeprefix(prefix)


def _tied(model: nn.Module, memory: set[str]) -> Iterator[tuple[str, str]]:
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    names = {module: name for name, module in model.named_modules()}
    if head in names and embedding in names:
        tied, source = f"{names[head]}.weight", f"{names[embedding]}.weight"
        if tied in memory and source in memory:
            yield tied, source

"""What became of a budget, and the losses that it was shared out by, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ptqcli.cli.console import Output, size_text

if TYPE_CHECKING:
    from ptqcli.sensitivity.allocation import Allocation

NONE = "-"  # of a candidate that a group cannot have


def show_allocation(allocation: Allocation, words: Output) -> None:
    """The scheme of each group of linears, beside what each candidate would have cost, and the uniform schemes that keep the budget."""
    columns = ("group", "scheme", "size", *(f"loss in {name}" for name in allocation.candidates))
    words.table(f"Schemes for {allocation.target}; losses by {allocation.method}, {allocation.unit}", columns, _rows(allocation))
    if allocation.uniform:
        rows = ([each.scheme, f"{each.bits:.3f}", size_text(each.nbytes), f"{each.divergence:.4g}"] for each in allocation.uniform)
        words.table("Uniform schemes that keep the budget, rounded to nearest", ("scheme", "bits/weight", "size", allocation.measure), rows)


def _rows(allocation: Allocation) -> Iterator[Sequence[str]]:
    for group in allocation.groups:
        size = group.nbytes[allocation.candidates.index(group.scheme)]
        yield (group.name, group.scheme, NONE if size is None else size_text(size), *map(loss_text, group.losses))


def loss_text(loss: float | None) -> str:
    """A loss as people compare it."""
    return NONE if loss is None else f"{loss:.3g}"

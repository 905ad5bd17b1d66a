"""Whether a run fits into the memory that it may take: how many activations are held, and what to ask for where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ptqcli.errors import PTQError, UsageError
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources, free_bytes, process_bytes

# Of what is free when a run begins and no --memory is given; the rest is for other programs.
SHARE_OF_FREE = 0.9
# Activations are held in memory up to what is left of it, in steps of a factor of two from here down, or not at all.
MOST_HELD, LEAST_HELD = 1 << 40, 64 << 20
SHORT_SEQLEN = 512  # a window that is tried where a longer one does not fit

# The peak of a recipe in windows of so many tokens.
Need = Callable[[Recipe, Resources, int], int]


def allowed_bytes(resources: Resources) -> int:
    """What the whole process may take on its device, what it has taken already included."""
    if resources.memory is not None:
        return resources.memory
    held = process_bytes() if resources.device.type == "cpu" else 0
    return held + int(SHARE_OF_FREE * free_bytes(resources.device))


def with_budget(resources: Resources, need: Callable[[Resources], int]) -> Resources:
    """``resources`` with an activation budget: the one that is asked for, or the largest with which ``need`` stays within the memory."""
    if resources.activation_budget is not None:
        return resources
    allowed = allowed_bytes(resources)
    beside = free_bytes("cpu") // 2 if resources.device.type != "cpu" else MOST_HELD  # a GPU's hidden states are in the machine's memory
    budget = MOST_HELD
    while budget >= LEAST_HELD:
        tried = replace(resources, activation_budget=budget)
        if budget <= beside and need(tried) <= allowed:
            return tried
        budget //= 2
    return replace(resources, activation_budget=0)


def check_memory(needed: int, recipe: Recipe, resources: Resources, seqlen: int, need: Need) -> None:
    """Raise PTQError where a run that takes ``needed`` bytes may not; it names the first smaller request that fits.

    resources: with the budget of the plan. seqlen: tokens of a window.
    """
    allowed = allowed_bytes(resources)
    if needed <= allowed:
        return
    room = f"--memory allows {_gib(allowed)}" if resources.memory is not None else f"{_gib(allowed)} are free"
    told = f"this run takes about {_gib(needed)} of memory, and {room}"
    least = needed
    for words, other, tried, tokens in _smaller(recipe, resources, seqlen):
        size = need(other, tried, tokens)
        if size <= allowed:
            raise PTQError(f"{told}; with {words} it takes {_gib(size)}")
        least = min(least, size)
    raise PTQError(f"{told}; even with {words} it takes {_gib(least)}")


def _smaller(recipe: Recipe, resources: Resources, seqlen: int) -> Iterator[tuple[str, Recipe, Resources, int]]:
    """What takes less and less, with the flags that ask for it."""
    flags = []
    if resources.activation_budget:
        flags.append("--activation-budget 0")
        resources = replace(resources, activation_budget=0)
        yield " ".join(flags), recipe, resources, seqlen
    if resources.batch_size != 1:
        flags.append("--batch-size 1")
        resources = replace(resources, batch_size=1)
        yield " ".join(flags), recipe, resources, seqlen
    if seqlen > SHORT_SEQLEN:
        flags.append(f"--seqlen {SHORT_SEQLEN}")
        seqlen = SHORT_SEQLEN
        yield " ".join(flags), recipe, resources, seqlen
    try:
        rounding = replace(recipe, algo="rtn", options={}, finish="none", adapter_rank=0)
    except UsageError:  # its scheme is not for rounding
        rounding = recipe
    yield "--algo rtn", rounding, resources, seqlen


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"

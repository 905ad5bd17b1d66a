"""Measuring by one method: what it needs is looked at first, and what it finds is kept as it comes."""

from __future__ import annotations

import math
import time

from ptqcli.errors import PTQError, UsageError
from ptqcli.sensitivity.gradient import Gradient
from ptqcli.sensitivity.groups import Losses, Method, Work
from ptqcli.sensitivity.hawq import HAWQ
from ptqcli.sensitivity.journal import Journal
from ptqcli.sensitivity.kl import KL
from ptqcli.sensitivity.output import BlockOutput

METHODS: dict[str, Method] = {method.name: method for method in (Gradient(), KL(), HAWQ(), BlockOutput())}


def fits(method: Method, work: Work, allowed: int, held: int) -> bool:
    """Whether the process, which holds so many bytes already, takes no more than are allowed."""
    return held + method.needed_bytes(work) <= allowed


def check_method(method: Method, work: Work, allowed: int, held: int) -> None:
    """Raise an error where ``method`` cannot measure the model of ``work``. allowed, held: see ``fits``."""
    skeleton = work.skeleton
    if method.causal and not skeleton.kind.causal:
        told = f"sensitivity {method.name} looks at the next word, and {skeleton.where} is of the kind {skeleton.kind.name}"
        raise UsageError(f"{told}; use --sensitivity output")
    if not fits(method, work, allowed, held):
        needed = held + method.needed_bytes(work)
        told = f"sensitivity {method.name} takes about {needed / 2**30:.2f} GiB of memory, of which {allowed / 2**30:.2f} GiB may be taken"
        advice = "use --sensitivity output, which has one block in memory at a time" if method.whole else "give fewer or shorter windows"
        raise PTQError(f"{told}; {advice}")


def measured(method: Method, work: Work, journal: Journal) -> tuple[list[Losses], float]:
    """The losses of the candidates of each group, and the seconds that they took, those of runs that were ended included.

    Raises PTQError, by name, for a loss that is no number.
    """
    counts = [len(group.options) for group in work.groups]
    found = journal.losses(method.name, counts)
    before, start = journal.seconds(method.name), time.perf_counter()
    for number, losses in method.losses(work, set(found)) if len(found) < len(counts) else ():
        _check(method, work, number, losses)
        found[number] = losses
        if not method.at_once:
            journal.note(method.name, found, before + time.perf_counter() - start)
    if len(journal.losses(method.name, counts)) < len(counts):
        journal.note(method.name, found, before + time.perf_counter() - start)
    return [found[number] for number in range(len(counts))], journal.seconds(method.name)


def _check(method: Method, work: Work, number: int, losses: Losses) -> None:
    wrong = next((loss for loss in losses if loss is not None and not math.isfinite(loss)), None)
    if wrong is not None:
        raise PTQError(f"{work.groups[number].name}: sensitivity {method.name} is {wrong}; run the model in --dtype float32")

"""Versions of a model, each with its linears rounded in schemes of their own, beside the model as it is: the judge of an allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ptqcli.formats import LinearSpec
from ptqcli.model.whole import given_hidden
from ptqcli.sensitivity.groups import Work, replaced
from ptqcli.sensitivity.kl import divergence
from ptqcli.sensitivity.streamed import Streamed, Version


@torch.no_grad()
def divergences(work: Work, versions: Sequence[Mapping[str, LinearSpec]]) -> list[float]:
    """How far each of ``versions``, the spec of each linear by its path, is from the model as it is, on the windows of ``work``.

    Of a model that gives the next word KL(P || Q) at the logits, mean over the tokens, in nats. Of an encoder mean of |h' - h|^2 / |h|^2
    behind the last block.
    """
    stream = Streamed(work, 1 + len(versions))
    original, *others = stream.versions
    for index, block in stream.blocks():
        _run_block(stream, index, block, list(zip(others, versions, strict=True)))
        stream.advance(original, index, block)
        work.tell(index + 1, len(work.skeleton.blocks))
    if work.skeleton.kind.causal:
        return _at_logits(stream, original, others)
    batches = list(enumerate(stream.batches))
    return [
        sum(stream.error(each.hidden[start:stop], original.hidden[start:stop], batch) for batch, (start, stop) in batches) / stream.tokens
        for each in others
    ]


def _run_block(stream: Streamed, index: int, block: nn.Module, versions: Sequence[tuple[Version, Mapping[str, LinearSpec]]]) -> None:
    """Send each version through the block with its linears rounded; what several of them share is rounded once."""
    work = stream.work
    sites = [site for _, group in work.of_block(index) for site in group.sites]
    made: dict[LinearSpec, Tensor] = {}
    for version, specs in versions:
        weights = {}
        for site in sites:
            spec = specs[site.name]
            if spec not in made:
                made[spec] = work.rounded(site, spec)
            weights[site.name] = made[spec]
        with replaced(work.skeleton.model, weights):
            stream.advance(version, index, block)


def _at_logits(stream: Streamed, original: Version, others: Sequence[Version]) -> list[float]:
    work, skeleton = stream.work, stream.work.skeleton
    totals = [0.0] * len(others)
    with skeleton.loaded_outside(work.device, work.dtype) as model:

        def logits(version: Version, number: int) -> Tensor:
            with given_hidden(skeleton, version.hidden[number : number + 1].to(work.device)):
                found: Tensor = skeleton.kind.call(model, work.windows[number : number + 1].to(work.device)).logits
            return found

        for number in range(len(work.windows)):
            wanted = logits(original, number)
            for place, version in enumerate(others):
                totals[place] += divergence(wanted, logits(version, number))
    return [total / work.windows.numel() for total in totals]

"""Error of the output of a group's block, with the group rounded: one block in memory at a time, for models of any size.

    loss = mean over tokens of |h' - h|^2 / |h|^2        h, h' behind the block, of the model as it is and with the group rounded

The hidden state h is what all later blocks read, through norms that divide by its length. What they make of the error is not seen, so
groups of different depth compare less well than by methods that look at the logits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import ClassVar

import torch

from ptqcli.sensitivity.groups import Losses, Method, Work, largest_weight_bytes, replaced
from ptqcli.sensitivity.streamed import Streamed, streamed_bytes


class BlockOutput(Method):
    """See the module."""

    name: ClassVar[str] = "output"
    unit: ClassVar[str] = "relative squared error"
    whole: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    def needed_bytes(self, work: Work) -> int:
        """Two versions of a stream, and the rounded weights of a group."""
        group = max(group.weights for group in work.groups) * work.dtype.itemsize
        return streamed_bytes(work.skeleton, work, 2) + group + largest_weight_bytes(work)

    @torch.no_grad()
    def losses(self, work: Work, known: Collection[int]) -> Iterator[tuple[int, Losses]]:
        """Group by group, in the order of the blocks."""
        done, total = 0, sum(len(group.options) for number, group in enumerate(work.groups) if number not in known)
        if not total:
            return
        stream = Streamed(work, 1)
        [original] = stream.versions
        for index, block in stream.blocks():
            trials = [(number, group) for number, group in work.of_block(index) if number not in known]
            wanted = [stream.outputs(original, index, block, batch).cpu() for batch in range(len(stream.batches))] if trials else []
            for number, group in trials:
                found: Losses = []
                for specs in group.options:
                    loss = None
                    if specs is not None:
                        weights = {site.name: work.rounded(site, spec) for site, spec in zip(group.sites, specs, strict=True)}
                        with replaced(work.skeleton.model, weights):
                            outputs = (stream.outputs(original, index, block, batch) for batch in range(len(stream.batches)))
                            loss = sum(stream.error(each.cpu(), wanted[batch], batch) for batch, each in enumerate(outputs)) / stream.tokens
                    found.append(loss)
                    done += 1
                    work.tell(done, total)
                yield number, found
            stream.advance(original, index, block)

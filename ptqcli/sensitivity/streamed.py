"""The model a block at a time on a few windows: for models that are larger than memory, and several versions of one side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptqcli.calibration.record import BlockCall, record_calls
from ptqcli.model.skeleton import Skeleton
from ptqcli.sensitivity.groups import Work


@dataclass(frozen=True, kw_only=True)
class Version:
    """Hidden states of one version of the model, [windows, tokens, features] on the CPU, and the calls of its blocks on each batch."""

    hidden: Tensor
    calls: list[list[BlockCall]]


class Streamed:
    """The windows of ``work`` on their way through the blocks, in so many versions."""

    def __init__(self, work: Work, versions: int) -> None:
        self.work, skeleton = work, work.skeleton
        size = work.resources.windows_per_batch(work.windows.shape[1])
        recording = record_calls(skeleton, work.windows, size, work.device, work.dtype, _in_memory)
        skeleton.release(skeleton.before)
        self.batches, self.real = recording.batches, recording.real
        self.versions = [Version(hidden=recording.hidden, calls=recording.calls)]
        for _ in range(versions - 1):
            tables: dict[int, Any] = {}
            calls = [[call.in_other_model(tables) for call in of_block] for of_block in recording.calls]
            self.versions.append(Version(hidden=recording.hidden.clone(), calls=calls))

    def blocks(self) -> Iterator[tuple[int, nn.Module]]:
        """Each block with its weights, which leave when the next one is asked for."""
        for index in range(len(self.work.skeleton.blocks)):
            yield index, self.work.skeleton.load_block(index, self.work.device, self.work.dtype)
            self.work.skeleton.release(self.work.skeleton.units[index])

    def outputs(self, version: Version, index: int, block: nn.Module, batch: int) -> Tensor:
        """What the block, as it is now, gives for a batch of ``version``: [windows, tokens, features], on the device."""
        start, stop = self.batches[batch]
        hidden = version.hidden[start:stop].to(self.work.device, copy=True)  # a block may change its input in place
        return version.calls[index][batch].run(block, hidden)

    def advance(self, version: Version, index: int, block: nn.Module) -> None:
        """Send ``version`` through the block, as it is now."""
        for batch, (start, stop) in enumerate(self.batches):
            version.hidden[start:stop] = self.outputs(version, index, block, batch).cpu()

    def error(self, found: Tensor, wanted: Tensor, batch: int) -> float:
        """Sum over the tokens of a batch of |found - wanted|^2 / |wanted|^2 of hidden states [windows, tokens, features]."""
        wanted = wanted.float()
        difference = (found.float() - wanted).square().sum(-1, dtype=torch.float64)
        share = difference / wanted.square().sum(-1, dtype=torch.float64).clamp(min=torch.finfo(torch.float32).tiny)
        if self.real is not None:
            share = share * self.real[slice(*self.batches[batch])].to(share.device)
        return float(share.sum())

    @property
    def tokens(self) -> int:
        """Places of the windows that hold a token."""
        return self.work.windows.numel() if self.real is None else int(self.real.sum())


def streamed_bytes(skeleton: Skeleton, work: Work, versions: int) -> int:
    """Peak of the tensors: a block, what is outside of them, the hidden states of the versions, what is inside of a block on a batch."""
    itemsize = work.dtype.itemsize
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in skeleton.blocks]
    outside = sum(parameter.numel() for parameter in skeleton.model.parameters()) - sum(blocks)
    features = skeleton.config.get_text_config().hidden_size
    tokens = max(stop - start for start, stop in work.batches) * work.windows.shape[1]
    widest = max(max(site.in_features, site.out_features) for site in skeleton.linears)
    inside = tokens * (4 * features + 3 * widest) * itemsize
    return (2 * max(blocks) + outside) * itemsize + versions * work.windows.numel() * features * itemsize + inside


def _in_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)

"""The hidden states that a run carries from block to block, and the calls with which the model runs its blocks.

The quantized model's stream is always there; the original model's goes along beside it where a solver asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptqcli.calibration.hidden import HiddenStates, new_buffer
from ptqcli.calibration.record import BlockCall, Recording, record_calls, without_padding
from ptqcli.errors import PTQError
from ptqcli.estimate import TRIED_TOKENS
from ptqcli.model.skeleton import Skeleton
from ptqcli.resources import Resources
from ptqcli.solvers import Batch

# Tokens of the two window beginnings on which folds are looked for and proved.
PROBE_TOKENS = 12


class Streams:
    """The calibration of a run.

    quantized, original: hidden states before and behind the blocks at work; original is None unless it is asked for.
    """

    def __init__(self, recording: Recording, resources: Resources, folder: Path, original: bool) -> None:
        self.recording, self.resources = recording, resources
        budget = resources.activation_budget
        self.quantized = HiddenStates(recording.hidden, budget, folder)
        self.original = self.quantized.copy(budget, folder) if original else None
        self.original_calls = self._in_original(recording)

    def _in_original(self, recording: Recording) -> list[list[BlockCall]]:
        tables: dict[int, Any] = {}
        return [] if self.original is None else [[call.in_other_model(tables) for call in calls] for calls in recording.calls]

    def states(self) -> dict[str, Tensor]:
        """The hidden states that the blocks to come build on, by the names of the streams."""
        both = {"quantized": self.quantized.inputs}
        return both if self.original is None else {**both, "original": self.original.inputs}

    def advance(self) -> None:
        """The blocks at work are done: what is behind them is before the next ones."""
        self.quantized.advance()
        if self.original is not None:
            self.original.advance()

    @torch.no_grad()
    def follow(self, blocks: Sequence[nn.Module], indices: Sequence[int]) -> None:
        """Run the original stream through blocks that are as the model file has them."""
        if self.original is not None:
            for number, (start, stop) in enumerate(self.recording.batches):
                hidden = self.original.inputs[start:stop].to(self.resources.device, copy=True)
                for index, block in zip(indices, blocks, strict=True):
                    hidden = self.original_calls[index][number].run(block, hidden)
                self.original.outputs[start:stop] = hidden.cpu()

    @torch.no_grad()
    def settle(self, block: nn.Module, index: int, states: Tensor) -> None:
        """Run a block that is finished on the excerpts of the hidden ``states`` before it, for what it leaves to later ones."""
        for excerpt in self.recording.excerpts.values():
            if excerpt.calls[index].exchanged:
                excerpt.calls[index].run(block, excerpt.hidden(states).to(self.resources.device, copy=True))

    def forward(self, indices: Sequence[int], batch: int, blocks: Sequence[nn.Module], hidden: Tensor) -> Tensor:
        """``hidden`` [windows, tokens, features] of one batch through ``blocks``, called as the model calls those of ``indices``."""
        for index, block in zip(indices, blocks, strict=True):
            hidden = self.recording.calls[index][batch].run(block, hidden)
        return hidden

    def excerpt(self, name: str, index: int, states: Tensor) -> Callable[[nn.Module, torch.dtype], Tensor]:
        """Runs block ``index``, in any dtype, on the excerpt ``name`` of the hidden ``states`` before it."""
        excerpt = self.recording.excerpts[name]
        hidden, call = excerpt.hidden(states).to(self.resources.device), excerpt.calls[index]

        def run(block: nn.Module, dtype: torch.dtype) -> Tensor:
            behind = call.cast(dtype).run(block, hidden.to(dtype, copy=True))  # a copy: a block may change its input in place
            return without_padding(behind, excerpt.real)

        return run


class WindowBatches:
    """The batches before the blocks ``indices``, as often as they are asked for."""

    def __init__(self, streams: Streams, indices: Sequence[int]) -> None:
        self._streams, self._indices = streams, indices

    def __len__(self) -> int:
        return len(self._streams.recording.batches)

    def __iter__(self) -> Iterator[Batch]:
        for windows in self.windows:
            yield self.of(windows)

    @property
    def windows(self) -> Sequence[Sequence[int]]:
        """The numbers of the windows of each batch."""
        return [range(start, stop) for start, stop in self._streams.recording.batches]

    @property
    def mixes(self) -> bool:
        """Whether the blocks are called alike with all batches as large as the first."""
        calls, batches = self._streams.recording.calls, self.windows
        return all(
            calls[index][number] is calls[index][0]
            for index in self._indices
            for number, windows in enumerate(batches)
            if len(windows) == len(batches[0])
        )

    def of(self, windows: Sequence[int]) -> Batch:
        """The batch of these windows, see ``CalibrationBatches``."""
        streams, device = self._streams, self._streams.resources.device
        number = self.windows.index(windows) if isinstance(windows, range) else 0
        chosen = slice(windows.start, windows.stop) if isinstance(windows, range) else list(windows)
        real = None if streams.recording.real is None else streams.recording.real[chosen]
        targets = None if streams.original is None else without_padding(streams.original.outputs[chosen].to(device, copy=True), real)
        inputs = streams.quantized.inputs[chosen].to(device, copy=True)

        def run(blocks: Sequence[nn.Module], hidden: Tensor) -> Tensor:
            return without_padding(streams.forward(self._indices, number, blocks, hidden), real)

        return Batch(inputs, targets, run)


def record(
    skeleton: Skeleton,
    windows: Tensor,
    batch_size: int,
    dtype: torch.dtype,
    resources: Resources,
    folder: Path,
    original: bool,
    excerpts: bool,
) -> Streams:
    """Run the model up to its blocks on ``windows``, int64 [windows, tokens].

    batch_size: windows in one pass. dtype: of the calibration passes. original: keep the original model's stream, too. excerpts: record
    what transforms try things out on.
    Raises PTQError for tokens that the model does not know.
    """
    largest = int(windows.max())
    if largest >= skeleton.model.get_input_embeddings().num_embeddings:  # type: ignore[operator]
        raise PTQError(f"{skeleton.where}: the tokenizer gives token {largest}, which the model's embedding does not have")
    recording = record_calls(
        skeleton,
        windows,
        batch_size,
        resources.device,
        dtype,
        partial(new_buffer, budget=resources.activation_budget, folder=folder),
        _excerpts(*windows.shape) if excerpts else None,
    )
    return Streams(recording, resources, folder, original)


def record_again(streams: Streams, skeleton: Skeleton, windows: Tensor, batch_size: int, dtype: torch.dtype, excerpts: bool) -> None:
    """Let ``streams``, wherever they are, go on with ``batch_size`` windows in one pass; the other arguments as for ``record``.

    Not for blocks that leave something to later ones: what the finished ones have left would be gone.
    """
    recorded = _excerpts(*windows.shape) if excerpts else None

    def spare(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return streams.quantized.outputs  # which the next block fills anyway

    streams.recording = record_calls(skeleton, windows, batch_size, streams.resources.device, dtype, spare, recorded)
    streams.original_calls = streams._in_original(streams.recording)


def _excerpts(count: int, seqlen: int) -> dict[str, tuple[Sequence[int], int]]:
    tried = min(count, max(1, TRIED_TOKENS // seqlen))
    return {
        "probe": (range(min(2, count)), min(PROBE_TOKENS, seqlen)),
        "tried": (range(0, count // tried * tried, count // tried), seqlen),
    }

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
from ptqcli.calibration.record import BlockCall, Excerpt, Recording, record_calls, without_padding
from ptqcli.calibration.share import Share, bounds
from ptqcli.checkpoint.writer import flat_pieces, safetensors_header
from ptqcli.errors import PTQError
from ptqcli.estimate import TRIED_TOKENS
from ptqcli.model.skeleton import Skeleton
from ptqcli.pipeline.ranks import Ranks
from ptqcli.resources import Resources
from ptqcli.solvers import Batch

# Tokens of the two window beginnings on which folds are looked for and proved.
PROBE_TOKENS = 12
# Windows whose hidden states one process sends another at a time.
SENT_WINDOWS = 8


class Streams:
    """The calibration of a run.

    quantized, original: hidden states before and behind the blocks at work; original is None unless it is asked for. ranks: the processes
    that have the other windows. batch_size: windows in a batch of all.
    """

    def __init__(self, recording: Recording, batch_size: int, resources: Resources, folder: Path, original: bool, ranks: Ranks) -> None:
        self.recording, self.batch_size, self.resources, self.ranks = recording, batch_size, resources, ranks
        self.share = recording.share
        budget = resources.budget
        self.quantized = HiddenStates(recording.hidden, budget, folder)
        self.original = self.quantized.copy(budget, folder) if original else None
        self.original_calls = self._in_original(recording)

    def _in_original(self, recording: Recording) -> list[list[BlockCall]]:
        tables: dict[int, Any] = {}
        return [] if self.original is None else [[call.in_other_model(tables) for call in calls] for calls in recording.calls]

    def states(self) -> dict[str, Tensor]:
        """The hidden states of our windows that the blocks to come build on, by the names of the streams, in order."""
        both = {"quantized": self.quantized.inputs}
        return both if self.original is None else {"original": self.original.inputs, **both}

    def pieces(self) -> Iterator[Any]:
        """The bytes of a safetensors file of the states of all windows, for the first process; the others ``hand_over`` theirs."""
        states = self.states()
        yield safetensors_header({name: (own.dtype, (self.share.windows, *own.shape[1:])) for name, own in states.items()})
        for own in states.values():
            yield from flat_pieces(own)
            for rank in range(1, self.ranks.size):
                for start, stop in self._chunks(rank):
                    received = own.new_empty(stop - start, *own.shape[1:])
                    self.ranks.receive(received, rank)
                    yield from flat_pieces(received)

    def hand_over(self) -> None:
        """Send the states of our windows to the first process, which writes them."""
        for own in self.states().values():
            for start, stop in self._chunks(self.ranks.rank):
                self.ranks.send(own[start - self.share.first : stop - self.share.first], 0)

    def restore(self, read: Callable[[str, int, int], Tensor] | None = None) -> None:
        """Put states that were kept in the place of ours. read: gives the first process, which sends the others theirs, those of the
        windows [start, stop) of a stream.
        """
        for name, own in self.states().items():
            for rank in range(self.ranks.size):
                for start, stop in self._chunks(rank):
                    if read is not None:
                        piece = read(name, start, stop)
                        if rank:
                            self.ranks.send(piece, rank)
                        else:
                            own[start:stop] = piece
                    elif rank == self.ranks.rank:
                        self.ranks.receive(own[start - self.share.first : stop - self.share.first], 0)

    def _chunks(self, rank: int) -> Iterator[tuple[int, int]]:
        """The windows of process ``rank``, so many at a time as are sent."""
        first, stop = bounds(self.share.windows, self.batch_size, rank, self.ranks.size)
        return ((start, min(start + SENT_WINDOWS, stop)) for start in range(first, stop, SENT_WINDOWS))

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
                excerpt.calls[index].run(block, self._hidden(excerpt, states).to(self.resources.device, copy=True))

    def _hidden(self, excerpt: Excerpt, states: Tensor) -> Tensor:
        """The excerpt's part of the hidden ``states`` [windows, tokens, features], of which each process has some.

        Where tokens see what follows them, those of a beginning are not what the model makes of it alone, but still such as a block gets.
        """
        own = {self.share.first + window: states[window, : excerpt.tokens] for window in self.share.own(excerpt.windows)}
        found = {window: hidden for each in self.ranks.everyone(own) for window, hidden in each.items()}
        return torch.stack([found[window] for window in excerpt.windows])

    def excerpt(self, name: str, index: int, states: Tensor) -> Callable[[nn.Module, torch.dtype], Tensor]:
        """Runs block ``index``, in any dtype, on the excerpt ``name`` of the hidden ``states`` before it."""
        excerpt = self.recording.excerpts[name]
        hidden, call = self._hidden(excerpt, states).to(self.resources.device), excerpt.calls[index]

        def run(block: nn.Module, dtype: torch.dtype) -> Tensor:
            behind = call.cast(dtype).run(block, hidden.to(dtype, copy=True))  # a copy: a block may change its input in place
            return without_padding(behind, excerpt.real)

        return run


class WindowBatches:
    """The batches before the blocks ``indices``, as often as they are asked for: all of them, of which each process has its own windows."""

    def __init__(self, streams: Streams, indices: Sequence[int]) -> None:
        self._streams, self._indices, self._share = streams, indices, streams.share

    def __len__(self) -> int:
        return len(self.windows)

    def __iter__(self) -> Iterator[Batch]:
        for windows in self.windows:
            yield self.of(windows)

    @property
    def windows(self) -> Sequence[Sequence[int]]:
        """The numbers of the windows of each batch."""
        count, size = self._share.windows, self._streams.batch_size
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    @property
    def mixes(self) -> bool:
        """Whether the blocks are called alike with all batches as large as the first."""
        recording = self._streams.recording
        sizes = [stop - start for start, stop in recording.batches]
        ours = all(
            calls[number] is calls[sizes.index(size)]
            for calls in (recording.calls[index] for index in self._indices)
            for number, size in enumerate(sizes)
        )
        return all(self._streams.ranks.everyone(ours))

    def of(self, windows: Sequence[int]) -> Batch:
        """The batch of these windows, see ``CalibrationBatches``."""
        streams, device = self._streams, self._streams.resources.device
        chosen = self._share.own(windows)
        real = None if streams.recording.real is None else streams.recording.real[chosen]
        targets = None if streams.original is None else without_padding(streams.original.outputs[chosen].to(device), real)
        inputs = streams.quantized.inputs[chosen].to(device)
        calls = self._calls(windows, chosen) if chosen else []

        def run(blocks: Sequence[nn.Module], hidden: Tensor) -> Tensor:
            for call, block in zip(calls, blocks, strict=True):
                hidden = call.run(block, hidden)
            return without_padding(hidden, real)

        return Batch(inputs, targets, run)

    def _calls(self, windows: Sequence[int], chosen: Sequence[int]) -> list[BlockCall]:
        """How the model calls the blocks on the windows ``chosen`` of ours, which are those that we have of ``windows``."""
        recording = self._streams.recording
        if isinstance(windows, range):
            number = recording.batches.index((chosen[0], chosen[-1] + 1))
        elif self._streams.ranks.size > 1:
            return [recording.excerpts[_sized(len(chosen))].calls[index] for index in self._indices]
        else:
            number = 0
        return [recording.calls[index][number] for index in self._indices]


def record(
    skeleton: Skeleton,
    windows: Tensor,
    batch_size: int,
    dtype: torch.dtype,
    resources: Resources,
    folder: Path,
    original: bool,
    excerpts: bool,
    ranks: Ranks,
    mixed: bool,
) -> Streams:
    """Run the model up to its blocks on ``windows``, int64 [windows, tokens].

    batch_size: windows in one pass. dtype: of the calibration passes. original: keep the original model's stream, too. excerpts: record
    what transforms try things out on. ranks: who share the windows. mixed: any windows will be asked for as one batch.
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
        partial(new_buffer, budget=resources.budget, folder=folder),
        {
            **(_excerpts(*windows.shape) if excerpts else {}),
            **(_mixed_excerpts(min(batch_size, len(windows)), windows.shape[1]) if mixed and ranks.size > 1 else {}),
        },
        Share.of(windows, batch_size, ranks.rank, ranks.size),
    )
    return Streams(recording, batch_size, resources, folder, original, ranks)


def record_again(streams: Streams, skeleton: Skeleton, windows: Tensor, batch_size: int, dtype: torch.dtype, excerpts: bool) -> None:
    """Let ``streams``, wherever they are, go on with ``batch_size`` windows in one pass; the other arguments as for ``record``.

    For a run of one process. Not for blocks that leave something to later ones: what the finished ones have left would be gone.
    """
    recorded = _excerpts(*windows.shape) if excerpts else {}
    share = Share.of(windows, batch_size, 0, 1)

    def spare(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return streams.quantized.outputs  # which the next block fills anyway

    streams.recording = record_calls(skeleton, windows, batch_size, streams.resources.device, dtype, spare, recorded, share)
    streams.batch_size, streams.share = batch_size, share
    streams.original_calls = streams._in_original(streams.recording)


def _excerpts(count: int, seqlen: int) -> dict[str, tuple[Sequence[int], int]]:
    tried = min(count, max(1, TRIED_TOKENS // seqlen))
    return {
        "probe": (range(min(2, count)), min(PROBE_TOKENS, seqlen)),
        "tried": (range(0, count // tried * tried, count // tried), seqlen),
    }


def _mixed_excerpts(size: int, seqlen: int) -> dict[str, tuple[Sequence[int], int]]:
    """Of a batch of ``size`` windows a process has any number; the calls for each."""
    return {_sized(count): (range(count), seqlen) for count in range(1, size + 1)}


def _sized(count: int) -> str:
    return f"the first {count}"

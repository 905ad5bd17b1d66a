"""One block over all calibration batches in two models at once: the quantized one's, and as the model file has it.

Every batch runs through both blocks side by side, each on its own model's hidden states, and both stop in front of the same stage
(``walk.py``). So a stage's statistics pair the input of a linear with what the original model has in its place, token by token, and with
the drift of the residual stream: what the original's has over the quantized one's there. That begins as the difference of the hidden
states before the block; each linear that writes into the stream (``transforms.residual``) adds the difference of its outputs.

Every HELD_OUT-th window is held out: its moments are kept apart as well, so that something can be chosen on tokens that a solution was
not fitted to. Of fewer windows the last is held out, a single one is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ptqcli.calibration.statistics import InputStatistics, Pairs, StatisticsRequest
from ptqcli.calibration.walk import CalibratedBlock, Lanes, taken_back
from ptqcli.errors import PTQError
from ptqcli.model.discovery import StopForward

HELD_OUT = 8


class PairedBlock:
    """A block in both models.

    quantized: whose linears are replaced on the way. original: the same block, with weights of its own that stay. writers: local name ->
    factor of the linears that write into the residual stream. budget: bytes of activations that may be asleep at a time.
    """

    def __init__(self, quantized: CalibratedBlock, original: CalibratedBlock, writers: Mapping[str, float], budget: int) -> None:
        self.quantized, self.original, self.writers = quantized, original, writers
        self.blocks = ((quantized, -1.0), (original, 1.0))
        drift = quantized.source.numel() * 4 if writers else 0
        self.suspended_fits = quantized.bytes_asleep() + original.bytes_asleep() + drift <= budget
        self._drift: dict[int, Tensor] = {}  # batch -> [windows, tokens, features], where there are writers
        self._batch = 0  # the one that runs

    def sequential(self, needs: StatisticsRequest) -> Iterator[tuple[int, InputStatistics]]:
        """Yield (stage, statistics) in running order, as ``CalibratedBlock.sequential``; afterwards both targets hold outputs."""
        handles = [handle for block, sign in self.blocks for handle in self._writer_hooks(block, sign)]
        try:
            yield from self._suspended(needs) if self.suspended_fits else self._repeated(needs)
        finally:
            for handle in handles:
                handle.remove()
            self._drift.clear()

    def _writer_hooks(self, block: CalibratedBlock, sign: float) -> Iterator[Any]:
        def add(factor: float) -> Callable[..., None]:
            def hook(_module: Any, _args: Any, output: Tensor) -> None:
                drift = self._drift[self._batch]
                drift.add_(output.view_as(drift).float(), alpha=sign * factor)

            return hook

        for local, factor in self.writers.items():
            yield block.block.get_submodule(local).register_forward_hook(add(factor))

    def _begin(self, batch: int) -> None:
        self._batch = batch
        if self.writers:
            start, stop = self.quantized.batches[batch]
            before = [block.source[start:stop].to(block.device, torch.float32, copy=True) for block, _ in self.blocks]
            self._drift[batch] = before[1].sub_(before[0])

    def _empty(self, stage: int, needs: StatisticsRequest) -> InputStatistics:
        statistics = self.quantized.empty_statistics(stage, needs)
        writes = any(local in self.writers for local in self.quantized.stages[stage])
        features, hidden = self.quantized.features(stage), self.quantized.source.shape[-1]
        held = self.quantized.share.windows > 1
        statistics.pairs = Pairs.empty(features, hidden if writes else None, self.quantized.device, held, torch.float64)
        return statistics

    def _add(self, statistics: InputStatistics, batch: int, stage: int, x: Tensor, f: Tensor) -> None:
        start, stop = self.quantized.batches[batch]
        tokens, share = self.quantized.source.shape[1], self.quantized.share
        count = (stop - start) * tokens
        x, f = (inputs.reshape(-1, inputs.shape[-1]) for inputs in (x, f))
        if len(x) != count or len(f) != count:
            where = f"{self.quantized.calls[batch].where}.{self.quantized.stages[stage][0]}"
            raise PTQError(
                f"{where}: does not see each token once, so its inputs cannot "
                "be paired with those in the original model; use --target quantized"
            )
        numbers = range(share.first + start, share.first + stop)
        held = torch.tensor([is_held_out(window, share.windows) for window in numbers]).repeat_interleave(tokens).to(x.device)
        assert statistics.pairs is not None
        drift = self._drift[batch].reshape(count, -1) if statistics.pairs.drift is not None else None
        x, f, held = (self.quantized.tokens_of(batch, rows) for rows in (x, f, held.unsqueeze(1)))
        drift = None if drift is None else self.quantized.tokens_of(batch, drift)
        statistics.add(x)
        statistics.pairs.add(x, f, drift, held.squeeze(1))

    def _suspended(self, needs: StatisticsRequest) -> Iterator[tuple[int, InputStatistics]]:
        batches = len(self.quantized.calls)
        lanes = [Lanes(block.run, batches, self._note_batch) for block, _ in self.blocks]
        handles = [handle for (block, _), lane in zip(self.blocks, lanes, strict=True) for handle in block.leaders(lane.pause)]
        try:
            for batch in range(batches):
                self._begin(batch)
            for lane in lanes:
                lane.start()
            for stage in range(len(self.quantized.stages)):
                statistics = self._empty(stage, needs)
                waiting = [dict(lane.waiting_inputs(stage)) for lane in lanes]
                for batch in sorted(waiting[0].keys() | waiting[1].keys()):
                    self._add(statistics, batch, stage, *(inputs.get(batch, torch.empty(0)) for inputs in waiting))
                yield stage, statistics
                for lane in lanes:
                    lane.pass_stage(stage)
        finally:
            for handle in handles:
                handle.remove()
            for lane in lanes:
                lane.stop()

    def _note_batch(self, batch: int) -> None:
        self._batch = batch

    def _repeated(self, needs: StatisticsRequest) -> Iterator[tuple[int, InputStatistics]]:
        for stage in range(len(self.quantized.stages)):
            statistics = self._empty(stage, needs)
            for batch in range(len(self.quantized.calls)):
                self._begin(batch)
                x, f = (self._input_of(block, batch, stage) for block, _ in self.blocks)
                self._add(statistics, batch, stage, x, f)
            yield stage, statistics
        for block, _ in self.blocks:
            for batch in range(len(self.quantized.calls)):
                self._begin(batch)
                block.run(batch)

    def _input_of(self, block: CalibratedBlock, batch: int, stage: int) -> Tensor:
        seen = [torch.empty(0)]

        def hook(reached: int, inputs: Tensor) -> None:
            if reached == stage:
                seen[0] = inputs
                raise StopForward

        with taken_back(block.leaders(hook)), suppress(StopForward):
            block.forward(batch)
        return seen[0]


def is_held_out(window: int, windows: int) -> bool:
    """Whether calibration window number ``window`` of so many is held out."""
    return window % HELD_OUT == HELD_OUT - 1 if windows >= HELD_OUT else 0 < window == windows - 1

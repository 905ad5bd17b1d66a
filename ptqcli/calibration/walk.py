"""One block over all calibration batches.

Its linears have to be solved in the order in which they run, and later ones have to see the quantized earlier ones. A forward pass cannot
be cut at a linear from outside, but it can be suspended there: every batch runs in a greenlet of its own, which hands over the input of a
linear when it comes to the first one of a stage and sleeps until that stage has its codes. So each part of the block runs exactly once per
batch. What sleeps are the tensors that are alive at that point; when all batches together would need more than the activation budget,
the block is instead run again from its start up to each stage (same results, up to the number of stages times the work). torch's modes
(gradients, inference mode, autocast) stay on their side of a switch, see ``modes``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from greenlet import greenlet
from torch import Tensor, nn

from ptqcli.calibration.modes import Modes, outside_modes, switch_with_modes
from ptqcli.calibration.record import BlockCall
from ptqcli.calibration.routed import feed_all
from ptqcli.calibration.share import Share
from ptqcli.calibration.statistics import InputStatistics, StatisticsRequest
from ptqcli.model.discovery import StopForward
from ptqcli.model.linears import is_linear, linear_input, linear_weight


class CalibratedBlock:
    """One loaded block with its recorded calls and its share of the hidden states.

    stages: local names of the linears to solve, those that read one tensor together, in running order. source: hidden states before the
    block, [windows, tokens, features]; target: where those behind it go, the same tensor where the earlier ones are not needed again.
    real: bool [windows, tokens], the places that hold a token, which alone count in statistics; None where all do.
    ``observe`` only looks. ``sequential`` and ``at_once`` walk through the stages: each comes with the statistics of its input, and its
    weights are expected to be replaced when the walk goes on. Afterwards ``target`` holds the outputs of the block with the replaced
    weights. fed: local names of modules of so many experts, each of which is to be seen with all tokens by ``observe`` and ``pooled``.
    share: which windows these are, where other processes have others; None where they are all. Statistics are those of these windows.
    Call under ``torch.no_grad``.
    """

    def __init__(
        self,
        block: nn.Module,
        stages: Sequence[Sequence[str]],
        calls: Sequence[BlockCall],
        batches: Sequence[tuple[int, int]],
        source: Tensor,
        target: Tensor,
        device: torch.device,
        budget: int,
        fed: Mapping[str, int] | None = None,
        real: Tensor | None = None,
        share: Share | None = None,
    ) -> None:
        windows, tokens, _features = source.shape
        self.share = share or Share.whole(windows, windows * tokens if real is None else int(real.sum()))
        self.fed = fed or {}
        self.block, self.stages, self.calls, self.batches, self.device = block, stages, calls, batches, device
        self.source, self.target, self.real = source, target, real
        self.suspended_fits = self.bytes_asleep() <= budget

    def bytes_asleep(self) -> int:
        """Upper estimate of the memory of all batches suspended at their widest point."""
        widest = max((max(linear_weight(linear).shape) for linear in self.block.modules() if is_linear(linear)), default=0)
        windows, tokens, features = self.source.shape
        return windows * tokens * (3 * features + 2 * widest) * self.source.dtype.itemsize

    def forward(self, batch: int) -> Tensor:
        """The block's outputs for one batch."""
        start, stop = self.batches[batch]
        # a copy: a block may change its input in place
        hidden = self.source[start:stop].to(self.device, copy=True)
        return self.calls[batch].run(self.block, hidden)

    def run(self, batch: int) -> None:
        """Write the block's outputs for one batch into the target."""
        start, stop = self.batches[batch]
        self.target[start:stop] = self.forward(batch).to(self.target.device)

    def leaders(self, hook: Callable[[int, Tensor], None], stages: Sequence[int] | None = None) -> list[Any]:
        """Have ``hook`` called with (stage, its input) in front of each of ``stages``, all if None; gives what takes that back."""

        def pre_hook(stage: int) -> Callable[..., None]:
            return lambda _module, args, kwargs: hook(stage, linear_input(args, kwargs))

        leaders = {
            index: self.block.get_submodule(self.stages[index][0]) for index in (range(len(self.stages)) if stages is None else stages)
        }
        return [leader.register_forward_pre_hook(pre_hook(index), with_kwargs=True) for index, leader in leaders.items()]

    def features(self, stage: int) -> int:
        """Channels of the input of ``stage``."""
        return linear_weight(self.block.get_submodule(self.stages[stage][0])).shape[1]

    def empty_statistics(self, stage: int, needs: StatisticsRequest) -> InputStatistics:
        """Statistics of nothing yet of the input of ``stage``."""
        return InputStatistics.empty(self.features(stage), needs, self.share.tokens, self.device, self.share.before, torch.float64)

    def tokens_of(self, batch: int, inputs: Tensor) -> Tensor:
        """The rows of a linear's ``inputs`` [..., in] that belong to tokens; all of what is not one row a place, such as positions."""
        if self.real is None:
            return inputs
        real = self.real[slice(*self.batches[batch])].flatten().to(inputs.device)
        rows = inputs.reshape(-1, inputs.shape[-1])
        return rows[real] if len(rows) == len(real) else rows

    def observe(self, needs: StatisticsRequest) -> list[InputStatistics]:
        """Statistics of all stages, taken from the block as it is, in one pass; the target stays as it is."""
        statistics = [self.empty_statistics(stage, needs) for stage in range(len(self.stages))]
        self._observe(dict(enumerate(statistics)))
        return statistics

    def pooled(self, groups: Sequence[Sequence[int]], needs: StatisticsRequest) -> list[InputStatistics]:
        """As ``observe``, but one for the stages of each group together, whose inputs have as many channels."""
        statistics = [self.empty_statistics(group[0], needs) for group in groups]
        self._observe({stage: pooled for group, pooled in zip(groups, statistics, strict=True) for stage in group})
        return statistics

    def _observe(self, statistics: Mapping[int, InputStatistics]) -> None:
        seen: set[int] = set()  # in this batch: experts that are fed all tokens run on theirs once more

        def add(stage: int, inputs: Tensor) -> None:
            if stage in statistics and not (self.fed and stage in seen):
                statistics[stage].add(self.tokens_of(batch, inputs))
            seen.add(stage)

        handles = [*self.leaders(add), *(feed_all(self.block.get_submodule(local), local, count) for local, count in self.fed.items())]
        with taken_back(handles):
            for batch in range(len(self.calls)):
                seen.clear()
                self.forward(batch)

    def sequential(self, needs: StatisticsRequest) -> Iterator[tuple[int, InputStatistics]]:
        """Yield (stage, statistics) in running order; each stage's inputs come from the stages already replaced."""
        yield from self._suspended(needs) if self.suspended_fits else self._repeated(needs)

    def at_once(self, statistics: Sequence[InputStatistics]) -> Iterator[tuple[int, InputStatistics]]:
        """Yield (stage, statistics) with what ``observe`` saw before any stage was replaced; then another pass makes the outputs."""
        yield from enumerate(statistics)
        self.advance()

    def advance(self) -> None:
        """Write the block's outputs into the target."""
        for batch in range(len(self.calls)):
            self.run(batch)

    def _suspended(self, needs: StatisticsRequest) -> Iterator[tuple[int, InputStatistics]]:
        lanes = Lanes(self.run, len(self.calls))
        handles = self.leaders(lanes.pause)
        try:
            lanes.start()
            for stage in range(len(self.stages)):
                statistics = self.empty_statistics(stage, needs)
                for batch, inputs in lanes.waiting_inputs(stage):
                    statistics.add(self.tokens_of(batch, inputs))
                yield stage, statistics
                lanes.pass_stage(stage)
        finally:
            for handle in handles:
                handle.remove()
            lanes.stop()

    def _repeated(self, needs: StatisticsRequest) -> Iterator[tuple[int, InputStatistics]]:
        for stage in range(len(self.stages)):
            statistics = self.empty_statistics(stage, needs)
            self.run_until(stage, statistics)
            yield stage, statistics
        self.advance()

    def run_until(self, stage: int, statistics: InputStatistics) -> None:
        """Add the inputs of ``stage``, for which every batch runs up to there."""

        def hook(reached: int, inputs: Tensor) -> None:
            statistics.add(self.tokens_of(batch, inputs))
            raise StopForward

        with taken_back(self.leaders(hook, [stage])):
            for batch in range(len(self.calls)):
                with suppress(StopForward):
                    self.forward(batch)


@contextmanager
def taken_back(handles: Sequence[Any]) -> Iterator[None]:
    """Hooks that are gone at the end, also of work that failed: the block may be run once more."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Lanes:
    """All batches of a block on their way through it, each in a greenlet that sleeps before a stage which has no codes yet.

    run: sends a batch through the block. resuming: called with a batch's number whenever that batch goes on.
    """

    def __init__(self, run: Callable[[int], None], count: int, resuming: Callable[[int], None] = lambda batch: None) -> None:
        self._resuming = resuming
        self._greenlets = [greenlet(run) for _ in range(count)]
        self._asleep: dict[int, tuple[Hashable, Tensor]] = {}  # batch -> the stage before which it sleeps, and that stage's input
        self._solved: set[Hashable] = set()
        self._outside: tuple[bool, Modes] = outside_modes()  # of whoever resumed a batch last

    def start(self) -> None:
        """Send every batch off, up to its first stage."""
        for batch in range(len(self._greenlets)):
            self._resume(batch, batch)

    def passed(self, stage: Hashable) -> bool:
        """Whether ``stage`` has its codes."""
        return stage in self._solved

    def pause(self, stage: Hashable, inputs: Tensor) -> None:
        """Called inside a batch's forward pass when it comes to ``stage``: sleep if the stage is not solved yet."""
        if stage not in self._solved:
            switch_with_modes(greenlet.getcurrent().parent.switch, self._outside, (stage, inputs))

    def waiting_inputs(self, stage: Hashable) -> Iterator[tuple[int, Tensor]]:
        """(batch, input of ``stage``) of all batches that sleep before it, in the order of the batches."""
        for batch in self._waiting(stage):
            yield batch, self._asleep[batch][1]

    def pass_stage(self, stage: Hashable) -> None:
        """``stage`` has its codes: wake the batches that waited for them, up to their next stage or the end of the block."""
        self._solved.add(stage)
        for batch in self._waiting(stage):
            self._resume(batch)

    def stop(self) -> None:
        """End batches that never came to their end, after an error or an interruption. Whoever calls keeps the modes that it has."""
        outside = Modes.now()
        for lane in self._greenlets:
            if lane and not lane.dead:
                lane.throw()
        outside.restore()

    def _waiting(self, stage: Hashable) -> list[int]:
        return sorted(batch for batch, (where, _) in self._asleep.items() if where == stage)

    def _resume(self, batch: int, *first: int) -> None:
        self._asleep.pop(batch, None)
        self._resuming(batch)
        self._outside = outside_modes()
        stop = self._greenlets[batch].switch(*first)
        self._outside[1].restore()
        if not self._greenlets[batch].dead:
            self._asleep[batch] = stop

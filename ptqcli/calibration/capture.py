"""Calibration through one block at a time.

``record_calls`` runs the model once with every block replaced by a recorder that notes its arguments and passes its input on: so
masks, rotary embeddings and per-layer differences are exactly those that the model itself makes. What remains is the hidden states
between blocks, kept in ``Activations``, and one recorded call per block and batch.

``CalibratedBlock`` then runs one block over all batches. Its linears have to be solved in the order in which they run, and later ones have
to see the quantized earlier ones. A forward pass cannot be cut at a linear from outside, but it can be suspended there: every
batch runs in a greenlet of its own, which hands over the input of a linear when it comes to the first one of a stage and sleeps until
that stage has its codes. So each part of the block runs exactly once per batch. What sleeps are the tensors that are alive at that
point; when all batches together would need more than the activation budget, the block is instead run again from its start up to
each stage (same results, up to the number of stages times the work).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from greenlet import greenlet
from torch import Tensor, nn

from ptqcli.calibration.statistics import InputStatistics, Needs
from ptqcli.errors import PTQError
from ptqcli.model import BlockShape, Skeleton, StopForward, is_linear, linear_weight


class Activations:
    """Hidden states of all calibration tokens, [windows, tokens, features], replaced block by block.

    Held in memory, or in a memory-mapped temporary file in ``folder`` when they are larger than ``budget`` bytes.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, budget: int, folder: Path) -> None:
        count = shape[0] * shape[1] * shape[2]
        self.nbytes = count * dtype.itemsize
        self.mapped = self.nbytes > budget
        if self.mapped:
            # Unlinked at once: the mapping keeps the space for as long as it is used, and no way of ending leaves a file behind.
            with tempfile.NamedTemporaryFile(dir=folder, prefix="activations-") as file:
                file.truncate(self.nbytes)
                self.values = torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
        else:
            self.values = torch.empty(shape, dtype=dtype)


@dataclass(frozen=True)
class BlockCall:
    """Arguments with which the model called a block, the hidden states left out.

    hidden_key: position or name under which the hidden states were passed.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hidden_key: int | str

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for ``hidden`` [batch, tokens, features], with this call's other arguments."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.hidden_key, int):
            args[self.hidden_key] = hidden
        else:
            kwargs[self.hidden_key] = hidden
        output = block(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def cast(self, dtype: torch.dtype) -> BlockCall:
        """The same call with every floating tensor among the arguments in ``dtype``."""
        return BlockCall(_cast(self.args, dtype), _cast(dict(self.kwargs), dtype), self.hidden_key)


@dataclass(frozen=True)
class Excerpt:
    """A few windows, or their beginnings, on which a block can be run on its own, again and again.

    windows: their numbers. tokens: how many of each. calls: how the model calls each of its blocks on them.
    """

    windows: tuple[int, ...]
    tokens: int
    calls: list[BlockCall]

    def hidden(self, activations: Activations) -> Tensor:
        """Its hidden states [windows, tokens, features]; the beginnings of windows do not depend on what follows in a causal model."""
        return activations.values[list(self.windows), : self.tokens]


@dataclass(frozen=True)
class Recording:
    """Hidden states before the first block and the calls of every block: calls[block][batch]. batches: windows [start, stop) of each.

    excerpts: by the names under which they were asked for.
    """

    activations: Activations
    calls: list[list[BlockCall]]
    batches: list[tuple[int, int]]
    excerpts: dict[str, Excerpt] = field(default_factory=dict)


def record_calls(
    skeleton: Skeleton,
    windows: Tensor,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    budget: int,
    folder: Path,
    excerpts: Mapping[str, tuple[Sequence[int], int]] | None = None,
) -> Recording:
    """Run the model up to its blocks on ``windows``, int64 [windows, tokens], and record how it calls each of them.

    excerpts: name -> (numbers of the windows, tokens of each) of the excerpts to record as well.
    """
    batches = [(start, min(start + batch_size, len(windows))) for start in range(0, len(windows), batch_size)]
    calls: list[list[BlockCall]] = [[] for _ in skeleton.blocks]
    activations: Activations | None = None
    with skeleton.outside_loaded(device, dtype) as model, torch.no_grad():
        for start, stop in batches:
            hidden, batch_calls = _record_batch(skeleton, model, windows[start:stop].to(device))
            if activations is None:
                activations = Activations((len(windows), *hidden.shape[1:]), hidden.dtype, budget, folder)
            activations.values[start:stop] = hidden.cpu()
            for block_calls, call in zip(calls, batch_calls, strict=True):
                block_calls.append(_shared(block_calls[0], call) if block_calls else call)
        recorded = {}
        for name, (numbers, tokens) in (excerpts or {}).items():
            _, excerpt_calls = _record_batch(skeleton, model, windows[list(numbers), :tokens].to(device))
            recorded[name] = Excerpt(tuple(numbers), tokens, excerpt_calls)
    assert activations is not None
    return Recording(activations, calls, batches, recorded)


def _record_batch(skeleton: Skeleton, model: nn.Module, ids: Tensor) -> tuple[Tensor, list[BlockCall]]:
    calls: list[BlockCall] = []
    first: list[Tensor] = []

    def recorder(index: int, shape: BlockShape) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            key = _hidden_key(args, kwargs)
            hidden = args[key] if isinstance(key, int) else kwargs[key]
            if len(calls) != index or (first and hidden is not first[0]):
                raise PTQError(
                    f"{skeleton.block_prefix(index)}: the model does not hand each block's output straight to the next, "
                    "which block-by-block quantization needs"
                )
            if not first:
                first.append(hidden)
            stripped = tuple(None if position == key else value for position, value in enumerate(args))
            calls.append(BlockCall(stripped, {k: v for k, v in kwargs.items() if k != key}, key))
            if len(calls) == len(skeleton.blocks):
                raise StopForward
            return (hidden, *[None] * shape.extra_outputs) if shape.returns_tuple else hidden

        return forward

    for index, (block, shape) in enumerate(zip(skeleton.blocks, skeleton.shapes, strict=True)):
        block.forward = recorder(index, shape)
    try:
        model(input_ids=ids, use_cache=False)
    except StopForward:
        pass
    finally:
        for block in skeleton.blocks:
            del block.forward
    if len(calls) != len(skeleton.blocks):
        raise PTQError(f"the model ran {len(calls)} of its {len(skeleton.blocks)} blocks; name the list of blocks with --blocks")
    return first[0], calls


def _hidden_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str:
    if "hidden_states" in kwargs:
        return "hidden_states"
    for position, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return position
    raise PTQError("a block is called without hidden states as its first tensor argument, which is not supported")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(entry, dtype) for entry in value)
    if isinstance(value, dict):
        return {key: _cast(entry, dtype) for key, entry in value.items()}
    return value


def _shared(first: BlockCall, other: BlockCall) -> BlockCall:
    """``first`` if ``other`` holds equal values, so that a hundred batches do not keep a hundred equal masks."""
    same = _equal(first.args, other.args) and _equal(dict(first.kwargs), dict(other.kwargs)) and first.hidden_key == other.hidden_key
    return first if same else other


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one is other or one == other)


class CalibratedBlock:
    """One loaded block with its recorded calls and its share of the activations.

    stages: local names of the linears to solve, those that read one tensor together, in running order. ``observe`` only looks.
    ``sequential`` and ``at_once`` walk through the stages: each comes with the statistics of its input, and its weights are expected to be
    replaced when the walk goes on. Afterwards the activations hold the outputs of the block with the replaced weights. Call under
    ``torch.no_grad``.
    """

    def __init__(
        self,
        block: nn.Module,
        stages: Sequence[Sequence[str]],
        calls: Sequence[BlockCall],
        recording: Recording,
        device: torch.device,
        budget: int,
    ) -> None:
        self.block, self.stages, self.calls, self.recording, self.device = block, stages, calls, recording, device
        self.suspended_fits = self.bytes_asleep() <= budget

    def bytes_asleep(self) -> int:
        """Upper estimate of the memory of all batches suspended at their widest point."""
        widest = max((max(linear_weight(linear).shape) for linear in self.block.modules() if is_linear(linear)), default=0)
        windows, tokens, features = self.recording.activations.values.shape
        return windows * tokens * (3 * features + 2 * widest) * self.recording.activations.values.dtype.itemsize

    def _forward(self, batch: int) -> Tensor:
        start, stop = self.recording.batches[batch]
        # a copy: a block may change its input in place
        hidden = self.recording.activations.values[start:stop].to(self.device, copy=True)
        return self.calls[batch].run(self.block, hidden)

    def _run(self, batch: int) -> None:
        start, stop = self.recording.batches[batch]
        values = self.recording.activations.values
        values[start:stop] = self._forward(batch).to(values.device)

    def _leaders(self, hook: Callable[[int, Tensor], None]) -> list[Any]:
        def pre_hook(stage: int) -> Callable[..., None]:
            return lambda _module, args: hook(stage, args[0])

        leaders = [self.block.get_submodule(stage[0]) for stage in self.stages]
        return [leader.register_forward_pre_hook(pre_hook(index)) for index, leader in enumerate(leaders)]

    def _empty(self, stage: int, needs: Needs) -> InputStatistics:
        leader = self.block.get_submodule(self.stages[stage][0])
        windows, tokens, _features = self.recording.activations.values.shape
        return InputStatistics.empty(linear_weight(leader).shape[1], needs, windows * tokens, self.device)

    def observe(self, needs: Needs) -> list[InputStatistics]:
        """Statistics of all stages, taken from the block as it is, in one pass; the activations stay before the block."""
        statistics = [self._empty(stage, needs) for stage in range(len(self.stages))]
        handles = self._leaders(lambda stage, inputs: statistics[stage].add(inputs))
        for batch in range(len(self.calls)):
            self._forward(batch)
        for handle in handles:
            handle.remove()
        return statistics

    def sequential(self, needs: Needs) -> Iterator[tuple[int, InputStatistics]]:
        """Yield (stage, statistics) in running order; each stage's inputs come from the stages already replaced."""
        yield from self._suspended(needs) if self.suspended_fits else self._repeated(needs)

    def at_once(self, statistics: Sequence[InputStatistics]) -> Iterator[tuple[int, InputStatistics]]:
        """Yield (stage, statistics) with what ``observe`` saw before any stage was replaced; then another pass makes the outputs."""
        yield from enumerate(statistics)
        self.advance()

    def advance(self) -> None:
        """Replace the activations by the block's outputs."""
        for batch in range(len(self.calls)):
            self._run(batch)

    def _suspended(self, needs: Needs) -> Iterator[tuple[int, InputStatistics]]:
        lanes = _Lanes(self._run, len(self.calls))
        handles = self._leaders(lanes.pause)
        try:
            lanes.start()
            for stage in range(len(self.stages)):
                statistics = self._empty(stage, needs)
                for inputs in lanes.inputs_of(stage):
                    statistics.add(inputs)
                yield stage, statistics
                lanes.pass_stage(stage)
        finally:
            for handle in handles:
                handle.remove()
            lanes.stop()

    def _repeated(self, needs: Needs) -> Iterator[tuple[int, InputStatistics]]:
        for stage in range(len(self.stages)):
            statistics = self._empty(stage, needs)
            self._run_until(stage, statistics)
            yield stage, statistics
        self.advance()

    def _run_until(self, stage: int, statistics: InputStatistics) -> None:
        def hook(reached: int, inputs: Tensor) -> None:
            if reached == stage:
                statistics.add(inputs)
                raise StopForward

        handles = self._leaders(hook)
        for batch in range(len(self.calls)):
            with suppress(StopForward):
                self._forward(batch)
        for handle in handles:
            handle.remove()


class _Lanes:
    """All batches of a block on their way through it, each in a greenlet that sleeps before a stage which has no codes yet."""

    def __init__(self, run: Callable[[int], None], count: int) -> None:
        self._greenlets = [greenlet(run) for _ in range(count)]
        self._asleep: dict[int, tuple[int, Tensor]] = {}  # batch -> the stage before which it sleeps, and that stage's input
        self._solved: set[int] = set()

    def start(self) -> None:
        """Send every batch off, up to its first stage."""
        for batch in range(len(self._greenlets)):
            self._resume(batch, batch)

    def pause(self, stage: int, inputs: Tensor) -> None:
        """Called inside a batch's forward pass when it comes to ``stage``: sleep if the stage is not solved yet."""
        if stage not in self._solved:
            greenlet.getcurrent().parent.switch((stage, inputs))

    def inputs_of(self, stage: int) -> Iterator[Tensor]:
        """The inputs of ``stage`` in all batches that sleep before it, in the order of the batches."""
        for batch in self._waiting(stage):
            yield self._asleep[batch][1]

    def pass_stage(self, stage: int) -> None:
        """``stage`` has its codes: wake the batches that waited for them, up to their next stage or the end of the block."""
        self._solved.add(stage)
        for batch in self._waiting(stage):
            self._resume(batch)

    def stop(self) -> None:
        """End batches that never came to their end, after an error or an interruption."""
        for lane in self._greenlets:
            if lane and not lane.dead:
                lane.throw()

    def _waiting(self, stage: int) -> list[int]:
        return sorted(batch for batch, (where, _) in self._asleep.items() if where == stage)

    def _resume(self, batch: int, *first: int) -> None:
        self._asleep.pop(batch, None)
        stop = self._greenlets[batch].switch(*first)
        if not self._greenlets[batch].dead:
            self._asleep[batch] = stop

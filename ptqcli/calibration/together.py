"""One block over all calibration batches, with the same linears of several experts observed at a time.

What an expert reads does not depend on the other experts of its layer. So their codes can be chosen together, if their inputs are known
together; but a module of experts runs one after the other, and a pass that is suspended before the first has not come to the second. So a
pass is suspended before the module (``walk.Lanes``), which is called there, for its hooks alone, with the experts that are asked for; the
products of the others are left out. First for what its first linears read, and when these have their codes, for what reads these.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ptqcli.calibration.statistics import InputStatistics, StatisticsRequest
from ptqcli.calibration.walk import CalibratedBlock, Lanes, taken_back
from ptqcli.model.choices import each_on_all
from ptqcli.model.discovery import StopForward
from ptqcli.model.linears import linear_input
from ptqcli.model.mixtures import Mixture
from ptqcli.model.stacks import experts_alone, experts_of


@dataclass(frozen=True)
class Together:
    """Stages, by their numbers, of so many experts of the module ``path``: the same linears of each."""

    path: str
    experts: tuple[int, ...]
    stages: tuple[int, ...]


def steps_of(
    block: nn.Module, stages: Sequence[Sequence[str]], mixtures: Sequence[Mixture], most: Callable[[int], int]
) -> list[int | Together]:
    """The stages of a block in an order in which they can be solved, those of at most ``most(stage)`` experts together.

    Experts that are entries of a list, which the block calls as it likes, stand alone.
    """
    steps: list[int | Together] = []
    number_of = {local: number for number, stage in enumerate(stages) for local in stage}
    groups = {mixture: _groups(mixture, number_of) for mixture in mixtures if experts_of(block.get_submodule(mixture.path)) is not None}
    mixture_of = {number: mixture for mixture, found in groups.items() for group in found for number in group}
    done: set[Mixture] = set()
    for number in range(len(stages)):
        mixture = mixture_of.get(number)
        if mixture is None:
            steps.append(number)
        elif mixture not in done:
            done.add(mixture)
            for group in groups[mixture]:
                steps += _cut(mixture.path, group, most(next(iter(group))))
    return steps


def _groups(mixture: Mixture, number_of: Mapping[str, int]) -> list[dict[int, int]]:
    """Stages that are the same linears of one expert after the other, with the expert's number; each stage once, in running order."""
    groups: list[dict[int, int]] = []
    seen: set[int] = set()
    for linears in mixture.alike:
        group = {number_of[local]: expert for expert, local in enumerate(linears) if local in number_of and number_of[local] not in seen}
        seen.update(group)
        groups += [group] if group else []
    return sorted(groups, key=min)


def _cut(path: str, group: Mapping[int, int], most: int) -> Iterator[Together]:
    stages, experts = tuple(group), tuple(group.values())
    return (Together(path, experts[at : at + most], stages[at : at + most]) for at in range(0, len(stages), most))


class BlockTogether:
    """A block as ``walk`` runs it, in ``steps`` (``steps_of``). Experts of ``walk.fed`` are seen with all tokens."""

    def __init__(self, walk: CalibratedBlock, steps: Sequence[int | Together]) -> None:
        self._walk, self._steps = walk, steps
        self._batch = 0
        self._alone = [step for step in steps if not isinstance(step, Together)]
        self._together: dict[str, list[Together]] = {}
        for step in steps:
            if isinstance(step, Together):
                self._together.setdefault(step.path, []).append(step)

    def sequential(self, needs: StatisticsRequest) -> Generator[list[tuple[int, InputStatistics]], None, None]:
        """Yield for each step its (stage, statistics); the inputs come from the steps already replaced, as in ``CalibratedBlock``."""
        yield from self._suspended(needs) if self._walk.suspended_fits else self._repeated(needs)

    def _empty(self, step: int | Together, needs: StatisticsRequest) -> list[tuple[int, InputStatistics]]:
        stages = step.stages if isinstance(step, Together) else (step,)
        return [(stage, self._walk.empty_statistics(stage, needs)) for stage in stages]

    def _suspended(self, needs: StatisticsRequest) -> Iterator[list[tuple[int, InputStatistics]]]:
        lanes = Lanes(self._walk.run, len(self._walk.calls), self._note_batch)
        seen: dict[Together, list[tuple[int, InputStatistics]]] = {}

        def before(steps: Sequence[Together], module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            for step in steps:
                if not lanes.passed(step):
                    if step not in seen:
                        seen[step] = self._empty(step, needs)
                    self._observe(step, module, args, kwargs, seen[step])
                    lanes.pause(step, torch.empty(0))

        handles = self._walk.leaders(lanes.pause, self._alone)
        handles += [self._hook(path, partial(before, steps)) for path, steps in self._together.items()]
        try:
            lanes.start()
            for step in self._steps:
                if isinstance(step, Together):
                    yield seen.pop(step) if step in seen else self._empty(step, needs)
                else:
                    [(stage, statistics)] = self._empty(step, needs)
                    for batch, inputs in lanes.waiting_inputs(step):
                        statistics.add(self._walk.tokens_of(batch, inputs))
                    yield [(stage, statistics)]
                lanes.pass_stage(step)
        finally:
            for handle in handles:
                handle.remove()
            lanes.stop()

    def _repeated(self, needs: StatisticsRequest) -> Iterator[list[tuple[int, InputStatistics]]]:
        for step in self._steps:
            found = self._empty(step, needs)
            if isinstance(step, Together):
                self._run_until(step, found)
            else:
                self._walk.run_until(step, found[0][1])
            yield found
        self._walk.advance()

    def _run_until(self, step: Together, found: Sequence[tuple[int, InputStatistics]]) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._observe(step, module, args, kwargs, found)
            raise StopForward

        with taken_back([self._hook(step.path, before)]):
            for batch in range(len(self._walk.calls)):
                self._note_batch(batch)
                with suppress(StopForward):
                    self._walk.forward(batch)

    def _observe(
        self,
        step: Together,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        found: Sequence[tuple[int, InputStatistics]],
    ) -> None:
        """Call ``module`` with the experts of ``step`` alone, and add what they read."""

        def hook(statistics: InputStatistics, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            statistics.add(self._walk.tokens_of(self._batch, linear_input(args, kwargs)))

        leaders = [self._walk.block.get_submodule(self._walk.stages[stage][0]) for stage, _ in found]
        handles = [
            leader.register_forward_pre_hook(lambda _module, args, kwargs, own=statistics: hook(own, args, kwargs), with_kwargs=True)
            for leader, (_, statistics) in zip(leaders, found, strict=True)
        ]
        given = [_copied(value) for value in args]
        named = {key: _copied(value) for key, value in kwargs.items()}
        with taken_back(handles), experts_alone(module, step.experts):
            if step.path in self._walk.fed:
                for _output in each_on_all(module, step.experts, given, named):
                    pass
            else:
                type(module).forward(module, *given, **named)

    def _hook(self, path: str, before: Callable[..., None]) -> Any:
        return self._walk.block.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True)

    def _note_batch(self, batch: int) -> None:
        self._batch = batch


def _copied(value: Any) -> Any:
    """A module may change its input in place."""
    return value.clone() if isinstance(value, torch.Tensor) else value

"""A window of loaded blocks as a solver sees it (``solvers.BlockWork``).

A solver that works stage by stage has each block transformed and walked through as it asks for the stages: one pass over the calibration
text for all transforms together, one for the codes; calibrating at once, the solver shares the first. A solver that works on batches gets
the whole window transformed beforehand, with the samples of every input from which the errors of the report are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ptqcli.calibration.routed import Pool
from ptqcli.calibration.statistics import InputStatistics, StatisticsRequest
from ptqcli.calibration.together import BlockTogether, steps_of
from ptqcli.calibration.walk import CalibratedBlock
from ptqcli.errors import PTQError
from ptqcli.pipeline.loaded import Judged, LoadedBlock, Run
from ptqcli.pipeline.streams import Streams, WindowBatches
from ptqcli.solvers import LinearTask, Solution, Stage

# Stages that are solved together, by their numbers, with what was seen of their inputs.
Steps = Generator[list[tuple[int, InputStatistics]], None, None]


class WindowWork:
    """Loaded ``blocks``. final: how many of them are finished with this window. carried: what the solver hands from window to window."""

    def __init__(self, run: Run, blocks: Sequence[LoadedBlock], final: int, carried: MutableMapping[str, Any]) -> None:
        self.final, self.carried = final, carried
        self._run, self._blocks = run, blocks
        self._owners = {f"{block.prefix}.{local}": block for block in self._blocks for stage in block.stages for local in stage}
        self._tasks: dict[str, LinearTask] = {}  # of the stage at work
        self._prepared = self._walked = False

    @property
    def module(self) -> nn.ModuleList:
        """The blocks."""
        return nn.ModuleList([block.block for block in self._blocks if block.block is not None])

    @property
    def paths(self) -> Sequence[str]:
        """Path in the model of each block."""
        return [block.prefix for block in self._blocks]

    @property
    def linears(self) -> Mapping[str, LinearTask]:
        """Every linear of the window; its weight is made when it is looked at."""
        self._prepare()
        return _Tasks(self._owners)

    def batches(self) -> WindowBatches:
        """The hidden states before the window."""
        self._prepare()
        return WindowBatches(self._streams, [block.index for block in self._blocks])

    def stages(self) -> Iterator[Stage]:
        """Every stage with its statistics, after all earlier stages have been placed, but for the same linears of other experts."""
        for stages in self.alike_stages():
            yield from stages

    def alike_stages(self) -> Iterator[Sequence[Stage]]:
        """The stages, those of the same linears of several experts together."""
        for number, block in enumerate(self._blocks):
            if self._run.streams is None:
                for stage in block.stages:
                    yield self._stages(block, [(stage, None)])
            else:
                yield from self._calibrated_stages(block, self._run.streams, self._source(number))
        self._walked = True

    def place_each(self, groups: Sequence[Sequence[str]], solve: Callable[[Sequence[str]], Sequence[Solution]]) -> None:
        """See ``BlockWork``: parts of the groups are solved by one process each, and placed by all."""
        parts = [part for group in groups for part in _parts(group, self._run.ranks.size)]
        costs = [sum(self._cost(name) for name in part) for part in parts]

        def work(number: int) -> list[Judged]:
            names = parts[number]
            return [self._judged(name, solution) for name, solution in zip(names, solve(names), strict=True)]

        for names, judged in zip(parts, self._run.ranks.divided(costs, work), strict=True):
            for name, each in zip(names, judged, strict=True):
                self._owners[name].place(name, each)
        self._walked = False

    def place(self, name: str, solution: Solution) -> None:
        """Pack the codes for the file and put their values into the block. Raises PTQError for what is not here, or placed already."""
        if name not in self._owners:
            raise PTQError(f"{name}: a solver has placed it, but it is no linear of {', '.join(self.paths)} that is quantized")
        self._owners[name].place(name, self._run.ranks.from_first(lambda: self._judged(name, solution)))
        self._walked = False

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """See ``BlockWork``."""
        self._run.ranks.add(tensors)

    def _judged(self, name: str, solution: Solution) -> Judged:
        owner = self._owners[name]
        return owner.judge(self._tasks.get(name) or owner.task(name), solution)

    def _cost(self, name: str) -> float:
        """Of solving a linear, in some unit: that of what depends on its inputs, and of what is done for each of its rows."""
        site = self._owners[name].planned[name].site
        return float(site.in_features**2 * (site.in_features / 3 + site.out_features))

    def replace(self, parameter: str, value: Tensor) -> None:
        """Another value for a parameter that is not quantized. Raises PTQError for one that does not fit."""
        block = next((block for block in self._blocks if parameter.startswith(block.prefix + ".")), None)
        if block is None:
            raise PTQError(f"{parameter}: a solver has replaced it, but it is no parameter of {', '.join(self.paths)}")
        block.replace(parameter, value)

    def progress(self, name: str, done: int, total: int, note: str = "") -> None:
        """Pass on how far the work on one linear is."""
        self._run.progress.layer_progress(name, done, total, note)

    def finish(self) -> list[dict[str, Tensor]]:
        """The stored tensors of each final block; from now on the hidden states behind these are those of the quantized blocks."""
        final = self._blocks[: self.final]
        finished = [block.finished() for block in final]
        if self._run.streams is not None and not (self._walked and self.final == len(self._blocks)):
            for number, block in enumerate(final):
                block.walk(self._streams, self._source(number)).advance()
        if final[0].block is not None:  # windows of several are not planned where blocks leave something
            self._streams.settle(final[0].block, final[0].index, self._source(0))
        return finished

    @property
    def _streams(self) -> Streams:
        if self._run.streams is None:
            raise ValueError("there are no batches without calibration; a solver that wants them says so in its needs")
        return self._run.streams

    def _source(self, number: int) -> Tensor:
        """Hidden states before block ``number`` of the window: behind the first, they have been written by the one before it."""
        return self._streams.quantized.outputs if number else self._streams.quantized.inputs

    def _stages(self, block: LoadedBlock, stages: Sequence[tuple[Sequence[str], InputStatistics | None]]) -> list[Stage]:
        block.statistics = {local: seen for locals_, seen in stages for local in locals_ if seen is not None}
        made = []
        self._tasks = {}
        for locals_, seen in stages:
            tasks = {f"{block.prefix}.{local}": block.task(f"{block.prefix}.{local}") for local in locals_}
            self._tasks |= tasks
            made.append(Stage(tuple(tasks.values()), seen))
        return made

    def _calibrated_stages(self, block: LoadedBlock, streams: Streams, source: Tensor) -> Iterator[Sequence[Stage]]:
        walk, seen = block.walk(streams, source), block.statistics
        passes, pool = self._passes(block, walk, streams, source)
        with closing(passes):  # what sleeps in it ends here, also after an error
            for step in passes:
                stages = [(block.stages[number], self._statistics(block, number, own, pool)) for number, own in step]
                yield self._stages(block, stages)
        block.statistics, self._tasks = seen, {}

    def _statistics(self, block: LoadedBlock, number: int, own: InputStatistics, pool: Pool) -> InputStatistics:
        """Those of a stage, or of all experts. Raises PTQError for such as are not finite."""
        pooled = pool.in_place_of(number, own)
        if number in pool.experts:
            block.seen |= dict.fromkeys(block.stages[number], (own.tokens, pooled is not None))
        statistics = own if pooled is None else pooled
        statistics.check_finite(f"{block.prefix}.{block.stages[number][0]}")
        return statistics

    def _passes(self, block: LoadedBlock, walk: CalibratedBlock, streams: Streams, source: Tensor) -> tuple[Steps, Pool]:
        wanted, sequential = self._run.solver_needs(), self._run.plan.recipe.sequential
        transforms = self._run.transforms if not self._prepared else ()
        statistics = (
            walk.observe(_joined_needs(transforms, StatisticsRequest() if sequential else wanted)) if transforms or not sequential else []
        )
        self._merge(statistics)
        if transforms:
            statistics = block.transform(streams, source, statistics)
        pool = Pool(walk, block.mixtures, wanted, self._run.plan.recipe.min_expert_tokens)
        self._merge(pool.statistics)
        if wanted.pairs:
            return self._merged([step] for step in block.paired(walk, streams).sequential(wanted)), pool
        if not sequential:
            return ([step] for step in walk.at_once(statistics)), pool
        steps = steps_of(walk.block, walk.stages, block.mixtures, block.at_once)
        return self._merged(BlockTogether(walk, steps).sequential(wanted)), pool

    def _merged(self, steps: Steps) -> Steps:
        with closing(steps):
            for step in steps:
                self._merge(own for _, own in step)
                yield step

    def _merge(self, statistics: Iterable[InputStatistics]) -> None:
        """All that is seen has been: add what the other processes have."""
        for each in statistics:
            if self._run.ranks.size > 1:
                each.merge(self._run.ranks)
            each.settle()

    def _prepare(self) -> None:
        """Transform all blocks, each behind the ones before it, and note what they receive."""
        if self._prepared or self._run.streams is None:
            return
        self._prepared = True
        needs = replace(StatisticsRequest(samples=True) | self._run.solver_needs(), hessian=False)  # which the stages bring
        for number, block in enumerate(self._blocks):
            source = self._source(number)
            walk = block.walk(self._streams, source)
            transforms = self._run.transforms if block.folded is None else ()  # of a block that comes again
            statistics = walk.observe(_joined_needs(transforms, needs))
            self._merge(statistics)
            if transforms:
                statistics = block.transform(self._streams, source, statistics)
            block.statistics = {local: seen for stage, seen in zip(block.stages, statistics, strict=True) for local in stage}
            if number + 1 < len(self._blocks):
                walk.advance()


class _Tasks(Mapping[str, LinearTask]):
    """The linears of a window by their paths."""

    def __init__(self, owners: Mapping[str, LoadedBlock]) -> None:
        self._owners = owners

    def __getitem__(self, name: str) -> LinearTask:
        return self._owners[name].task(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)


def _parts(group: Sequence[str], count: int) -> list[Sequence[str]]:
    """``group`` in at most ``count`` parts of about the same size."""
    count = min(count, len(group))
    return [group[number * len(group) // count : (number + 1) * len(group) // count] for number in range(count)]


def _joined_needs(transforms: Sequence[object], needs: StatisticsRequest) -> StatisticsRequest:
    for transform in transforms:
        needs |= transform.needs  # type: ignore[attr-defined]
    return needs

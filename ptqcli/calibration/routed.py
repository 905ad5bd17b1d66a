"""Calibration where tokens are routed to experts.

A linear of an expert sees only the tokens that are routed to it. Two things can be done about experts that see few: all of them are fed
every token while statistics are taken (``feed_all``), or those that saw too few get the statistics of all experts together (``Pool``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from ptqcli.calibration.statistics import InputStatistics, StatisticsRequest
from ptqcli.errors import PTQError
from ptqcli.model.choices import each_on_all
from ptqcli.model.mixtures import Mixture


class Walk(Protocol):
    """What is asked of a block that is walked through, see ``walk.CalibratedBlock``."""

    @property
    def stages(self) -> Sequence[Sequence[str]]: ...

    def pooled(self, groups: Sequence[Sequence[int]], needs: StatisticsRequest) -> list[InputStatistics]: ...


class Pool:
    """Statistics of all experts of a block together, of the block as it is, for stages that see fewer than ``least`` tokens.

    experts: numbers of the stages of experts. statistics: all of them, each once.
    """

    def __init__(self, walk: Walk, mixtures: Sequence[Mixture], needs: StatisticsRequest, least: int) -> None:
        groups = _alike_stages(walk.stages, mixtures)
        self._least = least
        self.experts = {number for group in groups for number in group}
        self.statistics = walk.pooled(groups, needs) if groups and least else []
        self._of = {number: pooled for group, pooled in zip(groups, self.statistics, strict=False) for number in group}

    def in_place_of(self, stage: int, own: InputStatistics) -> InputStatistics | None:
        """What the stage gets in the place of its ``own`` statistics, None where these will do or nothing has reached any expert."""
        pooled = self._of.get(stage)
        return pooled if pooled is not None and own.tokens < self._least and pooled.tokens > own.tokens else None


def _alike_stages(stages: Sequence[Sequence[str]], mixtures: Sequence[Mixture]) -> list[tuple[int, ...]]:
    """Numbers of the stages that are the same linears of one expert after the other, for each stage of an expert."""
    number_of = {local: number for number, stage in enumerate(stages) for local in stage}
    groups = [tuple(number_of[local] for local in linears if local in number_of) for mixture in mixtures for linears in mixture.alike]
    return list(dict.fromkeys(group for group in groups if group))


def feed_all(experts: nn.Module, name: str, count: int) -> Any:
    """Have ``experts``, when it is called, run each of them on all tokens first; gives what takes that back. name: for messages.

    Whatever hooks do with the inputs of their linears, they see every token; the outputs stay those of the routed call behind it. The hook
    raises PTQError where nothing says which expert gets which token.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not sum(1 for _output in each_on_all(module, range(count), args, kwargs)):
            raise PTQError(f"{name}: is not told by numbers which expert gets which token; use --expert-calibration routed")

    return experts.register_forward_pre_hook(before, with_kwargs=True)

"""Linears that get one scheme together, and the work of measuring what that costs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ptqcli.errors import PTQError
from ptqcli.formats import Format, LinearSpec
from ptqcli.model.linears import LinearSite, linear_weight, rows_first
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.ranges import RangeSearch
from ptqcli.numerics.weight import round_to_nearest
from ptqcli.resources import Resources

Losses = list[float | None]  # of the candidates of a group; None for one that it cannot have


@dataclass(frozen=True, kw_only=True)
class Group:
    """Linears of one block that get one scheme: those that servers run as one matrix, or all experts.

    options: for each candidate what each linear would be, None for a candidate that they cannot have.
    """

    name: str
    block: int
    sites: tuple[LinearSite, ...]
    options: tuple[tuple[LinearSpec, ...] | None, ...]

    @property
    def linears(self) -> list[str]:
        """Their paths in the model."""
        return [site.name for site in self.sites]

    @property
    def weights(self) -> int:
        """How many weights they have."""
        return sum(site.in_features * site.out_features for site in self.sites)

    def nbytes(self, chosen: Format) -> list[int | None]:
        """What each candidate takes as ``chosen`` stores it."""
        return [None if specs is None else sum(map(chosen.stored_bytes, specs)) for specs in self.options]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be measured.

    windows: int64 [windows, tokens], of an encoder with PADDING. dtype: in which the model runs. ranges: fits the grids. seed: of what is
    drawn. tell: is told how many of how many steps are done.
    """

    skeleton: Skeleton
    groups: Sequence[Group]
    windows: Tensor
    resources: Resources
    dtype: torch.dtype
    ranges: RangeSearch
    seed: int
    tell: Callable[[int, int], None]

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.resources.device

    @property
    def batches(self) -> list[tuple[int, int]]:
        """Windows [start, stop) that run together."""
        size = self.resources.windows_per_batch(self.windows.shape[1])
        return [(start, min(start + size, len(self.windows))) for start in range(0, len(self.windows), size)]

    def module(self, site: LinearSite) -> nn.Module:
        """The linear at ``site``."""
        found: nn.Module = self.skeleton.model.get_submodule(site.name)
        return found

    def rounded(self, site: LinearSite, spec: LinearSpec) -> Tensor:
        """The loaded weight of the linear, [out, in] in its dtype, as the codes of nearest rounding stand for it."""
        return rounded(linear_weight(self.module(site)).detach(), spec, self.ranges)

    def of_block(self, index: int) -> list[tuple[int, Group]]:
        """The groups of a block, with their numbers."""
        return [(number, group) for number, group in enumerate(self.groups) if group.block == index]


class Method:
    """A way to measure. name: as it is asked for. unit: of its losses. whole: whether the whole model is in memory.

    causal: whether it needs a model that gives the next word. at_once: whether all losses are found together, at the end.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    whole: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    at_once: ClassVar[bool] = False

    @abstractmethod
    def needed_bytes(self, work: Work) -> int:
        """Peak of its tensors."""

    @abstractmethod
    def losses(self, work: Work, known: Collection[int]) -> Iterator[tuple[int, Losses]]:
        """The number of each group that is not ``known``, with the losses of its candidates, as they are found."""


def rounded(weight: Tensor, spec: LinearSpec, ranges: RangeSearch) -> Tensor:
    """``weight`` [out, in] rounded to nearest as ``spec`` says, in its own dtype. Raises PTQError, by name, for one that is not finite."""
    values = weight.float()
    if not torch.isfinite(values).all():
        raise PTQError(f"{spec.name}: holds NaN or infinity; start from a model without them")
    return round_to_nearest(values, spec.scheme, spec.scale_dtype, ranges).dequantize(weight.dtype)


@contextmanager
def replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While inside, the linears of these paths multiply by these matrices, [out, in]; the loaded ones are not written into."""
    before: list[tuple[nn.Module, nn.Parameter | None]] = []
    try:
        for name, weight in weights.items():
            module = model.get_submodule(name)
            before.append((module, module._parameters["weight"]))
            module._parameters["weight"] = nn.Parameter(rows_first(module, weight), requires_grad=False)
        yield
    finally:
        for module, parameter in before:
            module._parameters["weight"] = parameter


def model_bytes(work: Work) -> int:
    """The whole model as it runs."""
    return sum(parameter.numel() for parameter in work.skeleton.model.parameters()) * work.dtype.itemsize


def logits_bytes(work: Work, tokens: int, copies: int) -> int:
    """So many copies in float32 of the logits of ``tokens``."""
    return copies * 4 * tokens * int(work.skeleton.config.get_text_config().vocab_size)


def largest_weight_bytes(work: Work) -> int:
    """A matrix, in float32, with what rounding it takes: the values, and candidates of the search beside them."""
    return 6 * 4 * max(site.in_features * site.out_features for group in work.groups for site in group.sites)

"""Blocks of which tokens take different ways: what a probe of a few tokens does not reach.

Experts are children of one module that have the same linears, numbered by their names: entries of a list, or those of a stack that was
separated (``stacks.py``). The probe runs those that it is routed to; the others would run as these do, one after the other in the order
of their numbers, so they get places among the stages. A router is told by its outputs, one for each expert; so is a gate, which has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from ptqcli.model.linears import is_linear, linear_weight
from ptqcli.model.stacks import experts_of

Stages = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Mixture:
    """Experts of a block. path: of the module whose children they are. linears: of each, by path below it; "" is the expert itself.

    routers: paths in the block of linears of the module above that choose and weigh, with one output for each expert or for all.
    """

    path: str
    count: int
    linears: tuple[str, ...]
    routers: tuple[str, ...]

    def of(self, number: int) -> list[str]:
        """The linears of one expert, as paths in the block."""
        return [self._path(number, linear) for linear in self.linears]

    @cached_property
    def alike(self) -> tuple[tuple[str, ...], ...]:
        """The same linear of all experts, for each."""
        return tuple(tuple(self._path(number, linear) for number in range(self.count)) for linear in self.linears)

    def _path(self, number: int, linear: str) -> str:
        return ".".join(filter(None, (self.path, str(number), linear)))


def find_mixtures(block: nn.Module, ran: Sequence[str]) -> list[Mixture]:
    """The mixtures of a block of which the linears ``ran`` in a probe: separated stacks, and lists of which some entries did not run."""
    found: list[Mixture] = []
    for path, module in block.named_modules():
        if any(f"{path}.".startswith(f"{other.path}.") for other in found):
            continue
        mixture = _mixture(block, path, module)
        if mixture is None:
            continue
        reached = [not {*mixture.of(number)}.isdisjoint(ran) for number in range(mixture.count)]
        if any(reached) and (experts_of(module) is not None or not all(reached)):
            found.append(mixture)
    return found


def with_all_experts(stages: Stages, mixtures: Sequence[Mixture]) -> Stages:
    """``stages`` with those of the experts that did not run."""
    for mixture in mixtures:
        stages = _completed(stages, mixture)
    return stages


def _mixture(block: nn.Module, path: str, module: nn.Module) -> Mixture | None:
    entries = [entry for name, entry in module.named_children() if name.isdigit()]
    if len(entries) < 2 or not (isinstance(module, nn.ModuleList) or experts_of(module) is not None):
        return None
    shapes = [{name: tuple(linear_weight(linear).shape) for name, linear in _linears(entry)} for entry in entries]
    if not shapes[0] or any(other != shapes[0] for other in shapes):
        return None
    return Mixture(path, len(entries), tuple(shapes[0]), tuple(_routers(block, path, len(entries))))


def _routers(block: nn.Module, experts: str, count: int) -> Iterator[str]:
    above = experts.rpartition(".")[0]
    if not above:
        return
    module = block.get_submodule(above)
    for local, linear in _linears(module):
        owner = local.rpartition(".")[0]
        alone = not owner or sum(1 for _ in _linears(module.get_submodule(owner))) == 1
        inside = f"{above}.{local}".startswith(f"{experts}.")
        if alone and not inside and linear_weight(linear).shape[0] in (1, count):
            yield f"{above}.{local}"


def _completed(stages: Stages, mixture: Mixture) -> Stages:
    own = {number: _only(stages, mixture.of(number)) for number in range(mixture.count)}
    template = next(number for number, mine in own.items() if mine)
    if all(own.values()):
        return stages
    experts = []
    for number, mine in own.items():
        names = dict(zip(mixture.of(template), mixture.of(number), strict=True))
        experts += mine or [tuple(names[local] for local in stage) for stage in own[template]]
    inside = {local for number in own for local in mixture.of(number)}
    place = next(index for index, stage in enumerate(stages) if not inside.isdisjoint(stage))
    others = [tuple(local for local in stage if local not in inside) for stage in stages]
    return tuple(stage for stage in (*others[:place], *experts, *others[place:]) if stage)


def _only(stages: Stages, linears: Sequence[str]) -> list[tuple[str, ...]]:
    kept = (tuple(local for local in stage if local in linears) for stage in stages)
    return [stage for stage in kept if stage]


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, inner) for name, inner in module.named_modules() if is_linear(inner))

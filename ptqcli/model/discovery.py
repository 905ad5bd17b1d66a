"""The repeated blocks of a model and how their linears run, found by looking."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ptqcli.errors import PTQError, UsageError
from ptqcli.model.kinds import ModelKind
from ptqcli.model.linears import is_linear, linear_input, linear_weight
from ptqcli.model.mixtures import Mixture, find_mixtures, with_all_experts
from ptqcli.untrusted import one_line

# Windows and tokens of the probe; more than one, so that code which treats single-token decoding apart is not taken, and two different
# numbers, so that they are told apart in the shape of the hidden states.
PROBE_WINDOWS, PROBE_TOKENS = 2, 8


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What the probe told of one block.

    stages: linears in the order in which they run, those that read the same tensor together (local names).
    container / extra_outputs: how the block returns its hidden states: as the first of a tuple or list, or alone (None). hidden: their
    shape behind it, of PROBE_WINDOWS windows of PROBE_TOKENS tokens; None if it did not run. exchanged: names of arguments that are tables
    in which blocks leave tensors for later ones, such as keys and values. unused: linears that did not run. repeated:
    linears that ran more than once. read: linears whose weight other code has asked for, so that no other layer can take their place.
    mixtures: experts, to which tokens are routed; those that the probe was not routed to have their places in the stages all the same.
    """

    stages: tuple[tuple[str, ...], ...]
    container: type[tuple[Any, ...]] | type[list[Any]] | None
    extra_outputs: int
    hidden: tuple[int, ...] | None
    exchanged: tuple[str, ...]
    unused: tuple[str, ...]
    repeated: tuple[str, ...]
    read: tuple[str, ...]
    mixtures: tuple[Mixture, ...] = ()

    @property
    def stack(self) -> tuple[int, ...]:
        """Of how many hidden states the block takes and gives a stack, see ``states.py``; empty for one alone."""
        return () if self.hidden is None else self.hidden[:-3]

    @property
    def fused_groups(self) -> tuple[tuple[str, ...], ...]:
        """Linears of one module that read one tensor (q, k, v; gate, up): servers run them as a single matrix."""
        groups: dict[tuple[int, str], list[str]] = {}
        for number, stage in enumerate(self.stages):
            for local in stage:
                groups.setdefault((number, local.rpartition(".")[0]), []).append(local)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)


@dataclass(frozen=True)
class Probe:
    """What a pass without the model's weights told.

    order: names of modules as they started to run. calls: what linears read: (name, tensor, how often that had been written to), the
    tensors kept alive so that their identities stay distinct. outputs: of every entry of a list. tables: among the named arguments of
    every entry of a list. read: linears whose weight other code
    than their own has asked for.
    """

    model: nn.Module
    order: Sequence[str]
    calls: Sequence[tuple[str, Tensor, int]]
    outputs: Mapping[str, Any]
    tables: Mapping[str, Mapping[str, Any]]
    read: AbstractSet[str]

    def shape(self, block: str) -> BlockShape:
        """What became of the block of this name."""
        prefix = block + "."
        calls = [(name.removeprefix(prefix), tensor, version) for name, tensor, version in self.calls if name.startswith(prefix)]
        names = [local for local, _, _ in calls]
        stages: dict[tuple[int, int], list[str]] = {}
        for local, tensor, version in calls:
            stages.setdefault((id(tensor), version), []).append(local)
        module = self.model.get_submodule(block)
        mixtures = find_mixtures(module, names)
        completed = with_all_experts(tuple(tuple(stage) for stage in stages.values()), mixtures)
        placed = {local for stage in completed for local in stage}
        linears = [local for local, inner in module.named_modules() if is_linear(inner)]
        output: Any = self.outputs.get(block)
        container = next((kind for kind in (tuple, list) if isinstance(output, kind)), None)
        hidden = first_output(output)
        return BlockShape(
            stages=completed,
            container=container,
            extra_outputs=0 if container is None else len(output) - 1,
            hidden=tuple(hidden.shape) if isinstance(hidden, Tensor) else None,
            exchanged=tuple(key for key, table in self.tables.get(block, {}).items() if table),
            unused=tuple(local for local in linears if local not in placed),
            repeated=tuple(local for local in linears if names.count(local) > 1),
            read=tuple(local for local in linears if prefix + local in self.read),
            mixtures=tuple(mixtures),
        )

    def behind(self, block: str) -> frozenset[str]:
        """Names of the modules that first ran behind the last run of this block."""
        last = max((place for place, name in enumerate(self.order) if name == block), default=len(self.order))
        return frozenset(self.order[last:]) - frozenset(self.order[:last])


def find_blocks(model: nn.Module, wanted: str | None = None, ran: Sequence[str] = ()) -> str:
    """Name of the ModuleList whose entries are the repeated blocks.

    The candidates are the outermost lists of modules that hold linears, of one class or of several, and of them those that run at all,
    going by ``ran``, the names of modules that do; the largest is taken. Raises UsageError with the list of candidates when there is
    none, when another has more than half of its size, or when ``wanted`` is none.
    """
    sizes = {name: linear_size(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    lists = [name for name, size in sizes.items() if size > 0]
    if wanted is not None:
        if wanted not in lists:
            raise UsageError(f"--blocks {wanted}: no such list of blocks; candidates are {listed(lists) or 'none'}")
        return wanted
    running = [name for name in lists if not ran or f"{name}.0" in ran]
    outermost = [name for name in running if not any(name.startswith(other + ".") for other in running)]
    if not outermost:
        raise UsageError("found no list of repeated blocks with linear layers in this model; name it with --blocks")
    largest = max(outermost, key=lambda name: sizes[name])
    rivals = [name for name in outermost if name != largest and sizes[name] * 2 > sizes[largest]]
    if rivals:
        raise UsageError(f"several lists of blocks of similar size: {listed([largest, *rivals])}; choose one with --blocks")
    return largest


def linear_size(module: nn.Module) -> int:
    """Weights in the linears of ``module``, each module once."""
    return sum(linear_weight(inner).numel() for inner in module.modules() if is_linear(inner))


def first_output(output: Any) -> Any:
    """The hidden states among what a block returns: the first of a tuple or list, or all of it."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


class StopForward(Exception):
    """Raised inside a forward pass once everything of interest has been seen."""


def probe_model(model: nn.Module, kind: ModelKind) -> Probe:
    """Run a model without weights once and note which linears run in which order on which tensors.

    Its tokens and all that it computes from them are real, so that it may decide by values, as some rotary embeddings do; its weights are
    zeros that take no memory, and its linears return zeros without multiplying. Raises PTQError if the model does not run that way.
    """
    twin = copy.deepcopy(model)
    order: list[str] = []
    calls: list[tuple[str, Tensor, int]] = []
    outputs: dict[str, Any] = {}
    tables: dict[str, dict[str, Any]] = {}
    read: set[str] = set()
    entries = {id(entry) for module in twin.modules() if isinstance(module, nn.ModuleList) for entry in module}
    for name, module in twin.named_modules():
        module.register_forward_pre_hook(lambda _module, _args, name=name: order.append(name))
        if id(module) in entries:
            module.register_forward_hook(lambda _module, _args, output, name=name: outputs.update({name: output}))
            module.register_forward_pre_hook(partial(_note_tables, tables, name), with_kwargs=True)
        _fill_with_zeros(module)
        if is_linear(module):
            module.register_forward_pre_hook(partial(_note_call, calls, name), with_kwargs=True)
            _stand_in(module, partial(read.add, name))
    try:
        with torch.no_grad():
            kind.call(twin, torch.zeros(PROBE_WINDOWS, PROBE_TOKENS, dtype=torch.long))
    except Exception as error:  # whatever the code of a model raises
        raise PTQError(
            f"the model does not run on {PROBE_TOKENS} tokens with all weights zero, so its structure cannot be discovered: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
    return Probe(model, order, calls, outputs, tables, read)


def _note_tables(tables: dict[str, dict[str, Any]], name: str, _module: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
    """Those that are still empty before the first block: whatever stands in them later, blocks have put there."""
    known = {id(table) for noted in tables.values() for table in noted.values()}
    found = {key: value for key, value in kwargs.items() if isinstance(value, MutableMapping)}
    tables[name] = {key: value for key, value in found.items() if not value or id(value) in known}


def _note_call(calls: list[tuple[str, Tensor, int]], name: str, _module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    inputs = linear_input(args, kwargs)
    calls.append((name, inputs, inputs._version))


def _fill_with_zeros(module: nn.Module) -> None:
    """Parameters that are one zero, seen as a whole matrix."""
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module._parameters[leaf] = nn.Parameter(zeros, requires_grad=False)


def _stand_in(linear: nn.Module, was_read: Callable[[], None]) -> None:
    """Let a linear return as many zeros as it would numbers, and tell when other code asks for its weight, which it may write into."""
    weight = linear.weight
    out_features = linear_weight(linear).shape[0]

    def read(_self: nn.Module) -> Tensor:
        was_read()
        return torch.zeros(weight.shape, dtype=weight.dtype)  # type: ignore[arg-type]

    linear.__class__ = type(type(linear).__name__, (type(linear),), {"weight": property(read)})
    linear.forward = partial(_zeros, out_features)


def _zeros(features: int, *args: Any, **kwargs: Any) -> Tensor:
    inputs = linear_input(args, kwargs)
    return inputs.new_zeros((*inputs.shape[:-1], features))


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"

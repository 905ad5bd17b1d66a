"""The repeated blocks of a model and how their linears run, found by looking."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ptqcli.errors import PTQError, UsageError
from ptqcli.model.kinds import kind_of
from ptqcli.model.linears import is_linear
from ptqcli.untrusted import one_line

# Tokens of the pass of empty tensors; more than one, so that code which treats single-token decoding apart is not taken.
PROBE_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What the pass of empty tensors told of one block.

    stages: linears in the order in which they run, those that read the same tensor together (local names).
    returns_tuple / extra_outputs: how the block returns its hidden states. unused: linears that did not run. repeated: linears that
    ran more than once.
    """

    stages: tuple[tuple[str, ...], ...]
    returns_tuple: bool
    extra_outputs: int
    unused: tuple[str, ...]
    repeated: tuple[str, ...]

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
    """What the pass of empty tensors told. blocks: a shape for each. late: names of the modules that first ran behind the blocks."""

    blocks: list[BlockShape]
    late: frozenset[str]


def find_blocks(model: nn.Module, wanted: str | None = None) -> str:
    """Name of the ModuleList whose entries are the repeated blocks.

    The candidates are the outermost lists of modules of one class that hold linears; the largest is taken. Raises UsageError with the
    list of candidates when there is none, when another has more than half of its size, or when ``wanted`` is not a candidate.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and len({type(entry) for entry in module}) == 1
        and any(is_linear(inner) for inner in module[0].modules())
    }
    if wanted is not None:
        if wanted not in lists:
            raise UsageError(f"--blocks {wanted}: no such list of blocks; candidates are {listed(list(lists)) or 'none'}")
        return wanted
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    if not outermost:
        raise UsageError("found no list of repeated blocks with linear layers in this model; name it with --blocks")
    sizes = {name: sum(p.numel() for p in lists[name].parameters()) for name in outermost}
    largest = max(sizes, key=lambda name: sizes[name])
    rivals = [name for name in outermost if name != largest and sizes[name] * 2 > sizes[largest]]
    if rivals:
        raise UsageError(f"several lists of blocks of similar size: {listed([largest, *rivals])}; choose one with --blocks")
    return largest


class StopForward(Exception):
    """Raised inside a forward pass once everything of interest has been seen."""


def probe_model(model: nn.Module, blocks: Sequence[nn.Module]) -> Probe:
    """Run the model once on tensors without data and note, block by block, which linears run in which order on which tensors.

    Raises PTQError when the model cannot run on the meta device.
    """
    kind = kind_of(model.config)
    names = {id(module): name for name, module in model.named_modules()}
    mode = FakeTensorMode()
    twin = copy.deepcopy(model)
    probes = [_BlockProbe(twin.get_submodule(names[id(block)])) for block in blocks]
    order = _running_order(twin)
    try:
        with mode, torch.no_grad():
            _fill_with_fakes(twin, mode)
            kind.call(twin, torch.zeros(1, PROBE_TOKENS, dtype=torch.long))
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise PTQError(f"the model does not run on empty tensors, so its structure cannot be discovered: {one_line(error)}") from error
    last = max((place for place, name in enumerate(order) if name == names[id(blocks[-1])]), default=len(order))
    return Probe([probe.shape() for probe in probes], frozenset(order[last:]) - frozenset(order[:last]))


def _running_order(model: nn.Module) -> list[str]:
    """A list that fills with the names of modules as they start to run."""
    order: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _module, _args, name=name: order.append(name))
    return order


def _fill_with_fakes(model: nn.Module, mode: FakeTensorMode) -> None:
    """Tensors with a shape but no data, which unlike meta tensors answer the questions that mask building asks of its inputs."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = mode.from_tensor(buffer)


@dataclass
class _BlockProbe:
    """Hooks on one block of the empty twin; keeps the seen tensors alive so that their identities stay distinct."""

    block: nn.Module
    calls: list[tuple[str, Tensor, int]] = field(default_factory=list)  # the last: how often the tensor had been written to
    output: Any = None

    def __post_init__(self) -> None:
        self.block.register_forward_hook(self._returned)
        for local, module in self.block.named_modules():
            if is_linear(module):
                module.register_forward_pre_hook(self._entered(local))

    def _entered(self, local: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self.calls.append((local, args[0], args[0]._version))

        return hook

    def _returned(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.output = output

    def shape(self) -> BlockShape:
        names = [local for local, _, _ in self.calls]
        stages: dict[tuple[int, int], list[str]] = {}
        for local, tensor, version in self.calls:
            stages.setdefault((id(tensor), version), []).append(local)
        linears = [local for local, module in self.block.named_modules() if is_linear(module)]
        returns_tuple = isinstance(self.output, tuple)
        return BlockShape(
            stages=tuple(tuple(stage) for stage in stages.values()),
            returns_tuple=returns_tuple,
            extra_outputs=len(self.output) - 1 if returns_tuple else 0,
            unused=tuple(local for local in linears if local not in names),
            repeated=tuple(local for local in linears if names.count(local) > 1),
        )


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"

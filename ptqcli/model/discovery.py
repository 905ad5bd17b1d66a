"""The repeated blocks of a model and how their linears run, found by looking."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptqcli.errors import PTQError, UsageError
from ptqcli.model.config import first_line
from ptqcli.model.kinds import ModelKind
from ptqcli.model.linears import is_linear, linear_weight

# Windows and tokens of the probe; more than one, so that code which treats single-token decoding apart is not taken, and two different
# numbers, so that they are told apart in the shape of the hidden states.
PROBE_WINDOWS, PROBE_TOKENS = 2, 8


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """What the probe told of one block.

    stages: linears in the order in which they run, those that read the same tensor together (local names).
    returns_tuple / extra_outputs: how the block returns its hidden states. hidden: their shape behind it, of PROBE_WINDOWS windows of
    PROBE_TOKENS tokens; None if it did not run. unused: linears that did not run. repeated: linears that ran more than once.
    """

    stages: tuple[tuple[str, ...], ...]
    returns_tuple: bool
    extra_outputs: int
    hidden: tuple[int, ...] | None
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
    """What a pass without the model's weights told. blocks: a shape for each. late: names of the modules that first ran behind the blocks."""

    blocks: list[BlockShape]
    late: frozenset[str]


def find_blocks(model: nn.Module, wanted: str | None = None) -> str:
    """Name of the ModuleList whose entries are the repeated blocks.

    The candidates are the outermost lists of modules that hold linears, of one class or of several; the largest is taken. Raises
    UsageError with the list of candidates when there is none, when another has more than half of its size, or when ``wanted`` is none.
    """
    sizes = {name: linear_size(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    lists = [name for name, size in sizes.items() if size > 0]
    if wanted is not None:
        if wanted not in lists:
            raise UsageError(f"--blocks {wanted}: no such list of blocks; candidates are {listed(lists) or 'none'}")
        return wanted
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
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


class StopForward(Exception):
    """Raised inside a forward pass once everything of interest has been seen."""


def probe_model(model: nn.Module, blocks: Sequence[nn.Module], kind: ModelKind) -> Probe:
    """Run a model without weights once and note, block by block, which linears run in which order on which tensors.

    Its tokens and all that it computes from them are real, so that it may decide by values, as some rotary embeddings do; its weights are
    zeros that take no memory, and its linears return zeros without multiplying. Raises PTQError if the model does not run that way.
    """
    names = {id(module): name for name, module in model.named_modules()}
    twin = copy.deepcopy(model)
    probes = [_BlockProbe(twin.get_submodule(names[id(block)])) for block in blocks]
    order = _running_order(twin)
    _fill_with_zeros(twin)
    try:
        with torch.no_grad():
            kind.call(twin, torch.zeros(PROBE_WINDOWS, PROBE_TOKENS, dtype=torch.long))
    except Exception as error:  # whatever the code of a model raises
        raise PTQError(
            f"the model does not run on {PROBE_TOKENS} tokens with all weights zero, so its structure cannot be discovered: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    last = max((place for place, name in enumerate(order) if name == names[id(blocks[-1])]), default=len(order))
    return Probe([probe.shape() for probe in probes], frozenset(order[last:]) - frozenset(order[:last]))


def _running_order(model: nn.Module) -> list[str]:
    """A list that fills with the names of modules as they start to run."""
    order: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _module, _args, name=name: order.append(name))
    return order


def _fill_with_zeros(model: nn.Module) -> None:
    """Parameters that are one zero, seen as a whole matrix, and linears that return as many zeros as they would numbers."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[leaf] = nn.Parameter(zeros, requires_grad=False)
        if is_linear(module):
            out_features = linear_weight(module).shape[0]
            module.forward = lambda inputs, features=out_features: inputs.new_zeros((*inputs.shape[:-1], features))


@dataclass
class _BlockProbe:
    """Hooks on one block of the twin; keeps the seen tensors alive so that their identities stay distinct."""

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
        hidden = self.output[0] if returns_tuple and self.output else self.output
        return BlockShape(
            stages=tuple(tuple(stage) for stage in stages.values()),
            returns_tuple=returns_tuple,
            extra_outputs=len(self.output) - 1 if returns_tuple else 0,
            hidden=tuple(hidden.shape) if isinstance(hidden, Tensor) else None,
            unused=tuple(local for local in linears if local not in names),
            repeated=tuple(local for local in linears if names.count(local) > 1),
        )


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"

"""Experts that lie in one parameter, as linears of their own.

``separate_experts`` finds the parameters of a model on the meta device that are stacks of matrices and are multiplied one matrix at a time
(``stacks.py``), and gives each matrix the linears that the file has for it: children of the module, named as they are stored. Files hold
experts in two ways. Mostly each has tensors of its own, of which transformers puts together the parameter as it declares: those of one
expert below each other (gate, up), then all experts in a row. Or the file holds the parameter itself; its matrices are then cut out of
it while they are read (``checkpoint.stacked``), under the names that transformers declares for single experts, or that of the parameter.

A parameter that is stored in another way, or that code uses in another way, is left as it is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ptqcli.checkpoint.stacked import StackPart
from ptqcli.errors import PTQError
from ptqcli.model.discovery import probe_model
from ptqcli.model.kinds import ModelKind
from ptqcli.model.names import candidates, declared_changes
from ptqcli.model.stacks import Linears, Watched, linear_path

CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)


class Expert(nn.Module):
    """The linears of one expert. What it computes of them is the business of the module above it."""


@dataclass(frozen=True)
class Declared:
    """How transformers puts a parameter together of tensors of single experts. parts: what stands behind the expert's number, in order."""

    parts: tuple[str, ...]
    turned: bool


def stacked_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are stacks of matrices; kernels of convolutions are none."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and min(parameter.shape) > 1 and not isinstance(_owner(model, name)[0], CONVOLUTIONS)
    }


def separate_experts(model: nn.Module, kind: ModelKind, stored: Sequence[str]) -> dict[str, StackPart]:
    """Give ``model`` linears in the place of its stacks of matrices, as far as that can be done with the tensors ``stored``.

    Returns the tensors that are then to be cut out of stored ones, by their names.
    """
    stacks = stacked_parameters(model)
    if not stacks:
        return {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):  # of the ways to run them the one that takes matrix after matrix
            config._experts_implementation = "eager"  # type: ignore[union-attr]
    files = _Files(model, stored, stacks)
    cut: dict[str, StackPart] = {}
    for name, turned in _turned(model, kind, stacks).items():
        parts = files.parts(name, turned)
        if parts is not None:
            _separate(model, name, parts, turned)
            cut.update(files.cut(name, parts, turned))
    return cut


def _turned(model: nn.Module, kind: ModelKind, stacks: Mapping[str, nn.Parameter]) -> dict[str, bool]:
    """The stacks that are multiplied a matrix at a time, and whether those are [in, out]."""
    twin = copy.deepcopy(model)
    watched: dict[str, Watched] = {}
    for name, parameter in stacks.items():
        module, leaf = _owner(twin, name)
        del module._parameters[leaf]
        watched[name] = vars(module)[leaf] = Watched(parameter)
    try:
        probe_model(twin, kind)
    except PTQError:  # nothing is known; what keeps the model from running is told where its blocks are looked for
        return {}
    return {name: each.turned for name, each in watched.items() if each.turned is not None}


def _separate(model: nn.Module, name: str, parts: tuple[str, ...], turned: bool) -> None:
    module, leaf = _owner(model, name)
    parameter = module._parameters.pop(leaf)
    assert parameter is not None
    out_features, in_features = parameter.shape[1:][::-1] if turned else parameter.shape[1:]
    for index in range(len(parameter)):
        for part in parts:
            path, _, last = linear_path(index, part).rpartition(".")
            if path and path not in module._modules:
                module.add_module(path, Expert().eval())
            linear = nn.Linear(in_features, out_features // len(parts), bias=False, device="meta", dtype=parameter.dtype)
            module.get_submodule(path).add_module(last, linear.eval())
    vars(module)[leaf] = Linears(module, name, parameter.shape, parts, turned)


class _Files:
    """Where the matrices of ``stacks`` are ``stored``."""

    def __init__(self, model: nn.Module, stored: Sequence[str], stacks: Mapping[str, nn.Parameter]) -> None:
        self._stacks, self._prefix = stacks, getattr(model, "base_model_prefix", "") + "."
        self._renamings, converters = declared_changes(model)
        self._whole: dict[str, str] = {}  # stack -> the tensor that it is stored as
        self._memory: set[str] = set()  # what stored tensors may be called in the model
        for name in stored:
            names = list(candidates(name, self._prefix, self._renamings))
            self._memory.update(names)
            target = next((each for each in names if each in stacks), None)
            if target is not None:
                self._whole[target] = name
        self._declared: dict[str, Declared] = dict(self._declarations(converters))

    def parts(self, name: str, turned: bool) -> tuple[str, ...] | None:
        """The linears of each matrix of the stack ``name``, or None if its matrices are nowhere."""
        declared, leaf = self._declared.get(name), name.rpartition(".")[2]
        leaf = "" if leaf == "weight" else leaf  # of a module that is one list of linears
        known = [declared.parts] if declared is not None and declared.turned == turned else []
        choices = [parts for parts in (*known, (leaf,)) if self._out_features(name, turned) % len(parts) == 0]
        if name in self._whole:
            return choices[0]
        return next((parts for parts in choices if all(path in self._memory for path in self._paths(name, parts))), None)

    def cut(self, name: str, parts: tuple[str, ...], turned: bool) -> dict[str, StackPart]:
        """The tensors of linears that the file has in one stack."""
        if name not in self._whole:
            return {}
        stack, rows = self._whole[name], self._out_features(name, turned) // len(parts)
        cuts = {}
        for index in range(len(self._stacks[name])):
            for number, part in enumerate(parts):
                cuts[self._cut_name(name, linear_path(index, part))] = StackPart(stack, index, number * rows, (number + 1) * rows, turned)
        return cuts

    def _cut_name(self, name: str, path: str) -> str:
        """As the stored stack is called, where transformers finds the linear under that name."""
        module, _, leaf = name.rpartition(".")
        wanted, stack = f"{module}.{path}.weight", self._whole[name]
        beside = f"{stack.removesuffix(leaf)}{path}.weight"
        return beside if stack.endswith(f".{leaf}") and wanted in candidates(beside, self._prefix, self._renamings) else wanted

    def _paths(self, name: str, parts: Sequence[str]) -> Iterator[str]:
        module = name.rpartition(".")[0]
        return (f"{module}.{linear_path(index, part)}.weight" for index in range(len(self._stacks[name])) for part in parts)

    def _out_features(self, name: str, turned: bool) -> int:
        return self._stacks[name].shape[2 if turned else 1]

    def _declarations(self, converters: Sequence[Any]) -> Iterator[tuple[str, Declared]]:
        """How stacks are put together, for those of which that can be undone."""
        for converter in converters:
            turned = _undone(converter.operations, len(converter.source_patterns))
            tails = [_behind_number(pattern) for pattern in converter.source_patterns]
            if turned is None or None in tails:
                continue
            declared = Declared(tuple(tail for tail in tails if tail is not None), turned)
            for name in self._stacks:
                module = name.rpartition(".")[0]
                source = f"{module}.0.{declared.parts[0]}.weight"
                if name in candidates(converter.rename_source_key(source)[0], self._prefix, ()):
                    yield name, declared


def _behind_number(pattern: str) -> str | None:
    """``gate_proj`` of ``mlp.experts.*.gate_proj.weight``."""
    found = re.fullmatch(r"[^*]*\.\*\.(\w+)\.weight\$?", pattern.replace("\\", ""))
    return None if found is None else found[1]


def _undone(operations: Sequence[Any], sources: int) -> bool | None:
    """Whether matrices that are merged to a stack like this lie in it as [in, out]; None for other operations."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    kinds = [type(operation) for operation in operations]
    joined = [MergeModulelist] if sources == 1 else [MergeModulelist, Concatenate]
    if kinds[: len(joined)] != joined or operations[0].dim != 0 or (sources > 1 and operations[1].dim != 1):
        return None
    rest = operations[len(joined) :]
    turning = len(rest) == 1 and isinstance(rest[0], Transpose) and {rest[0].dim0, rest[0].dim1} == {1, 2}
    return turning if turning or not rest else None


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf

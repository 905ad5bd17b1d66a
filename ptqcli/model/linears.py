"""Modules that hold a quantizable matrix, and where they stand."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

TRANSPOSED = "Conv1D"  # GPT-2's own class, which stores its matrix as [in, out]


@dataclass(frozen=True, kw_only=True)
class LinearSite:
    """Where one linear stands. ``name`` is its path in the whole model, ``local`` its path inside the block."""

    name: str
    local: str
    block: int
    in_features: int
    out_features: int
    kind: str  # name of its class

    @property
    def transposed(self) -> bool:
        """Whether it stores its matrix as [in, out], as GPT-2's ``Conv1D`` does."""
        return self.kind == TRANSPOSED


def is_linear(module: nn.Module) -> bool:
    """True for the modules that hold a quantizable matrix: ``nn.Linear`` and GPT-2's transposed twin ``Conv1D``.

    A class that is made of ``nn.Linear`` and returns something else than its output, as some routers of experts do, is none.
    """
    return (isinstance(module, nn.Linear) and _returns_outputs(module)) or _is_transposed(module)


def linear_weight(module: nn.Module) -> Tensor:
    """The matrix of a linear as a [out, in] view, whichever way the module stores it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return rows_first(module, weight)


def linear_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What a linear is called with, [..., in]: its one argument, by position or by name."""
    inputs = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(inputs, Tensor)
    return inputs


def rows_first(linear: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` of ``linear`` turned from the way the module stores it to [out, in], or back."""
    return weight.t() if _is_transposed(linear) else weight


_RETURNS_OUTPUTS: WeakKeyDictionary[type[nn.Linear], bool] = WeakKeyDictionary()  # of classes with a forward of their own


def _returns_outputs(module: nn.Linear) -> bool:
    """Whether it returns a tensor of outputs: told by a run without values, once a class."""
    kind = type(module)
    if kind.forward is nn.Linear.forward:
        return True
    if kind not in _RETURNS_OUTPUTS:
        twin = copy.copy(module)
        vars(twin)["_parameters"] = {
            name: None if parameter is None else nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            for name, parameter in module._parameters.items()
        }
        inputs = torch.empty(2, module.in_features, dtype=module.weight.dtype, device="meta")
        try:
            found = kind.forward(twin, inputs)
            _RETURNS_OUTPUTS[kind] = isinstance(found, Tensor) and found.shape == (2, module.out_features)
        except Exception:  # noqa: BLE001 - code that looks at values, of which there are none
            _RETURNS_OUTPUTS[kind] = True
    return _RETURNS_OUTPUTS[kind]


def _is_transposed(module: nn.Module) -> bool:
    """Told by its name: the class itself would bring all of transformers along, for which `ptq quantize --help` would have to wait."""
    kind = type(module)
    return kind.__name__ == TRANSPOSED and kind.__module__ == "transformers.pytorch_utils"

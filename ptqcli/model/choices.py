"""Calls of a module of experts in which each of them gets every token.

What says to which experts a token goes is the tensor of whole numbers among the arguments, [tokens, choices]; what has an entry for each
choice of each token, as their weights do, has the same shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def each_on_all(experts: nn.Module, numbers: Iterable[int], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """What ``experts`` returns, called with these arguments, when all tokens choose the first expert of ``numbers``, the next, and so on.

    Its own hooks are not called. Nothing comes where no argument says which expert gets which token.
    """
    shapes = {value.shape for value in (*args, *kwargs.values()) if _is_choice(value)}
    for number in numbers if shapes else ():
        chosen = [_first_choice(value, shapes, number) for value in args]
        yield type(experts).forward(experts, *chosen, **{key: _first_choice(value, shapes, number) for key, value in kwargs.items()})


def _is_choice(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point() and value.dtype != torch.bool


def _first_choice(value: Any, shapes: set[torch.Size], number: int) -> Any:
    """Of what has an entry for each choice of each token the first one, which is expert ``number``."""
    if not isinstance(value, Tensor) or value.shape not in shapes:
        return value
    return torch.full_like(value[:, :1], number) if _is_choice(value) else value[:, :1]

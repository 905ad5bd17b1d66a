"""Hidden states as blocks take them, and as they are kept.

Kept are [windows, tokens, features]. Some models hand several of them from block to block, stacked in front: [*stack, windows, tokens,
features]; those are kept side by side, as features.
"""

from __future__ import annotations

from torch import Tensor


def kept(states: Tensor) -> Tensor:
    """``states`` [*stack, windows, tokens, features] as [windows, tokens, stack * features]; without a stack they are given back."""
    stacked = states.dim() - 3
    return states if stacked == 0 else states.permute(stacked, stacked + 1, *range(stacked), stacked + 2).flatten(2)


def handed(states: Tensor, stack: tuple[int, ...]) -> Tensor:
    """``kept`` states as a block takes them."""
    if not stack:
        return states
    apart = states.unflatten(2, (*stack, -1))
    return apart.permute(*range(2, 2 + len(stack)), 0, 1, -1).contiguous()

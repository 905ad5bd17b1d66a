"""A skeleton with all of its weights, to be run as a model: held at once, or a block at a time while a pass goes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ptqcli.model.skeleton import Skeleton
from ptqcli.model.states import handed


@contextmanager
def whole(skeleton: Skeleton, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
    """The model with every weight on ``device``, floating ones as ``dtype``, for the duration."""
    with skeleton.loaded_outside(device, dtype) as model:
        try:
            for index in range(len(skeleton.blocks)):
                skeleton.load_block(index, device, dtype)
            yield model
        finally:
            for unit in skeleton.units:
                skeleton.release(unit)


@contextmanager
def given_hidden(skeleton: Skeleton, hidden: Tensor, count: int | None = None) -> Iterator[None]:
    """While inside, the first ``count`` blocks, all if None, give ``hidden`` [windows, tokens, features], whatever they receive."""
    blocks = skeleton.blocks[:count]
    for block, shape in zip(blocks, skeleton.shapes[:count], strict=True):
        states = handed(hidden, shape.stack)
        block.forward = _giving(states if shape.container is None else shape.container([states, *[None] * shape.extra_outputs]))
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


@contextmanager
def walked(skeleton: Skeleton, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
    """As ``whole``, but a block's weights are there only while the model runs it: for one pass, in the memory of a few blocks."""
    with ExitStack() as hooks, skeleton.loaded_outside(device, dtype) as model:
        for index, block in enumerate(skeleton.blocks):

            def load(_block: nn.Module, _inputs: Any, index: int = index) -> None:
                skeleton.load_block(index, device, dtype)

            def release(_block: nn.Module, _inputs: Any, _outputs: Any, index: int = index) -> None:
                skeleton.release(skeleton.units[index])

            hooks.callback(block.register_forward_pre_hook(load).remove)
            hooks.callback(block.register_forward_hook(release).remove)
        yield model

"""Hidden states of all calibration tokens, before and behind the blocks at work."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor


class HiddenStates:
    """One stream of hidden states, [windows, tokens, features], in two buffers.

    inputs: before the blocks at work; nothing writes into them, so that the work on a block can be repeated. outputs: behind them.
    Both are held in memory, or in memory-mapped temporary files in ``folder`` when together they are larger than ``budget`` bytes.
    """

    def __init__(self, inputs: Tensor, budget: int, folder: Path) -> None:
        self.inputs = inputs
        self.outputs = new_buffer(tuple(inputs.shape), inputs.dtype, budget, folder)

    def advance(self) -> None:
        """What was behind the blocks at work is before the next ones."""
        self.inputs, self.outputs = self.outputs, self.inputs

    def copy(self, budget: int, folder: Path) -> HiddenStates:
        """A second stream that begins where this one is."""
        inputs = new_buffer(tuple(self.inputs.shape), self.inputs.dtype, budget, folder)
        inputs.copy_(self.inputs)
        return HiddenStates(inputs, budget, folder)


def new_buffer(shape: tuple[int, ...], dtype: torch.dtype, budget: int, folder: Path) -> Tensor:
    """An uninitialised tensor on the CPU, one of the two buffers of a stream that may take ``budget`` bytes of memory."""
    if not beyond_budget(torch.Size(shape).numel() * dtype.itemsize, budget):
        return torch.empty(shape, dtype=dtype)
    count = torch.Size(shape).numel()
    # Unlinked at once: the mapping keeps the space for as long as it is used, and no way of ending leaves a file behind.
    with tempfile.NamedTemporaryFile(dir=folder, prefix="activations-") as file:
        file.truncate(count * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)


def beyond_budget(buffer_bytes: int, budget: int) -> bool:
    """Whether two buffers of so many bytes go to files."""
    return 2 * buffer_bytes > budget

"""Hidden states of all calibration tokens, before and behind the blocks at work."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ptqcli.errors import PTQError

ACTIVATIONS = "activations-"  # how the names of the files begin


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
    """An uninitialised tensor on the CPU, one of the two buffers of a stream that may take ``budget`` bytes of memory.

    Raises PTQError if ``folder`` has no room for it.
    """
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    if not beyond_budget(size, budget):
        return torch.empty(shape, dtype=dtype)
    try:
        # Unlinked at once: the mapping keeps the space for as long as it is used, and no way of ending leaves a file behind.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=ACTIVATIONS) as file:
            _allocate(file.fileno(), size)
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
    except OSError as error:
        room = f"{size / 1e9:.2f} GB of activations, which --activation-budget keeps out of memory"
        raise PTQError(f"{folder}: cannot hold {room}: {error.strerror}; make room there or raise the budget") from error


def _allocate(descriptor: int, size: int) -> None:
    """Take the room on disk now. Where it is missing when a mapped page is first written, the process dies of SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
    zeros = bytes(min(size, 16 << 20))  # macOS, and file systems that cannot
    left = size
    while left:
        left -= os.write(descriptor, zeros[:left])


def beyond_budget(buffer_bytes: int, budget: int) -> bool:
    """Whether two buffers of so many bytes go to files."""
    return 2 * buffer_bytes > budget

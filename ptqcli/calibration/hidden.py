"""Hidden states of all calibration tokens between two blocks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch


class Activations:
    """Hidden states of all calibration tokens, [windows, tokens, features], replaced block by block.

    Held in memory, or in a memory-mapped temporary file in ``folder`` when they are larger than ``budget`` bytes.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, budget: int, folder: Path) -> None:
        count = shape[0] * shape[1] * shape[2]
        self.nbytes = count * dtype.itemsize
        self.mapped = self.nbytes > budget
        if self.mapped:
            # Unlinked at once: the mapping keeps the space for as long as it is used, and no way of ending leaves a file behind.
            with tempfile.NamedTemporaryFile(dir=folder, prefix="activations-") as file:
                file.truncate(self.nbytes)
                self.values = torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
        else:
            self.values = torch.empty(shape, dtype=dtype)

"""How a run uses the machine; none of it changes what is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

DEFAULT_ACTIVATION_BUDGET = 4 << 30
# Tokens per forward pass: enough for products at full speed, few enough that a batch's intermediate tensors stay small.
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class Resources:
    """How a run uses the machine; none of it changes what is asked for.

    batch_size: windows per forward pass, None for what makes about TOKENS_PER_BATCH tokens. activation_budget: bytes of activations to hold
    in memory; more go to a file. dtype: of the calibration passes, None for the model's own (float16 becomes float32 on a CPU, where its
    products are slow and overflow). max_shard_bytes: largest safetensors file, None for the default.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int | None = None
    activation_budget: int = DEFAULT_ACTIVATION_BUDGET
    dtype: torch.dtype | None = None
    max_shard_bytes: int | None = None

    def windows_per_batch(self, seqlen: int) -> int:
        """Windows of ``seqlen`` tokens in one forward pass."""
        return self.batch_size or max(1, TOKENS_PER_BATCH // seqlen)

    def calibration_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype of the calibration passes for a model stored in ``stored``."""
        if self.dtype is not None:
            return self.dtype
        return torch.float32 if stored == torch.float16 and self.device.type == "cpu" else stored


def free_bytes(device: torch.device | str) -> int:
    """Memory of ``device`` that is not taken, in bytes."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # here, so that the GPU check does without it

    return int(psutil.virtual_memory().available)

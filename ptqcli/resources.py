"""How a run uses the machine; none of it changes what is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ptqcli.errors import UsageError

DEFAULT_ACTIVATION_BUDGET = 4 << 30
# Tokens per forward pass: enough for products at full speed, few enough that a batch's intermediate tensors stay small.
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class Resources:
    """How a run uses the machine. None of it changes what is asked for, but batch_size, device and dtype change the last digits of sums,
    and with them codes.

    batch_size: windows per forward pass, None for what makes about TOKENS_PER_BATCH tokens. activation_budget: bytes of activations to hold
    in memory; more go to a file. dtype: of the calibration passes, None for the model's own (float16 becomes float32 on a CPU, where its
    products are slow and overflow). max_shard_bytes: largest safetensors file, None for the default. cache: folder where text that a model
    has written is kept for the next run, None to keep none.
    Raises UsageError for values that cannot be.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int | None = None
    activation_budget: int = DEFAULT_ACTIVATION_BUDGET
    dtype: torch.dtype | None = None
    max_shard_bytes: int | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and not (isinstance(self.batch_size, int) and self.batch_size > 0):
            raise UsageError(f"batch size {self.batch_size!r} is not valid; give a whole number of windows, at least 1")
        if not (isinstance(self.activation_budget, (int, float)) and self.activation_budget >= 0):
            raise UsageError(f"activation budget {self.activation_budget!r} is not valid; give a number of bytes")
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise UsageError(f"dtype {self.dtype!r} is not valid; give a floating dtype such as torch.float32")

    def windows_per_batch(self, seqlen: int) -> int:
        """Windows of ``seqlen`` tokens in one forward pass."""
        return self.batch_size or max(1, TOKENS_PER_BATCH // seqlen)

    def calibration_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype of the calibration passes for a model stored in ``stored``."""
        if self.dtype is not None:
            return self.dtype
        return torch.float32 if stored == torch.float16 and self.device.type == "cpu" else stored


def open_device(name: str | torch.device) -> torch.device:
    """The torch device called ``name``. Raises UsageError if there is no such device on this machine."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device {name!r} is unknown; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise UsageError(f"device {name!r} is not on this machine, which has {count} CUDA devices (see `ptq doctor`)")
    return device


def process_bytes() -> int:
    """Memory that this process holds now, libraries included."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def free_bytes(device: torch.device | str) -> int:
    """Memory of ``device`` that is not taken, in bytes."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # here, so that the GPU check does without it

    return int(psutil.virtual_memory().available)


def ran_out(error: BaseException) -> bool:
    """Whether ``error`` says that there was no memory for something."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)

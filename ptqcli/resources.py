"""How a run uses the machine; none of it changes what is asked for."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ptqcli.errors import UsageError

DEFAULT_ACTIVATION_BUDGET = 4 << 30
# Tokens per forward pass: enough for products at full speed, few enough that a batch's intermediate tensors stay small.
TOKENS_PER_BATCH = 4096
NO_LIMIT = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Resources:
    """How a run uses the machine. None of it changes what is asked for, but batch_size, device and dtype change the last digits of sums,
    and with them codes.

    batch_size: windows per forward pass, None for what makes about TOKENS_PER_BATCH tokens. memory: bytes that the process may take on
    ``device``, None for what is free there, see ``plan_memory``. activation_budget: bytes of activations to hold in memory, None for what
    ``memory`` leaves; more go to a file. dtype: of the calibration passes, None for the model's own (float16 becomes float32 on a CPU,
    where its products are slow and overflow). max_shard_bytes: largest safetensors file, None for the default. cache: folder where text
    that a model has written is kept for the next run, None to keep none.
    Raises UsageError for values that cannot be.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int | None = None
    memory: int | None = None
    activation_budget: int | None = None
    dtype: torch.dtype | None = None
    max_shard_bytes: int | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and not (isinstance(self.batch_size, int) and self.batch_size > 0):
            raise UsageError(f"batch size {self.batch_size!r} is not valid; give a whole number of windows, at least 1")
        for what, size in (("memory", self.memory), ("activation budget", self.activation_budget)):
            if size is not None and not (isinstance(size, (int, float)) and size >= 0):
                raise UsageError(f"{what} {size!r} is not valid; give a number of bytes")
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise UsageError(f"dtype {self.dtype!r} is not valid; give a floating dtype such as torch.float32")

    @property
    def budget(self) -> int:
        """Bytes of activations to hold in memory."""
        return DEFAULT_ACTIVATION_BUDGET if self.activation_budget is None else self.activation_budget

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
    """Memory of ``device`` that is not taken, in bytes; on a CPU no more than the limits of the process leave."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # here, so that the GPU check does without it

    machine = psutil.virtual_memory().available + psutil.swap_memory().free
    return max(0, min(int(machine), _left_of_address_space(), left_in_control_group()))


def _left_of_address_space() -> int:
    """What ``ulimit -v`` leaves."""
    if sys.platform == "win32":
        return NO_LIMIT
    import resource

    import psutil

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return NO_LIMIT if limit == resource.RLIM_INFINITY else limit - int(psutil.Process().memory_info().vms)


def left_in_control_group(root: Path = Path("/sys/fs/cgroup"), member: Path = Path("/proc/self/cgroup")) -> int:
    """What the control groups of the process leave, those above its own included; files that the system caches for it do not count.

    root: where they are mounted. member: tells which ones they are, as cgroups(7) describes it, version 1 or 2.
    """
    try:
        lines = [line.split(":", 2) for line in member.read_text().splitlines()]
    except OSError:
        return NO_LIMIT
    left = NO_LIMIT
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        place = top / path.strip("/")
        for group in (place, *(above for above in place.parents if above.is_relative_to(top))):
            left = min(left, _left_in(group, *files))
    return left


def _left_in(group: Path, limit_file: str, usage_file: str) -> int:
    try:
        limit, usage = (group / limit_file).read_text().strip(), int((group / usage_file).read_text())
        told = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = sum(int(told.get(f"total_{kind}", told.get(kind, 0))) for kind in ("active_file", "inactive_file"))
        return NO_LIMIT if limit == "max" else int(limit) - usage + cached
    except (OSError, ValueError):  # not there, or not what this system writes
        return NO_LIMIT


def ran_out(error: BaseException) -> bool:
    """Whether ``error`` says that there was no memory for something."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)

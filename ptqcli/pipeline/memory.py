"""Memory of the process: what it gives back, and the most that it held."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

# Bytes of weights behind whose solution memory is given back: without it, a layer of 64 experts left 20 MB more behind with every block of
# 104 MB. It costs some percent of a solver's time on matrices of this size.
RETURN_AFTER = 1 << 20


def return_freed_memory(device: torch.device | None = None) -> None:
    """Ask the C library to give freed memory back to the system, where it can (glibc); with a ``device``, also what nothing points to any
    more, after an error say, and what torch keeps of it there.

    It keeps freed tensors of up to 32 MB for reuse, but in pieces that the next block's do not fit: from 8 to 32 blocks of 12 MB the
    peak rose by 40 % without this.
    """
    if device is not None:
        gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process on ``device``; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would also count a parent process that was larger when it forked
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

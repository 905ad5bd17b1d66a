"""What torch keeps for a thread: whether gradients are recorded, inference mode, autocast.

A greenlet shares its thread with the one that resumes it, and so these modes with it. A pass that is suspended inside ``torch.autocast``
would leave it switched on for whoever goes on, and would find their modes when it is resumed. ``Modes`` takes them down and puts them back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

DEVICE_TYPES = ("cpu", "cuda")


@dataclass(frozen=True)
class Modes:
    """The modes of one side of a switch. autocast: for each of DEVICE_TYPES whether it is on, and its dtype."""

    grad: bool
    autocast: tuple[tuple[bool, torch.dtype], ...]
    autocast_cache: bool

    @classmethod
    def now(cls) -> Modes:
        """Those of the calling side."""
        return cls(
            grad=torch.is_grad_enabled(),
            autocast=tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in DEVICE_TYPES),
            autocast_cache=torch.is_autocast_cache_enabled(),
        )

    def restore(self) -> None:
        """Make them those of the calling side."""
        for kind, (enabled, dtype) in zip(DEVICE_TYPES, self.autocast, strict=True):
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        torch.set_grad_enabled(self.grad)


def switch_with_modes(switch: Any, outside: tuple[bool, Modes], *value: Any) -> Any:
    """Call ``switch`` (of a greenlet) under the modes ``outside``, those of whoever goes on, and return under one's own.

    outside: whether inference mode is on there, and the rest. Inference mode is a guard of its own, which also sets the rest.
    """
    inference, modes = outside
    mine = Modes.now()
    try:
        with torch.inference_mode(inference):
            modes.restore()
            return switch(*value)
    finally:
        mine.restore()


def outside_modes() -> tuple[bool, Modes]:
    """The modes of the calling side, to be handed to ``switch_with_modes`` by the other side."""
    return torch.is_inference_mode_enabled(), Modes.now()

"""Layers inside ``torch.autocast``, where an input may come in another dtype than the layer's, as a norm in float32 hands it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; torch has none for the meta device, and does not take the question."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(layer: Any, x: Tensor) -> Tensor:
    """``layer`` on ``x`` in the dtype of its bias, or its scales, for which its codes were chosen; ``nn.Linear`` would take autocast's
    own."""
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = layer(x.to((layer.scale if layer.bias is None else layer.bias).dtype))
        return out

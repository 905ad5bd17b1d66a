"""Linear layers of one input, such as a block's q, k and v, run as one: one launch instead of three, of a size that fills a GPU.

The model goes on calling its layers one by one. The first of them runs the joined layer and keeps the result; the others take their
columns of it, if they are given the very same tensor, unchanged. Whenever that is not so, a layer runs the joined one for itself: that
costs time and is never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(kw_only=True)
class _Result:
    """What the joined layer made of ``x``, until all parts have taken theirs."""

    x: Tensor
    version: int
    out: Tensor
    missing: set[int]


class JoinedLinear(nn.Module):
    """``linear`` [K -> N], whose outputs are those of several layers side by side.

    sizes: output features of each, adding up to N; ``parts()`` are the layers to put into the model. Raises ValueError for sizes that
    do not.
    """

    def __init__(self, linear: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        if sum(sizes) != linear.out_features:
            raise ValueError(f"sizes {list(sizes)} do not add up to the {linear.out_features} outputs of the joined layer")
        self.linear = linear
        self.sizes = tuple(sizes)
        self._result: _Result | None = None

    def parts(self) -> list[LinearPart]:
        """One layer for each of ``sizes``; the first holds this module, so that its weights are stored and moved once."""
        starts = [sum(self.sizes[:place]) for place in range(len(self.sizes))]
        return [LinearPart(self, place, start, size) for place, (start, size) in enumerate(zip(starts, self.sizes, strict=True))]

    def forward(self, x: Tensor, part: int) -> Tensor:
        """All outputs for ``x`` [..., K], [..., N], of which the caller takes its ``part``."""
        version = _version(x)
        kept = self._result
        if kept is not None and kept.x is x and kept.version == version and part in kept.missing:
            kept.missing.discard(part)
            if not kept.missing:
                self._result = None
            return kept.out
        out: Tensor = self.linear(x)
        # The others of a model follow the first; what comes out of turn is an exception, for which nothing is kept.
        self._result = _Result(x=x, version=version, out=out, missing=set(range(1, len(self.sizes)))) if part == 0 else None
        return out


def _version(x: Tensor) -> int:
    """A number that changes when ``x`` is written to.

    torch.compile cannot look at it, and inference mode does not count. There the caller's word counts: whoever joins layers has seen them
    called with one unchanged tensor.
    """
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


class LinearPart(nn.Module):
    """Outputs ``start`` to ``start + out_features`` of a ``JoinedLinear``."""

    def __init__(self, joined: JoinedLinear, place: int, start: int, out_features: int) -> None:
        super().__init__()
        self.in_features = joined.linear.in_features
        self.out_features = out_features
        self.place = place
        self.start = start
        # In a tuple the module is no submodule: it belongs to the first part.
        self._joined = (joined,)
        if place == 0:
            self.joined = joined

    @property
    def kernel(self) -> str:
        """As that of the joined layer."""
        kernel = self._joined[0].linear.kernel
        assert isinstance(kernel, str)
        return kernel

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] to [..., out_features], a view of the joined result."""
        out: Tensor = self._joined[0](x, self.place)
        return out[..., self.start : self.start + self.out_features]

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, outputs from {self.start} of a joined layer"

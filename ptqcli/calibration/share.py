"""Which of the calibration windows a process has, where several share them out.

Each has neighbouring windows, so that what is picked by position (samples of the tokens, held-out windows) is the same whoever has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ptqcli.model.kinds import PADDING


@dataclass(frozen=True, kw_only=True)
class Share:
    """The windows ``first`` up to ``stop`` of all.

    windows: how many there are in all. before: tokens of the windows before ``first``. tokens: of all windows. Padding counts in neither.
    """

    first: int
    stop: int
    windows: int
    before: int
    tokens: int

    @classmethod
    def whole(cls, windows: int, tokens: int) -> Share:
        """All of so many windows, which hold so many tokens."""
        return cls(first=0, stop=windows, windows=windows, before=0, tokens=tokens)

    @classmethod
    def of(cls, windows: Tensor, batch: int, rank: int, size: int) -> Share:
        """That of process ``rank`` of ``size`` of the token ids ``windows``, int64 [windows, tokens], in batches of so many."""
        first, stop = bounds(len(windows), batch, rank, size)
        real = windows != PADDING
        return cls(first=first, stop=stop, windows=len(windows), before=int(real[:first].sum()), tokens=int(real.sum()))

    def batches(self, size: int) -> list[tuple[int, int]]:
        """Its windows [start, stop), counted from ``first``, of each batch of ``size`` of all windows of which it has some."""
        starts = range(self.first // size * size, self.stop, size)
        return [(max(start, self.first) - self.first, min(start + size, self.stop) - self.first) for start in starts]

    def own(self, windows: Sequence[int]) -> list[int]:
        """Those of ``windows`` that it has, counted from ``first``."""
        return [window - self.first for window in windows if self.first <= window < self.stop]


def bounds(windows: int, batch: int, rank: int, size: int) -> tuple[int, int]:
    """The first of so many windows that process ``rank`` of ``size`` has, and the one behind its last.

    Each has whole batches, so that all passes are those of one process to the last bit, unless there are fewer of these than processes.
    """
    batches = -(-windows // batch)
    if batches < size:
        return rank * windows // size, (rank + 1) * windows // size
    return min(rank * batches // size * batch, windows), min((rank + 1) * batches // size * batch, windows)

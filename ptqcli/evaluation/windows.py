"""How a long text is cut for scoring, and which tokens of each window count.

The token ids ``t_0 .. t_{n-1}`` of the text are cut into windows of ``seqlen``. The first token of a window has nothing before
it, so a window scores at most ``seqlen - 1`` tokens.

Without a stride, windows follow each other and the tail that fills no window is dropped, as in the GPTQ and AWQ papers:

    |0 1 2 3|4 5 6 7|8 9        seqlen 4: scores 1 2 3 and 5 6 7

With a stride below ``seqlen``, each window starts ``stride`` tokens after the one before it and scores the tokens that no earlier
window scored. Each of them then has at least ``seqlen - stride`` tokens before it. The first window is scored in full, the
last may be short, nothing is dropped. This is the sliding window of the transformers documentation ("Perplexity of
fixed-length models"); its perplexity is lower, and comparable only with numbers of the same stride.

    |0 1 2 3|                   seqlen 4, stride 2: scores 1 2 3,
        |2 3 4 5|               4 5,
            |4 5 6 7|           6 7,
                |6 7 8 9|       8 9
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ptqcli.errors import UsageError


@dataclass(frozen=True)
class Window:
    """Tokens ``start .. start + length - 1`` of the text; the last ``scored`` of them are scored."""

    start: int
    length: int
    scored: int


@dataclass(frozen=True)
class Batch:
    """Windows of equal length that score equally many tokens.

    windows: in the order of the text. inputs: int64 [windows, length]. targets: int64 [windows, scored].
    """

    windows: tuple[Window, ...]
    inputs: Tensor
    targets: Tensor


def plan_windows(tokens: int, seqlen: int, stride: int | None = None) -> list[Window]:
    """The windows over a text of so many tokens, in order; stride defaults to seqlen.

    Raises UsageError for a window without anything to predict, a stride that leaves gaps, a text shorter than one window.
    """
    if seqlen < 2:
        raise UsageError(f"a window of {seqlen} tokens has nothing to predict; give --seqlen 2 or more")
    if stride is not None and not 1 <= stride <= seqlen:
        raise UsageError(f"stride {stride} does not fit windows of {seqlen} tokens; give --stride 1 to {seqlen}")
    if tokens < seqlen:
        remedy = f"give --seqlen {tokens} or less, or more text" if tokens > 1 else "give more text"
        raise UsageError(f"the text has {tokens} tokens, less than one window of {seqlen}; {remedy}")
    if stride is None or stride == seqlen:
        return [Window(start, seqlen, seqlen - 1) for start in range(0, tokens - seqlen + 1, seqlen)]
    return list(_overlapping(tokens, seqlen, stride))


def _overlapping(tokens: int, seqlen: int, stride: int) -> Iterator[Window]:
    yield Window(0, seqlen, seqlen - 1)
    start, end = 0, seqlen
    while end < tokens:
        start += stride
        previous_end, end = end, min(start + seqlen, tokens)
        yield Window(start, end - start, end - previous_end)


def batches(ids: Tensor, windows: list[Window], batch_size: int) -> Iterator[Batch]:
    """The windows in order, neighbours of one shape together, at most batch_size at once. ids: int64 [tokens]."""
    for _, group in groupby(windows, key=lambda window: (window.length, window.scored)):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            yield _batch(ids, alike[start : start + batch_size])


def _batch(ids: Tensor, windows: list[Window]) -> Batch:
    inputs = torch.stack([ids[window.start : window.start + window.length] for window in windows])  # [windows, length]
    return Batch(tuple(windows), inputs, inputs[:, -windows[0].scored :])

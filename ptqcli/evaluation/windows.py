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

Windows that begin with a token of their own (B, the beginning-of-sequence token) have room for one token of the text less, and score its
first one too:

    |B 0 1 2|B 3 4 5|B 6 7 8|9  seqlen 4: scores 0 1 2, 3 4 5 and 6 7 8
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
    """Tokens ``start .. start + length - 1`` of the text, behind the one that every window begins with; the last ``scored`` are scored."""

    start: int
    length: int
    scored: int


@dataclass(frozen=True)
class Batch:
    """Windows of equal length that score equally many tokens.

    windows: in the order of the text. inputs: int64 [windows, length], one longer if windows begin with a token of their own. targets:
    int64 [windows, scored].
    """

    windows: tuple[Window, ...]
    inputs: Tensor
    targets: Tensor


def plan_windows(tokens: int, seqlen: int, stride: int | None = None, begun: bool = False) -> list[Window]:
    """The windows over a text of so many tokens, in order; without a stride they do not overlap. begun: with a token of their own.

    Raises UsageError for a window without anything to predict, a stride that leaves gaps, a text shorter than one window.
    """
    if seqlen < 2:
        raise UsageError(f"a window of {seqlen} tokens has nothing to predict; give --seqlen 2 or more")
    if stride is not None and not 1 <= stride <= seqlen:
        raise UsageError(f"stride {stride} does not fit windows of {seqlen} tokens; give --stride 1 to {seqlen}")
    room = seqlen - begun  # tokens of the text in a window
    if tokens < room:
        remedy = f"give --seqlen {tokens + begun} or less, or more text" if tokens + begun > 1 else "give more text"
        raise UsageError(f"the text has {tokens} tokens, less than one window of {seqlen}; {remedy}")
    if stride is None or stride >= room:
        return [Window(start, room, seqlen - 1) for start in range(0, tokens - room + 1, room)]
    return list(_overlapping(tokens, room, stride, seqlen - 1))


def _overlapping(tokens: int, room: int, stride: int, first: int) -> Iterator[Window]:
    yield Window(0, room, first)
    start, end = 0, room
    while end < tokens:
        start += stride
        previous_end, end = end, min(start + room, tokens)
        yield Window(start, end - start, end - previous_end)


def batches(ids: Tensor, windows: list[Window], batch_size: int, bos: int | None = None) -> Iterator[Batch]:
    """The windows in order, neighbours of one shape together, at most batch_size at once.

    ids: int64 [tokens]. bos: the token that every window begins with.
    """
    for _, group in groupby(windows, key=lambda window: (window.length, window.scored)):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            yield _batch(ids, alike[start : start + batch_size], bos)


def _batch(ids: Tensor, windows: list[Window], bos: int | None) -> Batch:
    inputs = torch.stack([ids[window.start : window.start + window.length] for window in windows])  # [windows, length]
    targets = inputs[:, -windows[0].scored :]
    if bos is not None:
        inputs = torch.cat([inputs.new_full((len(windows), 1), bos), inputs], dim=1)
    return Batch(tuple(windows), inputs, targets)

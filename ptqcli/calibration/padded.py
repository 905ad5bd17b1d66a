"""Calibration windows of an encoder: one text each, as its tokenizer writes it.

An encoder reads whole texts, between the marks that its tokenizer puts around them, and a token sees all of the text that it stands in. So
texts are not joined into one row: each stands alone in its window, with PADDING behind it where it is shorter, and one that is longer than
a window gives several. Statistics are taken over tokens alone, so a short text counts with its few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptqcli.calibration.tokens import read_tokens
from ptqcli.errors import UsageError
from ptqcli.model.kinds import PADDING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS_PER_CALL = 32
PIECE_CHARACTERS = 65_536  # of a text that is tokenized at once


def marks(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer writes in front of a text and behind it."""
    plain, written = (read_tokens(tokenizer, "a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = (at for at in range(len(written)) if written[at : at + len(plain)] == plain)
    start = next(starts, None)
    return ([], []) if start is None else (written[:start], written[start + len(plain) :])


def text_windows(docs: Sequence[str], tokenizer: PreTrainedTokenizerBase, seqlen: int) -> Iterator[list[int]]:
    """The texts in their order as token ids, with the marks around each, in pieces of at most ``seqlen``; blank ones are left out.

    Raises UsageError where the marks alone fill a window.
    """
    before, behind = marks(tokenizer)
    room = seqlen - len(before) - len(behind)
    if room < 1:
        raise UsageError(f"windows of {seqlen} tokens have no room for text beside the tokenizer's marks; raise --seqlen")
    pieces = [text[start : start + PIECE_CHARACTERS] for text in docs for start in range(0, len(text), PIECE_CHARACTERS)]
    pieces = [piece for piece in pieces if piece.strip()]
    for first in range(0, len(pieces), TEXTS_PER_CALL):
        batch = pieces[first : first + TEXTS_PER_CALL]
        for ids in read_tokens(tokenizer, batch, add_special_tokens=False, verbose=False)["input_ids"]:
            for start in range(0, len(ids), room):
                yield before + ids[start : start + room] + behind


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of tokens as int64 [rows, tokens of the longest], with PADDING behind shorter ones."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[PADDING] * (longest - len(row))] for row in rows])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Windows of several texts, each [windows, tokens], as one; shorter ones end in PADDING."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=PADDING) for part in parts])


def padded_windows(docs: Sequence[str], tokenizer: PreTrainedTokenizerBase, nsamples: int, seqlen: int, seed: int) -> Tensor:
    """A seeded random choice of windows, int64 [nsamples, tokens of the longest], each a text or a piece of one.

    Documents are taken in a seeded order until there are twice as many windows as are needed; of these nsamples are drawn. The same
    arguments give the same windows. Raises UsageError if the text has fewer.
    """
    if nsamples < 1:
        raise UsageError(f"{nsamples} windows cannot be cut; give 1 or more")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(docs), generator=generator).tolist()
    rows: list[list[int]] = []
    for row in text_windows([docs[index] for index in order], tokenizer, seqlen):
        rows.append(row)
        if len(rows) == 2 * nsamples:
            break
    if len(rows) < nsamples:
        raise UsageError(
            f"the calibration text gives {len(rows)} windows of at most {seqlen} tokens, and {nsamples} are asked for; an encoder takes "
            "one text or a piece of one in each, so lower that number or give more text"
        )
    return padded([rows[index] for index in torch.randperm(len(rows), generator=generator)[:nsamples].tolist()])

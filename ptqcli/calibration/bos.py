"""Whether windows of text begin with the tokenizer's beginning-of-sequence token, in calibration and evaluation alike.

A model that has always seen that token in front of a text is not itself without: its first tokens are then far off, and quantization is
judged by them, too. So a window begins with it where that is asked for, or where the tokenizer puts it in front of every text by itself
("auto"). The published perplexity protocol has it at the front of the whole text only; "no" is next to that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ptqcli.calibration.tokens import read_tokens
from ptqcli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHOICES = ("auto", "yes", "no")


def check_bos(wanted: str) -> None:
    """Raise UsageError for a word that is none of CHOICES."""
    if wanted not in CHOICES:
        raise UsageError(f"bos {wanted!r} is unknown; use {', '.join(CHOICES[:-1])} or {CHOICES[-1]}")


def window_bos(tokenizer: PreTrainedTokenizerBase, wanted: str) -> int | None:
    """The token with which every window begins, None for none. wanted: one of CHOICES.

    Raises UsageError for another word, and for a tokenizer that has no such token although it is wanted.
    """
    check_bos(wanted)
    bos = tokenizer.bos_token_id
    if wanted == "yes" and bos is None:
        raise UsageError("bos yes: the tokenizer has no beginning-of-sequence token; use auto or no")
    if wanted == "no" or bos is None:
        return None
    written, plain = (read_tokens(tokenizer, "a", add_special_tokens=special)["input_ids"][:1] for special in (True, False))
    return bos if wanted == "yes" or (written == [bos] and written != plain) else None

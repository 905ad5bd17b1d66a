"""``--calib``: which texts, and how many windows of each.

    auto                          what suits the model: see ``pipeline/texts.py``
    self                          text that the model writes itself, see ``own_text.py``
    builtin, wikitext2, c4, pile  see ``text.py``
    PATH, PATH:COLUMN             a file or folder
    A:N,B:N,...                   several of these (but auto), N windows of each

What exists under the whole text is that, whatever commas and colons are in its name. Behind one path alone stands a column, also one
whose name is a number, as ``--nsamples`` says how many windows; in a list the number at an entry's end is its windows, and a column stands
before it (``chats.jsonl:7:64``). A file or column with a comma in its name cannot stand in a list.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ptqcli.errors import UsageError
from ptqcli.untrusted import shown

AUTO, SELF, BUILTIN = "auto", "self", "builtin"
EXAMPLE = "c4:64,code.jsonl:64"
DEFAULT_WINDOWS = 128  # of a text that is there, as in the papers of GPTQ and AWQ
OWN_TOKENS = 16_384  # of text that the model writes where nothing else is at hand: each costs time


@dataclass(frozen=True)
class Share:
    """A text and how many windows of it are taken, None for the usual number."""

    source: str
    windows: int | None = None

    def sized(self, nsamples: int | None, seqlen: int) -> Share:
        """With the number that is asked for, or else the usual one for windows of ``seqlen`` tokens."""
        usual = max(1, OWN_TOKENS // seqlen) if self.source == SELF else DEFAULT_WINDOWS
        return Share(self.source, self.windows or nsamples or usual)


def read_calib(text: str) -> tuple[Share, ...]:
    """The shares that ``text`` names. Raises UsageError, naming the entry, for what is not written as above."""
    if not text:
        raise UsageError("calib is empty; give auto, self, builtin, wikitext2, c4, pile or a path")
    if "," in text and (not _exists(text) or ("," in text.rpartition(":")[2] and not os.path.exists(text))):
        shares = [_entry(entry.strip(), text) for entry in text.split(",")]
        sources = [share.source for share in shares]
        twice = next((source for source in sources if sources.count(source) > 1), None)
        if twice is not None:
            raise UsageError(f"calib {shown(text)} names {twice} twice; name it once, with all its windows")
        return tuple(shares)
    source, colon, number = text.rpartition(":")
    if colon and number.isdecimal() and not _exists(text) and not os.path.exists(source):
        return (_entry(text, text),)
    return (Share(text),)


def check_calib(text: str, nsamples: int | None) -> None:
    """Raise UsageError for a list that is not one, and for windows that are said twice."""
    shares = read_calib(text)
    if nsamples is not None and any(share.windows for share in shares):
        raise UsageError(f"calib {shown(text)} says how many windows each text gives; leave nsamples out")


def shares_text(shares: Sequence[Share], seqlen: int) -> str:
    """For people: ``128 windows of 2048 tokens from c4``."""
    first, *more = shares
    return f"{first.windows} windows of {seqlen} tokens from {first.source}" + "".join(
        f", {share.windows} from {share.source}" for share in more
    )


def _exists(text: str) -> bool:
    """Whether the whole text is a path, or one with a column behind it."""
    return any(os.path.exists(path) for path in (text, text.rpartition(":")[0]) if path)


def _entry(entry: str, text: str) -> Share:
    source, _, number = entry.rpartition(":")
    if not source or re.fullmatch(r"[0-9]{1,9}", number) is None or int(number) < 1:
        raise UsageError(
            f"calib {shown(text)}: {shown(entry)} is not TEXT:WINDOWS; write a list as in {EXAMPLE}, "
            "and a file with a comma in its name alone, or under another name"
        )
    if source == AUTO:
        raise UsageError(f"calib {shown(text)}: auto chooses by itself; give it alone, and the number of windows by nsamples")
    return Share(source, int(number))

"""What a person may have meant by a word that is unknown."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

# Below it, get_close_matches takes more of words that merely share letters than of typing errors.
CLOSE = 0.6
MOST_NAMES = 2000  # of a folder that is looked at


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """``; did you mean 'x'?`` with the one of ``words`` closest to ``word``, to end a message with, or "" if none is close."""
    known = {each.lower(): each for each in words}
    # Each comparison takes time by the square of the length, and no name is this long.
    close = get_close_matches(word[:100].lower(), known, n=1, cutoff=CLOSE)
    return f"; did you mean '{known[close[0]]}'?" if close else ""


def did_you_mean_folder(path: Path) -> str:
    """``did_you_mean`` with the folders that lie where ``path`` would."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, MOST_NAMES) if entry.is_dir()]
    except OSError:
        return ""
    return did_you_mean(path.name, names)

"""What can go wrong, as a user reads it.

Every message is one line that says what is wrong, with which tensor, file or flag, and what to do. The commands turn the
class into an exit code: 1 for work that failed, 2 for a request that could not be understood or can never work.

Messages quote names and values from files of others, which may hold anything. So every message is made printable where it is made,
and cut where it is longer than anybody reads.
"""

import re

MOST_CHARACTERS = 2_000
# Control characters; half surrogate pairs, which cannot be encoded; separators of lines and paragraphs; and what turns the direction of
# writing, with which a name can be made to look like another.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str, keep: str = "") -> str:
    """``text`` with every character that a terminal would obey, not show, written as Python escapes it, but for those in ``keep``."""
    return _OBEYED.sub(lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), text)


class PTQError(Exception):
    """Work that was asked for properly and failed; exit code 1."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        text = printable(message)
        cut = len(text) - MOST_CHARACTERS
        super().__init__(text if cut <= 0 else f"{text[:MOST_CHARACTERS]}... ({cut} more characters)")


class MachineError(PTQError):
    """Work that another attempt with the same request may finish, since the machine was short of something."""


class UsageError(PTQError):
    """A request that cannot work as it was written: a bad flag, recipe or path; exit code 2."""

    exit_code = 2

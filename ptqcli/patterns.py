"""Names that regular expressions find, in bounded time.

Patterns come with recipes and with checkpoints of others. Python's own matcher backtracks: ``(a+)+b`` takes twice as long with every
further ``a``, and ``.*.*.*x`` the fourth power, so that one line in a config.json can stop a command for good. RE2, which pyarrow carries,
follows all ways through the pattern at once: its time is the length of the names times that of the pattern, whatever stands in it.
What is left to bound is that length, in which ``x{1000}`` counts a thousand times, and how many patterns there are.

RE2 has no look-arounds and no back references. Of these, a look-ahead at the beginning (``^(?!.*down)``, all but the down projections) is
taken apart here, since nothing else says "all but"; the others are refused, and so is what the two would read differently.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ptqcli.errors import UsageError
from ptqcli.untrusted import encodes, one_line, shown

Hits = Mapping[str, frozenset[str]]  # pattern -> names that it finds

MOST_CHARACTERS = 500
LARGEST_COUNT = 16  # of the numbers in braces, multiplied
MOST_SECONDS = 10.0  # for all patterns together; each takes a fraction of a second at most

_COUNTS = re.compile(r"\{(\d+)(?:,(\d*))?\}")
# A count without a lower bound, which RE2 takes for plain text, and a class of characters by name, which Python does.
_READ_DIFFERENTLY = re.compile(r"\{,|\[:")


def check_pattern(pattern: str) -> None:
    """Raise UsageError for what is no regular expression, and for one that cannot be matched in bounded time."""
    found([pattern], [""])


def found(patterns: Iterable[str], names: Sequence[str], from_start: bool = False) -> dict[str, frozenset[str]]:
    """Which of ``names`` each of ``patterns`` finds: anywhere in the name, or ``from_start`` only at its beginning.

    Raises UsageError as ``check_pattern`` does, and when all patterns together take longer than MOST_SECONDS.
    """
    distinct = dict.fromkeys(patterns)
    if not distinct:
        return {}
    import pyarrow

    array, start = pyarrow.array(names, pyarrow.string()), time.monotonic()
    result: dict[str, frozenset[str]] = {}
    for pattern in distinct:
        if time.monotonic() - start > MOST_SECONDS:
            raise UsageError(f"matching the patterns takes more than {MOST_SECONDS:.0f} seconds; write fewer or simpler ones")
        kept = set(names)
        for wanted, part in _parts(pattern, from_start):
            hits = _matches(part, array, pattern)
            kept &= {name for name, hit in zip(names, hits, strict=True) if hit == wanted}
        result[pattern] = frozenset(kept)
    return result


def _parts(pattern: str, from_start: bool) -> list[tuple[bool, str]]:
    """What must match, (True, part), and what must not, (False, part), for ``pattern`` to match; RE2 knows all parts."""
    _check(pattern)
    if not from_start and not pattern.startswith("^(?"):
        return [(True, pattern)]
    rest, parts = pattern.removeprefix("^"), []
    if all(depth or character != "|" for _, depth, character in _outside_classes(rest)):
        while rest.startswith(("(?!", "(?=")):
            end = next(place for place, depth, character in _outside_classes(rest) if character == ")" and not depth)
            parts.append((rest[2] == "=", f"^(?:{rest[3:end]})"))
            rest = rest[end + 1 :]
    return [*parts, (True, f"^(?:{rest})")]


def _outside_classes(pattern: str) -> Iterator[tuple[int, int, str]]:
    """The characters of a regular expression that are neither escaped nor in a class: place, how many brackets are open there, which."""
    depth, place = 0, 0
    while place < len(pattern):
        character = pattern[place]
        if character == "[":
            # Right behind the beginning, a closing bracket is a member of the class.
            place += 2 if pattern[place + 1 : place + 2] == "^" else 1
            place += 1 if pattern[place : place + 1] != "\\" else 2
            while pattern[place] != "]":
                place += 2 if pattern[place] == "\\" else 1
        elif character == "\\":
            place += 1
        else:
            depth += (character == "(") - (character == ")")
            yield place, depth, character
        place += 1


def _check(pattern: str) -> None:
    if len(pattern) > MOST_CHARACTERS:
        raise UsageError(f"the pattern {shown(pattern)} has {len(pattern)} characters; write several of at most {MOST_CHARACTERS}")
    if not encodes(pattern):
        raise UsageError(f"the pattern {shown(pattern)} holds half a surrogate pair, which is no character")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of brackets that a later Python may read differently
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"{shown(pattern)} is not a regular expression: {one_line(error)}") from error
    differently = _READ_DIFFERENTLY.search(pattern)
    if differently:
        raise UsageError(f"the pattern {shown(pattern)}: '{differently[0]}' means different things to different programs; write it out")
    counts = [max(int(number) for number in count if number) for count in _COUNTS.findall(pattern)]
    if math.prod(max(count, 1) for count in counts) > LARGEST_COUNT:
        raise UsageError(f"the pattern {shown(pattern)} repeats more than {LARGEST_COUNT} times by number; write + or *")


def _matches(part: str, names: object, pattern: str) -> list[bool]:
    from pyarrow import ArrowInvalid, compute

    try:
        hits: list[bool] = compute.match_substring_regex(names, part).to_pylist()
    except ArrowInvalid as error:
        raise UsageError(
            f"the pattern {shown(pattern)} cannot be matched in bounded time ({one_line(error)}); "
            "write it without look-arounds, but for one at its beginning behind ^, and without back references"
        ) from error
    return hits

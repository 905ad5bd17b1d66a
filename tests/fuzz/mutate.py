"""Plain mutation: an input that is right, changed in one to four places. The same random source gives the same input."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

# Text that no encoder of JSON would write, in the place of a value.
RAW = {
    "@deep": "[" * 3_000 + "]" * 3_000,
    "@nested": '{"a":' * 90 + "1" + "}" * 90,
    "@digits": "9" * 5_000,
    "@many": "9" * 400,
    "@float": "1e999",
    "@nan": "NaN",
    "@minus": "-Infinity",
    "@half": '"\\ud800"',
    "@twice": '{"a": 1, "a": 2}',
    "@comment": "1 /* */",
}
# Where one of them stands for a whole file.
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 7, 255, 100_000, 2**31, 2**53 + 1, 2**63, 2**64 + 1, 10**30, -(2**63), 0.5, -0.0, 1e-45, 1e308,
    "", "x", "1", "../x", "../../etc/passwd", "/dev/zero", "a/b", "\x1b[2J\x1b[31m", "a\nb", "\u202egnp", "\x00", "é" * 300, "a" * 20_000,
    "(a+)+$", "re:(a+)+$", "re:(a|a)*b", "re:((a{1000}){1000}){1000}", "re:(", "Linear", "torch.load", "float32", "kernels-community/x",
    [], {}, [[]], [None], {"": {}}, [1, "a"], list(range(2_000)), {str(i): i for i in range(2_000)}, *RAW,
]  # fmt: skip
KEYS = [
    "auto_map", "_attn_implementation", "attn_implementation", "to_dict", "get_text_config", "quantization_config", "num_hidden_layers",
    "max_position_embeddings", "rope_scaling", "text_config", "__class__", "", "a.b", "../x", "\x1b[31m", "é",
]  # fmt: skip


class Source(Random):
    """Random numbers of one input. changes: whether anything is mutated, as it is but for input 0 of each reader."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"{name} {number}")
        self.changes = number > 0


def json_value(value: Any, random: Source) -> Any:
    """``value``, of JSON, with a part replaced, removed, added, renamed or doubled."""
    value = json.loads(json.dumps(value))
    if not random.changes:
        return value
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            return _value(random)
        holder, key = random.choice(places)
        deed = random.randrange(8)
        if deed <= 3:
            holder[key] = _value(random)
        elif deed == 4:
            del holder[key]
        elif deed == 5 and isinstance(holder, dict):
            holder[random.choice(KEYS)] = random.choice([_value(random), holder[key]])
        elif deed == 6:
            other, name = random.choice(places)
            holder[key] = json.loads(json.dumps(other[name])) if _holds(other, name) else None
        elif isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            holder[key] = random.choice([holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 1_000, float(holder[key])])
        else:
            holder[key] = [holder[key]]
    return value


def _value(random: Random) -> Any:
    return copy.deepcopy(random.choice(VALUES))


def _holds(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _places(value: Any) -> Any:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries)[:50]:
        yield value, key
        yield from _places(inner)


def json_bytes(value: Any, random: Source) -> bytes:
    """The JSON text of a mutated ``value``; now and then, its bytes are mutated as well."""
    text = json.dumps(json_value(value, random), indent=random.choice((None, 2)))
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode() if random.random() < 0.8 else raw_bytes(text.encode(), random)


def raw_bytes(data: bytes, random: Source) -> bytes:
    """``data`` with bits flipped, parts cut out, doubled or overwritten, or an end that is missing."""
    if not random.changes:
        return data
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        if not changed:
            return bytes(changed)
        # Lengths and offsets stand at the ends of most files.
        near = random.choice((len(changed), min(len(changed), 64)))
        place = random.choice((random.randrange(near), len(changed) - 1 - random.randrange(near)))
        size = random.choice((1, 4, 8, 100))
        deed = random.randrange(7)
        if deed <= 1:
            changed[place] ^= 1 << random.randrange(8)
        elif deed == 2:
            changed[place : place + size] = random.choice((b"\x00", b"\xff", b"\x80", b"\x7f")) * size
        elif deed == 3:
            del changed[place : place + size]
        elif deed == 4:
            changed[place:place] = changed[place : place + size]
        elif deed == 5:
            del changed[place:]
        else:
            changed[place:place] = random.randbytes(size)
    return bytes(changed)


def text(line: str, random: Source) -> str:
    """``line`` with characters of regular expressions and YAML put into it."""
    pieces = [
        "(",
        ")",
        "*",
        "+",
        "?",
        "|",
        "[",
        "]",
        "{9}",
        "{,3}",
        "{1000}",
        "\\",
        "^",
        "$",
        "(?!",
        "(?=",
        "(?<=",
        "(?P<a>",
        "(?i)",
        "\\1",
        ".*",
    ]
    pieces += [
        "*a",
        "&a",
        "!!python/object:os.system",
        ": ",
        "- ",
        "\n",
        "#",
        "'",
        '"',
        "\t",
        "(a+)+",
        "\ud800",
        "\x1b",
        "é",
        "a" * 600,
        "[" * 300,
    ]
    for _ in range(random.choice((1, 1, 2, 8)) if random.changes else 0):
        place = random.randrange(len(line) + 1)
        line = line[:place] + random.choice(pieces) + line[place + random.choice((0, 0, 1, 5)) :]
    return line

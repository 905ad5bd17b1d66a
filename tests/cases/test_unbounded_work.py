"""Little text that asks for endless work: bounded by a limit, and refused in one line.

Row 32. Regular expressions that backtrack, YAML aliases, pipes and devices in the place of files, packed files that unpack to more than any
memory, and values that are quoted in messages.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commandline import Ptq, one_line
from hypothesis import given
from hypothesis import strategies as st
from packed import everything, llama, random_model, write_checkpoint

from ptqcli.calibration.files import read_file
from ptqcli.errors import PTQError, UsageError
from ptqcli.model.config import read_config
from ptqcli.numerics.scheme import Scheme
from ptqcli.patterns import check_pattern, found
from ptqcli.recipe_loading import load_recipe
from ptqcli.untrusted import read_bytes, shown

NAMES = [f"model.layers.{index}.{name}" for index in range(80) for name in ("self_attn.q_proj", "mlp.down_proj", "a" * 90)]


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < 10


# Patterns

ENDLESS = ["(a+)+$b", "(a|a)*b", "(a|aa)+$b", "(.*)*(.*)*(.*)*x", ".*.*.*.*.*.*.*.*x", "a?" * 100 + "b", "(?:a?){16}" * 1 + "b"]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_that_backtrack_take_no_time(pattern: str) -> None:
    start = time.process_time()
    assert found([pattern], NAMES) == {pattern: frozenset()}
    assert time.process_time() - start < 2


def test_a_checkpoint_with_such_a_pattern_is_inspected(ptq: Ptq, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", random_model(llama(layers=1)), everything(Scheme.parse("w4a16-g32")))
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    values["quantization_config"]["ignore"] = ["lm_head", *(f"re:{pattern}" for pattern in ENDLESS)]
    (tmp_path / "out" / "config.json").write_text(json.dumps(values))
    assert ptq("inspect", tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("a" * 501, "has 501 characters; write several of at most 500"),
        ("(" * 400 + ")" * 400, "characters; write several"),
        ("x{1000}", "repeats more than 16 times by number"),
        ("((x{4}){4}){4}", "repeats more than 16 times by number"),
        (r"(a)\1", "cannot be matched in bounded time"),
        ("(?<!b)a", "cannot be matched in bounded time"),
        ("(", "is not a regular expression"),
        ("x{,3}", "means different things"),
        ("[[:alpha:]]", "means different things"),
        ("\ud800", "half a surrogate pair"),
    ],
)
def test_what_cannot_be_bounded_is_refused(pattern: str, says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        check_pattern(pattern)
    with pytest.raises(UsageError, match=re.escape(says)):
        load_recipe(None, {"ignore": [pattern]})


PIECES = st.sampled_from(
    [
        "a",
        "b",
        ".",
        ".*",
        "a+",
        "b?",
        "(a|b)",
        "(?:ab)*",
        "[ab]",
        "[^a]",
        "[]a]",
        "[^]]",
        r"\.",
        r"\d",
        "a{2}",
        "b{1,3}",
        "$",
        "|",
        "(?i:A)",
        "[[]",
    ]
)
LOOKS = st.sampled_from(["", "", "", "^", "^(?!a)", "^(?=.*b)(?!.*aa)", "^(?![)(]|a|b$)", r"^(?!\(|a)"])
TEXTS = st.lists(st.text("ab.0]A", max_size=6), min_size=1, max_size=5)


def matched(pattern: str, names: list[str], from_start: bool) -> frozenset[str] | None:
    try:
        return found([pattern], names, from_start)[pattern]
    except UsageError:
        return None


@given(LOOKS, st.lists(PIECES, max_size=5), TEXTS, st.booleans())
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_matched_is_what_python_matches(look: str, pieces: list[str], names: list[str], from_start: bool) -> None:
    pattern = look + "".join(pieces)
    mine = matched(pattern, names, from_start)
    if mine is None:
        assert "|" in pieces or "{" in pattern or not look  # behind a look-ahead, an alternative is refused
        return
    match = re.match if from_start else re.search
    assert mine == {name for name in names if match(pattern, name)}


# Recipes

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{" + "x" * 100_000 + ": 1}", "is not valid YAML"),
        (BOMB, "'*a' stands for what is written elsewhere; write it out"),
        ("x: &x {y: 1}\ngptq:\n  <<: [*x, *x]\n", "stands for what is written elsewhere"),
        ("a: b\n" * 100_000, "is larger than 256 KiB"),
        ("[" * 5_000, "is not valid YAML"),
        ("nsamples: " + "9" * 5_000, "is not valid YAML"),
        ("seed: 0x" + "f" * 50_000, "a number of 200000 bits"),
        ("ignore: " + "x" * 100_000, "'ignore' must be a list"),
        ("wbits: " + "x" * 100_000, "'wbits' must be"),
        ("x" * 1_000 + ": 1", "unknown key"),
        ("date: 2020-99-99", "is not valid YAML"),
        ("? [a]\n: b", "is not valid YAML"),
        ("? 3\n: b", "a recipe is a list of 'key: value' lines"),
    ],
)
def test_a_recipe(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError, match=re.escape(says)) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert len(str(caught.value)) < 2_100


# What is no file


@pytest.fixture
def pipe(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        os.mkfifo(tmp_path / name)
        return tmp_path / name

    return make


def test_pipes_and_devices(ptq: Ptq, pipe: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(PTQError, match="is no file but a pipe"):
        read_bytes(pipe("x"), 100)
    with pytest.raises(PTQError, match="is no file but a pipe, a device"):
        read_bytes(Path("/dev/zero"), 100)
    assert "is no file but a pipe" in one_line(ptq("quantize", "--recipe", pipe("r.yaml")))
    for name in ("a.txt", "a.jsonl.gz", "a.parquet", "a.csv"):
        with pytest.raises(UsageError, match="is no file but a pipe"):
            read_file(pipe(name))
    pipe("config.json")
    with pytest.raises(PTQError, match=r"has no config\.json"):
        read_config(tmp_path)


# Packed text


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.raw.gz"])
def test_text_that_unpacks_to_a_thousand_times_its_size(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(bytes(1 << 20)) * 70)  # parts of a gzip file are gzip files
    with pytest.raises(PTQError, match=f"{name}: unpacks to more than 200 times its size"):
        read_file(tmp_path / name)


def test_text_that_repeats_itself_is_no_bomb(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"the same again " * 100_000))
    assert len(read_file(tmp_path / "a.txt.gz")[0]) == 1_500_000
    assert len(zlib.compress(b"the same again " * 100_000)) * 200 < 1_500_000  # by its ratio it would be one


# Messages


@pytest.mark.parametrize(
    "value",
    [10**5_000, ["x" * 10_000] * 10_000, {"x" * 10_000: {"y": [[[[[[[[[]]]]]]]]]}}, "x" * 10**6],
    ids=["digits", "list", "nested", "text"],
)
def test_what_a_message_quotes_is_short(value: object) -> None:
    assert len(shown(value)) < 1_000
    assert len(str(PTQError(f"x: {value if isinstance(value, str) else shown(value)}"))) < 2_100

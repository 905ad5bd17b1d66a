"""Requests for a size: what they may say, and what goes together."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptqcli.budget import DEFAULT_CANDIDATES, Budget, fitted, parse_candidates, parse_size, widest
from ptqcli.errors import UsageError
from ptqcli.numerics.scheme import Scheme
from ptqcli.recipe import Recipe
from ptqcli.recipe_loading import load_recipe


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("300MB", 300_000_000),
        ("1.5 kib", 1536),
        ("8G", 8_000_000_000),
        ("1000000", 1_000_000),
        (77, 77),
        ("2 TiB", 2 << 40),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4 apples", "-4GiB", "4GiBB", "nan", "1e9", "4GiB 3", True, "0", "0.1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a size|is no size"):
        parse_size(text)


def test_candidates_are_schemes_or_short() -> None:
    found = parse_candidates("w2g64, W3G128,w4g128-asym,w8,w4-row,w5a16-g32-asym,q4_k")
    assert [str(scheme) for scheme in found] == [
        "w2a16-g64",
        "w3a16-g128",
        "w4a16-g128-asym",
        "w8a16",
        "w4a16-row",
        "w5a16-g32-asym",
        "q4_k",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w4", "give 2 to 16 schemes, separated by commas, such as w2g64"),
        (",".join(["w4"] * 17), "give 2 to 16 schemes"),
        ("w4,w9", "9 bits per weight is not supported"),
        ("w4,", "is no number format"),
        ("w4,gptq", "is no number format"),
        ("w4,w8a8", "candidate w8a8: rounds activations"),
        ("w4g64,w4a16-g64", "candidate w4g64: is given twice"),
    ],
)
def test_what_are_no_candidates(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_candidates(text)


@pytest.mark.parametrize(
    ("scheme", "columns", "becomes"),
    [
        ("w3a16-g128", 256, "w3a16-g128"),
        ("w3a16-g128", 576, "w3a16-g64"),
        ("w3a16-g64", 96, "w3a16-g32"),
        ("w8a16", 192, "w8a16-g64"),
        ("w4a16-row", 100, "w4a16-row"),
        ("w4a16-g64-asym", 48, "w4a16-g16-asym"),
    ],
)
def test_groups_that_do_not_divide_become_smaller(scheme: str, columns: int, becomes: str) -> None:
    assert str(fitted(Scheme.parse(scheme), columns)) == becomes


def test_no_group_divides() -> None:
    with pytest.raises(UsageError, match="no group of 128, 64, 32 or 16 columns divides 100 input features"):
        fitted(Scheme.parse("w4a16-g64"), 100)


def test_the_widest_stands_for_what_is_not_decided() -> None:
    assert str(widest(parse_candidates(DEFAULT_CANDIDATES))) == "w8a16"
    assert str(widest(parse_candidates("q4_k,q6_k"))) == "q6_k"


def test_a_recipe_has_a_budget() -> None:
    recipe = Recipe(target_size="4GiB", candidates="w2g64,w4g128", sensitivity="kl")
    assert recipe.budget == Budget(bits=None, nbytes=4 << 30, candidates=parse_candidates("w2g64,w4g128"), method="kl")
    assert Recipe(target_bits=3).budget == Budget(bits=3, nbytes=None)
    assert Recipe().budget is None
    table = Recipe(target_bits=3.5, sensitivity="losses.json").budget
    assert table is not None
    assert table.table == Path("losses.json")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"target_bits": 3.5, "target_size": "4GiB"}, "both say how large the result may be"),
        ({"target_bits": 0}, "target bits 0 is not valid"),
        ({"target_bits": float("nan")}, "target bits nan is not valid"),
        ({"target_bits": 17}, "at most 16"),
        ({"target_size": "big"}, "target size 'big' is not a size"),
        ({"candidates": "w2,w4"}, "candidates belongs to a budget"),
        ({"sensitivity": "kl"}, "sensitivity belongs to a budget"),
        ({"target_bits": 3.5, "sensitivity": "gradients"}, "did you mean 'gradient'"),
        ({"target_bits": 3.5, "wbits": 4}, "target_bits chooses the scheme of each linear among candidates, so leave wbits out"),
        ({"target_bits": 3.5, "group_size": 64}, "leave group_size out"),
        ({"target_bits": 3.5, "scheme": "w4a16"}, "leave scheme out"),
        ({"target_bits": 3.5, "abits": 8}, "leave abits out"),
        ({"target_size": 10**9, "format": "gguf", "gguf_type": "q4_k_m"}, "target_size chooses .* leave gguf_type out"),
        ({"target_bits": 5.0, "algo": "smoothquant"}, "smoothquant has one of its own"),
        ({"target_bits": 5.0, "algo": "llm-int8"}, "llm-int8 has one of its own"),
        ({"target_bits": "3.5"}, "'target_bits' must be"),
    ],
)
def test_what_does_not_go_together(request_: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(**request_)  # type: ignore[arg-type]


def test_a_flag_of_a_budget_takes_the_place_of_what_a_recipe_says_of_numbers(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("algo: rtn\nwbits: 4\ngroup_size: 64\ntarget_bits: null\n".replace("target_bits: null\n", ""))
    recipe = load_recipe(file, {"target_bits": 3.5})
    assert (recipe.algo, recipe.wbits, recipe.group_size, recipe.target_bits) == ("rtn", None, None, 3.5)
    file.write_text("target_bits: 3\ncandidates: w2,w4\n")
    recipe = load_recipe(file, {"target_size": "1GiB"})
    assert (recipe.target_bits, recipe.target_size, recipe.candidates) == (None, "1GiB", "w2,w4")
    with pytest.raises(UsageError, match="leave wbits out"):
        load_recipe(file, {"wbits": 4})

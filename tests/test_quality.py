"""``--quality``: what it stands for, and how it meets the rest of a request."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptqcli.errors import UsageError
from ptqcli.quality import QUALITIES, find_quality
from ptqcli.recipe import Recipe
from ptqcli.recipe_loading import load_recipe


@pytest.mark.parametrize("name", QUALITIES)
def test_a_quality_is_the_algorithm_that_it_names(name: str) -> None:
    quality = QUALITIES[name]
    recipe = load_recipe(flags={"quality": name})
    assert (recipe.algo, recipe.finish) == (quality.algo, quality.finish)
    assert recipe.options == {part: dict(values) for part, values in quality.options.items()}
    assert recipe == load_recipe(flags=quality.request())


def test_they_stand_in_the_order_of_their_cost() -> None:
    costs = [quality.cost for quality in QUALITIES.values()]
    assert costs[0] == 1
    assert costs == sorted(costs)
    assert QUALITIES["balanced"].cost <= 3
    assert load_recipe(flags={"quality": "fast"}) == Recipe(), "fast is what a run does without any flag"


def test_options_of_its_parts_may_be_changed() -> None:
    recipe = load_recipe(flags={"quality": "balanced", "damp": 0.1, "wbits": 3, "alpha": 0.5})
    assert recipe.options == {"gptq": {"target": "original", "damp": 0.1, "alpha": 0.5}}
    assert recipe.wbits == 3


def test_its_parts_may_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quality best says what algo is; leave one of the two out"):
        load_recipe(flags={"quality": "best", "algo": "rtn"})
    with pytest.raises(UsageError, match="quality best says what finish is; leave one of the two out"):
        load_recipe(flags={"quality": "best", "finish": "none"})
    file = tmp_path / "recipe.yaml"
    file.write_text("quality: best\nalgo: rtn\n")
    with pytest.raises(UsageError, match="quality best says what algo is; leave one of the two out"):
        load_recipe(file)


def test_a_file_may_name_one_and_a_flag_wins(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("quality: best\nwbits: 3\ngptq: {damp: 0.2}\n")
    recipe = load_recipe(file)
    assert (recipe.wbits, recipe.finish, recipe.options) == (
        3,
        "kl",
        {"rotate": {"unsuited": "skip"}, "gptq": {"target": "original", "damp": 0.2}},
    )
    assert load_recipe(file, {"quality": "fast"}) == Recipe(wbits=3)


def test_a_quality_in_place_of_the_algorithm_of_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("algo: awq+gptq\nwbits: 3\nawq: {clip: false}\ngptq: {damp: 0.2}\nnsamples: 16\n")
    recipe = load_recipe(file, {"quality": "balanced"})
    assert recipe == Recipe(wbits=3, nsamples=16, options={"gptq": {"target": "original"}})


@pytest.mark.parametrize("name", ["bset", "", 3])
def test_an_unknown_one_is_refused(name: object) -> None:
    with pytest.raises(UsageError, match=r"quality .* is unknown; use fast, balanced or best"):
        find_quality(name)

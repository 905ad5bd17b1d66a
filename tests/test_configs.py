"""Every recipe in ``configs/`` parses against the real types, and says what its name says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ptqcli.errors import UsageError
from ptqcli.recipe import Override, Recipe, load_recipe

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {file.stem for file in FILES} >= {"w4a16-gptq", "w4a16-awq", "w8a16-rtn", "w8a8-smoothquant", "w8a8-llm-int8"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recipe_parses(file: Path) -> None:
    recipe = load_recipe(file)
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(recipe, Recipe)
    for key in set(written) - {"overrides"}:
        assert getattr(recipe, key) == written[key]
    assert recipe.overrides == tuple(Override(**entry) for entry in written.get("overrides", ()))


@pytest.mark.parametrize("file", [file for file in FILES if not file.stem.startswith("mixed")], ids=lambda file: file.stem)
def test_recipe_is_what_its_name_says(file: Path) -> None:
    name = re.fullmatch(r"w(?P<bits>\d)a(?P<abits>\d+)(?P<static>-static)?-(?P<algo>[a-z0-9-]+?)(?P<asym>-asym)?", file.stem)
    recipe = load_recipe(file)
    assert name is not None
    assert set(name["algo"].split("-")) <= set(recipe.algo.replace("-", "+").split("+"))
    scheme = recipe.scheme
    assert scheme.bits == int(name["bits"])
    assert (scheme.activations.bits if scheme.activations else 16) == int(name["abits"])
    assert bool(name["static"]) == bool(scheme.activations and not scheme.activations.dynamic)
    assert recipe.symmetric is False or not name["asym"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_misspelt_key_is_refused(file: Path, tmp_path: Path) -> None:
    misspelt = tmp_path / file.name
    misspelt.write_text(file.read_text(encoding="utf-8").replace("algo:", "algorithm:"), encoding="utf-8")
    with pytest.raises(UsageError, match="unknown key 'algorithm'"):
        load_recipe(misspelt)

"""Every recipe in ``configs/`` parses against the real types, and says what its name says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ptqcli.algorithms import Declaration, declarations
from ptqcli.errors import UsageError
from ptqcli.recipe import Override, Recipe
from ptqcli.recipe_loading import load_recipe
from ptqcli.shipped import find_recipe, first_comment, shipped_recipes

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {file.stem for file in FILES} >= {"w4a16-gptq", "w4a16-awq", "w8a16-rtn", "w8a8-smoothquant", "w8a8-llm-int8"}


def owned(recipe: Recipe) -> list[tuple[Declaration, str]]:
    names = [part.name for part in recipe.algorithm.parts]
    return [(declared, name) for declared in declarations() for name in declared.parts if name in names]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_recipe_parses(file: Path) -> None:
    recipe = load_recipe(file)
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(recipe, Recipe)
    made = {**recipe.stored(), **{entry.option.key: recipe.stored()["options"][part][entry.option.name] for entry, part in owned(recipe)}}
    for key in set(written) - {"overrides"}:
        assert made[key] == written[key]
    assert recipe.overrides == tuple(Override(**entry) for entry in written.get("overrides", ()))


@pytest.mark.parametrize("file", [file for file in FILES if not file.stem.startswith("mixed")], ids=lambda file: file.stem)
def test_recipe_is_what_its_name_says(file: Path) -> None:
    name = re.fullmatch(r"w(?P<bits>\d)a(?P<abits>\d+)(?P<static>-static)?-(?P<algo>[a-z0-9-]+?)(?P<asym>-asym)?", file.stem)
    recipe = load_recipe(file)
    assert name is not None
    assert set(name["algo"].split("-")) <= set(recipe.algo.replace("-", "+").split("+"))
    scheme = recipe.default_scheme
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


def test_recipes_are_taken_by_name() -> None:
    assert shipped_recipes() == {file.stem: file for file in FILES}
    for file in FILES:
        assert find_recipe(file.stem) == file
        assert len(first_comment(file)) > 20


def test_a_path_is_a_file_and_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("w4a16-gptq.yaml", "w4a16-gptq.yml", "./w4a16-gptq", "folder/w4a16-gptq"):
        assert find_recipe(text) == Path(text)
    Path("w4a16-gptq").write_text("algo: rtn")
    assert find_recipe("w4a16-gptq") == Path("w4a16-gptq")


@pytest.mark.parametrize("name, advice", [("w4a16-aqw", "did you mean 'w4a16-awq'?"), ("nothing", "`ptq recipes` lists them")])
def test_an_unknown_name_is_refused_with_close_ones(name: str, advice: str) -> None:
    with pytest.raises(UsageError, match=re.escape(advice)):
        find_recipe(name)

"""Options of parts: what is declared is offered, reaches its part, and is refused by name where its part is not asked for.

The cases are made from the declarations, so that an option of a new part is tested without a word here.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Optional

import pytest
import torch
import yaml
from commandline import Ptq, one_line
from tiny import make_model

from ptqcli import recipe as recipes
from ptqcli.algorithms import Declaration, all_parts, declarations, find_algorithm, parts
from ptqcli.cli.quantize import command as quantize_command
from ptqcli.errors import PTQError, UsageError
from ptqcli.options import Option, check_choices, fits, from_text, kinds, option, options_of
from ptqcli.recipe import Recipe
from ptqcli.recipe_loading import load_recipe

ALGORITHMS = [*parts(), "awq+gptq", "awq+obq", "smoothquant+obq", "awq+smoothquant"]
HAS = {algorithm: {part.name for part in find_algorithm(algorithm).parts} for algorithm in ALGORITHMS}
LACKING = [(declared, algorithm) for declared in declarations() for algorithm in ALGORITHMS if not HAS[algorithm] & set(declared.parts)]
OWNED = [(declared, name) for declared in declarations() for name in declared.parts]


def case_name(case: object) -> str:
    return case.option.flag if isinstance(case, Declaration) else str(case)


def usual(declared: Option) -> object:
    """The default, or a value where the default is none."""
    if declared.default is not None:
        return declared.default
    return declared.choices[0] if declared.choices else other(declared)


def other(declared: Option) -> object:
    """A value that is not the default."""
    if isinstance(declared.default, bool):
        return not declared.default
    if declared.choices:
        return next(choice for choice in declared.choices if choice != declared.default)
    return 0.25 if float in kinds(declared.hint) else 3


def as_flag(declared: Option, value: object) -> list[str]:
    return [f"--{declared.flag}" if value else f"--no-{declared.flag}"] if isinstance(value, bool) else [f"--{declared.flag}", str(value)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that command lines come to; nothing is done about them."""
    seen: list[Recipe] = []

    def load_only(*arguments: object) -> Recipe:
        seen.append(load_recipe(*arguments))  # type: ignore[arg-type]
        raise UsageError("seen")

    monkeypatch.setattr(recipes, "load_recipe", load_only)
    return seen


def test_there_are_forty_wrong_combinations() -> None:
    assert len(LACKING) >= 40
    assert {declared.option.key for declared, _ in OWNED} >= {
        "damp",
        "act_order",
        "static_groups",
        "scale_search",
        "awq_clip",
        "smooth_alpha",
        "smooth_level",
    }


@pytest.mark.parametrize("declared, algorithm", LACKING, ids=case_name)
def test_an_option_whose_part_is_not_asked_for_is_refused_by_name(ptq: Ptq, tmp_path: Path, declared: Declaration, algorithm: str) -> None:
    """By flag, by its key in a recipe, and in a section, also where it is what it would be anyway."""
    value, file = usual(declared.option), tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"algo": algorithm, declared.option.key: value}))
    answers = [
        ptq("quantize", "--algo", algorithm, *as_flag(declared.option, value)),
        ptq("quantize", "--recipe", file),
    ]
    for answer in answers:
        assert answer.code == 2
        owners = " and ".join(filter(None, [", ".join(declared.parts[:-1]), declared.parts[-1]]))
        assert f"{declared.option.words} belongs to {owners}, not to {algorithm}; leave it out" in one_line(answer)
    assert str(file) in one_line(answers[1])
    for part in declared.parts:
        file.write_text(yaml.safe_dump({"algo": algorithm, part: {declared.option.name: value}}))
        answer = ptq("quantize", "--recipe", file)
        assert answer.code == 2
        assert f"{file}: {part}.{declared.option.name} belongs to {part}, not to {algorithm}; leave it out" in one_line(answer)


# What an option has no effect without.
BESIDE = {"alpha": {"target": "original"}, "beta": {"target": "original"}}


@pytest.mark.parametrize("declared, part", OWNED, ids=case_name)
def test_an_option_reaches_its_part(ptq: Ptq, asked: list[Recipe], tmp_path: Path, declared: Declaration, part: str) -> None:
    value, file = other(declared.option), tmp_path / "recipe.yaml"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    beside = BESIDE.get(declared.option.name, {})
    flags = [word for key, wanted in beside.items() for word in (f"--{key}", wanted)]
    ptq("quantize", "--algo", part, *flags, *as_flag(declared.option, value))
    ptq("quantize", "--algo", part, *flags, "--set", f"{part}.{declared.option.name}={text}")
    for entry in ({declared.option.key: value}, {part: {declared.option.name: value}}):
        file.write_text(yaml.safe_dump({"algo": part, **beside, **entry}))
        ptq("quantize", "--recipe", file)
    assert len(asked) == 4
    for recipe in asked:
        made = {name: getattr(built, declared.option.name) for name, built in recipe._built.items() if name == part}
        assert made == {part: value}
        assert recipe.stored()["options"][part][declared.option.name] == value
    assert Recipe(algo=part).stored()["options"][part][declared.option.name] == declared.option.default


def test_one_default_however_a_part_is_made() -> None:
    for name, part in parts().items():
        assert Recipe(algo=name)._built[name] == part.load()()


def test_a_flag_wins_over_a_section_and_leaves_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("algo: gptq\ngptq: {damp: 0.5, act_order: false}\n")
    assert load_recipe(file, {"damp": 0.1}).options == {"gptq": {"damp": 0.1, "act_order": False}}


@pytest.mark.parametrize(
    "text, message",
    [
        ("gtpq: {damp: 0.1}", "unknown key 'gtpq'; the keys are abits"),
        ("gptq: {dmp: 0.1}", "gptq has no option 'dmp'; its options are damp, act_order, static_groups, scale_search, signed"),
        ("algo: llm-int8\nllm-int8: {damp: 0.1}", "llm-int8 has no option 'damp'; it has none"),
        ("gptq: {damp: high}", "'gptq.damp' must be float, not 'high'"),
        ("gptq: {damp: 0.1}\noptions: {gptq: {damp: 0.2}}", "gptq.damp is given twice"),
        ("damp: true", "'gptq.damp' must be float, not True"),
        ("act_order: 1", "'gptq.act_order' must be bool, not 1"),
        ("algo: smoothquant\nsmooth_alpha: [1]", "'smoothquant.alpha' must be float or str, not [1]"),
        ("gptq: 0.1", "'gptq' must be a section of options"),
        ("gptq: {damp: 0.1}\ndamp: 0.1", "gptq.damp is given twice"),
        ("damp: -1", "damp -1 is out of range"),
        ("scale_search: best", "scale search 'best' is unknown; use auto, minmax or mse"),
        ("options: {gtpq: {damp: 0.1}}", "there is no part 'gtpq'; the parts are awq, smoothquant"),
    ],
)
def test_a_recipe_with_a_wrong_option_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--set gptq.damp", "'gptq.damp' is not understood; write PART.OPTION=VALUE"),
        ("--set damp=0.1", "'damp=0.1' is not understood"),
        ("--set gptq.damp=0.1 --set gptq.damp=0.2", "gptq.damp is given twice"),
        ("--set gptq.damp=0.1 --damp 0.1", "gptq.damp is given twice"),
        ("--set gptq.damp=high", "damp must be float, not 'high'"),
        ("--set gptq.act_order=maybe", "act order must be bool, not 'maybe'"),
        ("--set gptq.dmp=1", "gptq has no option 'dmp'"),
        ("--set gtpq.damp=1", "there is no part 'gtpq'"),
        ("--set obq.damp=0.1", "obq.damp belongs to obq, not to gptq"),
        ("--damp high", "damp must be float, not 'high'"),
    ],
)
def test_a_wrong_setting_is_refused(ptq: Ptq, flags: str, says: str) -> None:
    answer = ptq("quantize", *flags.split())
    assert answer.code == 2
    assert says in one_line(answer)


# Schemes as one word


def test_a_scheme_is_one_word(tmp_path: Path) -> None:
    from ptqcli.numerics.scheme import Scheme

    file = tmp_path / "recipe.yaml"
    file.write_text("algo: rtn\nscheme: w3a16-g64-asym\n")
    assert (
        load_recipe(file).default_scheme == Scheme.parse("w3a16-g64-asym") == Recipe(wbits=3, group_size=64, symmetric=False).default_scheme
    )
    assert load_recipe(file, {"scheme": "w8a16"}).default_scheme == Scheme.parse("w8a16")
    file.write_text("algo: rtn\nwbits: 8\ngroup_size: 32\n")
    assert load_recipe(file, {"scheme": "w4a16"}).default_scheme == Scheme.parse("w4a16")


@pytest.mark.parametrize("field, value", [("wbits", 4), ("group_size", 128), ("symmetric", True), ("abits", 16), ("act_scales", "token")])
def test_a_scheme_and_what_it_says_exclude_each_other(tmp_path: Path, field: str, value: object) -> None:
    file = tmp_path / "recipe.yaml"
    for text, flags in [(f"scheme: w4a16\n{field}: {json.dumps(value)}", {}), ("scheme: w4a16", {field: value})]:
        file.write_text(text)
        with pytest.raises(UsageError, match=f"scheme w4a16 says what the numbers are, so leave {field} out"):
            load_recipe(file, flags)


def test_a_scheme_that_contradicts_a_part_is_refused() -> None:
    with pytest.raises(UsageError, match="smooth level O1 sets the group size and act_scales, and so does scheme w8a8"):
        Recipe(algo="smoothquant", options={"smoothquant": {"level": "O1"}}, scheme="w8a8")
    with pytest.raises(UsageError, match="llm-int8 splits off outliers, and scheme w8a8 has none"):
        Recipe(algo="llm-int8", scheme="w8a8")


# Declarations


@dataclass(frozen=True)
class Sample:
    name: ClassVar[str] = "sample"
    plain: int = 3
    on_top: bool = option(False, "a truth")
    count: int = option(1, "a number", flag="how-many")
    kind: Optional[str] = option(None, "a word", choices=("a", "b"))  # noqa: UP045  the older way to write it
    share: float | str = option(0.5, "either", metavar="X|auto")


def test_declarations_are_the_fields_made_with_option() -> None:
    found = {entry.name: entry for entry in options_of(Sample)}
    assert list(found) == ["on_top", "count", "kind", "share"]
    assert [entry.flag for entry in found.values()] == ["on-top", "how-many", "kind", "share"]
    assert [entry.key for entry in found.values()] == ["on_top", "how_many", "kind", "share"]
    assert [entry.metavar for entry in found.values()] == ["true|false", "N", "a|b", "X|auto"]
    assert Sample() == Sample(3, False, 1, None, 0.5)
    values = [from_text(found[name], text) for name, text in [("on_top", "True"), ("count", "7"), ("share", "0.1"), ("share", "auto")]]
    assert values == [True, 7, 0.1, "auto"]
    assert [fits(value, found["kind"].hint) for value in (None, "a", 1)] == [True, True, False]
    check_choices(Sample())
    with pytest.raises(UsageError, match="kind 'c' is unknown; use a or b"):
        check_choices(Sample(kind="c"))


# Parts of other packages

SOLVER = """
from dataclasses import dataclass
from typing import ClassVar

from ptqcli.options import option
from ptqcli.solvers.rtn import RTN


@dataclass(frozen=True)
class Stretched(RTN):
    name: ClassVar[str] = "stretched"
    summary: ClassVar[str] = "rounds the weights times a factor"
    factor: float = option(1.0, "what the weights are multiplied by")
    damp: int = option(3, "something else than ours")
    output: str = option("x", "a name that ptq quantize has taken")

    def solve(self, weight, *others, **named):
        return super().solve(weight * self.factor, *others, **named)


@dataclass(frozen=True)
class Nameless:
    pass
"""
ENTRIES = """[ptqcli.solvers]
stretched = stretching:Stretched
gptq = stretching:Stretched
nameless = stretching:Nameless
absent = stretching_that_is_absent:Nothing
"""


def forget() -> None:
    all_parts.cache_clear()
    quantize_command.__dict__.pop("_part_flags", None)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Another package is installed, with one solver that works and three entries that do not."""
    site = tmp_path / "site"
    (site / "stretching-1.0.dist-info").mkdir(parents=True)
    (site / "stretching.py").write_text(SOLVER)
    (site / "stretching-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: stretching\nVersion: 1.0\n")
    (site / "stretching-1.0.dist-info" / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(site)
    forget()
    yield forget
    sys.modules.pop("stretching", None)
    importlib.invalidate_caches()
    monkeypatch.undo()
    forget()


@pytest.mark.usefixtures("package")
def test_a_solver_of_another_package_is_listed_and_quantizes(ptq: Ptq, tmp_path: Path) -> None:
    listed = {(part["name"], part["from"]): part for part in json.loads(ptq("algorithms", "--json").out)["parts"]}
    assert listed["stretched", "stretching"]["summary"] == "rounds the weights times a factor"
    flags = {entry["name"]: entry["flag"] for entry in listed["stretched", "stretching"]["options"]}
    of_rounding = {"scale_search": "--scale-search", "signed": "--signed/--no-signed", "polish": "--polish"}
    of_rounding |= {"target": "--target", "alpha": "--alpha", "beta": "--beta"}
    assert flags == {**of_rounding, "factor": "--factor", "damp": None, "output": None}
    assert "options of stretched: --factor X What the weights are multiplied by" in " ".join(ptq("quantize", "--help").out.split())

    make_model(tmp_path / "model", "llama", torch.bfloat16)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("algo: stretched\nwbits: 8\ngroup_size: 32\nstretched: {factor: 2.0}\n")
    doubled = ptq("quantize", tmp_path / "model", "--recipe", recipe, "--output", tmp_path / "doubled", "--json")
    tripled = ptq("quantize", tmp_path / "model", "--recipe", recipe, "--factor", "3", "--output", tmp_path / "tripled", "--json")
    for answer, error in ((doubled, 1.0), (tripled, 2.0)):  # of 2 w and 3 w relative to w
        assert answer.code == 0
        assert [layer["relative_error"] for layer in json.loads(answer.out)["layers"]] == pytest.approx([error] * 14, rel=0.02)


@pytest.mark.usefixtures("package")
def test_a_flag_that_is_taken_is_left_to_set(ptq: Ptq, asked: list[Recipe]) -> None:
    refused = ptq("quantize", "--algo", "stretched", "--damp", "5")
    assert refused.code == 2
    owners = "gptq, obq, autoround and flexround"
    assert f"damp belongs to {owners}, not to stretched; stretched has another of that name, stretched.damp" in one_line(refused)
    ptq("quantize", "--algo", "stretched", "--set", "stretched.damp=5", "--set", "stretched.output=y")
    assert [recipe.options for recipe in asked] == [{"stretched": {"damp": 5, "output": "y"}}]


@pytest.mark.usefixtures("package")
def test_what_is_broken_in_another_package_hurts_only_when_it_is_used(ptq: Ptq) -> None:
    listed = {(part["name"], part["from"]): part["error"] for part in json.loads(ptq("algorithms", "--json").out)["parts"]}
    assert listed["gptq", "ptqcli"] is None
    assert "gptq of the package stretching is refused: ptqcli has a part of that name" in listed["gptq", "stretching"]
    assert "absent of the package stretching cannot be used: ModuleNotFoundError" in listed["absent", "stretching"]
    assert "its class must say name = 'nameless' and a summary" in listed["nameless", "stretching"]
    assert "cannot be used" in ptq("algorithms").out
    assert type(Recipe(algo="gptq").solver()).__module__ == "ptqcli.solvers.gptq"
    for name in ("absent", "nameless"):
        with pytest.raises(PTQError, match=f"{name} of the package stretching"):
            Recipe(algo=name)
        assert ptq("quantize", "--algo", name).code == 1


def test_a_request_imports_no_torch_until_it_is_made() -> None:
    code = "import sys; import ptqcli.recipe, ptqcli.shipped; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"

"""Kind: option rules by hand, and words that are not true. What belongs to a part is refused with the part that has it, from declarations.

Also: what an override finds that is no linear of the blocks, and suggestions for words that are nearly known.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from commandline import Ptq, one_line
from tiny import make_model

from ptqcli.algorithms import declarations, find_algorithm
from ptqcli.errors import UsageError
from ptqcli.formats import format_names
from ptqcli.options import Option, kinds
from ptqcli.recipe_loading import load_recipe


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    make_model(folder / "model", num_hidden_layers=1)
    return folder


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--algo rtn --damp .5", "damp belongs to gptq, obq, autoround and flexround, not to rtn; leave it out"),
        ("--algo obq --no-act-order", "act order belongs to gptq, not to obq; leave it out"),
        ("--algo obq --no-static-groups", "static groups belongs to gptq, not to obq; leave it out"),
        ("--algo rtn --set gptq.damp=.5", "gptq.damp belongs to gptq, not to rtn; leave it out"),
        ("--algo awq --act-order", "act order belongs to gptq, not to awq; leave it out"),
        ("--algo gptq --smooth-alpha 0.3", "smooth alpha belongs to smoothquant, not to gptq; leave it out"),
        ("--algo gptq --no-act-order --no-static-groups", "static groups have no effect without act order"),
    ],
)
def test_an_option_of_another_part_is_refused_for_that_reason(ptq: Ptq, at_work: Path, flags: str, message: str) -> None:
    answer = ptq("quantize", "model", "--dry-run", *flags.split())
    assert answer.code == 2
    assert message in one_line(answer)


def a_value(declared: Option) -> object:
    """One that it takes, whatever else is asked for, and, if there is such a one, not its default."""
    if declared.choices:
        return declared.choices[-1]
    if declared.hint is bool:
        return not declared.default
    found = kinds(declared.hint)
    return "auto" if str in found else 0.25 if float in found else 5


def test_no_option_of_any_part_is_ignored() -> None:
    """Every shared option with every part alone: accepted exactly where the part, or the solver that it implies, declares it."""
    for declared, algo in itertools.product(declarations(), ("rtn", "gptq", "obq", "awq", "smoothquant", "llm-int8")):
        if not declared.shared:
            continue
        owners = {part.name for part in find_algorithm(algo).parts} & set(declared.parts)
        value = a_value(declared.option)
        flags = {"algo": algo, declared.option.key: value}
        if owners:
            stored = load_recipe(flags=flags).stored()["options"]
            assert all(stored[name][declared.option.name] == value for name in owners), flags
        else:
            with pytest.raises(UsageError, match=f"{declared.option.words} belongs to .*, not to {algo}; leave it out"):
                load_recipe(flags=flags)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--override lm_head:bits=8", "'lm_head' matches lm_head, a linear outside the blocks, which --lm-head W8 and the like quantize"),
        ("--override head:bits=8,group=32", "matches lm_head, a linear outside the blocks"),
        ("--override embed_tokens:bits=8", "matches model.embed_tokens of class Embedding; only linears in the blocks are quantized"),
        ("--override input_layernorm:asym", "matches model.layers.0.input_layernorm of class LlamaRMSNorm; only linears in the blocks"),
        ("--override nothing:bits=8", "matches no linear; the linears are named like model.layers.0.self_attn.q_proj"),
        ("--ignore nothing", "matches no linear; the linears are named like model.layers.0.self_attn.q_proj"),
    ],
)
def test_a_pattern_that_finds_no_linear_of_the_blocks_is_told_what_it_finds(ptq: Ptq, at_work: Path, flag: str, message: str) -> None:
    answer = ptq("quantize", "model", "--algo", "rtn", "--dry-run", *flag.split())
    assert answer.code == 2
    assert message in one_line(answer)


@pytest.mark.parametrize("flag", ["--override lm_head:skip", "--ignore lm_head", "--ignore embed_tokens", "--ignore norm"])
def test_what_stays_as_it_is_may_be_left_alone(ptq: Ptq, at_work: Path, flag: str) -> None:
    answer = ptq("quantize", "model", "--algo", "rtn", "--dry-run", "--json", *flag.split())
    assert answer.code == 0, answer.err
    assert len(json.loads(answer.out)["linears"]) == 7


@pytest.mark.parametrize(
    "flags, meant",
    [
        ("--algo gtpq", "gptq"),
        ("--algo awq+gpqt", "gptq"),
        ("--set gtpq.damp=1", "gptq"),
        ("--set gptq.act_ordr=true", "act_order"),
        ("--scale-search minmx", "minmax"),
        ("--format compresed-tensors", "compressed-tensors"),
        ("--calib wikitxt2 --seqlen 16", "wikitext2"),
    ],
)
def test_a_word_that_is_nearly_known_is_answered_with_it(ptq: Ptq, at_work: Path, flags: str, meant: str) -> None:
    answer = ptq("quantize", "model", "--dry-run", *flags.split())
    assert answer.code == 2
    assert one_line(answer).endswith(f"; did you mean '{meant}'?")


def test_a_key_of_a_recipe_that_is_nearly_known(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("nsample: 3\n")
    with pytest.raises(UsageError, match=re.escape("; did you mean 'nsamples'?")):
        load_recipe(tmp_path / "recipe.yaml")


def test_the_formats_are_listed_with_the_algorithms(ptq: Ptq) -> None:
    assert [each["name"] for each in json.loads(ptq("algorithms", "--json").out)["formats"]] == format_names()
    assert all(name in ptq("algorithms").out for name in format_names())

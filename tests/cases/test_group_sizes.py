"""Kind: advice from a part of the facts, and a default that refuses common models. Group sizes on widths that 128 does not divide.

Models get odd widths by their configuration. Without a group size each linear has the largest of 128, 64, 32 and 16 that divides its own
width; a number that does not divide is refused with a command that works for all linears; what has no groups stays in 16 bit, told.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from commandline import Ptq, one_line
from tiny import make_model, write_text
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP

import ptqcli
from ptqcli.errors import UsageError
from ptqcli.numerics.scheme import Scheme
from ptqcli.pipeline.prepare import plan_run
from ptqcli.recipe import Override, Recipe
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources
from ptqcli.shipped import shipped_recipes

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}


def model(folder: Path, width: int, inner: int) -> Path:
    make_model(folder, hidden_size=width, intermediate_size=inner, **HEADS)
    return folder


@pytest.fixture(scope="module")
def w576(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """576 = 64 x 9 and 384 = 128 x 3."""
    return model(tmp_path_factory.mktemp("models") / "w576", 576, 384)


def planned(folder: Path, **request: object) -> dict[str, str]:
    plan = plan_run(folder, Recipe(algo="rtn", **request), Resources())[1]  # type: ignore[arg-type]
    return {linear.name.removeprefix("model.layers.0."): str(linear.scheme) for linear in plan.linears}


def largest_divisor(width: int) -> int:
    return max(size for size in (128, 64, 32, 16) if width % size == 0)


@pytest.mark.parametrize("width, inner", [(128, 256), (96, 160), (576, 384), (48, 1504)])
def test_each_linear_has_the_largest_group_that_divides_it(width: int, inner: int, tmp_path: Path) -> None:
    found = planned(model(tmp_path / "m", width, inner))
    assert len(found) == 7
    for name, scheme in found.items():
        assert scheme == f"w4a16-g{largest_divisor(inner if 'down' in name else width)}"


def test_the_plan_and_the_report_tell_it_and_the_folder_is_named_for_all(
    ptq: Ptq, w576: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = ptq("quantize", w576, "--algo", "rtn")
    assert done.code == 0
    assert re.search(r"^linears +w4a16-g64 x 6, w4a16-g128 x 1$", done.out, flags=re.MULTILINE)
    assert "groups of 64 columns in the linears of 576 input features, which 128 does not divide" in done.out
    written = tmp_path / "w576-rtn-w4a16"
    schemes = ptqcli.open_checkpoint(written).schemes
    assert sorted({str(scheme) for scheme in schemes.values()}) == ["w4a16-g128", "w4a16-g64"]


def test_nothing_is_told_where_128_divides_and_one_size_is_the_name(ptq: Ptq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = ptq("quantize", model(tmp_path / "even", 128, 256), "--algo", "rtn", "--dry-run")
    assert "input features" not in answer.out
    assert re.search(r"^output +even-rtn-w4a16-g128$", answer.out, flags=re.MULTILINE)


def advised(message: str) -> list[str]:
    """The flags that an error names, as ``use --x or --y`` or ``use --x``."""
    return re.findall(r"--(?:group-size|scheme) [^ ;,]+", message.rpartition("; use ")[2])


@pytest.mark.parametrize("widths", [(576, 384), (160, 1504), (48, 80), (80, 100)])
@pytest.mark.parametrize("asked", ["--group-size 128", "--scheme w4a16-g128-asym", "--group-size 48"])
def test_a_size_that_does_not_divide_is_refused_with_commands_that_all_work(
    ptq: Ptq, tmp_path: Path, widths: tuple[int, int], asked: str
) -> None:
    folder = model(tmp_path / "m", *widths)
    command = ("quantize", folder, "--algo", "rtn", "--dry-run")
    refused = ptq(*command, *asked.split())
    wrong = [width for width in widths if width % int(re.findall(r"\d+", asked)[-1])]
    assert refused.code == (2 if wrong else 0)
    for width in wrong:
        assert f"does not divide the {width} input features of model.layers.0." in one_line(refused)
    for flags in advised(refused.err):
        assert ptq(*command, *shlex.split(flags)).code == 0, flags
    assert len(advised(refused.err)) >= 1 or not wrong


def test_an_override_that_does_not_divide_is_named(w576: Path) -> None:
    overrides = (Override("mlp", bits=8, group_size=96), Override("down_proj", group_size=80))
    with pytest.raises(UsageError, match=r"group size 80 does not divide the 384 .*group=auto in the override 'down_proj'$"):
        planned(w576, overrides=overrides)
    overrides = (Override("mlp", bits=8, group_size=96), Override("down_proj", group_size="auto"))
    found = planned(w576, overrides=overrides)
    assert (found["mlp.up_proj"], found["mlp.down_proj"]) == ("w8a16-g96", "w8a16-g128")


class Branched(LlamaMLP):
    """An MLP with a low-rank branch beside it; the second matrix of the branch has ``RANK`` columns."""

    RANK = 4

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.narrow, self.wide = nn.Linear(64, self.RANK, bias=False), nn.Linear(self.RANK, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.wide(self.narrow(x))


ROWS = [{"group_size": -1}, {"wbits": 8, "abits": 8}]


@pytest.mark.parametrize(
    "rank, request_, reason",
    [
        *((4, request, "has 4 input features only") for request in [{"group_size": 32}, *ROWS]),
        (4, {}, "no group of 128, 64, 32 or 16 columns divides 4 input features"),
        (4, {"group_size": 4}, None),
        (20, {}, "no group of 128, 64, 32 or 16 columns divides 20 input features"),
        *((20, request, None) for request in ROWS),
    ],
)
def test_linears_without_groups_stay_as_they_are_and_are_told(
    rank: int, request_: dict[str, int], reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_llama, "LlamaMLP", Branched)
    monkeypatch.setattr(Branched, "RANK", rank)
    make_model(tmp_path, num_hidden_layers=1)
    plan = plan_run(tmp_path, Recipe(algo="rtn", **request_), Resources())[1]  # type: ignore[arg-type]
    name = "model.layers.0.mlp.wide"
    assert dict(plan.skipped).get(name) == reason
    assert (name in {linear.name for linear in plan.linears}) == (reason is None)
    assert reason is None or f"{name} ({reason})" in dict(plan.summary_rows())["left as they are"]
    assert "model.layers.0.mlp.narrow" in {linear.name for linear in plan.linears}


def test_every_shipped_recipe_is_planned_on_a_width_of_576(w576: Path) -> None:
    for name, file in shipped_recipes().items():
        plan = plan_run(w576, load_recipe(file), Resources())[1]
        assert len(plan.linears) == (3 if name.startswith("mixed") else 7), name


def test_sizes_that_differ_are_solved_packed_and_read_back(w576: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    report = ptqcli.quantize(w576, output=tmp_path / "out", calib=str(text), nsamples=2, seqlen=16)
    assert report.recipe["group_size"] is None
    read = {name: str(scheme) for name, scheme in ptqcli.open_checkpoint(tmp_path / "out").schemes.items()}
    assert read == {layer.name: layer.scheme for layer in report.layers}
    assert set(read.values()) == {"w4a16-g64", "w4a16-g128"}


def test_a_matrix_alone_is_resolved_too() -> None:
    weight = torch.randn(8, 96)
    assert ptqcli.solve(weight, solver="rtn").scheme == Scheme(4, 32)
    with pytest.raises(UsageError, match="no group of 128, 64, 32 or 16 columns divides 20 input features"):
        ptqcli.solve(weight[:, :20], solver="rtn")
    with pytest.raises(UsageError, match="the group size of scheme w4a16 depends on the linear"):
        Scheme.parse("w4a16").group_count(128)


@pytest.mark.parametrize("flag", ["-2", "1.5", "no", "--", "9" * 30])
def test_what_is_no_group_size_is_refused(ptq: Ptq, w576: Path, flag: str) -> None:
    answer = ptq("quantize", w576, "--group-size", flag, "--dry-run")
    assert answer.code == 2
    assert "group size" in one_line(answer)

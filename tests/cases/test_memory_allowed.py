"""Kind: a run that dies of memory hours later. What may be taken is found beforehand; activations give way, what cannot fit is refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import Ptq, one_line
from tiny import make_model, write_text

from ptqcli import plan_memory, resources
from ptqcli.errors import PTQError, UsageError
from ptqcli.pipeline.prepare import plan_run
from ptqcli.plan_memory import allowed_bytes, check_memory, with_budget
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import NO_LIMIT, Resources, free_bytes, left_in_control_group

MIB = 1 << 20


@pytest.fixture
def at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_model(tmp_path / "model", num_hidden_layers=2)
    write_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORT = ("--calib", "text.txt", "--nsamples", "8", "--seqlen", "64", "--group-size", "32")


def group(folder: Path, limit: str, usage: int, stat: str, names: tuple[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(stat)


def test_the_limits_of_control_groups_count_those_above_included(tmp_path: Path) -> None:
    second, member = ("memory.max", "memory.current"), tmp_path / "cgroup"
    group(tmp_path / "v2" / "a" / "b", "max", 900, "active_file 0\n", second)
    group(tmp_path / "v2" / "a", "5000", 3000, "anon 2000\nactive_file 700\ninactive_file 100\n", second)
    member.write_text("0::/a/b\n")
    assert left_in_control_group(tmp_path / "v2", member) == 5000 - 3000 + 800
    first = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group(tmp_path / "v1" / "memory" / "job", "7000", 2500, "total_active_file 400\ntotal_inactive_file 0\nactive_file 1\n", first)
    member.write_text("3:cpu,cpuacct:/\n2:memory:/job\n0::/\n")
    assert left_in_control_group(tmp_path / "v1", member) == 7000 - 2500 + 400


@pytest.mark.parametrize("text", ["", "nonsense\n", "0::/absent\n", "0::/strange\n"])
def test_a_system_without_limits_or_with_strange_ones_has_none(tmp_path: Path, text: str) -> None:
    group(tmp_path / "strange", "many", 1, "", ("memory.max", "memory.current"))
    (tmp_path / "cgroup").write_text(text)
    assert left_in_control_group(tmp_path, tmp_path / "cgroup") == NO_LIMIT
    assert left_in_control_group(tmp_path, tmp_path / "absent") == NO_LIMIT


def test_what_is_free_is_the_least_of_machine_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "left_in_control_group", lambda: 12345)
    assert free_bytes("cpu") == 12345
    assert allowed_bytes(Resources()) < resources.process_bytes() + 12345 + 50 * MIB
    assert allowed_bytes(Resources(memory=7)) == 7


@pytest.mark.parametrize(
    "text, size", [("8GiB", 8 << 30), ("8G", 8 * 10**9), ("1.5 gib", 3 << 29), ("500MB", 5 * 10**8), ("300", 300), ("2ki", 2048)]
)
def test_sizes_are_read_with_their_units(ptq: Ptq, at_work: Path, text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int | None] = []
    monkeypatch.setattr(plan_memory, "allowed_bytes", lambda given: seen.append(given.memory) or 1 << 40)
    assert ptq("quantize", "model", "--algo", "rtn", "--group-size", "32", "--dry-run", "--memory", text).code == 0
    assert set(seen) == {size}


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "1PiB", "1e9", "nan", "9" * 30])
def test_what_is_no_size_is_refused(ptq: Ptq, at_work: Path, text: str) -> None:
    answer = ptq("quantize", "model", "--dry-run", "--memory", text)
    assert answer.code == 2
    assert "is not a size; give one such as 8GiB" in one_line(answer)


@pytest.mark.parametrize("dry", [("--dry-run",), ()])
def test_what_cannot_fit_is_refused_before_anything_is_written(ptq: Ptq, at_work: Path, dry: tuple[str, ...]) -> None:
    answer = ptq("quantize", "model", *SHORT, "--memory", "10MiB", "--output", "out", *dry)
    assert answer.code == 1
    assert re.search(
        r"takes about \d\.\d\d GiB of memory, and --memory allows 0\.01 GiB; even with --algo rtn it takes \d\.\d\d GiB", one_line(answer)
    )
    assert not list(at_work.glob("out*"))


def refusal(needs: Callable[[str, Resources, int], int], allowed: int, **given: int) -> str:
    recipe = load_recipe(flags={"algo": "gptq"})
    asked = Resources(memory=allowed, **given)
    with pytest.raises(PTQError) as refused:
        check_memory(allowed + 1, recipe, asked, 2048, lambda recipe, tried, seqlen: needs(recipe.algo, tried, seqlen))
    return str(refused.value)


def test_the_refusal_names_the_first_smaller_request_that_fits() -> None:
    def needs(algo: str, tried: Resources, seqlen: int) -> int:
        return (tried.budget + seqlen * (tried.batch_size or 2) * MIB) * (algo == "gptq") + MIB

    assert "with --activation-budget 0 it takes" in refusal(needs, 4097 * MIB, activation_budget=MIB)
    assert "with --activation-budget 0 --batch-size 1 it takes" in refusal(needs, 2049 * MIB, activation_budget=MIB)
    assert "with --batch-size 1 --seqlen 512 it takes 0.50 GiB" in refusal(needs, 513 * MIB, activation_budget=0)
    assert "with --algo rtn it takes 0.00 GiB" in refusal(needs, 2 * MIB, activation_budget=0)
    assert "even with --algo rtn it takes 0.00 GiB" in refusal(needs, 0, activation_budget=0)


def test_activations_are_held_as_far_as_memory_allows(at_work: Path) -> None:
    def need(tried: Resources) -> int:
        return 100 * MIB + min(tried.budget, 900 * MIB)

    assert need(with_budget(Resources(memory=1000 * MIB), need)) == 1000 * MIB
    assert with_budget(Resources(memory=700 * MIB), need).budget == 512 * MIB
    assert with_budget(Resources(memory=110 * MIB), need).budget == 0
    assert with_budget(Resources(memory=1, activation_budget=5), need).budget == 5


def test_a_run_within_little_memory_writes_the_same_bytes(ptq: Ptq, at_work: Path) -> None:
    flags = {"algo": "gptq", "calib": "text.txt", "nsamples": 8, "seqlen": 64, "group_size": 32}
    needed = plan_run(Path("model"), load_recipe(flags=flags), Resources())[1].memory_bytes
    digests = {}
    for name, more in (("much", ()), ("little", ("--memory", f"{needed // MIB + 200}MiB", "--activation-budget", "0"))):
        answer = ptq("quantize", "model", *SHORT, "--output", name, "--json", *more)
        assert answer.code == 0, answer.err
        digests[name] = hashlib.sha256((at_work / name / "model.safetensors").read_bytes()).hexdigest()
    assert digests["much"] == digests["little"]


def test_resources_refuse_a_memory_that_is_none() -> None:
    for size in (-1, "8GiB", float("nan")):
        with pytest.raises(UsageError, match=r"memory .* is not valid; give a number of bytes"):
            Resources(memory=size)  # type: ignore[arg-type]


# Only config.json


def test_a_model_of_which_only_the_configuration_is_there_is_planned(ptq: Ptq, at_work: Path) -> None:
    (at_work / "bare").mkdir()
    (at_work / "bare" / "config.json").write_bytes((at_work / "model" / "config.json").read_bytes())
    told = [json.loads(ptq("quantize", name, *SHORT, "--dry-run", "--json").out) for name in ("model", "bare")]
    for key in ("linears", "bytes_before", "bytes_after", "outside", "skipped"):
        assert told[0][key] == told[1][key], key
    assert abs(told[1]["memory_bytes"] - told[0]["memory_bytes"]) < 100 * MIB  # what Python holds at the time is in it
    assert told[0]["seconds"] > 0
    assert told[1]["seconds"] is None
    assert any("from config.json alone" in note for note in told[1]["notes"])
    answer = ptq("quantize", "bare", *SHORT)
    assert answer.code == 1
    assert "bare holds neither model.safetensors nor model.safetensors.index.json" in one_line(answer)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 10**9}, "more than any model has"),
        ({"dtype": None, "torch_dtype": None}, "to plan without weights, give the one that they have"),
    ],
)
def test_a_hostile_configuration_alone_is_refused(ptq: Ptq, at_work: Path, changes: dict[str, object], message: str) -> None:
    values = json.loads((at_work / "model" / "config.json").read_text())
    (at_work / "bare").mkdir()
    (at_work / "bare" / "config.json").write_text(json.dumps({**values, **changes}))
    answer = ptq("quantize", "bare", *SHORT, "--dry-run")
    assert answer.code == 1
    assert message in one_line(answer)


def test_the_time_of_a_dry_run_is_measured_and_nothing_is_written(ptq: Ptq, at_work: Path) -> None:
    before = sorted(at_work.rglob("*"))
    answer = ptq("quantize", "model", *SHORT, "--dry-run")
    assert answer.code == 0, answer.err
    assert re.search(r"time needed +about .* as the first block tells", answer.out)
    assert sorted(at_work.rglob("*")) == before

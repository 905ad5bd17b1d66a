"""``scripts/gpu_check.py``: the rehearsal, the verdicts, and what becomes of cases that crash or hang."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_check
import pytest
import torch
from gpu_cases import BASELINE, OURS, SCHEMES, SHAPES, TIMED_TOKENS, Setting, point_name
from gpu_check import Pool, judged, targets

SCRIPT = Path(gpu_check.__file__)
NEEDED_NOWHERE_ELSE = {"transformers", "click", "rich", "psutil", "safetensors", "yaml", "accelerate", "datasets", "pyarrow"}


def run(*options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300, check=False)


@pytest.mark.slow
def test_the_rehearsal_goes_through_all_parts_and_says_that_it_proves_nothing(tmp_path: Path) -> None:
    done = run("--rehearse", "--output", "found.json", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("It proves nothing about any GPU") == 1
    assert "PASS" not in done.stdout.replace("passed", "")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rehearsal"] is True
    for part in found["parts"]:
        assert part["cases"], part["name"]
        assert part["left_out"] == 0, part["name"]
        assert [line for line in part["cases"] if not line["ok"]] == []
    lines = {line["name"]: line for part in found["parts"] for line in part["cases"]}
    assert all(line["error"] < 4e-3 < line["flipped"] for line in lines.values() if "flipped" in line)
    assert {OURS, BASELINE, "torch int4"} <= set(lines["W4A16 up 1"]["microseconds"])
    assert {OURS, BASELINE, "torch int_mm"} <= set(lines["W8A8 up 1"]["microseconds"])
    assert {target["verdict"] for target in found["targets"]} == {"NOT MEASURED"}


def test_the_rehearsal_of_tuning_prints_tables(tmp_path: Path) -> None:
    done = run("--rehearse", "--tune", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"w4a16", "w8a8", "llm_int8"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_and_code_2(tmp_path: Path) -> None:
    done = run(folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_it_needs_torch_and_triton_only() -> None:
    program = "import sys, gpu_check, ptq_kernels; print(sorted(name.partition('.')[0] for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=SCRIPT.parent, timeout=100, check=True)
    assert NEEDED_NOWHERE_ELSE.isdisjoint(json.loads(done.stdout.replace("'", '"')))


def child(program: str) -> list[str]:
    """A child that runs ``program`` for each case; ``say`` speaks as a real one does."""
    start = "import json, os, sys, time\norder = json.loads(sys.stdin.read())\nsay = lambda **what: print(json.dumps(what), flush=True)\n"
    return [sys.executable, "-c", f"{start}for name in order['names']:\n    say(started=name)\n    {program}\n    say(name=name, ok=True)"]


@pytest.mark.parametrize(
    "program, why",
    [
        ("name == 'bad' and os._exit(9)", "the process died: without a word"),
        ("if name == 'bad': raise SystemExit('out of luck')", "the process died: out of luck"),
        ("name == 'bad' and time.sleep(60)", "hung, or took too long"),
    ],
)
def test_a_case_that_crashes_or_hangs_costs_itself_alone(program: str, why: str) -> None:
    pool = Pool(child(program), case_seconds=1.5)
    pool.run(["first", "bad", "last", "more"], time.time() + 60, workers=2)
    assert {line["name"]: line["ok"] for line in pool.results} == {"first": True, "bad": False, "last": True, "more": True}
    (failed,) = [line for line in pool.results if not line["ok"]]
    assert failed["why"] == why


def test_what_has_no_time_is_left_out_and_what_cannot_start_is_said() -> None:
    pool = Pool(child("time.sleep(60)"), grace_seconds=0.1)
    began = time.time()
    pool.run(["one", "two"], began + 0.5, workers=1)
    assert time.time() - began < 10
    assert [line["name"] for line in pool.results] == ["one"]
    pool = Pool([sys.executable, "-c", "raise SystemExit('no torch here')"])
    pool.run(["one"], time.time() + 60, workers=1)
    assert pool.results == [{"name": "one", "ok": False, "why": "no process could be started: no torch here"}]


def points(**times: float) -> dict[str, Any]:
    """Everything timed, with our kernels at one microsecond and the others at so many."""
    names = [point_name(*at) for at in product(SCHEMES, SHAPES, (*TIMED_TOKENS, 2048))]
    return {name: {"microseconds": {OURS: 1.0, **{key.replace("_", " "): value for key, value in times.items()}}} for name in names}


def verdicts(timed: dict[str, Any], **parts: Any) -> list[str]:
    return [target.verdict for target in targets(timed, parts)]


def test_targets_are_passed_failed_or_not_measured() -> None:
    good = points(bfloat16=2.9, torch_int4=1.1, gemlite=1.5, humming=1.01)
    part = {"cases": [{"name": "a", "ok": True}], "left_out": 0}
    whole = {"correctness": part, "repeatability": part, "size": part}
    assert verdicts(good, **whole) == ["PASS"] * 10
    assert verdicts(points(bfloat16=2.9, torch_int4=0.99, gemlite=1.5), **whole)[:3] == ["FAIL", "PASS", "NOT MEASURED"]
    assert verdicts(points(bfloat16=2.7))[3:7] == ["FAIL", "PASS", "PASS", "PASS"]
    assert verdicts(points(bfloat16=0.92))[3:7] == ["FAIL", "FAIL", "FAIL", "PASS"]
    assert verdicts(points(bfloat16=0.89))[6] == "FAIL"
    assert verdicts({}) == ["NOT MEASURED"] * 10
    del good["LLM.int8 down 64"]
    assert verdicts(good, **whole)[6] == "NOT MEASURED"
    assert "34 of 35 points" in targets(good, whole)[6].detail
    assert judged("", [0.5, None], 1.0).verdict == "FAIL"
    short, failed = {**part, "left_out": 3}, {"cases": [{"name": "a", "ok": False}], "left_out": 0}
    skipped = {"cases": [{"name": "a", "ok": True}, {"name": "b", "ok": True, "skipped": "needs 20 GB"}], "left_out": 0}
    assert verdicts(good, size=skipped)[9] == "NOT MEASURED"
    assert verdicts(good, correctness=short, repeatability=failed)[7:9] == ["FAIL", "NOT MEASURED"]


def test_only_what_is_ours_counts_as_failed() -> None:
    assert gpu_check.is_ours("preparation", {"name": "ours: W4A16 up 1"})
    assert gpu_check.is_ours("timing", {"name": "W4A16 up 1"})
    assert not gpu_check.is_ours("preparation", {"name": "gemlite: W4A16 up 1"})


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_kernel_that_is_wrong_or_leaves_memory_unwritten_fails(scheme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (Setting(rehearse=True), scheme, [(70, 128)], torch.bfloat16, False)
    gpu_cases.against_float64(*given)
    right = gpu_cases.ours

    def off(layer: Any, dtype: torch.dtype) -> Any:
        return lambda x: right(layer, dtype)(x) * 1.01

    def unwritten(layer: Any, dtype: torch.dtype) -> Any:
        return lambda x: torch.where(torch.arange(70) == 69, x.new_empty(len(x), 70), right(layer, dtype)(x))

    for broken in (off, unwritten):
        monkeypatch.setattr(gpu_cases, "ours", broken)
        with pytest.raises(AssertionError, match="relative error"):
            gpu_cases.against_float64(*given)


def test_tables_have_each_shape_and_one_entry_for_all_others() -> None:
    few, many, wide = {"block_m": 16}, {"block_m": 32}, {"block_m": 64}
    lines = [
        {"w4a16": {"bits": 4, "shape": [10, 20], "up_to": 16}, "ranked": [[1.0, few], [1.1, many], [9.0, None]]},
        {"w4a16": {"bits": 4, "shape": [30, 20], "up_to": 16}, "ranked": [[1.0, wide], [1.1, many], [1.5, few], [2.0, None]]},
        {"w4a16": {"bits": 4, "shape": [10, 20], "up_to": 64}, "ranked": [[1.0, None], [2.0, few]]},
        {"w8a8": {"up_to_m": 64, "block_m": 64}},
        {"w8a8": {"up_to_m": 16, "block_m": 16}},
    ]
    tables = gpu_cases.tuned_tables(lines)
    assert tables["w4a16"] == [
        {"bits": 4, "up_to": 16, "config": many},
        {"bits": 4, "shape": [10, 20], "up_to": 16, "config": few},
        {"bits": 4, "shape": [30, 20], "up_to": 16, "config": wide},
    ]
    assert [(row["up_to_m"], row["block_m"]) for row in tables["w8a8"]] == [(16, 16), (2**31 - 1, 64)]


def test_every_part_names_its_cases_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU, too, with its properties made up: the cases are only named."""

    class H200:
        name, major, minor, multi_processor_count = "NVIDIA H200", 9, 0, 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: H200)
    pytest.importorskip("triton", reason="the tuned tables of the int8 kernels are read by a module that imports triton")
    for part, cases in gpu_cases.PARTS.items():
        names = [name for name, _ in cases(Setting())]
        assert len(names) == len(set(names)), part
        assert len(names) >= 6, part

"""``scripts/gpu_check.py``: the rehearsal, the verdicts, and what becomes of cases that crash or hang."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import gpu_check
import gpu_correctness
import gpu_layers
import gpu_report
import gpu_timing
import gpu_tune
import pytest
import torch
from gpu_layers import BASELINE, OURS, SCHEMES, SHAPES, TIMED_TOKENS, TOKENS, GpuRun
from gpu_pool import Pool
from gpu_report import judged, targets
from gpu_timing import point_name
from ptq_kernels import tile_config
from ptq_kernels.tile_config import TileConfig

from ptqcli.bench.timing import Timing
from ptqcli.numerics.scheme import Scheme
from ptqcli.resources import free_bytes

SCRIPT = Path(gpu_check.__file__)
NEEDED_NOWHERE_ELSE = {"transformers", "click", "rich", "psutil", "safetensors", "yaml", "accelerate", "datasets", "pyarrow"}


def run(*options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300, check=False)


@pytest.mark.triton
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
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_a_result_that_is_there_is_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there.json"
    there.write_text("precious")
    assert gpu_check.main(["--rehearse", "--output", str(there)]) == 2
    assert capsys.readouterr().err == f"gpu_check: {there} is there already; give another --output, or --overwrite\n"
    assert there.read_text() == "precious"
    assert gpu_check.main(["--rehearse", "--output", str(tmp_path / "no" / "there.json")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert gpu_check.what_is_in_the_way(GpuRun(rehearse=True), there, overwrite=True) is None


def test_results_are_named_for_gpu_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H200 (141 GB)")
    monkeypatch.setattr(gpu_check.time, "strftime", lambda form: form.replace("%Y-%m-%d-%H%M", "2026-11-22-1310"))
    assert gpu_check.default_output(GpuRun()).name == "gpu_check-NVIDIA_H200_141_GB_-2026-11-22-1310.json"
    assert gpu_check.default_output(GpuRun(rehearse=True)).name == "gpu_check-rehearsal-2026-11-22-1310.json"


def test_what_was_found_is_in_the_file_when_the_run_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(name: str, *_: object) -> dict[str, Any]:
        if name == "size":
            raise KeyboardInterrupt
        return {"name": name, "cases": [], "left_out": 0, "seconds": 1.0}

    monkeypatch.setattr(gpu_check, "run_part", part)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--rehearse", "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [each["name"] for each in found["parts"]] == ["correctness", "repeatability"]
    assert len(found["targets"]) == 10
    assert len(list(tmp_path.iterdir())) == 1


def test_a_compiler_or_headers_that_are_missing_are_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="without it that is said first")
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    assert f"{tmp_path / 'cc'} does not run" in (gpu_check.what_triton_misses() or "")
    for answer, expected in ((1, "triton needs Python.h, which"), (0, "")):
        (tmp_path / "cc").write_text(f"#!/bin/sh\nexit {answer}\n")
        (tmp_path / "cc").chmod(0o755)
        assert (gpu_check.what_triton_misses() or "").startswith(expected)
    monkeypatch.delenv("CC")
    monkeypatch.setattr(gpu_check.shutil, "which", lambda _name: None)
    assert "finds neither gcc nor clang" in (gpu_check.what_triton_misses() or "")
    monkeypatch.setattr(gpu_check, "find_spec", lambda _name: None)
    assert gpu_check.what_triton_misses() == "triton is not installed; pip install triton"


def test_limits_of_a_gpu_need_no_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (5, 7))
    assert free_bytes("cuda") == 5
    assert "psutil" in gpu_timing.limits(GpuRun(rehearse=True))["note"]


@pytest.mark.triton
def test_the_rehearsal_of_tuning_prints_tables(tmp_path: Path) -> None:
    done = run("--rehearse", "--tune", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"w4a16", "w8a8", "llm_int8"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert gpu_check.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "no CUDA GPU" in err
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


def test_children_use_one_thread_each() -> None:
    pool = Pool(child("assert os.environ['OMP_NUM_THREADS'] == os.environ['TORCHINDUCTOR_COMPILE_THREADS'] == '1'"))
    pool.run(["one"], time.time() + 60, workers=1)
    assert pool.results == [{"name": "one", "ok": True}]


def test_after_a_failed_capture_the_next_child_is_told_and_does_the_rest() -> None:
    lines = "assert name != 'two' or order['eager'] == ['gemlite']", "if name == 'one':", "    say(name=name, ok=True, no_graph='gemlite')"
    pool = Pool(child("\n    ".join([*lines, "    raise SystemExit(4)"])))
    pool.run(["one", "two"], time.time() + 60, workers=1)
    assert pool.eager == ["gemlite"]
    assert pool.results == [{"name": "one", "ok": True, "no_graph": "gemlite"}, {"name": "two", "ok": True}]


class OnGpu(GpuRun):
    """A run that says it is on a GPU."""

    device = torch.device("cuda")


class H200:
    """Properties of a GPU."""

    name, major, minor, multi_processor_count = "NVIDIA H200", 9, 0, 132


class HereAsOnGpu(GpuRun):
    """One that does on the CPU, at small sizes, what it would do on a GPU."""

    device, shapes, rehearse = torch.device("cpu"), {"qkv": (256, 96), "down": (128, 64)}, False


def time_on_gpu(monkeypatch: pytest.MonkeyPatch, cannot: set[str], eager: set[str]) -> tuple[dict[str, Any], list[tuple[bool, list[str]]]]:
    """What ``time_point`` says where ``cannot`` cannot be captured, and what was timed: in graphs or not, and whom."""
    names = [OURS, BASELINE, "gemlite", "humming", "bitsandbytes"]
    timed = []

    def in_turn(calls: dict[str, Any], _device: object, graphs: bool, _seconds: float) -> dict[str, Timing]:
        timed.append((graphs, list(calls)))
        return {name: Timing(microseconds=1.0, low=1.0, high=1.0, calls=1) for name in calls if not (graphs and name in cannot)}

    monkeypatch.setattr(gpu_timing.timing, "time_in_turn", in_turn)
    monkeypatch.setattr(gpu_timing, "callable_now", lambda *_: ({name: [] for name in names}, {}))
    peers = [gpu_timing.Peer(name=name, version="1", build=lambda *_: None, graphs=name != "bitsandbytes") for name in names[2:]]
    monkeypatch.setattr(gpu_timing, "installed_peers", lambda _device: peers)
    return gpu_timing.time_point(OnGpu(rehearse=True, eager=frozenset(eager)), "W4A16", "up", 1), timed


def test_a_peer_that_fits_into_no_graph_is_timed_without(monkeypatch: pytest.MonkeyPatch) -> None:
    values, timed = time_on_gpu(monkeypatch, {"bitsandbytes"}, set())
    assert timed == [(False, [OURS, BASELINE, "bitsandbytes"]), (True, [OURS, BASELINE, "gemlite", "humming"])]
    assert "no_graph" not in values
    assert set(values["microseconds"]) == {OURS, BASELINE, "gemlite", "humming"}
    values, timed = time_on_gpu(monkeypatch, {"gemlite", "humming"}, set())
    assert values["no_graph"] == "gemlite"
    values, timed = time_on_gpu(monkeypatch, {"gemlite"}, {"gemlite"})
    assert timed == [(False, [OURS, BASELINE, "gemlite", "bitsandbytes"]), (True, [OURS, BASELINE, "humming"])]
    assert set(values["without_graphs"]) == {OURS, BASELINE, "gemlite", "bitsandbytes"}
    with pytest.raises(AssertionError, match="no CUDA graph can hold ours"):
        time_on_gpu(monkeypatch, {OURS}, set())


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
    assert gpu_report.is_ours("preparation", {"name": "ours: W4A16 up 1"})
    assert gpu_report.is_ours("timing", {"name": "W4A16 up 1"})
    assert not gpu_report.is_ours("preparation", {"name": "gemlite: W4A16 up 1"})


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_kernel_that_is_wrong_or_leaves_memory_unwritten_fails(scheme: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (GpuRun(rehearse=True), scheme, [(70, 128)], torch.bfloat16, (1, 17))
    gpu_correctness.against_float64(*given)
    right = gpu_layers.ours

    def off(layer: Any, dtype: torch.dtype) -> Any:
        return lambda x: right(layer, dtype)(x) * 1.01

    def unwritten(layer: Any, dtype: torch.dtype) -> Any:
        return lambda x: torch.where(torch.arange(70) == 69, x.new_empty(len(x), 70), right(layer, dtype)(x))

    for broken in (off, unwritten):
        monkeypatch.setattr(gpu_correctness, "ours", broken)
        with pytest.raises(AssertionError, match="relative error"):
            gpu_correctness.against_float64(*given)


def test_a_flipped_code_is_seen_among_all_numbers_of_tokens() -> None:
    """Over the whole output it would be lost: one code of one row, and 300 tokens, most of which have a small input there."""
    here, scheme = GpuRun(rehearse=True), Scheme(4, 128, symmetric=False)
    assert gpu_correctness.against_float64(here, scheme, [(515, 384)], torch.float16, TOKENS)["flipped"] > 5 * gpu_layers.TOLERANCE
    layer = gpu_layers.make_layer(scheme, 515, 384, torch.float16, here.device)
    x = gpu_layers.make_input(300, 384, torch.float16, here.device)
    changed = gpu_layers.ours(gpu_layers.flipped(layer, x), torch.float16)(x)
    assert gpu_layers.error(changed, gpu_layers.truth(layer, x)) < gpu_layers.TOLERANCE
    same = gpu_layers.ours(layer, torch.float16)(x)
    assert (same != changed).any(dim=0).nonzero().flatten().tolist() == [515 // 2]


def tuned(monkeypatch: pytest.MonkeyPatch, *lines: dict[str, Any]) -> dict[str, Any]:
    monkeypatch.setattr(gpu_tune, "W4A16_TOKENS", (16, 64))
    monkeypatch.setattr(gpu_tune, "INT8_TOKENS", (16, 64))
    return gpu_tune.tuned_tables([{"ok": True, **line} for line in lines])


def test_tables_have_each_shape_and_one_entry_for_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many, wide = {"block_m": 16}, {"block_m": 32}, {"block_m": 64}
    lines = [
        {"w4a16": {"bits": 4, "shape": [10, 20], "max_m": 16}, "ranked": [[1.0, few], [1.1, many], [9.0, None]]},
        {"w4a16": {"bits": 4, "shape": [30, 20], "max_m": 16}, "ranked": [[1.0, wide], [1.1, many], [1.5, few], [2.0, None]]},
        {"w4a16": {"bits": 4, "shape": [10, 20], "max_m": 64}, "ranked": [[1.0, None], [2.0, few]]},
        {"w4a16": {"bits": 4, "shape": [30, 20], "max_m": 64}, "ranked": [[1.0, None], [2.0, few]]},
        {"w8a8": {"max_m": 64, "config": wide}},
        {"w8a8": {"max_m": 16, "config": few}},
    ]
    tables = tuned(monkeypatch, *lines)
    assert tables["w4a16"] == [
        {"bits": 4, "max_m": 16, "config": many},
        {"bits": 4, "shape": [10, 20], "max_m": 16, "config": few},
        {"bits": 4, "shape": [30, 20], "max_m": 16, "config": wide},
    ]
    assert tables["w8a8"] == [{"max_m": 16, "config": few}, {"max_m": 2**31 - 1, "config": wide}]


def test_tuning_that_was_cut_short_leaves_out_what_is_not_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else few tokens' entries would speak for many."""
    one, other = {"block_m": 16}, {"block_m": 32}
    lines = [
        {"w4a16": {"bits": 4, "shape": [10, 20], "max_m": 16}, "ranked": [[1.0, one], [1.1, None]]},
        {"w4a16": {"bits": 4, "shape": [10, 20], "max_m": 64}, "ranked": [[1.0, one], [1.1, None]]},
        {"w4a16": {"bits": 4, "shape": [30, 20], "max_m": 16}, "ranked": [[1.0, other], [9.0, one]]},
        {"w4a16": {"bits": 8, "shape": [30, 20], "max_m": 16}, "ranked": [[1.0, other], [9.0, one]]},
        {"w8a8": {"max_m": 16, "config": one}},
        {"ok": False, "why": "hung"},
    ]
    assert tuned(monkeypatch, *lines) == {
        "w4a16": [
            {"bits": 4, "max_m": 16, "config": one},
            {"bits": 4, "max_m": 64, "config": one},
            {"bits": 4, "shape": [10, 20], "max_m": 16, "config": one},
            {"bits": 4, "shape": [10, 20], "max_m": 64, "config": one},
        ]
    }
    assert tuned(monkeypatch, *lines[2:]) == {}


@pytest.mark.parametrize(
    "bits, tokens, blocks", [(4, 1, {16}), (4, 17, {32}), (8, 128, {64, 128}), (4, 300, {128, 256}), (8, 512, {128, 256})]
)
def test_candidates_have_blocks_for_the_tokens_and_the_shipped_ones_among_them(bits: int, tokens: int, blocks: set[int]) -> None:
    found = gpu_tune.w4a16_candidates(bits, tokens)
    shipped = {entry.config for _, entry in tile_config.shipped("w4a16") if entry.bits == bits and entry.config.block_m in blocks}
    assert shipped <= set(found)
    assert blocks <= {config.block_m for config in found}
    assert max(config.block_m for config in found) == max(blocks)
    assert len(found) == len(set(found)) < 200
    assert all(config.block_m * config.block_n <= 128 * 32 * config.num_warps for config in set(found) - shipped)


def test_a_candidate_that_fails_or_is_wrong_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("triton.runtime.errors", reason="an optional package")
    x, expected = torch.ones(2, 3), torch.full((2, 4), 3.0).double()

    def fails(problem: Exception) -> Any:
        def call(_x: torch.Tensor) -> torch.Tensor:
            raise problem

        return call

    def took(call: Any) -> float | None:
        return gpu_tune.time_candidate(GpuRun(rehearse=True), [call], x, expected)

    taken = Timing(microseconds=7.0, low=7.0, high=7.0, calls=1)
    monkeypatch.setattr(gpu_tune.timing, "time_in_turn", lambda calls, *_: dict.fromkeys(calls, taken))
    assert took(lambda x: x @ torch.ones(3, 5)) == 7.0
    assert took(lambda x: (x @ torch.ones(3, 5)) * 1.01) is None
    assert took(lambda x: (x @ torch.ones(3, 5)) * float("nan")) is None
    assert took(fails(errors.OutOfResources(300_000, 232_448, "shared memory"))) is None
    assert took(fails(RuntimeError("PassManager::run failed"))) is None
    with pytest.raises(RuntimeError, match="illegal"):
        took(fails(RuntimeError("CUDA error: an illegal memory access was encountered")))


def test_every_part_names_its_cases_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU, too, with its properties made up: the cases are only named."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: H200)
    for part, cases in gpu_check.PARTS.items():
        names = [name for name, _ in cases(GpuRun())]
        assert len(names) == len(set(names)), part
        assert len(names) >= 6, part


def test_tuning_takes_the_fastest_of_what_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels that are the operators, and a clock that goes by the configuration's stages and warps."""
    from ptq_kernels import llm_int8, w4a16, w8a8

    seen: list[Any] = []

    def w4a16_launch(x: torch.Tensor, *given: Any) -> torch.Tensor:
        seen.append(given[-1])
        return w4a16.w4a16(x, *given[:-1]) * (1 if given[-1].scale_weights else 2)

    def int8_launch(operator: Any) -> Any:
        def launch(*given: Any) -> torch.Tensor:
            seen.append(given[-1])
            return operator(*given[:-1])

        return launch

    def clock(calls: dict[str, list[Any]], *_: object) -> dict[str, Timing]:
        config = seen[-1]
        return {name: Timing(microseconds=10.0 * config.num_stages + config.num_warps, low=0, high=0, calls=1) for name in calls}

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: H200)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 20, 1 << 20))
    monkeypatch.setattr(gpu_tune.timing, "time_in_turn", clock)
    monkeypatch.setattr(w4a16, "launch", w4a16_launch)
    monkeypatch.setattr(w4a16, "dequantized", lambda *_: 1 / 0)
    monkeypatch.setattr(w8a8, "launch", int8_launch(w8a8.w8a8))
    monkeypatch.setattr(llm_int8, "launch", int8_launch(llm_int8.llm_int8))
    ranked = gpu_tune.tune_w4a16(HereAsOnGpu(), 4, "qkv", 17)["ranked"]
    assert [took for took, _ in ranked] == sorted(took for took, _ in ranked)
    assert ranked[0][0] == 10 * ranked[0][1]["num_stages"] + ranked[0][1]["num_warps"]
    assert all(config["scale_weights"] for _, config in ranked)
    for kernel in ("w8a8", "llm_int8"):
        found = gpu_tune.tune_int8(HereAsOnGpu(), kernel, 16)
        candidates = list(gpu_tune.int8_candidates(kernel, 16))
        assert found["microseconds"] == 2 * min(10 * config.num_stages + config.num_warps for config in candidates)
        assert TileConfig(**found[kernel]["config"]) in candidates

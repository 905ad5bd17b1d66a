"""`ptq bench` as a person meets it: what it measures, prints and refuses."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Answer, Ptq, one_line
from tiny import make_model

import ptqcli
from ptqcli.bench import generation, machine, roofline
from ptqcli.bench.linears import KernelPoint
from ptqcli.bench.machine import Machine
from ptqcli.bench.peers import Peer
from ptqcli.bench.shapes import Shape, shapes_of
from ptqcli.cli import bench_tables, run
from ptqcli.cli.console import PLAIN_WIDTH, Output
from ptqcli.errors import PTQError
from ptqcli.runtime import models

MACHINE = Machine(
    name="a processor",
    device="cpu",
    threads=1,
    cache_bytes=1 << 20,
    bandwidth=2e10,
    arithmetic={"float32": 1e11, "bfloat16": 4e11, "int8": 6e11},
)
QUICK = ("--seconds", "0.0001")
SMALL = ("--prompt", "8", "--new-tokens", "3")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a checkpoint of it, and an earlier picture."""
    folder = tmp_path_factory.mktemp("workshop")
    make_model(folder / "model", "llama", torch.bfloat16)
    line = ["quantize", folder / "model", "--algo", "rtn", "--group-size", "32", "--output", folder / "done", "--quiet"]
    assert run([str(word) for word in line]) == 0
    (folder / "earlier.png").write_bytes(b"earlier")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits are given, and memory is not measured in processes of their own: what takes seconds and is tested elsewhere."""

    def peak(load: Callable[[], Any], batch: int, prompt: int, new_tokens: int, device: torch.device) -> int:
        return 1000 + batch + (load.args[0].name == "model")  # type: ignore[attr-defined]

    monkeypatch.setattr(machine, "measure", lambda device: MACHINE)
    monkeypatch.setattr(generation, "peak_memory", peak)


def table(text: str, title: str) -> list[list[str]]:
    """Cells of the rows under the first line that begins with ``title``, the columns' names first."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(title))
    rows = []
    for line in lines[start + 1 :]:
        if not line.strip():
            break
        rows.append(re.split(r"  +", line.strip()))
    return rows


# What is refused

REFUSED = [
    # command line, exit code, what the line says
    ("bench nowhere", 2, "nowhere: no such folder"),
    ("bench empty", 1, "has no config.json"),
    ("bench done --device cuda:99", 2, "device 'cuda:99' is not on this machine"),
    ("bench done --tokens 0", 2, "'0' is not a list of whole numbers from 1 on"),
    ("bench done --tokens abc", 2, "'abc' is not a list of whole numbers"),
    ("bench done --tokens 1,,4", 2, "'1,,4' is not a list of whole numbers"),
    ("bench done --tokens -1", 2, "'-1' is not a list of whole numbers"),
    ("bench done --tokens 9999999999", 2, "'9999999999' is not a list of whole numbers"),
    ("bench done --batch 0", 2, "'0' is not a list of whole numbers"),
    ("bench done --prompt 1.5", 2, "'1.5' is not a list of whole numbers"),
    ("bench done --new-tokens 1", 2, "1 is not in the range x>=2"),
    ("bench done --prompt 100 --new-tokens 29", 2, "are 129, and the original has 128 positions; lower --prompt or --new-tokens"),
    ("bench done --prompt 8,128", 2, "has 128 positions"),
    ("bench done --seconds 0", 2, "0.0 is not in the range"),
    ("bench done --seconds nan", 2, "--seconds nan is not a time"),
    ("bench done --only speed", 2, "'speed' is not one of 'kernels', 'model'"),
    ("bench done --kernel magic", 2, "'magic' is not one of 'auto', 'triton', 'torch', 'reference'"),
    ("bench done --only kernels --kernel triton", 2, "q_proj+k_proj+v_proj (64 x 128): kernel triton cannot run it"),
    ("bench model --only model --kernel triton", 2, "is not quantized, so it cannot run on --kernel triton"),
    ("bench --shapes llama9-9b", 2, "llama3-8b"),
    ("bench --shapes 0x16", 2, "llama3-8b"),
    ("bench --shapes 64x64 --scheme w9a16", 2, "9 bits per weight is not supported"),
    ("bench --shapes 64x64 --scheme nonsense", 2, "scheme 'nonsense' is no number format; write one such as w4a16-g128"),
    ("bench --shapes 65x64 --scheme w4a16-g32", 2, "65"),
    ("bench done --shapes llama3-8b", 2, "CHECKPOINT and --shapes exclude each other"),
    ("bench done --scheme w8a8", 2, "--scheme has no effect without --shapes"),
    ("bench --shapes 64x64 --batch 2", 2, "--batch has no effect with --shapes"),
    ("bench --shapes 64x64 --only model", 2, "--shapes has no effect with --only model"),
    ("bench --shapes 64x64 --no-baseline", 2, "--baseline or --no-baseline has no effect with --shapes"),
    ("bench done --only kernels --prompt 4", 2, "--prompt has no effect with --only kernels"),
    ("bench done --only model --tokens 4", 2, "--tokens has no effect with --only model"),
    ("bench done --only model --plot new.png", 2, "--plot has no effect with --only model"),
    ("bench done --overwrite", 2, "--overwrite has no effect without --plot"),
    ("bench done --baseline model --no-baseline", 2, "exclude each other"),
    ("bench done --baseline nowhere", 2, "nowhere: no such folder"),
    ("bench done --plot earlier.png", 2, "--plot earlier.png: already exists; give --overwrite to replace it"),
    ("bench done --plot no/where.png", 2, "--plot no/where.png: there is no folder no; make it first"),
    ("bench done --plot empty", 2, "only PNG is written"),
    ("bench done --plot picture.pdf", 2, "only PNG is written"),
    ("bench model", 2, "is not quantized, so it has no kernels of its own; give --only model, or --shapes"),
]


def test_a_file_that_is_decoded_has_no_kernels_of_its_own(ptq: Ptq, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    ptqcli.convert(Path(ptqcli.__file__).parent / "demo", "gguf", output=tmp_path / "model.gguf", gguf_type="q4_1")
    said = one_line(ptq("bench", tmp_path / "model.gguf", "--only", "kernels"))
    assert (
        "model.gguf: Q4_1, Q6_K are decoded when the model is loaded; only Q4_0 and Q8_0 run packed, so it has no kernels of its own"
        in said
    )


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize(("line", "code", "says"), REFUSED, ids=[line for line, *_ in REFUSED])
def test_refusals_are_one_clear_line(ptq: Ptq, at_work: Path, line: str, code: int, says: str) -> None:
    before = sorted(at_work.iterdir())
    answer = ptq(*line.split())
    assert says in one_line(answer)
    assert answer.code == code
    assert sorted(at_work.iterdir()) == before
    assert (at_work / "earlier.png").read_bytes() == b"earlier"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="here is no GPU")
def test_a_gpu_gives_graphs_too(ptq: Ptq) -> None:
    answer = ptq("bench", "--shapes", "4096x4096", "--tokens", "1", "--device", "cuda", "--json")
    assert all(point["graph_microseconds"] for point in json.loads(answer.out)["kernels"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_cuda_without_a_gpu_is_one_line(ptq: Ptq, at_work: Path) -> None:
    answer = ptq("bench", "done", "--device", "cuda")
    assert "device 'cuda' is not on this machine, which has 0 CUDA devices" in one_line(answer)
    assert (answer.code, answer.out) == (2, "")


def test_a_file_that_is_a_folder(ptq: Ptq, at_work: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    assert "is a folder; name a file in it" in one_line(ptq("bench", "done", "--plot", tmp_path / "folder.png"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(ptq: Ptq, at_work: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot write there" in one_line(ptq("bench", "done", "--plot", tmp_path / "locked" / "p.png"))


def test_a_missing_matplotlib_is_told_before_anything_is_measured(ptq: Ptq, at_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise PTQError("--plot needs matplotlib; install it with: pip install matplotlib")

    monkeypatch.setattr(roofline, "check_installed", missing)
    answer = ptq("bench", "done", "--plot", "new.png")
    assert "pip install matplotlib" in one_line(answer)
    assert (answer.code, answer.out) == (1, "")


def test_no_checkpoint_here(ptq: Ptq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = ptq("bench")
    assert "no checkpoint in this folder yet" in one_line(answer)
    assert answer.code == 2


# What is measured


@pytest.mark.parametrize("line", ["done --only kernels --kernel triton", "--shapes 65x64 --scheme w4a16-g32", "--shapes 999936x999936"])
def test_what_cannot_work_is_refused_before_anything_is_measured(
    ptq: Ptq, at_work: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setattr(machine, "measure", None)
    assert ptq("bench", *line.split()).code == 2


@pytest.mark.usefixtures("_no_waiting")
def test_a_model_that_could_not_be_measured_is_a_failure_after_what_could(ptq: Ptq, at_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(load: Any, batch: int, *_: Any) -> int:
        if batch > 1:
            raise PTQError("memory ran out; choose a smaller batch or prompt")
        return 1 << 20

    monkeypatch.setattr(generation, "peak_memory", short)
    both = ptq("bench", "done", "--only", "model", "--batch", "1,2", *QUICK)
    assert both.code == 0
    assert "failed: checkpoint, batch 2, prompt" in both.out
    alone = ptq("bench", "done", "--tokens", "1", "--batch", "2", *QUICK)
    assert alone.code == 1
    assert "W4A16" in alone.out
    assert alone.err.splitlines()[-1].endswith("could not be measured; see what failed above")


@pytest.mark.usefixtures("_no_waiting")
def test_a_checkpoint_has_tables_of_kernels_and_of_the_whole_model(ptq: Ptq, at_work: Path) -> None:
    answer = ptq("bench", "--tokens", "3,1", *QUICK, *SMALL, "--batch", "1,2")
    assert answer.code == 0
    assert "Traceback" not in answer.err
    for line in ("machine      a processor (cpu, 1 threads)", "bfloat16 400 Gop/s", "subject      done", "original     "):
        assert line in answer.out
    kernels = table(answer.out, "w4a16-g32")
    assert kernels[0][:3] == ["layer, in → out", "M", "kernel"]
    shapes = [shape for shape, _ in shapes_of(at_work / "done")]
    layers = [f"{shape.name} {shape.in_features} → {shape.out_features}" for shape in shapes]
    assert [row[0] for row in kernels[1::2]] == layers
    assert [row[1] for row in kernels[1::2]] == ["3"] * len(shapes)
    assert [row[0] for row in kernels[2::2]] == ["1"] * len(shapes)  # the layer is named once
    models = table(answer.out, "Whole model, 3 new tokens")
    assert [row[:3] for row in models[1:5]] == [
        ["original", "1", "8"], ["checkpoint", "1", "8"], ["original", "2", "8"], ["checkpoint", "2", "8"],
    ]  # fmt: skip
    assert "share of the measured limit of bfloat16" in answer.out
    assert re.search(r"layers run on W4A16 \w+ x 14", answer.out)
    assert max(len(line) for line in answer.out.splitlines()) <= PLAIN_WIDTH


@pytest.mark.usefixtures("_no_waiting")
def test_json_is_one_object_with_everything(ptq: Ptq, at_work: Path) -> None:
    answer = ptq("bench", "done", "--tokens", "1", *QUICK, *SMALL, "--json")
    found = json.loads(answer.out)
    assert found["subject"] == "done"
    assert found["models"] == {"original": str(at_work / "model"), "checkpoint": "done"}
    assert found["machine"]["arithmetic"] == MACHINE.arithmetic
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert set(found["versions"]) == {"ptqcli", "torch", "transformers", "triton"}
    assert {point["kind"] for point in found["kernels"]} == {"ours", "baseline"}
    assert {point["shape"]["name"] for point in found["kernels"]} == {shape.name for shape, _ in shapes_of(at_work / "done")}
    assert [(point["model"], point["peak_memory"]) for point in found["generation"]] == [("original", 1002), ("checkpoint", 1001)]
    assert (found["failures"], found["in_turn"]) == ([], True)
    assert sum(found["layers"].values()) == 14
    assert "w4a16-g32" in answer.err


@pytest.mark.usefixtures("_no_waiting")
def test_a_prompt_that_nobody_asked_for_fits_the_model(ptq: Ptq, at_work: Path) -> None:
    """128 tokens by default; the model has as many positions, and 32 of them are for new tokens."""
    found = json.loads(ptq("bench", "done", "--only", "model", "--no-baseline", *QUICK, "--json").out)
    assert [(point["prompt"], point["new_tokens"]) for point in found["generation"]] == [(96, 32)]


@pytest.mark.usefixtures("_no_waiting")
def test_only_kernels_runs_no_model(ptq: Ptq, at_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_model", None)
    answer = ptq("bench", "done", "--only", "kernels", "--tokens", "1", *QUICK, "--json")
    found = json.loads(answer.out)
    assert found["kernels"]
    assert (found["generation"], found["models"]) == ([], {})


@pytest.mark.usefixtures("_no_waiting")
def test_only_model_times_no_kernel(ptq: Ptq, at_work: Path) -> None:
    found = json.loads(ptq("bench", "done", "--only", "model", "--no-baseline", *QUICK, *SMALL, "--kernel", "reference", "--json").out)
    assert found["kernels"] == []
    assert [point["model"] for point in found["generation"]] == ["checkpoint"]
    assert found["layers"] == {"W4A16 reference": 14}


@pytest.mark.usefixtures("_no_waiting")
def test_an_unquantized_model_alone(ptq: Ptq, at_work: Path) -> None:
    found = json.loads(ptq("bench", "model", "--only", "model", *QUICK, *SMALL, "--json").out)
    assert [point["model"] for point in found["generation"]] == ["model"]


@pytest.mark.usefixtures("_no_waiting")
def test_shapes_need_no_checkpoint(ptq: Ptq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    schemes = ("--scheme", "w4a16-g32-asym", "--scheme", "w8a8", "--scheme", "llm-int8")
    answer = ptq("bench", "--shapes", "64x96,128x64", *schemes, "--tokens", "1,5", *QUICK)
    assert answer.code == 0
    for title in ("w4a16-g32-asym: ", "w8a8: ", "w8a8-outliers6: "):
        rows = table(answer.out, title)
        assert [row[0] for row in rows[1:]] == ["64 → 96", "5", "128 → 64", "5"]


@pytest.mark.usefixtures("_no_waiting")
def test_a_picture_is_written_and_replaced_when_asked(ptq: Ptq, at_work: Path, tmp_path: Path) -> None:
    file = tmp_path / "roof.png"
    line = ("bench", "done", "--only", "kernels", "--tokens", "1", *QUICK, "--plot", file)
    assert ptq(*line).code == 0
    first = file.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert "already exists" in one_line(ptq(*line))
    file.write_bytes(b"old")
    assert f"roofline  {file}" in ptq(*line, "--overwrite").out
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("_no_waiting")
def test_quiet_says_nothing(ptq: Ptq, at_work: Path) -> None:
    answer = ptq("bench", "done", "--tokens", "1", *QUICK, *SMALL, "--quiet")
    assert answer == Answer(0, "", "")


@pytest.mark.usefixtures("_no_waiting")
def test_an_original_that_is_gone_is_told(ptq: Ptq, workshop: Path, tmp_path: Path) -> None:
    shutil.copytree(workshop / "done", tmp_path / "done")
    report = json.loads((tmp_path / "done" / "ptq_report.json").read_text())
    (tmp_path / "done" / "ptq_report.json").write_text(json.dumps(report | {"source": str(tmp_path / "gone")}))
    answer = ptq("bench", tmp_path / "done", "--only", "model", *QUICK, *SMALL)
    assert "is gone; name it with --baseline to compare" in answer.out
    assert re.search(r"^original +none$", answer.out, flags=re.MULTILINE)


@pytest.mark.usefixtures("_no_waiting")
def test_an_original_that_does_not_fit_is_a_failure_and_the_checkpoint_is_measured(
    ptq: Ptq, at_work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak(load: Callable[[], Any], batch: int, *_: object) -> int:
        if load.args[0].name == "model":  # type: ignore[attr-defined]
            raise PTQError("memory ran out")
        return 1000

    monkeypatch.setattr(generation, "peak_memory", peak)
    answer = ptq("bench", "done", "--only", "model", *QUICK, *SMALL)
    assert answer.code == 0
    assert "failed: original, batch 1, prompt 8: memory ran out" in answer.out
    assert [row[0] for row in table(answer.out, "Whole model")[1:2]] == ["checkpoint"]


@pytest.mark.usefixtures("_no_waiting")
def test_models_that_do_not_fit_together_are_timed_one_after_the_other(ptq: Ptq, at_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "peak_memory", lambda *_: 1 << 50)
    answer = ptq("bench", "done", "--only", "model", "--batch", "1,2", *QUICK, *SMALL)
    assert "did not fit into memory together, so they were timed one after the other" in answer.out
    rows = table(answer.out, "Whole model")[1:5]
    assert [row[:2] for row in rows] == [["original", "1"], ["checkpoint", "1"], ["original", "2"], ["checkpoint", "2"]]


@pytest.mark.slow
def test_everything_for_real(ptq: Ptq, at_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits measured, memory in a process of its own."""
    monkeypatch.setattr(machine, "measure", partial(machine.measure, seconds=0.02))
    found = json.loads(ptq("bench", "done", "--only", "model", "--no-baseline", *QUICK, *SMALL, "--json").out)
    assert {"float32", "bfloat16", "int8"} <= set(found["machine"]["arithmetic"])
    [measured] = found["generation"]
    assert 50e6 < measured["peak_memory"] < 5e9
    assert all(0 < measured[f"{stage}_{share}"] < 100 for stage in ("prefill", "decode") for share in ("mfu", "hfu"))


# What a GPU and other libraries would show


def point(name: str, kind: str, microseconds: float, graph: float | None, error: float | None = 1e-3) -> KernelPoint:
    shape = Shape("qkv", 4096, 6144, 32)
    ratio = {"bfloat16": 30.0 / microseconds}
    graph_ratio = {"bfloat16": 12.0 / graph} if graph else {}
    return KernelPoint(
        shape=shape,
        scheme="w4a16-g128",
        tokens=16,
        name=name,
        kind=kind,
        microseconds=microseconds,
        low=0.0,
        high=0.0,
        graph_microseconds=graph,
        ratio=ratio,
        graph_ratio=graph_ratio,
        bytes=10**7,
        operations=10**9,
        bandwidth_share=0.5,
        arithmetic_share=0.25,
        error=error,
    )


GPU_POINTS = [
    point("W4A16 triton", "ours", 20.0, 4.0),
    point("bfloat16", "baseline", 30.0, 12.0),
    point("torch int4", "peer", 25.0, 6.0),
    point("a library", "peer", 40.0, None),
    point("nf4", "peer", 50.0, 10.0, error=None),
]


def test_a_gpu_has_columns_for_calls_and_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    bench_tables.show_kernels("w4a16-g128", GPU_POINTS, Output())
    out = capsys.readouterr().out
    assert table(out, "w4a16-g128: a call with its launch (us), all else replayed in CUDA graphs") == [
        ["layer, in → out", "M", "kernel", "us", "us in a graph", "bfloat16 us", "vs bfloat16", "of bandwidth", "of arithmetic", "error"],
        ["qkv 4096 → 6144", "16", "W4A16 triton", "20.0", "4.0", "12.0", "3.00x", "50.0%", "25.0%", "1.0e-03"],
    ]


def test_peers_have_a_table_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    bench_tables.show_kernels("w4a16-g128", GPU_POINTS, Output())
    out = capsys.readouterr().out
    rows = table(out, "w4a16-g128: microseconds beside other libraries")
    assert rows[:2] == [
        ["layer, in → out", "M", "ours", "torch int4", "a library", "nf4"],
        ["qkv 4096 → 6144", "16", "4.0", "6.0 (1.50x)", "40.0 (2.00x no graph)", "10.0 (2.50x)"],
    ]
    assert "nf4: another number format, so only the time compares" in out


@pytest.mark.usefixtures("_no_waiting")
def test_a_peer_that_fails_is_told_and_the_others_are_measured(ptq: Ptq, at_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("ptqcli.bench.peers.installed_peers", lambda device: [Peer(name="broken", version="1.0", build=broken)])
    monkeypatch.setattr("ptqcli.bench.peers.missing_peers", lambda device: {"gemlite": "pip install gemlite"})
    line = ("bench", "done", "--only", "kernels", "--tokens", "1", *QUICK, "--peers")
    answer = ptq(*line)
    assert answer.code == 0
    assert re.search(r"failed: broken.*no kernel image", answer.out)
    assert "not installed: gemlite (pip install gemlite)" in answer.out
    assert json.loads(ptq(*line, "--json").out)["missing_peers"] == {"gemlite": "pip install gemlite"}

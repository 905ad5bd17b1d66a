"""``scripts/gguf_table.py``: what each row asks of whom, numbers of files that are known, a run that goes on, the table."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from accuracy_table import Results
from gguf_table import IMATRIX, LLAMA, QUANTIZED, ROUNDED, Bench, arguments, cell_of, main, measure_missing, table_of, types_of
from rich.console import Console
from tiny import write_text

from ptqcli.cli import run

DEMO = Path(__file__).parents[1] / "ptqcli" / "demo"
MIX = "q8_0"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What was asked of llama.cpp's programs; in their place stands one that makes no file smaller. ptq runs in this process."""
    calls: list[tuple[str, ...]] = []

    def llama(bench: Bench, tool: str, *words: str) -> None:
        calls.append((tool, *words))
        if tool == "quantize":
            shutil.copy(words[-4], words[-3])

    monkeypatch.setattr(Bench, "llama", llama)
    monkeypatch.setattr(Bench, "ptq", lambda bench, *words: run([*words, "--quiet"]))
    return calls


def command_line(folder: Path, *more: str) -> list[str]:
    text = str(write_text(folder / "text.txt"))
    sizes = ("--nsamples", "2", "--seqlen", "32", "--tokens", "64")
    return [str(DEMO), "--calib", text, "--texts", text, *sizes, "--types", MIX, "--results", str(folder / "lines.jsonl"), *more]


def bench_of(folder: Path, *rows: str) -> Bench:
    bench = Bench(folder=DEMO, work=folder / "work", options=arguments(command_line(folder, "--rows", *rows)))
    bench.work.mkdir(exist_ok=True)
    return bench


def test_rows_are_made_and_measured(tmp_path: Path, asked: list[tuple[str, ...]]) -> None:
    """A copy of the original has no divergence, which a file of 8 bits has; both rows of llama.cpp read the original."""
    bench, results = bench_of(tmp_path, LLAMA, IMATRIX, ROUNDED), Results(tmp_path / "lines.jsonl")
    measure_missing(bench, results)
    kls = {row: results.records[cell_of(bench, row, MIX)]["texts"]["text"]["kl"] for row in (LLAMA, IMATRIX, ROUNDED)}
    assert kls[LLAMA] == kls[IMATRIX] == 0 < kls[ROUNDED] < 0.01
    assert results.records[cell_of(bench, ROUNDED, MIX)]["types"]["blk.0.ffn_up.weight"] == "Q8_0"
    matrix = str(bench.work / "text-2x32-0.imatrix")
    assert [call[0] for call in asked] == ["quantize", "imatrix", "quantize"]
    assert matrix in asked[1]
    assert asked[2][:3] == ("quantize", "--imatrix", matrix)
    assert all(str(bench.original) in call for call in asked)


def test_the_matrix_is_of_the_windows_that_ptq_draws(tmp_path: Path) -> None:
    text = bench_of(tmp_path, LLAMA).calibration()
    whole = (tmp_path / "text.txt").read_text(encoding="utf-8")
    assert 100 < len(text) < len(whole) / 4
    assert text[:60] in whole


def test_a_run_goes_on_where_it_was(tmp_path: Path, asked: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    bench, results = bench_of(tmp_path, LLAMA), Results(tmp_path / "lines.jsonl")
    measure_missing(bench, results)

    def failing(*ignored: Any) -> None:
        raise RuntimeError("no such option")

    monkeypatch.setattr(Bench, "make", failing)
    measure_missing(bench_of(tmp_path, LLAMA, *QUANTIZED), Results(tmp_path / "lines.jsonl"))
    found = Results(tmp_path / "lines.jsonl")
    assert found.finished(cell_of(bench, LLAMA, MIX))
    assert {row: found.records[cell_of(bench, row, MIX)]["failed"] for row in QUANTIZED} == dict.fromkeys(QUANTIZED, "no such option")


def record(types: dict[str, str], kl: float) -> dict[str, Any]:
    text = {"original": 30.0, "perplexity": 31.5, "kl": kl, "kl_error": 0.001, "kl_windows": [kl, kl], "top1": 0.9}
    return {"bytes": 12_340_000, "types": types, "cpu_seconds": 3.2, "texts": {"text": text}}


def test_the_table_tells_shares_and_other_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = record({"a": "Q4_K", "b": "Q6_K"}, 0.02), record({"a": "Q4_K", "b": "Q4_K"}, 0.01)
    assert types_of(first, first) == "Q4_K 1 Q6_K 1"
    assert types_of(second, first) == "Q4_K 2*"
    Console(width=200).print(table_of(MIX, bench_of(tmp_path, LLAMA), {LLAMA: first, ROUNDED: second}))
    lines = capsys.readouterr().out.splitlines()
    assert "original's perplexity: text 30.000" in lines[0]
    assert lines[-1].split() == ["ptq", "convert", "12.3", "Q4_K", "2*", "31.500", "0.0100", "±0.0010", "0.50", "90.0%", "3"]


def test_what_failed_is_told_under_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bench = bench_of(tmp_path, ROUNDED)
    Results(tmp_path / "lines.jsonl").add(cell_of(bench, ROUNDED, MIX), {"failed": "the disk is full"})
    monkeypatch.setattr("sys.argv", ["gguf_table.py", *command_line(tmp_path, "--rows", ROUNDED, "--print")])
    main()
    assert f"{ROUNDED}: the disk is full" in capsys.readouterr().out

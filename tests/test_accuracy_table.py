"""``scripts/accuracy_table.py``: rows that the real types know, numbers against those of ``ptq eval``, a run that goes on, the table."""

from __future__ import annotations

import math
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy_measure import divergence, ratio_error, remember, standard_error, windows_of
from accuracy_peers import PACKAGES, PEERS, most_values, with_weights
from accuracy_rows import ACTIVATIONS, BEFORE, SUBJECTS, WEIGHTS, Row, recipe_of, rows_of
from accuracy_table import Bench, Cell, Results, arguments, cells_of, measure_cell, subject_of, summary, table_of, tables
from compare_commits import ROOT
from rich.console import Console
from safetensors.torch import save_file
from tiny import make_model, token_ids
from torch import Tensor, nn

from ptqcli.evaluation.divergence import compare
from ptqcli.model.linears import is_linear, linear_weight
from ptqcli.pipeline.prepare import plan_run
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources

SEQLEN = 16

# Rows


@pytest.mark.parametrize("scheme", ["w2a16-g64", "w8a8"])
def test_every_row_of_this_code_is_planned(scheme: str) -> None:
    for row in rows_of(scheme).values():
        if row.peer is None and row.commit is None:
            recipe = load_recipe(flags={"nsamples": 4, "seqlen": 64, **recipe_of(row, scheme, 0)})
            _, plan = plan_run(SUBJECTS["demo"].folder, recipe, Resources())
            assert len(plan.linears) == 28, row


def test_rows_of_the_older_code_name_keys_that_it_had() -> None:
    """Nothing that came later may be asked of it."""
    for row in [*WEIGHTS.values(), *ACTIVATIONS.values()]:
        if row.commit == BEFORE:
            assert set(recipe_of(row, "w4a16-g64", 0)) <= {"algo", "wbits", "group_size", "scale_search", "act_order"}


def test_every_peer_has_its_script_and_packages() -> None:
    named = {row.peer for row in WEIGHTS.values() if row.peer is not None}
    assert named == set(PACKAGES) == {file.stem.removeprefix("run_") for file in PEERS.glob("run_*.py")}
    [ours] = PACKAGES["llm_compressor"]
    assert f'peers = ["{ours}"]' in (ROOT / "pyproject.toml").read_text()  # what bench_quantize.py compares with


# Numbers


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_divergence_is_what_ptq_eval_measures(architecture: str, tmp_path: Path) -> None:
    original, other = make_model(tmp_path / "a", architecture), make_model(tmp_path / "b", architecture, seed=1)
    ids = token_ids(11 * SEQLEN + 3)[0]
    text = remember(original, windows_of(ids, len(ids), SEQLEN, None), tmp_path / "kept", "a")
    found, truth = divergence(other, text), compare(other, original, ids, SEQLEN)
    assert found["perplexity"] == pytest.approx(truth.model.perplexity, rel=1e-5)
    assert found["original"] == text.perplexity == pytest.approx(truth.baseline.perplexity, rel=1e-5)
    assert found["kl"] == pytest.approx(truth.mean_kl, rel=1e-4)
    assert found["top1"] == pytest.approx(truth.top1_agreement)
    assert len(found["kl_windows"]) == 11
    assert sum(found["kl_windows"]) / 11 == pytest.approx(found["kl"], abs=1e-6)
    assert divergence(original, text)["kl"] == pytest.approx(0, abs=1e-6)


def test_the_original_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = make_model(tmp_path / "a")
    windows = windows_of(token_ids(64)[0], 64, SEQLEN, None)
    first = remember(original, windows, tmp_path / "kept", "a")
    calls: list[int] = []
    original.model.register_forward_pre_hook(lambda *_: calls.append(1))
    again = remember(original, windows, tmp_path / "kept", "a")
    assert torch.equal(first.hidden, again.hidden)
    assert len(calls) == 2  # of the first window, to see that the head makes the logits
    remember(original, windows, tmp_path / "kept", "another model")
    assert len(calls) > 4


def test_a_model_whose_logits_are_more_than_its_heads_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "a", "gemma2")  # caps them
    model.config.final_logit_softcapping = 0.01
    with pytest.raises(SystemExit, match="does more to its logits"):
        remember(model, windows_of(token_ids(32)[0], 32, SEQLEN, None), tmp_path / "kept", "a")


def test_windows_follow_each_other() -> None:
    ids = torch.arange(50)
    assert windows_of(ids, 50, 16, None).tolist() == [list(range(start, start + 16)) for start in (0, 16, 32)]
    assert windows_of(ids, 40, 16, bos=7).tolist() == [[7, *range(start, start + 15)] for start in (0, 15)]
    with pytest.raises(SystemExit, match="50 tokens"):
        windows_of(ids, 100, 64, None)


def test_standard_error_is_that_of_a_mean() -> None:
    assert standard_error([1.0, 2.0, 4.0, 5.0]) == pytest.approx(math.sqrt(10 / 3 / 4))
    assert standard_error([1.0]) is None


def test_the_error_of_a_share_leaves_out_what_both_have_in_common() -> None:
    below = [1.0, 2, 5, 4]
    assert ratio_error([value / 2 for value in below], below) == pytest.approx(0)
    assert ratio_error([1.0, 2, 3, 4], below) == pytest.approx(standard_error([1 / 6, 1 / 3, -7 / 6, 2 / 3]) / 3, rel=1e-6)
    assert ratio_error([1.0], [2.0]) is None


# Peers


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A model folder, and its weights rounded to 4 values a group of 16."""
    folder = tmp_path_factory.mktemp("peer")
    model = make_model(folder / "model", "gpt2")
    head = model.get_output_embeddings()
    weights = {}
    for name, module in model.named_modules():
        if is_linear(module) and module is not head:
            matrix = linear_weight(module).detach()
            groups = matrix.reshape(-1, 16)
            scale = groups.abs().amax(1, keepdim=True) / 2
            weights[name] = (scale * (groups / scale).round().clamp(-2, 1)).reshape(matrix.shape).contiguous()
    return folder / "model", weights


def hand_over(weights: dict[str, Tensor], folder: Path) -> Path:
    folder.mkdir()
    save_file(weights, folder / "weights.safetensors")
    return folder


def test_weights_of_a_peer_stand_in_the_model(rounded: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    original, weights = rounded
    model = with_weights(original, hand_over(weights, tmp_path / "out"), "w2a16-g16")
    for name, expected in weights.items():
        assert torch.equal(linear_weight(model.get_submodule(name)), expected)


def test_more_values_than_the_bits_can_say_are_refused(rounded: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    original, weights = rounded
    name = next(iter(weights))
    changed = weights[name].clone()
    changed[0, :5] = torch.arange(5) + 10.0
    with pytest.raises(RuntimeError, match="more than 2 bits can say"):
        with_weights(original, hand_over({**weights, name: changed}, tmp_path / "more"), "w2a16-g16")
    with pytest.raises(RuntimeError, match="other linears"):
        with_weights(original, hand_over({k: v for k, v in weights.items() if k != name}, tmp_path / "less"), "w2a16-g16")


def test_values_are_counted_group_by_group() -> None:
    assert most_values(torch.tensor([[1.0, 1, 2, 2], [0, 0, 0, 0]]), 4) == 2
    assert most_values(torch.tensor([[1.0, 2, 3, 4], [5, 5, 5, 5]]), 2) == 2


def test_transposed_linears_are_made_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PEERS)
    from exchange import Request, linears_of

    original = make_model(tmp_path / "model", "gpt2")
    request = Request(model=str(tmp_path / "model"), windows="", output="", bits=4, group_size=16, seed=0, options={})
    plain: Any = request.load()
    ids = token_ids(SEQLEN)
    assert torch.allclose(plain(ids).logits, original(ids).logits, atol=1e-5)
    linears = linears_of(plain)
    assert all(type(linear) is nn.Linear for linear in linears.values())
    assert linears["transformer.h.0.mlp.c_fc"].weight.shape == (256, 64)


# A run that goes on


CELL = Cell(model="demo", scheme="w4a16-g128", row="gptq", seed=0, settings="here")


def record(kl: float, cpu_seconds: float = 1.0) -> dict[str, Any]:
    text = {"original": 10.0, "perplexity": 11.0, "rise": 1.0, "kl": kl, "kl_error": kl / 10, "top1": 0.9, "kl_windows": [kl]}
    return {"cpu_seconds": cpu_seconds, "bits_per_weight": 4.125, "texts": {"builtin": text}}


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "new" / "results.jsonl"
    other = replace(CELL, seed=1)
    results = Results(file)
    results.add(CELL, record(0.5))
    results.add(CELL, record(0.25))
    results.add(other, {"failed": "no room"})
    again = Results(file)
    assert again.finished(CELL)
    assert again.records[CELL]["texts"]["builtin"]["kl"] == 0.25
    assert not again.finished(other)
    assert not again.finished(replace(CELL, settings="elsewhere"))


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    Results(file).add(CELL, record(0.5))
    Results(file).add(replace(CELL, seed=1), record(0.5))
    file.write_bytes(file.read_bytes()[:-20])
    results = Results(file)
    assert results.finished(CELL)
    assert not results.finished(replace(CELL, seed=1))
    results.add(replace(CELL, seed=1), record(0.75))
    assert Results(file).records == results.records
    assert len(Results(file).records) == 2


def test_a_finished_cell_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def run(self: Bench, scheme: str, row: Row, seed: int, trees: object) -> dict[str, Any]:
        runs.append(f"{scheme} {row.changes['algo']} {seed}")
        if scheme == "w2a16-g64":
            raise RuntimeError("no room")
        return record(0.5)

    monkeypatch.setattr(Bench, "run", run)
    bench = Bench("demo", SUBJECTS["demo"], tmp_path)
    results = Results(tmp_path / "results.jsonl")
    for again in ([], [], ["gptq"]):
        for scheme in ("w4a16-g128", "w2a16-g64"):
            measure_cell(bench, scheme, "gptq", 0, results, again, {})
    assert runs.count("w4a16-g128 gptq 0") == 2
    assert runs.count("w2a16-g64 gptq 0") == 3  # it failed each time
    assert [entry.get("failed") for entry in Results(results.file).records.values()] == [None, "no room"]


# The command line and the table


def asked(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    monkeypatch.setattr("sys.argv", ["accuracy_table.py", *words])
    return arguments()


def test_cells_are_rows_by_schemes_by_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = asked(monkeypatch, "demo", "--schemes", "w4a16-g64", "w8a8", "--rows", "gptq", "rtn", "smoothquant", "--seeds", "0", "5")
    bench = Bench("demo", subject_of("demo", options), tmp_path)
    found = [(scheme, name, seed) for _, scheme, name, seed in cells_of([bench], options)]
    rows = [("w4a16-g64", "rtn"), ("w4a16-g64", "gptq"), ("w8a8", "rtn"), ("w8a8", "smoothquant")]
    assert found == [(*row, seed) for row in rows for seed in (0, 5)]
    with pytest.raises(SystemExit, match="no row is called 'gptqq'"):
        list(cells_of([bench], asked(monkeypatch, "demo", "--rows", "gptqq")))


def test_the_command_line_changes_a_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    options = asked(monkeypatch, "smollm2", "--calib", "c4.txt", "--texts", "wiki.raw", "code.txt", "--tokens", "100", "--nsamples", "8")
    subject = subject_of("smollm2", options)
    assert subject == replace(SUBJECTS["smollm2"], calib="c4.txt", texts={"wiki": "wiki.raw", "code": "code.txt"}, tokens=100, nsamples=8)
    assert subject_of("some/folder", options).folder == Path("some/folder")


def printed(entries: list[dict[str, Any]]) -> list[str]:
    """The lines that are not empty."""
    out = StringIO()
    for part in tables(entries, "gptq, 5a5594a"):
        Console(width=200, file=out).print(part)
    return [line for line in out.getvalue().splitlines() if line.strip()]


def test_the_table_tells_shares_costs_and_spreads() -> None:
    entries = [
        {**vars(CELL), "row": "gptq", "seed": 1, **record(0.3)},
        {**vars(CELL), **record(0.1, cpu_seconds=3.0)},
        {**vars(CELL), "row": "gptq, 5a5594a", **record(0.4)},
        {**vars(CELL), "row": "hqq", "failed": "no room"},
    ]
    [title, heads, older, newer, failed] = printed(entries)
    assert "demo, w4a16-g128 (here)" in title
    assert "10.000" in title
    assert heads.split() == ["bits", "perplexity", "rise", "KL,", "nats", "spread", "of", "gptq,", "5a5594a", "top-1", "cost"]
    assert older.split() == ["gptq,", "5a5594a", "4.125", "11.000", "1.000", "0.4000", "±0.0400", "1.00", "90.0%", "0.50"]
    assert newer.split() == ["gptq", "4.125", "11.000", "1.000", "0.2000", "±0.0200", "0.2000", "0.50", "90.0%", "1.00"]
    assert failed == "demo, w4a16-g128, hqq: no room"


def test_a_second_text_has_columns_of_its_own() -> None:
    entry = record(0.2)
    entry["texts"]["code"] = {**entry["texts"]["builtin"], "kl": 0.7, "kl_error": None}
    table = table_of("t", {"gptq": summary([entry])}, "gptq")
    assert [str(column.header) for column in table.columns][2:] == [
        *("perplexity", "rise", "KL, nats", "of gptq", "top-1"),
        *("code: perplexity", "code: rise", "code: KL, nats", "code: of gptq", "code: top-1", "cost"),
    ]
    assert list(table.columns[9].cells) == ["0.7000"]

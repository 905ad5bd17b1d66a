"""``ptq compare`` and ``ptq eval`` with several checkpoints: numbers, what is refused, what is kept when one fails."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import Ptq, one_line
from tiny import byte_tokenizer, make_model, write_text

import ptqcli
from ptqcli.calibration.text import evaluation_ids
from ptqcli.cli import compare_flags, run
from ptqcli.comparing import run as comparing
from ptqcli.comparing import texts
from ptqcli.comparing.flips import count_flips
from ptqcli.comparing.identity import PARTIAL, checkpoint_digest
from ptqcli.comparing.results import front
from ptqcli.comparing.run import Settings, compare_checkpoints
from ptqcli.errors import PTQError, UsageError
from ptqcli.evaluation.answers import TaskResult, mcnemar, share
from ptqcli.evaluation.measure import score
from ptqcli.model.locate import demo_model
from ptqcli.runtime.models import load_model

CPU = torch.device("cpu")
LINE = ("--ppl", "text.txt", "--seqlen", "32")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, three checkpoints of it, a model with another vocabulary, two texts."""
    folder = tmp_path_factory.mktemp("compare")
    make_model(folder / "model", num_hidden_layers=1)
    make_model(folder / "larger", num_hidden_layers=1, vocab_size=300)
    write_text(folder / "text.txt", words=420)
    write_text(folder / "other.txt", words=220, seed=1)
    for bits in (8, 4, 2):
        line = ["quantize", str(folder / "model"), "--algo", "rtn", "--wbits", str(bits), "--group-size", "32", "--quiet"]
        assert run([*line, "--output", str(folder / f"w{bits}")]) == 0
    return folder


@pytest.fixture(scope="module")
def found(workshop: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What is known of all three on both texts."""
    folders = {f"w{bits}": workshop / f"w{bits}" for bits in (8, 4, 2)}
    settings = Settings(texts=[str(workshop / "text.txt"), str(workshop / "other.txt")], seqlen=32, device=CPU)
    return compare_checkpoints(folders, workshop / "model", settings).to_json()


def test_the_numbers_are_those_of_each_by_itself(workshop: Path, found: dict[str, Any]) -> None:
    for bits, checkpoint in zip((8, 4, 2), found["checkpoints"], strict=True):
        expected = ptqcli.evaluate(workshop / f"w{bits}", [str(workshop / "text.txt"), str(workshop / "other.txt")], seqlen=32)
        for result, alone in zip(checkpoint["results"], expected, strict=True):
            assert {key: getattr(alone, key) for key in result} == result
        assert bits + 1 < checkpoint["bits_per_weight"] < bits + 1.1  # a scale of 32 bits for 32 weights, and each shape
        assert checkpoint["schemes"] == {f"w{bits}a16-g32": 7}
        assert checkpoint["bytes"] < found["baseline"]["bytes"]
    kl = [checkpoint["results"][0]["mean_kl"] for checkpoint in found["checkpoints"]]
    assert 0 < kl[0] < kl[1] < kl[2]


def test_pairs_are_paired(workshop: Path, found: dict[str, Any]) -> None:
    """Differences token by token of models that are loaded here; the error is a bootstrap's over windows, not that of two means."""
    text = str(workshop / "text.txt")
    rows, original = {text: evaluation_ids(text, byte_tokenizer())}, load_model(workshop / "model")
    one, other = (next(iter(score(load_model(workshop / f"w{bits}"), rows, original, 32)))[1] for bits in (8, 4))
    [pair] = [each for each in found["pairs"] if (each["text"], each["one"], each["other"]) == (text, "w8", "w4")]
    differences = (other.losses.double() - one.losses.double()).numpy()
    windows = differences.reshape(-1, 31)
    assert pair["loss_difference"] == pytest.approx(differences.mean(), abs=1e-12)
    generator = np.random.default_rng(0)
    drawn = [windows[generator.integers(len(windows), size=len(windows))].mean() for _ in range(3000)]
    assert pair["loss_difference_error"] == pytest.approx(np.std(drawn), rel=0.06)
    assert other.kl is not None
    assert one.kl is not None
    assert pair["kl_difference"] == pytest.approx(float((other.kl.double() - one.kl.double()).mean()), abs=1e-12)
    errors = [checkpoint["results"][0]["mean_nll_error"] for checkpoint in found["checkpoints"][:2]]
    assert pair["loss_difference_error"] < 0.5 * math.hypot(*errors)
    assert len(found["pairs"]) == 2 * 3


def test_the_front() -> None:
    points = {"a": (1.0, 5.0), "b": (2.0, 3.0), "c": (2.0, 4.0), "d": (3.0, 3.0), "e": (4.0, 1.0)}
    assert front(points) == ["a", "b", "e"]
    assert front({"one": (1.0, 1.0), "same": (1.0, 1.0)}) == ["one", "same"]


def test_conditions_say_what_the_numbers_depend_on(workshop: Path, found: dict[str, Any]) -> None:
    conditions = found["conditions"]
    assert (conditions["seqlen"], conditions["stride"], conditions["bos"]) == (32, 32, False)
    assert (conditions["device"], conditions["kernel"]) == ("cpu", "auto")
    assert conditions["versions"]["torch"] == torch.__version__
    assert set(conditions["versions"]) == {"ptqcli", "torch", "transformers", "python"}
    text = conditions["texts"][0]
    assert text["sha256"] == hashlib.sha256((workshop / "text.txt").read_bytes()).hexdigest()
    ids = evaluation_ids(text["text"], byte_tokenizer())
    assert text["ids_sha256"] == hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
    assert (text["tokens"], text["of"]) == (len(ids), len(ids))
    listed = found["checkpoints"][0]
    assert (listed["sha256_of"], found["baseline"]["sha256_of"]) == ("SHA256SUMS", PARTIAL)
    assert listed["sha256"] == hashlib.sha256((workshop / "w8" / "SHA256SUMS").read_bytes()).hexdigest()
    assert listed["dtype"] == "float32"
    assert sum(listed["kernels"].values()) == 7


def test_the_digest_of_a_foreign_folder_changes_with_its_files(tmp_path: Path) -> None:
    make_model(tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "model" / "SHA256SUMS").write_text("0123  model.safetensors\n")  # not of our form
    before = checkpoint_digest(tmp_path / "model")
    assert before.of == PARTIAL
    assert checkpoint_digest(tmp_path / "model") == before
    with open(tmp_path / "model" / "model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"x")
    assert checkpoint_digest(tmp_path / "model").sha256 != before.sha256


def test_one_checkpoint_is_in_memory_at_a_time(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = []

    def watched(*given: Any, **named: Any) -> Any:
        model = load_model(*given, **named)
        alive.add(model)
        most.append(len(alive))
        return model

    monkeypatch.setattr(comparing, "load_model", watched)
    folders = {f"w{bits}": workshop / f"w{bits}" for bits in (8, 4, 2)}
    compare_checkpoints(folders, workshop / "model", Settings(texts=[str(workshop / "text.txt")], seqlen=32, device=CPU))
    assert most == [1, 2, 2, 2]


@pytest.mark.parametrize("command", ["compare", "eval"])
def test_both_commands_show_them_side_by_side(ptq: Ptq, at_work: Path, command: str) -> None:
    answer = ptq(command, "w8", "w4", *LINE, "--tokens", "640")
    assert answer.code == 0, answer.err
    for said in (
        "model (baseline)",
        "w8 *",
        "same top-1",
        "w8, w4",
        "640 tokens in 20 windows",
        "SHA-256",
        "windows of 32 tokens",
        "no BOS",
    ):
        assert said in answer.out.replace("620 tokens in 20", "640 tokens in 20"), said
    both = [json.loads(ptq(each, "w8", "w4", *LINE, "--json").out) for each in ("compare", "eval")]
    assert both[0]["checkpoints"] == both[1]["checkpoints"]


def test_eval_without_a_baseline_compares_perplexities(ptq: Ptq, at_work: Path) -> None:
    facts = json.loads(ptq("eval", "w8", "w4", *LINE, "--no-baseline", "--json").out)
    assert facts["baseline"] is None
    assert all("mean_kl" not in each["results"][0] for each in facts["checkpoints"])
    assert facts["pairs"][0]["kl_difference"] is None
    assert facts["pairs"][0]["loss_difference_error"] > 0


def test_the_function_says_what_the_command_does(ptq: Ptq, at_work: Path) -> None:
    shown = json.loads(ptq("compare", "w8", "w4", *LINE, "--tokens", "640", "--json").out)
    assert json.loads(json.dumps(ptqcli.compare(["w8", "w4"], "text.txt", tokens=640, seqlen=32).to_json())) == shown
    with pytest.raises(UsageError, match="model: which model it came from is not known, or it is gone; name it with baseline="):
        ptqcli.compare(["model"])


# Which texts


def test_the_texts_that_are_here_are_measured_where_none_is_named(
    ptq: Ptq, at_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wikitext2 where the data folder has it, c4 where it does not, each bounded; a text that is named is measured whole."""
    monkeypatch.setattr(texts, "USUAL_TOKENS", 1000)
    monkeypatch.setattr(comparing, "USUAL_TOKENS", 1000)
    write_text(tmp_path / "wiki.test.raw", words=900)
    facts = json.loads(ptq("compare", "w8", "--seqlen", "32", "--data-dir", tmp_path, "--json").out)
    shown = {text["text"]: text["tokens"] for text in facts["conditions"]["texts"]}
    assert shown == {"builtin": 1000, "wikitext2": 1000}
    named = json.loads(ptq("compare", "w8", *LINE, "--json").out)["conditions"]["texts"][0]
    assert named["tokens"] == named["of"] > 1000
    cut = json.loads(ptq("compare", "w8", *LINE, "--tokens", "500", "--json").out)["conditions"]["texts"][0]
    assert cut["tokens"] == 500 < cut["of"]


def test_flags_and_library_say_the_same() -> None:
    assert compare_flags.USUAL_TOKENS == texts.USUAL_TOKENS
    assert compare_flags.PUBLISHED_SEQLEN == ptqcli.evaluation.measure.PUBLISHED_SEQLEN  # type: ignore[attr-defined]


def test_a_text_that_was_calibrated_on_is_named(ptq: Ptq, at_work: Path, tmp_path: Path) -> None:
    line = ("quantize", "model", "--calib", "text.txt", "--nsamples", "40", "--seqlen", "32", "--group-size", "32", "--algo", "gptq")
    assert ptq(*line, "--output", tmp_path / "small").code == 0
    answer = ptq("eval", tmp_path / "small", *LINE, "--ppl", "other.txt", "--json")
    facts = json.loads(answer.out)["calibration_overlap"]
    share = 40 * 32 / len((at_work / "text.txt").read_text())
    assert facts["text.txt"]["share"] == pytest.approx(share, abs=0.08)
    assert facts["other.txt"]["share"] < 0.01
    assert f"{facts['text.txt']['share']:.0%} of text.txt stood in the calibration text of {tmp_path / 'small'}" in answer.err
    assert "other.txt stood" not in answer.err
    rounded = json.loads(ptq("eval", "w8", *LINE, "--json").out)["calibration_overlap"]
    assert rounded["text.txt"]["share"] == 0  # nothing was calibrated
    foreign = ptq("eval", "model", *LINE, "--json")
    assert json.loads(foreign.out)["calibration_overlap"]["text.txt"] is None
    assert "nothing tells which text it was calibrated on" in foreign.err


def test_a_damaged_fingerprint_names_the_checkpoint(ptq: Ptq, at_work: Path, tmp_path: Path) -> None:
    line = ("quantize", "model", "--calib", "text.txt", "--nsamples", "8", "--seqlen", "32", "--group-size", "32", "--algo", "gptq")
    assert ptq(*line, "--output", tmp_path / "small").code == 0
    report = tmp_path / "small" / "ptq_report.json"
    facts = json.loads(report.read_text())
    facts["calibration"]["fingerprint"]["hashes"] = "x"
    report.write_text(json.dumps(facts))
    answer = ptq("eval", tmp_path / "small", *LINE)
    assert answer.code == 1
    assert f"{tmp_path / 'small'}: the fingerprint of the calibration text is damaged; delete ptq_report.json" in one_line(answer)


# What cannot be


REFUSED = [
    ("compare w8 nowhere", 2, "nowhere: no such folder"),
    ("compare", 2, "Missing argument"),
    ("compare model", 2, "model: which model it came from is not known, or it is gone; name it with --baseline"),
    ("compare w8 w8", 2, "a checkpoint is named twice"),
    ("compare w8 ./w8", 2, "a checkpoint is named twice"),
    ("compare w8 larger --baseline model", 2, "larger: has a vocabulary of 300 tokens and the baseline"),
    ("compare w8 --baseline nowhere", 2, "nowhere: no such folder"),
    ("compare w8 --ppl nowhere.txt", 2, "nowhere.txt"),
    ("compare w8 --html page.txt", 2, "--html page.txt: only HTML is written; name a file that ends in .html"),
    ("compare w8 --csv no/such.csv", 2, "--csv no/such.csv: there is no folder no; make it first"),
    ("compare w8 --overwrite", 2, "--overwrite has no effect without"),
    ("compare w8 --ppl text.txt --tokens 1", 2, "--tokens"),
    ("compare w8 --ppl text.txt --tokens 20 --seqlen 32", 2, "the text has 20 tokens, less than one window of 32"),
    ("compare w8 --ppl text.txt --seqlen 129", 2, "128 positions"),
    ("eval w8 w4 --baseline model --no-baseline", 2, "exclude each other"),
    ("eval w8 w4 --adapter model", 2, "--adapter model: belongs to one checkpoint"),
]


@pytest.mark.parametrize(("line", "code", "said"), REFUSED, ids=[line for line, _, _ in REFUSED])
def test_refusals_are_one_line(ptq: Ptq, at_work: Path, line: str, code: int, said: str) -> None:
    answer = ptq(*line.split())
    assert answer.code == code
    assert said in one_line(answer)


def test_checkpoints_of_different_models_want_a_baseline(ptq: Ptq, at_work: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "twin", num_hidden_layers=1, seed=1)
    assert ptq("quantize", tmp_path / "twin", "--algo", "rtn", "--group-size", "32", "--output", tmp_path / "w4").code == 0
    answer = ptq("compare", "w8", tmp_path / "w4", *LINE)
    assert answer.code == 2
    assert f"w8 was made from {at_work / 'model'} and {tmp_path / 'w4'} from {tmp_path / 'twin'}; name the model" in one_line(answer)
    assert ptq("compare", "w8", tmp_path / "w4", *LINE, "--baseline", "model").code == 0


def test_one_that_fails_loses_nothing_of_the_others(ptq: Ptq, at_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged one between two sound ones: their numbers are told and written, the exit code is 1, the error names it."""

    def failing(folder: Path, *given: Any, **named: Any) -> Any:
        if folder.name == "w4":
            raise PTQError(f"{folder}: is damaged")
        return load_model(folder, *given, **named)

    monkeypatch.setattr(comparing, "load_model", failing)
    page, rows = tmp_path / "page.html", tmp_path / "rows.csv"
    answer = ptq("compare", "w8", "w4", "w2", *LINE, "--json", "--html", page, "--csv", rows)
    facts = json.loads(answer.out)
    assert answer.code == 1
    assert [each["name"] for each in facts["checkpoints"]] == ["w8", "w2"]
    assert [each["checkpoint"] for each in facts["failures"]] == ["w4"]
    assert "1 of 3 checkpoints could not be measured: w4: " in one_line(answer)
    assert "w4 could not be measured" in page.read_text()
    assert [row["name"] for row in csv.DictReader(io.StringIO(rows.read_text()))] == ["model", "w8", "w2"]
    alone = ptq("eval", "w4", *LINE)
    assert (alone.code, "is damaged" in one_line(alone)) == (1, True)


# Files


def test_files_are_written_once(ptq: Ptq, at_work: Path, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"found.{kind}" for kind in ("csv", "html", "png")}
    line = ("compare", "w8", "w4", *LINE, "--csv", files["csv"], "--html", files["html"], "--plot", files["png"])
    assert ptq(*line).code == 0
    first = {kind: file.read_bytes() for kind, file in files.items()}
    refused = ptq(*line)
    assert refused.code == 2
    assert "already exists; give --overwrite to replace it" in one_line(refused)
    assert {kind: file.read_bytes() for kind, file in files.items()} == first
    assert ptq(*line, "--overwrite").code == 0
    assert first["png"].startswith(b"\x89PNG")


def test_the_csv_has_every_number(ptq: Ptq, at_work: Path, tmp_path: Path) -> None:
    line = ("compare", "w8", "w4", *LINE, "--ppl", "other.txt", "--tokens", "640", "--csv", tmp_path / "found.csv", "--json")
    facts = json.loads(ptq(*line).out)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "found.csv").read_text())))
    assert [(row["name"], row["text"]) for row in rows] == [
        (name, text) for text in ("text.txt", "other.txt") for name in ("model", "w8", "w4")
    ]
    for row in rows[1:3]:
        [checkpoint] = [each for each in facts["checkpoints"] if each["name"] == row["name"]]
        for key, value in checkpoint["results"][0].items() - {each for each in checkpoint["results"][0].items() if "baseline" in each[0]}:
            assert row[key] == (value if isinstance(value, str) else str(value)), key
        assert int(row["bytes"]) == checkpoint["bytes"]
    assert float(rows[0]["perplexity"]) == facts["checkpoints"][0]["results"][0]["baseline_perplexity"]


# Answers


def answers_of(right: Sequence[bool], task: str = "task") -> TaskResult:
    given = ["yes" if each else "no" for each in right]
    return TaskResult(task=task, kind="choices", answers=given, expected=["yes"] * len(right), right=right, scores={"acc": share(right)})


def test_flips_and_their_test() -> None:
    """Against SciPy's numbers for McNemar's exact test: 2 lost and 8 gained, p = 0.109375; 1 and 9, 0.021484375."""
    assert (mcnemar(2, 8), mcnemar(9, 1), mcnemar(0, 0), mcnemar(5, 5)) == (0.109375, 0.021484375, 1.0, 1.0)
    before = [True] * 60 + [False] * 40
    now = [True] * 58 + [False] * 2 + [True] * 8 + [False] * 32
    [found] = count_flips({"task": answers_of(now), "unasked": answers_of([True])}, {"task": answers_of(before)})
    assert (found.changed, found.lost, found.gained, found.p_value) == (10, 2, 8, 0.109375)
    assert (found.accuracy, found.baseline_accuracy) == (0.66, 0.6)
    differences = np.array(now, dtype=float) - np.array(before, dtype=float)
    assert found.accuracy_rise == pytest.approx(0.06)
    assert found.accuracy_rise_error == pytest.approx(differences.std(ddof=1) / 10)
    with pytest.raises(PTQError, match="task t: the checkpoint and the baseline were not asked the same questions"):
        count_flips({"t": answers_of([True], "t")}, {"t": answers_of([True, False], "t")})


def test_questions_are_put_to_each_model(workshop: Path) -> None:
    asked = []

    def ask(model: Any, tokenizer: Any, step: Any) -> dict[str, TaskResult]:
        asked.append(model)
        step(1, 2, "task")
        return {"task": answers_of([True, len(asked) == 1])}

    settings = Settings(texts=[str(workshop / "text.txt")], seqlen=32, device=CPU, ask=ask)
    compared = compare_checkpoints({"w8": workshop / "w8", "w2": workshop / "w2"}, workshop / "model", settings)
    assert [[(flip.changed, flip.lost) for flip in each.flips] for each in compared.measured] == [[(1, 1)], [(1, 1)]]
    assert len(asked) == 3
    [task] = compared.to_json()["checkpoints"][0]["tasks"]
    assert task["flips"]["lost"] == 1
    assert [row["baseline_right"] for row in task["answers"]] == [True, True]


def test_questions_of_a_file_need_no_text(workshop: Path, tmp_path: Path, ptq: Ptq) -> None:
    rows = [{"question": "the model of", "choices": [" the", " zero"], "answer": number % 2} for number in range(4)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--baseline", workshop / "model", "--tasks", tmp_path / "q.jsonl", "--answers", tmp_path / "a.jsonl", "--json")
    answer = ptq("compare", workshop / "w8", workshop / "w2", *flags)
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert [each["flips"][0]["accuracy"] for each in found["checkpoints"]] == [0.5, 0.5]
    assert [each["results"] for each in found["checkpoints"]] == [[], []]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(line["checkpoint"], line["question"]) for line in lines] == [
        (str(workshop / name), number) for name in ("w8", "w2") for number in range(4)
    ]


def test_an_encoder_is_not_compared(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "is_encoder", lambda config: True)
    with pytest.raises(UsageError, match="w8: is an encoder, which has no perplexity"):
        compare_checkpoints({"w8": workshop / "w8"}, None, Settings(device=CPU))


def test_speed_is_measured_beside_the_baseline(ptq: Ptq, at_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ptqcli.bench.machine.Machine(  # type: ignore[attr-defined]
        name="test", device="cpu", threads=1, cache_bytes=1, bandwidth=1e9, arithmetic={"float32": 1e9}
    )
    monkeypatch.setattr("ptqcli.bench.machine.measure", lambda *_: limits)
    monkeypatch.setattr("ptqcli.comparing.speed.SECONDS", 0.01)
    answer = ptq("compare", "w8", *LINE, "--speed", "--json")
    speed = json.loads(answer.out)["checkpoints"][0]["speed"]
    assert speed["prompt"] == 96
    assert all(speed[key] > 0 for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "prefill_gain", "decode_gain"))
    assert "Speed, a prompt of 96 tokens" in answer.err


def test_the_demo_model_has_no_fingerprint_and_is_measured() -> None:
    """The default of `ptq eval` on the package's own model: the built-in text alone, where the machine has no other."""
    settings = Settings(tokens=600, seqlen=64, device=CPU)
    [measured] = compare_checkpoints({"demo": demo_model()}, None, settings).measured
    assert measured.evaluations[0].text == "builtin"
    assert measured.overlaps == {}

"""lm-evaluation-harness: its own numbers on the dequantized model in plain transformers are those of ``ptq eval`` on the packed one, asked
through the harness and without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Ptq, one_line
from loading import DEMO, demo_in
from packed import by_transformers, change_tensor
from questions import next_lines, write_rows
from transformers import AutoTokenizer

from ptqcli.api import quantize
from ptqcli.evaluation.choices import encode_pairs, log_likelihoods
from ptqcli.runtime.models import load_model

evaluator = pytest.importorskip("lm_eval.evaluator")
tasks = pytest.importorskip("lm_eval.tasks")

QUESTIONS = 200
METRICS = ("acc", "acc_norm")
TASK = """
task: next_line
dataset_path: json
dataset_kwargs: {data_files: questions.jsonl}
test_split: train
output_type: multiple_choice
doc_to_text: "{{ context }}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITTEN_TASK = """
task: written
dataset_path: json
dataset_kwargs: {data_files: written.jsonl}
test_split: train
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model packed in 4 bits, the numbers of that in a plain folder, and 200 questions with a task for the harness."""
    place = tmp_path_factory.mktemp("lm_eval")
    quantize(demo_in(place / "demo", torch.float32), algo="rtn", wbits=4, group_size=64, output=place / "packed")
    by_transformers(place / "packed", dequantize=True, dtype=torch.float32).save_pretrained(place / "plain")
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(place / "plain")
    (place / "tasks").mkdir()
    write_rows(next_lines(QUESTIONS), place / "tasks" / "questions.jsonl")
    write_rows(
        [{"prompt": row["context"], "answer": row["choices"][row["answer"]]} for row in next_lines(8)], place / "tasks" / "written.jsonl"
    )
    (place / "tasks" / "next_line.yaml").write_text(TASK, encoding="utf-8")
    (place / "tasks" / "written.yaml").write_text(WRITTEN_TASK, encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def theirs(workshop: Path) -> dict[str, Any]:
    """What the harness finds by itself, with a model that it loads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop / "tasks")
        manager = tasks.TaskManager(include_path=str(workshop / "tasks"), include_defaults=False)
        arguments = {"pretrained": str(workshop / "plain"), "dtype": "float32"}
        found: dict[str, Any] = evaluator.simple_evaluate(
            model="hf", model_args=arguments, tasks=["next_line", "written"], task_manager=manager, device="cpu", batch_size=4
        )
    return found


def scores(ptq: Ptq, checkpoint: Path, task: Path, *flags: str) -> dict[str, Any]:
    answer = ptq("eval", checkpoint, "--tasks", task, "--no-baseline", "--json", *flags)
    assert answer.code == 0, answer.err
    [found] = json.loads(answer.out)["tasks"]
    return dict(found)


def test_the_packed_model_has_their_numbers(ptq: Ptq, workshop: Path, theirs: dict[str, Any]) -> None:
    """Through the harness, and by our own scorer, which finds the same answers."""
    through = scores(ptq, workshop / "packed", workshop / "tasks" / "next_line.yaml")
    own = scores(ptq, workshop / "packed", workshop / "tasks" / "questions.jsonl")
    expected = theirs["results"]["next_line"]
    for metric in METRICS:
        value, error = expected[f"{metric},none"], expected[f"{metric}_stderr,none"]
        for found in (through, own):
            assert found["questions"] == QUESTIONS
            assert abs(found["scores"][metric]["value"] - value) < error
            assert found["scores"][metric]["standard_error"] == pytest.approx(error, rel=1e-6)
        assert own["scores"][metric]["value"] == value
    assert [row["answer"] for row in own["answers"]] == [row["answer"] for row in through["answers"]]


def test_so_has_every_choice(workshop: Path, theirs: dict[str, Any]) -> None:
    """Log likelihoods; the twin, with other scales, has others."""
    samples = sorted(theirs["samples"]["next_line"], key=lambda sample: sample["doc_id"])
    pairs = [tuple(pair) for sample in samples for pair in sample["arguments"]]
    expected = torch.tensor([found[0] for sample in samples for found in sample["filtered_resps"]])
    tokenizer = AutoTokenizer.from_pretrained(workshop / "plain")

    def found() -> torch.Tensor:
        return torch.tensor(log_likelihoods(load_model(workshop / "packed"), encode_pairs(tokenizer, pairs), [""] * len(pairs)))

    torch.testing.assert_close(found(), expected, rtol=1e-4, atol=1e-3)
    change_tensor(workshop / "packed", lambda tensors: [each.mul_(1.1) for name, each in tensors.items() if name.endswith("weight_scale")])
    assert float((found() - expected).abs().mean()) > 0.1


def test_what_is_written_is_the_same(ptq: Ptq, workshop: Path, theirs: dict[str, Any]) -> None:
    through = scores(ptq, workshop / "plain", workshop / "tasks" / "written.yaml")
    samples = sorted(theirs["samples"]["written"], key=lambda sample: sample["doc_id"])
    assert [row["answer"] for row in through["answers"]] == [sample["filtered_resps"][0] for sample in samples]
    assert through["scores"]["exact_match"]["value"] == theirs["results"]["written"]["exact_match,none"]


def test_all_tasks_of_a_folder(ptq: Ptq, workshop: Path) -> None:
    answer = ptq("eval", workshop / "plain", "--tasks", workshop / "tasks", "--no-baseline", "--json", "--limit", "4")
    assert [(found["task"], found["questions"]) for found in json.loads(answer.out)["tasks"]] == [("next_line", 4), ("written", 4)]


def test_python_of_a_folder_runs_only_if_it_may(ptq: Ptq, workshop: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text((workshop / "tasks" / "questions.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "own.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\ndef text(doc): return doc['context']\n"
    )
    files = {"data_files": str(tmp_path / "questions.jsonl")}
    task = TASK.replace('"{{ context }}"', "!function own.text").replace("{data_files: questions.jsonl}", json.dumps(files))
    (tmp_path / "task.yaml").write_text(task, encoding="utf-8")
    line = ("eval", workshop / "plain", "--tasks", tmp_path / "task.yaml", "--no-baseline", "--json", "--limit", "4")
    refused = ptq(*line)
    assert (refused.code, "--trust-task-code" in one_line(refused), (tmp_path / "ran").exists()) == (1, True, False)
    allowed = ptq(*line, "--trust-task-code")
    assert (allowed.code, (tmp_path / "ran").exists()) == (0, True)
    plain = scores(ptq, workshop / "plain", workshop / "tasks" / "next_line.yaml", "--limit", "4")
    assert json.loads(allowed.out)["tasks"][0]["answers"] == plain["answers"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("arc_eazy", "did you mean 'arc_easy'?"),
        ("humaneval", "would run what the model writes as a program"),
        ("arc_easy", "lm-evaluation-harness fails"),  # its data lies on the hub, and tests have no network
    ],
)
def test_a_task_that_cannot_be_asked(ptq: Ptq, name: str, words: str) -> None:
    answer = ptq("eval", DEMO, "--tasks", name, "--no-baseline")
    assert answer.code in (1, 2)
    assert words in one_line(answer)

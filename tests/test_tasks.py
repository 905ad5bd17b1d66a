"""Questions with right answers: scores against loops over single tokens, flips against all cases, rows of files that are wrong."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny
import torch
from commandline import Ptq, one_line
from questions import next_lines, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptqcli.cli import evaluate_tasks
from ptqcli.errors import PTQError, UsageError
from ptqcli.evaluation import exact_match, task_files
from ptqcli.evaluation.answers import TaskResult, flips, mcnemar, share
from ptqcli.evaluation.choices import ChoiceQuestion, answer_choices, encode_pairs, log_likelihoods
from ptqcli.evaluation.exact_match import OpenQuestion, answer_openly, comparable, greedy_answers
from ptqcli.evaluation.harness_files import task_configs
from ptqcli.evaluation.task_files import read_questions
from ptqcli.evaluation.tasks import TaskOptions, read_tasks

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "ptqcli" / "demo"
CHAT = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.make_model(tmp_path_factory.mktemp("tasks") / "model")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.byte_tokenizer()


@torch.no_grad()
def by_single_tokens(model: Any, context: Sequence[int], continuation: Sequence[int]) -> float:
    """log p(continuation | context), one pass a token, in float64."""
    total, ids = 0.0, list(context)
    for token in continuation:
        total += model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token].item()
        ids.append(token)
    return total


# Multiple choice


def choice(context: str, choices: Sequence[str], right: int = 0) -> ChoiceQuestion:
    return ChoiceQuestion(context=context, choices=choices, continuations=[f" {each}" for each in choices], right=right, where="here")


def test_log_likelihoods_are_those_of_single_tokens(model: Any, tokenizer: Any) -> None:
    pairs = encode_pairs(
        tokenizer, [("one two", " three"), ("one two", " 3"), ("one two", " 4"), ("a", "b"), ("longer than all others", "!")]
    )
    found = log_likelihoods(model, pairs, [""] * len(pairs))
    assert found == pytest.approx([by_single_tokens(model, *pair) for pair in pairs], abs=1e-4)
    assert found != pytest.approx([by_single_tokens(model, [0, *pair[0]], pair[1]) for pair in pairs], abs=1e-2)


def test_continuations_of_one_token_share_a_pass(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = type(model).forward

    def counted(self: Any, input_ids: Any = None, **others: Any) -> Any:
        rows.append(len(input_ids))
        return forward(self, input_ids=input_ids, **others)

    monkeypatch.setattr(type(model), "forward", counted)
    told: list[tuple[int, int]] = []
    pairs = encode_pairs(tokenizer, [("one", each) for each in "abcd"])
    log_likelihoods(model, pairs, [""] * 4, lambda done, total: told.append((done, total)))
    assert (rows, told) == ([1], [(4, 4)])


def test_where_a_context_ends(tokenizer: Any) -> None:
    """White space at its end belongs to the continuation; without tokens it is the token that begins a text."""
    first, second, empty = encode_pairs(tokenizer, [("ab", " c"), ("ab \n", "c"), ("", "c")])
    assert [tokenizer.decode(ids) for ids in (*first, *second, *empty)] == ["ab", " c", "ab", " \nc", "<|end|>", "c"]


def test_what_the_tokenizer_writes_in_front_is_there() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 256)])
    assert encode_pairs(tokenizer, [("a", "b")]) == [([256, *tokenizer.encode("a", add_special_tokens=False)], tokenizer.encode("b")[1:])]
    assert encode_pairs(tokenizer, [("a", "b"), ("<|end|>a", "b")], marked=False)[1] == encode_pairs(tokenizer, [("<|end|>a", "b")])[0]


def test_a_context_that_is_too_long_loses_its_left_end(model: Any, tokenizer: Any) -> None:
    long = "x" * 300 + "the end"
    [(context, continuation)] = encode_pairs(tokenizer, [(long, " yes")])
    kept = (context + continuation)[-(tiny.POSITIONS + 1) :]
    [found] = log_likelihoods(model, [(context, continuation)], [""])
    assert found == pytest.approx(by_single_tokens(model, kept[:-4], kept[-4:]), abs=1e-4)
    with pytest.raises(PTQError, match=f"here: a choice has 300 tokens and the model {tiny.POSITIONS} positions"):
        log_likelihoods(model, encode_pairs(tokenizer, [("a", "b" * 300)]), ["here"])
    with pytest.raises(PTQError, match="here: a choice adds no token"):
        log_likelihoods(model, [([1], [])], ["here"])


def test_the_likeliest_choice_is_the_answer(model: Any, tokenizer: Any) -> None:
    """acc by the sum, acc_norm by the sum for each character."""
    source = numpy.random.default_rng(0)
    words = ["yes", "no", "perhaps it is", "ééééé and ééééé and ééééé", "éééé"]
    questions = [choice("".join(source.choice(list("abc "), 8)), words, int(source.choice([0, 1, 2, 3, 4, 4, 4, 4]))) for _ in range(20)]
    found = answer_choices("t", questions, model, tokenizer)
    plain, normed, of_bytes = [], [], []
    for question in questions:
        sums = [
            by_single_tokens(model, *pair)
            for pair in encode_pairs(tokenizer, [(question.context, more) for more in question.continuations])
        ]
        plain.append(max(range(5), key=lambda index: sums[index]))
        normed.append(max(range(5), key=lambda index: sums[index] / len(words[index])))
        of_bytes.append(max(range(5), key=lambda index: sums[index] / len(words[index].encode())))
    assert found.answers == [words[index] for index in plain]
    assert found.right == [index == question.right for index, question in zip(plain, questions, strict=True)]
    assert found.accuracy == found.scores["acc"].value == sum(found.right) / 20
    right_normed = [index == question.right for index, question in zip(normed, questions, strict=True)]
    assert found.scores["acc_norm"].value == sum(right_normed) / 20
    assert sum(right_normed) != sum(index == question.right for index, question in zip(of_bytes, questions, strict=True))
    assert normed != plain


# Exact match


@torch.no_grad()
def written(model: Any, tokenizer: Any, prompt: str, most: int) -> str:
    """The likeliest tokens, one pass each, up to a line break behind a word."""
    ids = tokenizer.encode(prompt)
    start = len(ids)
    for _ in range(most):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        text = tokenizer.decode(ids[start:])
        if ids[-1] == tokenizer.eos_token_id or "\n" in text.lstrip():
            break
    lines = tokenizer.decode(ids[start:], skip_special_tokens=True).strip().splitlines()
    return lines[0].rstrip() if lines else ""


def test_answers_are_those_of_single_tokens() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32), AutoTokenizer.from_pretrained(DEMO)
    prompts = [row["context"] for row in next_lines(6)]
    questions = [OpenQuestion(prompt=prompt, expected=["x"], most_tokens=12, where="here") for prompt in [*prompts, prompts[0]]]
    expected = [written(model, tokenizer, question.prompt, 12) for question in questions]
    assert greedy_answers(model, tokenizer, questions) == expected
    assert len(set(expected)) > 3
    asked = [OpenQuestion(prompt=prompts[0], expected=["no", f"  {expected[0].upper()}. "], most_tokens=12, where="here")]
    assert answer_openly("t", [*asked, questions[1]], model, tokenizer).right == [True, False]


def test_what_does_not_count_in_an_answer() -> None:
    assert comparable(" New\tYork . ") == comparable("new york") != comparable("newyork")


def test_a_prompt_leaves_room_for_the_answer(model: Any, tokenizer: Any) -> None:
    prompts = ["".join(numpy.random.default_rng(seed).choice(list("abcdefg"), 200)) for seed in range(6)]
    questions = [OpenQuestion(prompt=prompt, expected=["x"], most_tokens=8, where="here") for prompt in prompts]
    whole, cut = ([written(model, tokenizer, prompt[-room:], 8) for prompt in prompts] for room in (tiny.POSITIONS, tiny.POSITIONS - 8))
    assert greedy_answers(model, tokenizer, questions) == cut != whole
    with pytest.raises(PTQError, match="here: an answer may have 128 tokens and the model 128 positions; allow fewer"):
        greedy_answers(model, tokenizer, [OpenQuestion(prompt="a", expected=["x"], most_tokens=128, where="here")])


# Standard errors and flips


def test_the_error_of_a_share() -> None:
    right = [True, False, True, True]
    assert share(right).standard_error == pytest.approx(numpy.std(right, ddof=1) / 2)
    assert share([True]).standard_error is None


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 5), (5, 3), (4, 4), (0, 8)])
def test_mcnemar_counts_cases(lost: int, won: int) -> None:
    """The share of all ways in which the flips could fall that are at least as far to one side."""
    far = max(lost, won)
    ways = list(itertools.product((0, 1), repeat=lost + won))
    assert mcnemar(lost, won) == sum(max(sum(way), len(way) - sum(way)) >= far for way in ways) / len(ways)


def test_mcnemar_of_many() -> None:
    assert mcnemar(5_000, 5_300) == pytest.approx(math.erfc((300 - 1) / math.sqrt(10_300) / math.sqrt(2)), rel=1e-3)


def result(answers: str, expected: str) -> TaskResult:
    right = [one == other for one, other in zip(answers, expected, strict=True)]
    return TaskResult(task="t", kind="k", answers=list(answers), expected=list(expected), right=right, scores={"acc": share(right)})


def test_flips() -> None:
    expected, before, after = "aaaaaaaa", "aaaaabcb", "abaaaaab"
    found = flips(result(after, expected), result(before, expected))
    assert found is not None
    assert (found.lost, found.won, found.changed, found.difference) == (1, 2, 3, 1 / 8)
    differences = [(now == "a") - (was == "a") for now, was in zip(after, before, strict=True)]
    assert found.standard_error == pytest.approx(numpy.std(differences, ddof=1) / math.sqrt(8))
    assert found.p_value == mcnemar(1, 2)
    with pytest.raises(ValueError, match="not the same questions"):
        flips(result(after, expected), result(before, before))


# Files


def read(tmp_path: Path, *rows: Any, **options: Any) -> Any:
    return read_questions(write_rows(list(rows), tmp_path / "rows.jsonl"), **options)


ARC = {"question": "Q?", "choices": {"text": ["1", "2"], "label": ["2", "1"]}, "answerKey": "1"}


@pytest.mark.parametrize(
    ("row", "context", "continuations", "right"),
    [
        ({"context": "c", "choices": ["a", " b"], "answer": 1}, "c", [" a", " b"], 1),
        ({"prompt": "c\n", "choices": ["a", "b"], "label": "a"}, "c\n", ["a", "b"], 0),
        ({"context": "", "choices": ["a", "b"], "answer": "B"}, "", ["a", "b"], 1),
        ({"context": "c", "choices": ["B", "A"], "answer": "A"}, "c", [" B", " A"], 1),
        (ARC, "Question: Q?\nAnswer:", [" 1", " 2"], 1),
    ],
)
def test_rows_with_choices(row: dict[str, Any], context: str, continuations: list[str], right: int, tmp_path: Path) -> None:
    [found] = read(tmp_path, row)
    assert (found.context, found.continuations, found.right) == (context, continuations, right)


def test_rows_with_answers(tmp_path: Path) -> None:
    first, second = read(
        tmp_path, {"prompt": "a", "answer": 12}, {"question": "b", "answers": ["x", "y"], "max_new_tokens": 5}, most_tokens=7
    )
    assert (first.prompt, first.expected, first.most_tokens) == ("a", ["12"], 7)
    assert (second.prompt, second.expected, second.most_tokens) == ("Question: b\nAnswer:", ["x", "y"], 5)
    assert len(read(tmp_path, *[{"prompt": "a", "answer": "b"}] * 5, limit=3)) == 3


GOOD = {"context": "c", "choices": ["a", "b"], "answer": 1}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1], "is no JSON object but [1]"),
        ({"choices": ["a", "b"], "answer": 1}, "has no 'question', 'context' or 'prompt'"),
        ({"context": 1, "choices": ["a", "b"], "answer": 1}, "'context' is no text but 1"),
        ({"context": "\ud800", "choices": ["a", "b"], "answer": 1}, "'context' is no text"),
        ({**GOOD, "answer": None}, "has no answer"),
        ({**GOOD, "answer": 2}, "the answer 2 is none of the 2 choices"),
        ({**GOOD, "answer": -1}, "the answer -1 is none"),
        ({**GOOD, "answer": True}, "the answer True is none"),
        ({**GOOD, "answer": "C"}, "the answer 'C' is none"),
        ({**GOOD, "choices": ["a", "a"], "answer": "a"}, "the answer 'a' is none"),
        ({**GOOD, "choices": ["a"]}, "'choices' is no list of 2"),
        ({**GOOD, "choices": "ab"}, "'choices' is no list of 2"),
        ({**GOOD, "choices": ["a", ""]}, "a choice is empty"),
        ({**GOOD, "choices": ["a", 1]}, "a choice is no text but 1"),
        ({**GOOD, "choices": {"text": ["a", "b"], "label": ["A"]}}, "has 2 texts and as labels ['A']"),
        ({"prompt": "a", "answer": "b"}, "some rows have choices and some have none"),
    ],
)
def test_a_row_that_is_wrong_is_named(row: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(PTQError) as caught:
        read(tmp_path, GOOD, row)
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}, line 2: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "answer": []}, "the answer is empty"),
        ({"prompt": "a", "answer": " "}, "the answer is empty"),
        ({"prompt": "a", "answer": {}}, "'answer' is no text but {}"),
        ({"prompt": "", "answer": "b"}, "the prompt is empty"),
        ({"prompt": "a", "answer": "b", "max_new_tokens": 0}, "'max_new_tokens' is 0"),
        ({"prompt": "a", "answer": "b", "max_new_tokens": 10**9}, "'max_new_tokens' is 1000000000"),
    ],
)
def test_an_open_row_that_is_wrong(row: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(PTQError, match="line 1: ") as caught:
        read(tmp_path, row)
    assert words in str(caught.value)


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_files, "MOST_QUESTIONS", 2)
    with pytest.raises(PTQError, match="at most 2 questions"):
        read(tmp_path, GOOD, GOOD, GOOD)
    monkeypatch.setattr(task_files, "MOST_CHARACTERS", 7)
    with pytest.raises(PTQError, match=r"line 2: .* and 7 characters"):
        read(tmp_path, GOOD, GOOD)
    with pytest.raises(PTQError, match="holds no questions"):
        read(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        read_questions(tmp_path / "nowhere.jsonl")


def test_the_examples_of_the_docs_are_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    choices, open_ones = re.findall(r"^```json\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "choices.jsonl").write_text(choices, encoding="utf-8")
    (tmp_path / "open.jsonl").write_text(open_ones, encoding="utf-8")
    assert [question.choices[question.right] for question in read_questions(tmp_path / "choices.jsonl")] == ["honey", "Paris", "Mars"]  # type: ignore[union-attr]
    assert [question.expected[0] for question in read_questions(tmp_path / "open.jsonl")] == ["Paris", "8"]  # type: ignore[union-attr]
    [task] = re.findall(r"^```yaml\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "task.yaml").write_text(task, encoding="utf-8")
    write_rows([{"question": "Q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}], tmp_path / "arc200.jsonl")
    assert [config["task"] for config in task_configs(tmp_path / "task.yaml")] == ["my_task"]


# The command


@pytest.fixture
def place(tmp_path: Path, model: Any) -> Path:
    write_rows(next_lines(6), tmp_path / "choices.jsonl")
    write_rows([{"prompt": "abc", "answer": "x"}], tmp_path / "open.jsonl")
    model.save_pretrained(tmp_path / "model")
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "model")
    tiny.make_model(tmp_path / "other", seed=3)
    return tmp_path


def test_answers_of_both_are_kept(ptq: Ptq, place: Path) -> None:
    files = (place / "choices.jsonl", place / "open.jsonl")
    line = (
        "eval",
        place / "other",
        "--baseline",
        place / "model",
        "--tasks",
        files[0],
        "--task",
        files[1],
        "--answers",
        place / "answers.jsonl",
    )
    answer = ptq(*line, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["results"] == []  # perplexity was not asked for
    choices, written = found["tasks"]
    assert (choices["kind"], choices["questions"], written["kind"], written["questions"]) == ("multiple choice", 6, "exact match", 1)
    model, other = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("model", "other"))
    questions = read_questions(files[0])
    results = [answer_choices("t", questions, each, tiny.byte_tokenizer()) for each in (other, model)]  # type: ignore[arg-type]
    assert [row["answer"] for row in choices["answers"]] == results[0].answers
    assert [row["baseline_right"] for row in choices["answers"]] == results[1].right
    expected = flips(*results)
    assert expected is not None
    assert choices["flips"] == vars(expected)
    rows = [json.loads(row) for row in (place / "answers.jsonl").read_text().splitlines()]
    assert rows == [{"task": str(file), **row} for file, task in zip(files, found["tasks"], strict=True) for row in task["answers"]]
    shown = ptq(*line).out
    assert "right to wrong" in shown
    assert f"{choices['scores']['acc']['value']:.4f} ± {choices['scores']['acc']['standard_error']:.4f}" in shown


def test_questions_go_through_the_chat_template(ptq: Ptq, place: Path, tokenizer: Any, model: Any) -> None:
    rows = [{"prompt": f"What is {number}?", "choices": list("abcdefgh"), "answer": 0} for number in range(6)]
    file = write_rows(rows, place / "letters.jsonl")
    line = ("eval", place / "model", "--no-baseline", "--json", "--limit", "5", "--tasks", file)
    [plain], [chat] = (json.loads(ptq(*line, *more).out)["tasks"] for more in ((), ("--chat",)))
    expected = []
    for row in rows[:5]:
        context = tokenizer.encode(f"<user>{row['prompt']}<answer>")
        sums = [by_single_tokens(model, context, tokenizer.encode(each)) for each in row["choices"]]
        expected.append(row["choices"][sums.index(max(sums))])
    assert [row["answer"] for row in chat["answers"]] == expected != [row["answer"] for row in plain["answers"]]
    assert ptq("eval", place / "other", "--no-baseline", "--chat", "--tasks", place / "choices.jsonl").code == 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--tasks", "nowhere.jsonl"), 2, "no such file"),
        (("--tasks", "text.txt"), 2, "is of a kind that holds no questions"),
        (("--tasks", "nowhere.yaml"), 2, "no such file"),
        (("--chat",), 2, "--chat: is for the questions of --tasks"),
        (("--tasks", "choices.jsonl", "--answers", "nowhere/answers.jsonl"), 1, "there is no folder nowhere"),
        (("--tasks", "choices.jsonl", "--write-card"), 2, "--write-card is for perplexity"),
    ],
)
def test_what_cannot_be_asked(
    words: tuple[str, ...], code: int, message: str, ptq: Ptq, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    answer = ptq("eval", "model", "--no-baseline", *words)
    assert (answer.code, message in one_line(answer)) == (code, True)


def test_a_name_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'ptqcli\[eval\]'"):
        read_tasks(["arc_easy"], TaskOptions())


def test_defaults_are_one() -> None:
    assert evaluate_tasks.USUAL_NEW_TOKENS == task_files.USUAL_NEW_TOKENS == TaskOptions().most_tokens
    assert exact_match.GREEDY["do_sample"] is False

"""Kind: a file of tasks for another program in which code hides. Nothing in it is run, and it is named with what it would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ptqcli.errors import PTQError, UsageError
from ptqcli.evaluation.harness_files import task_configs, template_flaw

TASK: dict[str, Any] = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": "rows.jsonl"},
    "test_split": "train",
    "output_type": "multiple_choice",
    "doc_to_text": "{{ question.strip() }}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
}


def written(folder: Path, name: str = "task.yaml", **changes: Any) -> Path:
    (folder / "rows.jsonl").write_text('{"question": "a", "choices": ["b", "c"], "answer": 0}\n', encoding="utf-8")
    config = {key: value for key, value in (TASK | changes).items() if value is not ...}
    (folder / name).write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder / name


def test_a_task_without_code_is_taken_with_its_data(tmp_path: Path) -> None:
    [config] = task_configs(written(tmp_path))
    assert (config["task"], config["dataset_kwargs"]) == ("mine", None)
    assert config["custom_dataset"](version=1)["train"].to_list() == [{"question": "a", "choices": ["b", "c"], "answer": 0}]


def test_included_files_are_read_here_too(tmp_path: Path) -> None:
    written(tmp_path, "base.yaml", task=..., description="base")
    (tmp_path / "task.yaml").write_text("include: base.yaml\ntask: other\ndescription: own\n", encoding="utf-8")
    assert [(config["task"], config["description"], config["doc_to_choice"]) for config in task_configs(tmp_path)] == [
        ("other", "own", "choices")
    ]
    (tmp_path / "base.yaml").write_text("include: base.yaml\n", encoding="utf-8")
    with pytest.raises(PTQError, match="is it a circle"):
        task_configs(tmp_path / "task.yaml")


@pytest.mark.parametrize("where", ["task.yaml", "base.yaml"])
def test_python_is_refused_wherever_it_hides(where: str, tmp_path: Path) -> None:
    written(tmp_path, "base.yaml", task=...)
    (tmp_path / "task.yaml").write_text("include: base.yaml\ntask: mine\n", encoding="utf-8")
    with (tmp_path / where).open("a", encoding="utf-8") as file:
        file.write("process_docs: !function own.text\n")
    (tmp_path / "own.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n", encoding="utf-8")
    with pytest.raises(PTQError, match=r"!function, which is code; read it, and give --trust-task-code"):
        task_configs(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class": "own.Task"}, "'class' is for code"),
        ({"unsafe_code": True}, "'unsafe_code' is for code"),
        ({"use_prompt": "promptsource:*"}, "'use_prompt' is for code"),
        ({"process_results": "own.results"}, "'process_results' is for code"),
        ({"group": "all", "task": ["a", "b"]}, "is a group of tasks"),
        ({"doc_to_txt": "x"}, "'doc_to_txt' is no key of a task; correct it; did you mean 'doc_to_text'?"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, "remote code is never run"),
        ({"dataset_kwargs": {"data_files": "nowhere.jsonl"}}, "no file in its folder"),
        ({"dataset_kwargs": {"data_files": "https://example.com/rows.jsonl"}}, "no file in its folder"),
        ({"dataset_kwargs": {}}, "needs data_files"),
        ({"generation_kwargs": {"custom_generate": "owner/name"}}, "'generation_kwargs' is {'custom_generate': 'owner/name'}"),
        ({"description": "{{ ''.__class__ }}"}, "the template \"{{ ''.__class__ }}\" reads __class__"),
        ({"fewshot_config": {"doc_to_text": "{{ lipsum }}"}}, "uses lipsum"),
    ],
)
def test_what_would_run_or_is_wrong_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = written(tmp_path, **changes)
    with pytest.raises(PTQError) as caught:
        task_configs(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ x['_' ~ '_class__']['__mro__'] }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ lipsum|attr('__globals__') }}",
        "{{ rows|map(attribute='__class__')|list }}",
        "{{ range(1000000000)|list }}",
        "{{ self }}",
        "{% for x in rows %}{{ loop[field] }}{% endfor %}",
        "{{ os.system('true') }}",
        "{{ question.format(a=1) }}",
        "{% macro x() %}{% endmacro %}",
        "{% include 'other' %}",
        "{% set run = question.strip %}{{ run() }}",
        "{{ broken",
    ],
)
def test_templates_that_could_reach_code(template: str) -> None:
    assert template_flaw(template) is not None


@pytest.mark.parametrize(
    "template",
    [
        "plain text",
        "Question: {{ question.strip() }}\nAnswer:",
        "{{ choices[answer] }}{{ ' and ' if more else '' }}",
        "{% for each in choices %}{{ loop.index }}. {{ each|trim }}{% if not loop.last %}\n{% endif %}{% endfor %}",
        "{{ ['A', 'B'].index(answerKey.upper()) }}",
        "{{ text|replace('a', 'b')|length > 3 and 'x' or 'y' }}",
    ],
)
def test_templates_that_only_read(template: str) -> None:
    assert template_flaw(template) is None


def test_a_folder_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no task"):
        task_configs(tmp_path)
    (tmp_path / "task.yaml").write_text("- a list\n", encoding="utf-8")
    with pytest.raises(PTQError, match="is no task"):
        task_configs(tmp_path)

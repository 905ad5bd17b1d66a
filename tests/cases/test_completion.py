"""Kind: names that a person has to know by heart. The shell completes them: driven here by bash itself, with the script that
`ptq completion bash` prints, and fast, since it happens at every press of the tab key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from commandline import Ptq

from ptqcli.algorithms import parts
from ptqcli.calibration.corpora import CORPORA
from ptqcli.cli import app
from ptqcli.shipped import shipped_recipes

HEAVY = ("torch", "transformers", "numpy", "datasets", "pyarrow")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, config in {"model-a": {}, "model-b": {}, "packed": {"quantization_config": {}}, "deep/model-c": {}}.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "corpus.jsonl.gz").write_bytes(b"")
    (tmp_path / "image.png").write_bytes(b"")
    (tmp_path / "mine.yaml").write_text("algo: rtn\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def offered(line: str) -> list[str]:
    """What is offered for the last word of ``line``, which is not finished."""
    *words, incomplete = line.split(" ")[1:]
    return [
        f"<{item.type}>" if item.type != "plain" else item.value
        for item in ShellComplete(app, {}, "ptq", "").get_completions(words, incomplete)
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ptq quan", ["quantize"]),
        ("ptq quantize --nsa", ["--nsamples"]),
        ("ptq quantize --algo s", ["smoothquant"]),
        ("ptq quantize --algo awq+g", ["awq+gptq"]),
        ("ptq quantize --algo awq+", [f"awq+{name}" for name in parts() if name != "awq"]),
        ("ptq quantize --algo gptq+", []),
        ("ptq quantize --damp 0.1 --algo smoothquant+o", ["smoothquant+obq", "smoothquant+omniquant"]),
        ("ptq quantize --calib w", ["wikitext2"]),
        ("ptq quantize --calib ", ["auto", "self", *CORPORA, "builtin", "corpus.jsonl.gz", "notes.txt"]),
        ("ptq quantize --calib deep/", ["<file>"]),
        ("ptq eval --ppl n", ["notes.txt"]),
        ("ptq eval --tasks m", ["mine.yaml", "model-a", "model-b"]),
        ("ptq quantize --recipe w8a16", [name for name in shipped_recipes() if name.startswith("w8a16")]),
        ("ptq quantize --recipe m", ["mixed-w4-w8-gptq", "mine.yaml"]),
        ("ptq quantize --scheme w3a16-g1", ["w3a16-g128", "w3a16-g128-asym"]),
        ("ptq quantize --format c", ["compressed-tensors"]),
        ("ptq quantize ", ["model-a", "model-b"]),
        ("ptq quantize --algo rtn model-", ["model-a", "model-b"]),
        ("ptq quantize deep/m", ["deep/model-c"]),
        ("ptq quantize de", ["<dir>"]),
        ("ptq eval ", ["packed"]),
        ("ptq inspect p", ["packed"]),
        ("ptq generate mod", ["<dir>"]),
        ("ptq eval --baseline m", ["model-a", "model-b"]),
        ("ptq quantize --output p", ["<dir>"]),
        ("ptq completion z", ["zsh"]),
    ],
)
def test_what_is_offered(folder: Path, line: str, expected: list[str]) -> None:
    assert sorted(offered(line)) == sorted(expected)


def test_names_on_offer_are_those_that_there_are(folder: Path) -> None:
    words = offered("ptq quantize --calib ")
    assert {word for word in words if not (folder / word).exists()} == {*CORPORA, "auto", "self", "builtin"}


def test_bash_completes(folder: Path) -> None:
    """bash is asked what its completion function would offer; only paths of the test's folder are made up."""
    program = folder / "ptq"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "from ptqcli.cli import main; main()" "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(ptq completion bash)"\n'
        "COMP_WORDS=(ptq quantize --algo awq+g); COMP_CWORD=3; _ptq_completion ptq; echo ${COMPREPLY[*]}\n"
        "COMPREPLY=(); COMP_WORDS=(ptq inspect ''); COMP_CWORD=2; _ptq_completion ptq; echo ${COMPREPLY[*]}\n"
        "complete -p ptq\n"
    )
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, env=environment, timeout=300, check=True)
    assert done.stdout.splitlines()[:2] == ["awq+gptq", "packed"]
    assert "_ptq_completion ptq" in done.stdout


@pytest.mark.parametrize(
    ("shell", "has"), [("bash", "complete -o nosort -F _ptq_completion ptq"), ("zsh", "compdef"), ("fish", "complete")]
)
def test_scripts(ptq: Ptq, shell: str, has: str) -> None:
    answer = ptq("completion", shell)
    assert answer.code == 0
    assert has in answer.out
    assert "_PTQ_COMPLETE" in answer.out


def test_nothing_heavy_is_imported(folder: Path) -> None:
    lines = ["--algo awq+", "--recipe ", "--scheme ", "--calib ", "--format ", ""]
    code = (
        "import sys; from click.shell_completion import ShellComplete; from ptqcli.cli import app\n"
        f"for line in {lines!r}:\n"
        "    *words, last = ['quantize', *line.split(' ')]\n"
        "    assert ShellComplete(app, {}, 'ptq', '').get_completions(words, last), line\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"


def test_every_command_has_an_example() -> None:
    context = click.Context(app)
    for name in app.list_commands(context):
        command = app.get_command(context, name)
        assert command is not None
        assert "Examples:" in (command.epilog or ""), name
        assert "ptq" in (command.epilog or "")

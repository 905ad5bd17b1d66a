"""Text of others that would command the terminal: shown as escapes, wherever it is printed.

Row 37. A tensor name, a report or a model's answer may hold sequences that clear the screen, colour it, set its title, or turn the
direction of writing; an error message on stderr, too.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from commandline import Ptq
from packed import everything, llama, random_model, write_checkpoint
from safetensors.torch import load_file, save_file
from tiny import make_model

from ptqcli.cli.console import Output
from ptqcli.cli.progress import track
from ptqcli.errors import PTQError, printable
from ptqcli.numerics.scheme import Scheme

EVIL = "\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp\r"
SHOWN = r"\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp\r"
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_what_is_shown_and_what_is_not() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("é 中 \u200d \xa0 \U0001f600 \\x1b") == "é 中 \u200d \xa0 \U0001f600 \\x1b"
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc"
    assert printable("\ud800") == r"\ud800"
    assert str(PTQError(f"{EVIL}\nsecond line")) == rf"{SHOWN}\nsecond line"


def test_everything_that_prints(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.say(EVIL)
    output.table(EVIL, ("name", "value"), [(EVIL, EVIL)])
    output.facts([(EVIL, EVIL)])
    with track("block") as tracker:
        tracker.say(EVIL)
        tracker.note(EVIL)
        tracker.step(1, 2, EVIL)
    printed = "".join(capsys.readouterr())
    assert OBEYED.search(printed) is None
    assert printed.count("title") == 8


def test_a_tracker_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with track("block") as tracker:
        tracker.say(EVIL)
        tracker.step(1, 2, f"[bold]{EVIL}")
    printed = capsys.readouterr().err
    assert "[bold]" in printed  # a name, not an order to the library that draws
    assert "\x1b]0" not in printed
    assert "\x1b[2J" not in printed
    assert "\u202e" not in printed


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    write_checkpoint(folder, random_model(llama(layers=1)), everything(Scheme.parse("w4a16-g32")))
    return folder


def test_a_tensor_name(ptq: Ptq, checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[f"model.layers.0.mlp.down_proj.{EVIL}"] = torch.ones(1)
    save_file(tensors, checkpoint / "model.safetensors")
    answer = ptq("inspect", checkpoint)
    assert answer.code == 1
    assert OBEYED.search(answer.err) is None
    assert SHOWN in answer.err


def test_a_report(ptq: Ptq, checkpoint: Path) -> None:
    fold = {"producer": EVIL, "readers": [EVIL], "choices": [[EVIL, EVIL, 0.5]], "left_alone": None}
    report = {"source": EVIL, "ptqcli": EVIL, "recipe": {"algo": EVIL, "calib": EVIL, "nsamples": 1}, "layers": [], "folds": [fold]}
    (checkpoint / "ptq_report.json").write_text(json.dumps({**report, "error_kind": "output"}))
    values = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**values, "architectures": [EVIL]}))
    for flags in ((), ("--json",)):
        answer = ptq("inspect", checkpoint, *flags)
        assert answer.code == 0, answer.err
        assert OBEYED.search(answer.out + answer.err) is None


def test_generated_text(ptq: Ptq, tmp_path: Path) -> None:
    """A model that can only say ESC."""
    model = make_model(tmp_path / "model", num_hidden_layers=1)
    escape = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["vocab"]["\u013d"]  # how byte-level BPE writes 0x1b
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[escape] = 1.0
        model.model.norm.weight.fill_(0.0)
        model.lm_head.weight[:escape] = 0.0
    shutil.rmtree(tmp_path / "model" / "x", ignore_errors=True)
    model.save_pretrained(tmp_path / "model")
    answer = ptq("generate", tmp_path / "model", "\x1b]0;title\x07 text", "--max-new-tokens", 4)
    assert answer.code == 0, answer.err
    assert OBEYED.search(answer.out) is None
    assert r"\x1b]0;title\x07 text" in answer.out

"""Patterns and templates in tokenizer files are programs: one that fails on a text, or does not come to an end, is one line.

Rows 28, 32, 35. A tokenizer loads and fails later, on a text that its pattern cannot take; jinja2's sandbox bounds a range, and not
ranges in ranges.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from commandline import Ptq
from tiny import byte_tokenizer, make_model, write_text

from ptqcli.calibration.chat import written_out
from ptqcli.errors import PTQError

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MACROS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
CHAT = [{"role": "user", "content": "word"}]


@pytest.mark.parametrize("template", [LOOPS, MACROS])
def test_a_template_without_end(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    before = sys.gettrace()
    with pytest.raises(PTQError, match="the chat template runs for more than 1000000 lines"):
        written_out(tokenizer, CHAT)
    assert sys.gettrace() is before


def test_a_long_chat_is_written_out() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% endif %}{% endfor %}"
    assert written_out(tokenizer, CHAT * 5_000) == "word\n" * 5_000


@pytest.mark.parametrize("command", ["quantize", "eval", "generate"])
def test_a_pattern_that_fails_on_the_text(ptq: Ptq, tmp_path: Path, command: str) -> None:
    model = tmp_path / "model"
    make_model(model, num_hidden_layers=1)
    values = json.loads((model / "tokenizer.json").read_text())
    values["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": r"(?:\w+\s?)+$"}, "behavior": "Isolated", "invert": False}
    (model / "tokenizer.json").write_text(json.dumps(values))
    text = write_text(tmp_path / "text.txt", words=300)
    rest = {
        "quantize": ("--calib", text, "--nsamples", "2", "--seqlen", "32", "--output", tmp_path / "out"),
        "eval": ("--ppl", text, "--seqlen", "32"),
        "generate": ("word " * 40 + "!",),
    }
    answer = ptq(command, model, *rest[command])
    assert answer.code == 1
    assert "Traceback" not in answer.err
    last = answer.err.strip().splitlines()[-1]  # not the first, for its library says on its own that it panicked
    assert last.startswith(f"error: {model}: the tokenizer fails on the text (")

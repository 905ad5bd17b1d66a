"""A checkpoint whose tokenizer is not that of the model beside which it is measured: said, since one of the two reads foreign tokens.

Row 1: what is measured is derived from another object than the one that is meant.
"""

from __future__ import annotations

import json
from pathlib import Path

from commandline import Ptq
from tiny import make_model, write_text


def test_it_is_said(ptq: Ptq, tmp_path: Path) -> None:
    original, out, text = tmp_path / "model", tmp_path / "out", write_text(tmp_path / "text.txt", words=200)
    make_model(original, num_hidden_layers=1)
    assert ptq("quantize", original, "--algo", "rtn", "--output", out).code == 0
    measure = ("eval", out, "--ppl", text, "--seqlen", "32")
    same = ptq(*measure)
    values = json.loads((out / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (out / "tokenizer.json").write_text(json.dumps(values))
    other = ptq(*measure)
    assert (same.code, other.code) == (0, 0)
    said = f"{original}: its tokenizer is another one"
    assert said not in same.out + same.err
    assert said in " ".join((other.out + other.err).split())

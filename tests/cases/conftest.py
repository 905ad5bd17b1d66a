"""What several cases begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import make_model, write_text

from ptqcli.cli import run


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and in ``done`` a checkpoint of the model."""
    folder = tmp_path_factory.mktemp("workshop")
    make_model(folder / "model", dtype=torch.bfloat16)
    write_text(folder / "text.txt", words=500)
    line = ["quantize", str(folder / "model"), "--algo", "rtn", "--group-size", "32", "--output", str(folder / "done"), "--quiet"]
    assert run(line) == 0
    return folder

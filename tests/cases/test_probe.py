"""The probe that finds how a model runs asks nothing of it but to run: it may decide by values, call linears by keyword, read weights.

Tensors without data do not answer a model that compares the highest position with a limit, as the rotary embeddings ``dynamic`` do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_architectures import relative, run
from tiny import make_model, write_text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import ptqcli
from ptqcli.errors import PTQError
from ptqcli.model.discovery import probe_model
from ptqcli.model.kinds import ModelKind
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder

ROTARY = {
    "dynamic": {"factor": 2.0},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_embeddings_that_look_at_positions(kind: str, tmp_path: Path) -> None:
    make_model(tmp_path / "plain")
    make_model(tmp_path / "model", rope_parameters={"rope_type": kind, "rope_theta": 1e4, **ROTARY[kind]})
    assert json.loads((tmp_path / "model" / "config.json").read_text())["rope_parameters"]["rope_type"] == kind
    assert Skeleton(ModelFolder(tmp_path / "model")).shapes == Skeleton(ModelFolder(tmp_path / "plain")).shapes
    text = str(write_text(tmp_path / "text.txt"))
    ptqcli.quantize(tmp_path / "model", output=tmp_path / "out", algo="gptq", group_size=32, calib=text, nsamples=2, seqlen=64)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert relative(run(ptqcli.load_quantized(tmp_path / "out")), run(theirs)) < 1e-3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.twice, self.asked, self.changed, self.idle = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.twice(self.twice(self.called(input=hidden)))
        self.changed.weight.div_(2)
        return self.changed(hidden) + self.asked(hidden).to(self.asked.weight.dtype)


class Model(nn.Module):
    """Has the probe's tokens decide what it does; ``fails`` in a way that only a model thinks of."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.embedding, self.fails = nn.Embedding(4, 8), fails
        self.layers = nn.ModuleList([Block()])

    def forward(self, ids: Tensor) -> Tensor:
        if self.fails:
            raise LookupError("no\nsuch state")
        hidden = self.embedding(ids)
        return self.layers[0](hidden) if int(ids.max()) == 0 else hidden


class Kind(ModelKind):
    def call(self, model: nn.Module, ids: Tensor) -> Any:
        return model(ids)


KIND = Kind(name="model", auto_class="", causal=True)


def on_meta(**changes: Any) -> nn.Module:
    with torch.device("meta"):
        return Model(**changes)


@torch.no_grad()
def test_what_a_model_does_with_its_linears_is_seen() -> None:
    model = on_meta()
    shape = probe_model(model, KIND).shape("layers.0")
    assert shape.stages == (("called",), ("twice",), ("twice",), ("changed", "asked"))
    assert shape.unused == ("idle",)
    assert shape.repeated == ("twice",)
    assert shape.read == ("asked", "changed")
    assert shape.hidden == (2, 8, 8)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert type(model.layers[0].asked) is nn.Linear


def test_a_model_that_fails_is_refused_in_one_line() -> None:
    with pytest.raises(PTQError, match=r"does not run on 8 tokens .* LookupError: no such state$"):
        probe_model(on_meta(fails=True), KIND)


def test_a_large_model_takes_no_memory() -> None:
    """A terabyte of weights."""
    with torch.device("meta"):
        model = Model()
        model.layers[0].asked = nn.Linear(8, 1 << 20)
        model.layers[0].called = nn.Linear(8, 8)
        model.embedding = nn.Embedding(1 << 35, 8)
    model.layers[0].forward = lambda hidden: hidden
    assert probe_model(model, KIND).shape("layers.0").unused == ("called", "twice", "asked", "changed", "idle")

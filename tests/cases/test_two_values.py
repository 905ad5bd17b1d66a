"""Files that readers understand differently: two values for one parameter, and tensors with names that mean something else.

Rows 1, 25. Which of two values is taken depends on the reader, and so does what a result is worth that was made of one of them. Refused
before the work; equal copies are no matter.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

from ptqcli.errors import PTQError
from ptqcli.pipeline.pipeline import quantize
from ptqcli.recipe import Recipe

RTN = Recipe(algo="rtn", wbits=8, group_size=32)
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_model(tmp_path / "model", num_hidden_layers=1)
    return tmp_path / "model"


def change(model: Path, new: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, **new(tensors)}, model / "model.safetensors", metadata={"format": "pt"})


def in_two_shards(model: Path, factor: float) -> None:
    """Half of the tensors in each; the second holds DOWN once more, times ``factor``. The index names the first."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    halves = {"model-00001-of-00002.safetensors": sorted(tensors)[:6], "model-00002-of-00002.safetensors": sorted(tensors)[6:]}
    assert DOWN in halves["model-00001-of-00002.safetensors"]
    for file, names in halves.items():
        again = {DOWN: tensors[DOWN] * factor} if DOWN not in names else {}
        save_file({**{name: tensors[name] for name in names}, **again}, model / file, metadata={"format": "pt"})
    places = {name: file for file, names in halves.items() for name in names}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_a_tensor_in_two_shards(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copies")
    in_two_shards(tmp_path / "copies", 1.0)
    quantize(tmp_path / "copies", RTN, tmp_path / "out")
    in_two_shards(model, 3.0)
    with pytest.raises(
        PTQError, match=f"00002.safetensors: tensor {DOWN} stands in model-00001-of-00002.safetensors too, with other values"
    ):
        quantize(model, RTN, tmp_path / "refused")


def test_a_parameter_under_two_names(model: Path, tmp_path: Path) -> None:
    change(model, lambda tensors: {UP.removeprefix("model."): tensors[UP] * 2})
    with pytest.raises(PTQError, match=f"tensors {UP.removeprefix('model.')} and {UP} are both stored for {UP}; remove the one"):
        quantize(model, RTN, tmp_path / "out")


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale", "weight_shape"])
def test_a_tensor_that_has_the_name_of_one_to_be_written(model: Path, tmp_path: Path, leaf: str) -> None:
    name = DOWN.removesuffix("weight") + leaf
    change(model, lambda _: {name: torch.ones(2, 2)})
    with pytest.raises(PTQError, match=f"holds a tensor {name}, the name of a part of {DOWN.removesuffix('.weight')} when it is quantized"):
        quantize(model, RTN, tmp_path / "out")


# A pattern, and a class of modules, to whoever reads the list of what is not quantized.
@pytest.mark.parametrize("name", ["re:.*.weight", "Linear.weight"])
def test_a_tensor_whose_name_is_a_pattern_to_readers(model: Path, tmp_path: Path, name: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model)(token_ids()).logits
    change(model, lambda _: {name: torch.ones(64, 64)})
    quantize(model, RTN, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], torch.ones(64, 64))
    error = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(token_ids()).logits - plain
    assert error.norm() < 0.05 * plain.norm()

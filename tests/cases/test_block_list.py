"""The blocks are the list that holds the model's linear weights, whatever the classes of its entries; anything less is an error or said.

A list of blocks of two classes used to be passed over for a tiny list of adapters inside one of them, and the run "succeeded" on two
linears.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sweep_architectures import file_class, make_model
from tiny import ARCHITECTURES
from tiny import make_model as make_text_model
from torch import nn

from ptqcli.errors import UsageError
from ptqcli.model.discovery import find_blocks
from ptqcli.model.names import DiskNames
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder
from ptqcli.pipeline.prepare import plan_run
from ptqcli.plan import Plan
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources


class Wide(nn.Module):
    def __init__(self, adapters: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(adapters))


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.second = nn.Linear(32, 32), nn.Linear(32, 32)


def model_with(**lists: list[nn.Module]) -> nn.Module:
    model = nn.Module()
    for name, entries in lists.items():
        model.add_module(name, nn.ModuleList(entries))
    return model


def plan_of(folder: Path, **changes: object) -> Plan:
    return plan_run(folder, load_recipe(flags={"algo": "rtn", "group_size": 16, **changes}), Resources())[1]


def shares(plan: Plan) -> list[str]:
    """What the plan says of how much is quantized."""
    return [note for note in plan.notes if "of the weights" in note]


def test_lists_of_several_classes_count() -> None:
    assert find_blocks(model_with(layers=[Wide(), Other(), Wide(adapters=3)])) == "layers"
    assert find_blocks(model_with(layers=[nn.Identity(), Other(), Wide(adapters=3)])) == "layers"
    assert find_blocks(model_with(layers=[Wide(), Other()], heads=[nn.Linear(32, 32)])) == "layers"


def test_lists_that_do_not_run_are_passed_over() -> None:
    """The layers for images of a model that is given text."""
    model = model_with(images=[Other(), Other(), Other()], layers=[Wide(), Wide()])
    assert find_blocks(model) == "images"
    assert find_blocks(model, ran=["", "layers.0", "layers.0.linear", "layers.1"]) == "layers"
    with pytest.raises(UsageError, match="no list of repeated blocks"):
        find_blocks(model, ran=["", "head"])


def test_a_model_that_shares_a_block_is_quantized_but_for_the_shared_one(tmp_path: Path) -> None:
    make_model("zamba2", file_class("zamba2"), tmp_path)
    skeleton = Skeleton(ModelFolder(tmp_path))
    assert skeleton.blocks_name == "model.layers"
    assert len({type(block) for block in skeleton.blocks}) == 2
    plan = plan_of(tmp_path)
    shared = {name: reason for name, reason in plan.skipped if "shared_transformer" in name}
    assert shared["model.layers.2.shared_transformer.self_attn.q_proj"] == "its weight also runs in model.layers.5"
    assert shared["model.layers.5.shared_transformer.self_attn.q_proj"] == "its weight also runs in model.layers.2"
    mixers = {linear.name for linear in plan.linears if linear.name.endswith("in_proj")}
    assert len(mixers) == len(skeleton.blocks)
    assert not {linear.name for linear in plan.linears} & set(shared)


def test_a_module_in_two_places_has_two_names() -> None:
    model = model_with(layers=[Wide(), Other()])
    model.layers.append(model.layers[0])
    names = DiskNames(model, ["layers.0.linear.weight", "layers.0.linear.bias", "layers.1.linear.weight"])
    assert names.disk("layers.2.linear.weight") == "layers.0.linear.weight"
    assert names.disk("layers.1.linear.weight") == "layers.1.linear.weight"
    assert names.missing == ["layers.1.linear.bias", "layers.1.second.weight", "layers.1.second.bias"]


def test_little_in_the_blocks_is_an_error_and_where_it_is_meant_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT with a narrow stack between two large projections."""
    narrow = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "ffn_dim": 32}
    monkeypatch.setitem(ARCHITECTURES, "narrow", ("OPTConfig", {**narrow, "word_embed_proj_dim": 512}))
    make_text_model(tmp_path, "narrow")
    with pytest.raises(UsageError, match=r"model.decoder.layers, holds 20 % of the linear weights.*use --blocks model.decoder.layers"):
        plan_of(tmp_path)
    [note] = shares(plan_of(tmp_path, blocks="model.decoder.layers"))
    assert note == "only 20% of the weights in the model's matrices, embeddings and output head apart, are quantized"
    [note] = shares(plan_of(tmp_path, blocks="model.decoder.layers", ignore=["fc2"]))
    assert note.startswith("only 15%")


def test_most_of_a_model_in_the_blocks_needs_no_word(tmp_path: Path) -> None:
    make_text_model(tmp_path, dtype=torch.bfloat16)
    assert shares(plan_of(tmp_path)) == []

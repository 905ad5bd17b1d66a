"""Group sizes and a server's parts: ``--for-tensor-parallel``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import ARCHITECTURES, make_model

from ptqcli.errors import UsageError
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder
from ptqcli.pipeline.prepare import plan_run
from ptqcli.plan import Plan
from ptqcli.plan_parallel import cut_along_inputs
from ptqcli.recipe import Recipe
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources

# What vLLM builds as RowParallelLinear, by the last part of its name; everything else is cut along its outputs.
ROWS = {
    "llama": {"o_proj", "down_proj"},
    "qwen3": {"o_proj", "down_proj"},
    "phi3": {"o_proj", "down_proj"},
    "gpt2": {"c_proj"},
    "opt": {"out_proj", "fc2"},
    "gpt_neox": {"dense", "dense_4h_to_h"},
    "bloom": {"dense", "dense_4h_to_h"},
    "gemma3": {"o_proj", "down_proj"},
}


def plan_of(folder: Path, **flags: Any) -> Plan:
    return plan_run(folder, load_recipe(flags={"algo": "rtn", **flags}), Resources())[1]


@pytest.mark.parametrize("architecture", sorted(ROWS.keys() & ARCHITECTURES.keys()))
def test_what_is_cut_along_its_inputs_is_what_servers_cut_so(architecture: str, tmp_path: Path) -> None:
    make_model(tmp_path, architecture)
    skeleton = Skeleton(ModelFolder(tmp_path))
    along = {site.local.rpartition(".")[2] for site in skeleton.linears if cut_along_inputs(site, skeleton)}
    others = {site.local.rpartition(".")[2] for site in skeleton.linears if not cut_along_inputs(site, skeleton)}
    assert along == ROWS[architecture]
    assert not along & others


def test_groups_are_chosen_for_the_parts(tmp_path: Path) -> None:
    make_model(tmp_path, hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=4)
    whole, parts = (plan_of(tmp_path, for_tensor_parallel=number) for number in (1, 4))
    sizes = [{linear.site.local.rpartition(".")[2]: linear.scheme.group_size for linear in plan.linears} for plan in (whole, parts)]
    assert set(sizes[0].values()) == {128}
    assert sizes[1] == {**sizes[0], "o_proj": 32, "down_proj": 32}  # 128 / 4, 384 / 4 = 96
    assert ("tensor parallel", "every matrix can be cut into 4 parts of whole groups") in parts.summary_rows()


def test_groups_that_do_not_divide_a_part_are_refused_with_what_to_give(tmp_path: Path) -> None:
    make_model(tmp_path, hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(UsageError) as caught:
        plan_of(tmp_path, for_tensor_parallel=4, group_size=64)
    assert str(caught.value) == (
        "model.layers.0.self_attn.o_proj: in 4 parts it has 32 input features each, which groups of 64 do not divide; "
        "use --group-size auto or --group-size 32"
    )
    plan_of(tmp_path, for_tensor_parallel=4, group_size=32)
    plan_of(tmp_path, for_tensor_parallel=4, group_size=-1)
    plan_of(tmp_path, for_tensor_parallel=2, group_size=64)


def test_what_cannot_be_cut_evenly_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path, hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(UsageError, match=r"q_proj: its 128 output features cannot be cut into 3 parts; give another --for-tensor-parallel"):
        plan_of(tmp_path, for_tensor_parallel=3)
    with pytest.raises(
        UsageError, match=r"o_proj: in 16 parts: no group of 128, 64, 32 or 16 columns divides 8 input features; give a smaller"
    ):
        plan_of(tmp_path, for_tensor_parallel=16)
    for number in (0, -2):
        with pytest.raises(UsageError, match=f"for tensor parallel {number} is not valid; give the number of GPUs"):
            Recipe(for_tensor_parallel=number)

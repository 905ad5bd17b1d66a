"""Kind: a guess about a server made a hard refusal.

Linears that read one tensor are found by running the model. Of these vLLM joins q, k and v, gate and up, the two first matrices of latent
attention, and two pairs of a gated delta rule: they must share a scheme. All others may differ, and a note says that they do.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from tiny import TOKENS, byte_tokenizer, make_model
from transformers import AutoModelForCausalLM

from ptqcli.errors import UsageError
from ptqcli.formats.compressed_tensors import COMPRESSED_TENSORS
from ptqcli.numerics.scheme import Scheme
from ptqcli.pipeline.prepare import plan_run
from ptqcli.plan import Plan
from ptqcli.recipe import Override, Recipe
from ptqcli.resources import Resources

W4, W8 = Scheme(4, 32), Scheme(8, 32)
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
DELTA = {
    f"linear_{what}": size for what, size in [("num_value_heads", 4), ("num_key_heads", 2), ("key_head_dim", 16), ("value_head_dim", 16)]
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, kind, changes in [
        ("delta", "Qwen3_5TextConfig", {**DELTA, "head_dim": 16, "num_hidden_layers": 4}),  # every fourth block has attention
        ("latent", "DeepseekV3Config", {**LATENT, "num_hidden_layers": 1, "first_k_dense_replace": 1}),
    ]:
        config = getattr(transformers, kind)(**{**SIZES, **TOKENS, **changes})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    make_model(folder / "llama")
    return {path.name: path for path in folder.iterdir()}


def planned(model: Path, *overrides: Override, **request: object) -> Plan:
    return plan_run(model, Recipe(algo="rtn", group_size=16, overrides=overrides, **request), Resources())[1]  # type: ignore[arg-type]


def skip(pattern: str) -> Override:
    return Override(pattern, skip=True)


def test_the_usual_recipe_of_a_gated_delta_rule_works_and_is_noted(models: dict[str, Path]) -> None:
    plan = planned(models["delta"], ignore=(r"in_proj_[ab]$",))
    assert {name.rpartition(".")[2] for name, _ in plan.skipped} == {"in_proj_a", "in_proj_b"}
    [note] = [note for note in plan.notes if "read the same input" in note]
    assert note.startswith("model.layers.0.linear_attn.in_proj_qkv (w4a16-g16) and model.layers.0.linear_attn.in_proj_b (left as it is)")
    assert "read the same input, and so do 2 more groups of linears; a server" in note
    assert not [note for note in planned(models["delta"]).notes if "read the same input" in note]


@pytest.mark.parametrize(
    "model, override, one, other",
    [
        ("delta", skip(r"in_proj_z$"), "in_proj_qkv", "in_proj_z"),
        ("delta", skip(r"in_proj_a$"), "in_proj_b", "in_proj_a"),
        ("delta", Override(r"in_proj_qkv$", bits=8), "in_proj_qkv", "in_proj_z"),
        ("delta", Override(r"v_proj$", bits=8), "q_proj", "v_proj"),
        ("latent", skip(r"q_a_proj$"), "q_a_proj", "kv_a_proj_with_mqa"),
        ("latent", Override(r"kv_a_proj", symmetric=False), "q_a_proj", "kv_a_proj_with_mqa"),
        ("latent", skip(r"up_proj$"), "gate_proj", "up_proj"),
        ("llama", Override(r"\.1\..*k_proj", bits=8), "q_proj", "k_proj"),
    ],
)
def test_what_is_known_to_be_joined_must_share_a_scheme(
    models: dict[str, Path], model: str, override: Override, one: str, other: str
) -> None:
    with pytest.raises(UsageError, match=rf"\.{one} \(.*\) and \S+\.{other} \(.* are run as one matrix by vLLM"):
        planned(models[model], override)


@pytest.mark.parametrize(
    "model, patterns",
    [
        ("delta", (r"in_proj_(qkv|z)$",)),
        ("delta", (r"in_proj_",)),
        ("latent", (r"q_a_proj|kv_a_proj",)),
        ("latent", (r"[ov]_proj",)),
        ("llama", (r"[qkv]_proj",)),
        ("llama", (r"\.0\.self_attn\.[qkv]_proj", r"\.1\.mlp\.(gate|up)_proj")),
    ],
)
def test_whole_sets_may_differ_from_the_rest(models: dict[str, Path], model: str, patterns: tuple[str, ...]) -> None:
    wide = planned(models[model], *(Override(pattern, bits=8) for pattern in patterns))
    assert {linear.scheme.bits for linear in wide.linears} == {4, 8}
    assert planned(models[model], *(skip(pattern) for pattern in patterns)).skipped


@pytest.mark.parametrize("names", [("fc_q", "fc_k"), ("query", "key"), ("q_proj", "kv_a_proj_with_mqa"), ("in_proj_z", "in_proj_b")])
def test_linears_that_nothing_is_known_of_may_differ(names: tuple[str, str]) -> None:
    group = {f"block.attn.{names[0]}": W4, f"block.attn.{names[1]}": W8}
    assert COMPRESSED_TENSORS.fused_refusal(group) is None

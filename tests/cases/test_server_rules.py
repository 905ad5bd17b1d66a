"""Kind: a guess about a server made a hard refusal; and what a server finds in config.json.

Linears that read one tensor are found by running the model. Of these vLLM joins q, k and v, gate and up, the two first matrices of latent
attention, and two pairs of a gated delta rule: they must share a scheme. All others may differ, and a note says that they do.

A joined matrix is asked for under a name of its own, in each format by other rules. docs/servers.md lists them; those of vLLM 0.33 are
followed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import TOKENS, byte_tokenizer, make_model
from transformers import AutoModelForCausalLM

import ptqcli
from ptqcli.checkpoint.tensors import SafetensorsFolder
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


# What a server finds in config.json

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
Found = tuple[int, int] | None  # bits and group size; None for what stays as it is


def parts_of(name: str) -> list[str]:
    """The names in the checkpoint of what ``name`` is joined of, or its own."""
    path, _, leaf = name.rpartition(".")
    return [f"{path}.{part}" for part in PARTS.get(leaf, (leaf,))] if path else [name]


def same(answers: Iterable[bool], name: str) -> bool:
    """The one answer for all parts of ``name``; vLLM stops where they differ."""
    [answer] = {*answers} if len({*answers}) == 1 else pytest.fail(f"the parts of {name} differ")
    return answer


def by_compressed_tensors(entry: Mapping[str, Any], name: str, stored: set[str]) -> Found:
    """``ignore`` lists a module or all of its parts; a target is its name, those of all of its parts, or a part of its class."""
    if same([part in entry["ignore"] for part in parts_of(name)], name):
        return None
    groups = {target: group["weights"] for group in entry["config_groups"].values() for target in group["targets"]}
    parts = [part for part in parts_of(name) if part in groups]
    found = groups[parts[0]] if len(parts) == len(parts_of(name)) else None if name == "lm_head" else groups["Linear"]
    return found["num_bits"], found["group_size"] or -1


def by_gptq(entry: Mapping[str, Any], name: str, stored: set[str]) -> Found:
    """``modules_in_block_to_quantize``, or else the tensors, tell by parts of names; ``dynamic`` by the joined name, from its start."""
    assert not entry["desc_act"]
    named = [one for several in entry.get("modules_in_block_to_quantize", []) for one in several] or stored
    if not same([any(one in part for one in named) for part in parts_of(name)], name) or (name == "lm_head" and not entry["lm_head"]):
        return None
    rules = ((rule, changes) for rule, changes in entry.get("dynamic", {}).items() if re.match(rule[2:], name))
    rule, changes = next(rules, ("", {}))
    return None if rule.startswith("-:") else tuple({**entry, **changes}[key] for key in ("bits", "group_size"))  # type: ignore[return-value]


def by_awq(entry: Mapping[str, Any], name: str, stored: set[str]) -> Found:
    """``modules_to_not_convert`` holds parts of names; what it does not reach is quantized, all alike, but for the head."""
    skipped = same([any(plain in part for plain in entry["modules_to_not_convert"] or []) for part in parts_of(name)], name)
    return None if skipped or name == "lm_head" else (entry["bits"], entry["group_size"])


RULES = {"compressed-tensors": by_compressed_tensors, "gptq": by_gptq, "gptq_v2": by_gptq, "awq": by_awq}
SKIPS = {
    "all alike": (),
    "a linear left in one block": (skip(r"\.0\..*o_proj"),),
    "a joined matrix left in one block": (skip(r"\.1\..*[qkv]_proj"),),
    "a joined matrix left in all": (skip(r"gate_proj|up_proj"),),
}
WIDER = {
    "a wider linear": (Override(r"down_proj", bits=8),),
    "a wider joined matrix in one block": (Override(r"\.0\..*[qkv]_proj", bits=8, group_size=32),),
    "both, and one left": (
        Override(r"\.0\..*[qkv]_proj", bits=8),
        Override(r"gate_proj|up_proj", group_size=32),
        skip(r"\.1\..*down_proj"),
    ),
}
SERVED = [(name, kind) for name in RULES for kind in (SKIPS if name == "awq" else {**SKIPS, **WIDER})]


@pytest.mark.parametrize(("name", "kind"), SERVED)
def test_a_server_finds_the_scheme_of_every_matrix(models: dict[str, Path], tmp_path: Path, name: str, kind: str) -> None:
    overrides = [{key: value for key, value in vars(each).items() if value} for each in {**SKIPS, **WIDER}[kind]]
    ptqcli.quantize(models["llama"], output=tmp_path / "out", algo="rtn", group_size=16, format=name, overrides=overrides)
    packed = ptqcli.open_checkpoint(tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    stored = {tensor.rpartition(".")[0] for tensor in SafetensorsFolder(tmp_path / "out").names if tensor.endswith("qweight")}
    blocks = [f"model.layers.{index}" for index in range(2)]
    for module in [
        f"{block}.{each}" for block in blocks for each in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]:
        [scheme] = {packed.schemes.get(part) for part in parts_of(module)}
        assert RULES[name](entry, module, stored) == (None if scheme is None else (scheme.bits, scheme.group_size)), module
    assert RULES[name](entry, "lm_head", stored) is None


def test_a_rule_notices_a_joined_matrix_of_which_a_part_is_left() -> None:
    entry = {"ignore": ["a.q_proj"], "config_groups": {}}
    with pytest.raises(pytest.fail.Exception, match=r"the parts of a\.qkv_proj differ"):
        by_compressed_tensors(entry, "a.qkv_proj", set())

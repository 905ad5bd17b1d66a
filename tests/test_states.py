"""Models that hand more from block to block than one hidden state: a stack of several, and keys and values for later blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import ROTARY, TOKENS, byte_tokenizer, in_memory, token_ids, write_text
from torch import Tensor

import ptqcli
from ptqcli.calibration.record import record_calls
from ptqcli.calibration.statistics import StatisticsRequest
from ptqcli.calibration.walk import CalibratedBlock
from ptqcli.errors import UsageError
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder
from ptqcli.model.states import handed, kept
from ptqcli.model.whole import given_hidden
from ptqcli.pipeline.prepare import plan_run
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources

CPU = torch.device("cpu")
LAYERS = 4  # of which the last two take keys and values from the first two
COMMON = {
    **ROTARY,
    **TOKENS,
    "num_hidden_layers": LAYERS,
    "head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": TOKENS["vocab_size"],
    "num_kv_shared_layers": 2,
}
SPARSE = {"laurel_rank": 16, "intermediate_size": [128] * LAYERS, "activation_sparsity_pattern": [0.0] * LAYERS}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "stack": ("Gemma3nTextConfig", SPARSE),  # four states side by side
    "one state": ("Gemma4TextConfig", {"global_head_dim": 16, "use_double_wide_mlp": False, "num_global_key_value_heads": 2}),
}


@torch.no_grad()
def make(folder: Path, name: str) -> Any:
    config, arguments = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**COMMON, **arguments})).float().eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.5 if "emb" in key else 1.5 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def test_kept_states_are_handed_back_as_they_were() -> None:
    states = torch.randn(3, 2, 5, 7)
    assert kept(states).shape == (2, 5, 21)
    assert torch.equal(kept(states)[1, 4, 7:14], states[1, 1, 4])
    assert torch.equal(handed(kept(states), (3,)), states)
    assert kept(states[0]) is not None
    assert torch.equal(handed(kept(states[0]), ()), states[0])


@pytest.mark.parametrize("budget", [1 << 30, 0])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_blocks_one_by_one_are_the_model(name: str, budget: int, tmp_path: Path) -> None:
    """Three batches, each with keys and values of its own; statistics of what a later block reads; the logits behind the last."""
    model = make(tmp_path, name)
    windows = torch.cat([token_ids(), token_ids(seed=2), token_ids(seed=3)])[:5]
    seen: dict[str, list[Tensor]] = {}
    last = next(module for key, module in model.named_modules() if key.endswith(f"layers.{LAYERS - 1}.self_attn.o_proj"))
    last.register_forward_pre_hook(lambda _module, args: seen.setdefault("o", []).append(args[0]))
    expected = model(input_ids=windows, use_cache=False).logits
    skeleton = Skeleton(ModelFolder(tmp_path))
    assert [shape.exchanged for shape in skeleton.shapes] == [("shared_kv_states",)] * LAYERS
    recording = record_calls(skeleton, windows, 2, CPU, torch.float32, in_memory)
    states = recording.hidden
    for index in range(LAYERS):
        block = skeleton.load_block(index, CPU, torch.float32)
        stages = [stage for stage in skeleton.shapes[index].stages if stage[0] not in skeleton.shapes[index].repeated]
        walk = CalibratedBlock(block, stages, recording.calls[index], recording.batches, states, states.clone(), CPU, budget)
        found = {walk.stages[stage][0]: statistics for stage, statistics in walk.sequential(StatisticsRequest(hessian=True))}
        states = walk.target
    inputs = torch.cat(seen["o"]).flatten(0, 1)
    hessian = found["self_attn.o_proj"].hessian
    assert hessian is not None
    torch.testing.assert_close(hessian.matrix, inputs.T @ inputs, rtol=1e-3, atol=1e-3 * float((inputs.T @ inputs).abs().max()))
    with skeleton.loaded_outside(CPU, torch.float32) as outside, given_hidden(skeleton, states):
        logits = outside(input_ids=windows, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        pytest.param("stack", {"algo": "awq+gptq"}, marks=pytest.mark.slow),
        ("stack", {"algo": "gptq", "target": "original"}),
        pytest.param("one state", {"algo": "awq+gptq"}, marks=pytest.mark.slow),
        ("one state", {"algo": "gptq", "target": "original"}),
    ],
    ids=str,
)
def test_they_are_calibrated_and_load(name: str, request_: dict[str, Any], tmp_path: Path) -> None:
    make(tmp_path / "model", name)
    text = str(write_text(tmp_path / "text.txt"))
    report = ptqcli.quantize(tmp_path / "model", output=tmp_path / "out", calib=text, nsamples=8, seqlen=32, group_size=16, **request_)
    assert all(layer.relative_error < 0.25 for layer in report.layers)
    if "awq" in request_["algo"]:
        scaled = [str(fold.producer) for fold in report.folds if fold.choices]
        assert all(any(f"layers.{index}." in producer for producer in scaled) for index in range(LAYERS))
    if name == "stack":  # linears of 4 columns that mix the states
        left = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
        mixers = {f"model.layers.{layer}.altup.{leaf}_coefs" for layer in range(LAYERS) for leaf in ("correction", "prediction")}
        assert mixers <= set(left)
    ids = token_ids()
    with torch.no_grad():
        ours = ptqcli.load_quantized(tmp_path / "out")(input_ids=ids, use_cache=False).logits
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_what_trains_whole_blocks_is_refused_where_they_leave_something(tmp_path: Path) -> None:
    make(tmp_path / "model", "one state")
    recipe = Recipe(algo="autoround", calib=str(write_text(tmp_path / "text.txt")), nsamples=4, seqlen=32, group_size=16)
    with pytest.raises(UsageError, match=r"layers.0: leaves tensors for later blocks \(shared_kv_states\).*; use --algo gptq"):
        plan_run(tmp_path / "model", recipe, Resources())

"""Checkpoints that llm-compressor writes: `ptq eval` finds the perplexity that transformers with compressed-tensors has of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llmcompressor", reason="it writes the checkpoints")

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from loading import by_transformers, check_perplexity, demo_in
from tiny import token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from ptqcli.formats.packed_checkpoint import open_checkpoint

STATIC = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(num_bits=8, strategy="channel"),
    input_activations=QuantizationArgs(num_bits=8, strategy="tensor", dynamic=False),
)
EIGHT = QuantizationScheme(targets=["re:.*down_proj"], weights=QuantizationArgs(num_bits=8, strategy="channel"))
FOUR = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, strategy="group", group_size=32))
MADE: dict[str, tuple[Any, dict[str, Any]]] = {
    "w4a16-g128": (QuantizationModifier, {"scheme": "W4A16", "targets": "Linear"}),
    "w4a16-g128 by gptq": (GPTQModifier, {"scheme": "W4A16", "targets": "Linear"}),
    "w4a16-g128-asym": (QuantizationModifier, {"scheme": "W4A16_ASYM", "targets": "Linear"}),
    "w8a16-g128": (QuantizationModifier, {"scheme": "W8A16", "targets": "Linear"}),
    "w8a8": (QuantizationModifier, {"scheme": "W8A8", "targets": "Linear"}),
    "w8a8 by gptq": (GPTQModifier, {"scheme": "W8A8", "targets": "Linear"}),
    "w8a8-static": (QuantizationModifier, {"config_groups": {"group_0": STATIC}}),
    "two schemes": (QuantizationModifier, {"config_groups": {"group_0": EIGHT, "group_1": FOUR}}),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_in(tmp_path_factory.mktemp("demo"), torch.float32)


def made(folder: Path, demo: Path, kind: str) -> Path:
    """The demo model, quantized by llm-compressor on random tokens."""
    modifier, settings = MADE[kind]
    model, tokenizer, ids = AutoModelForCausalLM.from_pretrained(demo), AutoTokenizer.from_pretrained(demo), token_ids(count=64, batch=8)
    oneshot(
        model=model,
        processor=tokenizer,
        recipe=modifier(ignore=["lm_head"], **settings),
        dataset=Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        batch_size=4,
    )
    model.save_pretrained(folder / "made", save_compressed=True)
    tokenizer.save_pretrained(folder / "made")
    return folder / "made"


@pytest.mark.parametrize("kind", MADE)
def test_what_llm_compressor_writes_is_as_good_here(tmp_path: Path, demo: Path, kind: str) -> None:
    folder = made(tmp_path, demo, kind)
    assert len(open_checkpoint(folder).schemes) == 28
    asked = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "asym" in kind else {}  # it runs no zero points packed
    check_perplexity(folder, by_transformers(folder, **asked), ".weight_scale")

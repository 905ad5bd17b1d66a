"""Metadata must hold for the class that config.json names, not only for the one that is quantized.

The auto class for causal models builds the text part alone of some models with images. Which linears are packed is written by name and
by class of module, and the file's own class has other names and linears that are not packed. So every stored matrix that is not packed must
be in ``ignore``, and every packed one a target, under the names of both classes; compressed-tensors' own matching is asked here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_named_modules
from safetensors.torch import save_file
from sweep_architectures import dequantize, file_class, load, make_model, relative, run
from tiny import make_model as make_text_model
from transformers import AutoModelForCausalLM

import ptqcli
from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.errors import PTQError
from ptqcli.formats.compressed_tensors_config import quantization_config
from ptqcli.numerics.scheme import Scheme
from ptqcli.pipeline.prepare import plan_run
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources
from ptqcli.runtime.models import load_model

REQUESTS: dict[str, dict[str, Any]] = {"one scheme": {}, "two schemes": {"overrides": [{"pattern": r"\.0\.", "bits": 8}]}}


def quantized(folder: Path, **changes: Any) -> dict[str, Any]:
    """Round the model in ``folder`` to nearest; return the entry of config.json."""
    ptqcli.quantize(folder / "model", output=folder / "out", algo="rtn", group_size=16, **changes)
    entry: dict[str, Any] = json.loads((folder / "out" / "config.json").read_text())["quantization_config"]
    return entry


def taken_for_packed(model: torch.nn.Module, entry: dict[str, Any]) -> set[str]:
    """The modules of ``model`` that compressed-tensors would give packed weights."""
    config = QuantizationConfig.model_validate(entry)
    targets = [target for group in config.config_groups.values() for target in group.targets]
    matched = match_named_modules(model, targets, config.ignore)
    return {name for name, module in matched if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))}


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("kind", ["qwen3_5", "mllama"])
def test_both_classes_find_the_packed_linears_and_no_others(kind: str, request_name: str, tmp_path: Path) -> None:
    file = file_class(kind)
    built, _ = make_model(kind, file, tmp_path / "model")
    assert built != file.__name__
    entry = quantized(tmp_path, **REQUESTS[request_name])
    stored = SafetensorsFolder(tmp_path / "out")
    packed = {name.removesuffix(".weight_packed") for name in stored.names if name.endswith(".weight_packed")}
    plain = {name.removesuffix(".weight") for name in stored.names if name.endswith(".weight") and len(stored.shape(name)) == 2}
    assert packed
    assert plain
    assert not packed & set(entry["ignore"])
    assert plain <= set(entry["ignore"])
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    with torch.device("meta"):
        classes = [file(config), AutoModelForCausalLM.from_config(config)]
    for model in classes:
        assert len(taken_for_packed(model, entry)) == len(packed)
        # and a list without the names of what is not packed would not do
        everything = taken_for_packed(model, {**entry, "ignore": []})
        assert request_name == "two schemes" or len(everything) > len(packed)

    dequantize(tmp_path / "out", tmp_path / "dequantized", file)
    with torch.no_grad():
        for reader in (file, AutoModelForCausalLM):
            assert relative(run(load(reader, tmp_path / "out")), run(load(reader, tmp_path / "dequantized"))) < 1e-3


def test_where_only_the_files_own_class_finds_its_tensors_that_one_is_quantized(tmp_path: Path) -> None:
    """transformers' auto class would build another class, with random weights, from the original files, too."""
    file = file_class("emu3")
    built, _ = make_model("emu3", file, tmp_path / "model")
    _, plan = plan_run(tmp_path / "model", load_recipe(flags={"algo": "rtn", "group_size": 16}), Resources())
    assert any(f"load it as {file.__name__}" in note for note in plan.notes)
    assert f"model = {file.__name__}.from_pretrained" in plan.readers[0].code
    entry = quantized(tmp_path, **REQUESTS["two schemes"])
    targets = {target for group in entry["config_groups"].values() for target in group["targets"]}
    assert all(target.startswith("model.text_model.layers.") for target in targets)
    dequantize(tmp_path / "out", tmp_path / "dequantized", file)
    truth = run(load(file, tmp_path / "dequantized"))
    ours, theirs = load_model(tmp_path / "out"), load(file, tmp_path / "out")
    assert type(ours).__name__ == type(theirs).__name__ == file.__name__ != built
    assert max(relative(run(ours), truth), relative(run(theirs), truth)) < 1e-3
    assert type(load_model(tmp_path / "model")) is file


@pytest.mark.parametrize("named", ["LlamaModel", "LlamaForSequenceClassification"])
def test_a_class_without_an_output_head_does_not_take_its_place(named: str, tmp_path: Path) -> None:
    """A model without its head is not a language model, although the class that config.json names finds all of its tensors."""
    make_text_model(tmp_path)
    model, _ = getattr(transformers, named).from_pretrained(tmp_path, output_loading_info=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(PTQError, match=r"hold no tensor for lm_head\.weight"):
        plan_run(tmp_path, load_recipe(flags={"algo": "rtn"}), Resources())


def test_a_text_model_has_one_name_for_each_linear(tmp_path: Path) -> None:
    make_text_model(tmp_path / "model")
    entry = quantized(tmp_path, **REQUESTS["two schemes"])
    assert entry["ignore"] == ["lm_head", "model.embed_tokens"]
    targets = [target for group in entry["config_groups"].values() for target in group["targets"]]
    assert sorted(targets) == sorted(
        f"model.layers.{layer}.{part}_proj"
        for layer in range(2)
        for part in [*(f"self_attn.{name}" for name in "qkvo"), *(f"mlp.{name}" for name in ("gate", "up", "down"))]
    )


@pytest.mark.parametrize("named", ["NoSuchClass", "LlamaConfig", "torch", "BertModel"])
def test_for_a_class_that_is_not_there_the_stored_names_count(named: str, tmp_path: Path) -> None:
    """GPT-2's own files lack the prefix that the class has."""
    model = make_text_model(tmp_path / "model", "gpt2")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "architectures": [named]}))
    stored = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(stored, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    _, plan = plan_run(tmp_path / "model", load_recipe(flags={"algo": "rtn", "group_size": 16}), Resources())
    assert any(f"no class {named}" in note for note in plan.notes)
    entry = quantized(tmp_path, **REQUESTS["two schemes"])
    targets = {target for group in entry["config_groups"].values() for target in group["targets"]}
    assert {"transformer.h.0.mlp.c_fc", "h.0.mlp.c_fc"} <= targets
    assert {"lm_head", "wte", "wpe"} <= set(entry["ignore"])


def test_a_name_that_means_two_things_is_refused() -> None:
    with pytest.raises(PTQError, match=r"layers\.0: is quantized in one of the classes"):
        quantization_config({"layers.0": Scheme(4, 32)}, ["layers.0", "lm_head"])

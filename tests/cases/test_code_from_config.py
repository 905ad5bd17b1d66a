"""Keys of a model folder that tell transformers which code to run or to fetch: dropped, or refused where nothing is left without them.

Row 31. With the package ``kernels`` installed, an attention implementation named ``owner/name`` is fetched from the hub and run. Here
nothing may so much as ask for it: the model is built with what transformers itself chooses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packed import everything, llama, random_model, write_checkpoint
from tiny import make_model

from ptqcli.errors import PTQError
from ptqcli.model.config import build_on_meta, load_config, read_config, read_generation_config
from ptqcli.numerics.scheme import Scheme
from ptqcli.pipeline.pipeline import quantize
from ptqcli.recipe import Recipe
from ptqcli.runtime.load import load_quantized
from ptqcli.runtime.models import load_model, load_tokenizer

HUB = "kernels-community/flash-attn"
CODE: dict[str, Any] = {
    "_attn_implementation": HUB,
    "_attn_implementation_internal": HUB,
    "attn_implementation": HUB,
    "_experts_implementation": HUB,
    "experts_implementation": HUB,
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "owner/name--evil.Model"},
    "custom_pipelines": {"text-generation": {"impl": "evil.Pipeline"}},
    "trust_remote_code": True,
    "use_kernels": True,
    "kernel_config": {"kernel_mapping": {"RMSNorm": HUB}},
    "_commit_hash": "0" * 40,
    "to_dict": "a method no longer",
    "get_text_config": 3,
}


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(name: object, *_: object, **__: object) -> None:
        raise AssertionError(f"{name} would have been fetched")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetched, raising=False)
    monkeypatch.setattr("transformers.dynamic_module_utils.get_cached_module_file", fetched)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_model(tmp_path / "model", num_hidden_layers=1)
    return tmp_path / "model"


def add(file: Path, keys: dict[str, Any]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@pytest.mark.parametrize("key", CODE)
def test_a_key_alone(model: Path, key: str) -> None:
    expected = build_on_meta(load_config(model)).config._attn_implementation
    add(model / "config.json", {key: CODE[key]})
    assert key not in read_config(model)
    config = load_config(model)
    assert config.get_text_config().to_dict()["model_type"] == "llama"
    assert build_on_meta(config).config._attn_implementation == expected


def test_the_same_inside_the_config_of_a_part(tmp_path: Path) -> None:
    config = transformers.Gemma3Config(text_config={"num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 64})
    config.save_pretrained(tmp_path)
    inner = json.loads((tmp_path / "config.json").read_text())["text_config"]
    add(tmp_path / "config.json", {"text_config": {**inner, **CODE}, "per_layer": [{"_attn_implementation": HUB}]})
    values = read_config(tmp_path)
    assert not CODE.keys() & values["text_config"].keys()
    assert values["per_layer"] == [{}]
    assert load_config(tmp_path).text_config._attn_implementation is None


def test_all_at_once_through_the_whole_tool(model: Path, tmp_path: Path) -> None:
    add(model / "config.json", CODE)
    add(model / "generation_config.json", {"custom_generate": HUB, "trust_remote_code": True, "cache_implementation": "x", "top_k": 7})
    add(model / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.TokenizerFast"]}})
    quantize(model, Recipe(algo="rtn", group_size=32), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not CODE.keys() & written.keys()
    for loaded in (load_quantized(tmp_path / "out"), load_model(model)):
        assert torch.isfinite(loaded(torch.arange(8).unsqueeze(0)).logits).all()
        assert loaded.generation_config.top_k == 7
        assert not hasattr(loaded.generation_config, "custom_generate")


def test_a_model_that_is_nothing_but_code_is_refused(model: Path) -> None:
    add(model / "config.json", {"model_type": "evil", "auto_map": CODE["auto_map"]})
    with pytest.raises(PTQError, match="needs Python code from its folder, which is never run"):
        load_config(model)


def test_a_tokenizer_that_is_code_is_not_run(model: Path) -> None:
    (model / "evil.py").write_text("raise SystemExit('run')")
    add(model / "tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    with pytest.raises(PTQError, match="cannot load a tokenizer"):
        load_tokenizer(model)


def test_generation_keys_that_are_data_stay(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) is None
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.5, "num_beams": 2}))
    read = read_generation_config(tmp_path)
    assert (read.eos_token_id, read.temperature, read.num_beams) == ([1, 2], 0.5, 2)


def test_the_scheme_of_a_checkpoint_is_left_as_it_stands(tmp_path: Path) -> None:
    """A key that nobody knows must be refused there, not dropped."""
    write_checkpoint(tmp_path, random_model(llama(layers=1)), everything(Scheme.parse("w4a16-g32")))
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"]["config_groups"]["group_0"]["_unknown"] = 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(PTQError, match="the key _unknown is not read"):
        load_quantized(tmp_path)

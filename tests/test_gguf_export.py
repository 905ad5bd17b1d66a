"""GGUF files that are written here, read back by this package and by transformers. llama.cpp reads them in loaders/test_gguf_loaders.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, LlamaFileType
from gguf_models import CASES, IDS, LLAMA3, make_case, merging_tokenizer, sentencepiece_tokenizer, trained_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ptqcli.api import quantize
from ptqcli.checkpoint.gguf_blocks import BLOCK_TYPES
from ptqcli.checkpoint.gguf_file import GGUFFile, TensorInfo
from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats.gguf_export import export_checkpoint, export_model, plan_checkpoint, plan_model
from ptqcli.formats.gguf_mix import MIXES, tensor_types
from ptqcli.formats.gguf_tokenizer import tokenizer_keys
from ptqcli.formats.gguf_writer import GGUFWriting
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.model.gguf import GGUFModel, load_tokenizer
from ptqcli.model.gguf_config import llama3_divisors, metadata_of
from ptqcli.model.gguf_pre_tokenizers import PRE_TOKENIZERS, PROBE, SAME, name_of, pre_tokenizer
from ptqcli.model.locate import demo_model
from ptqcli.model.source import ModelFolder
from ptqcli.runtime.models import load_model

TEXT = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
MIX_CASES = json.loads((Path(__file__).parent / "golden" / "gguf_mixes.json").read_text())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits[0]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose rows super-blocks divide."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    with pytest.MonkeyPatch.context() as patch:
        make_case(folder, "llama", patch, hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1, dtype=torch.bfloat16)
    return folder


# Mixes


def shapes_of(config: dict[str, Any], names: list[str]) -> dict[str, tuple[int, ...]]:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    columns = {"ffn_down": wide, "attn_output": heads}
    shapes: dict[str, tuple[int, ...]] = {"output_norm.weight": (hidden,)}
    for part in names:
        places = [part] if part in ("output", "token_embd") else [f"blk.{layer}.{part}" for layer in range(config["num_hidden_layers"])]
        shapes |= {f"{place}.weight": (8, columns.get(part, hidden)) for place in places}
    return shapes


@pytest.mark.parametrize(
    ("case", "mix"), [(case, mix) for case, found in MIX_CASES["cases"].items() for mix in found["types"]], ids=lambda value: value
)
def test_mixes_are_those_of_llama_cpp(case: str, mix: str) -> None:
    config, expected = MIX_CASES["cases"][case]["config"], MIX_CASES["cases"][case]["types"][mix]
    shapes = shapes_of(config, list(expected))
    types = tensor_types(mix, shapes, config["num_attention_heads"] // config["num_key_value_heads"])
    assert types.pop("output_norm.weight") == "F32"
    letters = MIX_CASES["letters"]
    for part, wanted in expected.items():
        found = [types[name] for name in shapes if name.removesuffix(".weight").endswith(part)]
        if part == "output":
            found = [types["output.weight"]]
        assert found == [letters[letter] for letter in wanted], part


def test_every_mix_has_a_file_type_of_the_gguf_package() -> None:
    assert all(mix.file_type in LlamaFileType.__members__ for mix in MIXES.values())
    with pytest.raises(UsageError, match="'q4_k_x' is unknown; use f32"):
        tensor_types("q4_k_x", {}, 1)


# Models


@pytest.mark.parametrize("case", CASES)
def test_a_model_comes_back_as_it_was(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_case(tmp_path / "model", case, monkeypatch)
    plan = export_model(ModelFolder(tmp_path / "model"), tmp_path / "model.gguf", "f32")
    assert set(plan.types().values()) == {"F32"}
    source = GGUFModel(tmp_path / "model.gguf")
    assert metadata_of(source.config) == metadata_of(model.config)
    for key in ("rope_parameters", "tie_word_embeddings", "vocab_size"):
        assert getattr(source.config, key) == getattr(model.config, key)
    for name, parameter in model.named_parameters():
        assert torch.allclose(source.tensors.read(name), parameter, atol=3e-7), name
    assert torch.allclose(logits(load_model(tmp_path / "model.gguf")), logits(model), atol=1e-5)


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma2"])
def test_transformers_reads_what_is_written(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_case(tmp_path / "model", case, monkeypatch)
    export_model(ModelFolder(tmp_path / "model"), tmp_path / "model.gguf", "f16")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        wanted = expected[name] if "norm" in name or "bias" in name else expected[name].half().float()
        assert torch.allclose(parameter.float(), wanted, atol=3e-7), name


@pytest.mark.parametrize("mix", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_transformers_reads_blocks_with_equal_parameters(mix: str, tmp_path: Path, wide: Path) -> None:
    export_model(ModelFolder(wide), tmp_path / "demo.gguf", mix)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="demo.gguf")
    ours = GGUFModel(tmp_path / "demo.gguf", allow_requantize=True).tensors
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter.float(), ours.read(name)), name


@pytest.mark.parametrize(("mix", "largest"), [("q8_0", 0.006), ("q6_k", 0.02), ("q4_k_m", 0.08), ("q2_k", 0.4)])
def test_mixes_of_the_demo_model_keep_their_matrices(mix: str, largest: float, tmp_path: Path) -> None:
    plan = export_model(ModelFolder(demo_model()), tmp_path / "demo.gguf", mix)
    original, written = SafetensorsFolder(demo_model()), GGUFModel(tmp_path / "demo.gguf", allow_requantize=True).tensors
    errors = []
    for name in original.names:
        weight = original.read(name).float()
        errors.append(((written.read(name) - weight).norm() / weight.norm()).item())
    assert 0.3 * largest < max(errors) < largest
    assert plan.nbytes == sum(tensor.nbytes for tensor in GGUFFile(tmp_path / "demo.gguf").stored.values())


def test_importance_goes_to_the_columns_of_its_linear(wide: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    importance = torch.ones(256)
    importance[:16] = 1e4
    original = SafetensorsFolder(wide).read(f"{name}.weight").float()
    errors = []
    for given in ({}, {name: importance}):
        export_model(ModelFolder(wide), tmp_path / "demo.gguf", "q4_k_s", given, overwrite=True)
        written = GGUFModel(tmp_path / "demo.gguf", allow_requantize=True).tensors.read(f"{name}.weight")
        errors.append((written - original)[:, :16].norm())
    assert errors[1] < 0.9 * errors[0]


def test_the_same_model_gives_the_same_bytes(wide: Path, tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        export_model(ModelFolder(wide), tmp_path / name, "q4_k_m")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


# Checkpoints


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [("w4a16-g32", "Q4_0"), ("w4a16-g128", "Q4_0"), ("w4a16-row", "Q4_0"), ("w3a16-g32-asym", "Q4_0"), ("w2a16-g64", "Q4_0"),
     ("w8a16-g32", "Q8_0"), ("w8a8", "Q8_0"), ("w8a16-g32-asym", "F16"), ("w4a16-g16", "F16")],
)  # fmt: skip
def test_codes_of_a_checkpoint_are_kept(scheme: str, kind: str, tmp_path: Path, wide: Path) -> None:
    quantize(wide, output=tmp_path / "out", algo="rtn", scheme=scheme)
    checkpoint = open_checkpoint(tmp_path / "out")
    plan = export_checkpoint(checkpoint, tmp_path / "out.gguf")
    assert {plan.types()[f"{name}.weight"] for name in checkpoint.schemes} == {kind}
    assert any("no block type" in note for note in plan.notes) == (kind == "F16")
    assert not any("rounded to fp16" in note for note in plan.notes)
    written = GGUFModel(tmp_path / "out.gguf", allow_requantize=True).tensors
    for name in checkpoint.schemes:
        wanted = checkpoint.weight(name).dequantize(torch.float32)
        assert torch.equal(written.read(f"{name}.weight"), wanted if kind != "F16" else wanted.half())


def test_minima_of_four_bits_are_rounded_and_that_is_told(tmp_path: Path, wide: Path) -> None:
    quantize(wide, output=tmp_path / "out", algo="rtn", scheme="w4a16-g64-asym")
    checkpoint = open_checkpoint(tmp_path / "out")
    plan = export_checkpoint(checkpoint, tmp_path / "out.gguf", rest="q8_0")
    assert plan.types()["model.embed_tokens.weight"] == "Q8_0"
    assert any("rounded to fp16" in note for note in plan.notes)
    written = GGUFModel(tmp_path / "out.gguf", allow_requantize=True).tensors
    for name in checkpoint.schemes:
        weight = checkpoint.weight(name)
        missed = (written.read(f"{name}.weight") - weight.dequantize(torch.float32)).abs().max()
        assert 0 < missed <= 16 * weight.scale.abs().max() * 2**-11


def test_codes_that_a_solver_has_chosen_take_the_place_of_a_planned_tensor(wide: Path, tmp_path: Path) -> None:
    """How a run that quantizes writes codes of its own: the plan has the place, the caller the bytes."""
    plan = plan_model(ModelFolder(wide), "q4_k_s")
    name = "model.layers.0.self_attn.q_proj.weight"
    entry = next(entry for entry in plan.entries if entry.name == name)
    own = torch.zeros(entry.info.shape[0], entry.info.kind.row_bytes(entry.info.shape[1]), dtype=torch.uint8)
    own[:, :4] = torch.tensor([0, 60, 0, 60], dtype=torch.uint8)  # d = dmin = 1.0
    own[:, 4] = torch.arange(len(own)) % 64  # the first scale
    own[:, 16] = 1  # the first code
    with GGUFWriting(tmp_path / "own.gguf", plan.metadata, [each.info for each in plan.entries]) as file:
        for each in reversed(plan.entries):
            assert each.make is not None
            file.write(each.info.name, each.in_file(own if each.name == name else each.make()))
    written = GGUFModel(tmp_path / "own.gguf", allow_requantize=True).tensors.read(name)
    assert torch.equal(written[:, 0], torch.arange(len(own)) % 64)
    assert plan.with_makers({name: lambda: own}).entries[plan.entries.index(entry)].make is not entry.make


# Configurations


@pytest.mark.parametrize(
    ("case", "changes", "what"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type yarn"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8}, "layer_types"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "layer_types"),
    ],
)
def test_what_a_file_cannot_say_is_refused(
    case: str, changes: dict[str, Any], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_case(tmp_path / "model", case, monkeypatch, **changes)
    with pytest.raises(PTQError, match=f"have no {what}"):
        export_model(ModelFolder(tmp_path / "model"), tmp_path / "model.gguf", "f16")
    assert list(tmp_path.glob("*.gguf")) == []


def test_other_architectures_are_refused_by_name() -> None:
    with pytest.raises(PTQError, match="type gpt2 cannot be a GGUF file yet; what can: llama, mistral, qwen2"):
        metadata_of(AutoConfig.for_model("gpt2"))


def test_stretched_rotation_is_that_of_transformers() -> None:
    config = AutoConfig.for_model("llama", head_dim=64, rope_parameters=LLAMA3, max_position_embeddings=16_384)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 10_000.0 ** (torch.arange(0, 64, 2).float() / 64)
    assert torch.allclose(llama3_divisors(LLAMA3, 64), plain / stretched, rtol=1e-5)


# Tokenizers


def test_pre_tokenizers_are_told_apart_by_what_they_do() -> None:
    cuts = {name: pre_tokenizer(name).pre_tokenize_str(PROBE) for name in PRE_TOKENIZERS}
    assert len({json.dumps(each) for each in cuts.values()}) == len(cuts)
    assert name_of(pre_tokenizers.ByteLevel(add_prefix_space=False)) == "gpt-2"
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert name_of(digits) == "smollm"
    assert name_of(pre_tokenizers.ByteLevel(add_prefix_space=True)) is None
    assert pre_tokenizer("starcoder").pre_tokenize_str(PROBE) == cuts["smollm"]
    assert pre_tokenizer("no such name") is None
    assert set(SAME) <= set(PRE_TOKENIZERS)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_tokenizers_come_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained_tokenizer(pre_tokenizer(name), TEXT)
    made = tokenizer_keys(tokenizer, len(tokenizer) + 3)
    assert made.values["tokenizer.ggml.pre"] == {"llama-bpe": "dbrx"}.get(name, name)
    assert made.values["tokenizer.ggml.tokens"][-1] == f"[PAD{len(tokenizer) + 2}]"
    assert made.values["tokenizer.ggml.add_bos_token"] is True
    assert made.values["tokenizer.ggml.add_eos_token"] is False
    again = written_and_read(tokenizer, tmp_path, monkeypatch)
    for text in (TEXT[:3000], PROBE, "<tool> a</s>b"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers_come_back(prefix: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = sentencepiece_tokenizer(TEXT, prefix=prefix)
    made = tokenizer_keys(tokenizer, len(tokenizer))
    assert made.notes == []
    assert made.values["tokenizer.ggml.add_space_prefix"] is prefix
    types = made.values["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6]
    assert types.count(6) == 256
    if prefix:
        again = written_and_read(tokenizer, tmp_path, monkeypatch)
        assert again(TEXT[:2000])["input_ids"] == tokenizer(TEXT[:2000])["input_ids"]


def written_and_read(tokenizer: PreTrainedTokenizerFast, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    make_case(folder / "model", "llama", monkeypatch, vocab_size=len(tokenizer) + 3)
    tokenizer.save_pretrained(folder / "model")
    export_model(ModelFolder(folder / "model"), folder / "model.gguf", "f16")
    return load_tokenizer(GGUFFile(folder / "model.gguf"))


def test_the_chat_template_and_special_tokens_go_along() -> None:
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    values = tokenizer_keys(tokenizer, 258).values
    assert values["tokenizer.chat_template"] == tokenizer.chat_template
    assert (values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.padding_token_id"]) == (256, 256)
    assert values["tokenizer.ggml.token_type"][255:258] == [1, 3, 1]


def odd_tokenizer(what: str) -> PreTrainedTokenizerFast:
    tokenizer = merging_tokenizer().backend_tokenizer
    if what == "unigram":
        tokenizer = Tokenizer(models.Unigram([("a", 0.0)]))
    elif what == "cuts":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])
    elif what == "normalizer":
        tokenizer.normalizer = normalizers.Lowercase()
    elif what == "plain":
        tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("what", "message"),
    [("unigram", "type Unigram"), ("cuts", "no name for"), ("normalizer", "'Lowercase'"), ("plain", "neither byte-level nor falls back")],
)
def test_tokenizers_that_llama_cpp_has_not_are_refused(what: str, message: str) -> None:
    with pytest.raises(PTQError, match=message):
        tokenizer_keys(odd_tokenizer(what), 1000)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused() -> None:
    with pytest.raises(PTQError, match="258 tokens, but the embedding 257 rows"):
        tokenizer_keys(merging_tokenizer(), 257)


# The file


def test_a_file_is_replaced_only_when_that_is_asked_for(wide: Path, tmp_path: Path) -> None:
    source, path = ModelFolder(wide), tmp_path / "demo.gguf"
    export_model(source, path, "q8_0")
    with pytest.raises(UsageError, match="already exists"):
        export_model(source, path, "q4_0")
    export_model(source, path, "q4_0", overwrite=True)
    assert GGUFFile(path).metadata["general.file_type"] == LlamaFileType.MOSTLY_Q4_0
    with pytest.raises(UsageError, match=r"is called something\.gguf"):
        export_model(source, tmp_path / "demo.bin", "q4_0")
    with pytest.raises(UsageError, match="no folder"):
        export_model(source, tmp_path / "none" / "demo.gguf", "q4_0")
    assert [each.name for each in tmp_path.iterdir()] == ["demo.gguf"]


def test_nothing_is_left_of_a_file_that_fails(tmp_path: Path) -> None:
    info = TensorInfo(name="token_embd.weight", kind=BLOCK_TYPES["F32"], shape=(4, 32))
    metadata = {"general.architecture": "llama"}
    with pytest.raises(PTQError, match="was not written"), GGUFWriting(tmp_path / "a.gguf", metadata, [info]):
        pass
    with pytest.raises(PTQError, match="has 4 bytes and takes 512"), GGUFWriting(tmp_path / "a.gguf", metadata, [info]) as file:
        file.write(info.name, torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(KeyboardInterrupt), GGUFWriting(tmp_path / "a.gguf", metadata, [info]):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_gguf_package_reads_the_whole_file(wide: Path, tmp_path: Path) -> None:
    plan = export_model(ModelFolder(wide), tmp_path / "demo.gguf", "q4_k_m")
    reader = GGUFReader(tmp_path / "demo.gguf")
    assert [tensor.name for tensor in reader.tensors] == [entry.info.name for entry in plan.entries]
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert reader.fields["general.file_type"].contents() == LlamaFileType.MOSTLY_Q4_K_M
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 258


def test_a_plan_tells_before_anything_is_written(tmp_path: Path, wide: Path) -> None:
    quantize(wide, output=tmp_path / "out", algo="rtn", scheme="w4a16-g32")
    plan = plan_checkpoint(open_checkpoint(tmp_path / "out"))
    assert plan.nbytes < 0.6 * SafetensorsFolder(wide).total_bytes
    assert plan.notes == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

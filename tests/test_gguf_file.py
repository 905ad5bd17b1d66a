"""GGUF files as models: what llama.cpp wrote gives the logits of transformers, and what is damaged is refused by name."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Ptq
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from safetensors.torch import load_file

from ptqcli.checkpoint.gguf_file import GGUFFile, LongArray
from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats.gguf import decoded_note
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.model.gguf import GGUFModel, GGUFTensors, load_tokenizer
from ptqcli.model.gguf_config import llama3_divisors, read_config
from ptqcli.model.locate import find_model
from ptqcli.runtime.layers import kernels_in
from ptqcli.runtime.models import load_model

CHECKPOINTS = Path(__file__).parent / "golden" / "ckpt"
FILES = {"q4_0": CHECKPOINTS / "tiny-q4_0.gguf", "q8_0": CHECKPOINTS / "tiny-q8_0.gguf"}
IDS = torch.arange(1, 17)[None]


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(path)(input_ids=IDS).logits[0]


@pytest.mark.parametrize("name", FILES)
def test_files_of_llama_cpp_give_the_logits_of_transformers(name: str) -> None:
    expected = load_file(CHECKPOINTS / "expected_logits.safetensors")[f"tiny-{name}.gguf"]
    assert torch.allclose(logits(FILES[name]), expected, atol=1e-5)
    other = load_file(CHECKPOINTS / "expected_logits.safetensors")["tiny"]
    assert not torch.allclose(logits(FILES[name]), other, atol=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_is_what_the_gguf_package_reads(name: str) -> None:
    file, reader = GGUFFile(FILES[name]), GGUFReader(FILES[name])
    assert sorted(file.stored) == sorted(tensor.name for tensor in reader.tensors)
    for tensor in reader.tensors:
        stored = file.stored[tensor.name]
        assert stored.shape == tuple(reversed(tensor.shape.tolist()))
        assert stored.kind.number == tensor.tensor_type
        assert torch.equal(file.read(tensor.name).flatten(), torch.from_numpy(tensor.data.copy()).view(torch.uint8).flatten())


def test_rows_of_queries_and_keys_are_put_back() -> None:
    tensors = GGUFModel(FILES["q8_0"], allow_requantize=True).tensors
    original = SafetensorsFolder(CHECKPOINTS / "tiny")
    assert tensors.names == original.names
    for name in original.names:
        step = original.read(name).abs().max() / 127
        assert (tensors.read(name) - original.read(name)).abs().max() <= step, name


def test_codes_stay_packed_where_a_scheme_holds_them() -> None:
    assert sum(kernels_in(load_model(FILES["q4_0"])).values()) == 15
    packed = open_checkpoint(FILES["q4_0"])
    assert {str(scheme) for scheme in packed.schemes.values()} == {"w4a16-g32", "w8a16-g32"}
    decoded = GGUFModel(FILES["q4_0"], allow_requantize=True).tensors
    for name in packed.schemes:
        assert torch.equal(packed.weight(name).dequantize(torch.float32), decoded.read(f"{name}.weight"))
    name = "model.layers.0.mlp.up_proj"
    stored = packed.tensors.read(f"{name}.q4_0")
    assert torch.equal(packed.format.pack(name, packed.weight(name))[f"{name}.q4_0"], stored)


def test_metadata_and_configuration() -> None:
    file = GGUFFile(FILES["q4_0"])
    assert file.metadata["general.architecture"] == "llama"
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 256
    config, original = read_config(file), load_model_config()
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "rms_norm_eps", "rope_parameters", "head_dim"):
        assert getattr(config, key) == getattr(original, key), key
    assert config.tie_word_embeddings is False


def load_model_config() -> Any:
    from ptqcli.model.config import load_config

    return load_config(CHECKPOINTS / "tiny")


def test_a_quantized_file_is_quantized_again_only_when_that_is_asked_for(tmp_path: Path, ptq: Ptq) -> None:
    with pytest.raises(UsageError, match=r"quantized already \(Q4_0, Q8_0\).*--allow-requantize"):
        GGUFModel(FILES["q4_0"])
    arguments = ["quantize", str(FILES["q4_0"]), "--algo", "rtn", "--output", str(tmp_path / "out")]
    assert ptq(*arguments).code == 2
    assert ptq(*arguments, "--allow-requantize").code == 0
    again, before = logits(tmp_path / "out"), logits(FILES["q4_0"])
    assert (again - before).abs().max() < 0.5 * before.abs().max()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_commands_take_a_file_or_the_folder_of_one(tmp_path: Path, ptq: Ptq) -> None:
    shutil.copy(FILES["q8_0"], tmp_path)
    assert find_model(str(tmp_path)) == tmp_path / "tiny-q8_0.gguf"
    shown = ptq("inspect", str(tmp_path))
    assert shown.code == 0
    assert "Q8_0" in shown.out
    shutil.copy(FILES["q4_0"], tmp_path)
    with pytest.raises(UsageError, match=r"holds 2 GGUF files; name one, such as .*tiny-q4_0\.gguf"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path)) == tmp_path


def test_types_that_do_not_run_packed_are_told(tmp_path: Path) -> None:
    assert decoded_note(FILES["q4_0"]) is None
    writer = GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("token_embd.weight", torch.zeros(4, 24, dtype=torch.uint8).numpy(), raw_dtype=GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "Q5_1 are decoded" in str(decoded_note(tmp_path / "k.gguf"))


def test_the_tokenizer_comes_back(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(GGUFFile(FILES["q4_0"]))
    assert tokenizer("abc def")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode(tokenizer("the map")["input_ids"][1:]).strip() == "the map"


# Files that are written here


def write(path: Path, keys: dict[str, Any] | None = None, names: dict[str, tuple[int, ...]] | None = None) -> Path:
    """A file of random numbers with two tensors, or those of ``names``; keys: what differs in the metadata."""
    writer = GGUFWriter(path, "llama")
    sizes = {"context_length": 64, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64, "attention.head_count": 2}
    values = {f"llama.{key}": value for key, value in sizes.items()} | {"llama.attention.layer_norm_rms_epsilon": 1e-5} | (keys or {})
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    shapes = names or {"token_embd.weight": (8, 64), "output_norm.weight": (64,)}
    for name, shape in shapes.items():
        writer.add_tensor(name, torch.randn(shape, generator=torch.Generator().manual_seed(0)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"general.alignment": 12}, "alignment"),
        ({"llama.embedding_length": 0}, "llama.embedding_length is 0"),
        ({"llama.block_count": 70_000}, "more layers than"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn', which is not read"),
        ({"llama.rope.dimension_count": 8}, "partial rotation"),
        ({"llama.attention.value_length": 8}, "value_length"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "not a positive number"),
        ({"tokenizer.ggml.bos_token_id": "x"}, "not a token"),
        ({"split.count": 3}, "one of several parts"),
    ],
)
def test_wrong_metadata_is_refused_by_its_key(keys: dict[str, Any], wrong: str, tmp_path: Path) -> None:
    path = write(tmp_path / "wrong.gguf", keys)
    with pytest.raises(PTQError, match=wrong) as caught:
        read_config(GGUFFile(path))
    assert str(path) in str(caught.value)


def test_a_stray_tensor_is_refused(tmp_path: Path) -> None:
    names = {"token_embd.weight": (8, 64), "output_norm.weight": (64,), "blk.0.ssm_in.weight": (8, 64)}
    file = GGUFFile(write(tmp_path / "stray.gguf", names=names))
    with pytest.raises(PTQError, match=r"blk\.0\.ssm_in\.weight"):
        GGUFTensors(file, read_config(file))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(PTQError, match="'mamba', which is not read; what is read: llama"):
        read_config(GGUFFile(tmp_path / "other.gguf"))


def test_rotation_of_llama_3_1_is_found_again_and_any_other_refused(tmp_path: Path) -> None:
    rope = {"rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    path = tmp_path / "rope.gguf"
    for divisors, is_right in ((llama3_divisors(rope, 32), True), (llama3_divisors({**rope, "high_freq_factor": 5.0}, 32), False)):
        writer = GGUFWriter(path, "llama")
        for key, value in {"context_length": 64, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64}.items():
            writer.add_uint32(f"llama.{key}", value)
        writer.add_uint32("llama.attention.head_count", 2)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        writer.add_float32("llama.rope.freq_base", 5e5)
        writer.add_tensor("token_embd.weight", torch.ones(8, 64).numpy())
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if is_right:
            assert read_config(GGUFFile(path)).rope_parameters == {"rope_type": "llama3", **rope}
        else:
            with pytest.raises(PTQError, match=r"rope_freqs\.weight stretches"):
                read_config(GGUFFile(path))


def test_long_arrays_are_left_in_the_file(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "long.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", [str(number) for number in range(5_000)])
    writer.add_array("tokenizer.ggml.scores", [float(number) for number in range(5_000)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert GGUFFile(tmp_path / "long.gguf").metadata["tokenizer.ggml.tokens"] == LongArray(5_000)


def header_end() -> int:
    return min(tensor.start for tensor in GGUFFile(FILES["q4_0"]).stored.values())


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = FILES["q4_0"].read_bytes()
    cuts = [0, 3, 7, 20, *range(24, header_end(), 977), header_end(), len(whole) - 40]
    path = tmp_path / "cut.gguf"
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(PTQError, match=r"cut\.gguf"):
            GGUFFile(path)


def reason(path: Path) -> str | None:
    """Why a file is refused, None if it is read."""
    try:
        file = GGUFFile(path)
        GGUFTensors(file, read_config(file))
    except PTQError as error:
        return str(error)
    return None


def test_changed_bytes_in_the_header_are_read_or_refused(tmp_path: Path) -> None:
    whole, choose = bytearray(FILES["q4_0"].read_bytes()), random.Random(0)
    path, refused = tmp_path / "changed.gguf", 0
    for _ in range(200):
        changed = bytearray(whole)
        place = choose.randrange(header_end())
        changed[place : place + 8] = bytes(choose.choice((0, 1, 127, 255, choose.randrange(256))) for _ in range(8))
        path.write_bytes(changed)
        message = reason(path)
        assert message is None or str(path) in message
        refused += message is not None
    assert 50 < refused < 200


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PTQError, match="cannot be read"):
        GGUFFile(tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_text("not a model at all")
    with pytest.raises(PTQError, match="is no GGUF file"):
        GGUFFile(tmp_path / "text.gguf")


def test_dequantizing_agrees_with_the_gguf_package() -> None:
    file = GGUFFile(FILES["q4_0"])
    tensors = GGUFTensors(file, read_config(file))
    wanted = dequantize(file.read("token_embd.weight").numpy(), GGMLQuantizationType.Q4_0)
    assert torch.equal(tensors.read("model.embed_tokens.weight"), torch.from_numpy(wanted))

"""Models whose weights are stored as 8- or 4-bit floats with scales, as sources and as originals.

The truth is each number worked out by itself, and what transformers makes of the same files.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commandline import Ptq, one_line
from mixtures import MIXTURES
from safetensors.torch import load_file, save_file
from tiny import TOKENS, byte_tokenizer, make_model, token_ids, write_text
from torch import Tensor
from transformers import AutoModelForCausalLM

from ptqcli.checkpoint.scaled_floats import ScaledFloats
from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats.sources import open_source
from ptqcli.runtime import load_quantized
from ptqcli.runtime.models import load_model

FP8 = torch.float8_e4m3fn
ODD = {"hidden_size": 160, "intermediate_size": 208, "head_dim": 40}  # no multiple of 128, and blocks of less than 128 columns at the end
EVEN = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def by_blocks(weight: Tensor, size: int = 128) -> tuple[Tensor, Tensor]:
    """FP8 codes and the scale of each block, one block at a time."""
    out_features, in_features = weight.shape
    codes = torch.empty(weight.shape, dtype=FP8)
    scale = torch.empty(-(-out_features // size), -(-in_features // size))
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            part = slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size)
            scale[row, column] = weight[part].float().abs().max() / 448
            codes[part] = (weight[part].float() / scale[row, column]).to(FP8)
    return codes, scale


def one_by_one(codes: Tensor, scale: Tensor, size: int = 128) -> Tensor:
    """What the codes stand for: each product exact in float64, then as float32, then as bfloat16."""
    rows, columns = (torch.arange(length) // size for length in codes.shape)
    return (codes.double() * scale.double()[rows][:, columns]).float().bfloat16()


def store(folder: Path, entry: dict[str, Any], **changes: Any) -> dict[str, Tensor]:
    """A model with its linears in FP8 by blocks; its tensors as numbers."""
    make_model(folder, dtype=torch.bfloat16, **changes)
    tensors = load_file(folder / "model.safetensors")
    numbers = dict(tensors)
    for name, tensor in list(tensors.items()):
        if "proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = by_blocks(tensor)
            numbers[name] = one_by_one(tensors[name], tensors[f"{name}_scale_inv"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rewrite_config(folder, entry)
    return numbers


def rewrite_config(folder: Path, entry: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))


def change(folder: Path, **tensors: Tensor) -> None:
    """Put ``tensors`` into the file; those of no elements go."""
    stored = {**load_file(folder / "model.safetensors"), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An FP8 model, and the same with the whole of it dequantized first."""
    workshop = tmp_path_factory.mktemp("fp8")
    numbers = store(workshop / "fp8", BLOCKS, **ODD)
    make_model(workshop / "plain", dtype=torch.bfloat16, **ODD)
    save_file(numbers, workshop / "plain" / "model.safetensors", metadata={"format": "pt"})
    write_text(workshop / "text.txt")
    return workshop / "fp8", workshop / "plain"


def test_every_number_is_its_code_times_the_scale_of_its_block(odd: tuple[Path, Path]) -> None:
    source, plain = open_source(odd[0]), SafetensorsFolder(odd[1])
    assert source.tensors.names == plain.names
    for name in plain.names:
        assert source.tensors.dtype(name) == plain.dtype(name)
        assert source.tensors.shape(name) == plain.shape(name)
        assert torch.equal(source.tensors.read(name), plain.read(name)), name
    assert "quantization_config" not in source.config_json()


def test_a_scale_of_the_wrong_block_gives_other_numbers(odd: tuple[Path, Path]) -> None:
    stored = SafetensorsFolder(odd[0])
    name = "model.layers.0.mlp.down_proj.weight"
    shifted = one_by_one(stored.read(name), stored.read(f"{name}_scale_inv").roll(1, 1))
    assert not torch.equal(open_source(odd[0]).tensors.read(name), shifted)


@pytest.mark.parametrize("algo", ["rtn", "gptq"])
def test_quantizing_fp8_is_quantizing_what_it_stands_for(odd: tuple[Path, Path], tmp_path: Path, ptq: Ptq, algo: str) -> None:
    text = odd[0].parent / "text.txt"
    request = ["--algo", algo, "--calib", text, "--nsamples", "4", "--seqlen", "64"]
    for model, output in zip(odd, ("a", "b"), strict=True):
        answer = ptq("quantize", model, *request, "--output", tmp_path / output)
        assert answer.code == 0, answer.err
        assert ("stored in FP8" in answer.out + answer.err) == (model == odd[0])
    written, wanted = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in written)
    config, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert config == other
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert not any(tensor.dtype == FP8 or "scale_inv" in name for name, tensor in written.items())


def test_the_original_of_an_evaluation_may_be_fp8(odd: tuple[Path, Path], tmp_path: Path, ptq: Ptq) -> None:
    text = odd[0].parent / "text.txt"
    assert ptq("quantize", odd[0], "--algo", "rtn", "--output", tmp_path / "out").code == 0
    answer = ptq("eval", tmp_path / "out", "--ppl", text, "--seqlen", "64", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    with torch.no_grad():
        ours, theirs = (load_model(model)(token_ids()).logits for model in odd)
    assert torch.equal(ours, theirs)
    assert Path(found["baseline"]) == odd[0]


def test_transformers_makes_the_same_numbers(tmp_path: Path) -> None:
    store(tmp_path / "fp8", BLOCKS, **EVEN)  # it takes blocks that divide
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16).state_dict()
    ours = open_source(tmp_path / "fp8").tensors
    compared = [name for name in ours.names if "proj" in name]
    assert len(compared) == 14
    for name in compared:
        assert torch.equal(ours.read(name), theirs[name]), name


@pytest.mark.parametrize("shape", [(), (1,), (208,), (208, 1)])
def test_a_scale_for_the_matrix_or_for_each_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight = torch.randn(208, 160, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)).add(0.1).bfloat16()
    save_file({"m.weight": weight.to(FP8), "m.weight_scale": scale, "m.input_scale": torch.ones(1)}, tmp_path / "model.safetensors")
    found = ScaledFloats(SafetensorsFolder(tmp_path), torch.bfloat16)
    assert found.names == ("m.weight",)
    rows = scale.double().flatten().expand(208) if scale.numel() == 1 else scale.double().flatten()
    wanted = torch.stack([weight.to(FP8)[row].double() * rows[row] for row in range(208)])
    assert torch.equal(found.read("m.weight"), wanted.bfloat16())


def test_a_stack_of_matrices_has_a_scale_for_each_block_of_each(tmp_path: Path) -> None:
    stack = torch.randn(3, 20, 24, generator=torch.Generator().manual_seed(0))
    parts = [by_blocks(matrix, 16) for matrix in stack]
    codes, scale = (torch.stack(part) for part in zip(*parts, strict=True))
    save_file({"experts.down_proj": codes, "experts.down_proj_scale_inv": scale}, tmp_path / "model.safetensors")
    found = ScaledFloats(SafetensorsFolder(tmp_path), torch.bfloat16, (16, 16)).read("experts.down_proj")
    assert torch.equal(found, torch.stack([one_by_one(*part, 16) for part in parts]))
    alone = ScaledFloats(SafetensorsFolder(tmp_path), torch.bfloat16, (16, 16)).read_entry("experts.down_proj", 1)
    assert torch.equal(alone, found[1])


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        (torch.ones(3, 2), r"model\.safetensors: tensor model\.layers\.0\.mlp\.up_proj\.weight_scale_inv has shape \[3, 2\]"),
        (torch.full((2, 2), float("nan")), r"up_proj\.weight_scale_inv holds NaN or infinity"),
        (torch.tensor([[1.0, -1.0], [1.0, 1.0]]), r"up_proj\.weight_scale_inv holds no scale, or a negative one"),
        (torch.full((2, 2), 1e38), r"up_proj\.weight, in torch\.bfloat16, holds NaN or infinity"),
        (torch.ones(2, 2, dtype=torch.uint8), r"up_proj\.weight_scale_inv is torch\.uint8"),
    ],
)
def test_scales_that_cannot_be(tmp_path: Path, ptq: Ptq, scale: Tensor, told: str) -> None:
    store(tmp_path / "fp8", BLOCKS, **ODD)
    change(tmp_path / "fp8", model__layers__0__mlp__up_proj__weight_scale_inv=scale)
    with pytest.raises(PTQError, match=told):
        open_source(tmp_path / "fp8").tensors.read("model.layers.0.mlp.up_proj.weight")
    answer = ptq("quantize", tmp_path / "fp8", "--algo", "rtn", "--output", tmp_path / "out")
    assert answer.code == 1
    assert "up_proj" in one_line(answer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [[128], [128, 0], "128", [128, 2.0]])
def test_blocks_that_cannot_be(tmp_path: Path, size: object) -> None:
    store(tmp_path / "fp8", {**BLOCKS, "weight_block_size": size}, **ODD)
    with pytest.raises(PTQError, match="are not rows and columns"):
        open_source(tmp_path / "fp8")


# MXFP4


def packed_fp4(shape: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random codes and powers of two of a stack of matrices, as in the file: uint8 [E, out, G, 16] and [E, out, G]."""
    experts, out_features, in_features = shape
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, out_features, in_features // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 126, (experts, out_features, in_features // 32), dtype=torch.uint8, generator=generator)
    return blocks, scales


def fp4_by_hand(blocks: Tensor, scales: Tensor) -> Tensor:
    """float64 [E, in, out]: sign, two bits of exponent with bias 1, one of mantissa."""
    experts, out_features, groups, _ = blocks.shape
    made = torch.empty(experts, groups * 32, out_features, dtype=torch.float64)
    for expert in range(experts):
        for row in range(out_features):
            for column in range(groups * 32):
                byte = int(blocks[expert, row, column // 32, column % 32 // 2])
                code = byte >> 4 if column % 2 else byte & 15
                exponent, mantissa = code >> 1 & 3, code & 1
                magnitude = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
                made[expert, column, row] = (-magnitude if code & 8 else magnitude) * 2.0 ** (int(scales[expert, row, column // 32]) - 127)
    return made


def save_fp4(folder: Path, **parts: Tensor) -> ScaledFloats:
    save_file({f"mlp.experts.down_proj_{name}": tensor for name, tensor in parts.items()}, folder / "model.safetensors")
    return ScaledFloats(SafetensorsFolder(folder), torch.bfloat16)


def test_mxfp4_is_its_definition_and_what_transformers_makes(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = packed_fp4((3, 10, 64))
    found = save_fp4(tmp_path, blocks=blocks, scales=scales)
    assert found.names == ("mlp.experts.down_proj",)
    assert found.shape("mlp.experts.down_proj") == (3, 64, 10)
    values = found.read("mlp.experts.down_proj")
    assert torch.equal(values.double(), fp4_by_hand(blocks, scales))
    assert torch.equal(values, convert_moe_packed_tensors(blocks, scales))
    assert torch.equal(found.read_entry("mlp.experts.down_proj", 2), values[2])
    assert not torch.equal(values, convert_moe_packed_tensors(blocks, scales.roll(1, 1)))


def test_parts_of_mxfp4_that_do_not_fit(tmp_path: Path) -> None:
    blocks, scales = packed_fp4((3, 10, 64))
    with pytest.raises(PTQError, match=r"model\.safetensors: tensor mlp\.experts\.down_proj_blocks has shape \[3, 10, 2, 16\]"):
        save_fp4(tmp_path, blocks=blocks, scales=scales[:, :9].contiguous()).shape("mlp.experts.down_proj")
    with pytest.raises(PTQError, match=r"down_proj_scales is torch\.int32"):
        save_fp4(tmp_path, blocks=blocks, scales=scales.int()).read("mlp.experts.down_proj")


def test_mxfp4_is_taken_when_that_is_asked_for(tmp_path: Path) -> None:
    make_model(tmp_path)
    blocks, scales = packed_fp4((2, 4, 32))
    change(tmp_path, mlp__experts__down_proj_blocks=blocks, mlp__experts__down_proj_scales=scales)
    rewrite_config(tmp_path, {"quant_method": "mxfp4"})
    with pytest.raises(UsageError, match=r"quantized already \(MXFP4\).*--allow-requantize"):
        open_source(tmp_path)
    source = open_source(tmp_path, allow_requantize=True)
    assert "mlp.experts.down_proj" in source.tensors.names
    assert source.notes == (
        "its weights are quantized already (MXFP4): what that has cost stays, and the error of this run is added to it",
    )


# Packed integers and code books


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--format", "compressed-tensors", "--scheme", "w8a16-g32"), "compressed-tensors: w8a16-g32 x 14"),
        pytest.param(("--format", "gptq", "--scheme", "w4a16-g32"), "gptq: w4a16-g32 x 14", marks=pytest.mark.slow),
        pytest.param(("--format", "awq", "--scheme", "w4a16-g32"), "awq: w4a16-g32 x 14", marks=pytest.mark.slow),
        (("--format", "bitsandbytes", "--scheme", "nf4-g64"), "bitsandbytes: nf4-g64 x 14"),
    ],
)
def test_a_packed_checkpoint_is_a_source_when_that_is_asked_for(tmp_path: Path, ptq: Ptq, flags: tuple[str, ...], named: str) -> None:
    make_model(tmp_path / "model")
    packed = tmp_path / "packed"
    assert ptq("quantize", tmp_path / "model", "--algo", "rtn", *flags, "--output", packed).code == 0
    again = ["quantize", packed, "--algo", "rtn", "--scheme", "w3a16-g32", "--output", tmp_path / "again"]
    refused = ptq(*again)
    assert refused.code == 2
    assert "quantized already" in one_line(refused)
    assert "--allow-requantize" in one_line(refused)
    answer = ptq(*again, "--allow-requantize")
    assert answer.code == 0, answer.err
    assert f"quantized already ({named})" in " ".join((answer.out + answer.err).split())
    # The same as from a model that is dequantized as a whole.
    model = load_quantized(packed, fuse=False)
    whole = open_source(packed, allow_requantize=True).tensors
    plain = AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict({name: whole.read(name) for name in whole.names}, strict=True)
    plain.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config.pop("quantization_config", None)
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        difference = (load_model(tmp_path / "plain")(token_ids()).logits - model(token_ids()).logits).abs().max()
    assert difference < 1e-2 * float(plain(token_ids()).logits.detach().abs().max())
    assert ptq("quantize", tmp_path / "plain", *again[2:-1], tmp_path / "wanted").code == 0
    written, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "wanted"))
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in written)


# Mixtures of experts


def make_mixture(folder: Path, kind: str) -> dict[str, Tensor]:
    """Save a random mixture in bfloat16; the tensors in its file."""
    name, arguments = MIXTURES[kind]
    config = getattr(transformers, name)(**{**arguments, **TOKENS, "dtype": torch.bfloat16})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def scaled_experts(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same with FP8 matrices of single experts; what these stand for."""
    stored, numbers = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if ".experts." in name and tensor.dim() == 2:
            stored[name], stored[f"{name}_scale_inv"] = by_blocks(tensor)
            numbers[name] = one_by_one(stored[name], stored[f"{name}_scale_inv"])
    return stored, numbers


def packed_stacks(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same with MXFP4 stacks of experts; what these stand for."""
    stored, numbers = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("_proj") and tensor.dim() == 3:
            blocks, scales = packed_fp4((tensor.shape[0], tensor.shape[2], tensor.shape[1]))
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            numbers[name] = fp4_by_hand(blocks, scales).bfloat16()
    return stored, numbers


@pytest.mark.parametrize(
    ("kind", "store_as", "entry"),
    [("deepseek_v3", scaled_experts, BLOCKS), ("gpt_oss", packed_stacks, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})],
)
def test_experts_are_quantized_from_what_they_stand_for(tmp_path: Path, ptq: Ptq, kind: str, store_as: Any, entry: dict[str, Any]) -> None:
    stored, numbers = store_as(make_mixture(tmp_path / "scaled", kind))
    assert len(stored) > len(numbers)
    make_mixture(tmp_path / "plain", kind)
    save_file(stored, tmp_path / "scaled" / "model.safetensors", metadata={"format": "pt"})
    save_file(numbers, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    rewrite_config(tmp_path / "scaled", entry)
    text = write_text(tmp_path / "text.txt")
    for model in ("scaled", "plain"):
        request = ["--algo", "gptq", "--scheme", "w4a16-g32", "--calib", text, "--nsamples", "2", "--seqlen", "32", "--allow-requantize"]
        answer = ptq("quantize", tmp_path / model, *request, "--output", tmp_path / f"{model}-out")
        assert answer.code == 0, answer.err
    written, wanted = (load_file(tmp_path / f"{model}-out" / "model.safetensors") for model in ("scaled", "plain"))
    assert written.keys() == wanted.keys()
    assert any("experts" in name and "packed" in name for name in written)
    assert all(torch.equal(written[name], wanted[name]) for name in written)
    with torch.no_grad():
        ours, theirs = (load_model(tmp_path / model)(token_ids()).logits for model in ("scaled", "plain"))
    assert torch.equal(ours, theirs)


def test_a_scale_for_each_row_as_the_library_of_that_format_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    make_model(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if "proj" in name:
            scale = (tensor.float().abs().amax(dim=1, keepdim=True) / 448).bfloat16()
            tensors[name], tensors[f"{name}_scale"] = (tensor.float() / scale.float()).clamp(-448, 448).to(FP8), scale
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
        "format": "float-quantized",
    }
    entry = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    rewrite_config(tmp_path, entry)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers says that the file has such an entry, too
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config).state_dict()
    source = open_source(tmp_path)
    compared = [name for name in source.tensors.names if "proj" in name]
    assert len(compared) == 14
    for name in compared:
        assert torch.equal(source.tensors.read(name), theirs[name]), name
    assert "quantization_config" not in source.config_json()

"""Packed checkpoints, loaded here and by transformers: the same logits, and every missing or stray tensor named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ptq_kernels import WeightOnlyLinear
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from ptqcli.checkpoint import CheckpointReader, CheckpointWriter, write_json
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats import compressed_tensors
from ptqcli.runtime import load_quantized
from ptqcli.scheme import SUPPORTED_BITS, QuantizedWeight, Scheme, encode, fit

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "ckpt"
TOKENS = torch.arange(1, 17).unsqueeze(0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On matrices as small as these a second thread only waits, long when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
        max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=tied, dtype=dtype, bos_token_id=0, eos_token_id=1,
        attention_bias=True,
    )  # fmt: skip


def gpt2() -> GPT2Config:
    return GPT2Config(
        n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=64, initializer_range=0.2, dtype=torch.float32,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def random_model(config: Any) -> Any:
    """A model of ``config`` in its dtype, biases random too, since transformers starts them at zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def round_to_nearest(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Codes of ``weight`` [out, in], group by group, scales in its dtype."""
    columns = scheme.columns_per_group(weight.shape[1])
    parts = weight.float().split(columns, dim=1)
    grids = [fit(part, scheme, weight.dtype) for part in parts]
    codes = torch.cat([encode(part, grid, scheme) for part, grid in zip(parts, grids, strict=True)], dim=1)
    scale = torch.cat([grid.scale for grid in grids], dim=1).to(weight.dtype)
    zero = torch.cat([grid.zero for grid in grids], dim=1).to(torch.uint8)
    return QuantizedWeight(codes.to(torch.uint8), scale, zero, scheme)


def write_checkpoint(folder: Path, model: Any, choose: Callable[[str], Scheme | None]) -> dict[str, Scheme]:
    """``model`` packed into ``folder``, each linear in the scheme that ``choose`` returns, and left float where it returns None.

    The linears of ``model`` itself become the dequantized ones.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    schemes = {name: scheme for name in linears if (scheme := choose(name)) is not None}
    tensors: dict[str, Tensor] = {}
    for name, scheme in schemes.items():
        weight = linears[name].weight.data
        transposed = isinstance(linears[name], Conv1D)
        packed = round_to_nearest(weight.t() if transposed else weight, scheme)
        tensors |= compressed_tensors.pack(name, packed)
        dense = packed.dequantize()
        linears[name].weight.data = dense.t().contiguous() if transposed else dense
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    skipped = tied | {f"{name}.weight" for name in schemes}
    tensors |= {name: tensor for name, tensor in model.state_dict().items() if name not in skipped}
    writer = CheckpointWriter(folder)
    writer.write(tensors)
    writer.finish()
    conv1d = any(isinstance(linears[name], Conv1D) for name in schemes)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    ignored = [name for name in linears if name not in schemes]
    config["quantization_config"] = compressed_tensors.quantization_config(schemes, ignored, conv1d)
    write_json(folder / "config.json", config)
    return schemes


def everything(scheme: Scheme) -> Callable[[str], Scheme | None]:
    """All linears but the head in one scheme."""
    return lambda name: None if name == "lm_head" else scheme


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(TOKENS).logits
    return out.float()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def by_transformers(folder: Path, dequantize: bool = False) -> Any:
    """The model as transformers loads it, with nothing missing, unexpected or mismatched."""
    pytest.importorskip("compressed_tensors", reason="transformers reads the format with the compressed-tensors package")
    from transformers import CompressedTensorsConfig

    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **extra)
    assert {key: list(found) for key, found in info.items() if found} == {}
    return model.eval()


def change_tensor(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite the weights in ``folder`` after ``change`` has been at them."""
    reader = CheckpointReader(folder)
    tensors = {name: reader.read(name) for name in reader.names}
    change(tensors)
    (folder / "model.safetensors").unlink()
    writer = CheckpointWriter(folder)
    writer.write(tensors)
    writer.finish()


def flip_one_code(folder: Path, scheme: Scheme) -> None:
    """Move the first code of one linear by half its range."""
    change_tensor(folder, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight_packed"][0, 0].bitwise_xor_(scheme.middle))


SYMMETRIC = [Scheme(bits, group_size) for bits in SUPPORTED_BITS for group_size in (32, 128, -1)]
MODELS = {
    "fp32": llama(),
    "fp32 tied": llama(tied=True),
    "bf16": llama(torch.bfloat16),
    "bf16 tied": llama(torch.bfloat16, tied=True),
}


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        *((kind, scheme) for kind in ("fp32", "bf16 tied") for scheme in SYMMETRIC),
        *((kind, scheme) for kind in ("fp32 tied", "bf16") for scheme in (Scheme(4, 32), Scheme(3, -1))),
    ],
    ids=lambda value: value.describe() if isinstance(value, Scheme) else value,
)
def test_transformers_and_we_agree(tmp_path: Path, kind: str, scheme: Scheme) -> None:
    model = random_model(MODELS[kind])
    write_checkpoint(tmp_path, model, everything(scheme))
    ours = load_quantized(tmp_path)
    theirs = by_transformers(tmp_path)
    assert ours.dtype == theirs.dtype == MODELS[kind].dtype
    assert sum(isinstance(module, WeightOnlyLinear) for module in ours.modules()) == 14
    assert relative_error(logits(ours), logits(theirs)) < 1e-3
    assert relative_error(logits(ours), logits(model)) < 1e-3
    flip_one_code(tmp_path, scheme)
    assert relative_error(logits(load_quantized(tmp_path)), logits(theirs)) > 1e-3


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("scheme", [Scheme(b, g, symmetric=False) for b in SUPPORTED_BITS for g in (32, 128, -1)], ids=Scheme.describe)
def test_asymmetric_weights(tmp_path: Path, scheme: Scheme) -> None:
    """compressed-tensors since 0.18 stumbles over packed zero points unless it may dequantize while loading."""
    model = random_model(llama())
    write_checkpoint(tmp_path, model, everything(scheme))
    ours, theirs = load_quantized(tmp_path), by_transformers(tmp_path, dequantize=True)
    assert relative_error(logits(ours), logits(theirs)) < 1e-3
    assert relative_error(logits(ours), logits(model)) < 1e-3
    flip_one_code(tmp_path, scheme)
    assert relative_error(logits(load_quantized(tmp_path)), logits(theirs)) > 1e-3


def mixed(name: str) -> Scheme | None:
    if name == "lm_head" or name.endswith("0.mlp.up_proj"):
        return None
    return Scheme(8, -1) if "self_attn" in name else Scheme(3, 64) if "layers.1" in name else Scheme(4, 32)


def test_mixed_schemes(tmp_path: Path) -> None:
    model = random_model(llama())
    assert len(set(write_checkpoint(tmp_path, model, mixed).values())) == 3
    ours, theirs = load_quantized(tmp_path), by_transformers(tmp_path)
    assert relative_error(logits(ours), logits(theirs)) < 1e-3
    assert relative_error(logits(ours), logits(model)) < 1e-3
    flip_one_code(tmp_path, Scheme(3, 64))
    assert relative_error(logits(load_quantized(tmp_path)), logits(theirs)) > 1e-3


def test_a_quantized_head(tmp_path: Path) -> None:
    model = random_model(llama())
    write_checkpoint(tmp_path, model, lambda _name: Scheme(8, 32))
    ours, theirs = load_quantized(tmp_path), by_transformers(tmp_path)
    assert isinstance(ours.lm_head, WeightOnlyLinear)
    assert relative_error(logits(ours), logits(theirs)) < 1e-3


def test_conv1d_runs_here_and_stops_transformers(tmp_path: Path) -> None:
    model = random_model(gpt2())
    schemes = write_checkpoint(tmp_path, model, everything(Scheme(4, 32)))
    assert len(schemes) == 4
    assert relative_error(logits(load_quantized(tmp_path)), logits(model)) < 1e-3
    with pytest.raises(ValueError, match=compressed_tensors.CONV1D_KEY):
        by_transformers(tmp_path)


def test_names_without_the_base_prefix(tmp_path: Path) -> None:
    """Files of GPT-2 on the hub say ``h.0.attn`` for ``transformer.h.0.attn``."""
    model = random_model(gpt2())
    write_checkpoint(tmp_path, model, everything(Scheme(4, 32)))

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    change_tensor(tmp_path, strip)
    assert relative_error(logits(load_quantized(tmp_path)), logits(model)) < 1e-3


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden checkpoints are not beside this checkout")
@pytest.mark.parametrize("folder", ["ct_w4_sym_g32", "ct_w4_asym_g32", "ct_w3_sym_g32"])
def test_checkpoints_of_the_library(folder: str) -> None:
    from safetensors.torch import load_file

    expected = load_file(GOLDEN / "expected_logits.safetensors")[folder]
    assert relative_error(logits(load_quantized(GOLDEN / folder))[0], expected) < 1e-5


def test_generate(tmp_path: Path) -> None:
    model = random_model(llama())
    write_checkpoint(tmp_path, model, everything(Scheme(4, 32)))
    GenerationConfig(max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0).save_pretrained(tmp_path)
    ours: Any = load_quantized(tmp_path)
    tokens = ours.generate(TOKENS)
    assert tokens.shape == (1, 23)
    assert torch.equal(tokens, model.generate(TOKENS, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0))


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_one_tensor(tmp_path: Path, tied: bool) -> None:
    write_checkpoint(tmp_path, random_model(llama(tied=tied)), everything(Scheme(4, 32)))
    model: Any = load_quantized(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_another_dtype(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, random_model(llama(torch.bfloat16)), everything(Scheme(4, 32)))
    wide = load_quantized(tmp_path, dtype=torch.float32)
    assert wide.dtype == torch.float32
    theirs, _ = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert relative_error(logits(wide), logits(theirs)) < 1e-3
    assert relative_error(logits(load_quantized(tmp_path)), logits(wide)) > 1e-3


def test_weights_stay_packed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, random_model(llama()), everything(Scheme(4, 32)))
    model: Any = load_quantized(tmp_path)
    layer = model.model.layers[0].mlp.gate_proj
    assert layer.packed.nbytes == 256 * 128 // 2
    assert layer.zero is None
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_without_quantization_config(tmp_path: Path) -> None:
    random_model(llama()).save_pretrained(tmp_path)
    with pytest.raises(PTQError, match="no quantization_config, so the model is not quantized"):
        load_quantized(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        load_quantized(tmp_path / "nowhere")


UP = "model.layers.0.mlp.up_proj"
Q = "model.layers.1.self_attn.q_proj"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no codes": (lambda t: t.pop(f"{UP}.weight_packed"), f"{UP} is quantized, but it is not stored so"),
    "no scale": (lambda t: t.pop(f"{UP}.weight_scale"), f"holds no tensor {UP}.weight_scale"),
    "no bias": (lambda t: t.pop(f"{Q}.bias"), f"no tensor is stored for {Q}.bias"),
    "no norm": (lambda t: t.pop("model.norm.weight"), "no tensor is stored for model.norm.weight"),
    "no embedding": (lambda t: t.pop("model.embed_tokens.weight"), "no tensor is stored for model.embed_tokens.weight"),
    "no layer": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.1.") and "norm" in name],
        r"no tensor is stored for model\.layers\.1\.\S+ and 1 more",
    ),
    "stray codes": (lambda t: t.update({"model.x.weight_packed": torch.zeros(1)}), r"takes the tensor model\.x\.weight"),
    "stray zero points": (
        lambda t: t.update({f"{UP}.weight_zero_point": torch.zeros(1)}),
        f"takes the tensor {UP}.weight_zero_point",
    ),
    "old index": (lambda t: t.update({f"{UP}.weight_g_idx": torch.zeros(1)}), f"takes the tensor {UP}.weight_g_idx"),
    "another width": (
        lambda t: t.update({"model.norm.weight": torch.ones(64)}),
        r"model\.norm\.weight is stored as \[64\], but config\.json asks for \[128\]",
    ),
    "another matrix": (
        lambda t: t.update({name: t[name.replace("up_proj", "down_proj")] for name in list(t) if name.startswith(UP)}),
        rf"{UP} is stored as \[128, 256\], but config\.json asks for \[256, 128\]",
    ),
    "packed head": (
        lambda t: t.update({f"lm_head.{name.rpartition('.')[2]}": t[name] for name in list(t) if name.startswith(UP)}),
        r"lm_head\.weight",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_missing_and_stray_tensors_are_named(tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path, random_model(llama()), everything(Scheme(4, 32)))
    change, message = DAMAGE[kind]
    change_tensor(tmp_path, change)
    with pytest.raises(PTQError, match=message) as caught:
        load_quantized(tmp_path)
    assert "\n" not in str(caught.value)


def test_packed_tensors_without_a_scheme_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, random_model(llama()), everything(Scheme(4, 32)))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ignore"].append(UP)
    write_json(tmp_path / "config.json", config)
    with pytest.raises(PTQError, match=UP):
        load_quantized(tmp_path)

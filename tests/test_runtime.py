"""Packed checkpoints, loaded here and by transformers: the same logits, and every missing or stray tensor named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ptq_kernels import LLMInt8Linear, W8A8Linear, WeightOnlyLinear
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from ptqcli.checkpoint import CheckpointReader, CheckpointWriter, write_json
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats import compressed_tensors
from ptqcli.runtime import load_quantized
from ptqcli.scheme import SUPPORTED_BITS, ActivationScheme, OutlierColumns, OutlierSplit, QuantizedWeight, Scheme, encode, fit

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


def largest_inputs(model: Any) -> dict[str, Tensor]:
    """The largest magnitude of each linear's inputs when ``model`` reads TOKENS, by column."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _module, args, name=name: found.update({name: args[0].abs().flatten(0, -2).amax(dim=0)}))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    return found


def with_activations(weight: QuantizedWeight, dense: Tensor, largest: Tensor, split: Sequence[int]) -> QuantizedWeight:
    """``weight`` with what its scheme asks for besides: a static input scale, the columns ``split`` of ``dense`` in 16 bit."""
    scheme = weight.scheme
    if scheme.activations is not None and not scheme.activations.dynamic:
        weight = replace(weight, input_scale=(largest.amax() / 127.5).reshape(1).to(dense.dtype))
    if scheme.outliers is None:
        return weight
    columns = [column for column in split if column < dense.shape[1]]
    if not scheme.outliers.dynamic:
        weight.codes[:, columns] = scheme.middle
    return replace(weight, outliers=OutlierColumns(torch.tensor(columns, dtype=torch.int32), dense[:, columns].clone()))


def write_checkpoint(folder: Path, model: Any, choose: Callable[[str], Scheme | None], split: Sequence[int] = ()) -> dict[str, Scheme]:
    """``model`` packed into ``folder``, each linear in the scheme that ``choose`` returns, and left float where it returns None.

    split: the columns in 16 bit of every linear whose scheme has such. The linears of ``model`` itself become the dequantized ones.
    """
    largest = largest_inputs(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    schemes = {name: scheme for name in linears if (scheme := choose(name)) is not None}
    tensors: dict[str, Tensor] = {}
    for name, scheme in schemes.items():
        weight = linears[name].weight.data
        transposed = isinstance(linears[name], Conv1D)
        dense = weight.t() if transposed else weight
        packed = with_activations(round_to_nearest(dense, scheme), dense, largest[name], split)
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


def by_transformers(folder: Path, dequantize: bool = False, dtype: torch.dtype | None = None) -> Any:
    """The model as transformers loads it, with nothing missing, unexpected or mismatched."""
    pytest.importorskip("compressed_tensors", reason="transformers reads the format with the compressed-tensors package")
    from transformers import CompressedTensorsConfig

    extra: dict[str, Any] = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    extra |= {"dtype": dtype} if dtype else {}
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
    stored = "weight_packed" if scheme.activations is None else "weight"

    def flip(tensors: dict[str, Tensor]) -> None:
        codes = tensors[f"model.layers.1.mlp.down_proj.{stored}"]
        codes[0, 0] ^= scheme.middle if codes.dtype == torch.int32 else -scheme.middle

    change_tensor(folder, flip)


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


# 8-bit activations.

TOKEN, TENSOR, STATIC = ActivationScheme(), ActivationScheme(per_token=False), ActivationScheme(per_token=False, dynamic=False)


def w8a8(inputs: ActivationScheme, group_size: int = -1, split: OutlierSplit | None = None) -> Scheme:
    return Scheme(8, group_size, True, inputs, split)


def change_one_scale(folder: Path) -> None:
    change_tensor(folder, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight_scale"].view(-1)[0].mul_(4))


WITH_ACTIVATIONS = [
    *(w8a8(inputs, group_size) for inputs in (TOKEN, TENSOR, STATIC) for group_size in (-1, 0)),
    Scheme(4, -1, activations=TOKEN),
]


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [*(("fp32", scheme) for scheme in WITH_ACTIVATIONS), ("bf16 tied", w8a8(TOKEN)), ("bf16 tied", w8a8(STATIC, 0))],
    ids=lambda value: value.describe() if isinstance(value, Scheme) else value,
)
def test_transformers_and_we_agree_on_activations(tmp_path: Path, kind: str, scheme: Scheme) -> None:
    """In float32: transformers multiplies rounded floats where we multiply integers, which differs by 5e-7, or by some 5e-3 when the
    difference takes an input over the border of two codes; the largest input of a token always stands at one.
    """
    write_checkpoint(tmp_path, random_model(MODELS[kind]), everything(scheme))
    ours, theirs = load_quantized(tmp_path, dtype=torch.float32), by_transformers(tmp_path, dtype=torch.float32)
    assert sum(isinstance(module, W8A8Linear) for module in ours.modules()) == 14
    assert relative_error(logits(ours), logits(theirs)) < 1e-2
    change_one_scale(tmp_path)
    assert relative_error(logits(load_quantized(tmp_path, dtype=torch.float32)), logits(theirs)) > 1e-2


@pytest.mark.parametrize("inputs", [TOKEN, TENSOR, STATIC], ids=ActivationScheme.describe)
def test_activations_in_a_16_bit_model(tmp_path: Path, inputs: ActivationScheme) -> None:
    """transformers rounds the inputs' scales and quotients to 16 bits, we do not: we are nearer to what the checkpoint says."""
    write_checkpoint(tmp_path, random_model(MODELS["bf16"]), everything(w8a8(inputs)))
    wide = logits(load_quantized(tmp_path, dtype=torch.float32))
    ours, theirs = load_quantized(tmp_path), by_transformers(tmp_path)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert relative_error(logits(ours), wide) < 1.2 * relative_error(logits(theirs), wide)
    change_one_scale(tmp_path)
    assert relative_error(logits(load_quantized(tmp_path)), wide) > 1.2 * relative_error(logits(theirs), wide)


def mixed_formats(name: str) -> Scheme | None:
    if name == "lm_head" or name.endswith("0.mlp.up_proj"):
        return None
    return w8a8(TOKEN) if "self_attn" in name else w8a8(STATIC, 0) if "layers.1" in name else Scheme(4, 32)


def test_mixed_formats(tmp_path: Path) -> None:
    assert len(set(write_checkpoint(tmp_path, random_model(llama()), mixed_formats).values())) == 3
    ours, theirs = load_quantized(tmp_path), by_transformers(tmp_path)
    assert relative_error(logits(ours), logits(theirs)) < 1e-2
    change_one_scale(tmp_path)
    assert relative_error(logits(load_quantized(tmp_path)), logits(theirs)) > 1e-2


SPLITS = [OutlierSplit(), OutlierSplit(0.5, dynamic=False)]


@pytest.mark.parametrize("split", SPLITS, ids=OutlierSplit.describe)
def test_an_outlier_split_stops_transformers(tmp_path: Path, split: OutlierSplit) -> None:
    write_checkpoint(tmp_path, random_model(llama()), everything(w8a8(TOKEN, -1, split)), [3, 5])
    with pytest.raises(ValueError, match=compressed_tensors.OUTLIERS_KEY):
        by_transformers(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [OutlierSplit(1e-6), OutlierSplit(6.0, dynamic=False)], ids=OutlierSplit.describe)
def test_every_column_an_outlier_is_the_model_itself(tmp_path: Path, dtype: torch.dtype, split: OutlierSplit) -> None:
    model = random_model(llama(dtype))
    before = logits(model)
    write_checkpoint(tmp_path, model, everything(w8a8(TOKEN, -1, split)), range(256))
    ours = load_quantized(tmp_path)
    assert sum(isinstance(module, LLMInt8Linear) for module in ours.modules()) == 14
    assert torch.equal(logits(ours), before)
    change_tensor(tmp_path, lambda tensors: tensors["model.layers.1.mlp.down_proj.outlier_weight"][0, 0].add_(0.1))
    assert not torch.equal(logits(load_quantized(tmp_path)), before)


@pytest.mark.parametrize("split", [OutlierSplit(1e6), OutlierSplit(6.0, dynamic=False)], ids=OutlierSplit.describe)
def test_no_outlier_is_plain_w8a8(tmp_path: Path, split: OutlierSplit) -> None:
    """Empty tensors, as they lie in the file, included."""
    write_checkpoint(tmp_path / "split", random_model(llama()), everything(w8a8(TOKEN, -1, split)))
    write_checkpoint(tmp_path / "plain", random_model(llama()), everything(w8a8(TOKEN)))
    reader = CheckpointReader(tmp_path / "split")
    assert reader.shape(f"{UP}.outlier_index") == (0,)
    assert reader.shape(f"{UP}.outlier_weight") == (256, 0)
    assert torch.equal(logits(load_quantized(tmp_path / "split")), logits(load_quantized(tmp_path / "plain")))


@pytest.mark.parametrize("dynamic", [True, False])
def test_split_columns_take_the_outliers_out(tmp_path: Path, dynamic: bool) -> None:
    """With two channels of the embedding made 100 times larger, 8 bits a token are not enough and a split is."""
    model = random_model(llama())
    with torch.no_grad():
        for norm in [module for name, module in model.named_modules() if name.endswith("layernorm")]:
            norm.weight[[3, 70]] *= 100
        for name, linear in model.named_modules():
            if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
                linear.weight[:, [3, 70]] /= 100
    before = logits(model)

    def scheme(name: str, split: OutlierSplit | None) -> Scheme | None:
        reads_norm = name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
        return w8a8(TOKEN, -1, split if reads_norm else None) if name != "lm_head" else None

    write_checkpoint(tmp_path / "plain", copy.deepcopy(model), lambda name: scheme(name, None))
    write_checkpoint(tmp_path / "split", copy.deepcopy(model), lambda name: scheme(name, OutlierSplit(6.0, dynamic)), [3, 70])
    errors = {kind: relative_error(logits(load_quantized(tmp_path / kind)), before) for kind in ("plain", "split")}
    assert errors["split"] < 0.1
    assert errors["plain"] > 5 * errors["split"]


@pytest.mark.parametrize("split", [None, *SPLITS])
def test_conv1d_with_activations(tmp_path: Path, split: OutlierSplit | None) -> None:
    model = random_model(gpt2())
    before = logits(model)
    write_checkpoint(tmp_path, model, everything(w8a8(TOKEN, -1, split)), [3, 5])
    ours = load_quantized(tmp_path)
    assert sum(isinstance(module, LLMInt8Linear if split else W8A8Linear) for module in ours.modules()) == 4
    assert relative_error(logits(ours), before) < 0.1
    with pytest.raises(ValueError, match=compressed_tensors.CONV1D_KEY):
        by_transformers(tmp_path)


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
@pytest.mark.parametrize("folder", ["ct_w4_sym_g32", "ct_w4_asym_g32", "ct_w3_sym_g32", "ct_w8a8_dyn", "ct_w8a8_static", "ct_mixed"])
def test_checkpoints_of_the_library(folder: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    expected = load_file(GOLDEN / "expected_logits.safetensors")[folder]
    assert relative_error(logits(load_quantized(GOLDEN / folder))[0], expected) < 1e-5
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((GOLDEN / folder / file).read_bytes())
    change_tensor(tmp_path, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight_scale"].view(-1)[0].mul_(1.1))
    assert relative_error(logits(load_quantized(tmp_path))[0], expected) > 1e-5


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
    "no codes": (lambda t: t.pop(f"{UP}.weight_packed"), f"holds no tensor {UP}.weight_packed"),
    "nothing": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith(UP)],
        f"{UP} is quantized, but {UP}.weight_scale is not stored",
    ),
    "codes of the other format": (lambda t: t.update({f"{UP}.weight": torch.zeros(1)}), f"takes the tensor {UP}.weight"),
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


INTEGER_DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no codes": (lambda t: t.pop(f"{UP}.weight"), f"holds no tensor {UP}.weight"),
    "no scale": (lambda t: t.pop(f"{UP}.weight_scale"), f"{UP} is quantized, but {UP}.weight_scale is not stored"),
    "no input scale": (lambda t: t.pop(f"{Q}.input_scale"), f"holds no tensor {Q}.input_scale"),
    "input scales": (
        lambda t: t.update({f"{Q}.input_scale": torch.ones(2)}),
        rf"{Q}\.input_scale: expected floating \[1\], found float32 \[2\]",
    ),
    "no columns": (lambda t: t.pop(f"{UP}.outlier_weight"), f"holds no tensor {UP}.outlier_weight"),
    "no index": (lambda t: t.pop(f"{UP}.outlier_index"), f"holds no tensor {UP}.outlier_index"),
    "column beyond": (lambda t: t[f"{UP}.outlier_index"][1].fill_(128), f"{UP}.outlier_index: expected rising columns below 128"),
    "columns of another": (
        lambda t: t.update({f"{UP}.outlier_weight": torch.ones(64, 2)}),
        rf"{UP}\.outlier_weight: expected floating \[256, 2\], found float32 \[64, 2\]",
    ),
    "float weight": (lambda t: t.update({f"{UP}.weight": torch.ones(256, 128)}), rf"{UP}\.weight: expected int8 codes"),
    "another matrix": (
        lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][:, :64].contiguous()}),
        rf"{UP} is stored as \[256, 64\], but config\.json asks for \[256, 128\]",
    ),
    "stray input scale": (lambda t: t.update({f"{UP}.input_scale": torch.ones(1)}), f"takes the tensor {UP}.input_scale"),
    "stray zero points": (lambda t: t.update({f"{Q}.weight_zero_point": torch.zeros(1)}), f"takes the tensor {Q}.weight_zero_point"),
    "quantized head": (lambda t: t.update({"lm_head.weight_scale": torch.ones(1)}), r"takes the tensor lm_head\.weight"),
}


@pytest.mark.parametrize("kind", INTEGER_DAMAGE)
def test_missing_and_stray_integer_tensors_are_named(tmp_path: Path, kind: str) -> None:
    def scheme(name: str) -> Scheme | None:
        return None if name == "lm_head" else w8a8(STATIC) if "self_attn" in name else w8a8(TOKEN, -1, SPLITS[0])

    write_checkpoint(tmp_path, random_model(llama()), scheme, [3, 5])
    change, message = INTEGER_DAMAGE[kind]
    change_tensor(tmp_path, change)
    with pytest.raises(PTQError, match=message) as caught:
        load_quantized(tmp_path)
    assert "\n" not in str(caught.value)


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

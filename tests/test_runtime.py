"""Packed checkpoints, loaded here and by transformers: the same logits, and every missing or stray tensor named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import (
    STATIC,
    TENSOR,
    TOKEN,
    TOKENS,
    by_transformers,
    change_tensor,
    everything,
    flip_one_code,
    gpt2,
    llama,
    logits,
    random_model,
    relative_error,
    w8a8,
    write_checkpoint,
)
from ptq_kernels import ReferenceWeightOnly
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats.compressed_tensors_config import CONV1D_KEY, OUTLIERS_KEY
from ptqcli.numerics.scheme import SUPPORTED_BITS, ActivationScheme, OutlierSplit, Scheme
from ptqcli.runtime import kernels_in, load_quantized

GOLDEN = Path(__file__).parent / "golden" / "ckpt"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On matrices as small as these a second thread only waits, long when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    ids=lambda value: str(value) if isinstance(value, Scheme) else value,
)
def test_transformers_and_we_agree(tmp_path: Path, kind: str, scheme: Scheme) -> None:
    """In bfloat16, kernels that add in another order differ by its rounding: there the reference agrees, layer by layer, and what is
    taken by itself is as near to the numbers of float32.
    """
    model = random_model(MODELS[kind])
    write_checkpoint(tmp_path, model, everything(scheme))
    ours, plain = load_quantized(tmp_path), load_quantized(tmp_path, kernel="reference", fuse=False)
    theirs = by_transformers(tmp_path)
    assert ours.dtype == plain.dtype == theirs.dtype == MODELS[kind].dtype
    assert sum(kernels_in(ours).values()) == sum(kernels_in(plain).values()) == 14
    assert relative_error(logits(plain), logits(theirs)) < 1e-3
    assert relative_error(logits(plain), logits(model)) < 1e-3
    wide = logits(load_quantized(tmp_path, dtype=torch.float32))
    assert relative_error(logits(ours), wide) < 1.2 * relative_error(logits(theirs), wide) + 1e-5
    flip_one_code(tmp_path, scheme)
    assert relative_error(logits(load_quantized(tmp_path, kernel="reference", fuse=False)), logits(theirs)) > 1e-3
    change_tensor(tmp_path, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight_scale"].mul_(1.1))
    assert relative_error(logits(load_quantized(tmp_path)), wide) > 1.2 * relative_error(logits(theirs), wide) + 1e-5


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("scheme", [Scheme(b, g, symmetric=False) for b in SUPPORTED_BITS for g in (32, 128, -1)], ids=str)
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
    assert isinstance(ours.lm_head, ReferenceWeightOnly)  # torch's kernel has no 8-bit groups
    assert relative_error(logits(ours), logits(theirs)) < 1e-3


# 8-bit activations.


def worst_linear(folder: Path, theirs: Any) -> float:
    """How far one of our linears, in float32, is from that of ``theirs`` on the inputs that it has there, at worst."""
    ours = load_quantized(folder, dtype=torch.float32, fuse=False)
    found: dict[str, float] = {}

    def compare(module: Any, inputs: tuple[Tensor], output: Tensor, name: str) -> None:
        found[name] = relative_error(ours.get_submodule(name)(*inputs), output)

    linears = {name: theirs.get_submodule(name) for name, module in ours.named_modules() if hasattr(module, "in_features")}
    hooks = [module.register_forward_hook(partial(compare, name=name)) for name, module in linears.items()]
    logits(theirs)
    for hook in hooks:
        hook.remove()
    assert len(found) == 15  # with the head
    return max(found.values())


def change_one_scale(folder: Path) -> None:
    change_tensor(folder, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight_scale"].view(-1)[0].mul_(4))


WITH_ACTIVATIONS = [
    *(w8a8(inputs, group_size) for inputs in (TOKEN, TENSOR, STATIC) for group_size in (-1, 0)),
    Scheme(4, -1, activations=TOKEN),
]


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [*(("fp32", scheme) for scheme in WITH_ACTIVATIONS), ("bf16 tied", w8a8(TOKEN)), ("bf16 tied", w8a8(STATIC, 0))],
    ids=lambda value: str(value) if isinstance(value, Scheme) else value,
)
def test_transformers_and_we_agree_on_activations(tmp_path: Path, kind: str, scheme: Scheme) -> None:
    """In float32: transformers multiplies rounded floats where we multiply integers, which differs by 5e-7 in a linear. In the whole model
    it may take inputs over the border of two codes, where the largest of a token always stands: of 24 texts that made nothing in some,
    at most 1.5e-2, with signed scales as without.
    """
    write_checkpoint(tmp_path, random_model(MODELS[kind]), everything(scheme))
    ours, theirs = load_quantized(tmp_path, dtype=torch.float32), by_transformers(tmp_path, dtype=torch.float32)
    assert {name.split()[0]: count for name, count in kernels_in(ours).items()} == {"W8A8": 14}
    assert worst_linear(tmp_path, theirs) < 1e-6
    assert relative_error(logits(ours), logits(theirs)) < 2e-2
    change_one_scale(tmp_path)
    assert worst_linear(tmp_path, theirs) > 1e-6
    assert relative_error(logits(load_quantized(tmp_path, dtype=torch.float32)), logits(theirs)) > 2e-2


@pytest.mark.parametrize("inputs", [TOKEN, TENSOR, STATIC], ids=str)
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
    assert worst_linear(tmp_path, theirs) < 1e-6
    assert relative_error(logits(ours), logits(theirs)) < 2e-2
    change_one_scale(tmp_path)
    assert worst_linear(tmp_path, theirs) > 1e-6
    assert relative_error(logits(load_quantized(tmp_path)), logits(theirs)) > 2e-2


SPLITS = [OutlierSplit(), OutlierSplit(0.5, dynamic=False)]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_an_outlier_split_stops_transformers(tmp_path: Path, split: OutlierSplit) -> None:
    write_checkpoint(tmp_path, random_model(llama()), everything(w8a8(TOKEN, -1, split)), [3, 5])
    with pytest.raises(ValueError, match=OUTLIERS_KEY):
        by_transformers(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [OutlierSplit(1e-6), OutlierSplit(6.0, dynamic=False)], ids=str)
def test_every_column_an_outlier_is_the_model_itself(tmp_path: Path, dtype: torch.dtype, split: OutlierSplit) -> None:
    model = random_model(llama(dtype))
    before = logits(model)
    write_checkpoint(tmp_path, model, everything(w8a8(TOKEN, -1, split)), range(256))
    ours = load_quantized(tmp_path)
    assert {name.split()[0]: count for name, count in kernels_in(ours).items()} == {"LLM.int8": 14}
    assert torch.equal(logits(ours), before)
    change_tensor(tmp_path, lambda tensors: tensors["model.layers.1.mlp.down_proj.outlier_weight"][0, 0].add_(0.1))
    assert not torch.equal(logits(load_quantized(tmp_path)), before)


@pytest.mark.parametrize("split", [OutlierSplit(1e6), OutlierSplit(6.0, dynamic=False)], ids=str)
def test_no_outlier_is_plain_w8a8(tmp_path: Path, split: OutlierSplit) -> None:
    """Empty tensors, as they lie in the file, included."""
    write_checkpoint(tmp_path / "split", random_model(llama()), everything(w8a8(TOKEN, -1, split)))
    write_checkpoint(tmp_path / "plain", random_model(llama()), everything(w8a8(TOKEN)))
    reader = SafetensorsFolder(tmp_path / "split")
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
    assert {name.split()[0]: count for name, count in kernels_in(ours).items()} == {"LLM.int8" if split else "W8A8": 4}
    assert relative_error(logits(ours), before) < 0.1
    with pytest.raises(ValueError, match=CONV1D_KEY):
        by_transformers(tmp_path)


def test_conv1d_runs_here_and_stops_transformers(tmp_path: Path) -> None:
    model = random_model(gpt2())
    schemes = write_checkpoint(tmp_path, model, everything(Scheme(4, 32)))
    assert len(schemes) == 4
    assert relative_error(logits(load_quantized(tmp_path)), logits(model)) < 1e-3
    with pytest.raises(ValueError, match=CONV1D_KEY):
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


@pytest.mark.parametrize(
    ("folder", "limit"),
    [
        *((name, 1e-5) for name in ("ct_w4_sym_g32", "ct_w4_asym_g32", "ct_w3_sym_g32")),
        *((name, 2e-3) for name in ("ct_w8a8_dyn", "ct_w8a8_static", "ct_mixed")),
    ],
)
def test_checkpoints_of_the_library(folder: str, limit: float, tmp_path: Path) -> None:
    """Where activations are rounded, too, a last digit of the processor can move one of them by a code."""
    from safetensors.torch import load_file

    expected = load_file(GOLDEN / "expected_logits.safetensors")[folder]
    assert relative_error(logits(load_quantized(GOLDEN / folder))[0], expected) < limit
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((GOLDEN / folder / file).read_bytes())
    change_tensor(tmp_path, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight_scale"].view(-1)[0].mul_(8))
    assert relative_error(logits(load_quantized(tmp_path))[0], expected) > 5 * limit


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
    layer = model.model.layers[0].mlp.down_proj
    assert layer.packed.nbytes == 256 * 128 // 2
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
        f"{UP} is quantized, but {UP}.weight_packed is not stored",
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
    "quantized head": (
        lambda t: t.update({"lm_head.weight_scale": torch.ones(1)}),
        r"lm_head\.weight is stored quantized, but config\.json gives it no scheme",
    ),
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
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PTQError, match=UP):
        load_quantized(tmp_path)

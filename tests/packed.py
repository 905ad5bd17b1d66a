"""Models packed into checkpoint folders without the pipeline: every linear rounded to nearest, in any scheme."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.checkpoint.writer import CheckpointWriter
from ptqcli.formats.compressed_tensors import COMPRESSED_TENSORS
from ptqcli.formats.compressed_tensors_config import quantization_config
from ptqcli.numerics.ranges import MinMax
from ptqcli.numerics.scheme import ActivationScheme, OutlierSplit, Scheme
from ptqcli.numerics.weight import OutlierColumns, QuantizedWeight, round_to_nearest

TOKENS = torch.arange(1, 17).unsqueeze(0)
TOKEN, TENSOR, STATIC = ActivationScheme(), ActivationScheme(per_token=False), ActivationScheme(per_token=False, dynamic=False)


def w8a8(inputs: ActivationScheme, group_size: int = -1, split: OutlierSplit | None = None) -> Scheme:
    return Scheme(8, group_size, True, inputs, split)


def llama(dtype: torch.dtype = torch.float32, tied: bool = False, layers: int = 2) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
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
        packed = with_activations(round_to_nearest(dense.float(), scheme, dense.dtype, MinMax()), dense, largest[name], split)
        tensors |= COMPRESSED_TENSORS.pack(name, packed)
        dense = packed.dequantize()
        linears[name].weight.data = dense.t().contiguous() if transposed else dense
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    skipped = tied | {f"{name}.weight" for name in schemes}
    tensors |= {name: tensor for name, tensor in model.state_dict().items() if name not in skipped}
    folder.mkdir(exist_ok=True)
    writer = CheckpointWriter(Directory(folder))
    writer.write(tensors)
    writer.finish()
    conv1d = any(isinstance(linears[name], Conv1D) for name in schemes)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    ignored = [name for name in linears if name not in schemes]
    config["quantization_config"] = quantization_config(schemes, ignored, conv1d)
    (folder / "config.json").write_text(json.dumps(config))
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
    reader = SafetensorsFolder(folder)
    tensors = {name: reader.read(name) for name in reader.names}
    change(tensors)
    (folder / "model.safetensors").unlink()
    writer = CheckpointWriter(Directory(folder))
    writer.write(tensors)
    writer.finish()


def flip_one_code(folder: Path, scheme: Scheme) -> None:
    """Move the first code of one linear by half its range."""
    stored = "weight_packed" if scheme.activations is None else "weight"

    def flip(tensors: dict[str, Tensor]) -> None:
        codes = tensors[f"model.layers.1.mlp.down_proj.{stored}"]
        codes[0, 0] ^= scheme.middle if codes.dtype == torch.int32 else -scheme.middle

    change_tensor(folder, flip)

"""Tensors of another kind than the model has in their place, and indices that point nowhere: refused by name.

Row 39. A norm of whole numbers or an embedding of truth values can be converted to floats, and nothing else would ever say that the file
is not what it claims to be; an index beyond its table reads memory of others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed import TOKEN, change_tensor, everything, llama, random_model, w8a8, write_checkpoint
from ptq_kernels import ReferenceWeightOnly, TritonWeightOnly
from safetensors.torch import load_file, save_file
from tiny import make_model
from torch import Tensor

from ptqcli.errors import PTQError
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder
from ptqcli.numerics.scheme import OutlierSplit, Scheme
from ptqcli.runtime.load import load_quantized

NORM, EMBEDDING, DOWN = "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_model(folder, num_hidden_layers=1)
    return folder


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(NORM, torch.int64), (EMBEDDING, torch.bool), (f"{DOWN}.weight", torch.int8), (NORM, torch.float8_e4m3fn), (EMBEDDING, torch.float64)],
)
def test_a_source_model(source: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PTQError, match=f"tensor {name} is stored as {dtype}"):
        Skeleton(ModelFolder(tmp_path))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    schemes = {"packed": Scheme.parse("w3a16-g32-asym"), "outliers": w8a8(TOKEN, split=OutlierSplit(6.0, False))}
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in schemes}
    for kind, scheme in schemes.items():
        write_checkpoint(folders[kind], random_model(llama(layers=1)), everything(scheme), split=(1, 5))
    return folders


def to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype)


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("packed", NORM, to(torch.int64)),
        ("packed", EMBEDDING, to(torch.bool)),
        ("packed", NORM, to(torch.float8_e5m2)),
        ("packed", "model.layers.0.self_attn.q_proj.bias", to(torch.int32)),
        ("packed", "model.layers.0.self_attn.q_proj.bias", lambda bias: bias[:-1].clone()),
        ("packed", f"{DOWN}.weight_scale", to(torch.float8_e4m3fn)),
        ("packed", f"{DOWN}.weight_packed", to(torch.int64)),
        ("packed", f"{DOWN}.weight_zero_point", to(torch.float32)),
        ("packed", f"{DOWN}.weight_shape", lambda shape: shape * 2**40),
        ("packed", f"{DOWN}.weight_shape", lambda shape: -shape),
        ("outliers", f"{DOWN}.outlier_index", lambda index: index + 10_000),
        ("outliers", f"{DOWN}.outlier_index", lambda index: index - 100),
        ("outliers", f"{DOWN}.outlier_index", lambda index: index.flip(0).clone()),
        ("outliers", f"{DOWN}.outlier_weight", to(torch.int16)),
        ("outliers", f"{DOWN}.weight", to(torch.uint8)),
    ],
)
def test_a_quantized_checkpoint(
    checkpoints: dict[str, Path], tmp_path: Path, kind: str, name: str, change: Callable[[Tensor], Tensor]
) -> None:
    for file in checkpoints[kind].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    change_tensor(tmp_path, lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(PTQError, match=name.removesuffix("_shape").removesuffix(".weight")) as caught:
        load_quantized(tmp_path)
    assert "\n" not in str(caught.value)


CODES, SCALE = torch.zeros(64, 64, dtype=torch.uint8), torch.ones(64, 2, dtype=torch.float16)


@pytest.mark.parametrize("layer", [ReferenceWeightOnly, TritonWeightOnly])
def test_layers_know_the_range_of_zero_points_and_group_indices(layer: type) -> None:
    zero, g_idx = torch.full((64, 2), 15, dtype=torch.uint8), torch.arange(64, dtype=torch.int32) % 2
    layer(CODES, SCALE, zero, 4, 32, None, g_idx)
    with pytest.raises(ValueError, match="zero must be below 16, found 16"):
        layer(CODES, SCALE, zero + 1, 4, 32)
    for wrong in (g_idx - 1, g_idx + 1):
        with pytest.raises(ValueError, match="g_idx must"):
            layer(CODES, SCALE, zero, 4, 32, None, wrong)
    with pytest.raises(ValueError, match="16"):
        layer(CODES + 16, SCALE, zero, 4, 32)

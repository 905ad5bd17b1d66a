"""Kind: a check that one format's reader has and another's lacks. In every format, each stored tensor of a linear with a row less, and each
floating one with NaN, infinity or zero in it, is refused by its name on loading and by `ptq inspect --verify`; and no bit pattern of packed
zero points stands for one that is out of range."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commandline import Ptq
from safetensors.torch import load_file, save_file
from tiny import make_model
from torch import Tensor

import ptqcli
from ptqcli.errors import PTQError
from ptqcli.formats import find_format
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.numerics.scheme import Scheme

DOWN = "model.layers.0.mlp.down_proj"
FORMATS = {
    "compressed-tensors": "w3a16-g32-asym",
    "compressed-tensors int": "w8a8",
    "gptq": "w4a16-g32",
    "gptq_v2": "w3a16-g32-asym",
    "awq": "w4a16-g32-asym",
    "bitsandbytes": "nf4-g64",
    "bitsandbytes double": "fp4-g64-double",
    "bitsandbytes int": "w8a8",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("formats")
    make_model(folder / "model", num_hidden_layers=1)
    for name, scheme in FORMATS.items():
        ptqcli.quantize(folder / "model", output=folder / name, algo="rtn", scheme=scheme, format=name.split(" ")[0])
    return {name: folder / name for name in FORMATS}


def stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of one linear."""
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name.startswith(f"{DOWN}.")}


def changed(folder: Path, copy: Path, name: str, act: Callable[[Tensor], Tensor]) -> Path:
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[name] = act(tensors[name].clone()).contiguous()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def refused(ptq: Ptq, folder: Path, name: str) -> None:
    """By the name of the linear, in one line; and the command names the file or, where one tells of the scheme, the folder."""
    with pytest.raises(PTQError, match=DOWN) as caught:
        ptqcli.load_quantized(folder)
    assert "\n" not in str(caught.value)
    told = ptq("inspect", folder, "--verify")
    assert told.code == 1
    assert any(DOWN in line and str(folder) in line for line in told.out.splitlines()), told.out + name


@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_less(ptq: Ptq, checkpoints: dict[str, Path], tmp_path: Path, kind: str) -> None:
    for name, tensor in stored(checkpoints[kind]).items():
        if tensor.dim():
            refused(ptq, changed(checkpoints[kind], tmp_path / name, name, lambda tensor: tensor[:-1]), name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", FORMATS)
def test_numbers_that_are_none(ptq: Ptq, checkpoints: dict[str, Path], tmp_path: Path, kind: str, value: float) -> None:
    floating = [name for name, tensor in stored(checkpoints[kind]).items() if tensor.is_floating_point()]
    assert floating
    for name in floating:

        def put(tensor: Tensor) -> Tensor:
            tensor.view(-1)[-1] = value
            return tensor

        refused(ptq, changed(checkpoints[kind], tmp_path / name, name, put), name)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if not kind.startswith("bitsandbytes")])
def test_a_scale_of_zero(ptq: Ptq, checkpoints: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """bitsandbytes itself writes one for a block of zeros."""
    name = next(name for name in stored(checkpoints[kind]) if name.rpartition(".")[2] in ("scales", "weight_scale"))
    refused(ptq, changed(checkpoints[kind], tmp_path / "copy", name, torch.zeros_like), name)


@pytest.mark.parametrize("kind", ["gptq"])
def test_zero_points_of_a_symmetric_weight(ptq: Ptq, checkpoints: dict[str, Path], tmp_path: Path, kind: str) -> None:
    refused(ptq, changed(checkpoints[kind], tmp_path / "copy", f"{DOWN}.qzeros", torch.zeros_like), "qzeros")


@pytest.mark.parametrize("kind", [kind for kind, scheme in FORMATS.items() if scheme.endswith("asym")])
def test_no_word_stands_for_a_zero_point_out_of_range(checkpoints: dict[str, Path], tmp_path: Path, kind: str) -> None:
    name = next(name for name in stored(checkpoints[kind]) if "zero" in name)
    draw = torch.Generator().manual_seed(0)

    def drawn(words: Tensor) -> Tensor:
        return torch.randint(-(2**31), 2**31, words.shape, dtype=torch.int32, generator=draw)

    scheme, read = Scheme.parse(FORMATS[kind]), stored(changed(checkpoints[kind], tmp_path / "copy", name, drawn))
    zero = find_format(kind).unpack(DOWN, lambda name: read[name], scheme).zero
    assert int(zero.max()) == scheme.levels - 1
    assert open_checkpoint(tmp_path / "copy").weight(DOWN).zero.dtype == torch.uint8


def test_nothing_is_refused_that_is_right(ptq: Ptq, checkpoints: dict[str, Path]) -> None:
    for folder in checkpoints.values():
        ptqcli.load_quantized(folder)
        assert ptq("inspect", folder, "--verify").code == 0

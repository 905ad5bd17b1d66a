"""An adapter in files, as peft writes them and vLLM, SGLang and others read them.

    adapter_config.json         r, lora_alpha (a product is multiplied by lora_alpha / r), target_modules, and what is not used here
    adapter_model.safetensors   base_model.model.NAME.lora_A.weight [r, in] and .lora_B.weight [out, r], NAME the linear's path in the model

Read in the sources of peft (``tuners/lora/config.py``, ``utils/save_and_load.py``) and of vLLM (``lora/peft_helper.py``,
``lora/lora_model.py``): vLLM goes by the names of the tensors, fuses those of q, k and v by itself, takes ranks up to its ``max_lora_rank``
of 512 at most, and no rank that differs between linears. ``target_modules`` are whole paths: a bare ``q_proj`` would be put on linears that
were left alone, too.

``base_model_name_or_path`` is null. The base is the checkpoint that the adapter lies in; its path is another one on every machine, and with
the name of the original peft would load that and correct errors that it does not have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqcli.adapters.low_rank import LowRank
from ptqcli.checkpoint.tensors import FLOATING, SafetensorsFolder
from ptqcli.checkpoint.writer import safetensors_pieces
from ptqcli.errors import PTQError, UsageError
from ptqcli.untrusted import read_json, shown

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

PREFIX, LEAVES = "base_model.model.", {"A": ".lora_A.weight", "B": ".lora_B.weight"}
# What changes the numbers or the names of an adapter, with the one value that is read; other keys concern training.
PLAIN = {
    "peft_type": "LORA", "bias": "none", "use_rslora": False, "use_dora": False, "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "target_parameters": None, "layer_replication": None, "megatron_config": None,
    "trainable_token_indices": None,
}  # fmt: skip
LARGEST_ALPHA = 1e6  # for a rank of 1

# Written for peft, which warns where a value differs from what it finds.
ALSO_WRITTEN = {"task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True, "lora_dropout": 0.0}


def adapter_files(corrections: Mapping[str, LowRank], transposed: bool) -> Iterator[tuple[str, Iterator[Any]]]:
    """(name, pieces) of the files of an adapter. transposed: its linears store their matrices as [in, out], as GPT-2's do.

    corrections: by the linears' paths in the model, all of one rank.
    """
    yield CONFIG_FILE, iter([json.dumps(_config(corrections, transposed), indent=2).encode() + b"\n"])
    tensors = {f"{PREFIX}{name}{LEAVES[side]}": getattr(each, side) for name, each in corrections.items() for side in LEAVES}
    yield TENSOR_FILE, safetensors_pieces(tensors)


def _config(corrections: Mapping[str, LowRank], transposed: bool) -> dict[str, Any]:
    rank = next(iter(corrections.values())).A.shape[0]
    of_linears = {"r": rank, "lora_alpha": rank, "target_modules": sorted(corrections), "fan_in_fan_out": transposed}
    return {**PLAIN, **ALSO_WRITTEN, **of_linears}


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """The adapter in ``folder``, by the linears' paths in the model; what ``lora_alpha`` says is multiplied in.

    Raises UsageError if there is none, and PTQError, naming key or tensor, for one of another kind or a damaged one.
    """
    for file in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / file).is_file():
            raise UsageError(f"{folder}: holds no {file}, so it is no adapter; write one with ptq quantize --adapter-rank 32")
    scaling = _scaling(folder / CONFIG_FILE)
    tensors = SafetensorsFolder(folder, TENSOR_FILE)
    found = {name: _read_one(tensors, name, scaling) for name in _linears(folder / TENSOR_FILE, tensors.names)}
    if not found:
        raise PTQError(f"{folder / TENSOR_FILE}: holds nothing")
    return found


def _scaling(file: Path) -> float:
    config = read_json(file)
    for key, value in PLAIN.items():
        given = config.get(key, value)
        if given != value and (given or value):  # an empty list is as good as null
            raise PTQError(f"{file}: {key} is {shown(given)}; only plain LoRA adapters are read, where it is {shown(value)}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)) or not abs(alpha) <= LARGEST_ALPHA * rank:
        raise PTQError(f"{file}: r is {shown(rank)} and lora_alpha {shown(alpha)}; r has to be 1 or more, and lora_alpha a number in range")
    return float(alpha / rank)


def _linears(file: Path, names: Sequence[str]) -> list[str]:
    found: dict[str, set[str]] = {}
    for tensor in names:
        side = next((side for side, leaf in LEAVES.items() if tensor.endswith(leaf)), None)
        if side is None or not tensor.startswith(PREFIX):
            raise PTQError(f"{file}: {shown(tensor)} is no tensor of a plain LoRA adapter")
        found.setdefault(tensor.removeprefix(PREFIX).removesuffix(LEAVES[side]), set()).add(side)
    single = next((name for name, sides in found.items() if len(sides) < len(LEAVES)), None)
    if single is not None:
        raise PTQError(f"{file}: holds one half of the adapter of {shown(single)}; the file is damaged")
    return list(found)


def _read_one(tensors: SafetensorsFolder, name: str, scaling: float) -> LowRank:
    A, B = (_matrix(tensors, f"{PREFIX}{name}{leaf}") for leaf in LEAVES.values())
    if A.shape[0] != B.shape[1]:
        raise PTQError(f"{tensors.folder / TENSOR_FILE}: {shown(name)} has {list(A.shape)} and {list(B.shape)}, which do not fit together")
    scaled = B if scaling == 1 else B * scaling
    if not torch.isfinite(scaled).all():
        raise PTQError(f"{tensors.folder / TENSOR_FILE}: {shown(name)} times lora_alpha / r leaves the range of {B.dtype}")
    return LowRank(A, scaled)


def _matrix(tensors: SafetensorsFolder, name: str) -> Tensor:
    value = tensors.read(name)
    if value.dim() != 2 or value.dtype not in FLOATING:
        raise PTQError(f"{tensors.folder / TENSOR_FILE}: {shown(name)} is {value.dtype} {list(value.shape)}, not a floating matrix")
    return value

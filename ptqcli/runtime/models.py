"""A model folder, packed or not, as a model that runs."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
import transformers

from ptqcli.checkpoint import auxiliary
from ptqcli.checkpoint.gguf_file import GGUFFile
from ptqcli.checkpoint.scaled_floats import ScaledFloats
from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.errors import PTQError, UsageError
from ptqcli.model import gguf
from ptqcli.model.classes import build_classes
from ptqcli.model.config import load_config, read_generation_config
from ptqcli.model.gguf import is_gguf
from ptqcli.model.kinds import kind_of
from ptqcli.model.quantized import scaled_floats
from ptqcli.model.source import ModelFolder
from ptqcli.resources import free_bytes
from ptqcli.runtime.load import load_quantized
from ptqcli.temporary import held_folder, remove_held
from ptqcli.untrusted import foreign


def load_model(folder: Path, device: torch.device | str = "cpu", kernel: str = "auto", adapter: str | Path | bool = False) -> Any:
    """The transformers model of a folder or a GGUF file, in evaluation mode: packed weights stay packed, any others load as they are.

    kernel: one of ``layers.KERNELS``, for packed weights. adapter: as in ``load_quantized``. Raises PTQError for a folder that holds no
    model that can be loaded, UsageError for a layer that cannot run on ``kernel``, and for a kernel or an adapter that is named for a model
    that is not packed. A model that does not fit into the memory of ``device`` is spread by accelerate over what there is: GPUs, then main
    memory, then the disk.
    """
    config = load_config(folder)
    if is_gguf(folder):  # a GPU multiplies in 16 bit, and its kernels take nothing else
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        return load_quantized(folder, device=device, dtype=dtype, kernel=kernel, adapter=adapter)
    quantized = getattr(config, "quantization_config", None) is not None
    scaled = scaled_floats(ModelFolder(folder)) if quantized else None
    if quantized and scaled is None:
        spread = "auto" if adapter is False else None
        return load_quantized(folder, device=device, kernel=kernel, adapter=adapter, device_map=spread)
    if kernel != "auto":
        raise UsageError(f"{folder}: is not quantized, so it cannot run on --kernel {kernel}; leave the flag out")
    if adapter is not False:
        raise UsageError(f"{folder}: is not quantized, and adapters are added to quantized checkpoints only; leave --adapter out")
    return _load_plain(folder, config, torch.device(device), scaled).eval()


def _load_plain(folder: Path, config: Any, device: torch.device, scaled: ScaledFloats | None) -> Any:
    """scaled: the tensors, where they are stored as 8- or 4-bit floats, of which transformers gets the numbers."""
    tensors = scaled or SafetensorsFolder(folder)  # says of a damaged file what is wrong with it
    classes = build_classes(config, tensors.names, config.architectures)
    name = classes.loaded_as(kind_of(config))
    if scaled is not None:
        return _read_numbers(folder, type(classes.built[0][0]).__name__, config, scaled, device)
    if tensors.total_bytes < free_bytes(device):
        return _read(folder, name, config).to(device)
    offloaded, lock = held_folder()
    try:
        model = _read(folder, name, config, device_map="auto", max_memory=_room(device), offload_folder=str(offloaded))
    except BaseException:
        remove_held(offloaded, lock)
        raise
    weakref.finalize(model, remove_held, offloaded, lock)
    return model


def _read_numbers(folder: Path, name: str, config: Any, scaled: ScaledFloats, device: torch.device) -> Any:
    needed = scaled.total_bytes
    if needed >= free_bytes(device):
        raise PTQError(f"{folder}: {', '.join(scaled.kinds)} take {needed / 1e9:,.1f} GB as numbers, more than is free on {device}")
    del config.quantization_config
    return _read(folder, name, config, state_dict={each: scaled.read(each) for each in scaled.names}).to(device)


def _read(folder: Path, name: str, config: Any, **placed: Any) -> Any:
    """The model of ``config`` in the class ``name`` of transformers, with all its tensors from the files. placed: what says where to put
    them."""
    with foreign(f"{folder}: transformers cannot load it"):
        model, loading = getattr(transformers, name).from_pretrained(
            None if "state_dict" in placed else folder,  # it takes one of both
            config=config,
            generation_config=read_generation_config(folder),
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told of here, with names and shapes
            **placed,
        )
    for name, stored, wanted in sorted(loading["mismatched_keys"]):
        raise PTQError(f"{folder}: {name} is stored as {list(stored)}, but config.json asks for {list(wanted)}")
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers fills them with random numbers, and whatever were measured would mean nothing
        raise PTQError(f"{folder}: the safetensors files hold no tensor for {missing[0]}, {len(missing)} missing in all")
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and parameter.numel() and not torch.isfinite(torch.stack(parameter.detach().aminmax())).all():
            raise PTQError(f"{folder}: {name} holds NaN or infinity; the file is damaged, or the training diverged")
    return model


def _room(device: torch.device) -> dict[int | str, int]:
    """Bytes that a model which is too large for ``device`` may take, by what accelerate calls the places; the rest stays on the disk."""
    from accelerate.utils import get_max_memory

    room: dict[int | str, int] = {"cpu": free_bytes("cpu")} if device.type == "cpu" else get_max_memory()
    return room


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises PTQError for a folder that is no model's, or has no tokenizer."""
    return gguf.load_tokenizer(GGUFFile(folder)) if is_gguf(folder) else auxiliary.load_tokenizer(folder, load_config(folder))

"""A quantized model that no single device holds: its blocks on GPUs, in main memory and on the disk, run by the hooks of accelerate.

A *place* is what accelerate calls one: the number of a GPU, "cpu", or "disk". What is in main memory or on the disk beside GPUs, or on the
disk of a machine without one, comes to the first GPU, or into main memory, when its turn comes, and leaves again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptqcli.errors import PTQError, UsageError
from ptqcli.formats.packed_checkpoint import PackedCheckpoint
from ptqcli.model.discovery import find_blocks, probe_model
from ptqcli.model.kinds import kind_of
from ptqcli.model.linears import linear_weight
from ptqcli.resources import free_bytes, open_device
from ptqcli.suggest import did_you_mean

Place = int | str
DISK = "disk"
SHARE_OF_FREE = 0.8  # of a device, for weights; the rest is for activations, keys and values


def place_of(device: torch.device) -> Place:
    """``device`` as accelerate calls it."""
    return "cpu" if device.type == "cpu" else device.index or 0


def device_of(place: Place) -> torch.device:
    """Where what is in ``place`` is when it is loaded."""
    return torch.device("cpu") if place in ("cpu", DISK) else torch.device("cuda", int(place))


def chosen_places(checkpoint: PackedCheckpoint, device: torch.device, device_map: str | Mapping[str, Any] | None) -> dict[str, Place]:
    """Path of a module -> its place, for all of the model; one entry, "", where it is whole.

    device_map: None for all on ``device``; "auto" for as much there as is free, the rest on other GPUs, in main memory, on the disk; or a
    place for each module. Raises UsageError for what names no module or no place, and for modules that are left out.
    """
    if device_map is None:
        return {"": place_of(device)}
    if device_map == "auto":
        return _by_room(checkpoint, _room(device))
    if not isinstance(device_map, Mapping) or not device_map:
        raise UsageError(f"device_map {device_map!r} is not valid; give 'auto', or a place for each module")
    return _checked(checkpoint.model, device_map)


def unit_of(name: str, places: Mapping[str, Place]) -> str:
    """The module in ``places``, the closest one, that holds the tensor or module ``name``."""
    while name not in places:
        name = name.rpartition(".")[0]
    return name


def main_place(places: Mapping[str, Place]) -> Place:
    """Where what is not on a GPU of its own is computed."""
    return next((place for place in places.values() if isinstance(place, int)), "cpu")


def _room(device: torch.device) -> dict[Place, float]:
    found: dict[Place, float] = {}
    if device.type == "cuda":
        others = (torch.device("cuda", number) for number in range(torch.cuda.device_count()))
        for each in (device, *(other for other in others if other != device)):
            found[place_of(each)] = SHARE_OF_FREE * free_bytes(each)
    return {**found, "cpu": SHARE_OF_FREE * free_bytes("cpu"), DISK: float("inf")}


def _by_room(checkpoint: PackedCheckpoint, room: Mapping[Place, float]) -> dict[str, Place]:
    """Blocks in their order into the places in theirs; what is beside them is in the first, with the room for one more block."""
    model, (first, *_) = checkpoint.model, room
    sizes = _sizes(checkpoint)
    left = dict(room)
    if sum(sizes.values()) <= left[first]:
        return {"": first}
    try:
        name = find_blocks(model, ran=probe_model(model, kind_of(checkpoint.config)).order)
    except PTQError as error:
        raise PTQError(f"{checkpoint.folder}: does not fit, and its blocks, which could be spread, are not found: {error}") from error
    blocks = [f"{name}.{index}" for index, _ in enumerate(model.get_submodule(name).children())]
    inside = {block: sum(size for tensor, size in sizes.items() if tensor.startswith(f"{block}.")) for block in blocks}
    left[first] -= sum(sizes.values()) - sum(inside.values()) + max(inside.values())
    if left[first] < 0:
        raise PTQError(f"{checkpoint.folder}: what is beside its blocks, and one of them, take more than is free on {device_of(first)}")
    places: dict[str, Place] = {}
    queue = list(room)
    for block in blocks:
        while left[queue[0]] < inside[block]:
            queue.pop(0)
        left[queue[0]] -= inside[block]
        places[block] = queue[0]
    return {**dict.fromkeys(_beside(model, "", blocks), first), **places}


def _sizes(checkpoint: PackedCheckpoint) -> dict[str, int]:
    """Bytes in memory of all linears and tensors, by their names; of what no kernel multiplies as it is decoded."""
    itemsize, model = checkpoint.config.dtype.itemsize, checkpoint.model
    found = {}
    for name, scheme in checkpoint.schemes.items():
        count = linear_weight(model.get_submodule(name)).numel()
        found[f"{name}.weight"] = count * itemsize if scheme.blocks else checkpoint.nbytes(name)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.rpartition(".")[0] not in checkpoint.schemes:
            found[name] = tensor.numel() * (itemsize if tensor.is_floating_point() else tensor.dtype.itemsize)
    return found


def _beside(module: nn.Module, path: str, blocks: list[str]) -> Iterator[str]:
    """The largest modules that hold no block."""
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if below in blocks:
            continue
        if any(block.startswith(f"{below}.") for block in blocks):
            yield from _beside(child, below, blocks)
        else:
            yield below
    yield from (f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False))


def _checked(model: nn.Module, device_map: Mapping[str, Any]) -> dict[str, Place]:
    modules, places = {name for name, _ in model.named_modules()}, dict[str, Place]()
    for name, place in device_map.items():
        if name not in modules:
            raise UsageError(f"device_map names {name!r}, which is no module of the model{did_you_mean(str(name), sorted(modules))}")
        places[name] = DISK if place == DISK else place_of(open_device(f"cuda:{place}" if isinstance(place, int) else place))
    for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        owner = name
        while owner and owner not in places:
            owner = owner.rpartition(".")[0]
        if owner not in places:
            raise UsageError(f"device_map has no place for {name}; give one for the module that holds it")
    return places


class Offloaded:
    """What is on the disk: the tensors of some modules, in files of accelerate's in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index: dict[str, Any] = {}

    def take(self, model: nn.Module, unit: str) -> None:
        """Write the tensors of the module ``unit``; they leave memory."""
        from accelerate.utils import offload_weight, set_module_tensor_to_device

        for name, tensor in model.get_submodule(unit).state_dict().items():
            path = f"{unit}.{name}" if unit else name
            self._index = offload_weight(tensor, path, str(self.folder), self._index)
            set_module_tensor_to_device(model, path, "meta")

    def finish(self) -> None:
        """Write what is where."""
        from accelerate.utils import save_offload_index

        save_offload_index(self._index, str(self.folder))


def dispatch(model: Any, places: Mapping[str, Place], folder: Path | None) -> Any:
    """Give ``model``, whose parts are in their places, the hooks that bring what a part needs to where it is computed."""
    from accelerate import dispatch_model

    skip = getattr(model, "_skip_keys_device_placement", None)
    kept = {} if folder is None else {"offload_dir": str(folder)}
    return dispatch_model(model, dict(places), offload_buffers=True, skip_keys=skip, force_hooks=True, **kept)

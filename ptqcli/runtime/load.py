"""A packed checkpoint as a transformers model.

The model is built on the meta device from config.json, each quantized linear is replaced by a layer that keeps its weight in integers,
and everything else is read as it is. No weight is ever expanded while loading. A tensor that the model needs and the file lacks is an
error that names it, and so is a tensor beside a quantized linear that its scheme does not take. Other tensors that the model does not
know (buffers that old files carry, heads that transformers does not build) are left alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ptq_kernels import JoinedLinear
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ptqcli.errors import PTQError, UsageError
from ptqcli.formats.packed_checkpoint import PackedCheckpoint, open_checkpoint
from ptqcli.model.config import read_generation_config
from ptqcli.model.kinds import kind_of
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.resources import open_device
from ptqcli.runtime.adapted import adapter_folder, add_adapter
from ptqcli.runtime.embedding import PackedEmbedding
from ptqcli.runtime.joined import alike, joined_bias, joined_weight, same_input
from ptqcli.runtime.layers import quantized_linear
from ptqcli.runtime.spread import DISK, Offloaded, Place, chosen_places, device_of, dispatch, main_place, unit_of
from ptqcli.temporary import held_folder, remove_held

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_quantized(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    kernel: str = "auto",
    fuse: bool = True,
    adapter: str | Path | bool = False,
    device_map: str | Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The model in the checkpoint folder ``path``, ready for inference and ``generate``.

    device: where it is to run. dtype: floating dtype of activations, scales and unquantized weights; None takes the one that config.json
    names. kernel: one of KERNELS, for all layers. fuse: join layers of the same input. adapter: the folder of a LoRA adapter whose products
    are added, True for the one that lies in the checkpoint. device_map: "auto" to spread a model that ``device`` does not hold over GPUs,
    main memory and the disk, or a place for each module ("cpu", "disk", the number of a GPU); those that wait for their turn are not
    joined.
    Raises PTQError or UsageError, naming the file or tensor, when the folder is no quantized checkpoint or does not fit its model, or a
    layer cannot run on ``kernel``.
    """
    checkpoint = open_checkpoint(path, dtype)
    model: Any = checkpoint.model
    places = chosen_places(checkpoint, open_device(device), device_map)
    if len(places) > 1 and adapter is not False:
        raise UsageError("adapters are added to models on one device; leave device_map or adapter out")
    model = _spread(checkpoint, kernel, fuse, places) if len(places) > 1 else _whole(checkpoint, kernel, fuse, places)
    written = read_generation_config(checkpoint.folder)
    if written is not None:
        model.generation_config = written
    model.hf_quantizer = _Packed(checkpoint)
    added = adapter_folder(checkpoint.folder, adapter)
    if added is not None:
        add_adapter(model, added)
    return model


def _whole(checkpoint: PackedCheckpoint, kernel: str, fuse: bool, places: Mapping[str, Place]) -> Any:
    _Loader(checkpoint, kernel, places).run(fuse)
    return checkpoint.model.to(device_of(main_place(places)))  # the buffers that the model computed for itself


def _spread(checkpoint: PackedCheckpoint, kernel: str, fuse: bool, places: Mapping[str, Place]) -> Any:
    if DISK not in places.values():
        _Loader(checkpoint, kernel, places).run(fuse)
        return dispatch(checkpoint.model, places, None)
    folder, lock = held_folder()
    try:
        offloaded = Offloaded(folder)
        _Loader(checkpoint, kernel, places, offloaded).run(fuse)
        offloaded.finish()
        model = dispatch(checkpoint.model, places, folder)
    except BaseException:
        remove_held(folder, lock)
        raise
    weakref.finalize(model, remove_held, folder, lock)
    return model


class _Packed(HfQuantizer):
    """Lets ``model.save_pretrained`` refuse: no program could load the layout of the kernels, which it would write without a word."""

    is_trainable = False

    def __init__(self, checkpoint: PackedCheckpoint) -> None:
        super().__init__(QuantizationConfigMixin(quant_method=checkpoint.format.name))
        self.folder = checkpoint.folder

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Asked when the model is to be saved."""
        raise PTQError(f"a model of load_quantized holds weights packed for the kernels and cannot be saved; copy {self.folder} instead")


class _Loader:
    """Fills the model of a checkpoint, which is on the meta device, one module of ``places`` after the other.

    offloaded: takes those whose place is the disk.
    """

    def __init__(self, checkpoint: PackedCheckpoint, kernel: str, places: Mapping[str, Place], offloaded: Offloaded | None = None) -> None:
        self.checkpoint = checkpoint
        self.model = checkpoint.model
        self.places, self.offloaded = places, offloaded
        self.main = device_of(main_place(places))
        self.device = self.main  # of the module at work
        self.dtype: torch.dtype = checkpoint.config.dtype
        self.kernel = kernel
        # Two names in memory that share a stored tensor, such as a tied head, get one parameter.
        self._parameters: dict[str, nn.Parameter] = {}

    def run(self, fuse: bool) -> None:
        """Fill the model. fuse: join layers of the same input, where they are computed from where they are."""
        schemes = self.checkpoint.schemes
        tables = {name for name in schemes if isinstance(self.model.get_submodule(name), nn.Embedding)}
        multiplied = {name: scheme for name, scheme in schemes.items() if scheme.blocks is None and name not in tables}
        together = same_input(self.model, kind_of(self.checkpoint.config), multiplied) if fuse else [[name] for name in multiplied]
        plain = self.checkpoint.plain()
        for unit, place in self.places.items():
            waits = device_of(place) != self.main if place == "cpu" else place == DISK
            self.device = self.main if waits else device_of(place)
            for name in (each for each in schemes if each not in multiplied and self._unit(each) == unit):
                self._embed(name) if name in tables else self._decode(name)
            for names in together:
                here = [name for name in names if self._unit(name) == unit]
                for joined in [[name] for name in here] if waits else [here] * bool(here):
                    self._replace(joined)
            for name in (each for each in plain if self._unit(each) == unit):
                self._fill(name, plain[name])
            self._refuse_missing(unit)
            if waits:
                self._put_away(unit, place)

    def _unit(self, name: str) -> str:
        return unit_of(name, self.places)

    def _refuse_missing(self, unit: str) -> None:
        missing = [name for name, tensor in _tensors(self.model) if tensor.is_meta and self._unit(name) == unit]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise PTQError(f"{self.checkpoint.folder}: no tensor is stored for {missing[0]}{more}")

    def _put_away(self, unit: str, place: Place) -> None:
        """The module ``unit`` waits for its turn in main memory or on the disk."""
        if place == DISK:
            assert self.offloaded is not None
            self.offloaded.take(self.model, unit)
        else:
            self.model.get_submodule(unit).to("cpu")

    def _replace(self, names: Sequence[str]) -> None:
        """Put layers in the place of linears that read the same tensor, joined where their weights allow it."""
        read = {name: self._read_linear(name) for name in names}
        for joinable in alike(read):
            weights, biases = zip(*(read[name] for name in joinable), strict=True)
            layer = self._layer(joinable, joined_weight(weights), joined_bias(weights, biases))
            sizes = [len(weight.codes) for weight in weights]
            parts = JoinedLinear(layer, sizes).parts() if len(joinable) > 1 else [layer]
            for name, part in zip(joinable, parts, strict=True):
                self.model.set_submodule(name, part)

    def _embed(self, name: str) -> None:
        """Put a table that keeps its codes in the place of an embedding."""
        embedding, weight = self.model.get_submodule(name), self.checkpoint.weight(name)
        assert isinstance(embedding, nn.Embedding)
        self._check_range(f"{name}: its scales", weight.scale, weight.scheme.levels)
        self.model.set_submodule(name, PackedEmbedding(embedding, weight.to(self.device), self.dtype))

    def _decode(self, name: str) -> None:
        """Fill a linear whose blocks no kernel here multiplies with what they stand for."""
        weight, bias = self._read_linear(name)
        linear = self.model.get_submodule(name)
        values = weight.dequantize(torch.float32)
        self._check_range(name, values)
        linear._parameters["weight"] = nn.Parameter(values.to(self.device, self.dtype), requires_grad=False)
        if bias is not None:
            linear._parameters["bias"] = nn.Parameter(bias, requires_grad=False)

    def _layer(self, names: Sequence[str], weight: QuantizedWeight, bias: Tensor | None) -> nn.Module:
        try:
            return quantized_linear(weight, bias, self.dtype, self.device, self.kernel)
        except UsageError as error:
            raise UsageError(f"{names[0]}: {error}") from error

    def _read_linear(self, name: str) -> tuple[QuantizedWeight, Tensor | None]:
        weight = self.checkpoint.weight(name)
        columns = None if weight.outliers is None else weight.outliers.weight
        free = weight.scheme.codebook is None and weight.scheme.blocks is None  # the scales of others stay in float32
        levels = weight.scheme.levels if free else None
        for part, values in (("scales", weight.scale), ("input scale", weight.input_scale), ("outlier columns", columns)):
            if values is not None:
                self._check_range(f"{name}: its {part}", values, None if values is columns else levels)
        stored_bias = self.checkpoint.names.disk(f"{name}.bias")
        if self.model.get_submodule(name).bias is not None and stored_bias is None:
            raise PTQError(f"{self.checkpoint.folder}: no tensor is stored for {name}.bias")
        return weight, None if stored_bias is None else self._read(f"{name}.bias", stored_bias)

    def _fill(self, name: str, stored: str) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = self._read(name, stored)
            return
        if stored not in self._parameters:
            self._parameters[stored] = nn.Parameter(self._read(name, stored), requires_grad=False)
        module._parameters[leaf] = self._parameters[stored]

    def _read(self, name: str, stored: str) -> Tensor:
        value = self.checkpoint.read_plain(name, stored)
        if not value.is_floating_point():
            return value.to(self.device)
        self._check_range(name, value)
        return value.to(self.device, self.dtype)

    def _check_range(self, name: str, values: Tensor, levels: int | None = None) -> None:
        """Raise PTQError if ``values`` are no longer finite in the dtype of the model, or, being scales of so many ``levels``, become zero
        or take the weights out of its range."""
        if values.dtype == self.dtype or not values.numel():
            return
        smallest, largest = (values if levels is None else values.abs()).to(self.dtype).aminmax()  # scales may have a sign
        lost = levels is not None and not (smallest > 0 and torch.isfinite(largest * levels))
        if lost or not (torch.isfinite(smallest) and torch.isfinite(largest)):
            raise PTQError(f"{self.checkpoint.folder}: {name} leave the range of {self.dtype}; load the model in another dtype")


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]

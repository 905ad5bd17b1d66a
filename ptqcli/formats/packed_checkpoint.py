"""The one way to open a quantized model folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptqcli.arguments import as_path, check_argument
from ptqcli.checkpoint.tensors import FLOATING, SINGLE_FILE, SafetensorsFolder, TensorSource
from ptqcli.errors import PTQError
from ptqcli.formats import Format, LinearSpec, format_of
from ptqcli.model.classes import build_classes
from ptqcli.model.config import build_on_meta, load_config
from ptqcli.model.gguf import is_gguf
from ptqcli.model.linears import EMBEDDING, is_linear, linear_weight
from ptqcli.model.locate import only_file
from ptqcli.model.names import DiskNames
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight


class PackedCheckpoint:
    """A quantized model, opened: what is where, and its weights one at a time. Made by ``open_checkpoint``.

    folder: where it is, for messages.
    config: the transformers configuration.
    model: the model of that configuration, on the meta device.
    format: how its weights are stored.
    tensors: everything that is stored.
    schemes: the scheme of each quantized linear by its path in the model, in the order of the model.
    names: names in memory -> stored names; a quantized linear counts as if its ``weight`` were stored.

    entry: what the configuration says of the format. Raises PTQError, naming the tensor, if what is stored is not what it says.
    """

    def __init__(
        self, folder: Path, config: Any, model: nn.Module, stored_as: Format, tensors: TensorSource, entry: Mapping[str, Any]
    ) -> None:
        self.folder, self.config, self.model, self.format, self.tensors = folder, config, model, stored_as, tensors
        self._stored, self._quantized = frozenset(tensors.names), set(stored_as.stored_linears(tensors.names))
        self.names = DiskNames(model, _as_plain(stored_as, tensors.names))
        linears = {name: self._name_on_disk(name) for name, module in model.named_modules() if self._may_have_codes(name, module)}
        self.schemes = stored_as.schemes(entry, tensors, linears)
        self._specs = {name: self._spec(name, scheme) for name, scheme in self.schemes.items()}
        self._refuse_unexpected()

    def spec(self, name: str) -> LinearSpec:
        """The quantized linear ``name``. scale_dtype: that of its first floating tensor, or the model's. Its groups count as not moving."""
        return self._specs[name]

    def nbytes(self, name: str) -> int:
        """Bytes that the quantized linear ``name`` takes in the file."""
        return sum(self.tensors.nbytes(tensor) for tensor in self._tensor_names(name, self.schemes[name]))

    def weight(self, name: str) -> QuantizedWeight:
        """The codes of the quantized linear ``name``.

        Raises PTQError if there is none, or if they are damaged or not as large as the model's matrix.
        """
        if name not in self.schemes:
            raise PTQError(f"{self.folder}: {name} is no quantized linear; they are named like {next(iter(self.schemes), 'none')}")
        weight = self.format.unpack(self.stored_linear(name), self.tensors.read, self.schemes[name])
        spec = self._specs[name]
        if tuple(weight.codes.shape) != (spec.out_features, spec.in_features):
            wanted = [spec.out_features, spec.in_features]
            raise PTQError(f"{self.folder}: {name} is stored as {list(weight.codes.shape)}, but config.json asks for {wanted}")
        return weight

    def read_plain(self, name: str, stored: str) -> Tensor:
        """The parameter or buffer ``name`` of the model, which is ``stored`` under that name.

        Raises PTQError if it is not finite, or has another shape or another kind of numbers than the model's.
        """
        value, expected = self.tensors.read(stored), self._expected(name)
        if expected is None or value.shape != expected.shape:
            wanted = "nothing" if expected is None else str(list(expected.shape))
            raise PTQError(f"{self.folder}: {name} is stored as {list(value.shape)}, but config.json asks for {wanted}")
        if (value.dtype not in FLOATING) if expected.is_floating_point() else value.is_floating_point():
            wanted = "a floating tensor" if expected.is_floating_point() else "whole numbers"
            raise PTQError(f"{self.folder}: {name} is stored as {value.dtype}, but the model takes {wanted}")
        return value

    def _expected(self, name: str) -> Tensor | None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        return module._buffers[leaf] if leaf in module._buffers else module._parameters[leaf]

    def path(self, name: str) -> Path:
        """The file that holds the quantized linear, parameter or buffer ``name``."""
        if not isinstance(self.tensors, SafetensorsFolder):
            return self.folder
        parts = self._tensor_names(name, self.schemes[name]) if name in self.schemes else (self.names.disk(name) or "",)
        return next((self.tensors.path(part) for part in parts if part in self._stored), self.folder)

    def plain(self) -> dict[str, str]:
        """Names in memory -> stored names of everything that is not part of a quantized linear, whose biases are not here either."""
        return {name: stored for name, stored in self.names.items() if name.rpartition(".")[0] not in self.schemes}

    @property
    def plain_tensors(self) -> list[str]:
        """Stored names of all tensors that are no part of a quantized weight."""
        return [name for name in self.tensors.names if not _belongs(name, self._quantized)]

    def stored_linear(self, name: str) -> str:
        """The stored name of the quantized linear ``name``."""
        linear = self._name_on_disk(name)
        if linear not in self._quantized:
            wanted = self.format.tensor_names(linear, self.schemes[name])
            missing = next((tensor for tensor in wanted if tensor not in self.tensors.names), linear)
            raise PTQError(f"{self.folder}: config.json says that {name} is quantized, but {missing} is not stored")
        return linear

    def _spec(self, name: str, scheme: Scheme) -> LinearSpec:
        module = self.model.get_submodule(name)
        out_features, in_features = linear_weight(module).shape
        dtypes = [self.tensors.dtype(tensor) for tensor in self._tensor_names(name, scheme)]
        scale_dtype = next((dtype for dtype in dtypes if dtype.is_floating_point), self.config.dtype)
        return LinearSpec(
            name=name,
            scheme=scheme,
            out_features=out_features,
            in_features=in_features,
            scale_dtype=scale_dtype,
            kind=EMBEDDING if isinstance(module, nn.Embedding) else type(module).__name__,
            outside=isinstance(module, nn.Embedding) or module is self.model.get_output_embeddings(),  # type: ignore[operator]
        )

    def _may_have_codes(self, name: str, module: nn.Module) -> bool:
        """An embedding is one among the linears if it is stored as such."""
        return is_linear(module) or (isinstance(module, nn.Embedding) and self._name_on_disk(name) in self._quantized)

    def _tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """Those of the linear ``name`` that are stored, or should be."""
        names = self.format.tensor_names(self.stored_linear(name), scheme)
        return tuple(each for each in names if each in self._stored or each.rpartition(".")[2] not in self.format.optional)

    def _name_on_disk(self, name: str) -> str:
        return (self.names.disk(f"{name}.weight") or name).removesuffix(".weight")

    def _refuse_unexpected(self) -> None:
        for name, stored in self.plain().items():
            if stored.removesuffix(".weight") in self._quantized:
                raise PTQError(f"{self.folder}: {name} is stored quantized, but config.json gives it no scheme")
        known = {tensor for name, scheme in self.schemes.items() for tensor in self._tensor_names(name, scheme)}
        stray = [name for name in self.tensors.names if _belongs(name, self._quantized) and name not in known]
        if stray:
            more = f" and {len(stray) - 1} more" if len(stray) > 1 else ""
            raise PTQError(f"{self.folder}: nothing in the model takes the tensor {stray[0]}{more}")


def _belongs(tensor: str, linears: AbstractSet[str]) -> bool:
    """Whether the stored ``tensor`` is part of a quantized weight: a linear has nothing else but a bias. Parts of parts belong to it,
    too."""
    linear, _, part = tensor.rpartition(".")
    while linear:
        if linear in linears:
            return part != "bias"
        linear, _, before = linear.rpartition(".")
        part = f"{before}.{part}"
    return False


def _as_plain(stored_as: Format, names: Sequence[str]) -> list[str]:
    """The names that the tensors would have if no linear were quantized."""
    linears = set(stored_as.stored_linears(names))
    return [*(name for name in names if not _belongs(name, linears)), *(f"{linear}.weight" for linear in sorted(linears))]


def open_checkpoint(folder: str | Path, dtype: torch.dtype | None = None) -> PackedCheckpoint:
    """The quantized model in ``folder``, or that of a GGUF file; no weight is read yet.

    dtype: floating dtype of the model; None takes the one that config.json names, or that of the first floating tensor.
    Raises PTQError or UsageError, naming the file, key or tensor, when the folder is no quantized checkpoint of a format that is read, is
    damaged, or does not fit its model.
    """
    folder = as_path(folder, "a checkpoint")
    folder = only_file(folder) or folder
    check_argument(dtype, "dtype", torch.dtype, optional=True)
    if is_gguf(folder):
        return _open_gguf(folder, dtype)
    config = load_config(folder)
    entry = getattr(config, "quantization_config", None)
    if not isinstance(entry, Mapping):
        raise PTQError(f"{folder}: config.json has no quantization_config, so the model is not quantized; run ptq quantize on it first")
    stored_as = format_of(entry)
    tensors = SafetensorsFolder(folder, _single_file(folder, entry))
    config.dtype = dtype or config.dtype or _stored_dtype(tensors)
    model, _ = build_classes(config, _as_plain(stored_as, tensors.names), config.architectures).built[0]
    return PackedCheckpoint(folder, config, model, stored_as, tensors, entry)


def _single_file(folder: Path, entry: Mapping[str, Any]) -> str:
    """The name of the one file with all tensors, where there is one: old files of AutoGPTQ say what it is called."""
    base = entry.get("model_file_base_name")
    named = f"{base}.safetensors"
    if isinstance(base, str) and Path(named).name == named and not os.path.isfile(folder / SINGLE_FILE) and os.path.isfile(folder / named):
        return named
    return SINGLE_FILE


def check_schemes(packed: PackedCheckpoint, wanted: Mapping[str, Scheme]) -> None:
    """Raise PTQError, by name, if a checkpoint is not read with the schemes that its linears were written in.

    In a format of one file a head may have been rounded to a type of its own when that was made.
    """
    for name in wanted if packed.format.one_file else {**wanted, **packed.schemes}:
        found, meant = packed.schemes.get(name), wanted.get(name)
        if found != meant:
            raise PTQError(
                f"{packed.folder}: {name} was written as {meant or 'it is'}, and is read as {found or 'not quantized'}; please report it"
            )


def _open_gguf(path: Path, dtype: torch.dtype | None) -> PackedCheckpoint:
    """The model of a GGUF file, which need not be quantized. What is no scheme of this package counts as a plain tensor."""
    from ptqcli.formats.gguf import GGUF_BLOCKS, open_tensors

    config, tensors = open_tensors(path)
    config.dtype = dtype or config.dtype
    model = build_on_meta(config, len(tensors.names))
    return PackedCheckpoint(path, config, model, GGUF_BLOCKS, tensors, {})


def _stored_dtype(tensors: TensorSource) -> torch.dtype:
    """The first floating dtype in the file, which is what transformers takes when config.json names none."""
    return next((tensors.dtype(name) for name in tensors.names if tensors.dtype(name).is_floating_point), torch.float32)

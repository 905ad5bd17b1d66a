"""A packed checkpoint as a transformers model whose quantized linears run on the kernels.

The model is built on the meta device from config.json, each quantized linear is replaced by a layer that keeps its weight in integers,
and everything else is read as it is. No weight is ever expanded while loading. A tensor that the model needs and the file lacks is an
error that names it, and so is a tensor beside a quantized linear that its scheme does not take. Other tensors that the model does not
know (buffers that old files carry, heads that transformers does not build) are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ptq_kernels import LLMInt8Linear, W8A8Linear, WeightOnlyLinear, signed_codes
from torch import Tensor, nn

from ptqcli.checkpoint import CheckpointReader
from ptqcli.errors import PTQError
from ptqcli.formats import compressed_tensors
from ptqcli.model import DiskNames, build_on_meta, is_linear, linear_weight, load_config
from ptqcli.scheme import WHOLE_MATRIX, ActivationScheme, QuantizedWeight, Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_quantized(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in the checkpoint folder ``path``, ready for inference and ``generate``.

    dtype: floating dtype of activations, scales and unquantized weights; None takes the one that config.json names.
    Raises PTQError or UsageError, naming the file or tensor, when the folder is no quantized checkpoint or does not fit its model.
    """
    folder = Path(path)
    config = load_config(folder)
    entry = getattr(config, "quantization_config", None)
    if not isinstance(entry, Mapping):
        raise PTQError(f"{folder}: config.json has no quantization_config, so the model is not quantized; run ptq quantize on it first")
    reader = CheckpointReader(folder)
    config.dtype = dtype or config.dtype or _stored_dtype(reader)
    model = build_on_meta(config)
    schemes = compressed_tensors.schemes_of(entry, [name for name, module in model.named_modules() if is_linear(module)])
    _Loader(model, reader, schemes, torch.device(device), config.dtype).run()
    if (folder / "generation_config.json").is_file():
        _set_generation_config(model, folder)
    return model.to(device)  # the buffers that the model computed for itself


class _Loader:
    """Fills a model on the meta device from a checkpoint."""

    def __init__(
        self, model: nn.Module, reader: CheckpointReader, schemes: Mapping[str, Scheme], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.model = model
        self.reader = reader
        self.schemes = schemes
        self.device = device
        self.dtype = dtype
        self.quantized = set(compressed_tensors.stored_linears(reader.names))
        plain = [name for name in reader.names if not self._belongs(name)]
        self.names = DiskNames(model, [*plain, *(f"{linear}.weight" for linear in sorted(self.quantized))])
        # Two names in memory that share a stored tensor, such as a tied head, get one parameter.
        self._parameters: dict[str, nn.Parameter] = {}

    def run(self) -> None:
        self._refuse_unexpected()
        for name, scheme in self.schemes.items():
            self.model.set_submodule(name, self._layer(name, self.model.get_submodule(name), scheme))
        for name, stored in self.names.items():
            if name.rpartition(".")[0] not in self.schemes:
                self._fill(name, stored)
        missing = [name for name, tensor in _tensors(self.model) if tensor.is_meta]
        if missing:
            raise PTQError(f"{self.reader.folder}: no tensor is stored for {missing[0]}{_and_more(missing)}")

    def _belongs(self, name: str) -> bool:
        """Whether the stored tensor ``name`` is part of a quantized weight: a linear has nothing else but a bias."""
        linear, _, leaf = name.rpartition(".")
        return linear in self.quantized and leaf != "bias"

    def _refuse_unexpected(self) -> None:
        known = {name for linear, scheme in self._stored_schemes() for name in compressed_tensors.tensor_names(linear, scheme)}
        stray = [name for name in self.reader.names if self._belongs(name) and name not in known]
        if stray:
            raise PTQError(f"{self.reader.folder}: nothing in the model takes the tensor {stray[0]}{_and_more(stray)}")

    def _stored_schemes(self) -> list[tuple[str, Scheme]]:
        return [(self._stored_linear(name), scheme) for name, scheme in self.schemes.items()]

    def _stored_linear(self, name: str) -> str:
        """The stored name of the quantized linear ``name``."""
        linear = (self.names.disk(f"{name}.weight") or name).removesuffix(".weight")
        if linear not in self.quantized:
            raise PTQError(f"{self.reader.folder}: config.json says that {name} is quantized, but {linear}.weight_scale is not stored")
        return linear

    def _layer(self, name: str, module: nn.Module, scheme: Scheme) -> nn.Module:
        weight = compressed_tensors.unpack(self._stored_linear(name), self.reader.read, scheme)
        self._expect_shape(name, weight.codes, linear_weight(module))
        stored_bias = self.names.disk(f"{name}.bias")
        if module.bias is not None and stored_bias is None:
            raise PTQError(f"{self.reader.folder}: no tensor is stored for {name}.bias")
        bias = None if stored_bias is None else self.reader.read(stored_bias).to(self.dtype)
        if scheme.activations is None:
            layer = _weight_only_layer(weight, bias, self.dtype)
        else:
            layer = _integer_layer(weight, scheme.activations, bias, self.dtype)
        return layer.to(self.device)

    def _fill(self, name: str, stored: str) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = self._read(name, stored, module._buffers[leaf])
            return
        if stored not in self._parameters:
            value = self._read(name, stored, module._parameters[leaf])
            self._parameters[stored] = nn.Parameter(value, requires_grad=False)
        module._parameters[leaf] = self._parameters[stored]

    def _read(self, name: str, stored: str, expected: Tensor | None) -> Tensor:
        if stored.removesuffix(".weight") in self.quantized:
            raise PTQError(f"{self.reader.folder}: {name} is stored quantized, but config.json gives it no scheme")
        value = self.reader.read(stored)
        self._expect_shape(name, value, expected)
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    def _expect_shape(self, name: str, value: Tensor, expected: Tensor | None) -> None:
        if expected is None or value.shape != expected.shape:
            wanted = "nothing" if expected is None else str(list(expected.shape))
            raise PTQError(f"{self.reader.folder}: {name} is stored as {list(value.shape)}, but config.json asks for {wanted}")


def _weight_only_layer(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """The layer of a weight-only scheme. transformers rounds the scales to the model's dtype, too, before it expands a weight."""
    scheme = weight.scheme
    zero = None if scheme.symmetric else weight.zero
    return WeightOnlyLinear(weight.codes, weight.scale.to(dtype), zero, scheme.bits, scheme.group_size, bias)


def _integer_layer(weight: QuantizedWeight, activations: ActivationScheme, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """The layer of a scheme with 8-bit activations, scales rounded as in ``_weight_only_layer``."""
    scheme = weight.scheme
    codes = signed_codes(weight.codes, scheme.bits)
    scale = weight.scale.flatten().to(dtype)
    if scheme.group_size == WHOLE_MATRIX:
        scale = scale[:1].clone()
    if scheme.outliers is None or weight.outliers is None:
        input_scale = None if weight.input_scale is None else weight.input_scale.to(dtype)
        return W8A8Linear(codes, scale, input_scale, activations.per_token, bias)
    columns = weight.outliers.weight.to(dtype)
    threshold = scheme.outliers.threshold if scheme.outliers.dynamic else None
    return LLMInt8Linear(codes, scale, weight.outliers.index, columns, threshold, activations.per_token, bias)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _stored_dtype(reader: CheckpointReader) -> torch.dtype:
    """The first floating dtype in the file, which is what transformers takes when config.json names none."""
    return next((reader.dtype(name) for name in reader.names if reader.dtype(name).is_floating_point), torch.float32)


def _set_generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig.from_pretrained(folder)


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""

"""A packed checkpoint as a transformers model whose quantized linears run on the kernels.

Which kernel a layer gets, with ``kernel="auto"``:

    triton      on CUDA, from Ampere on: 4-bit and 8-bit weights in groups of 32, 64, 128 or whole rows in a 16-bit model; W8A8; LLM.int8
    torch       on the CPU: 4-bit weights in groups that are multiples of 32, 8-bit weights with a scale a row; W8A8 and LLM.int8 where
                the processor multiplies bytes
    reference   everything else: the weight is expanded on every call

``kernels_in`` tells what became of it. Layers that read the same tensor, such as q, k and v, are joined into one.

The model is built on the meta device from config.json, each quantized linear is replaced by a layer that keeps its weight in integers,
and everything else is read as it is. No weight is ever expanded while loading. A tensor that the model needs and the file lacks is an
error that names it, and so is a tensor beside a quantized linear that its scheme does not take. Other tensors that the model does not
know (buffers that old files carry, heads that transformers does not build) are left alone.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ptq_kernels import (
    JoinedLinear,
    LinearPart,
    LLMInt8Linear,
    ReferenceWeightOnly,
    TorchInt4WeightOnly,
    TorchInt8WeightOnly,
    TritonWeightOnly,
    W8A8Linear,
    signed_codes,
)
from ptq_kernels.reference import int_mm_is_fast_and_exact
from ptq_kernels.torch_cpu import INT8_COLUMN_MULTIPLE, int4_group_size
from ptq_kernels.w4a16 import GROUP_SIZES
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ptqcli.checkpoint import CheckpointReader
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats import compressed_tensors
from ptqcli.model import DiskNames, build_on_meta, find_blocks, is_linear, linear_weight, load_config, probe_blocks
from ptqcli.scheme import WHOLE_MATRIX, WHOLE_ROW, ActivationScheme, OutlierColumns, QuantizedWeight, Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KERNELS = ("auto", "triton", "torch", "reference")
OLDEST_CAPABILITY = (8, 0)  # of a GPU that the Triton kernels run on


def load_quantized(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    kernel: str = "auto",
    fuse: bool = True,
) -> PreTrainedModel:
    """The model in the checkpoint folder ``path``, ready for inference and ``generate``.

    dtype: floating dtype of activations, scales and unquantized weights; None takes the one that config.json names. kernel: one of
    KERNELS, for all layers. fuse: join layers of the same input.
    Raises PTQError or UsageError, naming the file or tensor, when the folder is no quantized checkpoint or does not fit its model, or a
    layer cannot run on ``kernel``.
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
    _Loader(model, reader, schemes, torch.device(device), config.dtype, kernel).run(fuse)
    if (folder / "generation_config.json").is_file():
        _set_generation_config(model, folder)
    model.hf_quantizer = _Packed(folder)
    return model.to(device)  # the buffers that the model computed for itself


class _Packed(HfQuantizer):
    """Lets ``model.save_pretrained`` refuse: no program could load the layout of the kernels, which it would write without a word."""

    is_trainable = False

    def __init__(self, folder: Path) -> None:
        super().__init__(QuantizationConfigMixin(quant_method=compressed_tensors.NAME))
        self.folder = folder

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Asked when the model is to be saved."""
        raise PTQError(f"a model of load_quantized holds weights packed for the kernels and cannot be saved; copy {self.folder} instead")


class _Loader:
    """Fills a model on the meta device from a checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        reader: CheckpointReader,
        schemes: Mapping[str, Scheme],
        device: torch.device,
        dtype: torch.dtype,
        kernel: str,
    ) -> None:
        self.model = model
        self.reader = reader
        self.schemes = schemes
        self.device = device
        self.dtype = dtype
        self.kernel = kernel
        self.quantized = set(compressed_tensors.stored_linears(reader.names))
        plain = [name for name in reader.names if not self._belongs(name)]
        self.names = DiskNames(model, [*plain, *(f"{linear}.weight" for linear in sorted(self.quantized))])
        # Two names in memory that share a stored tensor, such as a tied head, get one parameter.
        self._parameters: dict[str, nn.Parameter] = {}

    def run(self, fuse: bool) -> None:
        self._refuse_unexpected()
        together = same_input(self.model, self.schemes) if fuse else [[name] for name in self.schemes]
        for names in together:
            self._replace(names)
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

    def _replace(self, names: Sequence[str]) -> None:
        """Put layers in the place of linears that read the same tensor, joined where their weights allow it."""
        read = {name: self._read_weight(name) for name in names}
        for alike in _alike(read):
            weights, biases = zip(*(read[name] for name in alike), strict=True)
            layer = self._layer(alike, _joined_weight(weights), _joined_bias(weights, biases))
            sizes = [len(weight.codes) for weight in weights]
            parts = JoinedLinear(layer, sizes).parts() if len(alike) > 1 else [layer]
            for name, part in zip(alike, parts, strict=True):
                self.model.set_submodule(name, part)

    def _layer(self, names: Sequence[str], weight: QuantizedWeight, bias: Tensor | None) -> nn.Module:
        try:
            return quantized_linear(weight, bias, self.dtype, self.device, self.kernel)
        except UsageError as error:
            raise UsageError(f"{names[0]}: {error}") from error

    def _read_weight(self, name: str) -> tuple[QuantizedWeight, Tensor | None]:
        module = self.model.get_submodule(name)
        weight = compressed_tensors.unpack(self._stored_linear(name), self.reader.read, self.schemes[name])
        self._expect_shape(name, weight.codes, linear_weight(module))
        stored_bias = self.names.disk(f"{name}.bias")
        if module.bias is not None and stored_bias is None:
            raise PTQError(f"{self.reader.folder}: no tensor is stored for {name}.bias")
        return weight, None if stored_bias is None else self.reader.read(stored_bias).to(self.dtype)

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


def same_input(model: nn.Module, schemes: Mapping[str, Scheme]) -> list[list[str]]:
    """The quantized linears, those of a block that read the same tensor together, in the order of ``schemes``."""
    try:
        blocks = find_blocks(model)
        shapes = probe_blocks(model, list(model.get_submodule(blocks).children()))
    except PTQError:  # nothing is known of this model's inputs: its layers run one by one
        return [[name] for name in schemes]
    stages = [[f"{blocks}.{index}.{local}" for local in stage] for index, shape in enumerate(shapes) for stage in shape.stages]
    stage_of = {name: place for place, stage in enumerate(stages) for name in stage}
    found: dict[int | str, list[str]] = {}
    for name in schemes:
        found.setdefault(stage_of.get(name, name), []).append(name)
    return list(found.values())


def _alike(weights: Mapping[str, tuple[QuantizedWeight, Tensor | None]]) -> Iterator[list[str]]:
    """Names of weights that can be joined along their rows: of one scheme, with the same numbers for their inputs."""
    found: dict[object, list[str]] = {}
    for name, (weight, _) in weights.items():
        inputs = [weight.g_idx, weight.input_scale, None if weight.outliers is None else weight.outliers.index]
        key = (
            weight.scheme,
            weight.codes.shape[1],
            weight.scale.dtype,
            *(None if part is None else tuple(part.tolist()) for part in inputs),
        )
        found.setdefault(key, []).append(name)
    yield from found.values()


def _joined_weight(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    first = weights[0]
    if len(weights) == 1:
        return first
    outliers = None
    if first.outliers is not None:
        outliers = OutlierColumns(first.outliers.index, torch.cat([weight.outliers.weight for weight in weights if weight.outliers]))
    scheme = first.scheme
    if scheme.group_size == WHOLE_MATRIX:  # a scale for each of several matrices, so it must be one a row
        scheme = replace(scheme, group_size=WHOLE_ROW)
    codes, scale, zero = (torch.cat([getattr(weight, part) for weight in weights]) for part in ("codes", "scale", "zero"))
    return QuantizedWeight(codes, scale, zero, scheme, first.g_idx, first.input_scale, outliers)


def _joined_bias(weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> Tensor | None:
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return None
    return torch.cat([given.new_zeros(len(weight.codes)) if bias is None else bias for weight, bias in zip(weights, biases, strict=True)])


def quantized_linear(
    weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, device: str | torch.device = "cpu", kernel: str = "auto"
) -> nn.Module:
    """A layer with ``weight`` [N, K] and ``bias`` [N] for inputs of ``dtype``, on ``device``; its ``kernel`` says what it runs on.

    kernel: one of KERNELS. Raises UsageError for another, or if the layer cannot run on the one that is asked for.
    """
    if kernel not in KERNELS:
        raise UsageError(f"kernel {kernel!r} is unknown; use {', '.join(KERNELS)}")
    place = torch.device(device)
    reasons = {"triton": _not_on_triton(weight, dtype, place), "torch": _not_on_torch(weight, dtype, place), "reference": None}
    chosen = next(name for name, reason in reasons.items() if reason is None) if kernel == "auto" else kernel
    if reasons[chosen] is not None:
        raise UsageError(f"kernel {kernel} cannot run it: {reasons[chosen]}; use --kernel auto")
    weight = weight.to(place)
    bias = None if bias is None else bias.to(place, dtype)
    if weight.scheme.activations is None:
        return _weight_only_layer(weight, bias, dtype, chosen)
    return _integer_layer(weight, weight.scheme.activations, bias, dtype, chosen == "reference")


def _not_on_triton(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the Triton kernels cannot run ``weight``, or None."""
    scheme = weight.scheme
    if device.type != "cuda":
        return "it needs a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 or later"
    if scheme.activations is not None:
        return None
    if scheme.bits not in (4, 8):
        return f"it has 4 and 8 bits, not {scheme.bits}"
    if scheme.group_size not in GROUP_SIZES and scheme.group_size != weight.codes.shape[1]:
        return f"it has groups of 32, 64, 128 and whole rows, not of {scheme.group_size}"
    return "it takes activations of 16 bits, not float32" if dtype == torch.float32 else None


def _not_on_torch(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why torch's own kernels cannot run ``weight``, or None."""
    scheme = weight.scheme
    if device.type != "cpu":
        return "it is for the CPU"
    if scheme.activations is not None:
        return None if int_mm_is_fast_and_exact() else "this processor has no products of bytes that are exact"
    if weight.g_idx is not None or scheme.group_size == WHOLE_MATRIX:
        return "its groups must be neighbouring columns"
    if scheme.bits == 8:
        if scheme.group_count(weight.codes.shape[1]) > 1 or not scheme.symmetric:
            return "8-bit weights need one scale a row and no zero points"
        return f"8-bit weights need a multiple of {INT8_COLUMN_MULTIPLE} columns" if weight.codes.shape[1] % INT8_COLUMN_MULTIPLE else None
    if scheme.bits == 4:
        return None if int4_group_size(weight.codes.shape[1], scheme.group_size) else "4-bit weights need groups of a multiple of 32"
    return f"it has 4 and 8 bits, not {scheme.bits}"


def _weight_only_layer(weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, kernel: str) -> nn.Module:
    """The layer of a weight-only scheme. transformers rounds the scales to the model's dtype, too, before it expands a weight."""
    scheme = weight.scheme
    zero = None if scheme.symmetric else weight.zero
    scale = weight.scale.to(dtype)
    if kernel == "torch" and scheme.bits == 8:
        return TorchInt8WeightOnly(signed_codes(weight.codes, 8), scale.flatten(), bias)
    if kernel == "torch":
        return TorchInt4WeightOnly(weight.codes, scale, zero, scheme.group_size, bias)
    layer = TritonWeightOnly if kernel == "triton" else ReferenceWeightOnly
    return layer(weight.codes, scale, zero, scheme.bits, scheme.group_size, bias, weight.g_idx)


def _integer_layer(
    weight: QuantizedWeight, activations: ActivationScheme, bias: Tensor | None, dtype: torch.dtype, reference: bool
) -> nn.Module:
    """The layer of a scheme with 8-bit activations, scales rounded as in ``_weight_only_layer``."""
    scheme = weight.scheme
    codes = signed_codes(weight.codes, scheme.bits)
    scale = weight.scale.flatten().to(dtype)
    if scheme.group_size == WHOLE_MATRIX:
        scale = scale[:1].clone()
    if scheme.outliers is None or weight.outliers is None:
        input_scale = None if weight.input_scale is None else weight.input_scale.to(dtype)
        return W8A8Linear(codes, scale, input_scale, activations.per_token, bias, reference)
    columns = weight.outliers.weight.to(dtype)
    threshold = scheme.outliers.threshold if scheme.outliers.dynamic else None
    return LLMInt8Linear(codes, scale, weight.outliers.index, columns, threshold, activations.per_token, bias, reference)


def kernels_in(model: nn.Module) -> Counter[str]:
    """How many of the model's linears run on what: ``{"W4A16 triton": 28}``."""
    found: Counter[str] = Counter()
    inside = set()
    for module in model.modules():
        if isinstance(module, JoinedLinear):
            found[_kernel_text(module.linear)] += len(module.sizes)
            inside.add(module.linear)
        elif hasattr(module, "kernel") and not isinstance(module, LinearPart) and module not in inside:
            found[_kernel_text(module)] += 1
    return found


def _kernel_text(layer: nn.Module) -> str:
    if isinstance(layer, (W8A8Linear, LLMInt8Linear)):
        return f"{'W8A8' if isinstance(layer, W8A8Linear) else 'LLM.int8'} {layer.kernel}"
    return f"W{layer.bits}A16 {layer.kernel}"


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

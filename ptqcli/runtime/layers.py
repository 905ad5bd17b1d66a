"""The layer of a quantized linear. Which kernel it gets, with ``kernel="auto"``:

    triton      on CUDA, from Ampere on: 4-bit and 8-bit weights in groups of 32, 64, 128 or whole rows in a 16-bit model; W8A8; LLM.int8
    torch       on the CPU: 4-bit weights in groups that are multiples of 32, 8-bit weights with a scale a row; W8A8 and LLM.int8 where
                the processor multiplies bytes
    reference   everything else, codebooks such as NF4 among it: the weight is expanded on every call

``kernels_in`` tells what became of it. Layers that read the same tensor, such as q, k and v, are joined into one.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from ptq_kernels import (
    CodebookLinear,
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

from ptqcli.errors import UsageError
from ptqcli.numerics.elements import Codebook
from ptqcli.numerics.scheme import WHOLE_MATRIX, ActivationScheme
from ptqcli.numerics.weight import QuantizedWeight

KERNELS = ("auto", "triton", "torch", "reference")
OLDEST_CAPABILITY = (8, 0)  # of a GPU that the Triton kernels run on


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
    if scheme.codebook is not None:
        return f"it multiplies integers, not codes of {scheme.codebook}"
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
    if scheme.codebook is not None:
        return f"it multiplies integers, not codes of {scheme.codebook}"
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
    """The layer of a weight-only scheme. transformers rounds the scales to the model's dtype, too, before it expands a weight, but not
    those of codebooks, which stay in float32."""
    scheme = weight.scheme
    if isinstance(scheme.element, Codebook):
        return CodebookLinear(weight.codes, weight.scale.float(), scheme.element.levels, f"{scheme.codebook}".upper(), bias)
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
    """The layer of a scheme with 8-bit activations, scales rounded as in ``_weight_only_layer``, but for those that are stored in float32:
    they meet the sums in float32 anyway."""
    scheme = weight.scheme
    codes = signed_codes(weight.codes, scheme.bits)
    scale = weight.scale.flatten() if weight.scale.dtype == torch.float32 else weight.scale.flatten().to(dtype)
    if scheme.group_size == WHOLE_MATRIX:
        scale = scale[:1].clone()
    if scheme.outliers is None or weight.outliers is None:
        input_scale = None if weight.input_scale is None else weight.input_scale.to(dtype)
        return W8A8Linear(codes, scale, input_scale, activations.per_token, bias, reference)
    columns = weight.outliers.weight.to(dtype)
    threshold = scheme.outliers.threshold if scheme.outliers.dynamic else None
    return LLMInt8Linear(codes, scale, weight.outliers.index, columns, threshold, activations.per_token, bias, reference)


def mixes_tokens(model: nn.Module) -> bool:
    """Whether a layer takes a number from all tokens of a call: a dynamic scale of the tensor, or columns in which any is an outlier."""
    return any(
        (isinstance(layer, W8A8Linear) and layer.input_scale is None and not layer.per_token)
        or (isinstance(layer, LLMInt8Linear) and (layer.threshold is not None or not layer.per_token))
        for layer in model.modules()
    )


@contextmanager
def expanding(model: nn.Module) -> Iterator[None]:
    """While inside, layers that take another kernel for few tokens take the one for many, whose numbers differ in the last digits."""
    layers = [layer for layer in model.modules() if isinstance(layer, (TorchInt4WeightOnly, TorchInt8WeightOnly))]
    before = [layer.always_expand for layer in layers]
    for layer in layers:
        layer.always_expand = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.always_expand = was


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
    if isinstance(layer, CodebookLinear):
        return f"{layer.name} {layer.kernel}"
    return f"W{layer.bits}A16 {layer.kernel}"

"""Other people's kernels for the same codes, to be timed beside our own.

An adapter turns a ``QuantizedWeight`` into the layout that a peer reads, once, and calls the peer as its own layer does. Nothing is
quantized anew: symmetric codes, zero points and scales go over as they are, so that a peer's output can be compared with float64 of the
very same weight. What a peer cannot take (a column order, a group size, a shape) its adapter answers with None.

    torch int4       tinygemm. weight ``(code - 8) * scale + shift``, so ``shift = (8 - zero) * scale``; bfloat16 only on CUDA.
    torch int8       int8 rows times 16-bit inputs.
    torch int_mm     inputs to int8 by plain torch (compiled on CUDA), the int32 product of cuBLASLt or oneDNN, scales by plain torch.
    gemlite          Triton; tunes itself at the first call of a size (its mode "fast", which is its default).
    humming          CUDA C++ compiled at the first call of a size; chooses its own launch parameters.
    bitsandbytes     LLM.int8 as ``Linear8bitLt`` calls it. It looks at the outliers on the host, so no CUDA graph can hold it.
    bitsandbytes nf4 another number format of the same size: only its time can be compared.

Packages are imported when a weight is built, not before: some of them touch the GPU or start a compiler at import.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from subprocess import SubprocessError

import torch
from torch import Tensor
from torch.nn import functional

from ptqcli.numerics.scheme import WHOLE_MATRIX
from ptqcli.numerics.weight import QuantizedWeight

Multiply = Callable[[Tensor], Tensor]
Build = Callable[[QuantizedWeight, torch.dtype, torch.device], "Multiply | None"]

INT4_GROUPS = (32, 64, 128, 256)
INT8_COLUMNS = 32  # of any other number torch's int8 kernel reads beyond the end
# cuBLASLt takes no int8 product of 16 rows or fewer; zero rows fill it up.
FEWEST_INT_MM_ROWS = 17
BITSANDBYTES_STEPS = 127  # it stores the largest magnitude of a row, which is so many steps

_ERRORS = (
    RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, ArithmeticError, ImportError, OSError,
    SubprocessError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A kernel to compare with.

    version: of the package it comes from. build: makes, of a weight, a function of x [M, K] in the dtype on the device that returns
    [M, N] in the dtype; None if it does not do this scheme or shape on this device. A package that is broken raises there what it raises.
    same_numbers: it computes with the codes that it was given, so its error says something. graphs: a CUDA graph can hold it; one that
    waits for the device must not even be tried, because a capture that fails may spoil the process.
    """

    name: str
    version: str
    build: Build
    same_numbers: bool = True
    graphs: bool = True


def kernel_errors() -> tuple[type[Exception], ...]:
    """What a library raises that does not get along with this machine, this torch or this shape, Triton's own errors among them.

    Not MemoryError: the machine is at its end. ``except kernel_errors()`` asks for triton only once something was raised.
    """
    try:
        return (*_ERRORS, import_module("triton.errors").TritonError)
    except ImportError:
        return _ERRORS


def first_line(error: BaseException) -> str:
    """Class and first line of what another library raised."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')[:250]}"


def installed_peers(device: str | torch.device) -> list[Peer]:
    """Those whose package is there and that have a kernel for ``device``; none of them is imported yet."""
    kind = torch.device(device).type
    peers = [
        Peer(name="torch int4", version=torch.__version__, build=_torch_int4),
        Peer(name="torch int8", version=torch.__version__, build=_torch_int8),
        Peer(name="torch int_mm", version=torch.__version__, build=_torch_int_mm),
    ]
    if kind == "cuda" and find_spec("gemlite"):
        peers.append(Peer(name="gemlite", version=metadata.version("gemlite"), build=_gemlite))
    if kind == "cuda" and find_spec("humming"):
        peers.append(Peer(name="humming", version=metadata.version("humming-kernels"), build=_humming))
    if find_spec("bitsandbytes"):
        version = metadata.version("bitsandbytes")
        peers.append(Peer(name="bitsandbytes", version=version, build=_bitsandbytes_int8, graphs=False))
        peers.append(Peer(name="bitsandbytes nf4", version=version, build=_bitsandbytes_nf4, same_numbers=False, graphs=False))
    return peers


def missing_peers(device: str | torch.device) -> dict[str, str]:
    """Those that could be installed for ``device``: name, and the command that does it without changing torch."""
    cuda = torch.device(device).type == "cuda"
    missing = {}
    if cuda and not find_spec("gemlite"):
        missing["gemlite"] = "pip install gemlite"
    if cuda and not find_spec("humming"):
        toolkit = (torch.version.cuda or "12").partition(".")[0]
        missing["humming"] = f'pip install "humming-kernels[cu{toolkit}]"'
    if not find_spec("bitsandbytes"):
        missing["bitsandbytes"] = "pip install bitsandbytes"
    return missing


def _torch_int4(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> Multiply | None:
    out_features, in_features = weight.codes.shape
    group, cuda = weight.scheme.columns_per_group(in_features), device.type == "cuda"
    tiles = next((tiles for tiles in (8, 4, 2) if in_features % (16 * tiles) == 0), None)
    fits = group in INT4_GROUPS and out_features % (8 if cuda else 16) == 0 and tiles is not None
    if not _weight_only(weight, 4) or not fits or (cuda and dtype != torch.bfloat16):
        return None
    weight = weight.to(device)
    scale = weight.scale.float()
    shift = (8 - weight.zero.float()) * scale
    scale_and_shift = torch.stack((scale, shift), dim=-1).transpose(0, 1).to(dtype).contiguous()  # [G, N, 2]
    if not cuda:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), tiles)
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scale_and_shift)
    pairs = weight.codes[:, ::2] << 4 | weight.codes[:, 1::2]  # the first of two columns above the second
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, scale_and_shift)


def _torch_int8(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> Multiply | None:
    key = "CUDA" if device.type == "cuda" else "CPU"
    if not _weight_only(weight, 8) or not _rows(weight) or not weight.scheme.symmetric or not _has_kernel("_weight_int8pack_mm", key):
        return None
    if weight.codes.shape[1] % INT8_COLUMNS:
        return None
    codes, scale = _signed(weight).to(device), weight.scale.flatten().to(device, dtype)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, scale).to(dtype)  # on CUDA it answers in float32


def _torch_int_mm(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> Multiply | None:
    out_features, in_features = weight.codes.shape
    activations = weight.scheme.activations
    cuda = device.type == "cuda"
    if activations is None or weight.scheme.outliers or weight.g_idx is not None or (cuda and (out_features % 8 or in_features % 8)):
        return None
    codes = _signed(weight).to(device).t()
    scale = weight.scale.flatten().to(device)
    given = None if weight.input_scale is None else weight.input_scale.float().to(device)
    per_token = activations.per_token
    # As they stand these are a dozen launches; torchao compiles them, too.
    to_int8 = torch.compile(_quantized, dynamic=True) if cuda else _quantized
    to_float = torch.compile(_scaled, dynamic=True) if cuda else _scaled

    def multiply(x: Tensor) -> Tensor:
        tokens, token_scale = to_int8(x, given, per_token, max(FEWEST_INT_MM_ROWS - len(x), 0) if cuda else 0)
        return to_float(torch._int_mm(tokens, codes)[: len(x)], token_scale[: len(x)], scale, dtype)

    return multiply


def _quantized(x: Tensor, given: Tensor | None, per_token: bool, more: int) -> tuple[Tensor, Tensor]:
    """``x`` [M, K] and ``more`` rows of zeros as int8, and the scales [M + more, 1] or [1]."""
    values = functional.pad(x.float(), (0, 0, 0, more))
    scale = given
    if scale is None:
        largest = values.abs().amax(dim=-1, keepdim=True) if per_token else values.abs().amax().reshape(1)
        # By a tensor: a Python number torch on CUDA divides by through its reciprocal, which rounds otherwise.
        scale = torch.where(largest > 0, largest / largest.new_full((), 127.5), 1.0)
    return torch.round(values / scale).clamp(-128, 127).to(torch.int8), scale


def _scaled(sums: Tensor, token_scale: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (sums.float() * token_scale * scale.float()).to(dtype)


def _gemlite(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> Multiply | None:
    out_features, in_features = weight.codes.shape
    scheme = weight.scheme
    if weight.g_idx is not None or scheme.outliers or in_features % 32 or dtype == torch.float32 or scheme.bits == 3:
        return None
    activations = scheme.activations
    if activations is not None and not (activations.per_token and _rows(weight)):
        return None
    gemlite = import_module("gemlite")
    if torch.cuda.get_device_capability(device)[0] == 9:
        # It finds its table by the GPU's name and has none for an H200, which the H100's serves as well.
        gemlite.load_config(str(Path(gemlite.__path__[0]) / "configs" / "h100.json"), False)
    weight = weight.to(device)
    if activations is not None:
        layer = gemlite.helper.A8W8_INT8_dynamic(device=device, dtype=dtype).from_weights(_signed(weight), scales=weight.scale.flatten())
        return layer.forward
    kind = gemlite.DType.BF16 if dtype == torch.bfloat16 else gemlite.DType.FP16
    layer = gemlite.GemLiteLinear(
        scheme.bits, scheme.columns_per_group(in_features), in_features, out_features, input_dtype=kind, output_dtype=kind
    )
    # One number instead of a zero point for each group is exact in 16 bits, and what it does fastest.
    zero = scheme.middle if scheme.symmetric else weight.zero.to(dtype)
    layer.pack(weight.codes, weight.scale.to(dtype), zero)
    if scheme.columns_per_group(in_features) == in_features:
        layer.W_group_mode, layer.channel_scale_mode = 3, 0  # as its own loader sets them: (code - zero) * scale before the product
    return layer.forward


def _humming(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> Multiply | None:
    out_features, in_features = weight.codes.shape
    scheme, activations = weight.scheme, weight.scheme.activations
    whole = scheme.columns_per_group(in_features) == in_features
    if scheme.outliers or weight.g_idx is not None or scheme.bits == 3 or dtype == torch.float32 or out_features % 128 or in_features % 128:
        return None
    if scheme.group_size == WHOLE_MATRIX or (activations is not None and not activations.per_token):
        return None
    weight = weight.to(device)
    config = {"dtype": f"uint{scheme.bits}", "group_size": 0 if whole else scheme.group_size, "has_zero_point": not scheme.symmetric}
    inputs = None if activations is None else {"dtype": "int8"}
    layer = import_module("humming.layer").HummingLayer(out_features, in_features, config, inputs, torch_dtype=dtype).to(device)
    tensors = {"weight": _words(weight.codes, scheme.bits), "weight_scale": weight.scale.to(dtype)}
    if not scheme.symmetric:
        tensors["zero_point"] = _words(weight.zero.t(), scheme.bits).t()  # packed along the rows
    layer.load_from_tensors(tensors)
    layer.transform()
    return layer


def _bitsandbytes_int8(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> Multiply | None:
    scheme = weight.scheme
    activations, outliers = scheme.activations, scheme.outliers
    if activations is None or not activations.per_token or not _rows(weight) or (outliers and not outliers.dynamic):
        return None
    bitsandbytes = import_module("bitsandbytes")
    # It says at every call that it casts bfloat16 to float16, which takes longer than the product.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    state = bitsandbytes.MatmulLtState()
    state.CB = _signed(weight).to(device)
    state.SCB = weight.scale.flatten().float().to(device) * BITSANDBYTES_STEPS
    state.threshold = outliers.threshold if outliers else 0.0
    state.has_fp16_weights = state.is_training = False
    return lambda x: bitsandbytes.matmul(x, state.CB, state=state)


def _bitsandbytes_nf4(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> Multiply | None:
    if not _weight_only(weight, 4) or weight.codes.shape[1] % 64:
        return None
    bitsandbytes = import_module("bitsandbytes")
    values = weight.dequantize(dtype).to(device)
    packed, state = bitsandbytes.functional.quantize_4bit(values, blocksize=64, quant_type="nf4")
    return lambda x: bitsandbytes.matmul_4bit(x, packed, quant_state=state)


def _weight_only(weight: QuantizedWeight, bits: int) -> bool:
    return weight.scheme.bits == bits and weight.scheme.activations is None and weight.g_idx is None


def _rows(weight: QuantizedWeight) -> bool:
    """Whether each row has one scale and the codes have eight bits."""
    return weight.scheme.bits == 8 and weight.scale.shape[1] == 1 and weight.g_idx is None


def _signed(weight: QuantizedWeight) -> Tensor:
    """Symmetric codes as int8 [N, K], zero in the middle."""
    return (weight.codes - weight.scheme.middle).view(torch.int8)  # an unsigned byte wraps around


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [N, K], in words: int32 [N, K * bits / 32], the first code in the lowest bits. ``bits`` divides 8."""
    per_byte = 8 // bits
    parts = codes.contiguous().view(len(codes), -1, per_byte)
    packed = parts[:, :, 0].clone(memory_format=torch.contiguous_format)
    for place in range(1, per_byte):
        packed |= parts[:, :, place] << (bits * place)
    return packed.view(torch.int32)


def _has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{operator}", key)

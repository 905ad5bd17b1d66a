"""The cases of ``gpu_check.py``: what is run on a GPU, and what must come out. No program of its own.

A case is a name and a function that returns what it found, as plain numbers and texts, or raises AssertionError with one line. Layers are
random, inputs signed; what is right is float64 of the same codes and scales.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
for package, home in (("ptq_kernels", ROOT / "kernels"), ("ptqcli", ROOT)):
    if find_spec(package) is None:
        sys.path.append(str(home))

from ptqcli.bench import machine, timing  # noqa: E402
from ptqcli.bench.peers import Peer, first_line, installed_peers, kernel_errors  # noqa: E402
from ptqcli.numerics.scheme import WHOLE_MATRIX, ActivationScheme, OutlierSplit, Scheme  # noqa: E402
from ptqcli.numerics.weight import OutlierColumns, QuantizedWeight  # noqa: E402

Values = dict[str, Any]
Case = Callable[[], Values]

TOLERANCE = 4e-3  # relative Frobenius error of a 16-bit output
PEER_TOLERANCE = 1e-2  # some round their zero points to 16 bits ...
PEER_INT8_TOLERANCE = 3e-2  # ... and inputs in 8 bits are rounded to steps of max / 127, where ours are max / 127.5
WHAT_CASES_RAISE = kernel_errors()

TOKENS = (1, 2, 3, 16, 17, 64, 300)
DTYPES = (torch.bfloat16, torch.float16)
# rows and columns by group size; a flipped code is looked for in the first of each, where it is a large part of a row
ODD_SHAPES = {
    32: ((101, 96), (1000, 2112)),
    64: ((67, 704), (515, 2112)),
    128: ((131, 384), (515, 2176)),
    -1: ((70, 99), (33, 704), (257, 2112)),
}
INT8_SHAPES = ((70, 99), (33, 704), (515, 2112), (1000, 2048))

TIMED_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
# As a runtime multiplies them: q, k and v in one, gate and up in one. The last is one of those two by itself.
SHAPES = {
    "qkv": (4096, 6144),
    "o": (4096, 4096),
    "gate_up": (4096, 28672),
    "down": (14336, 4096),
    "up": (4096, 14336),
}  # columns, rows
OURS, BASELINE = "ours", "bfloat16"
SCHEMES = {
    "W4A16": Scheme(4, 128),
    "W8A8": Scheme(8, -1, activations=ActivationScheme()),
    "LLM.int8": Scheme(8, -1, activations=ActivationScheme(), outliers=OutlierSplit()),
}
OUTLIERS = 7  # columns, as in the paper for a model of 4096


@dataclass(frozen=True)
class Setting:
    """Where the cases run. rehearse: on the CPU, at sizes that take no time, by the operators' own way for machines without a GPU.

    ready: names of the preparations that succeeded. eager: peers that turned out to fit into no CUDA graph.
    """

    rehearse: bool = False
    ready: frozenset[str] = frozenset()
    eager: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    @property
    def tokens(self) -> tuple[int, ...]:
        return (1, 17) if self.rehearse else TOKENS

    @property
    def timed_tokens(self) -> tuple[int, ...]:
        return (1, 4) if self.rehearse else TIMED_TOKENS

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {"up": (256, 384)} if self.rehearse else SHAPES

    @property
    def seconds(self) -> float:
        """For each competitor of a timing."""
        return 0.002 if self.rehearse else 0.1


# ------------------------------------------------------------------------------------------------------------------------ layers


@dataclass(frozen=True)
class Layer:
    """A random layer. perm: int32 [K], its columns belong to those of the input in this order. bias: [N] in the dtype of the input."""

    weight: QuantizedWeight
    bias: Tensor | None = None
    perm: Tensor | None = None


def make_layer(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype, device: torch.device, order: bool = False) -> Layer:
    """Random codes, scales in ``dtype``, zero points and a bias; in an outlier split, two columns of which are stored in 16 bit."""
    generator = torch.Generator(device).manual_seed(rows * columns + scheme.bits)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    groups = scheme.group_count(columns)
    codes = torch.randint(0, scheme.levels, (rows, columns), generator=generator, device=device, dtype=torch.uint8)
    zero = torch.full((rows, groups), scheme.middle, dtype=torch.uint8, device=device)
    if not scheme.symmetric:
        zero = torch.randint(0, scheme.levels, (rows, groups), generator=generator, device=device, dtype=torch.uint8)
    scale = ((uniform(rows, groups) + 0.5) * 0.32 / scheme.levels).to(dtype)
    if scheme.group_size == WHOLE_MATRIX:
        scale[:] = scale[0].clone()
    given = torch.tensor([0.03], device=device) if scheme.activations and not scheme.activations.dynamic else None
    outliers = None
    if scheme.outliers:
        index = torch.tensor([1, columns - 1], dtype=torch.int32, device=device)
        outliers = OutlierColumns(index, (uniform(rows, 2) - 0.5).to(dtype))
    perm = torch.randperm(columns, generator=generator, device=device).to(torch.int32) if order else None
    return Layer(QuantizedWeight(codes, scale, zero, scheme, None, given, outliers), (uniform(rows) - 0.5).to(dtype), perm)


def make_input(tokens: int, columns: int, dtype: torch.dtype, device: torch.device, outliers: int = 0) -> Tensor:
    """Signed normal numbers, [tokens, columns], none above the threshold of an outlier split but in so many columns."""
    generator = torch.Generator(device).manual_seed(tokens * columns)
    x = torch.randn(tokens, columns, generator=generator, device=device).clamp_(-4, 4)
    for place in range(outliers):
        x[place % tokens, (place * columns) // outliers + place % 2] = -40.0
    return x.to(dtype)


def signed(weight: QuantizedWeight) -> Tensor:
    """Symmetric codes as int8, zero in the middle."""
    return (weight.codes - weight.scheme.middle).view(torch.int8)


def ours(layer: Layer, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Our operator for the layer."""
    weight, scheme, bias = layer.weight, layer.weight.scheme, layer.bias
    if scheme.activations is None:
        w4a16 = import_module("ptq_kernels.w4a16")
        packed, scale, zero = tiles(weight, dtype)
        rows = len(weight.codes)
        return lambda x: w4a16.w4a16(x, packed, scale, zero, scheme.bits, scheme.group_size, rows, bias, layer.perm)
    codes, scale, per_token = signed(weight), int8_scale(weight), scheme.activations.per_token
    if weight.outliers is None or scheme.outliers is None:
        w8a8 = import_module("ptq_kernels.w8a8")
        return lambda x: w8a8.w8a8(x, codes, scale, weight.input_scale, per_token, bias)
    llm_int8 = import_module("ptq_kernels.llm_int8")
    slots = llm_int8.outlier_slots(weight.outliers.index, codes.shape[1])
    threshold = scheme.outliers.threshold if scheme.outliers.dynamic else None
    split = (weight.outliers.index, weight.outliers.weight, threshold, per_token)
    return lambda x: llm_int8.llm_int8(x, codes, scale, *split, bias, slots)


def int8_scale(weight: QuantizedWeight) -> Tensor:
    """[N], or [1] for the whole matrix."""
    scale = weight.scale.flatten()
    return scale[:1].clone() if weight.scheme.group_size == WHOLE_MATRIX else scale


def tiles(weight: QuantizedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points as the W4A16 kernels read them."""
    packing = import_module("ptq_kernels.packing")
    zero = None if weight.scheme.symmetric else packing.pack_groups(weight.zero, torch.int16)
    return packing.pack_tiles(weight.codes, weight.scheme.bits), packing.pack_groups(weight.scale, dtype), zero


def truth(layer: Layer, x: Tensor) -> Tensor:
    """What the layer's output is in float64: inputs in 8 bits are rounded as the reference rounds them, everything else is exact."""
    weight, activations = layer.weight, layer.weight.scheme.activations
    x = x if layer.perm is None else x[:, layer.perm.long()]
    group = torch.arange(x.shape[1], device=x.device) // (x.shape[1] // weight.scale.shape[1])
    values = (weight.codes.double() - weight.zero.double()[:, group]) * weight.scale.double()[:, group]
    bias = 0.0 if layer.bias is None else layer.bias.double()
    if activations is None:
        return x.double() @ values.T + bias
    apart = outlier_columns(layer, x)
    below = x.float().index_fill(1, apart, 0)
    scale = weight.input_scale
    if scale is None:
        scale = below.abs().amax(dim=1, keepdim=True) if activations.per_token else below.abs().amax().reshape(1)
        # By a tensor: a Python number torch on CUDA divides by through its reciprocal, which rounds otherwise.
        scale = torch.where(scale > 0, scale / scale.new_full((), 127.5), 1.0)
    rounded = torch.round(below / scale).clamp(-128, 127).double() * scale.double()
    if weight.outliers is not None:
        values = values.index_fill(1, apart, 0) + columns_apart(weight, values, apart, x.dtype)
        rounded[:, apart] = x.double()[:, apart]
    return rounded @ values.T + bias


def outlier_columns(layer: Layer, x: Tensor) -> Tensor:
    """The columns that the split takes out of the int8 product."""
    split, stored = layer.weight.scheme.outliers, layer.weight.outliers
    if split is None or stored is None:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    return (x.abs() > split.threshold).any(dim=0).nonzero().flatten() if split.dynamic else stored.index.long()


def columns_apart(weight: QuantizedWeight, values: Tensor, apart: Tensor, dtype: torch.dtype) -> Tensor:
    """The 16-bit columns that the split multiplies, zero elsewhere: stored ones, else dequantized and rounded."""
    assert weight.outliers is not None
    whole = values.to(dtype).double()
    whole[:, weight.outliers.index.long()] = weight.outliers.weight.double()
    return torch.zeros_like(values).index_copy_(1, apart, whole[:, apart])


def error(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error; NaN where anything was left unwritten."""
    return float((found.double() - expected).norm() / expected.norm())


def in_poisoned_memory(call: Callable[[], Tensor]) -> Tensor:
    """``call()``, with NaN, or the largest integer, in all memory that torch hands out meanwhile: outputs, workspaces, counters."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(False)


def flipped(layer: Layer, x: Tensor) -> Layer:
    """The layer with the highest bit of one code flipped: in the middle row, where the first token's input is largest."""
    column = int(x[0].abs().argmax())
    if layer.perm is not None:
        column = int((layer.perm == column).nonzero())
    codes = layer.weight.codes.clone()
    codes[len(codes) // 2, column] ^= layer.weight.scheme.middle
    return replace(layer, weight=replace(layer.weight, codes=codes))


# ------------------------------------------------------------------------------------------------------------------- correctness


def correctness_cases(setting: Setting) -> Iterator[tuple[str, Case]]:
    """Every format and dtype, the most used ones first, then what is launched in other ways."""
    for turn, (bits, group, symmetric, dtype) in enumerate(product((4, 8), (128, 64, 32, -1), (True, False), DTYPES)):
        scheme = Scheme(bits, group, symmetric)
        shapes = ODD_SHAPES[group][:1] if setting.rehearse else ODD_SHAPES[group]
        # The order of columns is a step of its own before the kernel, so every third case shows it with all numbers of bits and groups.
        order = turn % 3 == 2
        name = f"{scheme}{' order' if order else ''} {short(dtype)}"
        # Some with all in a rehearsal, too: among few tokens a flipped code is easily seen.
        tokens = TOKENS if (bits, group) == (4, 128) else setting.tokens
        yield name, functools.partial(against_float64, setting, scheme, shapes, dtype, tokens, order)
    for scheme, dtype in int8_formats():
        shapes = INT8_SHAPES[:1] if setting.rehearse else INT8_SHAPES
        yield f"{scheme} {short(dtype)}", functools.partial(against_float64, setting, scheme, shapes, dtype, setting.tokens)
    for scheme in (*SCHEMES.values(), Scheme(8, -1)):
        yield f"compiled and captured: {scheme}", functools.partial(compiled_and_captured, setting, scheme)
    yield from configuration_cases(setting)


def int8_formats() -> list[tuple[Scheme, torch.dtype]]:
    """Per token, per tensor, static; weights with one scale a row or in all; both outlier splits. Float16 only where it is used most."""
    dynamic, tensor, static = ActivationScheme(), ActivationScheme(per_token=False), ActivationScheme(per_token=False, dynamic=False)
    splits = (OutlierSplit(), OutlierSplit(dynamic=False))
    often = [Scheme(8, -1, activations=dynamic, outliers=split) for split in (None, *splits)]
    rest = [Scheme(8, group, activations=kind) for group, kind in product((-1, 0), (dynamic, tensor, static))][1:]
    rest += [Scheme(8, -1, activations=tensor, outliers=split) for split in splits]
    return [*product(often, DTYPES), *((scheme, torch.bfloat16) for scheme in rest)]


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def against_float64(
    setting: Setting,
    scheme: Scheme,
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    numbers: Sequence[int],
    order: bool = False,
) -> Values:
    """The operator against float64 for all shapes and ``numbers`` of tokens; without outliers, int8 formats against the CPU, bit by bit."""
    worst, least = 0.0, math.inf
    for place, ((rows, columns), tokens) in enumerate(product(shapes, numbers)):
        layer = make_layer(scheme, rows, columns, dtype, setting.device, order)
        x = make_input(tokens, columns, dtype, setting.device, outliers=3 if scheme.outliers else 0)
        expected = truth(layer, x)
        found = in_poisoned_memory(functools.partial(ours(layer, dtype), x))
        where = f"{rows}x{columns}, {tokens} tokens"
        assert found.dtype == dtype, where
        assert found.shape == (tokens, rows), where
        worst = check(error(found, expected), where, worst)
        if place < len(numbers):
            changed = ours(flipped(layer, x), dtype)(x)[:, rows // 2]
            least = min(least, error(changed, expected[:, rows // 2]))
            assert least > TOLERANCE, f"{where}: a flipped code moves its output by {least:.1e} only"
        if scheme.activations is not None:
            exactly_as_on_the_cpu(layer, make_input(tokens, columns, dtype, setting.device), dtype, where)
    return {"error": worst, "flipped": least}


def check(found: float, where: str, worst: float) -> float:
    assert found < TOLERANCE, f"{where}: relative error {found:.2e}"  # false for NaN, too
    return max(worst, found)


def exactly_as_on_the_cpu(layer: Layer, x: Tensor, dtype: torch.dtype, where: str) -> None:
    """For an input without outliers. A static split has columns in 16 bit all the same, whose sums may differ in their last bit."""
    scheme = layer.weight.scheme
    if scheme.outliers and not scheme.outliers.dynamic:
        return
    cpu = torch.device("cpu")
    there = Layer(layer.weight.to(cpu), None if layer.bias is None else layer.bias.to(cpu))
    same = torch.equal(ours(layer, dtype)(x).to(cpu), ours(there, dtype)(x.to(cpu)))
    assert same, f"{where}: not the CPU reference's bits"


class Linear(nn.Module):
    """Our operator with something around it that a compiler can fuse."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x).relu() + 1


def compiled_and_captured(setting: Setting, scheme: Scheme) -> Values:
    """``torch.compile`` without a break, and a CUDA graph replayed on other values, give what the plain call gives."""
    layer = make_layer(scheme, 515, 2048, torch.bfloat16, setting.device)
    module = Linear(ours(layer, torch.bfloat16))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager" if setting.rehearse else "inductor")
    for tokens in (1, 17):
        x, other = (make_input(tokens, 2048, torch.bfloat16, setting.device, outliers) for outliers in (2, 3))
        expected = module(x)
        found = compiled(x)
        assert error(found, expected.double()) < TOLERANCE, f"{tokens} tokens: compiled differs"
        if not setting.rehearse:
            assert torch.equal(replayed(module, x, other), module(other)), f"{tokens} tokens: the graph differs"
    return {}


def replayed(module: nn.Module, x: Tensor, other: Tensor) -> Tensor:
    """Captured with ``x``, replayed with ``other``."""
    place, graph = x.clone(), torch.cuda.CUDAGraph()
    module(place)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = module(place)
    place.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    return out


def configuration_cases(setting: Setting) -> Iterator[tuple[str, Case]]:
    """Every entry of the tuned tables that this GPU's own table and the plainest one hold."""
    if setting.rehearse:
        return
    w4a16 = import_module("ptq_kernels.w4a16")
    for place, (table, bits, config) in enumerate(w4a16.configs()):
        yield f"configuration W{bits}A16 {table} #{place}", functools.partial(launch_config, setting, bits, config)
    for kernel, scheme in (("w8a8", SCHEMES["W8A8"]), ("llm_int8", SCHEMES["LLM.int8"])):
        for place, tiling in enumerate(int8_tilings(kernel)):
            yield f"configuration {kernel} #{place}", functools.partial(launch_tiling, setting, scheme, tiling)


def int8_tilings(kernel: str) -> list[Any]:
    """The tilings for this GPU and the default ones, each once."""
    int8_product = import_module("ptq_kernels.int8_product")
    properties = torch.cuda.get_device_properties(0)
    own = int8_product.tilings(kernel, properties.name, 10 * properties.major)
    return list(dict.fromkeys(tiling for _, tiling in (*own, *int8_product.tilings(kernel, "", 0))))


def launch_config(setting: Setting, bits: int, config: Any) -> Values:
    """One configuration at sizes that it does not divide; without and with a group, a bias and zero points."""
    errors = import_module("triton.runtime.errors")
    w4a16 = import_module("ptq_kernels.w4a16")
    worst = 0.0
    for scheme, tokens in product((Scheme(bits, 64), Scheme(bits, -1, False)), (config.block_m, config.block_m - 3)):
        layer = make_layer(scheme, 515, 2112, torch.bfloat16, setting.device)
        x = make_input(tokens, 2112, torch.bfloat16, setting.device)
        given = (x, *tiles(layer.weight, x.dtype), bits, scheme.group_size, 515, layer.bias, config)
        try:
            found = in_poisoned_memory(functools.partial(w4a16.launch, *given))
        except errors.OutOfResources as problem:
            gpu = w4a16.gpu_of(x.device)
            own = [w4a16.Config(**entry["config"]) for table in w4a16.tables_for(gpu.name, gpu.capability) for entry in table]
            if config in own:
                raise RuntimeError(f"this GPU's own table: {first_line(problem)}") from problem
            return {"note": f"for GPUs with more shared memory: {first_line(problem)}"}
        worst = check(error(found, truth(layer, x)), f"{scheme}, {tokens} tokens", worst)
    return {"error": worst}


def launch_tiling(setting: Setting, scheme: Scheme, tiling: Any) -> Values:
    """One tiling of an int8 product, with K whole and in parts."""
    worst = 0.0
    for tokens, parts in product((tiling.block_m, tiling.block_m + 5), (1, 3) if tiling.programs else (1,)):
        layer = make_layer(scheme, 515, 2112, torch.bfloat16, setting.device)
        x = make_input(tokens, 2112, torch.bfloat16, setting.device, outliers=3 if scheme.outliers else 0)
        found = in_poisoned_memory(functools.partial(int8_launcher(layer), x, tiling, parts))
        worst = check(error(found, truth(layer, x)), f"{tokens} tokens, {parts} parts", worst)
    return {"error": worst}


def int8_launcher(layer: Layer) -> Callable[[Tensor, Any, int], Tensor]:
    """The layer's product, of int8 per token, as a function of the input, a tiling, and the number of parts of K."""
    weight, bias = layer.weight, layer.bias
    codes, scale = signed(weight), weight.scale.flatten()
    if weight.outliers is None or weight.scheme.outliers is None:
        w8a8 = import_module("ptq_kernels.w8a8")
        return lambda x, tiling, parts: w8a8.launch(x, codes, scale, None, True, bias, tiling, parts)
    llm_int8 = import_module("ptq_kernels.llm_int8")
    slots = llm_int8.outlier_slots(weight.outliers.index, codes.shape[1])
    split = (weight.outliers.index, weight.outliers.weight, weight.scheme.outliers.threshold)
    return lambda x, tiling, parts: llm_int8.launch(x, codes, scale, *split, True, bias, slots, tiling, parts)


def size_cases(setting: Setting) -> Iterator[tuple[str, Case]]:
    """What 32 bits do not count. By themselves, because they need the memory."""
    for name, scheme in SCHEMES.items():
        yield f"over 2^31 outputs: {name}", functools.partial(large_case, setting, scheme, (140_000, 128, 16_384))
        yield f"over 2^31 inputs: {name}", functools.partial(large_case, setting, scheme, (140_000, 16_384, 128))


def large_case(setting: Setting, scheme: Scheme, size: tuple[int, int, int]) -> Values:
    """More outputs or inputs than 32 bits count; a sample of rows is compared. The W4A16 kernel is asked for by name: at this size the
    operator would leave the product to torch."""
    tokens, columns, rows = (60, 128, 40) if setting.rehearse else size
    layer = make_layer(scheme, rows, columns, torch.bfloat16, setting.device)
    needed = 2 * tokens * (2 * columns + 2 * rows)
    if not setting.rehearse and torch.cuda.mem_get_info()[0] < 1.5 * needed:
        return {"skipped": f"needs {1.5 * needed / 1e9:.0f} GB"}
    x = torch.empty(tokens, columns, dtype=torch.bfloat16, device=setting.device)
    for start in range(0, tokens, 4096):  # no float32 copy of the whole
        x[start : start + 4096] = make_input(min(4096, tokens - start), columns, x.dtype, setting.device)
    if scheme.activations is None and not setting.rehearse:
        w4a16 = import_module("ptq_kernels.w4a16")
        config = w4a16.Config(block_m=128, block_n=64, block_k=64, warps=4, stages=4, per_processor=1)
        found = w4a16.launch(x, *tiles(layer.weight, x.dtype), scheme.bits, scheme.group_size, rows, layer.bias, config)
    else:
        found = ours(layer, x.dtype)(x)
    sample = torch.tensor([0, 1, tokens // 2, tokens - 2, tokens - 1], device=setting.device)
    return {"error": check(error(found[sample], truth(layer, x[sample])), "sampled rows", 0.0)}


# ----------------------------------------------------------------------------------------------------------------- repeatability


def repeatability_cases(setting: Setting) -> Iterator[tuple[str, Case]]:
    """The formats that are timed, where K is split and where it is not."""
    for (name, scheme), tokens in product({**SCHEMES, "W8A16": Scheme(8, 128)}.items(), (1, 16, 300)):
        yield f"same bits: {name} {tokens} tokens", functools.partial(same_bits, setting, scheme, tokens)


def same_bits(setting: Setting, scheme: Scheme, tokens: int) -> Values:
    """20 runs, half of them while the other half runs on a second stream."""
    rows, columns = (70, 256) if setting.rehearse else (4096, 4096)
    layer = make_layer(scheme, rows, columns, torch.bfloat16, setting.device)
    call = ours(layer, torch.bfloat16)
    x = make_input(tokens, columns, torch.bfloat16, setting.device, outliers=3 if scheme.outliers else 0)
    first = call(x)
    streams = [None] if setting.rehearse else [torch.cuda.Stream(), torch.cuda.Stream()]
    if not setting.rehearse:
        torch.cuda.synchronize()
    found = []
    for turn in range(20):
        with torch.cuda.stream(streams[turn % len(streams)]):
            found.append(call(x))
    if not setting.rehearse:
        torch.cuda.synchronize()
    different = sum(not torch.equal(first, other) for other in found)
    assert not different, f"{different} of 20 runs differ"
    return {}


# ------------------------------------------------------------------------------------------------------------------------ timing


def preparation_cases(setting: Setting) -> Iterator[tuple[str, Case]]:
    """Everything compiled that will be timed, so that the compilers' caches on disk are warm, and compared with float64.

    A peer that did not get through is not timed: a compiler that takes minutes must not cost the timing of everything beside it.
    """
    few = [tokens for tokens in (1, 16, 4, 64) if tokens in setting.timed_tokens]
    for scheme, shape in product(SCHEMES, setting.shapes):
        for tokens in tokens_of(scheme, setting):
            yield f"{OURS}: {point_name(scheme, shape, tokens)}", functools.partial(prepare, setting, None, scheme, shape, tokens)
    for scheme, tokens, peer, shape in product(SCHEMES, few, installed_peers(setting.device), setting.shapes):
        yield f"{peer.name}: {point_name(scheme, shape, tokens)}", functools.partial(prepare, setting, peer, scheme, shape, tokens)


def prepare(setting: Setting, peer: Peer | None, scheme: str, shape: str, tokens: int) -> Values:
    """peer: None for our own kernel. ready: it can be timed; a peer that does not do this is not."""
    columns, rows = setting.shapes[shape]
    layer = replace(make_layer(SCHEMES[scheme], rows, columns, torch.bfloat16, setting.device), bias=None)
    multiply = ours(layer, torch.bfloat16) if peer is None else peer.build(layer.weight, torch.bfloat16, setting.device)
    if multiply is None:
        return {"ready": False}
    theirs = PEER_INT8_TOLERANCE if layer.weight.scheme.activations else PEER_TOLERANCE
    x = make_input(tokens, columns, torch.bfloat16, setting.device, timed_outliers(scheme))
    found = error(multiply(x)[:, :64], truth(first_rows(layer, 64), x))
    limit = TOLERANCE if peer is None else theirs if peer.same_numbers else 1.0
    assert found < limit, f"relative error {found:.2e}"
    return {"error": found, "ready": True}


def first_rows(layer: Layer, rows: int) -> Layer:
    """Float64 of a few outputs is enough to see a wrong layout, and costs little."""
    weight = layer.weight
    outliers = weight.outliers and OutlierColumns(weight.outliers.index, weight.outliers.weight[:rows])
    return Layer(replace(weight, codes=weight.codes[:rows], scale=weight.scale[:rows], zero=weight.zero[:rows], outliers=outliers))


def timed_outliers(scheme: str) -> int:
    return OUTLIERS if SCHEMES[scheme].outliers else 0


def timing_cases(setting: Setting) -> Iterator[tuple[str, Case]]:
    """First what a target asks for, then the rest; within a shape in a row, because its buffers are kept."""
    yield "limits of the machine", functools.partial(limits, setting)
    wanted: list[tuple[str, Callable[[int], bool]]] = [
        ("W4A16", lambda tokens: tokens <= 64),
        ("W4A16", lambda tokens: tokens > 64),
        ("W8A8", lambda tokens: tokens >= 2048),
        ("LLM.int8", lambda tokens: True),
        ("W8A8", lambda tokens: tokens < 2048),
    ]
    for scheme, chosen in wanted:
        for shape in setting.shapes:
            for tokens in filter(chosen, tokens_of(scheme, setting)):
                yield point_name(scheme, shape, tokens), functools.partial(time_point, setting, scheme, shape, tokens)


def tokens_of(scheme: str, setting: Setting) -> tuple[int, ...]:
    more = (2048,) if scheme == "W8A8" and not setting.rehearse else ()
    return tuple(sorted((*setting.timed_tokens, *more)))


def point_name(scheme: str, shape: str, tokens: int) -> str:
    return f"{scheme} {shape} {tokens}"


def limits(setting: Setting) -> Values:
    try:
        return {"machine": asdict(machine.measure(setting.device, 0.001 if setting.rehearse else 0.3))}
    except ModuleNotFoundError as problem:  # psutil, on the CPU
        return {"note": first_line(problem)}


@functools.lru_cache(maxsize=1)
def competitors(setting: Setting, scheme: str, shape: str) -> tuple[dict[str, list[Callable[[Tensor], Tensor]]], dict[str, str]]:
    """Each competitor with as many copies of its weight as it takes to leave the cache; and why a peer is not among them."""
    columns, rows = setting.shapes[shape]
    bits = SCHEMES[scheme].bits
    device = setting.device
    found: dict[str, list[Callable[[Tensor], Tensor]]] = {}
    refused = {}
    layer = replace(make_layer(SCHEMES[scheme], rows, columns, torch.bfloat16, device), bias=None)
    room = 512 << 20 if setting.rehearse else torch.cuda.mem_get_info()[0] // 12
    count = 2 if setting.rehearse else max(timing.copies(rows * columns * bits // 8, device, room), 1)
    plain = 2 if setting.rehearse else max(timing.copies(rows * columns * 2, device, room), 1)
    found[OURS] = [ours(copied(layer), torch.bfloat16) for _ in range(count)]
    values = layer.weight.dequantize(torch.bfloat16)
    found[BASELINE] = [functools.partial(product_with, values.clone()) for _ in range(plain)]
    for peer in installed_peers(device):
        if not any(ready.startswith(f"{peer.name}: {scheme} {shape} ") for ready in setting.ready):
            continue
        try:
            made = [peer.build(copied(layer).weight, torch.bfloat16, device) for _ in range(count)]
        except WHAT_CASES_RAISE as problem:
            refused[peer.name] = first_line(problem)
            continue
        ready = [multiply for multiply in made if multiply is not None]
        if ready:
            found[peer.name] = ready
    return found, refused


def copied(layer: Layer) -> Layer:
    weight = layer.weight
    return replace(layer, weight=replace(weight, codes=weight.codes.clone(), scale=weight.scale.clone()))


def product_with(weight: Tensor, x: Tensor) -> Tensor:
    return functional.linear(x, weight)


def time_point(setting: Setting, scheme: str, shape: str, tokens: int) -> Values:
    """Microseconds of all competitors side by side, from CUDA graphs; of those that fit into none, beside ours without graphs.

    no_graph: a peer whose capture failed unexpectedly. That may have spoiled the process, so it must end.
    """
    calls, refused = callable_now(setting, scheme, shape, tokens)
    graphs = setting.device.type == "cuda"
    values: Values = {"scheme": scheme, "shape": shape, "tokens": tokens, "refused": refused}
    eager = setting.eager | {peer.name for peer in installed_peers(setting.device) if not peer.graphs}
    left = [name for name in calls if graphs and name in eager]
    if left:
        beside = {name: calls[name] for name in (OURS, BASELINE, *left)}
        found = timing.time_in_turn(beside, setting.device, False, setting.seconds)
        values["without_graphs"] = {name: each.microseconds for name, each in found.items()}
    captured = {name: each for name, each in calls.items() if name not in left}
    found = timing.time_in_turn(captured, setting.device, graphs, setting.seconds)
    values["microseconds"] = {name: each.microseconds for name, each in found.items()}
    values["spread"] = {name: [each.low, each.high] for name, each in found.items()}
    failed = [name for name in captured if name not in found]
    assert {OURS, BASELINE}.isdisjoint(failed), f"no CUDA graph can hold {failed[0]}"
    return values | ({"no_graph": failed[0]} if failed else {})


def callable_now(setting: Setting, scheme: str, shape: str, tokens: int) -> tuple[dict[str, list[timing.Call]], dict[str, str]]:
    """The competitors that can do so many tokens, each called once for each of its copies; and why the others cannot."""
    made, refused = competitors(setting, scheme, shape)
    refused = dict(refused)
    x = make_input(tokens, setting.shapes[shape][0], torch.bfloat16, setting.device, timed_outliers(scheme))
    calls: dict[str, list[timing.Call]] = {}
    for name, copies in made.items():
        is_peer = name not in (OURS, BASELINE)
        if is_peer and f"{name}: {point_name(scheme, shape, tokens)}" not in setting.ready:
            continue
        calls[name] = [functools.partial(multiply, x) for multiply in copies]
        try:
            for call in calls[name]:
                call()
        except WHAT_CASES_RAISE as problem:
            if not is_peer or "CUDA" in str(problem):
                raise
            refused[name] = first_line(problem)
            del calls[name]
    return calls, refused


PARTS: dict[str, Callable[[Setting], Iterator[tuple[str, Case]]]] = {
    "correctness": correctness_cases,
    "repeatability": repeatability_cases,
    "size": size_cases,
    "preparation": preparation_cases,
    "timing": timing_cases,
}

"""The cases of ``gpu_check.py`` that say whether kernels are right: against float64, twice the same bits, beyond 32 bits of values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from itertools import product
from typing import Any

import torch
from gpu_layers import (
    DTYPES,
    INT8_SHAPES,
    ODD_SHAPES,
    SCHEMES,
    TOKENS,
    TOLERANCE,
    Case,
    GpuRun,
    Layer,
    Values,
    error,
    flipped,
    in_poisoned_memory,
    make_input,
    make_layer,
    ours,
    signed,
    tiles,
    truth,
)
from torch import Tensor, nn

from ptqcli.bench.peers import first_line
from ptqcli.numerics.scheme import ActivationScheme, OutlierSplit, Scheme


def correctness_cases(run: GpuRun) -> Iterator[tuple[str, Case]]:
    """Every format and dtype, the most used ones first, then what is launched in other ways."""
    for turn, (bits, group, symmetric, dtype) in enumerate(product((4, 8), (128, 64, 32, -1), (True, False), DTYPES)):
        scheme = Scheme(bits, group, symmetric)
        shapes = ODD_SHAPES[group][:1] if run.rehearse else ODD_SHAPES[group]
        # The order of columns is a step of its own before the kernel, so every third case shows it with all numbers of bits and groups.
        order = turn % 3 == 2
        name = f"{scheme}{' order' if order else ''} {short(dtype)}"
        # Some with all in a rehearsal, too: among few tokens a flipped code is easily seen.
        tokens = TOKENS if (bits, group) == (4, 128) else run.tokens
        yield name, functools.partial(against_float64, run, scheme, shapes, dtype, tokens, order)
    for scheme, dtype in int8_formats():
        shapes = INT8_SHAPES[:1] if run.rehearse else INT8_SHAPES
        yield f"{scheme} {short(dtype)}", functools.partial(against_float64, run, scheme, shapes, dtype, run.tokens)
    for scheme in (*SCHEMES.values(), Scheme(8, -1)):
        yield f"compiled and captured: {scheme}", functools.partial(compiled_and_captured, run, scheme)
    yield from configuration_cases(run)


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
    run: GpuRun,
    scheme: Scheme,
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    numbers: Sequence[int],
    order: bool = False,
) -> Values:
    """The operator against float64 for all shapes and ``numbers`` of tokens; without outliers, int8 formats against the CPU, bit by bit."""
    worst, least = 0.0, math.inf
    for place, ((out_features, in_features), tokens) in enumerate(product(shapes, numbers)):
        layer = make_layer(scheme, out_features, in_features, dtype, run.device, order)
        x = make_input(tokens, in_features, dtype, run.device, outliers=3 if scheme.outliers else 0)
        expected = truth(layer, x)
        found = in_poisoned_memory(functools.partial(ours(layer, dtype), x))
        where = f"{out_features}x{in_features}, {tokens} tokens"
        assert found.dtype == dtype, where
        assert found.shape == (tokens, out_features), where
        worst = check(error(found, expected), where, worst)
        if place < len(numbers):
            changed = ours(flipped(layer, x), dtype)(x)[:, out_features // 2]
            least = min(least, error(changed, expected[:, out_features // 2]))
            assert least > TOLERANCE, f"{where}: a flipped code moves its output by {least:.1e} only"
        if scheme.activations is not None:
            exactly_as_on_the_cpu(layer, make_input(tokens, in_features, dtype, run.device), dtype, where)
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


def compiled_and_captured(run: GpuRun, scheme: Scheme) -> Values:
    """``torch.compile`` without a break, and a CUDA graph replayed on other values, give what the plain call gives."""
    layer = make_layer(scheme, 515, 2048, torch.bfloat16, run.device)
    module = Linear(ours(layer, torch.bfloat16))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager" if run.rehearse else "inductor")
    for tokens in (1, 17):
        x, other = (make_input(tokens, 2048, torch.bfloat16, run.device, outliers) for outliers in (2, 3))
        expected = module(x)
        found = compiled(x)
        assert error(found, expected.double()) < TOLERANCE, f"{tokens} tokens: compiled differs"
        if not run.rehearse:
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


def configuration_cases(run: GpuRun) -> Iterator[tuple[str, Case]]:
    """Every entry of the tuned tables that this GPU's own table and the plainest one hold."""
    if run.rehearse:
        return
    for place, (table, entry) in enumerate(import_module("ptq_kernels.tile_config").shipped("w4a16")):
        yield f"configuration W{entry.bits}A16 {table} #{place}", functools.partial(launch_w4a16, run, entry.bits, entry.config)
    for kernel, scheme in (("w8a8", SCHEMES["W8A8"]), ("llm_int8", SCHEMES["LLM.int8"])):
        for place, config in enumerate(int8_configs(kernel)):
            yield f"configuration {kernel} #{place}", functools.partial(launch_int8, run, scheme, config)


def int8_configs(kernel: str) -> list[Any]:
    """The configurations for this GPU, and those of the earliest generation, each once."""
    tile_config = import_module("ptq_kernels.tile_config")
    properties = torch.cuda.get_device_properties(0)
    own = tile_config.tables_for(kernel, properties.name, 10 * properties.major + properties.minor)[0]
    return list(dict.fromkeys(entry.config for entry in (*own, *tile_config.tables_for(kernel, "", 0)[0])))


def launch_w4a16(run: GpuRun, bits: int, config: Any) -> Values:
    """One configuration at sizes that it does not divide; without and with a group, a bias and zero points."""
    errors = import_module("triton.runtime.errors")
    w4a16 = import_module("ptq_kernels.w4a16")
    worst = 0.0
    for scheme, tokens in product((Scheme(bits, 64), Scheme(bits, -1, False)), (config.block_m, config.block_m - 3)):
        layer = make_layer(scheme, 515, 2112, torch.bfloat16, run.device)
        x = make_input(tokens, 2112, torch.bfloat16, run.device)
        given = (x, *tiles(layer.weight, x.dtype), bits, scheme.group_size, 515, layer.bias, config)
        try:
            found = in_poisoned_memory(functools.partial(w4a16.launch, *given))
        except errors.OutOfResources as problem:
            tile_config = import_module("ptq_kernels.tile_config")
            gpu = tile_config.gpu_of(x.device)
            if config in [entry.config for table in tile_config.tables_for("w4a16", gpu.name, gpu.capability) for entry in table]:
                raise RuntimeError(f"this GPU's own table: {first_line(problem)}") from problem
            return {"note": f"for GPUs with more shared memory: {first_line(problem)}"}
        worst = check(error(found, truth(layer, x)), f"{scheme}, {tokens} tokens", worst)
    return {"error": worst}


def launch_int8(run: GpuRun, scheme: Scheme, config: Any) -> Values:
    """One configuration of an int8 product, with K whole and in parts."""
    worst = 0.0
    for tokens, split_k in product((config.block_m, config.block_m + 5), (1, 3) if config.ctas_per_sm else (1,)):
        layer = make_layer(scheme, 515, 2112, torch.bfloat16, run.device)
        x = make_input(tokens, 2112, torch.bfloat16, run.device, outliers=3 if scheme.outliers else 0)
        found = in_poisoned_memory(functools.partial(int8_launcher(layer), x, replace(config, split_k=split_k)))
        worst = check(error(found, truth(layer, x)), f"{tokens} tokens, K in {split_k}", worst)
    return {"error": worst}


def int8_launcher(layer: Layer) -> Callable[[Tensor, Any], Tensor]:
    """The layer's product, of int8 per token, as a function of the input and a configuration."""
    weight, bias = layer.weight, layer.bias
    codes, scale = signed(weight), weight.scale.flatten()
    if weight.outliers is None or weight.scheme.outliers is None:
        w8a8 = import_module("ptq_kernels.w8a8")
        return lambda x, config: w8a8.launch(x, codes, scale, None, True, bias, config)
    llm_int8 = import_module("ptq_kernels.llm_int8")
    slots = llm_int8.outlier_slots(weight.outliers.index, codes.shape[1])
    split = (weight.outliers.index, weight.outliers.weight, weight.scheme.outliers.threshold)
    return lambda x, config: llm_int8.launch(x, codes, scale, *split, True, bias, slots, config)


def size_cases(run: GpuRun) -> Iterator[tuple[str, Case]]:
    """What 32 bits do not count. By themselves, because they need the memory."""
    for name, scheme in SCHEMES.items():
        yield f"over 2^31 outputs: {name}", functools.partial(large_case, run, scheme, (140_000, 128, 16_384))
        yield f"over 2^31 inputs: {name}", functools.partial(large_case, run, scheme, (140_000, 16_384, 128))


def large_case(run: GpuRun, scheme: Scheme, size: tuple[int, int, int]) -> Values:
    """More outputs or inputs than 32 bits count; a sample of rows is compared. The W4A16 kernel is asked for by name: at this size the
    operator would leave the product to torch."""
    tokens, in_features, out_features = (60, 128, 40) if run.rehearse else size
    layer = make_layer(scheme, out_features, in_features, torch.bfloat16, run.device)
    needed = 2 * tokens * (2 * in_features + 2 * out_features)
    if not run.rehearse and torch.cuda.mem_get_info()[0] < 1.5 * needed:
        return {"skipped": f"needs {1.5 * needed / 1e9:.0f} GB"}
    x = torch.empty(tokens, in_features, dtype=torch.bfloat16, device=run.device)
    for start in range(0, tokens, 4096):  # no float32 copy of the whole
        x[start : start + 4096] = make_input(min(4096, tokens - start), in_features, x.dtype, run.device)
    if scheme.activations is None and not run.rehearse:
        w4a16 = import_module("ptq_kernels.w4a16")
        tile_config = import_module("ptq_kernels.tile_config")
        config = tile_config.TileConfig(block_m=128, block_n=64, block_k=64, num_warps=4, num_stages=4, ctas_per_sm=1)
        found = w4a16.launch(x, *tiles(layer.weight, x.dtype), scheme.bits, scheme.group_size, out_features, layer.bias, config)
    else:
        found = ours(layer, x.dtype)(x)
    sample = torch.tensor([0, 1, tokens // 2, tokens - 2, tokens - 1], device=run.device)
    return {"error": check(error(found[sample], truth(layer, x[sample])), "sampled rows", 0.0)}


def repeatability_cases(run: GpuRun) -> Iterator[tuple[str, Case]]:
    """The formats that are timed, where K is split and where it is not."""
    for (name, scheme), tokens in product({**SCHEMES, "W8A16": Scheme(8, 128)}.items(), (1, 16, 300)):
        yield f"same bits: {name} {tokens} tokens", functools.partial(same_bits, run, scheme, tokens)


def same_bits(run: GpuRun, scheme: Scheme, tokens: int) -> Values:
    """20 runs, half of them while the other half runs on a second stream."""
    out_features, in_features = (70, 256) if run.rehearse else (4096, 4096)
    layer = make_layer(scheme, out_features, in_features, torch.bfloat16, run.device)
    call = ours(layer, torch.bfloat16)
    x = make_input(tokens, in_features, torch.bfloat16, run.device, outliers=3 if scheme.outliers else 0)
    first = call(x)
    streams = [None] if run.rehearse else [torch.cuda.Stream(), torch.cuda.Stream()]
    if not run.rehearse:
        torch.cuda.synchronize()
    found = []
    for turn in range(20):
        with torch.cuda.stream(streams[turn % len(streams)]):
            found.append(call(x))
    if not run.rehearse:
        torch.cuda.synchronize()
    different = sum(not torch.equal(first, other) for other in found)
    assert not different, f"{different} of 20 runs differ"
    return {}

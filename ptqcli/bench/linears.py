"""Quantized linears beside the plain product of the same matrix, and beside other libraries' kernels.

For each matrix and number of tokens M all contenders run in turn on the same input: ours, the baselines (``functional.linear`` with the
expanded weight; bfloat16 on CUDA, float32 and bfloat16 on the CPU) and the peers. Codes, scales and inputs are random and signed.

    bytes            the weight as a checkpoint stores it, the input and the output, each once
    operations       2 M K N, whichever way they are done
    shares           bytes and operations per second over the machine's limits, which were measured (``machine``); not held below 1. On CUDA
                     they are those of the graph, since a launch is not the kernel's doing. A kernel of 8-bit activations is held
                     against the limit of int8, whether it multiplies integers or, as a plain reference does, floats.
    error            |y - y'| / |y'| (Frobenius), y' the float64 product of the same codes with the same input, over all tokens and
                     ERROR_ROWS rows of the weight. Rounding the activations to 8 bits, near 0.01 on such inputs, is part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ptqcli.bench.contenders import BASELINES, Contender, Lineup, check, prepare, rows_of
from ptqcli.bench.machine import Machine
from ptqcli.bench.peers import Peer, first_line, kernel_errors
from ptqcli.bench.shapes import Shape
from ptqcli.bench.timing import Timing, time_in_turn
from ptqcli.errors import UsageError
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight

ERROR_ROWS = 64
TOKENS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class KernelPoint:
    """One contender on one matrix with one number of tokens.

    scheme: of the codes, by name. name: such as ``W4A16 triton``, ``bfloat16``, ``torch int4``. kind: ``ours``, ``baseline``
    or ``peer``. microseconds: median of a call, low and high its 10th and 90th percentile. graph_microseconds: in a CUDA graph; None on the
    CPU and for what cannot be captured. ratio: by baseline, its time over this one's, so 2.0 is twice as fast; graph_ratio: the same of the
    graphs' times, empty without them. bytes, operations, bandwidth_share, arithmetic_share, error: see the module; error is None for a peer
    that does not compute with these codes.
    """

    shape: Shape
    scheme: str
    tokens: int
    name: str
    kind: str
    microseconds: float
    low: float
    high: float
    graph_microseconds: float | None
    ratio: dict[str, float]
    graph_ratio: dict[str, float]
    bytes: int
    operations: int
    bandwidth_share: float
    arithmetic_share: float
    error: float | None


OnPoint = Callable[[int, int, KernelPoint | None], None]


@torch.no_grad()
def bench_kernels(
    work: Sequence[tuple[Shape, Scheme]],
    tokens: Sequence[int],
    device: torch.device | str,
    machine: Machine,
    dtype: torch.dtype = torch.bfloat16,
    kernel: str = "auto",
    peers: Sequence[Peer] = (),
    seconds: float = 0.2,
    on_point: OnPoint | None = None,
) -> tuple[list[KernelPoint], list[str]]:
    """Every matrix of ``work`` with every number of ``tokens``: the points, and a line for each peer that failed.

    dtype: of inputs, outputs and scales. kernel: ours, as ``quantized_linear`` takes it. seconds: for each contender. on_point: called as
    (done, total, point) with each finished point, and with None when a matrix and number of tokens begins; done and total count these.
    A peer that does not do a scheme is left out of it. Raises UsageError, naming the matrix, when a group does not divide it or it does
    not fit into memory, and when ``kernel`` cannot do the scheme.
    """
    device = torch.device(device)
    if device.type not in BASELINES:
        raise UsageError(f"kernels cannot be timed on the device {device}; choose cpu or cuda")
    if not tokens or min(tokens) < 1:
        raise UsageError("the numbers of tokens must be at least 1 each, and one at least must be given, such as 1,16,256")
    report = on_point or _no_report
    points: list[KernelPoint] = []
    failures: list[str] = []
    done, total = 0, len(work) * len(tokens)
    for shape, scheme in work:
        lineup = prepare(shape, scheme, max(tokens), device, dtype, kernel, peers)
        failures += lineup.failures
        for count in tokens:
            report(done, total, None)
            found, failed = _time_lineup(lineup, shape, count, machine, seconds)
            points += found
            failures += failed
            for point in found:
                report(done + 1, total, point)
            done += 1
        del lineup  # before the next one takes its memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return points, failures


def check_kernels(
    work: Sequence[tuple[Shape, Scheme]], tokens: Sequence[int], device: torch.device | str, dtype: torch.dtype, kernel: str, peers: int
) -> None:
    """Raise the UsageError that ``bench_kernels`` would raise later, after minutes."""
    for shape, scheme in work:
        check(shape, scheme, max(tokens), torch.device(device), dtype, kernel, peers)


def _no_report(_done: int, _total: int, _point: KernelPoint | None) -> None:
    pass


def _time_lineup(lineup: Lineup, shape: Shape, tokens: int, machine: Machine, seconds: float) -> tuple[list[KernelPoint], list[str]]:
    """All contenders on ``tokens`` rows of input: a point for each, and a line for each peer that could not do it."""
    device = lineup.x.device
    inputs = {each.dtype: lineup.x[:tokens].to(each.dtype) for each in lineup.contenders}
    errors, failures = _errors(lineup, inputs, f"{lineup.weight.scheme}, {shape.name}, {tokens} tokens")
    able = [each for each in lineup.contenders if each.name in errors]
    calls = {each.name: [partial(multiply, inputs[each.dtype]) for multiply in each.copies] for each in able}
    eager = time_in_turn(calls, device, seconds=seconds)
    graphs: dict[str, Timing] = {}
    if device.type == "cuda":
        graphs = time_in_turn({each.name: calls[each.name] for each in able if each.graphs}, device, graphs=True, seconds=seconds)
    return [_point(each, able, shape, lineup.weight.scheme, tokens, machine, eager, graphs, errors[each.name]) for each in able], failures


def _point(
    one: Contender,
    all_of_them: Sequence[Contender],
    shape: Shape,
    scheme: Scheme,
    tokens: int,
    machine: Machine,
    eager: Mapping[str, Timing],
    graphs: Mapping[str, Timing],
    error: float | None,
) -> KernelPoint:
    baselines = [each.name for each in all_of_them if each.kind == "baseline"]
    moved = one.weight_bytes + one.dtype.itemsize * tokens * (shape.in_features + shape.out_features)
    operations = 2 * tokens * shape.in_features * shape.out_features
    took = (graphs.get(one.name) or eager[one.name]).microseconds * 1e-6
    limit = machine.arithmetic.get(one.arithmetic, machine.arithmetic["float32"])
    return KernelPoint(
        shape=shape,
        scheme=str(scheme),
        tokens=tokens,
        name=one.name,
        kind=one.kind,
        microseconds=eager[one.name].microseconds,
        low=eager[one.name].low,
        high=eager[one.name].high,
        graph_microseconds=graphs[one.name].microseconds if one.name in graphs else None,
        ratio=_ratios(one.name, baselines, eager),
        graph_ratio=_ratios(one.name, baselines, graphs),
        bytes=moved,
        operations=operations,
        bandwidth_share=moved / took / machine.bandwidth,
        arithmetic_share=operations / took / limit,
        error=error,
    )


def _ratios(name: str, baselines: Sequence[str], timings: Mapping[str, Timing]) -> dict[str, float]:
    both = [each for each in baselines if each in timings and name in timings]
    return {each: timings[each].microseconds / timings[name].microseconds for each in both}


def _errors(lineup: Lineup, inputs: Mapping[torch.dtype, Tensor], what: str) -> tuple[dict[str, float | None], list[str]]:
    """The error of each contender's output, by name, without the peers that raise; a line for each of those."""
    weight = lineup.weight
    rows = torch.arange(0, len(weight.codes), max(1, len(weight.codes) // ERROR_ROWS), device=weight.codes.device)[:ERROR_ROWS]
    x = lineup.x[: len(next(iter(inputs.values())))]
    truth = _exact(x, rows_of(weight, rows))
    errors: dict[str, float | None] = {}
    failures = []
    for each in lineup.contenders:
        try:
            found = _output(each, inputs[each.dtype], len(weight.codes))
        except kernel_errors() as error:
            if each.kind != "peer":
                raise
            failures.append(f"{each.name}: {what}: {first_line(error)}")
        else:
            errors[each.name] = float((found[:, rows].double() - truth).norm() / truth.norm()) if each.same_numbers else None
    return errors, failures


def _output(one: Contender, x: Tensor, out_features: int) -> Tensor:
    found = one.copies[0](x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)  # what went wrong on the device is raised here and not at the next contender
    if found.shape != (len(x), out_features):
        raise ValueError(f"returned {list(found.shape)} instead of {[len(x), out_features]}")
    return found


def _exact(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """``x`` [M, K] times ``weight`` [n, K] as float64 [M, n], some tokens at a time."""
    dense = weight.dequantize(torch.float64)
    return torch.cat([part.double() @ dense.t() for part in x.split(TOKENS_AT_ONCE)])

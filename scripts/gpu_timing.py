"""The cases of ``gpu_check.py`` that say how fast kernels are, beside a bfloat16 product and the peers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import product

import torch
from gpu_layers import (
    BASELINE,
    OURS,
    PEER_INT8_TOLERANCE,
    PEER_TOLERANCE,
    SCHEMES,
    TOLERANCE,
    WHAT_CASES_RAISE,
    Case,
    GpuRun,
    Values,
    copied,
    error,
    first_rows,
    make_input,
    make_layer,
    ours,
    timed_outliers,
    truth,
)
from torch import Tensor
from torch.nn import functional

from ptqcli.bench import machine, timing
from ptqcli.bench.peers import Peer, first_line, installed_peers


def preparation_cases(run: GpuRun) -> Iterator[tuple[str, Case]]:
    """Everything compiled that will be timed, so that the compilers' caches on disk are warm, and compared with float64.

    A peer that did not get through is not timed: a compiler that takes minutes must not cost the timing of everything beside it.
    """
    few = [tokens for tokens in (1, 16, 4, 64) if tokens in run.timed_tokens]
    for scheme, shape in product(SCHEMES, run.shapes):
        for tokens in tokens_of(scheme, run):
            yield f"{OURS}: {point_name(scheme, shape, tokens)}", functools.partial(prepare, run, None, scheme, shape, tokens)
    for scheme, tokens, peer, shape in product(SCHEMES, few, installed_peers(run.device), run.shapes):
        yield f"{peer.name}: {point_name(scheme, shape, tokens)}", functools.partial(prepare, run, peer, scheme, shape, tokens)


def prepare(run: GpuRun, peer: Peer | None, scheme: str, shape: str, tokens: int) -> Values:
    """peer: None for our own kernel. ready: it can be timed; a peer that does not do this is not."""
    in_features, out_features = run.shapes[shape]
    layer = replace(make_layer(SCHEMES[scheme], out_features, in_features, torch.bfloat16, run.device), bias=None)
    multiply = ours(layer, torch.bfloat16) if peer is None else peer.build(layer.weight, torch.bfloat16, run.device)
    if multiply is None:
        return {"ready": False}
    theirs = PEER_INT8_TOLERANCE if layer.weight.scheme.activations else PEER_TOLERANCE
    x = make_input(tokens, in_features, torch.bfloat16, run.device, timed_outliers(scheme))
    found = error(multiply(x)[:, :64], truth(first_rows(layer, 64), x))
    limit = TOLERANCE if peer is None else theirs if peer.same_numbers else 1.0
    assert found < limit, f"relative error {found:.2e}"
    return {"error": found, "ready": True}


def timing_cases(run: GpuRun) -> Iterator[tuple[str, Case]]:
    """First what a target asks for, then the rest; within a shape in a row, because its buffers are kept."""
    yield "limits of the machine", functools.partial(limits, run)
    wanted: list[tuple[str, Callable[[int], bool]]] = [
        ("W4A16", lambda tokens: tokens <= 64),
        ("W4A16", lambda tokens: tokens > 64),
        ("W8A8", lambda tokens: tokens >= 2048),
        ("LLM.int8", lambda tokens: True),
        ("W8A8", lambda tokens: tokens < 2048),
    ]
    for scheme, chosen in wanted:
        for shape in run.shapes:
            for tokens in filter(chosen, tokens_of(scheme, run)):
                yield point_name(scheme, shape, tokens), functools.partial(time_point, run, scheme, shape, tokens)


def tokens_of(scheme: str, run: GpuRun) -> tuple[int, ...]:
    more = (2048,) if scheme == "W8A8" and not run.rehearse else ()
    return tuple(sorted((*run.timed_tokens, *more)))


def point_name(scheme: str, shape: str, tokens: int) -> str:
    return f"{scheme} {shape} {tokens}"


def limits(run: GpuRun) -> Values:
    try:
        return {"machine": asdict(machine.measure(run.device, 0.001 if run.rehearse else 0.3))}
    except ModuleNotFoundError as problem:  # psutil, on the CPU
        return {"note": first_line(problem)}


@functools.lru_cache(maxsize=1)
def contenders(run: GpuRun, scheme: str, shape: str) -> tuple[dict[str, list[Callable[[Tensor], Tensor]]], dict[str, str]]:
    """Each contender with as many copies of its weight as it takes to leave the cache; and why a peer is not among them."""
    in_features, out_features = run.shapes[shape]
    bits = SCHEMES[scheme].bits
    device = run.device
    found: dict[str, list[Callable[[Tensor], Tensor]]] = {}
    refused = {}
    layer = replace(make_layer(SCHEMES[scheme], out_features, in_features, torch.bfloat16, device), bias=None)
    room = 512 << 20 if run.rehearse else torch.cuda.mem_get_info()[0] // 12
    count = 2 if run.rehearse else max(timing.copies(out_features * in_features * bits // 8, device, room), 1)
    plain = 2 if run.rehearse else max(timing.copies(out_features * in_features * 2, device, room), 1)
    found[OURS] = [ours(copied(layer), torch.bfloat16) for _ in range(count)]
    values = layer.weight.dequantize(torch.bfloat16)
    found[BASELINE] = [functools.partial(product_with, values.clone()) for _ in range(plain)]
    for peer in installed_peers(device):
        if not any(ready.startswith(f"{peer.name}: {scheme} {shape} ") for ready in run.ready):
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


def product_with(weight: Tensor, x: Tensor) -> Tensor:
    return functional.linear(x, weight)


def time_point(run: GpuRun, scheme: str, shape: str, tokens: int) -> Values:
    """Microseconds of all contenders side by side, from CUDA graphs; of those that fit into none, beside ours without graphs.

    no_graph: a peer whose capture failed unexpectedly. That may have spoiled the process, so it must end.
    """
    calls, refused = callable_now(run, scheme, shape, tokens)
    graphs = run.device.type == "cuda"
    values: Values = {"scheme": scheme, "shape": shape, "tokens": tokens, "refused": refused}
    eager = run.eager | {peer.name for peer in installed_peers(run.device) if not peer.graphs}
    left = [name for name in calls if graphs and name in eager]
    if left:
        beside = {name: calls[name] for name in (OURS, BASELINE, *left)}
        found = timing.time_in_turn(beside, run.device, False, run.seconds)
        values["without_graphs"] = {name: each.microseconds for name, each in found.items()}
    captured = {name: each for name, each in calls.items() if name not in left}
    found = timing.time_in_turn(captured, run.device, graphs, run.seconds)
    values["microseconds"] = {name: each.microseconds for name, each in found.items()}
    values["spread"] = {name: [each.low, each.high] for name, each in found.items()}
    failed = [name for name in captured if name not in found]
    assert {OURS, BASELINE}.isdisjoint(failed), f"no CUDA graph can hold {failed[0]}"
    return values | ({"no_graph": failed[0]} if failed else {})


def callable_now(run: GpuRun, scheme: str, shape: str, tokens: int) -> tuple[dict[str, list[timing.Call]], dict[str, str]]:
    """The contenders that can do so many tokens, each called once for each of its copies; and why the others cannot."""
    made, refused = contenders(run, scheme, shape)
    refused = dict(refused)
    x = make_input(tokens, run.shapes[shape][0], torch.bfloat16, run.device, timed_outliers(scheme))
    calls: dict[str, list[timing.Call]] = {}
    for name, copies in made.items():
        is_peer = name not in (OURS, BASELINE)
        if is_peer and f"{name}: {point_name(scheme, shape, tokens)}" not in run.ready:
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

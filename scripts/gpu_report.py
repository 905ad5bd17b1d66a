"""What ``gpu_check.py`` says of what it found: the targets, as PASS, FAIL, or NOT MEASURED, and the tables on the screen."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import product

import torch
from gpu_layers import BASELINE, OURS, SCHEMES, SHAPES, TIMED_TOKENS, GpuRun, Values
from gpu_timing import point_name, tokens_of

from ptqcli.bench.peers import installed_peers, missing_peers


@dataclass(frozen=True)
class Target:
    """A number that was set beforehand. verdict: PASS, FAIL, or NOT MEASURED, which it is unless every point was."""

    name: str
    verdict: str
    detail: str


def targets(points: Mapping[str, Values], parts: Mapping[str, Values], device: str = "cuda") -> list[Target]:
    """points: what was timed, by its name. parts: what ``run_part`` returned, by its name."""
    found = []
    for peer in ("torch int4", "gemlite", "humming"):
        ratios = [ratio(points, "W4A16", shape, tokens, peer) for shape, tokens in product(SHAPES, (1, 4, 16, 64))]
        note = missing_peers(device).get(peer, "")
        found.append(judged(f"W4A16 g128 ahead of {peer}, M = 1 to 64", ratios, 1.0, note))
    bf16 = functools.partial(ratio, points, peer=BASELINE)
    found.append(judged("W4A16 at least 2.8x bf16, 4096x14336, M <= 16", [bf16("W4A16", "up", tokens) for tokens in (1, 4, 16)], 2.8))
    large = [tokens for tokens in TIMED_TOKENS if tokens >= 256]
    found.append(judged("W4A16 at least 0.95x bf16, M >= 256", [bf16("W4A16", *at) for at in product(SHAPES, large)], 0.95))
    found.append(judged("W8A8 at least 1.6x bf16, M >= 2048", [bf16("W8A8", *at) for at in product(SHAPES, (2048, 4096))], 1.6))
    found.append(judged("LLM.int8 at least 0.9x bf16 at every M", [bf16("LLM.int8", *at) for at in product(SHAPES, TIMED_TOKENS)], 0.9))
    told = {
        "repeatability": "the same bits in 20 runs on two streams",
        "correctness": "errors below 4e-3 of float64",
        "size": "likewise with more than 2^31 values",
    }
    for part, name in told.items():
        found.append(all_of(name, parts.get(part)))
    return found


def ratio(points: Mapping[str, Values], scheme: str, shape: str, tokens: int, peer: str) -> float | None:
    """How many times as long ``peer`` takes as our kernel, both from CUDA graphs in the same run; None if that was not measured."""
    microseconds = points.get(point_name(scheme, shape, tokens), {}).get("microseconds", {})
    return microseconds[peer] / microseconds[OURS] if peer in microseconds and OURS in microseconds else None


def judged(name: str, ratios: Sequence[float | None], least: float, note: str = "") -> Target:
    known = [found for found in ratios if found is not None]
    if not known:
        return Target(name, "NOT MEASURED", note)
    detail = f"worst {min(known):.2f}x, {len(known)} of {len(ratios)} points"
    if min(known) < least:
        return Target(name, "FAIL", detail)
    return Target(name, "PASS" if len(known) == len(ratios) else "NOT MEASURED", detail)


def all_of(name: str, part: Values | None) -> Target:
    """A case that was skipped counts as one that was left out."""
    lines = part["cases"] if part else []
    failed = [line for line in lines if not line["ok"]]
    if failed:
        return Target(name, "FAIL", f"{len(failed)} of {len(lines)} cases, first: {failed[0]['name']}")
    done = [line for line in lines if "skipped" not in line]
    left_out = (part["left_out"] if part else 0) + len(lines) - len(done)
    return Target(name, "NOT MEASURED" if left_out or not done else "PASS", f"{len(done)} cases, {left_out} left out")


def describe_machine(run: GpuRun) -> Values:
    """Names and versions."""
    found: Values = {"python": sys.version.split()[0], "torch": torch.__version__, "date": time.strftime("%Y-%m-%d %H:%M")}
    try:
        found["triton"] = import_module("triton").__version__
    except ImportError:
        found["triton"] = "none"
    found["peers"] = {peer.name: peer.version for peer in installed_peers(run.device)}
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
    return found


def show(report: Values, run: GpuRun) -> None:
    """What failed, the ratios, and last the short table."""
    for part in report["parts"]:
        for line in [line for line in part["cases"] if not line["ok"]][:12]:
            print(f"{'FAILED' if is_ours(part['name'], line) else 'peer'} {part['name']}: {line['name']}: {line['why']}")
    points = report_points(report)
    for scheme in SCHEMES:
        show_ratios(scheme, points, run)
    for peer, why in missing_peers(run.device).items():
        print(f"not installed: {peer} ({why})")
    print()
    for part in report["parts"]:
        failed = sum(not line["ok"] for line in part["cases"])
        passed = len(part["cases"]) - failed
        print(f"{part['name']:14} {passed:4} passed {failed:4} failed {part['left_out']:4} left out {part['seconds']:6.0f} s")
    print()
    for target in report["targets"]:
        print(f"{target['verdict']:13} {target['name']}{'  (' + target['detail'] + ')' if target['detail'] else ''}")
    if run.rehearse:
        print("\nThis was a rehearsal of the script on the CPU. It proves nothing about any GPU.")


def report_points(report: Values) -> dict[str, Values]:
    """The timings, by name."""
    return {line["name"]: line for part in report["parts"] for line in part["cases"] if "microseconds" in line and "scheme" in line}


def show_ratios(scheme: str, points: Mapping[str, Values], run: GpuRun) -> None:
    """One row a shape, one column a number of tokens: our microseconds, and how many times as long bfloat16 takes."""
    tokens = tokens_of(scheme, run)
    print(f"\n{scheme + ': us, x bf16':24}" + "".join(f"{'M=' + str(count):>15}" for count in tokens))
    for shape, (in_features, out_features) in run.shapes.items():
        cells = []
        for count in tokens:
            times = ratio(points, scheme, shape, count, BASELINE)
            own = points.get(point_name(scheme, shape, count), {}).get("microseconds", {}).get(OURS)
            cells.append("-" if times is None else f"{own:.1f} {times:.2f}x")
        print(f"{shape + f' {in_features}x{out_features}':24}" + "".join(f"{cell:>15}" for cell in cells))


def is_ours(part: str, line: Values) -> bool:
    """Whether what a case says is about our kernels, not about a peer that could not be prepared."""
    return part != "preparation" or line["name"].startswith(f"{OURS}: ")

"""The tables of ``ptq bench``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptqcli.cli.console import Output, size_text

if TYPE_CHECKING:
    from ptqcli.bench.generation import GenerationPoint
    from ptqcli.bench.linears import KernelPoint
    from ptqcli.bench.shapes import Shape

Rows = dict[tuple["Shape", int], list["KernelPoint"]]  # matrix and number of tokens -> all contenders


def show_kernels(scheme: str, points: Sequence[KernelPoint], output: Output) -> None:
    """Ours beside the baselines, and in a table of its own beside the peers."""
    rows: Rows = {}
    for point in points:
        rows.setdefault((point.shape, point.tokens), []).append(point)
    baselines = _names(points, "baseline")
    peers = _names(points, "peer")
    graphs = any(point.graph_microseconds is not None for point in points)
    columns = [*ROW_COLUMNS, "kernel", "us", *(["us in a graph"] if graphs else []), *(f"{name} us" for name in baselines)]
    columns += [*(f"vs {name}" for name in baselines), "of bandwidth", "of arithmetic", "error"]
    what = "a call with its launch (us), all else replayed in CUDA graphs" if graphs else "median time of a call"
    output.table(f"{scheme}: {what}", columns, (_kernel_row(row, baselines, graphs) for row in _led(rows)))
    if peers:
        title = f"{scheme}: microseconds beside other libraries (in brackets: theirs over ours)"
        output.table(title, [*ROW_COLUMNS, "ours", *peers], (_peer_row(row, peers) for row in _led(rows)))
        others = [name for name in peers if any(point.name == name and point.error is None for point in points)]
        if others:
            output.say(f"{', '.join(others)}: another number format, so only the time compares")


ROW_COLUMNS = ("layer, in → out", "M")


@dataclass(frozen=True)
class _Row:
    """All contenders on one matrix with one number of tokens. layer: what it is called, "" where the row above says so."""

    layer: str
    ours: KernelPoint
    others: Mapping[str, KernelPoint]


def _names(points: Sequence[KernelPoint], kind: str) -> list[str]:
    return list(dict.fromkeys(point.name for point in points if point.kind == kind))


def _led(rows: Rows) -> Iterator[_Row]:
    """Rows in order, those without a point of ours left out."""
    from ptqcli.bench.roofline import shape_text

    shown = None
    for (shape, _), points in rows.items():
        for ours in (point for point in points if point.kind == "ours"):
            yield _Row("" if shape == shown else shape_text(ours), ours, {point.name: point for point in points})
            shown = shape


def _kernel_row(row: _Row, baselines: Sequence[str], graphs: bool) -> list[str]:
    ours = row.ours
    ratios = ours.graph_ratio or ours.ratio
    return [
        row.layer,
        str(ours.tokens),
        ours.name,
        f"{ours.microseconds:,.1f}",
        *([_time_cell(ours.graph_microseconds)] if graphs else []),
        *(_time_cell(_best_time(row.others.get(name))) for name in baselines),
        *(_factor_cell(ratios.get(name)) for name in baselines),
        f"{ours.bandwidth_share:.1%}",
        f"{ours.arithmetic_share:.1%}",
        "-" if ours.error is None else f"{ours.error:.1e}",
    ]


def _peer_row(row: _Row, peers: Sequence[str]) -> list[str]:
    return [row.layer, str(row.ours.tokens), _time_cell(_best_time(row.ours)), *(_peer_cell(row, name) for name in peers)]


def _peer_cell(row: _Row, name: str) -> str:
    """``12.3 (1.90x)``. Both times are graphs', or neither is."""
    peer = row.others.get(name)
    if peer is None:
        return "-"
    if row.ours.graph_microseconds is not None and peer.graph_microseconds is not None:
        return f"{peer.graph_microseconds:,.1f} ({peer.graph_microseconds / row.ours.graph_microseconds:.2f}x)"
    mark = " no graph" if row.ours.graph_microseconds is not None else ""
    return f"{peer.microseconds:,.1f} ({peer.microseconds / row.ours.microseconds:.2f}x{mark})"


def _best_time(point: KernelPoint | None) -> float | None:
    """The time in a graph where there is one, else that of a call."""
    return None if point is None else point.graph_microseconds or point.microseconds


def _time_cell(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds:,.1f}"


def _factor_cell(factor: float | None) -> str:
    return "-" if factor is None else f"{factor:.2f}x"


GENERATION_COLUMNS = (
    "model", "batch", "prompt", "prefill s", "prefill tok/s", "decode tok/s", "decode gain",
    "weights", "peak memory", "prefill MFU", "HFU", "decode MFU", "HFU",
)  # fmt: skip


def generation_rows(points: Sequence[GenerationPoint]) -> Iterator[list[str]]:
    original = {(point.batch, point.prompt): point for point in points if point.model == "original"}
    for point in points:
        reference = original.get((point.batch, point.prompt))
        yield [
            point.model,
            str(point.batch),
            str(point.prompt),
            f"{point.prefill_seconds:.3g}",
            f"{point.prefill_tokens_per_second:,.1f}",
            f"{point.decode_tokens_per_second:,.1f}",
            _factor_cell(point.decode_tokens_per_second / reference.decode_tokens_per_second if reference else None),
            size_text(point.weights),
            "-" if point.peak_memory is None else size_text(point.peak_memory),
            *(_share_cell(share) for share in (point.prefill_mfu, point.prefill_hfu, point.decode_mfu, point.decode_hfu)),
        ]


def _share_cell(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"

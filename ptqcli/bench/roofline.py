"""The roofline of measured kernels (Williams, Waterman and Patterson 2009): what each reaches under what the machine allows.

    operations/s <= min( arithmetic limit,  bandwidth * operations/byte )

Both axes are logarithmic, so the bandwidth is a slope and each kind of arithmetic a horizontal line. A colour is a kernel with its number
format, a sign is a layer's shape, and the number at a point is M, the tokens of one call. Points of one kernel and one shape
are joined in the order of M.

A point may stand above the slope: its bytes were in a cache after all, or the machine was quieter than when it was measured.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from ptqcli.bench.linears import KernelPoint
from ptqcli.bench.machine import Machine
from ptqcli.errors import PTQError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

INSTALL = "pip install 'matplotlib>=3.9'"
WIDTH, HEIGHT, DOTS_PER_INCH = 12.0, 8.0, 100  # 1200 x 800 pixels
# Okabe and Ito's colours, which the usual kinds of colour blindness tell apart; yellow is left out, being faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
KINDS = ("ours", "baseline", "peer")
SIGNS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
LEGEND_COLUMNS = 36  # letters in a line
ROOF_DASHES = ((0, ()), (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))
SIGN_PIXELS = 6.0  # half the side of the square that a sign needs
ROOF_COLOUR = "#666666"
MARGIN = 1.5  # factor between the outermost point and the frame
HEADROOM = 10.0  # how far above the highest point a roof is still shown, with the points that are far below it
# Where a label may stand beside its point, in points, best first: offset to the right and upwards, and its alignment.
PLACES = (
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
    (6, 6, "left", "bottom"),
    (-6, 6, "right", "bottom"),
    (6, -6, "left", "top"),
    (-6, -6, "right", "top"),
)

Box = tuple[float, float, float, float]  # left, bottom, right, top


def check_installed() -> None:
    """Raise PTQError, with what to install, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PTQError(f"--plot needs matplotlib; install it with: {INSTALL}") from error


def draw(points: Sequence[KernelPoint], machine: Machine, file: Path) -> None:
    """Write the roofline of ``points`` as a PNG of 1200 x 800 pixels, over what may be there.

    Raises PTQError when matplotlib is missing or there is no point, OSError when ``file`` cannot be written.
    """
    check_installed()
    if not points:
        raise PTQError("nothing was measured, so there is nothing to draw")
    picture = io.BytesIO()
    build(points, machine).savefig(picture, format="png")
    file.write_bytes(picture.getvalue())


def build(points: Sequence[KernelPoint], machine: Machine) -> Figure:
    """The figure, with a canvas of its own: nothing of matplotlib's global state is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    # The legend stands outside, to the right of the axes.
    axes = figure.add_axes((0.105, 0.08, 0.625, 0.86))
    axes.set_title(f"{machine.name}: kernels under the measured limits", loc="left")
    axes.set_xlabel("operations per byte (weights as stored, inputs and outputs)")
    axes.set_ylabel("operations per second (2 for a multiply-add)")
    _set_scales(axes, points, machine)
    _draw_roofs(axes, machine)
    _draw_points(axes, points)
    _draw_legends(axes, points, machine)
    _draw_labels(axes, points)
    return figure


def series_of(point: KernelPoint) -> str:
    """What has one colour: a kernel with its number format; baselines and peers by their name alone."""
    return f"{point.name}, {point.scheme}" if point.kind == "ours" else point.name


def intensity(point: KernelPoint) -> float:
    """Operations for each byte."""
    return point.operations / point.bytes


def rate(point: KernelPoint) -> float:
    """Operations a second, without the launch where it was timed without."""
    return point.operations / (point.graph_microseconds or point.microseconds) * 1e6


def rate_text(value: float, unit: str = "op/s") -> str:
    """``58.1 Gop/s`` for 5.81e10."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} P{unit}"


# The frame and the roofs


def _set_scales(axes: Axes, points: Sequence[KernelPoint], machine: Machine) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter

    roofs = [*machine.arithmetic.values()]
    across = [intensity(point) for point in points]
    along = [rate(point) for point in points]
    ridges = [roof / machine.bandwidth for roof in roofs]
    top = max([*along, *(roof for roof in roofs if roof < max(along) * HEADROOM), *sorted(roofs)[:1]])
    right = max([*across, *(ridge for ridge in ridges if ridge < max(across) * HEADROOM)])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(across) / MARGIN, right * MARGIN)
    axes.set_ylim(min(along) / MARGIN, top * MARGIN)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(EngFormatter(unit="op/s"))
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_roofs(axes: Axes, machine: Machine) -> None:
    left, right = axes.get_xlim()
    highest = max(machine.arithmetic.values(), default=float("inf"))
    corner = min(right, highest / machine.bandwidth)
    axes.plot([left, corner], [left * machine.bandwidth, corner * machine.bandwidth], color=ROOF_COLOUR, linewidth=1.6, zorder=1)
    for (_, limit), dashes in zip(_roofs(machine), _cycle(ROOF_DASHES), strict=False):
        start = limit / machine.bandwidth
        if start < right:
            axes.plot([start, right], [limit, limit], color=ROOF_COLOUR, linewidth=1.6, linestyle=dashes, zorder=1)


def _roofs(machine: Machine) -> list[tuple[str, float]]:
    """Kinds of arithmetic, the quickest first, as the eye meets them."""
    return sorted(machine.arithmetic.items(), key=lambda roof: -roof[1])


# Points and their legend


def _draw_points(axes: Axes, points: Sequence[KernelPoint]) -> None:
    colours, signs = _colours(points), _signs(points)
    for line in _lines(points):
        across, along, colour = [intensity(point) for point in line], [rate(point) for point in line], colours[series_of(line[0])]
        above = 1 if line[0].kind == "ours" else 0  # what the picture is about is not to be covered
        axes.plot(across, along, color=colour, linewidth=0.8, alpha=0.5, zorder=2 + above)
        look: dict[str, Any] = {"marker": signs[shape_text(line[0])], "markersize": 6.5, "markeredgecolor": "white", "markeredgewidth": 0.6}
        axes.plot(across, along, color=colour, linestyle="none", zorder=4 + above, **look)


def _lines(points: Sequence[KernelPoint]) -> list[list[KernelPoint]]:
    """Points of one series and one shape, by M. A baseline that was measured beside two formats has two lines."""
    lines: dict[tuple[str, str, str], list[KernelPoint]] = {}
    for point in sorted(points, key=lambda point: point.tokens):
        lines.setdefault((series_of(point), shape_text(point), point.scheme), []).append(point)
    return list(lines.values())


def shape_text(point: KernelPoint) -> str:
    """``gate_up 4096 → 28672``, or the sizes alone where the shape has no other name."""
    shape = point.shape
    name = "" if shape.name == f"{shape.in_features}x{shape.out_features}" else f"{shape.name} "
    return f"{name}{shape.in_features} → {shape.out_features}"


def _colours(points: Sequence[KernelPoint]) -> dict[str, str]:
    """A colour for each series, ours first: they keep theirs whoever else is there."""
    ours_first = sorted(points, key=lambda point: KINDS.index(point.kind))
    return dict(zip(dict.fromkeys(series_of(point) for point in ours_first), _cycle(COLOURS), strict=False))


def _signs(points: Sequence[KernelPoint]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(shape_text(point) for point in points), _cycle(SIGNS), strict=False))


def _cycle(values: Sequence[Any]) -> Iterator[Any]:
    while True:
        yield from values


def _draw_legends(axes: Axes, points: Sequence[KernelPoint], machine: Machine) -> None:
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D

    kernels = [Line2D([], [], color=colour, linewidth=4, label=series) for series, colour in _colours(points).items()]
    signs = [
        Line2D([], [], color="#444444", marker=sign, linestyle="none", markersize=7, label=shape) for shape, sign in _signs(points).items()
    ]
    roofs = [Line2D([], [], color=ROOF_COLOUR, linewidth=1.6, label=f"memory {rate_text(machine.bandwidth, 'B/s')} (the slope)")]
    for (name, limit), dashes in zip(_roofs(machine), _cycle(ROOF_DASHES), strict=False):
        roofs.append(Line2D([], [], color=ROOF_COLOUR, linewidth=1.6, linestyle=dashes, label=f"{name} {rate_text(limit)}"))
    top = 1.0
    for title, entries in (("kernel", kernels), ("layer, in → out", signs), ("measured limit", roofs)):
        legend = Legend(
            axes,
            entries,
            [fill(str(entry.get_label()), LEGEND_COLUMNS) for entry in entries],
            title=title,
            loc="upper left",
            bbox_to_anchor=(1.02, top),
            borderaxespad=0,
            frameon=False,
            alignment="left",
            fontsize=9,
            handlelength=3,
        )
        axes.add_artist(legend)
        top = axes.transAxes.inverted().transform((0, legend.get_window_extent().y0))[1] - 0.03
    axes.text(1.02, top, "number at a point: M, tokens in one call", transform=axes.transAxes, fontsize=9, va="top")


# Labels


def _draw_labels(axes: Axes, points: Sequence[KernelPoint]) -> None:
    """One number for the points of a kernel that have the same M, where it covers neither a point nor another number; or none."""
    colours = _colours(points)
    taken = [_around(*axes.transData.transform((intensity(point), rate(point)))) for point in points]
    taken += _outside(axes)
    for (series, tokens), cluster in _clusters(points).items():
        _place(axes, str(tokens), colours[series], cluster, taken)


def _clusters(points: Sequence[KernelPoint]) -> dict[tuple[str, int], list[KernelPoint]]:
    """Points of one series and one M, the highest first."""
    clusters: dict[tuple[str, int], list[KernelPoint]] = {}
    for point in sorted(points, key=lambda point: -rate(point)):
        clusters.setdefault((series_of(point), point.tokens), []).append(point)
    return clusters


def _place(axes: Axes, text: str, colour: str, cluster: Iterable[KernelPoint], taken: list[Box]) -> None:
    from matplotlib.patheffects import withStroke

    for point in cluster:
        for right, up, horizontal, vertical in PLACES:
            label = axes.annotate(
                text,
                (intensity(point), rate(point)),
                xytext=(right, up),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=9,
                color=colour,
                zorder=6,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )
            box = _corners(label.get_window_extent())
            if not any(_overlap(box, other) for other in taken):
                taken.append(box)
                return
            label.remove()


def _around(x: float, y: float) -> Box:
    return x - SIGN_PIXELS, y - SIGN_PIXELS, x + SIGN_PIXELS, y + SIGN_PIXELS


def _corners(extent: Bbox) -> Box:
    return float(extent.x0), float(extent.y0), float(extent.x1), float(extent.y1)


def _outside(axes: Axes) -> list[Box]:
    """What lies outside the axes, as four boxes: no label may stand there."""
    left, bottom, right, top = _corners(axes.get_window_extent())
    far = 1e6
    return [(-far, -far, left, far), (right, -far, far, far), (-far, -far, far, bottom), (-far, top, far, far)]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

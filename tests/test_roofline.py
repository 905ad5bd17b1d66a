"""The picture: where points and roofs stand, that nothing covers a label, and what is written."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Annotation

from ptqcli.bench import roofline
from ptqcli.bench.linears import KernelPoint
from ptqcli.bench.machine import Machine
from ptqcli.bench.shapes import Shape
from ptqcli.errors import PTQError

MACHINE = Machine(
    name="a processor",
    device="cpu",
    threads=2,
    cache_bytes=32 << 20,
    bandwidth=2e10,
    arithmetic={"float32": 1e11, "bfloat16": 4e11, "int8": 6e11},
)
SHAPES = [Shape("qkv", 4096, 6144, 32), Shape("down", 14336, 4096, 32), Shape("256x512", 256, 512, 1)]
TOKENS = (1, 4, 16, 64, 256, 1024)


def point(name: str = "W4A16 torch", kind: str = "ours", shape: Shape = SHAPES[0], tokens: int = 1, **changes: object) -> KernelPoint:
    """A kernel that reaches two thirds of the roof: its weights are read at half a byte each, those of others at 2."""
    weights = shape.in_features * shape.out_features
    size = int(weights * (0.5 if kind == "ours" else 2)) + 2 * tokens * (shape.in_features + shape.out_features)
    operations = 2 * tokens * weights
    microseconds = 1.5e6 * max(size / MACHINE.bandwidth, operations / 4e11)
    values = {
        "shape": shape,
        "scheme": "w4a16-g128",
        "tokens": tokens,
        "name": name,
        "kind": kind,
        "microseconds": microseconds,
        "low": microseconds,
        "high": microseconds,
        "graph_microseconds": None,
        "ratio": {},
        "graph_ratio": {},
        "bytes": size,
        "operations": operations,
        "bandwidth_share": 0.5,
        "arithmetic_share": 0.5,
        "error": 1e-3,
    }
    return KernelPoint(**values | changes)  # type: ignore[arg-type]


MANY = [
    point(name, kind, shape, tokens)
    for name, kind in (("W4A16 torch", "ours"), ("bfloat16", "baseline"), ("float32", "baseline"), ("torch int4", "peer"))
    for shape in SHAPES
    for tokens in TOKENS
]


def labels(figure: Figure) -> list[Annotation]:
    return [text for text in figure.axes[0].texts if isinstance(text, Annotation)]


def legends(figure: Figure) -> list[Legend]:
    return [child for child in figure.axes[0].get_children() if isinstance(child, Legend)]


def overlapping(boxes: list[np.ndarray]) -> list[tuple[int, int]]:
    """Pairs of [left, bottom, right, top] that share pixels."""
    return [(i, j) for (i, a), (j, b) in combinations(enumerate(boxes), 2) if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]]


def test_the_file_is_a_picture_of_1200_by_800(tmp_path: Path) -> None:
    roofline.draw(MANY, MACHINE, tmp_path / "roof.png")
    data = (tmp_path / "roof.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (1200, 800)


def test_no_label_covers_another_or_leaves_the_frame() -> None:
    figure = roofline.build(MANY, MACHINE)
    boxes = [label.get_window_extent().extents for label in labels(figure)]
    assert len(boxes) >= len(TOKENS)
    assert overlapping(boxes) == []
    assert overlapping([*boxes, boxes[0] + 1]) != []
    frame = figure.axes[0].get_window_extent().extents
    assert all(frame[0] <= box[0] and box[2] <= frame[2] and frame[1] <= box[1] and box[3] <= frame[3] for box in boxes)


def test_no_label_covers_a_point() -> None:
    figure = roofline.build(MANY, MACHINE)
    at = figure.axes[0].transData.transform([(roofline.intensity(each), roofline.rate(each)) for each in MANY])
    for box in (label.get_window_extent().extents for label in labels(figure)):
        assert not any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in at)


def test_every_lone_point_has_its_label() -> None:
    figure = roofline.build([point(tokens=tokens) for tokens in TOKENS], MACHINE)
    assert sorted(int(label.get_text()) for label in labels(figure)) == list(TOKENS)


@pytest.mark.parametrize("count", [1, 7])
def test_everything_stands_inside_the_picture(count: int) -> None:
    """Long names too: they are broken over lines."""
    long = "q_proj/k_proj/v_proj/o_proj/gate_proj/up_proj"
    points = [point("LLM.int8 reference", shape=Shape(long, 4096, 4096 + i, 1), scheme="w8a8-outliers6-static") for i in range(count)]
    figure = roofline.build(points, MACHINE)
    width, height = figure.canvas.get_width_height()
    boxes = [legend.get_window_extent().extents for legend in legends(figure)]
    boxes += [text.get_window_extent().extents for text in figure.axes[0].texts]
    assert all(box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height for box in boxes)
    assert overlapping(boxes) == []
    frame = figure.axes[0].get_window_extent().extents
    assert all(box[0] > frame[2] for box in boxes[:3])


def test_points_stand_at_operations_per_byte_and_per_second() -> None:
    one = point(operations=3000, bytes=100, microseconds=2.0)
    assert (roofline.intensity(one), roofline.rate(one)) == (30.0, 1.5e9)
    figure = roofline.build([one], MACHINE)
    drawn = [(line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert set(drawn) == {(30.0, 1.5e9)}


def test_a_graph_counts_where_there_is_one() -> None:
    assert roofline.rate(point(operations=3000, microseconds=2.0, graph_microseconds=1.0)) == 3e9


def test_roofs_meet_at_the_ridge() -> None:
    """The slope is bandwidth times intensity and ends at the highest roof; each roof begins where it meets the slope."""
    figure = roofline.build([point(tokens=tokens) for tokens in TOKENS], MACHINE)
    roofs = [line for line in figure.axes[0].lines if line.get_color() == roofline.ROOF_COLOUR]
    slope, *flat = [(line.get_xdata(), line.get_ydata()) for line in roofs]
    assert [y / x for x, y in zip(*slope, strict=True)] == pytest.approx([MACHINE.bandwidth] * 2)
    assert slope[1][1] == pytest.approx(6e11)
    for (x, y), limit in zip(flat, (6e11, 4e11, 1e11), strict=True):
        assert [*y, x[0] * MACHINE.bandwidth] == pytest.approx([limit] * 3)


def test_a_kernel_has_one_colour_and_a_shape_one_sign() -> None:
    figure = roofline.build(MANY, MACHINE)
    drawn = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines if line.get_marker() not in ("None", None)}
    assert len({colour for colour, _ in drawn}) == 4
    assert len({sign for _, sign in drawn}) == len(SHAPES)
    assert len(drawn) == 4 * len(SHAPES)


def test_a_baseline_beside_two_formats_is_two_lines_and_no_zigzag() -> None:
    points = [point("bfloat16", "baseline", scheme=scheme, tokens=tokens) for scheme in ("w4a16-g128", "W8A8") for tokens in TOKENS]
    lines = [line for line in roofline.build(points, MACHINE).axes[0].lines if len(line.get_xdata()) > 2]
    assert all(list(line.get_xdata()) == sorted(set(line.get_xdata())) for line in lines)
    assert len({line.get_color() for line in lines}) == 1


def test_ours_keep_their_colour_whoever_else_is_there() -> None:
    baselines_first = [point("bfloat16", "baseline"), point("a library", "peer"), point()]
    assert roofline._colours(baselines_first)["W4A16 torch, w4a16-g128"] == roofline._colours([point()])["W4A16 torch, w4a16-g128"]


def test_the_legend_names_kernels_shapes_and_limits() -> None:
    texts = [text.get_text() for legend in legends(roofline.build(MANY, MACHINE)) for text in legend.get_texts()]
    assert texts == [
        *("W4A16 torch, w4a16-g128", "bfloat16", "float32", "torch int4"),
        *("qkv 4096 → 6144", "down 14336 → 4096", "256 → 512"),
        *("memory 20 GB/s (the slope)", "int8 600 Gop/s", "bfloat16 400 Gop/s", "float32 100 Gop/s"),
    ]


@pytest.mark.parametrize(("value", "text"), [(5.81e10, "58.1 Gop/s"), (999, "999 op/s"), (1.5e15, "1.5 Pop/s"), (2e18, "2e+03 Pop/s")])
def test_rates_are_written_with_a_prefix(value: float, text: str) -> None:
    assert roofline.rate_text(value) == text


def test_no_global_state_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it now is an error
    settings = [name for name in matplotlib.rcParams if name != "backend"]  # to ask for the backend is to choose one
    before = [matplotlib.rcParams[name] for name in settings]
    roofline.draw([point()], MACHINE, tmp_path / "roof.png")
    assert [matplotlib.rcParams[name] for name in settings] == before
    assert isinstance(roofline.build([point()], MACHINE).canvas, FigureCanvasAgg)


def test_a_missing_matplotlib_is_told_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PTQError, match=r"--plot needs matplotlib; install it with: pip install 'matplotlib>=3\.9'"):
        roofline.draw([point()], MACHINE, tmp_path / "roof.png")


def test_nothing_measured_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(PTQError, match="nothing to draw"):
        roofline.draw([], MACHINE, tmp_path / "roof.png")
    assert list(tmp_path.iterdir()) == []

"""Size against quality as a picture in PNG: a point for each checkpoint, and the line that joins those that no other beats."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqcli.bench.roofline import COLOURS, check_installed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_TEXTS = 4  # panels beside each other
PANEL, HEIGHT, DOTS_PER_INCH = 6.0, 5.0, 100  # inches
MIB = 1 << 20
MOST_LETTERS = 40


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Write the picture of ``found``, as ``Compared.to_json`` has it, over what may be there.

    Raises PTQError where matplotlib is missing, OSError when ``file`` cannot be written.
    """
    check_installed()
    picture = io.BytesIO()
    build(found).savefig(picture, format="png")
    file.write_bytes(picture.getvalue())


def build(found: Mapping[str, Any]) -> Figure:
    """The figure, with a canvas of its own: nothing of matplotlib's global state is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    texts = [text["text"] for text in found["conditions"]["texts"]][:MOST_TEXTS]
    figure = Figure(figsize=(PANEL * len(texts), HEIGHT), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    for index, text in enumerate(texts):
        _draw_panel(figure.add_subplot(1, len(texts), index + 1), index, text, found)
    return figure


def _draw_panel(axes: Axes, index: int, text: str, found: Mapping[str, Any]) -> None:
    points = []
    for number, each in enumerate(found["checkpoints"]):
        result = each["results"][index]
        key = "mean_kl" if "mean_kl" in result else "perplexity"
        size, value, error = each["bytes"] / MIB, result[key], result.get(f"{key}_error", 0.0)
        points.append((each["name"], size, value, key))
        axes.errorbar([size], [value], yerr=[[min(error, value)], [error]], fmt="o", color=COLOURS[number % len(COLOURS)], capsize=3)
        label = {"xytext": (6, 6), "textcoords": "offset points", "fontsize": 9, "parse_math": False}
        axes.annotate(_short(each["name"]), (size, value), **label)  # type: ignore[arg-type]
    line = sorted((size, value) for name, size, value, _ in points if name in found["fronts"][text])
    axes.plot([size for size, _ in line], [value for _, value in line], color="#666666", linewidth=1, linestyle="--", zorder=0)
    if all(value > 0 for _, _, value, _ in points):
        axes.set_yscale("log")
    axes.margins(0.15)
    axes.set_title(_short(text), loc="left", parse_math=False)
    axes.set_xlabel("stored, MiB")
    axes.set_ylabel("mean KL to the baseline, nats" if points[0][3] == "mean_kl" else "perplexity")
    axes.grid(visible=True, which="both", linewidth=0.3)


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"...{name[3 - MOST_LETTERS :]}"

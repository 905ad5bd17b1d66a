"""The losses as a picture: block by block, a panel for each kind of group, a line for each candidate, a row of panels for each method."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqcli.errors import PTQError
from ptqcli.sensitivity.table import GroupLosses, SensitivityTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
PANEL_WIDTH, PANEL_HEIGHT, DOTS_PER_INCH = 3.4, 2.8, 100  # inches
MOST_PANELS = 8  # in a row
_NUMBERED = re.compile(r"\.(\d+)\.")


def draw(table: SensitivityTable, file: Path) -> None:
    """Write the picture, over what may be there, in the form that the name's ending tells.

    Raises PTQError when the file cannot be written. matplotlib is installed.
    """
    picture = io.BytesIO()
    form = file.suffix.lower().removeprefix(".")
    build(table).savefig(picture, format=form, metadata={"Date": None} if form == "svg" else None)
    try:
        file.write_bytes(picture.getvalue())
    except OSError as error:
        raise PTQError(f"{file}: cannot be written: {error.strerror}") from error


def build(table: SensitivityTable) -> Figure:
    """The figure, with a canvas of its own: nothing of matplotlib's global state is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = kinds(table.groups)
    figure = Figure(figsize=(PANEL_WIDTH * len(panels), 0.6 + PANEL_HEIGHT * len(table.methods)), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(table.methods), len(panels), squeeze=False, sharex="col", sharey="row")
    for row, method in enumerate(table.methods):
        for column, (kind, members) in enumerate(panels.items()):
            _draw_panel(axes[row][column], table, method, members)
            axes[row][column].set_title(kind if row == 0 else "", fontsize=9, parse_math=False)
        axes[row][0].set_ylabel(f"{method}\n{table.units[method]}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("block", fontsize=9)
    lines, names = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=len(names), fontsize=9, frameon=False)
    return figure


def kinds(groups: Sequence[GroupLosses]) -> dict[str, list[tuple[int, GroupLosses]]]:
    """Groups of one kind, told by their names behind the block's number, with that number; what is beyond MOST_PANELS together."""
    found: dict[str, list[tuple[int, GroupLosses]]] = {}
    for number, group in enumerate(groups):
        place = _NUMBERED.search(group.name)
        kind, block = (group.name, number) if place is None else (group.name[place.end() :], int(place[1]))
        found.setdefault(kind if kind in found or len(found) < MOST_PANELS - 1 else "others", []).append((block, group))
    return found


def _draw_panel(axis: Any, table: SensitivityTable, method: str, members: Sequence[tuple[int, GroupLosses]]) -> None:
    axis.set_yscale("log")
    axis.grid(visible=True, which="major", linewidth=0.4, alpha=0.6)
    axis.tick_params(labelsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    for number, scheme in enumerate(table.candidates):
        losses = [(block, group.losses[method][number]) for block, group in members]
        known = [(block, loss) for block, loss in losses if loss]
        axis.plot([block for block, _ in known], [loss for _, loss in known], marker=".", linewidth=1, label=scheme)

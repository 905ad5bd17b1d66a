"""``ptq inspect --plot``: the error of each layer, drawn as bars, in a terminal or as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.text import Text

from ptqcli.cli.console import Output
from ptqcli.errors import PTQError, UsageError, printable

BLOCK, PLAIN = "\u2588", "#"
LEAST_BAR = 10  # columns of the longest bar
WIDEST_NAME = 60
PLAIN_COLUMNS = 40  # of the longest bar where there is no terminal
SVG = ".svg"
ROW, NAME_WIDTH, BAR_WIDTH = 16, 420, 480  # pixels


def show_plot(layers: Sequence[Mapping[str, Any]], kind: str, output: Output) -> None:
    """A bar for each layer, as long as its error is large, the worst one marked. kind: of the error. Raises PTQError if none is known."""
    names, errors = _errors(layers)
    console, worst = output.console, max(errors)
    width = min(max(map(len, names)), WIDEST_NAME)
    drawn = console.is_terminal and not console.is_dumb_terminal and "utf" in (console.encoding or "").lower()
    longest = max(LEAST_BAR, console.width - width - 10) if console.is_terminal else PLAIN_COLUMNS
    output.say()
    output.say(f"Relative error of each layer ({kind}), the largest {worst:.4f}")
    for name, error in zip(names, errors, strict=True):
        bar = (BLOCK if drawn else PLAIN) * max(round(longest * error / worst) if worst else 0, 1 if error else 0)
        line = f"{name[-width:]:{width}} {error:.4f} {bar}".rstrip()
        console.print(Text(line, style="bold" if error == worst else ""), soft_wrap=True)


def write_plot(layers: Sequence[Mapping[str, Any]], kind: str, target: Path) -> None:
    """The same as a picture. Raises UsageError for another name than one in .svg, PTQError if no error is known or it cannot be written."""
    if target.suffix != SVG:
        raise UsageError(f"{target}: pictures are written as {SVG}; choose such a name")
    names, errors = _errors(layers)
    worst = max(errors) or 1.0
    rows = []
    for number, (name, error) in enumerate(zip(names, errors, strict=True)):
        top = ROW * (number + 2)
        bar = f'<rect x="{NAME_WIDTH + 10}" y="{top - 11}" width="{BAR_WIDTH * error / worst:.1f}" height="12" fill="#4878a8"/>'
        value = f'<text x="{NAME_WIDTH + 14 + BAR_WIDTH * error / worst:.1f}" y="{top}">{error:.4f}</text>'
        rows.append(f'<text x="{NAME_WIDTH}" y="{top}" text-anchor="end">{escape(name)}</text>{bar}{value}')
    size = f'width="{NAME_WIDTH + BAR_WIDTH + 80}" height="{ROW * (len(names) + 3)}"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="monospace" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    title = f'<text x="10" y="{ROW}" font-weight="bold">Relative error of each layer ({escape(kind)})</text>'
    try:
        target.write_text("\n".join([*head, title, *rows, "</svg>"]) + "\n", encoding="utf-8")
    except OSError as error:
        raise PTQError(f"{target}: cannot be written: {error.strerror}") from error


def _errors(layers: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[float]]:
    """Names and errors of the layers that have one."""
    known = [layer for layer in layers if layer.get("relative_error") is not None and math.isfinite(layer["relative_error"])]
    if not known:
        raise PTQError("no error of a layer is known: there is no report of `ptq quantize` beside the weights")
    return [printable(layer["name"]) for layer in known], [max(float(layer["relative_error"]), 0.0) for layer in known]

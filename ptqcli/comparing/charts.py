"""The plots of a comparison: size against quality, KL over the tokens, errors of layers by block. See ``svg``.

found is always what ``Compared.to_json`` gives. A checkpoint has its colour and its sign in all plots.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ptqcli.comparing.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    LETTER,
    LINE,
    RIGHT,
    SERIES,
    TOP,
    WIDTH,
    Axis,
    apart,
    element,
    frame,
    number_text,
    path,
    picture,
    shortened,
    sign,
    text_of,
)
from ptqcli.comparing.words import with_error

MIB = 1 << 20
MOST_LETTERS = 16  # of a name beside a point
MOST_BLOCKS, MOST_KINDS = 256, 40  # of a map of errors
CELL = 18.0  # units of a map of errors
NUMBER = re.compile(r"\d+")
Point = tuple[float, float]


def size_chart(index: int, text: str, found: Mapping[str, Any]) -> str:
    """Size of each checkpoint against its distance from the baseline on a text, and the front."""
    results = [each["results"][index] for each in found["checkpoints"]]
    key = "mean_kl" if "mean_kl" in results[0] else "perplexity"
    what = "mean KL to the baseline, nats" if key == "mean_kl" else "perplexity"
    sizes = [each["bytes"] / MIB for each in found["checkpoints"]]
    values, errors = [each[key] for each in results], [each.get(f"{key}_error") or 0.0 for each in results]
    ends = [value + side * error for value, error in zip(values, errors, strict=True) for side in (-1, 1)]
    x = Axis.around(sizes, LEFT, WIDTH - RIGHT)
    y = Axis.around([*values, *ends], HEIGHT - BOTTOM, TOP, logarithmic=min(values) > 0)
    names = [each["name"] for each in found["checkpoints"]]
    points = [(x.at(size), y.at(value)) for size, value in zip(sizes, values, strict=True)]
    parts = [frame(x, y, "stored, MiB", what)]
    in_front = sorted(point for name, point in zip(names, points, strict=True) if name in found["fronts"][text])
    if len(in_front) > 1:
        parts.append(element("path", element("title", "the front: none is smaller and nearer"), class_="front", d=path(in_front)))
    for series, (name, (across, down), value, error) in enumerate(zip(names, points, values, errors, strict=True)):
        if error:
            ends_at = f"M{across:.1f} {y.at(value - error):.1f}V{y.at(value + error):.1f}"
            parts.append(element("path", class_=f"bar s{series % SERIES}", d=ends_at))
        parts.append(sign(series, across, down, f"{name}: {sizes[series]:.1f} MiB, {what} {with_error(value, error)}"))
    parts += _labels(names, points)
    words = "; ".join(f"{name} {size:.1f} MiB {value:.4g}" for name, size, value in zip(names, sizes, values, strict=True))
    return picture(parts, f"Size against quality on {text}", f"{what} by size. {words}")


def _labels(names: Sequence[str], points: Sequence[Point]) -> Iterable[str]:
    """A name beside each point, to the right or, near the edge, to the left, none on another."""
    words = [shortened(name, MOST_LETTERS) for name in names]
    right = [x + 12 + LETTER * len(word) < WIDTH for word, (x, _) in zip(words, points, strict=True)]
    for side in (True, False):
        chosen = [index for index in range(len(points)) if right[index] is side]
        places = apart([points[index][1] for index in chosen], LINE, TOP + 4, HEIGHT - BOTTOM - 4)
        for index, place in zip(chosen, places, strict=True):
            across = points[index][0] + (9 if side else -9)
            anchor = "start" if side else "end"
            yield element("text", text_of(words[index]), class_="label", x=across, y=place + 4, text_anchor=anchor)


def kl_chart(text: str, found: Mapping[str, Any]) -> str:
    """Which share of the tokens of a text has moved by more than so much, a line for each checkpoint."""
    tokens = {each["name"]: _tokens(each, text) for each in found["checkpoints"]}
    curves = {
        each["name"]: [_above(place, value, tokens[each["name"]]) for place, value in each["kl_curve"][text]]
        for each in found["checkpoints"]
    }
    x = Axis.around((value for curve in curves.values() for value, _ in curve), LEFT, WIDTH - RIGHT, logarithmic=True)
    x = Axis(max(x.low, x.high * 1e-7), x.high, x.start, x.end, True)
    y = Axis(min(1e-3, *(1 / count for count in tokens.values())), 1.0, HEIGHT - BOTTOM, TOP, True)
    parts = [frame(x, y, "KL of a token, nats", "share of tokens above it")]
    for series, (name, curve) in enumerate(curves.items()):
        line = [(x.at(value), y.at(share)) for value, share in curve if value >= x.low]
        if len(line) > 1:
            title = element("title", text_of(name))
            parts.append(element("path", title, class_=f"line s{series % SERIES} d{series // SERIES % 3}", d=path(line)))
            across, down = line[len(line) // 3]
            parts.append(sign(series, across, down, name))
    halves = "; ".join(f"{name} half of the tokens above {_median(curve):.2g}" for name, curve in curves.items())
    return picture(parts, f"KL over the tokens of {text}", f"Share of tokens by how far they moved. {halves}")


def _tokens(checkpoint: Mapping[str, Any], text: str) -> int:
    return next(result["tokens"] for result in checkpoint["results"] if result["text"] == text)


def _above(place: float, value: float, tokens: int) -> tuple[float, float]:
    """A KL and the share of tokens that have more; the largest has been seen once."""
    return value, max(1 - place, 1 / tokens)


def _median(curve: Sequence[tuple[float, float]]) -> float:
    return min(curve, key=lambda point: abs(point[1] - 0.5))[0]


def by_block(layers: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Kind of linear -> block -> error, the mean where a block has several of a kind, as experts are. Those in no block are left out.

    The block is the first number in a name; other numbers in it do not tell kinds apart.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for layer in layers:
        parts = layer["name"].split(".")
        place = next((index for index, part in enumerate(parts) if NUMBER.fullmatch(part) and len(part) < 7), None)
        if place is None:
            continue
        kind = ".".join("*" if NUMBER.fullmatch(part) else part for part in parts[place + 1 :])
        found.setdefault(kind, {}).setdefault(int(parts[place]), []).append(layer["error"])
    return {kind: {block: sum(each) / len(each) for block, each in sorted(blocks.items())} for kind, blocks in found.items()}


def block_chart(found: Mapping[str, Any]) -> str | None:
    """The mean error of the linears of each block, a line for each checkpoint; None where no report tells any."""
    lines: dict[int, list[Point]] = {}
    for series, each in enumerate(found["checkpoints"]):
        kinds = by_block(each["layers"])
        blocks = sorted({block for errors in kinds.values() for block in errors})
        means = [[errors[block] for errors in kinds.values() if block in errors] for block in blocks]
        if blocks:
            lines[series] = [(float(block), sum(errors) / len(errors)) for block, errors in zip(blocks, means, strict=True)]
    if not lines:
        return None
    points = [point for line in lines.values() for point in line]
    x = Axis.around((block for block, _ in points), LEFT, WIDTH - RIGHT)
    y = Axis.around((error for _, error in points), HEIGHT - BOTTOM, TOP, logarithmic=all(error > 0 for _, error in points))
    numbers = [(tick, number_text(tick)) for tick in x.ticks() if tick == int(tick) and tick >= 0]
    parts = [frame(x, y, "block", "mean relative error of its linears", numbers)]
    for series, line in lines.items():
        name = found["checkpoints"][series]["name"]
        places = [(x.at(block), y.at(error)) for block, error in line]
        parts.append(
            element("path", element("title", text_of(name)), class_=f"line s{series % SERIES} d{series // SERIES % 3}", d=path(places))
        )
        marked = zip(places, line, strict=True) if len(places) <= 40 else ()
        parts += [sign(series, *place, f"{name}, block {block:.0f}: {error:.4g}") for place, (block, error) in marked]
    words = "; ".join(
        f"{found['checkpoints'][series]['name']} from {line[0][1]:.3g} to {line[-1][1]:.3g}" for series, line in lines.items()
    )
    return picture(parts, "Error by block", f"Mean relative error of the linears of each block. {words}")


def error_map(checkpoint: Mapping[str, Any]) -> str | None:
    """A square for each kind of linear and block, the darker the larger its error; None where no report tells any."""
    kinds = dict(list(by_block(checkpoint["layers"]).items())[:MOST_KINDS])
    blocks = sorted({block for errors in kinds.values() for block in errors})[:MOST_BLOCKS]
    if not blocks:
        return None
    worst = max(max(errors.values()) for errors in kinds.values()) or 1.0
    side = LETTER * max(map(len, kinds)) + 12
    parts = []
    for row, (kind, errors) in enumerate(kinds.items()):
        top = row * CELL + LINE + 6
        parts.append(element("text", text_of(kind), class_="tick", x=side - 6, y=top + 13, text_anchor="end"))
        for column, block in enumerate(blocks):
            if block in errors:
                title = element("title", text_of(f"block {block}, {kind}: {errors[block]:.4g}"))
                shade = 0.08 + 0.92 * max(errors[block], 0.0) / worst
                place = {"x": side + column * CELL, "y": top, "width": CELL - 2, "height": CELL - 2}
                parts.append(element("rect", title, class_="cell", fill_opacity=shade, **place))
    step = 1 if len(blocks) <= 24 else 5
    for column, block in enumerate(blocks):
        if column % step == 0:
            parts.append(element("text", str(block), class_="tick", x=side + column * CELL + 8, y=LINE, text_anchor="middle"))
    width, height = float(math.ceil(side + len(blocks) * CELL + 8)), float(math.ceil(len(kinds) * CELL + LINE + 10))
    description = f"{len(kinds)} kinds of linears in {len(blocks)} blocks; the largest error is {worst:.4g}"
    return picture(parts, f"Errors of {checkpoint['name']}", description, width, height, fixed=True)

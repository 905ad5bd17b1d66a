"""Plots in SVG, to stand in a page: elements whose text is escaped, and axes that bring numbers to places that are always finite.

Colours, lines and letters are the page's style sheet's, by class, so that a plot is light or dark as the page is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from ptqcli.errors import printable

WIDTH, HEIGHT = 440.0, 300.0  # units, which are pixels on a narrow screen
LEFT, RIGHT, TOP, BOTTOM = 70.0, 14.0, 14.0, 46.0  # margins of the axes
SERIES = 8  # colours; more series take them again, with other signs
LETTER, LINE = 7.4, 15.0  # units that a letter is wide and a line of text is high
LEAST_RATIO = 1e-12  # of the largest number: what is smaller stands at the lower end of a logarithmic axis
MOST_DECADES = 12


def text_of(value: object) -> str:
    """As text of HTML or of an attribute: nothing in it is taken for markup, and no control character is left."""
    return escape(printable(str(value)), quote=True)


def element(name: str, content: Iterable[str] | str = "", **attributes: object) -> str:
    """An element. content: markup. Attributes are escaped; ``class_`` is class, and an underscore a hyphen."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{text_of(_value(value))}"' for key, value in attributes.items())
    inner = content if isinstance(content, str) else "".join(content)
    return f"<{name}{given}>{inner}</{name}>"


def _value(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


@dataclass(frozen=True)
class Axis:
    """Numbers from ``low`` to ``high``, which stand from ``start`` to ``end`` in the picture. logarithmic: by their logarithms."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    @classmethod
    def around(cls, numbers: Iterable[float], start: float, end: float, logarithmic: bool = False, zero: bool = False) -> Axis:
        """With room for all finite ``numbers``. zero: begins there. A logarithmic axis has only numbers above 0."""
        known = [number for number in numbers if math.isfinite(number) and (number > 0 or not logarithmic)]
        if not known:
            return cls(*((1.0, 10.0) if logarithmic else (0.0, 1.0)), start, end, logarithmic)
        low, high = (0.0 if zero else min(known)), max(known)
        if logarithmic:
            low = max(low, high * LEAST_RATIO)
            room = (high / low) ** 0.08 if high / low > 1.01 else 2.0
            return cls(low / room, min(high * room, 1e300), start, end, True)
        room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
        return cls(0.0 if zero else low - room, high + room, start, end)

    def at(self, number: float) -> float:
        """The place of ``number``; what is beyond an end, or is no number, stands at the end."""
        if math.isnan(number):
            return self.start
        inside = min(max(number, self.low), self.high)
        share = (
            math.log(inside / self.low) / math.log(self.high / self.low)
            if self.logarithmic
            else (inside - self.low) / (self.high - self.low)
        )
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers on it: powers of ten, with their twos and fives where there are few, or steps of 1, 2 or 5."""
        if self.logarithmic:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            digits = (1, 2, 5) if last - first <= 3 else (1,)
            step = max(1, (last - first) // MOST_DECADES + 1)
            found = [digit * 10.0**power for power in range(first, last + 1, step) for digit in digits]
        else:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step_size = next(size * power for size in (1, 2, 5, 10) if size * power >= rough)
            first = math.ceil(self.low / step_size)
            found = [(first + count) * step_size for count in range(12)]
        return [tick for tick in found if self.low <= tick <= self.high]


def number_text(value: float) -> str:
    """A number at an axis: ``0.02``, ``300``, ``1e-5``."""
    if value and not 1e-4 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"


def frame(x: Axis, y: Axis, x_title: str, y_title: str, x_texts: Sequence[tuple[float, str]] | None = None) -> str:
    """Grid, numbers and titles of a pair of axes. x_texts: what stands at which numbers of the first, in the place of the numbers."""
    below, parts = HEIGHT - BOTTOM, []
    for number, words in x_texts if x_texts is not None else [(tick, number_text(tick)) for tick in x.ticks()]:
        place = x.at(number)
        parts.append(element("line", class_="grid", x1=place, x2=place, y1=TOP, y2=below))
        parts.append(element("text", text_of(words), class_="tick", x=place, y=below + 16, text_anchor="middle"))
    for tick in y.ticks():
        place = y.at(tick)
        parts.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=place, y2=place))
        parts.append(element("text", text_of(number_text(tick)), class_="tick", x=LEFT - 6, y=place + 4, text_anchor="end"))
    parts.append(element("path", class_="axis", d=f"M{LEFT} {TOP}V{below}H{WIDTH - RIGHT}"))
    parts.append(element("text", text_of(x_title), class_="name", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle"))
    middle = (TOP + below) / 2
    turned = f"translate(13 {middle:.0f}) rotate(-90)"
    parts.append(element("text", text_of(y_title), class_="name", transform=turned, text_anchor="middle"))
    return "".join(parts)


def path(points: Sequence[tuple[float, float]]) -> str:
    """The line through ``points``, as the attribute d has it."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def sign(series: int, x: float, y: float, title: str) -> str:
    """The sign of a series at a place, with words that appear under the pointer."""
    shapes = (
        f"M{x - 5:.1f} {y:.1f}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
        f"M{x - 4.5:.1f} {y - 4.5:.1f}h9v9h-9z",
        f"M{x:.1f} {y - 6:.1f}l5.5 10h-11z",
        f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z",
    )
    shape = shapes[(series + series // SERIES) % len(shapes)]
    return element("path", element("title", text_of(title)), class_=f"sign s{series % SERIES}", d=shape)


def picture(content: Iterable[str], title: str, description: str, width: float = WIDTH, height: float = HEIGHT, fixed: bool = False) -> str:
    """The whole plot. description: in words, for whoever does not see it. fixed: as large as it is, whatever the page's width."""
    size = {"width": width, "height": height} if fixed else {}
    words = element("title", text_of(title)) + element("desc", text_of(description))
    box = f"0 0 {width:.0f} {height:.0f}"
    return element("svg", words + "".join(content), viewBox=box, role="img", aria_label=f"{title}. {description}", **size)


def apart(places: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """``places`` moved so that any two are ``least`` apart where there is room from ``low`` to ``high``; the order stays."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved, floor = list(places), low
    for index in order:
        moved[index] = max(places[index], floor)
        floor = moved[index] + least
    ceiling = high
    for index in reversed(order):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - least
    return [min(max(place, low), high) for place in moved]


def shortened(name: str, letters: int) -> str:
    """``name``, its beginning left out where it is longer."""
    return name if len(name) <= letters else f"…{name[1 - letters :]}"

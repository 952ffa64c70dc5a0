"""What all plots share: a figure with its caption, axes with their grid, labels, and a legend.

A drawing is WIDTH x HEIGHT units, and one unit is about a pixel. A screen reader is given its title and a description
in words; the eye finds the same in the caption.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlxtune_convert.shown import shown_name

from mlxtune.report.drawing.scale import Scale
from mlxtune.report.html import Child, Html, tag
from mlxtune.report.style import CURVES

WIDTH, HEIGHT = 560, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 548, 26, 236  # where the axes are
LINE = 16  # from one line of text to the next
LONGEST = 44  # letters of a label inside a drawing


@dataclass(frozen=True)
class Mark:
    """A line across a plot, or a point in it, with its name beside it."""

    name: str  # what it is
    x: float | None  # None: a horizontal line
    y: float | None  # None: a vertical line


def figure(title: str, description: str, content: Sequence[Child], below: Child = None, height: float = HEIGHT) -> Html:
    """A drawing under its title. description: what it shows, in words; below: what follows, such as a legend."""
    drawing = tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        content,
        class_="drawing",
        role="img",
        viewBox=f"0 0 {WIDTH} {number(height)}",
    )
    plot = tag("div", drawing, class_="plot", role="group", aria_label=title, tabindex=0)
    return tag("figure", tag("figcaption", title), plot, below)


def number(value: float) -> str:
    """A place in a drawing: a tenth of a unit is less than the eye sees."""
    return f"{value:.1f}".removesuffix(".0")


def text(content: str, x: float, y: float, class_: str | None = None) -> Html:
    """A line of text; too long a one is cut."""
    content = shown_name(content)
    if len(content) > LONGEST:
        content = content[: LONGEST - 1] + "…"
    return tag("text", content, x=number(x), y=number(y), class_=class_)


def path(steps: str, class_: str) -> Html:
    return tag("path", d=steps, class_=class_)


def axes(across: Scale, up: Scale, x: str, y: str) -> list[Html]:
    """The frame of a plot with its grid and numbers. x, y: what the axes count."""
    out = []
    for value, label in across.ticks(6):
        place = across.place(value)
        grid = path(f"M{number(place)} {TOP}V{BOTTOM}", "grid")
        out.append(tag("g", grid, text(label, place, BOTTOM + LINE, "middle"), class_="tick"))
    for value, label in up.ticks(5):
        place = up.place(value)
        grid = path(f"M{LEFT} {number(place)}H{RIGHT}", "grid")
        out.append(tag("g", grid, text(label, LEFT - 6, place + 4, "end"), class_="tick"))
    out.append(path(f"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}", "frame"))
    out.append(text(x, (LEFT + RIGHT) / 2, BOTTOM + 2 * LINE + 4, "name middle"))
    out.append(text(y, 2, TOP - 12, "name"))
    return out


def marks(wanted: Sequence[Mark], across: Scale, up: Scale) -> list[Html]:
    """Marks and their names; each name on a line of its own, so that no two stand in one place."""
    out = []
    drawable = [mark for mark in wanted if math.isfinite(mark.x or 0.0) and math.isfinite(mark.y or 0.0)]
    for at, mark in enumerate(drawable):
        line = TOP + LINE * (at + 1) - 2
        if mark.x is None:
            height = up.place(mark.y or 0.0)
            out.append(path(f"M{LEFT} {number(height)}H{RIGHT}", "mark"))
            out.append(text(mark.name, RIGHT - 4, height - 5, "label end"))
            continue
        place = across.place(mark.x)
        is_left = place < (LEFT + RIGHT) / 2
        side = "label" if is_left else "label end"  # the name goes where there is room
        if mark.y is None:
            out.append(path(f"M{number(place)} {TOP}V{BOTTOM}", "mark"))
            out.append(text(mark.name, place + 6 if is_left else place - 6, line, side))
        else:
            height = up.place(mark.y)
            out.append(tag("circle", cx=number(place), cy=number(height), r=6, class_="ring"))
            out.append(text(mark.name, place, max(height - 3 * LINE / 2, TOP + LINE), side))
    return out


def legend(entries: Sequence[tuple[str, str]]) -> Html:
    """What each line of a plot is. entries: its class, by which it is drawn, and its name."""
    items = []
    for class_, name in entries:
        steps = "M14 6h0" if "points" in class_.split() else "M2 6h24"
        key = tag("svg", path(steps, class_), width=28, height=12, aria_hidden="true")
        items.append(tag("li", key, name))
    return tag("ul", items, class_="legend")


def colour(rank: int) -> str:
    """The class of the curve of a rank."""
    return f"curve{rank % CURVES}"

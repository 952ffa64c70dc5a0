"""The plots of a page: curves, histograms, and intervals around zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlxtune_convert.shown import shown_name

from mlxtune.report.drawing import figure
from mlxtune.report.drawing.figure import BOTTOM, LEFT, LINE, RIGHT, TOP, WIDTH, Mark, number, path, text
from mlxtune.report.drawing.scale import LARGEST, SMALLEST, Scale, fitted
from mlxtune.report.drawing.thinning import Point, thinned
from mlxtune.report.html import Html, tag

ROW = 30  # of a plot of intervals
LETTER = 8.2  # the width of a letter in a drawing, about; capitals are wider than others
NAMES, NOTES = (60.0, 190.0), (100.0, 230.0)  # the least and the most room for names of intervals, and for their notes


@dataclass(frozen=True)
class Line:
    """One curve of a plot."""

    name: str  # what the legend calls it
    points: Sequence[Point]  # in the order of x; y None or not a number: a gap
    style: Literal["solid", "dashed", "dotted", "faint", "points"] = "solid"  # how it is drawn, beside its colour
    rank: int = 0  # which of the colours it has


@dataclass(frozen=True)
class Interval:
    """A value and how sure it is."""

    name: str  # of the row
    low: float  # the interval's beginning
    middle: float  # the value
    high: float  # the interval's end
    note: str = ""  # written at the row's end; "": the three numbers are


def curves(title: str, x: str, y: str, lines: Sequence[Line], marks: Sequence[Mark] = (), log: bool = False) -> Html:
    """Curves over one axis. x, y: what the axes count, with its unit; log: whether equal steps upwards multiply, and
    then what is not above 0 is a gap. A long curve is thinned.
    """
    drawn = [(line, thinned(line.points)) for line in lines]
    xs = [px for _, points in drawn for px, _ in points] + [mark.x for mark in marks if mark.x is not None]
    ys = [py for _, points in drawn for _, py in points if py is not None]
    ys += [mark.y for mark in marks if mark.y is not None]
    across = fitted(xs, LEFT, RIGHT, room=0.02)
    up = fitted(ys, BOTTOM, TOP, log)
    content = figure.axes(across, up, x, f"{y} (logarithmic)" if log else y)
    entries = []
    for line, points in drawn:
        class_ = f"line {line.style} {figure.colour(line.rank)}"
        content.append(path(_steps(points, across, up, line.style == "points"), class_))
        entries.append((class_, line.name))
    content += figure.marks(marks, across, up)
    if not any(_is_drawn(value, log) for value in ys):
        content.append(text("no number that could be drawn", (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2, "middle"))
    said = [_said(line, x) for line in lines] + [_said_mark(mark, x) for mark in marks]
    says_more = len(entries) > 1 or [name.lower() for _, name in entries] != [title.lower()]
    return figure.figure(title, " ".join(said), content, figure.legend(entries) if says_more else None)


def histogram(title: str, x: str, bins: Sequence[tuple[float, float, int]], marks: Sequence[Mark] = ()) -> Html:
    """How many there are of each size. x: what is counted along, with its unit; bins: from, to, how many."""
    ends = [end for low, high, _ in bins for end in (low, high)]
    across = fitted([*ends, *(mark.x for mark in marks if mark.x is not None)], LEFT, RIGHT, room=0.02)
    up = fitted([0, *(count * 1.05 for _, _, count in bins)], BOTTOM, TOP, room=0)
    content = figure.axes(across, up, x, "how many")
    for low, high, count in bins:
        left, top = across.place(low), up.place(count)
        size = {"width": number(across.place(high) - left), "height": number(BOTTOM - top)}
        content.append(tag("rect", x=number(left), y=number(top), class_="bar", **size))
    content += figure.marks(marks, across, up)
    total = sum(count for _, _, count in bins)
    said = f"{total:,} in {len(bins)} bins."
    if total:
        low, high, count = max(bins, key=lambda one: one[2])
        said += f" Most, {count:,}, are from {low:,.4g} to {high:,.4g}."
    return figure.figure(title, " ".join([said, *(_said_mark(mark, x) for mark in marks)]), content)


def intervals(title: str, x: str, rows: Sequence[Interval]) -> Html:
    """Values with their intervals, one below the other, around a line at 0. x: what they count, with its unit."""
    bottom = TOP + ROW * len(rows)
    names, notes = [shown_name(row.name) for row in rows], [shown_name(_note(row)) for row in rows]
    left = _room(names, *NAMES)  # where the names end
    right = RIGHT - _room(notes, *NOTES)
    across = fitted([0.0, *(end for row in rows for end in (row.low, row.high))], left + 12, right)
    content: list[Html] = []
    for value, label in across.ticks(4):
        place = across.place(value)
        grid = path(f"M{number(place)} {TOP}V{bottom}", "grid")
        content.append(tag("g", grid, text(label, place, bottom + LINE, "middle"), class_="tick"))
    content.append(path(f"M{number(across.place(0.0))} {TOP}V{bottom}", "frame"))
    said = []
    for at, (row, name, note) in enumerate(zip(rows, names, notes, strict=True)):
        middle = TOP + ROW * at + ROW / 2
        content.append(text(_cut(name, left), left, middle + 4, "end"))
        content += _interval(row, middle, across)
        content.append(text(_cut(note, NOTES[1]), WIDTH - 4, middle + 4, "end"))
        said.append(f"{row.name}: {row.middle:+.3g}, between {row.low:+.3g} and {row.high:+.3g}.")
    content.append(text(x, (left + right) / 2, bottom + 2 * LINE + 2, "name middle"))
    return figure.figure(title, " ".join(said), content, height=bottom + 2 * LINE + 12)


def _note(row: Interval) -> str:
    return row.note or f"{row.middle:+.3g} ({row.low:+.3g} to {row.high:+.3g})"


def _room(texts: Sequence[str], least: float, most: float) -> float:
    """For the longest of some texts."""
    return min(most, max([least, *(LETTER * len(one) for one in texts)]))


def _cut(content: str, room: float) -> str:
    """A text that fits, its beginning where it is too long."""
    letters = int(room / LETTER)
    return content if len(content) <= letters else f"{content[: letters - 1]}…"


def _interval(row: Interval, middle: float, across: Scale) -> list[Html]:
    """The bar of a row of a plot of intervals. middle: its height in the drawing."""
    low, high = across.place(row.low), across.place(row.high)
    bar = f"M{number(low)} {number(middle)}H{number(high)}"
    for end in (low, high):
        bar += f"M{number(end)} {number(middle - 5)}v10"
    return [
        path(bar, f"line {figure.colour(0)}"),
        path(f"M{number(across.place(row.middle))} {number(middle)}h0", f"line points {figure.colour(0)}"),
    ]


def _steps(points: Sequence[Point], across: Scale, up: Scale, is_apart: bool) -> str:
    """The path along some points, anew after each gap. is_apart: each point is a dot, and nothing lies between them."""
    out = []
    is_drawing = False  # whether the point before is there
    for at, (x, y) in enumerate(points):
        if y is None or not _is_drawn(y, up.log) or not math.isfinite(x):
            is_drawing = False
            continue
        place = f"{number(across.place(x))} {number(up.place(y))}"
        if is_apart:
            out.append(f"M{place}h0")
        elif is_drawing:
            out.append(f"L{place}")
        else:
            following = points[at + 1][1] if at + 1 < len(points) else None
            is_alone = following is None or not _is_drawn(following, up.log)
            out.append(f"M{place}h0" if is_alone else f"M{place}")
        is_drawing = True
    return "".join(out)


def _is_drawn(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value >= SMALLEST or not log)


def _said(line: Line, x: str) -> str:
    """A curve in a sentence."""
    there = [(px, py) for px, py in line.points if py is not None and math.isfinite(py) and abs(py) <= LARGEST]
    gaps = len(line.points) - len(there)
    missing = f" {gaps:,} points are no numbers." if gaps else ""
    if not there:
        return f"{line.name}: no points.{missing}"
    (first, begin), (last, end) = there[0], there[-1]
    lowest = min(there, key=lambda point: point[1])
    highest = max(there, key=lambda point: point[1])
    return (
        f"{line.name}: {begin:.4g} at {x} {first:,.6g}, {end:.4g} at {last:,.6g}; "
        f"lowest {lowest[1]:.4g} at {lowest[0]:,.6g}, highest {highest[1]:.4g} at {highest[0]:,.6g}.{missing}"
    )


def _said_mark(mark: Mark, x: str) -> str:
    """A mark in a sentence. x: what the axis counts."""
    places = [] if mark.x is None else [f"{x} {mark.x:,.6g}"]
    places += [] if mark.y is None else [f"{mark.y:,.6g}"]
    return f"{mark.name}: {', '.join(places)}."

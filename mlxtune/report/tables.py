"""Tables, folded parts and boxed lines of a page."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

from mlxtune.report.html import Child, Html, tag
from mlxtune.report.secrets import masked

Kind = Literal["good", "bad", "neutral", "warning"]

# What a boxed line is, said by a sign and a word: colours are not seen by everyone, nor printed.
SIGNS: dict[Kind, tuple[str, str]] = {
    "good": ("✓", "Good"),
    "bad": ("✗", "Bad"),
    "warning": ("!", "Warning"),
    "neutral": ("•", "Note"),
}


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Child]], numbers: Collection[int] = ()) -> Html:
    """A table whose first column names its rows.

    numbers: the columns (from 0) that hold numbers, which stand to the right. Raises ValueError for a row with another
    number of cells than there are columns.
    """
    head = [tag("th", name, scope="col", class_=_aligned(at, numbers)) for at, name in enumerate(columns)]
    body = []
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells under {len(columns)} columns")
        cells = [tag("td", cell, class_=_aligned(at, numbers)) for at, cell in enumerate(row)]
        cells[0] = tag("th", row[0], scope="row", class_=_aligned(0, numbers))
        body.append(tag("tr", cells))
    return _scrolled(caption, tag("table", tag("caption", caption), tag("thead", tag("tr", head)), tag("tbody", body)))


def facts(caption: str, values: Mapping[str, Child]) -> Html:
    """A table of names and their values."""
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in values.items()]
    return _scrolled(caption, tag("table", tag("caption", caption), tag("tbody", rows), class_="facts"))


def folded(summary: str, *children: Child, is_open: bool = False) -> Html:
    """A part that opens when its summary is clicked; without a script."""
    return tag("details", tag("summary", summary), *children, open=is_open)


def callout(kind: Kind, *children: Child) -> Html:
    """A boxed line. What it says may repeat what others wrote (a damaged file, a note): its texts are masked."""
    sign, word = SIGNS[kind]
    mark = tag("span", sign, class_="sign", aria_hidden="true")
    return tag(
        "div",
        mark,
        tag("strong", f"{word}: ", class_="word"),
        tag("div", *map(_masked, children)),
        class_=f"callout {kind}",
    )


def _masked(child: Child) -> Child:
    if child is None or isinstance(child, Html):
        return child
    return masked(child) if isinstance(child, str) else [_masked(one) for one in child]


def _aligned(column: int, numbers: Collection[int]) -> str | None:
    return "number" if column in numbers else None


def _scrolled(caption: str, content: Html) -> Html:
    """A wide table scrolls by itself on a narrow screen, by the keyboard too."""
    return tag("div", content, class_="scrolled", role="group", aria_label=caption, tabindex=0)

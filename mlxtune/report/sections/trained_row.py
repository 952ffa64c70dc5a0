"""A row as it is trained on: what the model must produce is underlined, and on a ground of its own."""

from __future__ import annotations

from collections.abc import Sequence

from mlxtune.report.html import Child, Html, joined, tag
from mlxtune.report.secrets import masked
from mlxtune.report.surveyed import ShownExample
from mlxtune.report.tables import folded

LONGEST = 4_000  # characters of an example that are shown
EXAMPLES = 3  # of the row, that are shown
SIGNS = {"chosen": "+", "rejected": "-", "good": "+", "bad": "-"}  # before each side


def row_of(examples: Sequence[ShownExample]) -> Html | None:
    """The examples of one row; None where there are none."""
    if not examples:
        return None
    legend = tag("p", tag("mark", "Underlined"), " is what the model must produce; the rest is what it is given.")
    if any(example.side for example in examples):
        said = " is an answer; the model learns to prefer those with a + to those with a -."
        legend = tag("p", tag("mark", "Underlined"), said)
    more = len(examples) - EXAMPLES
    beyond = tag("p", f"The row gives {more:,} more.", class_="dim") if more > 0 else None
    return joined(tag("h3", "One row as it is trained on"), legend, map(_drawn, examples[:EXAMPLES]), beyond)


def _drawn(example: ShownExample) -> Html:
    ending = ", cut at data.max_tokens" if example.is_shortened else ""
    side = f"{SIGNS[example.side]} {example.side}: " if example.side else ""
    head = f"{side}{masked(example.place)}: {example.tokens:,} tokens, {example.learned:,} trained on{ending}"
    remarks = [tag("li", masked(remark)) for remark in example.remarks]
    texts = [(is_learned, masked(text)) for is_learned, text in example.pieces]
    shown, left = _beginning(texts)
    rest = tag("p", f"{left:,} characters more.", class_="dim") if left else None
    body = joined(tag("div", shown, class_="text"), rest)
    is_long = sum(len(text) for _, text in texts) > LONGEST
    return joined(
        tag("p", tag("strong", head) if example.side else head),
        tag("ul", remarks) if remarks else None,
        folded("The text", body) if is_long else body,
    )


def _beginning(texts: Sequence[tuple[bool, str]]) -> tuple[list[Child], int]:
    """The first LONGEST characters, and how many more there are."""
    room = LONGEST
    shown: list[Child] = []
    for is_learned, text in texts:
        part = text[:room]
        room -= len(part)
        if part:
            shown.append(tag("mark", part) if is_learned else part)
    return shown, sum(len(text) for _, text in texts) - LONGEST + room

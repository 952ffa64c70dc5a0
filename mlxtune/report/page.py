"""A whole page: its head, its sections, and the same as JSON for programs.

The page loads nothing and runs nothing: its policy (Content-Security-Policy) forbids everything but the one style sheet
that it holds, so that even markup which got in by a mistake of ours could not ask the network for anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxtune.report.html import Html, document, raw_style, script_json, tag
from mlxtune.report.style import SHEET, SHEET_HASH

POLICY = f"default-src 'none'; style-src '{SHEET_HASH}'; base-uri 'none'; form-action 'none'"
OURS = tag("meta", name="generator", content="mlxtune")  # by which a page is known as one that may be replaced
FRESH_SECONDS = 2  # how often a served page is read again


@dataclass(frozen=True)
class Section:
    """A part of a page, under a heading of its own."""

    anchor: str  # its name in addresses, one of a page: #curves
    title: str  # its heading
    body: Html  # what stands under it


def page(title: str, lead: Html, sections: Sequence[Section], record: Mapping[str, Any], live: str = "") -> str:
    """A whole HTML document.

    lead: what is said first, under the title; record: all that the page shows, for programs, as JSON under the id
    "record"; live: the token of a served page, which is read again and again; "": a file. Raises ValueError for two
    sections of one name.
    """
    anchors = [section.anchor for section in sections]
    if len(set(anchors)) != len(anchors):
        raise ValueError(f"two sections of one name: {anchors}")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        OURS,
        tag("meta", http_equiv="refresh", content=FRESH_SECONDS) if live else None,
        tag("title", title),
        raw_style(SHEET),
    )
    links = [tag("li", tag("a", section.title, href=f"#{section.anchor}")) for section in sections]
    body = tag(
        "body",
        tag("header", tag("h1", title), tag("div", lead, class_="lead")),
        tag("nav", tag("ul", links), aria_label="Sections") if links else None,
        tag("main", [_drawn(section) for section in sections]),
        script_json("record", record),
    )
    return document(tag("html", head, body, lang="en"))


def _drawn(section: Section) -> Html:
    heading = f"{section.anchor}-title"
    return tag(
        "section", tag("h2", section.title, id=heading), section.body, id=section.anchor, aria_labelledby=heading
    )

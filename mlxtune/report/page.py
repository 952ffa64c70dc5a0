"""A whole page: its head, its sections, and the same as JSON for programs.

The page loads nothing and runs nothing: its policy (Content-Security-Policy) forbids everything but the one style sheet
that it holds, so that even markup which got in by a mistake of ours could not ask the network for anything. A page that
is served on this machine while a run goes on also has one script, which asks the server that it came from for news.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxtune.report.html import Html, document, raw_script, raw_style, script_json, tag
from mlxtune.report.live.script import REFRESH_SECONDS, SCRIPT, SCRIPT_HASH
from mlxtune.report.run_record import values_without_home
from mlxtune.report.secrets import masked_values
from mlxtune.report.style import SHEET, SHEET_HASH

POLICY = f"default-src 'none'; style-src '{SHEET_HASH}'; base-uri 'none'; form-action 'none'"
# An icon of nothing (a data: address), for browsers ask for /favicon.ico otherwise.
LIVE_POLICY = f"{POLICY}; script-src '{SCRIPT_HASH}'; connect-src 'self'; img-src data:"
OURS = tag("meta", name="generator", content="mlxtune")  # by which a page is known as one that may be replaced


@dataclass(frozen=True)
class Section:
    """A part of a page, under a heading of its own."""

    anchor: str  # its name in addresses, one of a page: #curves
    title: str  # its heading
    body: Html  # what stands under it


def page(title: str, lead: Html, sections: Sequence[Section], record: Mapping[str, Any], live: str = "") -> str:
    """A whole HTML document.

    lead: what is said first, under the title; record: all that the page shows, for programs, as JSON under the id
    "record", its secrets and the home folder of who made it hidden; live: the token of a served page, which follows its
    run (`live.script`); "": a file.
    Raises ValueError for two sections of one name.
    """
    anchors = [section.anchor for section in sections]
    if len(set(anchors)) != len(anchors):
        raise ValueError(f"two sections of one name: {anchors}")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=LIVE_POLICY if live else POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        OURS,
        _follows_without_script() if live else None,
        tag("title", title),
        raw_style(SHEET),
    )
    links = [tag("li", tag("a", section.title, href=f"#{section.anchor}")) for section in sections]
    body = tag(
        "body",
        tag("header", tag("h1", title), tag("div", lead, class_="lead")),
        tag("nav", tag("ul", links), aria_label="Sections") if links else None,
        tag("main", _live_line() if live else None, [_drawn(section) for section in sections]),
        script_json("record", masked_values(values_without_home(record))),
        raw_script(SCRIPT) if live else None,
    )
    return document(tag("html", head, body, lang="en"))


def _follows_without_script() -> list[Html]:
    """In the head of a served page: what stands in for the script where there is none."""
    refresh = tag("meta", http_equiv="refresh", content=REFRESH_SECONDS)
    return [tag("link", rel="icon", href="data:,"), tag("noscript", refresh)]


def _live_line() -> Html:
    """Says whether the page follows its run; the script writes it anew, and a screen reader reads that."""
    return tag("p", "This page follows the run.", id="live", role="status", class_="dim")


def _drawn(section: Section) -> Html:
    heading = f"{section.anchor}-title"
    return tag(
        "section", tag("h2", section.title, id=heading), section.body, id=section.anchor, aria_labelledby=heading
    )

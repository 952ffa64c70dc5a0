"""Pages read as programs do: by Python's own parser of HTML, and by html5lib, which knows the standard's faults."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import html5lib

# Attributes by which an element would load something, lead somewhere, or run something; those of scripts begin with on.
LEADING = (
    "href",
    "src",
    "srcset",
    "action",
    "formaction",
    "poster",
    "data",
    "background",
    "xlink:href",
    "ping",
    "style",
)
SVG = re.compile(r"<svg[ >].*?</svg>", re.DOTALL)


@dataclass
class Found(HTMLParser):
    """The elements of a page."""

    tags: list[str] = field(default_factory=list)  # names in their order
    attributes: list[tuple[str, str, str]] = field(default_factory=list)  # element, attribute, value
    texts: list[str] = field(default_factory=list)  # between tags, in their order

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(text: str) -> Found:
    found = Found()
    found.feed(text)
    found.close()
    return found


def faults(text: str) -> list[str]:
    """What the standard calls an error in a page."""
    parser = html5lib.HTMLParser(tree=html5lib.getTreeBuilder("etree"))
    parser.parse(text)
    return [f"{kind} at {place}: {values}" for place, kind, values in parser.errors]


def leads_to(text: str) -> list[str]:
    """Whatever a page would load, follow or run, but for its own parts (#name)."""
    found = read(text)
    out = []
    for element, name, value in found.attributes:
        if (name in LEADING or name.startswith("on")) and not value.startswith("#"):
            out.append(f"{element} {name}={value}")
    out += re.findall(r"url\(|@import", "".join(re.findall("<style>(.*?)</style>", text, re.DOTALL)))
    out += [name for name in found.tags if name in ("iframe", "object", "embed", "base", "form", "link", "img")]
    return out + [one for one in re.findall("<script[^>]*>", text) if 'type="application/json"' not in one]


def record(text: str) -> dict[str, Any]:
    """What the page holds for programs."""
    found: dict[str, Any] = json.loads(
        re.findall(r'<script type="application/json" id="record">(.*?)</script>', text)[0]
    )
    return found


def without_record(text: str) -> str:
    return re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def drawings(text: str) -> list[ElementTree.Element]:
    """The drawings of a page, those of legends left out, as XML."""
    found = [ElementTree.fromstring(one) for one in SVG.findall(without_record(text))]
    return [one for one in found if "drawing" in one.get("class", "")]


def whole(page: str) -> str:
    """The same page, which must be as the standard has it and lead nowhere."""
    assert faults(page) == []
    assert leads_to(page) == []
    return page


def said(page: str) -> str:
    """The text of a page without its markup."""
    text = re.sub("<style>.*?</style>", "", without_record(page), flags=re.DOTALL)
    return " ".join("".join(read(text).texts).split())

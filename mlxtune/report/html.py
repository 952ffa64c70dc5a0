"""Markup, and the one place where it is made: everything that others wrote goes through `escaped` here.

    tag("p", "tokens & ", tag("b", "<script>"), class_="note")
    -> <p class="note">tokens &amp; <b>&lt;script&gt;</b></p>

A str is text, of us or of strangers, and is escaped. An `Html` is markup that this module made, and is put in as it is.
Nobody else calls `Html(...)`: then no row, prompt, answer or file name can become markup, whatever it holds.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from mlxtune_convert.shown import shown

# Characters that HTML has no place for, though UTF-8 can write them; the last two of each of the 17 planes among them.
NO_CHARACTERS = "".join(f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0, 0x110000, 0x10000))
NO_CHARACTER = re.compile(f"[\ufdd0-\ufdef{NO_CHARACTERS}]")
# Inside of a script: what could end it or begin a comment, what HTML has no place for, and what turns texts around.
NOT_IN_JSON = re.compile(
    f"[<>&\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef{NO_CHARACTERS}]"
)
NAME = re.compile("[a-zA-Z][a-zA-Z0-9-]*")
EMPTY = ("br", "col", "hr", "link", "meta", "wbr")  # elements without contents, which are not closed


class Html(str):
    """Markup that is safe as it is. Made by this module alone."""

    __slots__ = ()


# What an element holds: text, markup, nothing, or several of them.
Child: TypeAlias = "str | Html | Iterable[Child] | None"


def tag(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """An element.

    attributes: `class_` is class, and `aria_label` is aria-label; True gives an attribute without a value; None and
    False leave it out. Raises ValueError for a name that is none, and for children of an element that has none.
    """
    written = [_checked(name)]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        attribute = _checked(key.removesuffix("_").replace("_", "-"))
        written.append(attribute if value is True else f'{attribute}="{escaped(str(value))}"')
    begin = f"<{' '.join(written)}>"
    if name in EMPTY:
        if children:
            raise ValueError(f"<{name}> holds nothing")
        return Html(begin)
    return Html(f"{begin}{joined(*children)}</{name}>")


def joined(*children: Child) -> Html:
    """Texts and markup one after the other."""
    return Html("".join(_flat(children)))


def prose(text: str) -> Html:
    """A sentence in which what stands between two backquotes is code: "see `mlxtune eval`"."""
    parts = text.split("`")
    last = len(parts) - 1  # one that opens and is not closed stands as it is
    out: list[Child] = []
    for at, part in enumerate(parts):
        if at % 2 == 0:
            out.append(part)
        else:
            out.append(tag("code", part) if at < last else f"`{part}")
    return joined(out)


def document(root: Html) -> str:
    """A whole document. root: its html element."""
    return f"<!DOCTYPE html>\n{root}\n"


def raw_style(text: str) -> Html:
    """A style sheet of ours, which is no text to be escaped. Raises ValueError where it could end its element."""
    if "<" in text:
        raise ValueError("a style sheet that holds markup")
    return Html(f"<style>{text}</style>")


def raw_script(text: str) -> Html:
    """A script of ours, which is no text to be escaped. Raises ValueError where it could end its element."""
    if "</" in text or "<!--" in text:
        raise ValueError("a script that holds markup")
    return Html(f"<script>{text}</script>")


def script_json(id: str, value: Any) -> Html:
    """A value as JSON that programs find in the page: no browser runs it.

    Numbers that are not finite are null. What JSON need not escape and HTML must is written by number: a text may hold
    "</script>" or "<!--".
    """
    text = json.dumps(for_json(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Html(f'<script type="application/json" id="{escaped(id)}">{NOT_IN_JSON.sub(_by_unit, text)}</script>')


def escaped(text: str) -> str:
    """Text in which nothing is markup, nor an order to a terminal that prints the page."""
    return html.escape(NO_CHARACTER.sub(lambda found: f"\\u{ord(found[0]):04x}", shown(text)))


def _flat(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            yield child
        elif isinstance(child, str):
            yield escaped(child)
        else:
            yield from _flat(child)


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(f"no name of an element or attribute: {name!r}")
    return name


def for_json(value: Any) -> Any:
    """The same value for JSON, which has no NaN and no infinity: None stands for them. Keys become texts."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): for_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(one) for one in value]
    return value


def _by_unit(found: re.Match[str]) -> str:
    """A character as JSON writes it by number: of one beyond U+FFFF its two halves."""
    units = found[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))

"""Template text looked for in what a model wrote: exactly as it is, or with other blanks."""

from __future__ import annotations

import re


def after(literal: str, text: str, exact: bool) -> str | None:
    """What follows template text at the start; None where it is not there."""
    if exact:
        return text.removeprefix(literal) if text.startswith(literal) else None
    before = r"\s*" if literal.strip() else ""
    found = re.match(before + _pattern(literal), text)
    return text[found.end() :] if found else None


def split(literal: str, text: str, exact: bool) -> tuple[str, str] | None:
    """What stands before and after the first place of template text; None where it is not there."""
    if exact:
        before, found, behind = text.partition(literal)
        return (before, behind) if found else None
    match = re.search(_pattern(literal), text)
    return (text[: match.start()], text[match.end() :]) if match else None


def _pattern(literal: str) -> str:
    """A regular expression for template text with other white space, or none."""
    if not literal:
        return ""
    words = literal.split()
    if not words:
        return r"\s*"
    before = r"\s*" if literal[0].isspace() else ""
    behind = r"\s*" if literal[-1].isspace() else ""
    return before + r"\s*".join(map(re.escape, words)) + behind


def begun(text: str, *literals: str) -> int:
    """How many characters at the end of a text may be the beginning of one of some texts, blanks around it or not."""
    longest = 0
    for literal in literals:
        for form in (literal, literal.strip()):
            for size in range(longest + 1, len(form) + 1):
                if text.endswith(form[:size]):
                    longest = size
    return longest


def without_end(text: str, ends: frozenset[str]) -> str:
    """A text without the end token that it ends with, if any, and the blanks behind that."""
    stripped = text.rstrip()
    for end in ends:
        if stripped.endswith(end):
            return stripped.removesuffix(end)
    return text

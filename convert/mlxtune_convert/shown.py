"""Text of other people on a terminal: rows, names, errors, notes, and what a model says.

A terminal obeys control sequences: ESC ] 52 sets the clipboard, ESC [ 2 J clears the screen, a carriage return writes
over the line, bidirectional marks show one text and mean another, and a line break inside a name begins a line that
nobody wrote. Each such character is shown by its number, "\\x1b", so that the eye sees what is there; letters of every
script stay as they are.
"""

from __future__ import annotations

import json
import re
from typing import Any

BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
BREAKS = "\u2028\u2029"  # of lines and paragraphs; no terminal shows them
# Two names that differ by these alone look the same. Not the joiners U+200C and U+200D: scripts and emoji need them.
UNSEEN = "\u180e\u200b\u2060-\u2064\ufeff"
# Halves of characters: a file's name whose bytes are no UTF-8, a \\ud83d alone. No stream takes them.
SURROGATES = "\ud800-\udfff"
CONTROL = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{BIDI}{BREAKS}{SURROGATES}]")  # all but the line feed and the tab
OF_NO_NAME = re.compile(f"[\x00-\x1f\x7f-\x9f{BIDI}{BREAKS}{UNSEEN}{SURROGATES}]")

LONGEST = 1_000  # letters of a line that is said


def shown(text: str) -> str:
    """A text in which nothing commands the terminal. Line feeds and tabs stay."""
    return CONTROL.sub(_by_number, text)


def shown_name(text: object) -> str:
    """The same for what must stay on its line: a name, a place, a reason."""
    return OF_NO_NAME.sub(_by_number, str(text))


def brief(text: str) -> str:
    """A text of LONGEST letters at most, of a longer one its beginning and end: a stranger's name of a megabyte would
    bury what is said of it.
    """
    if len(text) <= LONGEST:
        return text
    gap, end = " ... ", 200
    return text[: LONGEST - len(gap) - end] + gap + text[-end:]


def shown_json(value: Any) -> str:
    """One line of JSON, its letters readable, that means the same value and commands no terminal."""
    text = json.dumps(value, ensure_ascii=False)
    return OF_NO_NAME.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _by_number(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"

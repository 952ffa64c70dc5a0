"""Two texts beside each other, the words that differ marked.

    before   Paris is the capital        <del>Paris is</del> the capital
    after    It is in the capital        <ins>It is in</ins> the capital

A word goes with the space behind it, so that both texts can be read as they stand.
"""

from __future__ import annotations

import re
from collections import Counter
from difflib import SequenceMatcher

from mlxtune.report.html import Child, Html, tag
from mlxtune.report.secrets import masked

_WORDS = re.compile(r"\w+\s*|[^\w\s]\s*|\s+")
LONGEST = 4_000  # characters of one text that are shown
MOST_WORDS = 1_500  # of a text, that are compared: the time goes with the square


def cut(text: str) -> str:
    """The beginning of a text of others, as it is shown. Hidden first: half of a key is no key that anybody finds."""
    hidden = masked(text)
    return hidden if len(hidden) <= LONGEST else f"{hidden[:LONGEST]} [... {len(hidden) - LONGEST:,} characters more]"


def marked(before: str, after: str) -> tuple[Html, Html]:
    """(The first text with its own words in <del>, the second with its own in <ins>)."""
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    of_old: list[Child] = []
    of_new: list[Child] = []
    for kind, old_from, old_to, new_from, new_to in _steps(old, new):
        removed, added = "".join(old[old_from:old_to]), "".join(new[new_from:new_to])
        if kind == "equal":
            of_old.append(removed)
            of_new.append(added)
            continue
        if removed:
            of_old.append(tag("del", removed))
        if added:
            of_new.append(tag("ins", added))
    return tag("div", of_old, class_="text"), tag("div", of_new, class_="text")


def _steps(old: list[str], new: list[str]) -> list[tuple[str, int, int, int, int]]:
    """How the one becomes the other, as difflib says it; of very long texts what follows MOST_WORDS is one step."""
    matcher = SequenceMatcher(None, _stripped(old), _stripped(new), autojunk=False)
    steps: list[tuple[str, int, int, int, int]] = list(matcher.get_opcodes())
    if len(old) > MOST_WORDS or len(new) > MOST_WORDS:
        steps.append(("replace", min(len(old), MOST_WORDS), len(old), min(len(new), MOST_WORDS), len(new)))
    return steps


def _stripped(words: list[str]) -> list[str]:
    """The words that are compared, without the space behind them."""
    return [word.strip() for word in words[:MOST_WORDS]]


def change(before: str, after: str) -> float:
    """How far two texts differ, from 0 to 1: the share of their words that the other does not have, whatever their
    order. Quick, for it is asked of every answer.
    """
    old, new = Counter(before.split()), Counter(after.split())
    total = old.total() + new.total()
    return 1 - 2 * (old & new).total() / total if total else 0.0

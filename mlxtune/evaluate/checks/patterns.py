"""Checks by a regular expression. A pattern may take years on an unlucky text, so each search has a time limit.

The `regex` package searches, which reads what Python's own `re` reads and can stop in the middle.
"""

from __future__ import annotations

from typing import Any

import regex

from mlxtune.evaluate.checks.arguments import Arguments, CheckError, Kind, Place
from mlxtune.evaluate.checks.check import Rule, Score, SuiteRow
from mlxtune.evaluate.engines.request import Answer

SECONDS = 1.0  # that one search may take
TOO_SLOW = f"took longer than {SECONDS:g} s to search: counted as failed"


class TooSlow(Exception):
    """A search did not end in time."""


def compiled(pattern: str) -> Any:
    """Raises CheckError for what is no pattern."""
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise CheckError(f"{pattern[:80]!r} is not a regular expression ({error})") from error


def found(pattern: Any, text: str, whole: bool = False) -> bool:
    """Whether a compiled pattern is in a text, or is all of it. Raises TooSlow."""
    try:
        search = pattern.fullmatch if whole else pattern.search
        return search(text, timeout=SECONDS, concurrent=False) is not None
    except TimeoutError as error:
        raise TooSlow from error


def _regex(arguments: Arguments, place: Place) -> Rule:
    """Each pattern is somewhere in the answer; with `full` it is all of it."""
    return _rule(arguments, wanted=True)


def _not_regex(arguments: Arguments, place: Place) -> Rule:
    """No pattern is in the answer."""
    return _rule(arguments, wanted=False)


def _rule(arguments: Arguments, wanted: bool) -> Rule:
    patterns = [compiled(text) for text in arguments.texts(arguments.kind)]
    full = arguments.flag("full")

    def judge(answer: Answer, row: SuiteRow) -> Score:
        text = answer.text.strip() if full else answer.text
        try:
            return float(all(found(pattern, text, full) == wanted for pattern in patterns))
        except TooSlow:
            arguments.notes[TOO_SLOW] += 1
            return 0.0

    return Rule(judge)


KINDS = {"regex": Kind(_regex, ("full",)), "not_regex": Kind(_not_regex, ("full",))}

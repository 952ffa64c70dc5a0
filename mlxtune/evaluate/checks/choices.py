"""Which of several options an answer chooses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlxtune.evaluate.checks.arguments import Arguments, CheckError, Kind, Place
from mlxtune.evaluate.checks.check import Meanings, Rule, Score, SuiteRow
from mlxtune.evaluate.checks.words import plain
from mlxtune.evaluate.engines.request import Answer

LETTERS = "ABCDEFGHIJ"  # of options that are given as a list, or as a question prints them
# "answer is B", "Answer: (B)", "choose **B**", "correct option is B", \boxed{B}
_STATED = r"(?:answer|choice|option|choose|pick|select)(?:\s+(?:is|would be|must be|option))*\s*:?\s*[\s*_\"'`(\[]*"
_IN_QUESTION = re.compile(r"^[ \t]*\(?([A-J])[).:][ \t]+(\S.*)$", re.MULTILINE)  # "B) Paris" on a line of its own


def chosen(text: str, options: Mapping[str, str]) -> str:
    """The letter that an answer chooses, the last where it names several; "" for none.

    options: letter -> its text, "" where it is not known. Looked for in this order: the answer is a letter, or begins
    as an option does ("B) Paris"); a letter behind "the answer is"; the answer is the text of one option, or names the
    text of one alone; a letter that stands by itself.
    """
    text = plain(text).replace("\\boxed{", " answer: ").replace("\\text{", "")
    letters = "".join(options)
    alone = re.fullmatch(rf"[\s*_\"'`(\[]*([{letters}])(?:[\s*_\"'`).:\]}}]*|[).:]\s.*)", text)
    if alone:
        return alone[1]
    stated = re.findall(rf"(?i:{_STATED})([{letters}])(?![\w'’])(?!\s+[a-z])", text)
    stated = stated or re.findall(rf"(?i:{_STATED})([{letters}])(?![\w'’])", text)
    if stated:
        return str(stated[-1])
    named = _named(text, options)
    if named:
        return named
    # "A" and "I" are words of English as well: they count where no small letter follows, as in "A dog", "I think".
    standing = re.findall(rf"(?<![\w'’])([{letters}])(?![\w'’])(?!\s+[a-z])", text)
    return str(standing[-1]) if standing else ""


def _named(text: str, options: Mapping[str, str]) -> str:
    """The letter of the only option whose text is in an answer; "" where it is none, or several."""
    found = []
    for letter, option in options.items():
        if option and re.search(rf"(?<!\w){re.escape(plain(option).casefold())}(?!\w)", text.casefold()):
            found.append((letter, plain(option)))
    # An option that is part of another one that is named: "Paris" in "Paris, Texas".
    longest = [one for one in found if not any(one[1] != other[1] and one[1] in other[1] for other in found)]
    return longest[0][0] if len(longest) == 1 else ""


def _choice(arguments: Arguments, place: Place) -> Rule:
    """The answer chooses the option: its letter or its text. `options` are a list, or letter: text; else they are read
    out of the question's lines such as "B) Paris".
    """
    given = arguments.text("choice") if arguments.has("choice") else ""
    fixed = _options_given(arguments.given.get("options"))
    if given and fixed and not _letter_of(given, fixed):
        raise CheckError(f"choice is {given!r}, which is none of the options", f"Options: {', '.join(fixed)}.")

    def judge(answer: Answer, row: SuiteRow) -> Score:
        options = fixed or _options_in(row)
        expected = given or row.reference or ""
        right = _letter_of(expected, options) or chosen(expected, options)
        if not right:
            return None
        return float(chosen(answer.text, options) == right)

    def meanings(answer: Answer, row: SuiteRow) -> Meanings:
        letter = chosen(answer.text, fixed or _options_in(row))
        return frozenset([letter] if letter else [])

    return Rule(judge, of_reference=not given, meanings=meanings)


def _options_given(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, list) and 2 <= len(value) <= len(LETTERS):
        value = dict(zip(LETTERS, value, strict=False))
    good = isinstance(value, dict) and len(value) > 1
    if not good or not all(isinstance(text, str) and len(key) == 1 and key in LETTERS for key, text in value.items()):
        raise CheckError(
            "options must be a list of texts, or letter: text", f"2 to {len(LETTERS)} of them; letters {LETTERS}."
        )
    return dict(value)


def _options_in(row: SuiteRow) -> dict[str, str]:
    """Those that the last question prints; the letters A to D without texts where it prints none."""
    question = next((str(one["content"]) for one in reversed(row.messages) if one["role"] == "user"), "")
    printed = {letter: text.strip() for letter, text in _IN_QUESTION.findall(question)}
    return printed if len(printed) > 1 else dict.fromkeys(LETTERS[:4], "")


def _letter_of(expected: str, options: Mapping[str, str]) -> str:
    """The letter that is meant by a letter, or by the text of an option."""
    if expected in options:
        return expected
    for letter, text in options.items():
        if text and plain(text).casefold() == plain(expected).casefold():
            return letter
    return ""


KINDS = {"choice": Kind(_choice, ("options",))}

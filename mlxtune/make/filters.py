"""Which instructions are worth an answer, and which examples of one are worth training on: rules, no model.

Those of Self-Instruct (Wang et al. 2022, arXiv:2212.10560, and its code), without what makes them English only: words
are counted in every script, a first letter may be any script's, and what cannot be done is listed by language.

To add a filter, write a function, give it a code in INSTRUCTION or EXAMPLE, and explain the code in `reasons.REASONS`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlxtune.evaluate.checks.languages import language_of
from mlxtune.evaluate.checks.words import plain, words_of
from mlxtune.make.blacklist import asks_for_program, blacklisted
from mlxtune.make.seeds import Example

OPENING = "¿¡«„“‘「『《"  # marks that a sentence may begin with, outside of ASCII
ENDING = (":", "：")  # of a text that announces more


@dataclass(frozen=True)
class Limits:
    """What an instruction must keep to."""

    # Words that it has at least.
    fewest: int = 4
    # Words that it has at most.
    most: int = 150
    # Whether the blacklist counts.
    has_blacklist: bool = True
    # ISO 639-1 codes of the seeds' languages; the instruction's own counts too.
    languages: frozenset[str] = frozenset({"en"})

    def languages_of(self, text: str) -> frozenset[str]:
        return self.languages | {language_of(text)}


def _too_short(text: str, limits: Limits) -> str | None:
    count = len(words_of(text))
    return f"words: {count}" if count < limits.fewest else None


def _too_long(text: str, limits: Limits) -> str | None:
    count = len(words_of(text))
    return f"words: {count}" if count > limits.most else None


def _first_character(text: str, limits: Limits) -> str | None:
    """ "Écris" and "¿Qué" begin well; "- write" and "(a)" do not."""
    first = text.lstrip()[:1]
    if not first or first in OPENING or unicodedata.category(first)[0] in "LN":
        return None
    return first


def _blacklisted(text: str, limits: Limits) -> str | None:
    if not limits.has_blacklist:
        return None
    return blacklisted(words_of(text), limits.languages_of(text)) or None


def _program(text: str, limits: Limits) -> str | None:
    return "" if asks_for_program(words_of(text), limits.languages_of(text)) else None


# Code -> what is wrong with an instruction, in words or ""; None: nothing. In this order.
INSTRUCTION: dict[str, Callable[[str, Limits], str | None]] = {
    "too short": _too_short,
    "too long": _too_long,
    "first character": _first_character,
    "blacklisted": _blacklisted,
    "program": _program,
}


def wrong_with_instruction(text: str, limits: Limits) -> tuple[str, str] | None:
    """(Code, detail) of the first filter that an instruction does not pass; None where it passes them all."""
    for code, shows in INSTRUCTION.items():
        detail = shows(text, limits)
        if detail is not None:
            return code, detail
    return None


def _empty(example: Example) -> bool:
    return not example.output.strip()


def _copied(example: Example) -> bool:
    return plain(example.input) == plain(example.output)


def _unfinished(example: Example) -> bool:
    return example.input.rstrip().endswith(ENDING) or example.output.rstrip().endswith(ENDING)


# Code -> whether an example has it.
EXAMPLE: dict[str, Callable[[Example], bool]] = {
    "empty": _empty,
    "copied": _copied,
    "unfinished": _unfinished,
}


def sorted_out(
    examples: Sequence[Example], classifies: bool = False
) -> tuple[list[Example], list[tuple[Example, str]]]:
    """(The examples of one instruction that are kept, the others with their codes). classifies: the instruction asks
    for a label, which an example gives to its input.

    One input with two answers says that one of them is wrong, and not which: none of them is kept.
    """
    kept: list[Example] = []
    left: list[tuple[Example, str]] = []
    outputs: dict[str, set[str]] = {}  # of each input
    for example in examples:
        outputs.setdefault(plain(example.input), set()).add(plain(example.output))
    for example in examples:
        code = next((code for code, has in EXAMPLE.items() if has(example)), "")
        if not code and classifies and not example.input:
            code = "no input"
        if not code and example in kept:
            code = "duplicate"
        if not code and example.input and len(outputs[plain(example.input)]) > 1:
            code = "contradiction"
        if code:
            left.append((example, code))
        else:
            kept.append(example)
    return kept, left

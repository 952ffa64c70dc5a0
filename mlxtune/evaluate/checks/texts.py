"""Checks on an answer as a text: what it equals, holds, begins and ends with, how long it is, whether it stopped."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import numpy as np

from mlxtune.evaluate.checks.arguments import Arguments, CheckError, Kind, Place
from mlxtune.evaluate.checks.check import Rule, Score, SuiteRow
from mlxtune.evaluate.checks.words import plain, words_of
from mlxtune.evaluate.engines.request import Answer

LENGTHS = ("words", "characters", "lines", "tokens")  # what an answer's length is counted in
REPEATS = 4  # times that a passage stands in a row before it is a loop
LOOP_WORDS = 12  # that a loop is long at least: "ha ha ha ha" is none
LONGEST_PASSAGE = 60  # words of a passage that is looked for
UNCOUNTED = "is not asked of answers whose tokens nobody counted"  # of a server, or recorded ones
LINE_WORDS = 3  # a line of fewer is no sentence: `}` and `end` may stand often


def against(expected: list[str], is_right: Callable[[str, str], bool], every: bool = True) -> Rule:
    """A rule that holds an answer against texts, or against the row's reference where there are none.

    is_right: of (answer, text); every: it must be so for each text, else for any.
    """

    def judge(answer: Answer, row: SuiteRow) -> Score:
        texts = expected
        if not texts:
            if row.reference is None:
                return None
            texts = [row.reference]
        found = [is_right(answer.text, text) for text in texts]
        return float(all(found) if every else any(found))

    return Rule(judge, of_reference=not expected)


def _exact(arguments: Arguments, place: Place) -> Rule:
    """The answer is one of the texts, or the reference, but for spaces."""
    return against(_given(arguments), lambda answer, text: plain(answer) == plain(text), every=False)


def _iexact(arguments: Arguments, place: Place) -> Rule:
    """As `exact`, whatever letters are capitals."""
    return against(_given(arguments), lambda answer, text: _folded(answer) == _folded(text), every=False)


def _given(arguments: Arguments) -> list[str]:
    """The texts of the main argument; none where it is not given."""
    return arguments.texts(arguments.kind) if arguments.has(arguments.kind) else []


def _folded(text: str) -> str:
    return plain(plain(text).casefold())


def _contains(arguments: Arguments, place: Place) -> Rule:
    """All of the texts are in the answer; with `any` one of them."""
    every = not arguments.flag("any")
    return against(arguments.texts(arguments.kind), lambda answer, text: plain(text) in plain(answer), every)


def _icontains(arguments: Arguments, place: Place) -> Rule:
    """As `contains`, whatever letters are capitals."""
    every = not arguments.flag("any")
    return against(arguments.texts(arguments.kind), lambda answer, text: _folded(text) in _folded(answer), every)


def _not_contains(arguments: Arguments, place: Place) -> Rule:
    """None of the texts is in the answer; with `ignore_case` whatever letters are capitals."""
    same = _folded if arguments.flag("ignore_case") else plain
    return against(arguments.texts(arguments.kind), lambda answer, text: same(text) not in same(answer))


def _starts(arguments: Arguments, place: Place) -> Rule:
    """The answer begins with one of the texts."""
    return against(arguments.texts(arguments.kind), lambda answer, text: plain(answer).startswith(plain(text)), False)


def _ends(arguments: Arguments, place: Place) -> Rule:
    """The answer ends with one of the texts."""
    return against(arguments.texts(arguments.kind), lambda answer, text: plain(answer).endswith(plain(text)), False)


def _length(arguments: Arguments, place: Place) -> Rule:
    """The answer is neither shorter nor longer than its limits."""
    limits: list[tuple[str, int, int | None]] = []
    for unit in LENGTHS:
        least, most = f"min_{unit}", f"max_{unit}"
        if arguments.has(least) or arguments.has(most):
            smallest = arguments.whole(least, 0)
            largest = arguments.whole(most) if arguments.has(most) else None
            if largest is not None and largest < smallest:
                raise CheckError(f"{most} is {largest}, which is less than {least} {smallest}")
            limits.append((unit, smallest, largest))
    if not limits:
        raise CheckError("no limit is given", f"Allowed: min_ and max_ of {', '.join(LENGTHS)}.")

    of_tokens = any(unit == "tokens" for unit, _, _ in limits)

    def judge(answer: Answer, row: SuiteRow) -> Score:
        if of_tokens and not answer.tokens and answer.text:
            # Also where another limit fails: else the answers that are counted would be those that fail.
            arguments.notes[UNCOUNTED] += 1
            return None
        for unit, smallest, largest in limits:
            count = length_in(unit, answer)
            if count < smallest or (largest is not None and count > largest):
                return 0.0
        return 1.0

    return Rule(judge, of_data=not of_tokens)


def length_in(unit: str, answer: Answer) -> int:
    """An answer's length; unit: of LENGTHS. Empty lines are not counted, nor is space around the text."""
    text = unicodedata.normalize("NFC", answer.text).strip()
    if unit == "tokens":
        return answer.tokens
    if unit == "words":
        return len(words_of(text))
    if unit == "lines":
        return sum(1 for line in text.splitlines() if line.strip())
    return len(text)


def _ended(arguments: Arguments, place: Place) -> Rule:
    """The model ended its answer itself: it was not cut."""
    return Rule(lambda answer, row: float(answer.finish == "stop"), of_data=False)


def _no_repeat(arguments: Arguments, place: Place) -> Rule:
    """No passage stands four times in a row, and most lines stand there once."""
    return Rule(lambda answer, row: float(not repeats(answer.text)))


def repeats(text: str) -> bool:
    """Whether a passage stands REPEATS times in a row, or whether most lines stand there already.

    A passage of p words that is repeated shows in this: each word equals the one p words before it, over (REPEATS - 1)
    times p words at a stretch. In "go to it go to it go to it go to it" p is 3 and the stretch 9.
    """
    names: dict[str, int] = {}
    numbers = np.array([names.setdefault(word, len(names)) for word in words_of(text)])
    for length in range(1, min(LONGEST_PASSAGE, len(numbers) // REPEATS) + 1):
        needed = max((REPEATS - 1) * length, LOOP_WORDS - length)
        if _longest_run(numbers[length:] == numbers[:-length]) >= needed:
            return True
    lines = [line for line in map(plain, text.splitlines()) if len(words_of(line)) >= LINE_WORDS]
    return len(lines) >= 2 * REPEATS and len(set(lines)) < len(lines) / 2


def _longest_run(same: np.ndarray) -> int:
    """How many True stand in a row at most. same: [N]"""
    borders = np.flatnonzero(np.diff(np.concatenate(([0], same.view(np.int8), [0]))))
    return int((borders[1::2] - borders[::2]).max(initial=0))


KINDS = {
    "exact": Kind(_exact),
    "iexact": Kind(_iexact),
    "contains": Kind(_contains, ("any",)),
    "icontains": Kind(_icontains, ("any",)),
    "not_contains": Kind(_not_contains, ("ignore_case",)),
    "starts": Kind(_starts),
    "ends": Kind(_ends),
    "length": Kind(_length, tuple(f"{end}_{unit}" for unit in LENGTHS for end in ("min", "max")), has_main=False),
    "ended": Kind(_ended, has_main=False),
    "no_repeat": Kind(_no_repeat, has_main=False),
}

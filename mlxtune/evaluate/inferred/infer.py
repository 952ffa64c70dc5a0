"""Which checks a suite should have, told from the answers that a model learns.

    nearly all answers are JSON             schema: types, keys, and the values of fields that have few
    one of some labels                      choice between them, and a length (exact, where they are more than ten)
    a number, or end in one (#### 42)       number, and a length
    call tools                              tool_call
    anything else                           ended, no_repeat, and a length

Every check is then asked of the answers that it was inferred from. Up to 5% may fail: they are named, for they are
either wrong rows or the reason to loosen a check by hand. A check that more fail is not made.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxtune.evaluate.checks.arguments import CheckError, Place
from mlxtune.evaluate.checks.check import Check, SuiteRow
from mlxtune.evaluate.checks.choices import LETTERS, chosen
from mlxtune.evaluate.checks.json_texts import NotJson, find_json, read_json
from mlxtune.evaluate.checks.kinds import read_checks
from mlxtune.evaluate.checks.numbers import marked, numbers_in
from mlxtune.evaluate.checks.sandbox.sandbox import Programs
from mlxtune.evaluate.checks.words import plain, without_thought, words_of
from mlxtune.evaluate.engines.request import Answer
from mlxtune.evaluate.inferred.shape import FEWEST, MOST_VALUES, oddities, schema_of

ODD = 0.05  # of the answers, that checks may refuse
LABEL_WORDS = 6  # of a label, at most
NUMBER_WORDS = 4  # of an answer that is a number and little more; 1,234.50 are three
BESIDE = 2  # of these, that are no part of the number: "about 12 kg"
MARK = re.compile(r"#{4}\s*\S|\\boxed\{")  # an answer that says where its number is
ROOM, MORE_ROOM = 1.5, 3.0  # times the words of a long answer, that an answer may have; where few answers are known
LONG = 0.99  # of the answers have at most as many words as a long one
Written = str | dict[str, Any]  # a check as a suite has it


@dataclass(frozen=True)
class Inferred:
    """Checks for all rows of a suite."""

    kind: str  # json, choice, number or text: what the answers are
    checks: list[Written]  # in the form of suites
    not_accepted: list[tuple[int, str]] = field(default_factory=list)  # (place of an answer, why), at most 5% of them
    said: str = ""  # what was found, as a sentence


def infer(answers: Sequence[str], prompts: Sequence[Sequence[Mapping[str, Any]]] = ()) -> Inferred:
    """Checks for answers like these. prompts: the messages before each answer; where there are none, what a question
    prints is not known.
    """
    texts = [without_thought(answer).strip() for answer in answers]
    asked = [list(map(dict, messages)) for messages in prompts] or [[] for _ in texts]
    for way in (_json, _labels, _numbers):
        found = way(texts, asked)
        if found is not None:
            return found
    return _free(texts, asked)


def _json(texts: list[str], asked: list[Any]) -> Inferred | None:
    """JSON as a whole, or in the only fenced block of an answer."""
    for loose, read in ((False, read_json), (True, _fenced)):
        values: dict[int, Any] = {}  # place of an answer -> its value
        failed = []
        for place, text in enumerate(texts):
            try:
                values[place] = read(text)
            except NotJson as error:
                failed.append((place, f"is no JSON: {error}"[:120]))
        kept = {place: value for place, value in values.items() if isinstance(value, dict | list)}
        failed += [(place, "is no object and no list") for place in values.keys() - kept.keys()]
        if not kept or len(failed) > ODD * len(texts):
            continue
        places = list(kept)
        odd: dict[int, str] = dict(failed)
        for number, why in oddities(list(kept.values())):
            if places[number] not in odd and len(odd) + 1 <= ODD * len(texts):
                odd[places[number]] = why
        schema = schema_of([value for place, value in kept.items() if place not in odd])
        check: Written = {"schema": schema, "loose": True} if loose else {"schema": schema}
        form = "JSON in a fenced block" if loose else "JSON"
        for checks in ([check], [{"json": {"loose": True}} if loose else "json"]):
            found = _asked_of(texts, asked, checks, odd)
            if found is not None:
                return Inferred("json", checks, found, f"{len(kept):,} of {len(texts):,} answers are {form}")
    return None


def _fenced(text: str) -> Any:
    """The JSON of an answer that is one fenced block. Raises NotJson."""
    if not text.startswith("```"):
        raise NotJson("it begins with no fenced block")
    return find_json(text)


def _labels(texts: list[str], asked: list[Any]) -> Inferred | None:
    """One of some labels, each of which is there more than once, as a rule."""
    times = Counter(plain(text) for text in texts)
    likely = [text for text, count in times.items() if count > 1 and text and len(words_of(text)) <= LABEL_WORDS]
    rare = {place: "is no label that others have" for place, text in enumerate(texts) if plain(text) not in likely}
    few_new = len(rare) <= ODD * len(texts) and len(likely) <= MOST_VALUES
    if len(texts) < FEWEST or not few_new or len(likely) < 2 or all(_is_bare_number(text) for text in likely):
        return None
    said = f"the answers are one of {len(likely)} labels"
    short: Written = {"length": {"min_words": 1, "max_words": max(1, *(len(words_of(text)) for text in likely))}}
    ways: list[list[Written]] = []
    if all(text in LETTERS for text in likely) and all(asked):
        ways.append(["choice", short])  # which reads the options out of the questions
    options = _options(likely)
    if options:
        ways.append([{"choice": {"options": options}}, short])
    ways.append(["exact"])
    for checks in ways:
        if _tells_apart(checks, likely) and (found := _asked_of(texts, asked, checks, rare)) is not None:
            return Inferred("choice", checks, found, said)
    return None


def _options(labels: list[str]) -> list[str] | dict[str, str]:
    """Labels as the check `choice` takes them; empty: it cannot tell them apart."""
    ordered = sorted(labels)
    if len(ordered) > len(LETTERS):
        return []
    options = dict(zip(LETTERS, ordered, strict=False))
    if all(label in LETTERS for label in ordered):  # answers to questions that print their options
        return {label: label for label in ordered}
    good = all(chosen(label, options) == letter for letter, label in options.items())
    return ordered if good else []


def _tells_apart(checks: list[Written], labels: list[str]) -> bool:
    """Whether the checks refuse each label where another one is right."""
    made = _made(checks)
    if made is None:
        return False
    for label in labels:
        for other in labels:
            row = SuiteRow("0", [], reference=label)
            passed = all(check.score(_answer(other), row) == 1.0 for check in made)
            if passed != (other == label):
                return False
    return True


def _numbers(texts: list[str], asked: list[Any]) -> Inferred | None:
    """A number and little more, or an answer that marks the number that it comes to."""
    without = {}
    for place, text in enumerate(texts):
        if not (_is_number(text) or (MARK.search(text) and numbers_in(marked(text)))):
            without[place] = "comes to no number"
    if not texts or len(without) > ODD * len(texts):
        return None
    most = _most_words(texts)
    found = _asked_of(texts, asked, ["number", {"length": {"min_words": 1, "max_words": most}}], without)
    if found is None:
        return None
    checks: list[Written] = ["number", {"length": {"min_words": 1, "max_words": most}}]
    return Inferred("number", checks, found, "the answers come to a number")


def _is_number(text: str) -> bool:
    """One number and little beside it: "about 12 kg", but not "See page 12 there"."""
    words = words_of(text)
    beside = [word for word in words if not any(map(str.isdigit, word))]
    return len(words) <= NUMBER_WORDS and len(beside) <= BESIDE and len(numbers_in(text)) == 1


def _is_bare_number(text: str) -> bool:
    """A number without a word: "class 3" is a label."""
    return _is_number(text) and not any(map(str.isalpha, text))


def _free(texts: list[str], asked: list[Any]) -> Inferred:
    """What holds of any answer."""
    checks: list[Written] = ["ended", "no_repeat"]
    if texts:
        checks.append({"length": {"min_words": 1, "max_words": _most_words(texts)}})
    kept: list[Written] = []
    for check in checks:
        if _asked_of(texts, asked, [*kept, check], {}) is not None:
            kept.append(check)
    return Inferred("text", kept, _asked_of(texts, asked, kept, {}) or [], "the answers have no common form")


def _most_words(texts: Sequence[str]) -> int:
    """Words that an answer may have: some more than a long one has, and easily read. texts: at least one."""
    counts = sorted(len(words_of(text)) for text in texts)
    room = ROOM if len(texts) >= FEWEST else MORE_ROOM
    most = max(room * counts[math.ceil(LONG * len(counts)) - 1], 5)
    grain = 10 ** max(0, len(str(int(most))) - 2) * 5
    return math.ceil(most / grain) * grain


def that_fit(checks: Sequence[Written], reference: str, messages: Sequence[dict[str, Any]]) -> list[Written]:
    """Those of some checks that a row can have: what compares an answer with the reference must find there what it
    looks for, such as a number. messages: before the answer.
    """
    row = SuiteRow("", list(messages), reference=without_thought(reference))
    fit = []
    for written in checks:
        made = _made([written])
        if made and not (made[0].rule.of_reference and made[0].score(_answer(row.reference or ""), row) is None):
            fit.append(written)
    return fit


def _asked_of(
    texts: Sequence[str], asked: Sequence[Any], checks: list[Written], odd: Mapping[int, str]
) -> list[tuple[int, str]] | None:
    """The answers that the checks refuse, with why; None: they are too many, or a check cannot be made. odd: those that
    are known to be strange, and why.
    """
    made = _made(checks)
    if made is None:
        return None
    refused = []
    for place, text in enumerate(texts):
        row = SuiteRow(str(place), asked[place], reference=text)
        failed = [check.name for check in made if check.rule.of_data and check.score(_answer(text), row) != 1.0]
        if failed:
            refused.append((place, odd.get(place) or f"does not pass {', '.join(failed)}"))
    return refused if len(refused) <= ODD * len(texts) else None


def _made(checks: list[Written]) -> list[Check] | None:
    try:
        return read_checks(checks, Place(Path(), Programs()), [], {})
    except CheckError:
        return None


def _answer(text: str) -> Answer:
    """A training answer, as if a model had given it."""
    return Answer("", 0, text, "", "stop", 0)

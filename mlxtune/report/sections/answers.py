"""Answers before and after side by side, the most changed first, with what each check says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxtune_convert.files import json_text

from mlxtune.evaluate.comparison.folder import Prompt
from mlxtune.evaluate.comparison.scores import SIDES, PromptScores
from mlxtune.evaluate.engines.request import Answer
from mlxtune.evaluate.turns import OWN_ANSWER
from mlxtune.report.evaluations import Evaluated
from mlxtune.report.html import Child, Html, joined, tag
from mlxtune.report.page import Section
from mlxtune.report.secrets import masked
from mlxtune.report.sections.one_by_one import counted, names_of, one_by_one
from mlxtune.report.sections.words import change, marked
from mlxtune.report.tables import folded

MOST = 20  # prompts that are shown of an evaluation
OPEN = 5  # of these, that are shown without being asked for
LONG = 1_200  # characters of a pair of answers, beyond which it is folded
LONGEST = 4_000  # characters of one text that are shown


def section(evaluations: Sequence[Evaluated]) -> Section | None:
    body = one_by_one(evaluations, _drawn)
    return None if body is None else Section("answers", "Answers", body)


def _drawn(evaluation: Evaluated) -> Html | None:
    """None where nobody wrote an answer: benchmarks ask how likely a given one is."""
    if "benchmarks" in evaluation.summary or not evaluation.answers:
        return None
    pairs = []
    for prompt in evaluation.prompts.values():
        before, after = evaluation.answers.get(("base", prompt.id)), evaluation.answers.get(("tuned", prompt.id))
        if before:
            pairs.append((prompt, before, after or []))
    if not pairs:
        return None
    ordered = sorted(pairs, key=lambda pair: -_changed(pair[1], pair[2]))  # of equal ones in the suite's order
    scores: dict[str, list[PromptScores]] = {}
    for one in evaluation.scores:
        scores.setdefault(one.id, []).append(one)
    names = names_of(evaluation.summary)
    shown = []
    for prompt, before, after in ordered[:MOST]:
        asked = _asked(prompt, _own_answers(evaluation, prompt, names))
        shown.append(_pair(prompt, asked, before, after, scores.get(prompt.id, []), names))
    first, others = shown[:OPEN], shown[OPEN:]
    more = folded(counted(len(others), "more prompt"), *others) if others else None
    return joined(tag("p", _said(pairs, len(shown)), class_="dim"), first, more)


def _changed(before: Sequence[Answer], after: Sequence[Answer]) -> float:
    return change(before[0].text, after[0].text) if after else 0.0


def _said(pairs: Sequence[tuple[Prompt, Sequence[Answer], Sequence[Answer]]], shown: int) -> str:
    """How many there are, and which of them these are."""
    if not pairs[0][2]:
        return f"{shown} of {len(pairs)} prompts, in the order of the suite; one model alone was asked."
    same = sum(_changed(before, after) == 0 for _, before, after in pairs)
    said = (
        f"{shown} of {len(pairs)} prompts, the most changed answers first; {same} of all answers have the same words."
    )
    if len(pairs[0][1]) > 1:
        said += f" Of the {len(pairs[0][1])} answers to each prompt the first is shown; the checks look at all."
    return said


def _pair(
    prompt: Prompt,
    asked: Html,
    before: Sequence[Answer],
    after: Sequence[Answer],
    scores: Sequence[PromptScores],
    names: tuple[str, str],
) -> Html:
    old, new = _text(before[0]), _text(after[0]) if after else ""
    if after:
        of_old, of_new = marked(old, new)
    else:
        of_old, of_new = tag("div", old, class_="text"), None
    sides: list[Child] = [tag("div", tag("h4", names[0]), of_old, _end(before[0]))]
    if of_new is not None:
        sides.append(tag("div", tag("h4", names[1]), of_new, _end(after[0])))
    beside = [tag("div", sides, class_="pair")]
    if prompt.reference:
        beside.append(folded("The reference", tag("div", _cut(masked(prompt.reference)), class_="text")))
    is_long = len(old) + len(new) > LONG
    return tag(
        "article",
        tag("h3", f"Prompt {masked(prompt.id)}"),
        asked,
        _marks(scores, names),
        folded(f"Both answers ({len(old) + len(new):,} characters)", *beside) if is_long else beside,
        class_="answers",
    )


def _own_answers(evaluation: Evaluated, prompt: Prompt, names: tuple[str, str]) -> list[list[tuple[str, str]]]:
    """(Which side, its answer) for each earlier turn that a prompt of `--turns replay` follows, the first turn first:
    what stands in its messages as OWN_ANSWER. Of several samples the first one's, as of the answers that are shown.
    """
    earlier: list[str] = []
    id = prompt.follows
    while id is not None and id not in earlier:  # a file that was changed by hand may lead in a circle
        earlier.insert(0, id)
        before = evaluation.prompts.get(id)
        id = before.follows if before is not None else None
    said = []
    for id in earlier:
        of_sides = []
        for side, name in zip(SIDES, names, strict=True):
            given = evaluation.answers.get((side, id))
            if given:
                of_sides.append((name, given[0].text))
        said.append(of_sides)
    return said


def _asked(prompt: Prompt, own: Sequence[Sequence[tuple[str, str]]]) -> Html:
    """The last message; what came before it is folded. own: as `_own_answers` gives it."""
    *earlier, last = prompt.messages or [{}]
    lines = [tag("div", _cut(masked(_content(last))), class_="text asked")]
    if earlier:
        said, answers = [], iter(own)
        for one in earlier:
            who, content = masked(str(one.get("role"))), _content(one)
            is_own = one.get("role") == "assistant" and content == OWN_ANSWER
            answered = next(answers, ()) if is_own else ()
            for name, text in answered:
                said.append(tag("p", tag("strong", f"{who} ({name})"), ": ", _cut(masked(text))))
            if not answered:
                said.append(tag("p", tag("strong", who), ": ", _cut(masked(content))))
        lines.append(folded(counted(len(earlier), "earlier message"), *said))
    return joined(*lines)


def _content(message: dict[str, Any]) -> str:
    """What a message says, and which tools it calls."""
    parts = [str(message["content"])] if message.get("content") else []
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            arguments = function.get("arguments")
            given = arguments if isinstance(arguments, str) else json_text(arguments)
            parts.append(f"[calls {function.get('name')}: {given}]")
    return "\n".join(parts)


def _text(answer: Answer) -> str:
    """As it is shown: secrets are hidden before anything is cut, for half of a key is no key that can be found."""
    return _cut(masked(answer.text))


def _cut(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} [... {len(text) - LONGEST:,} characters more]"


def _end(answer: Answer) -> Html | None:
    """What the text alone does not show."""
    said = []
    if not answer.text.strip():
        said.append("an empty answer")
    if answer.finish == "length":
        said.append("cut: the model had not ended it")
    return tag("p", "; ".join(said), class_="dim") if said else None


def _marks(scores: Sequence[PromptScores], names: tuple[str, str]) -> Html | None:
    """What each check says of both answers, by a sign and a word."""
    items = []
    for one in scores:
        parts: list[Child] = [tag("code", masked(one.check)), f": {names[0]} ", _mark(one, one.base)]
        if one.tuned is not None:
            parts += [f", {names[1]} ", _mark(one, one.tuned)]
        items.append(tag("li", parts))
    return tag("ul", items, class_="marks") if items else None


def _mark(score: PromptScores, values: Sequence[float]) -> Html:
    mean = sum(values) / len(values)
    if score.graded:
        return tag("span", f"{mean:.3f}")
    if mean == 1:
        return tag("span", "✓ passes", class_="good-text")
    if mean == 0:
        return tag("span", "✗ fails", class_="bad-text")
    return tag("span", f"passes {sum(values):g} of {len(values)} times")

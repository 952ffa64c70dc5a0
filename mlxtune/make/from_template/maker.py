"""The maker `from-template`: templates and values -> prompts -> rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

from mlxtune.errors import UserError
from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.make.answer_filters import Made, wrong_with
from mlxtune.make.folder import Making, Rejected, Row, Spent, Yield
from mlxtune.make.from_template import naming
from mlxtune.make.from_template.description import Description, Template, Value
from mlxtune.make.from_template.drawing import combinations, drawn, shares
from mlxtune.make.guard import Guard

PORTION = 32  # prompts that are asked before the answers are looked at
OPENING, SAME_OPENING = 2, 0.2  # words that rows begin with, and their share above which it is said


@dataclass(frozen=True)
class Draft:
    """A combination of a template, filled in."""

    # Of its template in the file, from 0.
    template: int
    # Its id: the template's number from 1, and the combination's.
    id: str
    # Role -> text; without "assistant" where the engine answers.
    texts: Mapping[str, str]

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": role, "content": text} for role, text in self.texts.items()]


class FromTemplate:
    """One making out of templates."""

    def __init__(self, making: Making, description: Description, guard: Guard, count: int, seed: int) -> None:
        self.making = making
        self.description = description
        self.guard = guard
        self.count = count
        self.seed = seed
        self._texts: set[tuple[str, ...]] = set()  # of the prompts so far
        self._kept = [0] * len(description.templates)  # rows of each template

    def run(self) -> tuple[Yield, str]:
        """(What came of it, why it stopped before its end, "" where it did not). Raises UserError where the templates
        cannot give as many rows.
        """
        stopped = ""
        try:
            values = self._values()
            wanted = wanted_of_each(self.description.templates, values, self.count)
            stopped = self._all(values, wanted)
        except Spent as spent:
            stopped = str(spent)
        return Yield("rows", self.count), stopped

    def _values(self) -> dict[str, list[Value]]:
        found = self.description.given
        for name, slot in self.description.named.items():
            found[name] = [*naming.values(self.making, name, slot)]
        return found

    def _all(self, values: Mapping[str, Sequence[Value]], wanted: Sequence[int]) -> str:
        """Draw until each template has its rows. What does not stay is drawn again, while something is left."""
        waiting = [
            drafts(template, number, values, self.seed) for number, template in enumerate(self.description.templates)
        ]
        while True:
            portion: list[Draft] = []
            for number, some in enumerate(waiting):
                portion += self._next(some, min(PORTION, wanted[number] - self._kept[number]))
            if not portion:
                break
            self._make(portion)
        missing = sum(wanted) - sum(self._kept)
        return f"the combinations of the templates are used up, {missing} rows are missing" if missing else ""

    def _next(self, some: Iterator[Draft], count: int) -> list[Draft]:
        """So many drafts, less where there are no more, which may be asked."""
        found: list[Draft] = []
        while len(found) < count and (draft := next(some, None)) is not None:
            why = self.guard.why_any(draft.messages)
            if why is not None:
                self._reject(draft, "guarded", why)
            elif tuple(draft.texts.values()) in self._texts:
                self._reject(draft, "duplicate")
            else:
                self._texts.add(tuple(draft.texts.values()))
                found.append(draft)
        return found

    def _make(self, portion: Sequence[Draft]) -> None:
        asked = [draft for draft in portion if "assistant" not in draft.texts]
        answers: dict[str, Any] = {}
        if asked:
            requests = [Request(draft.id, draft.messages) for draft in asked]
            answers = {draft.id: one for draft, one in zip(asked, self.making.ask(requests), strict=True)}
        for draft in portion:
            self._finish(draft, answers.get(draft.id))

    def _finish(self, draft: Draft, answer: Any) -> None:
        """Keep one, or say why not. answer: the engine's, None where the template has one."""
        messages = draft.messages
        if answer is not None:
            if not isinstance(answer, Answer):
                return  # `making` counts what failed
            if reason := wrong_with(Made(messages, answer)):
                self._reject(draft, reason, answer.text)
                return
            if why := self.guard.why(answer.text):
                self._reject(draft, "guarded", why)
                return
            messages = [*messages, {"role": "assistant", "content": answer.text}]
        self._kept[draft.template] += 1
        self.making.keep(Row(messages, self.making.made([draft.id])))

    def _reject(self, draft: Draft, reason: str, detail: str = "") -> None:
        self.making.reject(Rejected({"messages": draft.messages, "template": draft.id}, reason, detail))

    def notes(self) -> list[str]:
        """Of words with which many rows begin: a model comes to expect them."""
        rows = sum(self._kept)
        counts: dict[str, int] = {}
        for template, kept in zip(self.description.templates, self._kept, strict=True):
            words = template.opening[:OPENING]
            if len(words) == OPENING:
                counts[" ".join(words)] = counts.get(" ".join(words), 0) + kept
        return [
            f'{count / rows:.0%} of the rows begin with "{words}": a model comes to expect that; write more templates'
            for words, count in counts.items()
            if count > SAME_OPENING * rows
        ]


def drafts(template: Template, number: int, values: Mapping[str, Sequence[Value]], seed: int) -> Iterator[Draft]:
    """All drafts of a template, in an order by chance. number: of the template, from 0."""
    for combination, chosen in drawn(template, values, f"{seed} {number}"):
        yield Draft(number, f"{number + 1}:{combination}", template.filled(chosen))


def wanted_of_each(templates: Sequence[Template], values: Mapping[str, Sequence[Value]], count: int) -> list[int]:
    """How many rows each template is to give. Raises UserError where they cannot give `count` together."""
    limits = []
    for template in templates:
        limits.append(min(combinations(template, values), _at_most(template.share, count)))
    if sum(limits) < count:
        parts = []
        for template, limit in zip(templates, limits, strict=True):
            there = combinations(template, values)
            parts.append(f"{template.place} {limit:,} ({there:,} combinations, share {template.share:g})")
        raise UserError(
            f"--count {count:,}: the templates give {sum(limits):,} rows at most: {'; '.join(parts)}",
            "Give the slots more values, write more templates, raise `share`, or ask for fewer.",
        )
    return shares(limits, count)


def _at_most(share: float, count: int) -> int:
    """So many of `count` rows are no more than the share; 0.07 of 100 comes to 7.000000000000001."""
    return floor(round(share * count, 6))

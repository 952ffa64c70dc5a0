"""The maker `from-template`: templates and values -> prompts -> rows."""

from __future__ import annotations

from collections import deque
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
POOR, LAST = 0.05, 3 * PORTION  # share of the last so many prompts that stay, below which it stops
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
        self.guard = making.guard = guard
        self.count = count
        self.seed = seed
        self._texts: set[tuple[str, ...]] = set()  # of the prompts so far
        self._stays: deque[bool] = deque(maxlen=LAST)  # of the last prompts: whether a row came of it
        self._kept = [0] * len(description.templates)  # rows of each template

    def run(self) -> tuple[Yield, str]:
        """(What came of it, why it stopped before its end, "" where it did not). Raises UserError where the templates
        cannot give as many rows.
        """
        stopped = ""
        try:
            values = self._values()
            stopped = self._too_few(values)
            if not stopped:
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

    def _too_few(self, values: Mapping[str, Sequence[Value]]) -> str:
        """Which slot the engine named too few values of, for people; "" where it named them all."""
        for name, slot in self.description.named.items():
            if len(values[name]) < slot.count:
                return (
                    f"the engine names {len(values[name])} of the {slot.count} values of the slot {name} "
                    f"({slot.what}): ask for fewer, say what they are, raise --temperature, or write a list"
                )
        return ""

    def _all(self, values: Mapping[str, Sequence[Value]], wanted: Sequence[int]) -> str:
        """Draw until each template has its rows. What does not stay is drawn again, while something is left."""
        waiting = [
            drafts(template, number, values, self.seed) for number, template in enumerate(self.description.templates)
        ]
        while True:
            portion: list[Draft] = []
            for number, some in enumerate(waiting):
                portion += self._next(some, min(PORTION, wanted[number] - self._kept[number]))
            if portion:
                self._make(portion)
            if self._is_poor():
                return f"of the last {LAST} prompts hardly any gave a row that can be kept: see rejected.jsonl"
            if not portion:
                break
        missing = sum(wanted) - sum(self._kept)
        return f"the combinations of the templates are used up, {missing} rows are missing" if missing else ""

    def _next(self, some: Iterator[Draft], count: int) -> list[Draft]:
        """So many drafts, less where there are no more, which may be asked."""
        found: list[Draft] = []
        while len(found) < count and not self._is_poor() and (draft := next(some, None)) is not None:
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
                self._stays.append(False)  # `making` counts what failed
                return
            if reason := wrong_with(Made(messages, answer)):
                self._reject(draft, reason, answer.text)
                return
            messages = [*messages, {"role": "assistant", "content": answer.text}]
        is_kept = self.making.keep(Row(messages, self.making.made([draft.id])))
        self._kept[draft.template] += is_kept
        self._stays.append(is_kept)

    def _is_poor(self) -> bool:
        """Whether hardly anything came of the last prompts."""
        return len(self._stays) == LAST and sum(self._stays) < POOR * LAST

    def _reject(self, draft: Draft, reason: str, detail: str = "") -> None:
        self._stays.append(False)
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


def expected(description: Description) -> dict[str, list[Value]]:
    """The values of all slots as far as they are known: of those that an engine is to name, their number."""
    there = description.given
    for name, slot in description.named.items():
        there[name] = [name] * slot.count
    return there


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

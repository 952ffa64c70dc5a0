"""Records -> training examples, in which every turn stands behind the prompt that asks for it.

An example is a prompt and the turn that it asks for; it holds earlier turns as well where their prompts and targets are
the beginning of its text, token for token. Examples are chosen from the last turn backwards. For three turns of Qwen3
with thoughts, the first two in one stretch of tool use (its template drops thoughts before the last question):

    example 1    question, [thought, call], result, [thought, answer]       turns 1 and 2
    example 2    question, call, result, answer, question, [thought, answer]       turn 3
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import groupby
from typing import Any

import numpy as np

from mlxtune.config.schema import DataSection
from mlxtune.data.chat import masking, turns
from mlxtune.data.chat.asked import AskedTurn, asked_turns
from mlxtune.data.chat.borders import AT_ONCE, Borders, Tokens
from mlxtune.data.chat.masking import Example
from mlxtune.data.chat.turns import Damage
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.readers import Bad, place
from mlxtune.data.template.choice import require_template
from mlxtune.data.template.template import Template, TemplateError, common_prefix

LONG = 100_000  # characters of a record's examples from which on the longest is looked at first
NO_TARGET = "no supervised token in the first {} tokens"


@dataclass(frozen=True)
class Row:
    """One example of a record, or the reason why there is none: exactly one of `example` and `dropped` is set."""

    record: Record | Bad
    example: Example | None = None
    dropped: str = ""  # the reason
    part: int = 0  # number of the example's last assistant turn, from 1; 0: the record's only example
    shortened: bool = False  # cut at data.max_tokens
    text: str = ""  # the rendered text that the example was made of
    damage: tuple[Damage, ...] = ()  # what of the record the template does not print
    kinds: tuple[tuple[str, int], ...] = ()  # (what is to be told of a turn, its message): keys of asked.KINDS
    starts: tuple[int, ...] = ()  # where the targets of each of its turns begin, in tokens
    ends: tuple[tuple[int, int], ...] = ()  # (the message of a turn, the token after its targets)
    turns: int = 0  # assistant turns that are trained in this example; of a dropped one, that it would have trained
    once: int = 0  # tokens of the record rendered once, cut as examples are; the same for all of its examples
    untrue: int = 0  # turns of the example that data.expand_turns=none would train behind another prompt

    @property
    def place(self) -> str:
        where = place(self.record.file, self.record.row)
        return f"{where} turn {self.part}" if self.part else where


@dataclass
class _Draft:
    """An example before it is cut: a text and the turns in it, the last of which ends it."""

    turns: list[AskedTurn]
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # [T]
    places: dict[int, tuple[int, int]] = field(default_factory=dict)  # index of a turn -> its target tokens [from, to)
    apart: bool = False  # the last turn is tokenized apart from its prompt

    @property
    def text(self) -> str:
        return self.turns[-1].text + self.turns[-1].trailing

    def holds(self, turn: AskedTurn) -> bool:
        return self.text.startswith(turn.prompt) and self.text.startswith(turn.target, len(turn.prompt))


@dataclass
class _Sheet:
    """A record on its way to rows."""

    record: Record | Bad
    dropped: str = ""
    whole: str = ""  # the text of the record rendered once; of a text row, the text
    spans: list[tuple[int, int]] | None = None  # supervised characters of `whole`; None: all, or `waiting` has them
    damage: tuple[Damage, ...] = ()
    kinds: list[tuple[str, int]] = field(default_factory=list)  # of turns that are left out
    waiting: list[AskedTurn] = field(default_factory=list)  # turns that no example holds yet
    drafts: list[_Draft] = field(default_factory=list)
    longest: Tokens | None = None  # the tokens of the example of the last turn
    beyond: list[AskedTurn] = field(default_factory=list)  # turns whose prompts alone reach data.max_tokens
    conversation: bool = False  # made of asked turns

    @property
    def characters(self) -> int:
        return len(self.whole) + sum(len(turn.prompt) + len(turn.target) for turn in self.waiting)


class Renderer:
    """Makes examples with one tokenizer and one set of options."""

    def __init__(self, tokenizer: Any, section: DataSection) -> None:
        self.tokenizer = tokenizer
        self.section = section
        self._borders: Borders | None = None

    @property
    def template(self) -> Template:
        day = date.fromisoformat(self.section.date) if self.section.date else None
        return masking.template_of(self.tokenizer, self.section.template_kwargs, day)

    @property
    def borders(self) -> Borders:
        template = self.template
        if self._borders is None or self._borders.template is not template:
            self._borders = Borders(self.tokenizer, template)
        return self._borders

    def rows(self, records: Iterable[Record | Bad]) -> list[Row]:
        """All examples of some records, in their order."""
        return list(self.stream(records))

    def stream(self, records: Iterable[Record | Bad]) -> Iterator[Row]:
        """The same, one after the other: a record of many turns can have many long examples, so only as many records
        are tokenized together as have AT_ONCE characters.
        """
        sheets: list[_Sheet] = []
        characters = 0
        for record in records:
            sheets.append(self._sheet(record))
            characters += sheets[-1].characters
            if characters > AT_ONCE:
                yield from self._made(sheets)
                sheets, characters = [], 0
        yield from self._made(sheets)

    def _made(self, sheets: list[_Sheet]) -> Iterator[Row]:
        self._settle(sheets)
        others = [sheet for sheet in sheets if not sheet.conversation and not sheet.dropped]
        made = masking.tokenized_all(self.tokenizer, [one.whole for one in others], [one.spans for one in others])
        rendered = {id(sheet): example for sheet, example in zip(others, made, strict=True)}
        for sheet in sheets:
            yield from self._finished(sheet, rendered.get(id(sheet)))

    # What is to be trained.

    def _sheet(self, record: Record | Bad) -> _Sheet:
        if isinstance(record, Bad):
            return _Sheet(record, dropped=record.reason)
        if record.text is not None:
            return _Sheet(record, whole=record.text)
        require_template(self.tokenizer)
        if not any(message["role"] == "assistant" for message in record.messages or []):
            return _Sheet(record, dropped="no assistant turn")
        try:
            return self._rendered_once(record) if self.section.expand_turns == "none" else self._asked(record)
        except TemplateError as error:
            return _Sheet(record, dropped=str(error))

    def _trained(self, record: Record) -> set[int]:
        """The messages that are trained: assistant turns that no switch turns off."""
        messages = record.messages or []
        return {at for at, message in enumerate(messages) if message["role"] == "assistant" and masking.weight(message)}

    def _rendered_once(self, record: Record) -> _Sheet:
        """data.expand_turns=none: the record as one text, its turns where they stand in it."""
        messages, trained = record.messages or [], self._trained(record)
        if self.section.train_on == "last":
            answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            trained &= {answers[-1]}
        found = turns.locate(self.template, masking.repaired(self.template, messages), record.tools)
        spans = [(start, end) for index, start, end in found.spans if index in trained]
        return _Sheet(record, whole=found.text, spans=spans, damage=tuple(found.damage))

    def _asked(self, record: Record) -> _Sheet:
        template = self.template
        messages = masking.repaired(template, record.messages or [])
        whole = template.text(messages, record.tools)
        only_last = self.section.train_on == "last"
        found, left = asked_turns(template, messages, record.tools, self._trained(record), only_last)
        if not found:
            return _Sheet(record, dropped="no supervised token", kinds=left)
        return _Sheet(record, whole=whole, kinds=left, waiting=found, conversation=True)

    # Examples of turns.

    def _settle(self, sheets: list[_Sheet]) -> None:
        """Put every waiting turn into an example, tokenizing all sheets' texts together. A turn whose prompt has other
        tokens inside a longer text than by itself waits for the next round.
        """
        sheets = [sheet for sheet in sheets if sheet.waiting]
        while sheets:
            drafts = [(sheet, draft) for sheet in sheets for draft in self._drafts(sheet)]
            found = self._place_last([draft for _, draft in drafts])
            for (sheet, draft), tokens in zip(drafts, found, strict=True):
                self._place_earlier(draft, tokens)
                settled = {turn.index for turn in draft.turns}
                sheet.waiting = [turn for turn in sheet.waiting if turn.index not in settled]
                sheet.drafts.append(draft)
                sheet.longest = sheet.longest or tokens
            sheets = [sheet for sheet in sheets if sheet.waiting]

    def _place_last(self, drafts: list[_Draft]) -> list[Tokens]:
        """Tokenize some drafts and place the last turn of each; return the tokens that hold the turns before it. Where
        one would straddle the end of the last prompt, prompt and target are tokenized apart.
        """
        found = self.borders.tokens([draft.text for draft in drafts])
        straddled = []
        for number, draft in enumerate(drafts):
            last = draft.turns[-1]
            at = self.borders.place(found[number], self.borders.cuts(draft.text), len(last.prompt))
            if at is None:
                straddled.append(number)
            else:
                draft.ids = found[number].ids
                draft.places[last.index] = (at, found[number].after(len(last.text)))
        prompts = self.borders.tokens([drafts[number].turns[-1].prompt for number in straddled])
        for number, prompt in zip(straddled, prompts, strict=True):
            draft = drafts[number]
            last = draft.turns[-1]
            target = self.borders.apart(last.target)
            draft.ids = np.array([*prompt.ids, *target, *self.borders.ids(last.trailing)], np.int32)
            draft.places[last.index] = (len(prompt.ids), len(prompt.ids) + len(target))
            draft.apart = True
            found[number] = prompt
        return found

    def _drafts(self, sheet: _Sheet) -> list[_Draft]:
        """The fewest examples that hold the waiting turns, as far as their texts tell.

        Of many and long ones that of the last turn alone comes first: it then tells which prompts are too long.
        """
        if sheet.longest is not None:
            reached = {turn.index for turn in sheet.waiting if self._reaches_limit(turn.prompt, sheet.longest)}
            sheet.beyond += [turn for turn in sheet.waiting if turn.index in reached]
            sheet.waiting = [turn for turn in sheet.waiting if turn.index not in reached]
        waiting = sorted(sheet.waiting, key=lambda turn: turn.index, reverse=True)
        drafts: list[_Draft] = []
        for turn in waiting:
            shared = next((draft for draft in reversed(drafts) if draft.holds(turn)), None)
            if shared is None or self.section.expand_turns == "all":
                drafts.append(_Draft([turn]))
            else:
                shared.turns.insert(0, turn)
        long = sum(len(draft.text) for draft in drafts) > LONG
        return drafts[:1] if sheet.longest is None and long else drafts

    def _reaches_limit(self, prompt: str, longest: Tokens) -> bool:
        """Whether a prompt surely has data.max_tokens tokens: a longer text that begins as it does has so many before a
        special token, up to which both have the same.
        """
        return longest.before_special(common_prefix(prompt, longest.text)) >= self.section.max_tokens

    def _place_earlier(self, draft: _Draft, found: Tokens) -> None:
        """Find the turns before a draft's last one among its tokens; those that cannot stay are taken out."""
        cuts = self.borders.cuts(found.text) if len(draft.turns) > 1 else []
        for turn in draft.turns[:-1]:
            at = self.borders.place(found, cuts, len(turn.prompt))
            if at is not None:
                draft.places[turn.index] = (at, found.after(len(turn.text)))
        draft.turns = [turn for turn in draft.turns if turn.index in draft.places]

    # Rows.

    def _finished(self, sheet: _Sheet, rendered: Example | None) -> Iterator[Row]:
        if sheet.dropped:
            yield Row(sheet.record, dropped=sheet.dropped, kinds=tuple(sheet.kinds))
        elif rendered is not None:
            row = Row(sheet.record, text=sheet.whole, damage=sheet.damage)
            yield self._cut(row, rendered.ids, rendered.mask)
        else:
            yield from self._finished_turns(sheet)

    def _finished_turns(self, sheet: _Sheet) -> Iterator[Row]:
        drafts = sorted(sheet.drafts, key=lambda draft: draft.turns[-1].index)
        limit = self.section.max_tokens
        once, kinds = min(self._once(sheet.whole, drafts), limit), sheet.kinds
        messages = sheet.record.messages or [] if isinstance(sheet.record, Record) else []

        def number(turn: AskedTurn) -> int:
            """Which assistant turn of the record it is, counted from 1; 0 for a record's only example."""
            several = len(drafts) + len(sheet.beyond) > 1
            return sum(message["role"] == "assistant" for message in messages[: turn.index + 1]) if several else 0

        for draft in drafts:
            mask = np.zeros(len(draft.ids), np.uint8)
            for start, end in draft.places.values():
                mask[start:end] = 1
            last = draft.turns[-1].index
            kinds = kinds + [(kind, turn.index) for turn in draft.turns for kind in turn.kinds]
            kinds += [("apart", last)] * draft.apart
            kinds += [("cut", index) for index, (_, end) in sorted(draft.places.items()) if end > limit]
            kept = [turn for turn in draft.turns if draft.places[turn.index][0] < limit]
            row = Row(
                sheet.record,
                part=number(draft.turns[-1]),
                starts=tuple(start for start, _ in draft.places.values()),
                ends=tuple((index, end) for index, (_, end) in sorted(draft.places.items())),
                text=draft.text,
                damage=tuple(dict.fromkeys(damage for turn in draft.turns for damage in turn.damage)),
                kinds=tuple(kinds),
                turns=len(kept or draft.turns),
                once=once,
                untrue=self._untrue(sheet.whole, draft, kept),
            )
            yield self._cut(row, draft.ids, mask)
            kinds = []
        for turn in sorted(sheet.beyond, key=lambda turn: turn.index):
            told = tuple((kind, turn.index) for kind in (*turn.kinds, "cut"))
            yield Row(sheet.record, dropped=NO_TARGET.format(limit), part=number(turn), kinds=told, turns=1)

    def _once(self, whole: str, drafts: list[_Draft]) -> int:
        """How many tokens the record has when it is rendered once."""
        last = drafts[-1]
        if not last.apart and whole.startswith(last.text):
            return len(last.ids) + len(self.borders.ids(whole[len(last.text) :]))
        return len(self.borders.ids(whole))

    def _untrue(self, whole: str, draft: _Draft, turns: list[AskedTurn]) -> int:
        """How many of some turns of an example stand otherwise in the whole text."""
        if whole.startswith(draft.text):
            return int(draft.apart and draft.turns[-1] in turns)
        return sum(not whole.startswith(turn.text) for turn in turns)

    def _cut(self, row: Row, ids: Any, mask: Any) -> Row:
        """The row with its example, cut at data.max_tokens."""
        longest = self.section.max_tokens
        shortened = len(ids) > longest
        example = Example(ids[:longest], mask[:longest], row.damage)
        if not example.mask[1:].any():
            why = NO_TARGET.format(longest) if shortened else "no supervised token"
            if row.damage and not mask[1:].any():
                why = "; ".join(damage.text for damage in row.damage)
            return replace(row, example=None, dropped=why)
        return replace(row, example=example, shortened=shortened)


def by_record(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """All that was made of one record, record by record. rows: as `Renderer.stream` yields them."""
    for _, parts in groupby(rows, key=lambda row: id(row.record)):
        yield list(parts)

"""Records -> training examples, in which every turn stands behind the prompt that asks for it.

An example is a prompt and the turn that it asks for; it holds earlier turns as well where their prompts and targets are
the beginning of its text, token for token. Examples are chosen from the last turn backwards. For three turns of Qwen3
with thoughts, the first two in one stretch of tool use (its template drops thoughts before the last question):

    example 1    question, [thought, call], result, [thought, answer]       turns 1 and 2
    example 2    question, call, result, answer, question, [thought, answer]       turn 3

The way of a record: `_sheet` finds what is to be trained of it, `_settle` puts its turns into drafts, `_rows_of_turns`
makes rows of the drafts and cuts them at data.max_tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from mlxtune.config.schema import DataSection
from mlxtune.data.chat import turns
from mlxtune.data.chat.asked import AskedTurn, asked_turns
from mlxtune.data.chat.borders import AT_ONCE, Borders, Tokens
from mlxtune.data.chat.damage import Damage
from mlxtune.data.chat.drafts import Draft, drafts_of, place_earlier_turns, place_last_turns
from mlxtune.data.chat.masking import Example, Span, tokenized_texts, tokenized_turns
from mlxtune.data.chat.repairs import repaired, weight
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.readers import Bad, place
from mlxtune.data.template.choice import require_template
from mlxtune.data.template.template import Template, TemplateError
from mlxtune.data.template.templates import Templates
from mlxtune.data.template.texts import common_prefix

LONG = 100_000  # characters of a record's examples from which on the longest is looked at first
NO_TARGET = "no supervised token in the first {} tokens"
NO_LIMIT = 1 << 31  # tokens: more than any example has


@dataclass(frozen=True)
class Row:
    """One example of a record, or the reason why there is none: exactly one of `example` and `dropped` is set."""

    record: Record | Bad  # what it was made of
    example: Example | None = None  # the tokens and their mask
    dropped: str = ""  # the reason
    part: int = 0  # number of the example's last assistant turn, from 1; 0: the record's only example
    shortened: bool = False  # cut at data.max_tokens
    text: str = ""  # the rendered text that the example was made of
    damage: tuple[Damage, ...] = ()  # what of the record the template does not print
    kinds: tuple[tuple[str, int], ...] = ()  # (a remark on a turn: a key of asked.KINDS, its message)
    starts: tuple[int, ...] = ()  # where the targets of each of its turns begin, in tokens
    ends: tuple[tuple[int, int], ...] = ()  # (the message of a turn, the token after its targets)
    turns: int = 0  # assistant turns that are trained in this example; of a dropped one, that it would have trained
    once: int = 0  # tokens of the record rendered once, cut as examples are; the same for all of its examples
    untrue: int = 0  # turns of the example that data.expand_turns=none would train behind another prompt

    @property
    def place(self) -> str:
        """Where the example is from, in words."""
        where = place(self.record.file, self.record.row)
        return f"{where} turn {self.part}" if self.part else where


@dataclass
class _Sheet:
    """A record on its way to rows."""

    record: Record | Bad  # as it was read
    dropped: str = ""  # the reason why nothing is made of it
    whole: str = ""  # the text of the record rendered once; of a text row, the text
    spans: list[Span] | None = None  # supervised characters of `whole`; None: all, or `waiting` has them
    damage: tuple[Damage, ...] = ()  # of the record rendered once
    kinds: list[tuple[str, int]] = field(default_factory=list)  # of turns that are left out
    waiting: list[AskedTurn] = field(default_factory=list)  # turns that no example holds yet
    drafts: list[Draft] = field(default_factory=list)  # examples whose turns have their places
    longest: Tokens | None = None  # the tokens of the example of the last turn
    beyond: list[AskedTurn] = field(default_factory=list)  # turns whose prompts alone reach data.max_tokens
    conversation: bool = False  # made of asked turns

    @property
    def characters(self) -> int:
        return len(self.whole) + sum(len(turn.prompt) + len(turn.target) for turn in self.waiting)


class Renderer:
    """Makes examples with one tokenizer and one set of options."""

    def __init__(self, tokenizer: Any, section: DataSection, templates: Templates | None = None) -> None:
        self.tokenizer = tokenizer
        self.section = section
        self._templates = templates or Templates(tokenizer)

    def uncut(self) -> Renderer:
        """The same without data.max_tokens."""
        section = self.section.model_copy(update={"max_tokens": NO_LIMIT})
        return Renderer(self.tokenizer, section, self._templates)

    @cached_property
    def template(self) -> Template:
        """The template of the tokenizer, which is set up before rows are rendered."""
        day = date.fromisoformat(self.section.date) if self.section.date else None
        return self._templates.of(self.section.template_kwargs, day)

    @cached_property
    def borders(self) -> Borders:
        return Borders(self.tokenizer, self.template)

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
        """The rows of some sheets, whose texts are tokenized together."""
        self._settle(sheets)
        of_one_text = self._of_one_text(sheets)
        for number, sheet in enumerate(sheets):
            if sheet.dropped:
                yield Row(sheet.record, dropped=sheet.dropped, kinds=tuple(sheet.kinds))
            elif sheet.conversation:
                yield from self._rows_of_turns(sheet)
            else:
                row = Row(sheet.record, text=sheet.whole, damage=sheet.damage, kinds=tuple(sheet.kinds))
                yield self._cut(row, of_one_text[number].ids, of_one_text[number].mask)

    # What is to be trained.

    def _sheet(self, record: Record | Bad) -> _Sheet:
        if isinstance(record, Bad):
            return _Sheet(record, dropped=record.reason)
        if record.teaches_nothing:
            return _Sheet(record, dropped=record.teaches_nothing)
        if record.text is not None:
            return _Sheet(record, whole=record.text)
        require_template(self.tokenizer)
        if not any(message["role"] == "assistant" for message in record.messages or []):
            return _Sheet(record, dropped="no assistant turn")
        try:
            sheet = self._rendered_once(record) if self.section.expand_turns == "none" else self._asked(record)
        except TemplateError as error:
            return _Sheet(record, dropped=str(error))
        if record.may_be_rated:
            sheet.kinds.append(("label", len(record.messages or []) - 1))
        return sheet

    def _trained(self, record: Record) -> set[int]:
        """The messages that are trained: assistant turns that no switch turns off."""
        trained = set()
        for index, message in enumerate(record.messages or []):
            if message["role"] == "assistant" and weight(message):
                trained.add(index)
        return trained

    def _rendered_once(self, record: Record) -> _Sheet:
        """data.expand_turns=none: the record as one text, its turns where they stand in it."""
        messages, trained = record.messages or [], self._trained(record)
        if self.section.train_on == "last":
            answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            trained &= {answers[-1]}
        located = turns.locate(self.template, repaired(self.template, messages), record.tools)
        spans = [(start, end) for index, start, end in located.spans if index in trained]
        return _Sheet(record, whole=located.text, spans=spans, damage=tuple(located.damage))

    def _asked(self, record: Record) -> _Sheet:
        """The record as turns, each behind the prompt that asks for it."""
        template = self.template
        messages = repaired(template, record.messages or [])
        whole = template.text(messages, record.tools)
        only_last = self.section.train_on == "last"
        asked, left_out = asked_turns(template, messages, record.tools, self._trained(record), only_last)
        if not asked:
            return _Sheet(record, dropped="no supervised token", kinds=left_out)
        return _Sheet(record, whole=whole, kinds=left_out, waiting=asked, conversation=True)

    # Examples of one text.

    def _of_one_text(self, sheets: list[_Sheet]) -> dict[int, Example]:
        """The number of a sheet that is one text -> its example: a plain text, or a conversation rendered once."""
        plain: list[int] = []
        conversations: list[int] = []
        for number, sheet in enumerate(sheets):
            if sheet.dropped or sheet.conversation:
                continue
            if sheet.spans is None:
                plain.append(number)
            else:
                conversations.append(number)
        of_conversations = tokenized_turns(
            self.tokenizer,
            [sheets[number].whole for number in conversations],
            [sheets[number].spans or [] for number in conversations],
        )
        of_plain = tokenized_texts(self.template, [sheets[number].whole for number in plain])
        return dict(zip([*conversations, *plain], [*of_conversations, *of_plain], strict=True))

    # Examples of turns.

    def _settle(self, sheets: list[_Sheet]) -> None:
        """Put every waiting turn into an example, tokenizing all sheets' texts together. A turn whose prompt has other
        tokens inside a longer text than by itself waits for the next round.
        """
        unsettled = [sheet for sheet in sheets if sheet.waiting]
        while unsettled:
            owners: list[_Sheet] = []  # of each draft
            drafts: list[Draft] = []
            for sheet in unsettled:
                for draft in self._next_drafts(sheet):
                    owners.append(sheet)
                    drafts.append(draft)
            found = place_last_turns(self.borders, drafts)
            for sheet, draft, tokens in zip(owners, drafts, found, strict=True):
                place_earlier_turns(self.borders, draft, tokens)
                settled = {turn.index for turn in draft.turns}
                sheet.waiting = [turn for turn in sheet.waiting if turn.index not in settled]
                sheet.drafts.append(draft)
                sheet.longest = sheet.longest or tokens
            unsettled = [sheet for sheet in unsettled if sheet.waiting]

    def _next_drafts(self, sheet: _Sheet) -> list[Draft]:
        """Examples for the waiting turns. Of many and long ones that of the last turn alone comes first: it then shows
        which prompts are too long.
        """
        if sheet.longest is not None:
            still_waiting = []
            for turn in sheet.waiting:
                if self._reaches_limit(turn.prompt, sheet.longest):
                    sheet.beyond.append(turn)
                else:
                    still_waiting.append(turn)
            sheet.waiting = still_waiting
        drafts = drafts_of(sheet.waiting, each_alone=self.section.expand_turns == "all")
        if sheet.longest is None and sum(len(draft.text) for draft in drafts) > LONG:
            return drafts[:1]
        return drafts

    def _reaches_limit(self, prompt: str, longest: Tokens) -> bool:
        """Whether a prompt surely has data.max_tokens tokens: a longer text that begins as it does has so many before a
        special token, up to which both have the same.
        """
        return longest.before_special(common_prefix(prompt, longest.text)) >= self.section.max_tokens

    # Rows.

    def _rows_of_turns(self, sheet: _Sheet) -> Iterator[Row]:
        """The examples of a conversation in the order of their last turns, and the turns that are too long for one."""
        drafts = sorted(sheet.drafts, key=lambda draft: draft.turns[-1].index)
        limit = self.section.max_tokens
        once = min(self._tokens_once(sheet.whole, drafts), limit)
        left_out = tuple(sheet.kinds)  # remarks that the first example has
        for draft in drafts:
            part = _part_of(sheet, draft.turns[-1])
            row = Row(sheet.record, part=part, kinds=left_out, once=once)
            yield self._row_of(draft, sheet.whole, row)
            left_out = ()
        too_long = NO_TARGET.format(limit)
        for turn in sorted(sheet.beyond, key=lambda turn: turn.index):
            kinds = [(kind, turn.index) for kind in turn.kinds]
            kinds.append(("cut", turn.index))
            part = _part_of(sheet, turn)
            yield Row(sheet.record, dropped=too_long, part=part, kinds=tuple(kinds), turns=1)

    def _row_of(self, draft: Draft, whole: str, row: Row) -> Row:
        """A row with what its draft says. whole: the text of the record rendered once."""
        limit = self.section.max_tokens
        mask = np.zeros(len(draft.ids), np.uint8)
        for start, end in draft.places.values():
            mask[start:end] = 1
        ends = [(index, end) for index, (_, end) in sorted(draft.places.items())]
        kinds = [*row.kinds]
        for turn in draft.turns:
            kinds += [(kind, turn.index) for kind in turn.kinds]
        if draft.tokenized_apart:
            kinds.append(("apart", draft.turns[-1].index))
        kinds += [("cut", index) for index, end in ends if end > limit]
        trained = [turn for turn in draft.turns if draft.places[turn.index][0] < limit]
        damage = dict.fromkeys(damage for turn in draft.turns for damage in turn.damage)  # each once, in their order
        made = replace(
            row,
            starts=tuple(start for start, _ in draft.places.values()),
            ends=tuple(ends),
            text=draft.text,
            damage=tuple(damage),
            kinds=tuple(kinds),
            turns=len(trained or draft.turns),
            untrue=_otherwise_in(whole, draft, trained),
        )
        return self._cut(made, draft.ids, mask)

    def _tokens_once(self, whole: str, drafts: list[Draft]) -> int:
        """How many tokens the record has when it is rendered once."""
        last = drafts[-1]
        if not last.tokenized_apart and whole.startswith(last.text):
            return len(last.ids) + len(self.borders.ids(whole[len(last.text) :]))
        return len(self.borders.ids(whole))

    def _cut(self, row: Row, ids: Any, mask: Any) -> Row:
        """The row with its example, cut at data.max_tokens; ids and mask: [T], of the whole example."""
        limit = self.section.max_tokens
        shortened = len(ids) > limit
        example = Example(ids[:limit], mask[:limit], row.damage)
        if example.mask[1:].any():  # nothing predicts the first token
            return replace(row, example=example, shortened=shortened)
        if row.damage and not mask[1:].any():
            reason = "; ".join(damage.text for damage in row.damage)
        elif shortened:
            reason = NO_TARGET.format(limit)
        else:
            reason = "no supervised token"
        return replace(row, example=None, dropped=reason)


def _part_of(sheet: _Sheet, turn: AskedTurn) -> int:
    """Which assistant turn of its record it is, counted from 1; 0 for the record's only example."""
    if len(sheet.drafts) + len(sheet.beyond) == 1:
        return 0
    messages = sheet.record.messages if isinstance(sheet.record, Record) else None
    number = 0
    for message in (messages or [])[: turn.index + 1]:
        number += message["role"] == "assistant"
    return number


def _otherwise_in(whole: str, draft: Draft, turns: list[AskedTurn]) -> int:
    """How many of some turns of an example stand otherwise in the whole text."""
    if whole.startswith(draft.text):
        return int(draft.tokenized_apart and draft.turns[-1] in turns)
    return len([turn for turn in turns if not whole.startswith(turn.text)])


def by_record(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """All that was made of one record, record by record. rows: as `Renderer.stream` yields them."""
    for _, parts in groupby(rows, key=lambda row: id(row.record)):
        yield list(parts)

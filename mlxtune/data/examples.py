"""Records -> training examples: rendered, expanded, shortened; rows that teach nothing dropped with their reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from mlxtune.data import chat, turns
from mlxtune.data.chat import Example
from mlxtune.data.files import Bad, place
from mlxtune.data.records import Record
from mlxtune.data.template import Messages, Template, TemplateError
from mlxtune.data.turns import Damage
from mlxtune.sections import DataSection


@dataclass(frozen=True)
class Row:
    """A record's example; of an expanded conversation, the one of its `part`-th assistant turn (0: not expanded).

    Exactly one of `example` and `dropped` (the reason) is set. text: the rendered text that the example was made of;
    damage: what of the row the template does not print.
    """

    record: Record | Bad
    example: Example | None = None
    dropped: str = ""
    part: int = 0
    shortened: bool = False
    text: str = ""
    damage: tuple[Damage, ...] = ()

    @property
    def place(self) -> str:
        where = place(self.record.file, self.record.row)
        return f"{where} turn {self.part}" if self.part else where


class Renderer:
    """Makes examples with one tokenizer and one set of options."""

    def __init__(self, tokenizer: Any, section: DataSection) -> None:
        self.tokenizer = tokenizer
        self.section = section

    @property
    def template(self) -> Template:
        day = date.fromisoformat(self.section.date) if self.section.date else None
        return chat.template_of(self.tokenizer, self.section.template_kwargs, day)

    def rows(self, records: Sequence[Record | Bad]) -> list[Row]:
        """The examples of some records, tokenized together."""
        drafts = [draft for record in records for draft in self._drafts(record)]
        good = [draft for draft in drafts if not draft[0].dropped]
        made = iter(chat.tokenized_all(self.tokenizer, [row.text for row, _ in good], [spans for _, spans in good]))
        return [row if row.dropped else self._finished(row, next(made)) for row, _ in drafts]

    def _drafts(self, record: Record | Bad) -> Iterator[tuple[Row, Any]]:
        """(row with its text and damage, supervised characters; None: all of a plain text)."""
        if isinstance(record, Bad):
            yield Row(record, dropped=record.reason), None
        elif record.text is not None:
            yield Row(record, Example(), text=record.text), None
        elif not any(message["role"] == "assistant" for message in record.messages or []):
            yield Row(record, dropped="no assistant turn"), None
        else:
            try:
                yield from self._conversation(record)
            except TemplateError as error:
                yield Row(record, dropped=str(error)), None

    def _conversation(self, record: Record) -> Iterator[tuple[Row, Any]]:
        template, section = self.template, self.section
        assert record.messages is not None
        messages = chat.repaired(template, record.messages)
        found = turns.locate(template, messages, record.tools)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [index for index in answers if chat.weight(record.messages[index])]
        if section.train_on == "last":
            trained = [index for index in trained if index == answers[-1]]
        expanded = section.expand_turns == "all" or (
            section.expand_turns == "auto" and _strips_earlier(template, messages, record.tools, found)
        )
        parts = [(found, trained, 0)]
        if len(answers) > 1 and expanded:
            parts = []
            for number, index in enumerate(answers, 1):
                if index in trained:
                    upto = turns.locate(template, messages[: index + 1], record.tools)
                    # Earlier thinking is not there at inference either.
                    damage = [d for d in upto.damage if d.kind != "thinking" or d.index == index]
                    parts.append((replace(upto, damage=damage), [index], number))
            if not parts:
                yield Row(record, dropped="no supervised token"), None
        for located, own, part in parts:
            spans = [(start, end) for index, start, end in located.spans if index in own]
            yield Row(record, Example(), part=part, text=located.text, damage=tuple(located.damage)), spans

    def _finished(self, row: Row, made: Example) -> Row:
        longest = self.section.max_tokens
        shortened = len(made.ids) > longest
        example = Example(made.ids[:longest], made.mask[:longest], row.damage)
        if not example.mask[1:].any():
            why = f"no supervised token in the first {longest} tokens" if shortened else "no supervised token"
            if row.damage and not made.mask[1:].any():
                why = "; ".join(damage.text for damage in row.damage)
            return replace(row, example=None, dropped=why)
        return replace(row, example=example, shortened=shortened)


def _strips_earlier(template: Template, messages: Messages, tools: Any, found: turns.Turns) -> bool:
    """Whether thinking is lost that the template prints while its turn is the last one."""
    lost = {damage.index for damage in found.damage if damage.kind == "thinking"} - {len(messages) - 1}
    if not lost:
        return False
    first = min(lost)
    upto = turns.locate(template, messages[: first + 1], tools)
    return not any(damage.kind == "thinking" and damage.index == first for damage in upto.damage)

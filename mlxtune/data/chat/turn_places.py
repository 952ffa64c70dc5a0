"""Where an assistant turn stands in what its template prints, shown by marks.

Two renderings are compared with the real one. In the marked one every text is a mark, so the text between marks is the
template's own. In the other the context is marks and the turn is as it is: what follows its last mark is the turn's,
and the real rendering must end with the very same characters.

    real      ...<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    marked    ...<|im_start|>user\\n①<|im_end|>\\n<|im_start|>assistant\\n②<|im_end|>\\n
    context   ...<|im_start|>user\\n①<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n

Behind ① stands the turn's tail; its opening is the part before ②, its closing the part behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from mlxtune.data.chat.conversation import Conversation
from mlxtune.data.chat.marks import THINKING, thinking_parts
from mlxtune.data.chat.pieces import trimmed_ways
from mlxtune.data.chat.turn_ends import up_to_end_token
from mlxtune.data.rows.messages import THINKING_KEYS
from mlxtune.data.template.probes import MARKS
from mlxtune.data.template.template import Template


@dataclass(frozen=True)
class Tail:
    """A turn's part of a rendering with marks: what follows the last mark of its context."""

    after: str  # that last mark; "" where the turn is the first text
    text: str  # everything behind it
    opening: str  # of the text, what the template prints before the turn's first mark
    closing: str  # of the text, what it prints behind the turn's last mark
    marks: frozenset[str]  # the turn's own marks that are printed


class TurnPlaces(Conversation):
    """Finds turns in the renderings of a conversation. A turn is given by its first and its last message: answers in a
    row that the template joins are one turn.
    """

    @cached_property
    def prints_tools(self) -> bool:
        """Whether the tools, if there are any, are printed."""
        count = len(self.messages)
        marked = self.marked_whole(count)
        if not self.tools or not marked:  # where the template refuses marks it is not known
            return True
        return marked != Conversation(self.template, self.messages).marked_whole(count)

    def groups(self) -> Iterator[tuple[int, int]]:
        """(first, last) message of each assistant turn."""
        index, count = 0, len(self.messages)
        while index < count:
            if self.messages[index]["role"] != "assistant":
                index += 1
                continue
            last = index
            while last + 1 < count and self.messages[last + 1]["role"] == "assistant" and self.joins(last):
                last += 1
            yield index, last
            index = last + 1

    def joins(self, index: int) -> bool:
        """Whether the template prints an answer and the one after it as one turn: no special token stands between."""
        shown = self.marked_whole(index + 2)
        end_of_first = max(shown.rfind(mark) for mark in self.marks[index]) + 1
        starts = [shown.find(mark) for mark in self.marks[index + 1]]
        starts_of_second = [start for start in starts if start >= 0]
        if not end_of_first or not starts_of_second or not self.template.stops:
            return False
        return not self.template.special.search(shown[end_of_first : min(starts_of_second)])

    def marked_tail(self, first: int, last: int) -> Tail | None:
        """The turn's tail where every text is a mark; None where the template refuses marks."""
        return self._tail_of(self.marked_whole(last + 1), first, last)

    def asked_tail(self, first: int, last: int) -> Tail | None:
        """What the prompt for the turn prints behind the last text of the context, which is a mark."""
        return self._tail_of(self.marked_asked(first), first, last)

    def real_tail(self, whole: str, first: int, last: int) -> Tail:
        """The end of `whole`, the first `last + 1` messages as they are, that no text of the context can be in. Raises
        TemplateError when the rendering with marks for the context does not end so.
        """
        tail = self._tail_of(self.real_after(first, last + 1), first, last)
        if tail is None or not whole.endswith(tail.text):
            raise self.uncertain(first)
        return tail

    def _tail_of(self, rendered: str, first: int, last: int) -> Tail | None:
        if not rendered:
            return None
        marks_of_turn = set("".join(self.marks[first : last + 1]))
        context: list[re.Match[str]] = []
        of_turn: list[re.Match[str]] = []
        for match in MARKS.finditer(rendered):
            if match.group() in marks_of_turn:
                of_turn.append(match)
            elif match.group() in self.owners:  # a real text may hold private-use characters that are no marks
                context.append(match)
        start = context[-1].end() if context else 0
        of_turn = [match for match in of_turn if match.start() >= start]
        return Tail(
            after=context[-1].group() if context else "",
            text=rendered[start:],
            opening=rendered[start : of_turn[0].start()] if of_turn else rendered[start:],
            closing=rendered[of_turn[-1].end() :] if of_turn else "",
            marks=frozenset(match.group() for match in of_turn),
        )

    def prove(self, whole: str, rest: str, first: int, last: int) -> None:
        """Raise TemplateError unless no text of the context can be in `rest`, which `whole` ends with."""
        asked, marked = self.marked_asked(first), self.marked_whole(last + 1)
        if asked and marked.startswith(asked) and self._fits(rest, marked[len(asked) :], first):
            return
        if len(self.real_tail(whole, first, last).text) < len(rest):
            raise self.uncertain(first)

    def _fits(self, rest: str, marked: str, first: int) -> bool:
        """Whether `rest` is the marked text with the turn's own texts in place of their marks, and nothing else: a
        cheap proof, for most turns.

            marked   A<|im_end|>\\n
            rest     Hello<|im_end|>\\n
        """
        literals, marks = MARKS.split(marked), MARKS.findall(marked)
        at = 0
        for place, mark in enumerate(marks):
            message, _ = self.owners[mark]
            text = self.text_of(mark) if message >= first else None
            if text is None or not rest.startswith(literals[place], at):
                return False
            at += len(literals[place])
            length = _printed_length(rest, at, text, literals[place + 1])
            if length is None:
                return False
            at += length
        return rest[at:] == literals[-1]

    def ending(self, tail: Tail) -> str:
        """What the template prints behind a turn's last text up to and with its end token."""
        return tail.closing[: up_to_end_token(self.template, tail.closing, tail.closing)]

    def up_to_end(self, rest: str, first: int, last: int, marked: Tail | None) -> str:
        """`rest` without what the template prints behind the end token. Raises TemplateError when that is not found."""
        for tail in (marked, self._tail_of(self.marked_after(first, last + 1), first, last)):
            if tail is None:
                continue
            closing = tail.closing if tail.marks else self.from_last_end(rest)
            end = up_to_end_token(self.template, closing, closing)
            behind = closing[end:]
            target = rest.removesuffix(behind)
            if rest.endswith(behind) and target.endswith(_last_token(self.template, closing[:end])):
                return target
        raise self.uncertain(first)

    def from_last_end(self, rest: str) -> str:
        """The closing of a turn of which no text is printed: its end token may still be there, as the last one."""
        tokens = list(self.template.special.finditer(rest))
        stops = [match for match in tokens if match.group() in self.template.stops]
        if stops:
            return rest[stops[-1].start() :]
        if tokens:
            return rest[tokens[0].start() :]
        return ""

    def thought_of(self, index: int) -> str:
        """The thought of a message: under a key of its own, or between tags in its content; "" for none."""
        given = self.given_thought(index)
        if given or self.template.thought.close != "</think>":
            return given
        for part, kind in thinking_parts(str(self.messages[index].get("content") or "")):
            if kind == THINKING:
                return part
        return ""

    def given_thought(self, index: int) -> str:
        """The thought of a message that has a key of its own."""
        for key in THINKING_KEYS:
            if self.messages[index].get(key):
                return str(self.messages[index][key])
        return ""


def _printed_length(rest: str, at: int, text: str, follows: str) -> int | None:
    """How many characters of `rest` at `at` are the text, trimmed or not, with `follows` behind it; None for another
    text.
    """
    for shown in trimmed_ways(text):
        if rest.startswith(shown, at) and rest.startswith(follows, at + len(shown)):
            return len(shown)
    return None


def _last_token(template: Template, text: str) -> str:
    """The special token that a text ends with; "" for none."""
    tokens = list(template.special.finditer(text))
    if tokens and tokens[-1].end() == len(text):
        return tokens[-1].group()
    return ""

"""One conversation and its template: what is printed for a part of it, as it is and with marks for its texts.

Marks are private-use characters, one for each text of a message. In a marked rendering the text between marks is the
template's own, and whose text stands where is certain, whatever the real texts say. For example (ChatML):

    real      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    marked    <|im_start|>user\\n①<|im_end|>\\n<|im_start|>assistant\\n②<|im_end|>\\n
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

from mlxtune.data.chat.marks import CALLS, unused_marks, with_marks
from mlxtune.data.template.probes import MARKS
from mlxtune.data.template.rendering import prepared
from mlxtune.data.template.template import Messages, Template, TemplateError


class Conversation:
    """Renders parts of a conversation; `count` says how many of its messages are printed.

    messages: repaired (`repairs.repaired`); every rendering is one call of the template, remembered where it is marked.
    """

    def __init__(self, template: Template, messages: Messages, tools: Any = None) -> None:
        self.template, self.messages, self.tools = template, messages, tools
        self._real = prepared(messages)

    def whole(self, count: int) -> str:
        """What the template prints for the first `count` messages. Raises TemplateError."""
        return self.template.printed(self._real[:count], self.tools)

    def asked(self, count: int) -> str:
        """What the template prints to ask for the turn after the first `count` messages. Raises TemplateError."""
        return self.template.printed(self._real[:count], self.tools, prompt=True)

    def attempt(self, messages: Messages, prompt: bool = False) -> str:
        """What the template prints for other messages with the same tools; "" where it refuses them."""
        return self.template.attempt(messages, self.tools, prompt)

    @cached_property
    def marks(self) -> list[str]:
        """Per message its marks, one character per kind (CONTENT, THINKING, then each call)."""
        everything = json.dumps([self.messages, self.tools], ensure_ascii=False, default=str)
        # Nearly no text holds private-use characters; then none need be looked for.
        avoided = everything if MARKS.search(everything) else ""
        return unused_marks(avoided, self.messages)

    @cached_property
    def owners(self) -> dict[str, tuple[int, int]]:
        """mark -> (index of its message, kind)"""
        out = {}
        for index, marks in enumerate(self.marks):
            for kind, mark in enumerate(marks):
                out[mark] = (index, kind)
        return out

    @cached_property
    def marked(self) -> Messages:
        """The messages with marks for their texts."""
        return [with_marks(message, marks) for message, marks in zip(self.messages, self.marks, strict=True)]

    @cached_property
    def _prepared_marked(self) -> Messages:
        return prepared(self.marked)

    @cached_property
    def _shapes(self) -> list[int]:
        """For each count of messages, a number that stands for the marked messages up to there and the tools."""
        shape = self.template.remembered.shape(0, repr(self.tools) if self.tools else "")
        out = [shape]
        for message in self.marked:
            shape = self.template.remembered.shape(shape, repr(message))
            out.append(shape)
        return out

    def marked_whole(self, count: int, prompt: bool = False) -> str:
        """As `whole` (prompt: `asked`), with a mark for every text; "" where the template refuses marks."""

        def render() -> str:
            try:
                return self.template.printed(self._prepared_marked[:count], self.tools, prompt)
            except TemplateError:
                return ""

        return self.template.remembered.text(self._shapes[count], prompt, render)

    def marked_asked(self, count: int) -> str:
        """As `asked`, with a mark for every text; "" where the template refuses marks."""
        return self.marked_whole(count, prompt=True)

    def real_after(self, first: int, count: int) -> str:
        """The first `count` messages, those before `first` with marks and the others as they are; "" when refused."""
        return self.attempt([*self.marked[:first], *self.messages[first:count]])

    def marked_after(self, first: int, count: int) -> str:
        """The first `count` messages, those before `first` as they are and the others with marks; "" when refused."""
        return self.attempt([*self.messages[:first], *self.marked[first:count]])

    def text_of(self, mark: str) -> str | None:
        """The text that a mark stands for, where it is one text: not a tool call, not one part of a content."""
        index, kind = self.owners[mark]
        if kind >= CALLS:
            return None
        message = self.messages[index]
        texts: set[str] = set()
        for key, value in self.marked[index].items():
            beside_content = key in ("instruction", "input")  # of an Alpaca row, whose content holds both
            text = message.get(key)
            if value == mark and not beside_content and isinstance(text, str):
                texts.add(text)
        if len(texts) != 1:
            return None
        return texts.pop()

    def uncertain(self, index: int) -> TemplateError:
        """What is raised where a turn cannot be told from its context."""
        return TemplateError(f"the chat template prints message {index + 1} so that its place is not certain")

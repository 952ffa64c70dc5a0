"""How a template prints an answer with a thought, learnt by rendering answers of marks after a conversation.

For example (Qwen3 after one question; T and C are the marks of thought and content):

    prompt    <|im_start|>user\\nWhy?<|im_end|>\\n<|im_start|>assistant\\n
    answered  ...<think>\\nT\\n</think>\\n\\nC<|im_end|>\\n
    form      before `<think>\\n`, middle `\\n</think>\\n\\n`, key `reasoning_content`

A prompt may have opened the thought (DeepSeek-R1's ends with `<think>\\n`); then `before` is empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlxtune.data.rows.messages import THINKING_KEYS
from mlxtune.data.template.probes import MARKS, tool_call
from mlxtune.data.template.template import Messages, Template
from mlxtune.data.template.texts import common_prefix

TAGS = ("<think>\n", "\n</think>\n\n")  # around a thought, where the template has no text of its own for it
OPEN_TAG = re.compile(r"<think>\s*\Z")  # at the end of a prompt: it opens a thought


@dataclass(frozen=True)
class Form:
    """The text of a template around a thought: `before` thought `middle` content."""

    before: str  # what stands between the prompt and the thought
    middle: str  # what stands between the thought and the content
    key: str  # the field that the thought is read from; "" when it stays in the content, tags and all
    opened: bool = False  # the prompt has begun the thought already


class Probe:
    """What a template prints for answers of marks after a conversation. Raises TemplateError when it refuses that."""

    def __init__(self, template: Template, messages: Messages, tools: Any) -> None:
        self.template, self.messages, self.tools = template, messages, tools
        self.prompt = template.text(messages, tools, prompt=True)
        context = template.attempt(messages, tools)
        self.context_length = common_prefix(self.prompt, context)
        self.thought, self.content = _unused_marks(self.prompt)
        # Fields that the template reads come first: transformers renames another one, older versions do not.
        source = str(template.tokenizer.chat_template)
        read = [key for key in THINKING_KEYS if key in source]
        self.keys = [*read, *(key for key in THINKING_KEYS if key not in read)]

    def answered(self, **answer: Any) -> tuple[str, str]:
        """(end of the prompt that this answer is printed without, what follows the prompt); ("", "") where the answer
        is refused, or changes what came before it.
        """
        whole = self.template.attempt([*self.messages, {"role": "assistant", **answer}], self.tools)
        shared = common_prefix(self.prompt, whole)
        if shared < self.context_length:
            return "", ""
        return self.prompt[shared:], whole[shared:]

    @cached_property
    def plain(self) -> tuple[str, str] | None:
        """What stands (before, after) the content of an answer without a thought; None where it is not printed."""
        _, shown = self.answered(content=self.content)
        before, mark, after = shown.partition(self.content)
        if not mark:
            return None
        return before, after

    def form(self) -> Form:
        """That of an answer with a thought."""
        return self.of_field() or self.of_calls() or self.of_tags()

    def of_field(self) -> Form | None:
        """Thoughts have a field, and are printed in an answer."""
        for key in self.keys:
            unprinted, shown = self.answered(content=self.content, **{key: self.thought})
            before, thought, rest = shown.partition(self.thought)
            middle, content, _ = rest.partition(self.content)
            if thought and content and middle.strip() and not unprinted.strip():
                # Without text before the thought, an answer without a thought shows whether the prompt opens one.
                plain_has_text = self.plain is None or bool(self.plain[0].strip())
                opened = not before.strip() and plain_has_text
                return Form(before, middle, key, opened)
        return None

    def of_calls(self) -> Form | None:
        """Thoughts have a field, and are printed before a tool call alone."""
        call = tool_call({})
        _, bare = self.answered(content="", tool_calls=[call])
        for key in self.keys:
            unprinted, shown = self.answered(content="", tool_calls=[call], **{key: self.thought})
            before, thought, rest = shown.partition(self.thought)
            closing = self.template.special.search(rest)
            if thought and closing and closing.group() not in bare:
                if unprinted.strip():  # a prompt that closes an empty thought leaves no place for another
                    return None
                return Form(before, rest[: closing.end()], key)
        return None

    def of_tags(self) -> Form:
        """Thoughts have no field: they are in the content, and the template strips them or not."""
        opened = OPEN_TAG.search(self.prompt) is not None
        opening, closing = TAGS
        _, shown = self.answered(content=opening + self.thought + closing + self.content)
        strips_thought = self.content in shown and self.thought not in shown
        return Form(
            before="" if opened else opening,
            middle=closing,
            key=THINKING_KEYS[0] if strips_thought else "",
            opened=opened,
        )


def _unused_marks(text: str) -> tuple[str, str]:
    """Two private-use characters that a text does not hold."""
    taken = set(MARKS.findall(text))
    spare = (mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in taken)
    return next(spare), next(spare)

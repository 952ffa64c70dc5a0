"""How a template prints what a model thinks before it answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxtune.data.template.probes import ASSISTANT, NEXT, USER, assistant, user

if TYPE_CHECKING:
    from mlxtune.data.template.template import Template

TAG = re.compile(r"</?[A-Za-z|_:]+>|\[/?[A-Z_]+\]")  # markup that a prompt may open a thought with


@dataclass(frozen=True)
class Thought:
    """The template's own text around a thought. In a worked example, Qwen3, the probe `thought N, answer A` is printed

        <|im_start|>assistant\\n<think>\\nN\\n</think>\\n\\nA<|im_end|>\\n

    so `open` is `<think>`, `close` is `</think>` and `closing` is `\\n</think>\\n\\n`; and an answer without a thought

        <|im_start|>assistant\\n<think>\\n\\n</think>\\n\\nA<|im_end|>\\n

    so `empty` is `<think>\\n\\n</think>\\n\\n`.
    """

    open: str = "<think>"  # the tag that opens a thought
    close: str = "</think>"  # the tag that closes it
    closing: str = "\n</think>\n\n"  # what stands between a thought and the text
    empty: str = ""  # what is printed for a last turn that has no thought; "" for nothing
    printed: bool = False  # whether thoughts are ever printed

    @staticmethod
    def of(template: Template) -> Thought:
        """Found by probes: the thought in a field of its own, and then between tags in the content."""
        in_field = assistant(ASSISTANT, reasoning_content=NEXT)
        in_content = assistant(f"<think>\n{NEXT}\n</think>\n\n{ASSISTANT}")
        for message in (in_field, in_content):
            before, thought, after = template.attempt([user(USER), message]).partition(NEXT)
            closing, text, _ = after.partition(ASSISTANT)
            opening = _last_tag(template, before)
            if thought and text and opening and closing.strip():
                empty = _empty_thought(template, opening, closing.strip())
                return Thought(opening, closing.strip(), closing, empty, printed=True)
        return Thought()

    def opened(self, text: str) -> str:
        """What a prompt's end has printed of a thought that it opens and does not close; "" for none."""
        if not text.rstrip().endswith(self.open):
            return ""
        return text[text.rfind(self.open) :]

    def closes(self, text: str) -> bool:
        """Whether the text closes a thought."""
        return self.close in text

    def closed(self, opened: str) -> str:
        """What ends a thought at once that a prompt has opened with `opened`."""
        if not self.printed:
            return self.closing
        if self.empty.startswith(opened):
            return self.empty[len(opened) :]
        return self.closing.lstrip()


def _last_tag(template: Template, text: str) -> str:
    """The last tag or special token of a text; of two that end together the longer one. "" for none."""
    tags = [*TAG.finditer(text), *template.special.finditer(text)]
    if not tags:
        return ""
    last = max(tags, key=lambda tag: (tag.end(), -tag.start()))
    return text[last.start() :].strip()


def _empty_thought(template: Template, opening: str, close: str) -> str:
    """What the template prints for an answer that has no thought, where that is an empty thought; else ""."""
    before_answer = template.attempt([user(USER), assistant(ASSISTANT)]).partition(ASSISTANT)[0]
    if opening not in before_answer or close not in before_answer:
        return ""
    return before_answer[before_answer.rfind(opening) :]

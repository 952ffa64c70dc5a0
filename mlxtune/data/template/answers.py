"""What a model generated -> the message that a server would keep: the answer apart from the thought before it.

A template that takes a thought prints text of its own around it, and reads thought and answer from fields of their own;
given back as one text they are refused, or stay where they should be stripped. So a generated text is taken apart by
the form that the template itself prints (see `answer_forms`). For example (Qwen3):

    generated   <think>\\nA cat says it.\\n</think>\\n\\nMiaow<|im_end|>
    message     {"role": "assistant", "content": "Miaow", "reasoning_content": "A cat says it."}
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

from mlxtune.data.template.answer_forms import OPEN_TAG, Probe
from mlxtune.data.template.loose_text import after, begun, split, without_end
from mlxtune.data.template.template import Messages, Template, TemplateError

QUESTION = {"role": "user", "content": "q"}


class Said(NamedTuple):
    """An answer, taken apart."""

    thought: str  # what the model thought before; "" for nothing
    content: str  # what it answered then


def parse(template: Template, messages: Messages, tools: Any, text: str) -> dict[str, Any]:
    """The message of an answer to a conversation. text: as generated, special tokens included, its end token or not.

    Raises TemplateError when the template refuses the conversation.
    """
    return Reader(template, messages, tools).message(text)


class Plain:
    """Reads answers of a model without a chat template: all of it is content. ends: tokens that end an answer."""

    def __init__(self, ends: frozenset[str] = frozenset()) -> None:
        self.ends = ends

    def message(self, text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": self.said(text).content}

    def takes(self, message: dict[str, Any]) -> bool:
        return True

    def said(self, text: str) -> Said:
        return Said("", without_end(text, self.ends))

    so_far = said

    def ended(self, text: str) -> bool:
        return without_end(text, self.ends) != text


class Reader:
    """Reads answers to one conversation. Raises TemplateError when the template refuses it.

    ends: tokens that end an answer besides the template's own.
    """

    def __init__(
        self, template: Template, messages: Messages, tools: Any = None, ends: frozenset[str] = frozenset()
    ) -> None:
        self.template, self.messages, self.tools = template, messages, tools
        self.ends = ends | template.stops | ({template.tokenizer.eos_token} - {None})
        probe = Probe(template, messages, tools)
        self.prompt = probe.prompt
        if probe.plain is None:  # an answer changes what came before it: the shortest conversation shows more
            with suppress(TemplateError):  # it may want more of a conversation; then an answer is but a text
                probe = Probe(template, [QUESTION], tools)
        self.form = probe.form()
        # What stands before and after the content of an answer without a thought.
        self.before, self.after = probe.plain or ("", "")
        self.again = self._between_parts()

    def _between_parts(self) -> str:
        """What stands between two parts of one thought, where each has the template's text around it; else "".

        Harmony writes every part as a message of its own. Its `middle` is `<|end|><|start|>assistant`, and then what
        stands before a plain answer; the first of these, and then `before` of a thought, stand between two parts.
        """
        between = self.form.middle.removesuffix(self.before).strip()
        if between in ("", self.form.middle.strip()):
            return ""
        return between + self.form.before

    def message(self, text: str) -> dict[str, Any]:
        """The message of a generated text.

        One that has none of the template's forms is its content, without special tokens if the template refuses them.
        """
        said = self.said(text)
        content = said.content if self.form.key else self._tagged(text)
        thought: dict[str, Any] = {}
        if self.form.key and said.thought.strip():
            thought[self.form.key] = said.thought
        message = {"role": "assistant", "content": content, **thought}
        clean = {"role": "assistant", "content": self.template.special.sub("", content)}
        for candidate in (message, {**clean, **thought}, clean):
            if self.takes(candidate):
                return candidate
        return message

    def takes(self, message: dict[str, Any]) -> bool:
        """Whether the template can go on after this answer."""
        return bool(self.template.attempt([*self.messages, message, QUESTION], self.tools, prompt=True))

    def said(self, text: str) -> Said:
        """Thought and content of a generated text, whole or cut anywhere."""
        return self._said(self._without_end(text), self.ended(text))

    def ended(self, text: str) -> bool:
        """Whether the model ended its answer itself."""
        return self._without_end(text) != text

    def so_far(self, text: str) -> Said:
        """The same for a text that goes on: what is certain already, without the beginnings of template text."""
        for opening in filter(str.strip, (self.form.before, self.before)):
            if opening.startswith((text, text.lstrip())):
                return Said("", "")
        thought, content = self._said(text)
        if content:
            return Said(thought, content[: len(content) - begun(content, self.after, *self.ends)])
        return Said(thought[: len(thought) - begun(thought, self.form.middle, self.again, *self.ends)], "")

    def _said(self, body: str, ended: bool = False) -> Said:
        """Thought and content of a text without its end token. ended: it had one.

        Tried in this order: a thought and its end, a thought alone, a plain answer, what a prompt that opens a thought
        leaves to be read as one, and a plain answer behind something else.
        """
        form = self.form
        for exact in (True, False):
            rest = after(form.before, body, exact)
            parts = None if rest is None else split(form.middle, rest, exact)
            if parts is not None:
                return Said(self._joined(parts[0]), parts[1])
        opened = after(form.before, body, exact=False) if form.before.strip() else None
        if opened is not None:
            return Said(self._joined(opened), "")
        for exact in (True, False):
            rest = after(self.before, body, exact)
            if self.before.strip() and rest is not None:
                return Said("", rest)
        if form.opened and (self.before.strip() or not ended):  # else: answers are trained without closing the thought
            return Said(self._joined(body), "")
        if self.before.strip() and self.before in body:  # something else was said first: a remark, say
            first, _, rest = body.rpartition(self.before)
            return Said(self.template.special.sub(" ", first).strip(), rest)
        return Said("", body.removeprefix(self.before))

    def _joined(self, thought: str) -> str:
        """A thought of several parts as one text."""
        return thought.replace(self.again, "\n\n") if self.again else thought

    def _tagged(self, text: str) -> str:
        """An answer with its thought inside, as the template prints it; its prompt may have opened the thought."""
        body = self._without_end(text)
        if self.form.opened:
            opened = OPEN_TAG.search(self.prompt)
            return (opened.group() if opened else "") + body
        if after(self.form.before, body, exact=False) is not None:
            return body
        return self._said(body, ended=True).content

    def _without_end(self, text: str) -> str:
        """The text without the end token, and without what the template prints between the content and that token."""
        borders = {len(self.after)}  # up to where the closing may have been generated
        for match in self.template.special.finditer(self.after):
            borders |= {*match.span()}
        for border in sorted(borders - {0}, reverse=True):
            if text.endswith(self.after[:border]):
                return text[:-border]
        return without_end(text, self.ends)

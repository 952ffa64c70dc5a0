"""What a model said -> the message that a server would keep: the answer apart from the thought before it.

A template that takes a thought prints text of its own around it, and reads thought and answer from fields of their own;
given back as one text they are refused, or stay where they should be stripped. So the forms of an answer are learnt as
everything about a template is: an answer of marks is rendered after the conversation, and what stands around the marks
is what a model writes there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from mlxtune.data.template.template import MARKS, THINKING_KEYS, Messages, Template, TemplateError, common_prefix

TAGS = ("<think>\n", "\n</think>\n\n")  # around a thought, where the template has no text of its own for it
OPEN_TAG = re.compile(r"<think>\s*\Z")
CALL = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {}}}
QUESTION = {"role": "user", "content": "q"}


class Said(NamedTuple):
    """What a model thought, and what it answered then."""

    thought: str
    content: str


@dataclass(frozen=True)
class Form:
    """The text of a template around a thought: `before` thought `middle` content.

    key: the field that the thought is read from; "" when it stays in the content, tags and all. opened: the prompt has
    begun the thought already.
    """

    before: str
    middle: str
    key: str
    opened: bool = False


def parse(template: Template, messages: Messages, tools: Any, text: str) -> dict[str, Any]:
    """The message of an answer to a conversation. text: as generated, special tokens included, its end token or not.

    Raises TemplateError when the template refuses the conversation.
    """
    return Reader(template, messages, tools).message(text)


class _Probe:
    """What a template prints for answers of marks after a conversation. Raises TemplateError when it refuses that."""

    def __init__(self, template: Template, messages: Messages, tools: Any) -> None:
        self.template, self.messages, self.tools = template, messages, tools
        self.asked = template.text(messages, tools, prompt=True)
        self.earlier = common_prefix(self.asked, template.attempt(messages, tools))
        taken = set(MARKS.findall(self.asked))
        spare = (mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in taken)
        self.thought, self.content = next(spare), next(spare)
        # transformers renames a field that the template does not read; older versions do not.
        source = str(template.tokenizer.chat_template)
        self.keys = sorted(THINKING_KEYS, key=lambda key: key not in source)

    def answered(self, **answer: Any) -> tuple[str, str]:
        """(end of the prompt that this answer is printed without, what follows the prompt); ("", "") where the answer
        is refused, or changes what came before it.
        """
        whole = self.template.attempt([*self.messages, {"role": "assistant", **answer}], self.tools)
        shared = common_prefix(self.asked, whole)
        return (self.asked[shared:], whole[shared:]) if shared >= self.earlier else ("", "")

    @cached_property
    def plain(self) -> tuple[str, str] | None:
        """What stands (before, after) the content of an answer without a thought."""
        before, found, after = self.answered(content=self.content)[1].partition(self.content)
        return (before, after) if found else None

    def form(self) -> Form:
        """That of an answer with a thought."""
        return self.of_field() or self.of_calls() or self.of_tags()

    def of_field(self) -> Form | None:
        """Thoughts have a field, and are printed in an answer."""
        for key in self.keys:
            unprinted, shown = self.answered(content=self.content, **{key: self.thought})
            before, found, rest = shown.partition(self.thought)
            middle, follows, _ = rest.partition(self.content)
            if found and follows and middle.strip() and not unprinted.strip():
                opened = not before.strip() and bool(self.plain is None or self.plain[0].strip())
                return Form(before, middle, key, opened)
        return None

    def of_calls(self) -> Form | None:
        """Thoughts have a field, and are printed before a tool call alone."""
        bare = self.answered(content="", tool_calls=[CALL])[1]
        for key in self.keys:
            unprinted, shown = self.answered(content="", tool_calls=[CALL], **{key: self.thought})
            before, found, rest = shown.partition(self.thought)
            closing = self.template.special.search(rest)
            if found and closing and closing.group() not in bare:
                # A prompt that closes an empty thought leaves no place for another.
                return None if unprinted.strip() else Form(before, rest[: closing.end()], key)
        return None

    def of_tags(self) -> Form:
        """Thoughts have no field: they are in the content, and the template strips them or not."""
        opened = OPEN_TAG.search(self.asked) is not None
        _, shown = self.answered(content=self.thought.join(TAGS) + self.content)
        stripped = self.content in shown and self.thought not in shown
        return Form("" if opened else TAGS[0], TAGS[1], THINKING_KEYS[0] if stripped else "", opened)


class Plain:
    """Reads answers of a model without a chat template: all of it is content. ends: tokens that end an answer."""

    def __init__(self, ends: frozenset[str] = frozenset()) -> None:
        self.ends = ends

    def message(self, text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": self.said(text).content}

    def takes(self, message: dict[str, Any]) -> bool:
        return True

    def said(self, text: str) -> Said:
        return Said("", _without(text, self.ends))

    so_far = said

    def ended(self, text: str) -> bool:
        return _without(text, self.ends) != text


class Reader:
    """Reads answers to one conversation. Raises TemplateError when the template refuses it.

    ends: tokens that end an answer besides the template's own.
    """

    def __init__(
        self, template: Template, messages: Messages, tools: Any = None, ends: frozenset[str] = frozenset()
    ) -> None:
        self.template, self.messages, self.tools = template, messages, tools
        self.ends = ends | template.stops | ({template.tokenizer.eos_token} - {None})
        probe = _Probe(template, messages, tools)
        self.asked = probe.asked
        if probe.plain is None:  # an answer changes what came before it: the shortest conversation shows more
            with suppress(TemplateError):  # it may want more of a conversation; then an answer is but a text
                probe = _Probe(template, [QUESTION], tools)
        self.form = probe.form()
        self.before, self.after = probe.plain or ("", "")
        between = self.form.middle.removesuffix(self.before).strip()
        # What stands between two parts of one thought, where each has the template's text around it.
        self.again = "" if between in ("", self.form.middle.strip()) else between + self.form.before

    def message(self, text: str) -> dict[str, Any]:
        """The message of a generated text.

        One that has none of the template's forms is its content, without special tokens if the template refuses them.
        """
        said = self.said(text)
        content = said.content if self.form.key else self._tagged(text)
        thought = {self.form.key: said.thought} if self.form.key and said.thought.strip() else {}
        message = {"role": "assistant", "content": content, **thought}
        if self.takes(message):
            return message
        clean = {"role": "assistant", "content": self.template.special.sub("", content)}
        return next((other for other in ({**clean, **thought}, clean) if self.takes(other)), message)

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
            return Said(thought, content[: len(content) - _begun(content, self.after, *self.ends)])
        return Said(thought[: len(thought) - _begun(thought, self.form.middle, self.again, *self.ends)], "")

    def _said(self, body: str, ended: bool = False) -> Said:
        """Thought and content of a text without its end token. ended: it had one."""
        form = self.form
        for exact in (True, False):
            rest = _after(form.before, body, exact)
            if rest is not None and (parts := _split(form.middle, rest, exact)):
                return Said(self._joined(parts[0]), parts[1])
        opened = _after(form.before, body, exact=False) if form.before.strip() else None
        if opened is not None:
            return Said(self._joined(opened), "")
        for exact in (True, False):
            rest = _after(self.before, body, exact)
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
            found = OPEN_TAG.search(self.asked)
            return (found.group() if found else "") + body
        return body if _after(self.form.before, body, exact=False) is not None else self._said(body, ended=True).content

    def _without_end(self, text: str) -> str:
        """The text without the end token, and without what the template prints between the content and that token."""
        places = [place for match in self.template.special.finditer(self.after) for place in match.span()]
        for place in sorted({*places, len(self.after)} - {0}, reverse=True):
            if text.endswith(self.after[:place]):
                return text[:-place]
        return _without(text, self.ends)


def _without(text: str, ends: frozenset[str]) -> str:
    """A text without the end token that it ends with, if any."""
    return next((text.rstrip().removesuffix(end) for end in ends if text.rstrip().endswith(end)), text)


def _pattern(literal: str) -> str:
    """A regular expression for template text with other white space, or none."""
    words = literal.split()
    inside = r"\s*".join(map(re.escape, words))
    left, right = (r"\s*" if space else "" for space in (literal[:1].isspace(), literal[-1:].isspace()))
    return left + inside + right if words else r"\s*" if literal else ""


def _after(literal: str, text: str, exact: bool) -> str | None:
    """What follows template text at the start; None where it is not there."""
    if exact:
        return text.removeprefix(literal) if text.startswith(literal) else None
    found = re.match((r"\s*" if literal.strip() else "") + _pattern(literal), text)
    return text[found.end() :] if found else None


def _split(literal: str, text: str, exact: bool) -> tuple[str, str] | None:
    """What stands before and after the first place of template text."""
    if exact:
        before, found, after = text.partition(literal)
        return (before, after) if found else None
    match = re.search(_pattern(literal), text)
    return (text[: match.start()], text[match.end() :]) if match else None


def _begun(text: str, *literals: str) -> int:
    """How many characters at the end of a text may be the beginning of one of some texts."""

    def lengths() -> Iterator[int]:
        for literal in literals:
            for form in {literal, literal.strip()}:
                yield from (size for size in range(1, len(form) + 1) if text.endswith(form[:size]))

    return max(lengths(), default=0)

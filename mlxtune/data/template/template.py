"""A tokenizer's chat template: what it prints around turns, found by rendering probes.

Nothing here knows a family of models. A probe is a small conversation whose contents are marks, private-use characters
that no template prints by itself; what stands between marks in its render is the template's own text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mlxtune_convert.gguf.tokenizer_write import token_ids

from mlxtune.data.template import bounded, rendering
from mlxtune.data.template.rendering import Endless, Print, Remembered, in_time, prepared, printer
from mlxtune.errors import UserError

MARKS = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd]")
USER, ASSISTANT, NEXT = "\ue000", "\ue001", "\ue002"  # the marks of probes
TAG = re.compile(r"</?[A-Za-z|_:]+>|\[/?[A-Z_]+\]")  # markup that a prompt may open a thought with
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")

Messages = list[dict[str, Any]]


class TemplateError(Exception):
    """The template refuses a conversation, or prints it so that turns cannot be told apart; the text says why."""


@dataclass
class Template:
    """Renders conversations with one tokenizer's template and fixed variables.

    day: what templates that print the date are given (None: today). starts: what was learnt about turn openings:
    (role before, template text before the turn) -> its characters that belong to the prompt.
    """

    tokenizer: Any
    kwargs: dict[str, Any] = field(default_factory=dict)
    day: date | None = None
    starts: dict[tuple[str, str], int] = field(default_factory=dict)
    remembered: Remembered = field(default_factory=Remembered)
    _printers: dict[bool, Print] = field(default_factory=dict)
    _header_ends: dict[bool, str] = field(default_factory=dict)

    def text(self, messages: Messages, tools: Any = None, prompt: bool = False) -> str:
        """The rendered text; prompt: with what asks the model for its turn. Raises TemplateError."""
        return self.printed(prepared(messages), tools, prompt)

    def printed(self, messages: Messages, tools: Any = None, prompt: bool = False) -> str:
        """The same, of messages that went through `rendering.prepared`: a part of them can be printed as well."""
        try:
            with in_time(rendering.SECONDS):
                text = self._printer(bool(tools))(messages, tools, prompt)
        except Endless as error:
            hint = "Take another one, the model's original, say: data.template."
            raise UserError(f"the chat template cannot be used: {error}", hint) from error
        except Exception as error:  # a template is a stranger's program, and may raise anything
            raise TemplateError(f"the chat template refuses this conversation: {error}") from error
        if len(text) > bounded.LONGEST:
            raise TemplateError(f"the chat template makes {len(text):,} characters of this conversation")
        return text

    def _printer(self, tools: bool) -> Print:
        """Chat templates may come as several: one of them is for conversations with tools."""
        if tools not in self._printers:
            source = self.tokenizer.get_chat_template(tools=[{}] if tools else None)
            if self.day and self.prints_date:
                source = self._pinned(source)
            self._printers[tools] = printer(self.tokenizer, source, self.kwargs)
        return self._printers[tools]

    def attempt(self, messages: Messages, tools: Any = None, prompt: bool = False) -> str:
        """The rendered text, or "" where the template refuses."""
        try:
            return self.text(messages, tools, prompt)
        except TemplateError:
            return ""

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Matches any token that was added to the vocabulary whole, the longest first."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.content.strip()}
        added |= {self.tokenizer.eos_token} - {None}
        return re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")

    @cached_property
    def _ends(self) -> tuple[frozenset[str], str]:
        """(tokens that end an answer, what follows the last answer up to its end token).

        A worked example, Phi-3: behind the last answer it prints `<|end|>\\n<|endoftext|>`, between an answer and the
        next question `<|end|>\\n<|user|>\\n`. Both begin with `<|end|>\\n`, so `<|end|>` is what ends a turn wherever
        it stands; `<|endoftext|>` only ends the text. The original Llama 3 always prints the next header as well, so
        that both begin with `<|eot_id|><|start_header_id|>`: tokens that begin a message end none.
        """
        ask: dict[str, Any] = {"role": "user", "content": USER}
        answer: dict[str, Any] = {"role": "assistant", "content": ASSISTANT}
        again: dict[str, Any] = {"role": "user", "content": NEXT}
        last = self.attempt([ask, answer]).partition(ASSISTANT)[2]
        middle = self.attempt([ask, answer, again]).partition(ASSISTANT)[2].partition(NEXT)[0]
        both = self._closers(last[: common_prefix(last, middle)]) if middle else []
        if both:
            end = self._named(both)
            return frozenset({end.group()}), last[: end.end()]
        header, _, asked = self.attempt([ask], prompt=True).partition(USER)
        ends_all = self._first(asked) == self._first(middle)  # a token that ends every message, the user's too
        between = middle if ends_all else middle[: len(middle) - common_suffix(middle, header)]
        closers = self._closers(last)
        end_of_last = self._named(closers) if closers else None
        found = {self._first(between), end_of_last.group() if end_of_last else ""} - {""}
        if not found:  # the next turn's header is what the model must produce to end its own
            found = {self._first(middle)} - {""}
        return frozenset(found), last[: end_of_last.end()] if end_of_last else ""

    def _closers(self, text: str) -> list[re.Match[str]]:
        """The special tokens in template text behind an answer, but for those that begin a message."""
        found = list(self.special.finditer(text))
        return [match for match in found if match.group() not in self._openers] or found

    def _named(self, closers: list[re.Match[str]]) -> re.Match[str]:
        """Of several tokens behind an answer, the one that generation stops at, else the last."""
        return next((match for match in reversed(closers) if match.group() in self.named_ends), closers[-1])

    @cached_property
    def _openers(self) -> frozenset[str]:
        """The special tokens before the first text of a conversation: they open messages."""
        first = self.attempt([{"role": "system", "content": NEXT}, {"role": "user", "content": USER}])
        first = first if NEXT in first else self.attempt([{"role": "user", "content": USER}])
        return frozenset(self.special.findall(MARKS.split(first)[0]))

    @cached_property
    def named_ends(self) -> frozenset[str]:
        """The tokens that the tokenizer and the model's generation_config.json name as ends."""
        named = {self.tokenizer.eos_token} - {None}
        file = Path(str(self.tokenizer.name_or_path)) / "generation_config.json"
        try:
            ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            ids = None
        for index in token_ids(ids):
            named.add(self.tokenizer.convert_ids_to_tokens(index))
        return frozenset(str(token) for token in named)

    def _first(self, text: str) -> str:
        match = self.special.search(text)
        return match.group() if match else ""

    @cached_property
    def stops_at_headers(self) -> bool:
        """Whether the next turn's header is what ends an answer."""
        return bool(self.stops) and not self.end_of_turn

    def header_that_ends(self, calls: bool) -> str:
        """What a model stops with whose turns have no end token ("" where they have one): the beginning of the header
        that follows, up to and with its first special token. For GLM, `<|user|>` behind a text and `<|observation|>`
        behind tool calls.
        """
        if not self.stops_at_headers:
            return ""
        if calls not in self._header_ends:
            call = {
                "type": "function",
                "id": "call00001",
                "function": {"name": "f", "arguments": {ASSISTANT: ASSISTANT}},
            }
            text = {"role": "assistant", "content": ASSISTANT}
            turn = {"role": "assistant", "content": "", "tool_calls": [call]} if calls else text
            next_role = {"role": "tool", "tool_call_id": "call00001", "name": "f"} if calls else {"role": "user"}
            shown = self.attempt([{"role": "user", "content": USER}, turn, {**next_role, "content": NEXT}])
            between = shown.rpartition(ASSISTANT)[2].partition(NEXT)[0]
            openers = [match for match in self.special.finditer(between) if match.group() in self._headers]
            self._header_ends[calls] = openers[0].group() if openers else ""
        return self._header_ends[calls]

    @cached_property
    def _headers(self) -> frozenset[str]:
        """The special tokens that stand between messages of the roles that follow an answer."""
        call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {}}}
        found: set[str] = set()
        for answer, after in (
            ({"content": ASSISTANT}, {"role": "user"}),
            ({"content": ASSISTANT, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "call00001", "name": "f"}),
        ):
            asked = {"role": "user", "content": USER}
            shown = self.attempt([asked, {"role": "assistant", **answer}, {**after, "content": NEXT}])
            alone = self.attempt([asked, {"role": "assistant", **answer}])
            found |= set(self.special.findall(shown[common_prefix(shown, alone) :]))
        return frozenset(found)

    @property
    def stops(self) -> frozenset[str]:
        """The tokens that end an answer."""
        return self._ends[0]

    @property
    def end_of_turn(self) -> str:
        """What the model must produce after its last answer: whitespace, and the end-of-turn token; or ""."""
        return self._ends[1]

    def ends_answers(self, once: bool) -> bool:
        """Whether the model learns where to stop. once: rows are rendered once (data.expand_turns=none), so that only
        what the template prints is learned.
        """
        return bool(self.end_of_turn) or (not once and bool(self.header_that_ends(calls=False)))

    @cached_property
    def request(self) -> str:
        """What the template ends with to ask the model for its turn; "" when it cannot."""
        ask: Messages = [{"role": "user", "content": USER}]
        asked = self.attempt(ask, prompt=True)
        return asked[common_prefix(asked, self.attempt(ask)) :]

    @cached_property
    def unasked_header(self) -> str:
        """What a template without a way to ask prints before a turn's text; "" where that is but blanks, or nothing."""
        if self.request:
            return ""
        ask: dict[str, Any] = {"role": "user", "content": USER}
        silent = self.attempt([ask], prompt=True)
        before = self.attempt([ask, {"role": "assistant", "content": ASSISTANT}]).partition(ASSISTANT)[0]
        header = before.removeprefix(silent)
        return header if before.startswith(silent) and header.strip() else ""

    @cached_property
    def thought(self) -> Thought:
        """How the template prints a thought."""
        return Thought.of(self)

    def shared_start(self, one: str, other: str) -> int:
        """Length of the longest common start that ends inside no special token and no <tag> of either text."""
        shared = common_prefix(one, other)
        for text in (one, other):
            for pattern in (self.special, TAG):
                for match in pattern.finditer(text):
                    if match.start() < shared < match.end():
                        shared = match.start()
        return shared

    @cached_property
    def arguments_form(self) -> Literal["object", "text", "either"]:
        """The form in which tool-call arguments are printed as they should be. text: JSON text alone, an object is
        refused; either: both are printed alike; object: text would come out otherwise (encoded once more, say).
        """
        as_object, as_text = (
            self._call_probe({USER: NEXT}),
            self._call_probe(json.dumps({USER: NEXT}, ensure_ascii=False)),
        )
        if USER in as_object and NEXT in as_object:
            return "either" if as_object == as_text else "object"
        return "text" if f'"{USER}": "{NEXT}"' in as_text else "object"

    @cached_property
    def wants_short_ids(self) -> bool:
        """Whether the ids of tool calls must be nine letters or digits (Mistral): OpenAI's own are refused."""

        def printed(name: str) -> str:
            call = {"type": "function", "id": name, "function": {"name": "f", "arguments": {USER: NEXT}}}
            result = {"role": "tool", "tool_call_id": name, "name": "f", "content": ASSISTANT}
            turn = {"role": "assistant", "content": "", "tool_calls": [call]}
            return self.attempt([{"role": "user", "content": "q"}, turn, result])

        return bool(printed("call00001")) and not printed("call_0123456789abcdefghijkl")

    def _call_probe(self, arguments: Any) -> str:
        call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": arguments}}
        return self.attempt(
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        )

    @cached_property
    def prints_date(self) -> bool:
        """Whether the text depends on the day, so that token ids change from one to the next."""
        return "strftime_now" in str(self.tokenizer.chat_template)

    def _pinned(self, source: str) -> str:
        """The template's source with its own `strftime_now`, which knows `day` alone."""
        assert self.day is not None
        formats = sorted(set(re.findall(r"""strftime_now\(\s*["']([^"']*)["']""", source)))
        cases = "".join(f"{{%- if f == '{f}' %}}{self.day.strftime(f)}{{% endif %}}" for f in formats)
        return f"{{%- macro strftime_now(f) %}}{cases}{{% endmacro +%}}{source}"


@dataclass(frozen=True)
class Thought:
    """How a template prints what a model thinks before it answers. For Qwen3: "<think>", "</think>",
    "\n</think>\n\n", "<think>\n\n</think>\n\n", True.
    """

    open: str = "<think>"  # the tag that opens a thought
    close: str = "</think>"  # the tag that closes it
    closing: str = "\n</think>\n\n"  # what stands between a thought and the text
    empty: str = ""  # what is printed for a last turn that has no thought; "" for nothing
    printed: bool = False  # whether thoughts are ever printed

    @staticmethod
    def of(template: Template) -> Thought:
        ask: dict[str, Any] = {"role": "user", "content": USER}
        in_key = {"role": "assistant", "reasoning_content": NEXT, "content": ASSISTANT}
        in_text = {"role": "assistant", "content": f"<think>\n{NEXT}\n</think>\n\n{ASSISTANT}"}
        for message in (in_key, in_text):
            before, thought, after = template.attempt([ask, message]).partition(NEXT)
            closing, text, _ = after.partition(ASSISTANT)
            tags = [*TAG.finditer(before), *template.special.finditer(before)]
            if thought and text and tags and closing.strip():
                opened = before[max(tags, key=lambda tag: (tag.end(), -tag.start())).start() :].strip()
                bare = template.attempt([ask, {"role": "assistant", "content": ASSISTANT}]).partition(ASSISTANT)[0]
                empty = bare[bare.rfind(opened) :] if opened in bare and closing.strip() in bare else ""
                return Thought(opened, closing.strip(), closing, empty, True)
        return Thought()

    def opened(self, text: str) -> str:
        """What a prompt's end has printed of a thought that it opens and does not close; "" for none."""
        return text[text.rfind(self.open) :] if text.rstrip().endswith(self.open) else ""

    def closes(self, text: str) -> bool:
        return self.close in text

    def closed(self, opened: str) -> str:
        """What ends a thought at once that a prompt has opened with `opened`."""
        if not self.printed:
            return self.closing
        if self.empty.startswith(opened):
            return self.empty[len(opened) :]
        return self.closing.lstrip()


def common_prefix(one: str, other: str) -> int:
    """Length of the longest common start."""
    if one.startswith(other) or other.startswith(one):
        return min(len(one), len(other))
    low, high = 0, min(len(one), len(other))
    while low < high:  # one[:low] == other[:low] always holds
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def common_suffix(one: str, other: str) -> int:
    """Length of the longest common end."""
    return common_prefix(one[::-1], other[::-1])

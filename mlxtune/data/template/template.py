"""A tokenizer's chat template: what it prints around turns, found by rendering probes.

Nothing here knows a family of models; see `probes`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

from mlxtune_convert.gguf.tokenizer_write import token_ids

from mlxtune.data.template import bounded, rendering
from mlxtune.data.template.ends import AnswerEnds, header_that_ends
from mlxtune.data.template.probes import ASSISTANT, NEXT, USER, assistant, tool_call, tool_result, user
from mlxtune.data.template.rendering import Endless, Print, Remembered, in_time, prepared, printer
from mlxtune.data.template.texts import common_prefix
from mlxtune.data.template.thought import TAG, Thought
from mlxtune.errors import UserError

Messages = list[dict[str, Any]]


class TemplateError(Exception):
    """The template refuses a conversation, or prints it so that turns cannot be told apart; the text says why."""


LONGEST_REASON = 200  # letters of what a template says when it refuses a conversation
OWN_TEXT = 1 << 20  # characters that a template may add of its own; published ones are at most some 20,000 long
COPIES = 16  # times that it may print what it is given; real ones print it once


@dataclass
class Template:
    """Renders conversations with one tokenizer's template and fixed variables.

    What was learnt of it is kept: one Template serves all rows.
    """

    tokenizer: Any  # a Hugging Face tokenizer
    kwargs: dict[str, Any] = field(default_factory=dict)  # variables that the template is given (data.template_kwargs)
    day: date | None = None  # what templates that print the date are given; None: today
    # (role before a turn, template text before its content) -> how many characters of that text are prompt
    prompt_lengths: dict[tuple[str, str], int] = field(default_factory=dict)
    remembered: Remembered = field(default_factory=Remembered)  # renderings of marks
    _printers: dict[bool, Print] = field(default_factory=dict)  # with tools or without -> what prints the messages
    _header_ends: dict[bool, str] = field(default_factory=dict)  # behind tool calls or not -> see header_that_ends

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
            # Its text may be the row's own, of any length, and is kept with the row.
            reason = shorten(str(error) or type(error).__name__, LONGEST_REASON, placeholder=" ...")
            raise TemplateError(f"the chat template refuses this conversation: {reason}") from error
        if len(text) > bounded.LONGEST or self._is_swollen(text, messages, tools):
            raise TemplateError(f"the chat template makes {len(text):,} characters of this conversation")
        return text

    def _is_swollen(self, text: str, messages: Messages, tools: Any) -> bool:
        """Whether most of a long text is the template's own: tokens of a text take a hundred times its memory."""
        if len(text) <= OWN_TEXT:
            return False
        given = json.dumps([messages, tools, self.kwargs], ensure_ascii=False, default=str)
        return len(text) > OWN_TEXT + COPIES * len(given)

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
    def named_ends(self) -> frozenset[str]:
        """The tokens that the tokenizer and the model's generation_config.json name as ends."""
        named = {self.tokenizer.eos_token} - {None}
        file = Path(str(self.tokenizer.name_or_path)) / "generation_config.json"
        try:
            ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, RecursionError, AttributeError):
            ids = None
        for index in token_ids(ids):
            named.add(self.tokenizer.convert_ids_to_tokens(index))
        return frozenset(str(token) for token in named)

    @cached_property
    def _ends(self) -> AnswerEnds:
        return AnswerEnds.of(self)

    @property
    def stops(self) -> frozenset[str]:
        """The tokens that end an answer."""
        return self._ends.stops

    @property
    def end_of_turn(self) -> str:
        """What the model must produce after its last answer: whitespace, and the end-of-turn token; or ""."""
        return self._ends.end_of_turn

    @cached_property
    def stops_at_headers(self) -> bool:
        """Whether the next turn's header is what ends an answer."""
        return bool(self.stops) and not self.end_of_turn

    def header_that_ends(self, calls: bool) -> str:
        """For models whose turns have no end token, the text that stops them ("" for others): the beginning of the
        header that follows, up to and with its first special token. See the example of GLM in `ends`.

        calls: behind tool calls, else behind a text.
        """
        if not self.stops_at_headers:
            return ""
        if calls not in self._header_ends:
            self._header_ends[calls] = header_that_ends(self, calls)
        return self._header_ends[calls]

    def ends_answers(self, once: bool) -> bool:
        """Whether the model learns where to stop. once: rows are rendered once (data.expand_turns=none), so that only
        what the template prints is learned.
        """
        return bool(self.end_of_turn) or (not once and bool(self.header_that_ends(calls=False)))

    @cached_property
    def request(self) -> str:
        """What the template ends with to ask the model for its turn; "" when it cannot."""
        silent = self.attempt([user(USER)])
        asked = self.attempt([user(USER)], prompt=True)
        return asked[common_prefix(asked, silent) :]

    @cached_property
    def unasked_header(self) -> str:
        """What a template without a way to ask prints before a turn's text; "" where that is but blanks, or nothing."""
        if self.request:
            return ""
        silent = self.attempt([user(USER)], prompt=True)
        before_answer = self.attempt([user(USER), assistant(ASSISTANT)]).partition(ASSISTANT)[0]
        if not before_answer.startswith(silent):
            return ""
        header = before_answer.removeprefix(silent)
        return header if header.strip() else ""

    @cached_property
    def own_system(self) -> str:
        """The system prompt that the template itself puts before a conversation without one; "" where it puts none.

            with one      <|im_start|>system\\n②<|im_end|>\\n<|im_start|>user\\n①
            without       <|im_start|>system\\nYou are SmolLM.<|im_end|>\\n<|im_start|>user\\n①      -> You are SmolLM.

        What it prints in both cases (Llama's date) is no prompt of its own.
        """
        with_one = self.attempt([{"role": "system", "content": NEXT}, user(USER)])
        before, mark, after = with_one.partition(NEXT)
        between = after.partition(USER)[0]
        without = self.attempt([user(USER)]).partition(USER)[0]
        if not mark or not without.startswith(before) or not without.endswith(between):
            return ""
        return without[len(before) : len(without) - len(between)].strip()

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
        of_object = self._with_arguments({USER: NEXT})
        of_text = self._with_arguments(json.dumps({USER: NEXT}, ensure_ascii=False))
        if USER in of_object and NEXT in of_object:
            return "either" if of_object == of_text else "object"
        return "text" if f'"{USER}": "{NEXT}"' in of_text else "object"

    def _with_arguments(self, arguments: Any) -> str:
        """What is printed for a tool call."""
        return self.attempt([user("q"), assistant("", tool_calls=[tool_call(arguments)])])

    @cached_property
    def wants_short_ids(self) -> bool:
        """Whether the ids of tool calls must be nine letters or digits (Mistral): OpenAI's own are refused."""
        takes_short = self._takes_call_id("call00001")
        takes_long = self._takes_call_id("call_0123456789abcdefghijkl")
        return takes_short and not takes_long

    def _takes_call_id(self, call_id: str) -> bool:
        """Whether a conversation with a call of this id, and its result, is printed."""
        called = assistant("", tool_calls=[tool_call({USER: NEXT}, call_id)])
        return bool(self.attempt([user("q"), called, tool_result(ASSISTANT, call_id)]))

    @cached_property
    def prints_date(self) -> bool:
        """Whether the text depends on the day, so that token ids change from one to the next."""
        return "strftime_now" in str(self.tokenizer.chat_template)

    def _pinned(self, source: str) -> str:
        """The template's source with its own `strftime_now`, which knows `day` alone: a macro with one case for each
        format that the source asks for.
        """
        assert self.day is not None
        formats = sorted(set(re.findall(r"""strftime_now\(\s*["']([^"']*)["']""", source)))
        cases = "".join(f"{{%- if f == '{f}' %}}{self.day.strftime(f)}{{% endif %}}" for f in formats)
        return f"{{%- macro strftime_now(f) %}}{cases}{{% endmacro +%}}{source}"

"""How a chat template is run: the same text as the tokenizer's `apply_chat_template`, many times faster.

One row is rendered once or twice for each of its turns, every time a little further. `apply_chat_template` copies and
checks the whole conversation each time; here that is done once per message, and the compiled template is called on
growing parts of the list. Where the installed transformers has other insides, `apply_chat_template` itself is called.
"""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlxtune.data.template.bounded import compile_bounded

try:
    from transformers.utils import chat_template_utils as insides

    _compile: Callable[[str], Any] | None = insides._compile_jinja_template
    _plain, _alias, _normal = (
        insides._plain_template_data,
        insides._alias_reasoning_fields,
        insides._normalize_chat_messages,
    )
except (ImportError, AttributeError):  # another release of transformers
    _compile = None

SECONDS = 30.0  # that one conversation may take: a template is a stranger's program, and may go on for ever


class Endless(Exception):
    """The template did not come to an end in time."""


@contextmanager
def in_time(seconds: float) -> Iterator[None]:
    """Inside, Python code that lasts longer is ended by Endless. Only in the main thread, which alone hears signals."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def too_long(*_: Any) -> None:
        raise Endless(f"it did not come to an end within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# (prepared messages, tools, with what asks for a turn) -> text
Print = Callable[[list[dict[str, Any]], Any, bool], str]


def prepared(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as `apply_chat_template` hands them to a template; each on its own, so that parts can be taken."""
    if _compile is None:
        return messages
    made: list[dict[str, Any]] = _alias([_plain(message) for message in _normal(messages)])
    return made


def printer(tokenizer: Any, source: str, variables: dict[str, Any]) -> Print:
    """What prints prepared messages with a template's source and its variables."""
    if _compile is None:
        return _printer_of_library(tokenizer, source, variables)
    compiled = compile_bounded(source, _compile("").environment)
    fixed = _plain({**tokenizer.special_tokens_map, **variables})

    def print_compiled(messages: list[dict[str, Any]], tools: Any, prompt: bool) -> str:
        if not messages:
            raise ValueError("an empty conversation")
        text = compiled.render(
            messages=messages, tools=_plain(tools), documents=None, add_generation_prompt=prompt, **fixed
        )
        return str(text)

    return print_compiled


def _printer_of_library(tokenizer: Any, source: str, variables: dict[str, Any]) -> Print:
    """The same by the tokenizer's own `apply_chat_template`, which is slow."""

    def print_by_library(messages: list[dict[str, Any]], tools: Any, prompt: bool) -> str:
        text = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=prompt,
            chat_template=source,
            **variables,
        )
        return str(text)

    return print_by_library


class Remembered:
    """What a template printed for conversations of marks: rows of the same shape have the same ones.

    A shape is a number that stands for some marked messages (and tools), each made of the number of the messages before
    and the last message. For example

        no messages, no tools                  1
        user U                                 2    of 1 and this message
        user U, assistant A                    3    of 2 and this message
        user U, assistant A with a call C      4    of 2 and this message

    Two rows of a question and an answer have shape 3, and the template prints their marks once. Numbers are never given
    twice, so either table can be emptied when it has grown.
    """

    SHAPES = 100_000  # messages that are told apart
    CHARACTERS = 50_000_000  # of rendered texts

    def __init__(self) -> None:
        self._next = itertools.count(1)  # the numbers that are not given yet
        self._shapes: dict[tuple[int, str], int] = {}  # (shape of the messages before, message) -> shape
        self._texts: dict[tuple[int, bool], str] = {}  # (shape, with what asks for a turn) -> text
        self._characters = 0  # of all texts

    def shape(self, before: int, message: str) -> int:
        """The number of the messages of shape `before` with one more; before 0: of none."""
        if (before, message) not in self._shapes:
            if len(self._shapes) >= self.SHAPES:
                self._shapes.clear()
            self._shapes[before, message] = next(self._next)
        return self._shapes[before, message]

    def text(self, shape: int, prompt: bool, render: Callable[[], str]) -> str:
        """What was printed for a shape, with what asks for a turn or without."""
        if (shape, prompt) not in self._texts:
            if self._characters > self.CHARACTERS:
                self._texts.clear()
                self._characters = 0
            text = render()
            self._texts[shape, prompt] = text
            self._characters += len(text)
        return self._texts[shape, prompt]

"""Messages with marks in place of their texts: private-use characters that stand for nothing else.

    {"role": "user", "content": "Hi"}                                           {"role": "user", "content": "U"}
    {"role": "assistant", "content": "<think>\\nwhy\\n</think>\\n\\nHello"}     "<think>\\nT\\n</think>\\n\\nA"
    {"name": "f", "arguments": {"x": 1}}                                        {"name": "f", "arguments": {"x": "C"}}

U, T, A and C are marks here. Tags around a thought stay, because templates look for them in the content.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

from mlxtune.data.rows.messages import THINKING_KEYS
from mlxtune.data.rows.tool_calls import with_arguments
from mlxtune.data.template.probes import MARKS
from mlxtune.data.template.template import Messages

CONTENT, THINKING, CALLS = range(3)  # what a mark stands for; each further tool call has a kind of its own
KEPT = ("role", "name", "id", "tool_call_id", "type")  # what templates compare, count or look up
TAGS = re.compile(r"(\s*</?think>\s*)")  # templates look for them in the content
PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))  # Unicode's blocks of characters without a meaning


def unused_marks(text: str, messages: Messages) -> list[str]:
    """Per message, its marks as a string of one character per kind; none of them is in the text."""
    spare: Iterator[str] = map(chr, chain(*PRIVATE_USE))
    if MARKS.search(text):
        spare = (mark for mark in spare if mark not in text)
    out = []
    for message in messages:
        calls = message.get("tool_calls") or ()
        out.append("".join(islice(spare, CALLS + len(calls))))
    return out


def kind_of(key: str) -> int:
    """What the mark for a message's key stands for; for tool calls, that of the first."""
    if key == "tool_calls":
        return CALLS
    if key in THINKING_KEYS:
        return THINKING
    return CONTENT


def with_marks(message: dict[str, Any], marks: str, kinds: Iterable[int] = range(CALLS + 1)) -> dict[str, Any]:
    """The message with the same keys, and marks for its texts of some kinds. Something is marked even in an empty
    turn.
    """
    out = dict(message)
    for key, value in message.items():
        # A content may hold a thought between tags.
        wanted = kind_of(key) in kinds or (key == "content" and THINKING in kinds)
        if not wanted:
            continue
        if key == "tool_calls" and value:
            out[key] = [_call_with_mark(call, mark) for call, mark in zip(value, marks[CALLS:], strict=True)]
        elif isinstance(value, str) and value and key not in KEPT:
            out[key] = _marks_of_text(message, key, value, marks)
    if not message.get("content") and not message.get("tool_calls"):
        out["content"] = marks[CONTENT]
    return out


def _marks_of_text(message: dict[str, Any], key: str, text: str, marks: str) -> str:
    """What stands for one text of a message."""
    if kind_of(key) == THINKING:
        return marks[THINKING]
    if key == "content" and message["role"] == "assistant" and "</think>" in text:
        return _marks_between_tags(text, marks)
    return marks[CONTENT]


def _marks_between_tags(text: str, marks: str) -> str:
    """One mark for each thought and one for each text around it; the tags stay."""
    parts = list(thinking_parts(text))
    if all(kind is None for _, kind in parts):
        return marks[CONTENT]
    return "".join(part if kind is None else marks[kind] for part, kind in parts)


def thinking_parts(text: str) -> Iterator[tuple[str, int | None]]:
    """The text cut at its thinking tags: (tag or blank, None), (thought, THINKING), (text, CONTENT)."""
    parts = TAGS.split(text)  # texts at even places, tags at odd ones
    for place, part in enumerate(parts):
        is_tag = place % 2 == 1
        if is_tag or not part.strip():
            yield part, None
        elif place + 1 < len(parts) and "</think>" in parts[place + 1]:
            yield part, THINKING
        else:
            yield part, CONTENT


def _call_with_mark(call: dict[str, Any], mark: str) -> dict[str, Any]:
    """A tool call whose arguments are the mark, in the form in which they were given."""
    given = call.get("function", call).get("arguments")
    if isinstance(given, dict) and given:
        return with_arguments(call, dict.fromkeys(given, mark))  # a template may ask for an argument by its name
    if isinstance(given, str):
        return with_arguments(call, mark)
    return with_arguments(call, {mark: mark})

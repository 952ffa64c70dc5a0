"""Conversations with marks in place of their texts: private-use characters that stand for nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from mlxtune.data.rows.messages import with_arguments
from mlxtune.data.template.template import MARKS, THINKING_KEYS, Messages

CONTENT, THINKING, CALLS = range(3)  # what a mark stands for; each further tool call has a kind of its own
KEPT = ("role", "name", "id", "tool_call_id", "type")  # what templates compare, count or look up


def marks_for(text: str, messages: Messages) -> list[str]:
    """Per message, its marks as a string of one character per kind; none of them is in the text."""
    spare = (chr(code) for block in ((0xE000, 0xF900), (0xF0000, 0xFFFFE)) for code in range(*block))
    if MARKS.search(text):
        spare = (mark for mark in spare if mark not in text)
    return ["".join(islice(spare, CALLS + len(message.get("tool_calls") or ()))) for message in messages]


def kind_of(key: str) -> int:
    return CALLS if key == "tool_calls" else THINKING if key in THINKING_KEYS else CONTENT


def replaced(message: dict[str, Any], marks: str, kinds: Iterable[int] = range(CALLS + 1)) -> dict[str, Any]:
    """The message with the same keys, and marks for its texts of some kinds. Something is marked even in an empty
    turn.
    """
    out = dict(message)
    for key, value in message.items():
        if kind_of(key) not in kinds and not (key == "content" and THINKING in kinds):
            continue
        if key == "tool_calls" and value:
            out[key] = [_replaced_call(call, mark) for call, mark in zip(value, marks[CALLS:], strict=True)]
        elif isinstance(value, str) and value and key not in KEPT:
            thinks = message["role"] == "assistant" and "</think>" in value
            whole = marks[THINKING] if kind_of(key) == THINKING else marks[CONTENT]
            out[key] = _replaced_thinking(value, marks) if thinks and key == "content" else whole
    if not message.get("content") and not message.get("tool_calls"):
        out["content"] = marks[CONTENT]
    return out


TAGS = re.compile(r"(\s*</?think>\s*)")  # templates look for them in the content


def _replaced_thinking(text: str, marks: str) -> str:
    """One mark for each thought and one for each text around it."""
    parts = list(thinking_parts(text))
    if all(kind is None for _, kind in parts):
        return marks[CONTENT]
    return "".join(part if kind is None else marks[kind] for part, kind in parts)


def thinking_parts(text: str) -> Iterator[tuple[str, int | None]]:
    """The text cut at its thinking tags: (tag or blank, None), (thought, THINKING), (text, CONTENT)."""
    parts = TAGS.split(text)
    for place, part in enumerate(parts):
        closes = place + 1 < len(parts) and "</think>" in parts[place + 1]
        yield part, None if place % 2 or not part.strip() else THINKING if closes else CONTENT


def _replaced_call(call: dict[str, Any], mark: str) -> dict[str, Any]:
    given = call.get("function", call).get("arguments")
    if isinstance(given, dict) and given:
        return with_arguments(call, dict.fromkeys(given, mark))  # a template may ask for an argument by its name
    return with_arguments(call, mark if isinstance(given, str) else {mark: mark})

"""A row with one answer and what somebody thought of it -> its conversation, the rating as its side (KTO)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlxtune.data.rows.pairs import QUESTIONS, is_empty
from mlxtune.data.rows.parsers import Parsed, without_weight
from mlxtune.data.rows.sides import Side
from mlxtune.data.rows.values import RowError

LABEL = "label"  # the column of ratings
RATINGS: dict[Any, Side] = {  # what may stand there -> the side; 1 and 0 are equal to true and false
    True: Side.GOOD,
    False: Side.BAD,
    **dict.fromkeys(("true", "1", "desirable"), Side.GOOD),
    **dict.fromkeys(("false", "0", "undesirable"), Side.BAD),
}


def rated(parse: Callable[[dict[str, Any]], list[Parsed]], row: dict[str, Any]) -> list[Parsed]:
    """{"prompt": "Hi", "completion": "Hello!", "label": true}; so with any other format of conversations.

    parse: of the row's format. The answer is what follows the last question; what stands before it is context. Without
    a rating (null) nothing is learnt from the row.
    """
    side = _side(row)
    parsed = parse({key: value for key, value in row.items() if key != LABEL})
    if len(parsed) != 1 or parsed[0].messages is None:
        raise RowError(f"{LABEL} rates the answer of a conversation, and this row holds {_held(parsed)}")
    (whole,) = parsed
    messages = whole.messages or []
    prompt = whole.prompt or _after_last_question(messages)
    if prompt == len(messages):
        raise RowError(f"no answer to rate: the last message is of the {messages[-1]['role']}")
    if not any(message["role"] == "user" for message in messages[:prompt]):
        raise RowError("no prompt: a rating is of an answer to something")
    if messages[prompt - 1]["role"] == "assistant":
        raise RowError(
            "prompt ends with an assistant turn: a prompt ends with what is answered. Where completions go on from "
            "that turn, put it at their beginning"
        )
    reason = "the answer is empty" if is_empty(messages[prompt:]) else ""
    if side is Side.NONE:
        reason = f"nobody rated it ({LABEL} is null)"
    context = [without_weight(message) for message in messages[:prompt]]
    return [Parsed([*context, *messages[prompt:]], whole.tools, None, side, prompt, reason)]


def _side(row: dict[str, Any]) -> Side:
    """What the label says; NONE for null, and for an empty field of a csv file."""
    if LABEL not in row:
        raise RowError(
            f"no {LABEL}, which other rows have; allowed: true, false, or null where nobody rated the answer"
        )
    given = row[LABEL]
    key = given.strip().lower() if isinstance(given, str) else given
    if key is None or key == "":
        return Side.NONE
    if not isinstance(key, str | bool | int | float) or key not in RATINGS:
        raise RowError(f"{LABEL} is {given!r}; allowed: true, false (or 1, 0, desirable, undesirable), or null")
    return RATINGS[key]


def _held(parsed: list[Parsed]) -> str:
    return f"{len(parsed)} conversations" if len(parsed) > 1 else "a plain text"


def _after_last_question(messages: list[dict[str, Any]]) -> int:
    """The number of messages up to and with the last one that an answer cannot begin with."""
    last = 0
    for number, message in enumerate(messages, 1):
        if message["role"] in QUESTIONS:
            last = number
    return last

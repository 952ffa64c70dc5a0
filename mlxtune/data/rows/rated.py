"""A row with one answer and what somebody thought of it, its label -> the conversation.

label                    labels are asked for (KTO)    they are not
true                     the answer is good            it alone is learned
false                    the answer is bad             nothing is learned
null                     nothing is learned            nothing is learned
1, "1", "desirable"      the answer is good            all is learned: that may be the class of a text
0, "0", "undesirable"    the answer is bad             all is learned, for the same reason; both are told
any other                cannot be read                all is learned
"""

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
UNRATED = f"nobody rated it ({LABEL} is null)"
RATED_BAD = f"rated bad ({LABEL} is false): left out without -c kto, which learns from it"


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
        reason = UNRATED
    context = [without_weight(message) for message in messages[:prompt]]
    return [Parsed([*context, *_weighed(messages[prompt:])], whole.tools, None, side, prompt, reason)]


def as_learned(row: dict[str, Any], parsed: list[Parsed]) -> list[Parsed]:
    """What a row holds, where nobody asked for ratings: what its label means then. parsed: by the row's format."""
    if LABEL not in row or parsed[0].messages is None:  # of a text it is the class
        return parsed
    label = row[LABEL]
    if label is None or isinstance(label, bool):
        return [_as_learned(label, one) for one in parsed]
    return [one._replace(may_be_rated=_key(label) in RATINGS) for one in parsed]


def _as_learned(label: bool | None, whole: Parsed) -> Parsed:
    """The good answer alone has a weight: what stands before it nobody rated."""
    messages = whole.messages or []
    context = (whole.prompt or _after_last_question(messages)) if label else len(messages)
    weighed = [*map(without_weight, messages[:context]), *messages[context:]]
    reason = ""
    if not label and any(message["role"] == "assistant" for message in messages):
        reason = UNRATED if label is None else RATED_BAD
    return whole._replace(messages=weighed, teaches_nothing=reason)


def _weighed(answer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rated answer, some of which must have a weight: a project's rows have none where they were rated bad."""
    if any(message.get("weight") != 0 for message in answer if message["role"] == "assistant"):
        return answer
    return [{key: value for key, value in message.items() if key != "weight"} for message in answer]


def _side(row: dict[str, Any]) -> Side:
    """What the label says; NONE for null, and for an empty field of a csv file."""
    if LABEL not in row:
        raise RowError(
            f"no {LABEL}, which other rows have; allowed: true, false, or null where nobody rated the answer"
        )
    given = row[LABEL]
    key = _key(given)
    if given is None or key == "":
        return Side.NONE
    if key not in RATINGS:
        raise RowError(f"{LABEL} is {given!r}; allowed: true, false (or 1, 0, desirable, undesirable), or null")
    return RATINGS[key]


def _key(label: Any) -> Any:
    """A label as a key of RATINGS; None where it can be none."""
    if isinstance(label, str):
        return label.strip().lower()
    return label if isinstance(label, bool | int | float) else None


def _held(parsed: list[Parsed]) -> str:
    return f"{len(parsed)} conversations" if len(parsed) > 1 else "a plain text"


def _after_last_question(messages: list[dict[str, Any]]) -> int:
    """The number of messages up to and with the last one that an answer cannot begin with."""
    last = 0
    for number, message in enumerate(messages, 1):
        if message["role"] in QUESTIONS:
            last = number
    return last

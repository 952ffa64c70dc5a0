"""One raw row of each format of pairs -> the conversation of each of its two sides, the chosen one first.

A pair is a prompt and two answers to it, of which the first is preferred. Where the prompt ends is told by the row, or
by two whole conversations: it is what both begin with. For example

    chosen      user "Hi", assistant "Hello.", user "Why?", assistant "Because."
    rejected    user "Hi", assistant "Hello.", user "Why?", assistant "No idea.", user "Try.", assistant "No."
    prompt      user "Hi", assistant "Hello.", user "Why?"

The answers of the prompt are context on both sides (weight 0); all later ones are the side's own. A prompt never ends
with an answer: one with which both sides begin is the beginning of both answers, which a model must produce too.
"""

from __future__ import annotations

import json
import re
from typing import Any

from mlxtune.data.rows import human_assistant
from mlxtune.data.rows.messages import IDLE, ROLES, THINKING_KEYS, WEIGHTS, checked
from mlxtune.data.rows.parsers import Parsed, conversation, from_sharegpt, instructed, without_weight
from mlxtune.data.rows.sides import OF_PAIRS, Side
from mlxtune.data.rows.tool_schemas import tools_of
from mlxtune.data.rows.values import RowError, from_json, listed, text_of

Messages = list[dict[str, Any]]
NAMES = ("chosen", "rejected")  # columns of the two sides
_NOT_JSON = re.compile(r"\s*\[\s*\{'.*'role': *'(user|assistant|system)'", re.DOTALL)  # messages as Python prints them
QUESTIONS = ("user", "system", "developer")  # roles with which no answer begins


def with_prompt(row: dict[str, Any]) -> list[Parsed]:
    """{"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}, each a text or a list of messages.

    Some files have whole conversations as sides, and what they begin with again as their prompt. Where the prompt is of
    Anthropic's form, so are the sides.
    """
    if row.get("prompt") is None:
        return without_prompt(row)
    given = _unpacked(row["prompt"], "prompt")
    turns = human_assistant.asked(given) if isinstance(given, str) else []
    sides = [_side(row, name, bool(turns)) for name in NAMES]
    whole = [_begins_with_question(side) for side in sides]
    if not any(whole):
        return _pair(row, _prompt(given), *sides)
    if not all(whole):
        conversation_of, answer_of = NAMES if whole[0] else NAMES[::-1]
        raise RowError(
            f"{conversation_of} is a whole conversation, but {answer_of} an answer: both must answer the prompt, "
            "or both begin with it"
        )
    chosen, rejected = sides
    common = _common(chosen, rejected)
    if isinstance(given, str) and not turns:
        asked = [message["content"].strip() for message in chosen[:common] if message["role"] == "user"]
        if given.strip() not in asked:
            raise RowError(
                "chosen and rejected are whole conversations that do not begin with the prompt: make them answers to "
                "it, or give it another name (data.columns={prompt: unused})"
            )
        return _parted(row, chosen, rejected, common)
    prompt = _prompt(given)
    for name, side in zip(NAMES, sides, strict=True):
        if not _same(prompt, side[: len(prompt)]):
            raise RowError(
                f"{name} begins with a question, but not with the messages of prompt: make it an answer to the prompt, "
                "or give prompt another name (data.columns={prompt: unused})"
            )
    return _pair(row, prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def without_prompt(row: dict[str, Any]) -> list[Parsed]:
    """{"chosen": [messages], "rejected": [messages]}: whole conversations, whose prompt is what both begin with.

    Texts of Anthropic's form are such conversations too: "\\n\\nHuman: Hi\\n\\nAssistant: Hello!"
    """
    chosen, rejected = (_whole(row, name) for name in NAMES)
    return _parted(row, chosen, rejected, _common(chosen, rejected))


def openai(row: dict[str, Any]) -> list[Parsed]:
    """OpenAI: {"input": {"messages": [...], "tools": [...]}, "preferred_output": [message], "non_preferred_output":
    [message]}
    """
    wrong = 'input must be an object with messages, such as {"messages": [{"role": "user", "content": "Hi"}]}'
    given = from_json(row.get("input"), wrong)
    if not isinstance(given, dict):
        raise RowError(wrong)
    if given.get("tools"):
        with_tools = {**row, "tools": given["tools"]}
        if tools_of(row) not in (None, tools_of(with_tools)):
            raise RowError("tools and the tools of input differ: which of them does the prompt offer?")
        row = with_tools
    prompt = _messages(given.get("messages"), "input.messages")
    return _pair(row, prompt, _answer(row, "preferred_output"), _answer(row, "non_preferred_output"))


def sharegpt(row: dict[str, Any]) -> list[Parsed]:
    """LLaMA-Factory: {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value":
    "Hello!"}, "rejected": {"from": "gpt", "value": "What?"}}
    """
    turns = listed(row.get("conversations"), "conversations must be a non-empty list of turns")
    prompt = _messages(turns, "conversations")
    sides = []
    for name in NAMES:
        given = row.get(name)
        own: Any = [given] if isinstance(given, dict) else given
        if _are_turns(turns) and _are_turns(own):
            # Together: an observation in the answer belongs to a call, and calls have ids of their own.
            sides.append(_messages([*turns, *own], name)[len(prompt) :])
        else:
            sides.append(_answer(row, name))
    return _pair(row, prompt, *sides)


def alpaca(row: dict[str, Any]) -> list[Parsed]:
    """LLaMA-Factory: {"instruction": "Translate", "input": "cat", "chosen": "chat", "rejected": "chien"}"""
    (asked,) = instructed(row, text_of(row, "input", optional=True), answer="")
    prompt = (asked.messages or [])[:-1]
    return _pair(row, prompt, _answer(row, "chosen"), _answer(row, "rejected"))


def orca(row: dict[str, Any]) -> list[Parsed]:
    """Orca: {"system": "Be brief.", "question": "Why?", "chosen": "Because.", "rejected": "Well, ..."}"""
    prompt = [{"role": "user", "content": text_of(row, "question")}]
    return _pair(row, prompt, _answer(row, "chosen"), _answer(row, "rejected"))


# What a column holds.


def _prompt(given: Any) -> Messages:
    """The messages of a prompt: a text is one of the user, but for Anthropic's, which may hold several turns."""
    if isinstance(given, str):
        return human_assistant.asked(given) or [{"role": "user", "content": given}]
    return _messages([given] if isinstance(given, dict) else given, "prompt")


def _side(row: dict[str, Any], name: str, is_of_speakers: bool = False) -> Messages:
    """The messages of a side: a text is one of the assistant, or `is_of_speakers`: of Anthropic's form."""
    given = _unpacked(row.get(name), name)
    if isinstance(given, str):
        if is_of_speakers:
            return human_assistant.answered(given)
        return [{"role": "assistant", "content": given}]
    return _messages([given] if isinstance(given, dict) else given, name)


def _answer(row: dict[str, Any], name: str) -> Messages:
    """The messages of a side that must be an answer."""
    side = _side(row, name)
    if _begins_with_question(side):
        raise RowError(f"{name} begins with a {side[0]['role']} turn, but must be the answer to the prompt")
    return side


def _whole(row: dict[str, Any], name: str) -> Messages:
    """The messages of a side that is a whole conversation."""
    given = _unpacked(row.get(name), name)
    if not isinstance(given, str):
        return _messages(given, name)
    turns = human_assistant.turns(given)
    if not turns:
        raise RowError(
            f"{name} is a text without a prompt: give a column prompt, or write whole conversations, as messages or as "
            r'"\n\nHuman: ...\n\nAssistant: ..."'
        )
    return turns


def _unpacked(value: Any, name: str) -> Any:
    """What JSON text of messages holds, as csv and some parquet files have them; any other value as it is.

    Raises RowError for messages as Python prints them: so pandas writes them into csv files.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    if _NOT_JSON.match(value):
        raise RowError(f"{name} is a list of messages as Python prints it, which is not JSON: write them as JSON text")
    try:
        held = json.loads(value)
    except (ValueError, RecursionError):
        return value
    are_messages = isinstance(held, list) and all(isinstance(item, dict) and item.get("role") in ROLES for item in held)
    return held if held and (are_messages or _are_turns(held)) else value


def _messages(given: Any, name: str) -> Messages:
    """Checked messages, of OpenAI's form or ShareGPT's. Raises RowError that begins with the name of their column."""
    if not isinstance(given, list) or not given:
        found = "nothing" if given is None else type(given).__name__
        if given == []:
            found = "an empty list"
        raise RowError(f"{name} must be a text, a message or a non-empty list of messages, found {found}")
    try:
        return checked(from_sharegpt(given) if _are_turns(given) else given, name)
    except RowError as error:
        raise RowError(f"{name}: {error}") from error


def _are_turns(given: Any) -> bool:
    """Whether a value is a list of ShareGPT's turns."""
    return isinstance(given, list) and all(
        isinstance(item, dict) and "from" in item and "role" not in item for item in given
    )


# Two conversations.


def _begins_with_question(side: Messages) -> bool:
    return bool(side) and side[0]["role"] in QUESTIONS


def _same(some: Messages, others: Messages) -> bool:
    """Whether messages say the same; when and by whom they were made, and whether they are trained, is no matter."""
    return [_said(message) for message in some] == [_said(message) for message in others]


def _said(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in IDLE and key not in WEIGHTS}


def _common(chosen: Messages, rejected: Messages) -> int:
    """How many messages two conversations begin with together; answers at the end of these are not counted."""
    common = 0
    for one, other in zip(chosen, rejected, strict=False):
        if not _same([one], [other]):
            break
        common += 1
    while common and chosen[common - 1]["role"] == "assistant":
        common -= 1
    return common


def _parted(row: dict[str, Any], chosen: Messages, rejected: Messages, common: int) -> list[Parsed]:
    """The pair of two whole conversations, whose first `common` messages are the prompt."""
    is_asked = any(message["role"] == "user" for message in chosen[:common])
    ask_differently = _begins_with_question(chosen[common:]) and _begins_with_question(rejected[common:])
    if not is_asked and not ask_differently:
        raise RowError("chosen and rejected do not begin with the same question: a pair is two answers to one prompt")
    return _pair(row, chosen[:common], chosen[common:], rejected[common:])


def _pair(row: dict[str, Any], prompt: Messages, chosen: Messages, rejected: Messages) -> list[Parsed]:
    """The two conversations of a pair. Raises RowError for a prompt that ends with an answer."""
    if prompt and prompt[-1]["role"] == "assistant":
        raise RowError(
            "prompt ends with an assistant turn: a prompt ends with what is answered. Where both answers go on from "
            "that turn, it is their beginning: put it into chosen and into rejected"
        )
    reason = _teaches_nothing(chosen, rejected)
    out = []
    for side, answer in zip(OF_PAIRS, (chosen, rejected), strict=True):
        out.append(_with_side(row, prompt, answer, side)._replace(teaches_nothing=reason))
    return out


def _with_side(row: dict[str, Any], prompt: Messages, answer: Messages, side: Side) -> Parsed:
    """The conversation of a prompt, whose answers are context, and an answer to it."""
    (whole,) = conversation(row, [*map(without_weight, prompt), *answer])
    return whole._replace(side=side, prompt=len(whole.messages or []) - len(answer))


def _teaches_nothing(chosen: Messages, rejected: Messages) -> str:
    """Why a pair cannot say what is better; "" where it can."""
    if _same(chosen, rejected):
        return "chosen and rejected are the same"
    for name, answer in zip(NAMES, (chosen, rejected), strict=True):
        if is_empty(answer):
            return f"the {name} answer is empty"
    if _begins_with_question(chosen) or _begins_with_question(rejected):
        return "chosen and rejected part at a question: they answer different prompts"
    return ""


def is_empty(answer: Messages) -> bool:
    """Whether the assistant says, thinks and calls nothing in an answer."""
    for message in answer:
        texts = [message.get(key) for key in ("content", *THINKING_KEYS)]
        says_something = any(isinstance(text, str) and text.strip() for text in texts)
        if message["role"] == "assistant" and (says_something or message.get("tool_calls")):
            return False
    return True

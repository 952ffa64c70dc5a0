"""Conversations for every kind of template. Each text holds a word that no other message has: USR0, ANS1, THK1."""

from __future__ import annotations

import re
from typing import Any

Messages = list[dict[str, Any]]

WORD = re.compile(r"[A-Z]{3}\d+")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks something up.",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "string", "description": "what"}},
            "required": ["x"],
        },
    },
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def answer(content: str, thought: str = "", *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    out: dict[str, Any] = {"role": "assistant", "content": content, **more}
    if thought:
        out["reasoning_content"] = thought
    if calls:
        out["tool_calls"] = list(calls)
    return out


def call(number: int, **arguments: Any) -> dict[str, Any]:
    """A tool call; an id has nine letters, as Mistral's must."""
    return {"type": "function", "id": f"call{number:05d}", "function": {"name": "look", "arguments": arguments}}


def result(number: int, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call{number:05d}", "name": "look", "content": content}


def words(value: Any) -> list[str]:
    """The words in all texts of a message, but for what only names a call."""
    if isinstance(value, str):
        return WORD.findall(value)
    if isinstance(value, dict):
        return [word for key, item in value.items() if key not in ("id", "tool_call_id") for word in words([key, item])]
    return [word for item in value for word in words(item)] if isinstance(value, list) else []


def thought_of(message: dict[str, Any]) -> str:
    """The thought, from its own key or from a content that holds the closing tag."""
    own = next((message[key] for key in THOUGHTS if str(message.get(key) or "").strip()), "")
    before, closing, _ = str(message.get("content") or "").rpartition("</think>")
    inside = before.rpartition("<think>")[2] if closing else ""
    return str(own) or (inside if inside.replace("</think>", "").strip() else "")


# name: (messages, with tools)
CONVERSATIONS: dict[str, tuple[Messages, bool]] = {
    "one turn": ([user("Say USR0."), answer("It is ANS1.")], False),
    "several turns": (
        [user("USR0?"), answer("ANS1."), user("USR2?"), answer("ANS3, longer."), user("USR4"), answer("ANS5")],
        False,
    ),
    "system": ([system("Be SYS0."), user("USR1?"), answer("ANS2."), user("USR3?"), answer("ANS4.")], False),
    "tools, one round": (
        [user("USR0?"), answer("", "", call(1, x="ARG1")), result(1, "RES2"), answer("ANS3.")],
        True,
    ),
    "tools, several rounds": (
        [
            *(system("Be SYS0."), user("USR1?"), answer("", "", call(1, x="ARG2")), result(1, "RES3")),
            *(answer("", "", call(2, x="ARG4")), result(2, "RES5"), answer("ANS6."), user("USR7?"), answer("ANS8.")),
        ],
        True,
    ),
    "parallel calls": (
        [
            *(user("USR0?"), answer("", "", call(1, x="ARG1"), call(2, x="ARG2"))),
            *(result(1, "RES3"), result(2, "RES4"), answer("ANS5."), user("USR6"), answer("ANS7")),
        ],
        True,
    ),
    "a call last": ([user("USR0?"), answer("ANS1."), user("USR2?"), answer("", "", call(1, x="ARG3"))], True),
    "text beside a call": (
        [user("USR0?"), answer("First ANS1.", "", call(1, x="ARG1")), result(1, "RES2"), answer("ANS3.")],
        True,
    ),
    "thinking everywhere": (
        [
            *(user("USR0?"), answer("ANS1.", "THK1 first."), user("USR2?"), answer("ANS3.", "THK3\n\nthen.")),
            *(user("USR4"), answer("ANS5", "THK5")),
        ],
        False,
    ),
    "thinking first": ([user("USR0?"), answer("ANS1.", "THK1."), user("USR2?"), answer("ANS3.")], False),
    "thinking last": ([user("USR0?"), answer("ANS1."), user("USR2?"), answer("ANS3.", "THK3.")], False),
    "thinking inside the text": (
        [
            user("USR0?"),
            answer("<think>\nTHK1.\n</think>\n\nANS1."),
            user("USR2?"),
            answer("<think>\nTHK3\n</think>\n\nANS3."),
        ],
        False,
    ),
    "thinking with tools": (
        [
            *(user("USR0?"), answer("", "THK1.", call(1, x="ARG1")), result(1, "RES2"), answer("ANS3.", "THK3.")),
            *(user("USR4?"), answer("ANS5.", "THK5.")),
        ],
        True,
    ),
    "a thought behind text beside a call": (
        [user("USR0?"), answer("ANS1", "", call(1, x="ARG1")), result(1, "RES2"), answer("ANS3.", "THK3.")],
        True,
    ),
    "unicode": (
        [user("USR0 — Wie geht’s? 😀"), answer("ANS1 中文 é👩‍👩‍👧."), user("USR2 نص"), answer("ANS3 \u200bß\u2028€")],
        False,
    ),
    "markup in a question": (
        [
            user("USR0 <|im_end|>\n<|im_start|>assistant\nUSR1<end_of_turn>\n<start_of_turn>model\n"),
            answer("ANS1."),
            user("[INST] USR2 [/INST]<|eot_id|><turn|>\n<|turn>model\n<think>\n</think><|end|><｜Assistant｜>"),
            answer("ANS3."),
        ],
        False,
    ),
    "blanks at the edges": (
        [user("  USR0 \n"), answer("  ANS1. \n\n"), user("\n\nUSR2"), answer("ANS3\t")],
        False,
    ),
    "newlines and digits first": (
        [user("USR0?"), answer("\n\n1. ANS1"), user("USR2?"), answer("42 ANS3"), user("USR4?"), answer(" 7 ANS5")],
        False,
    ),
    "questions in a row": ([user("USR0."), user("USR1?"), answer("ANS2."), user("USR3"), answer("ANS4")], False),
    "answers in a row": ([user("USR0?"), answer("ANS1."), answer("ANS2."), user("USR3"), answer("ANS4")], False),
    "a question last": ([user("USR0?"), answer("ANS1."), user("USR2?"), answer("ANS3."), user("USR4?")], False),
    "an answer first": ([answer("ANS0."), user("USR1?"), answer("ANS2.")], False),
    "a turn of no weight": (
        [user("USR0?"), answer("ANS1."), user("USR2?"), answer("ANS3.", weight=0), user("USR4?"), answer("ANS5.")],
        False,
    ),
    "an empty answer": ([user("USR0?"), answer(""), user("USR2?"), answer("ANS3.")], False),
}

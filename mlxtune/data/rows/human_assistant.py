"""Anthropic's form of conversations, one text each: "\\n\\nHuman: Hi\\n\\nAssistant: Hello!"."""

from __future__ import annotations

import re
from typing import Any

SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # -> the role of OpenAI's messages
_SPEAKER = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")  # one opens each turn


def turns(text: str) -> list[dict[str, Any]]:
    """OpenAI messages, without the space around what was said; none where the text begins with no speaker."""
    if not _SPEAKER.match(text):
        return []
    _, *pieces = _SPEAKER.split(text)  # a speaker, what was said, a speaker, what was said, ...
    found = []
    for speaker, said in zip(pieces[::2], pieces[1::2], strict=True):
        found.append({"role": SPEAKERS[speaker], "content": said.strip()})
    return found


def asked(text: str) -> list[dict[str, Any]]:
    """The messages of a prompt in which both have a turn; an Assistant at its end who has not spoken is none.

    No messages of any other text: "Human: Hi" alone may be just what somebody asks.
    """
    found = turns(text)
    if {turn["role"] for turn in found} != {"user", "assistant"}:
        return []
    if found[-1] == {"role": "assistant", "content": ""}:
        return found[:-1]
    return found


def answered(text: str) -> list[dict[str, Any]]:
    """The messages of an answer to a prompt of this form, which mostly begins with a space: " Hello!".

    Those of a whole conversation, where the text begins with a speaker.
    """
    return turns(text) or turns(f"Assistant:{text}")

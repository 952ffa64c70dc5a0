"""Prompts that say less than they seem to: those that were trained on, and those that chose the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mlxtune.evaluate.checks.check import SuiteRow

Messages = Sequence[dict[str, Any]]
NAMED = 5  # prompts that a note names
LEARNED = "an answer that was learned by heart says nothing about new prompts"
CHOSEN = "the checkpoint was chosen because it does well on them; test rows would not flatter it"


def overlap_notes(rows: Sequence[SuiteRow], trained: Iterable[Messages], chose: Iterable[Messages]) -> list[str]:
    """What must be said of a suite's prompts. trained: conversations of the training rows; chose: of the rows
    by which the checkpoint was chosen, held out or a suite's; each with its answers.

    Prompts are compared without the system prompt, which many rows share, in any case and spacing.
    """
    found = []
    for conversations, what, why in ((trained, "were trained on", LEARNED), (chose, "chose the checkpoint", CHOSEN)):
        asked = {prompt for messages in conversations for prompt in _prompts(messages)}
        same = [row.id for row in rows if _key(row.messages) in asked]
        if same:
            names = ", ".join(same[:NAMED]) + (", ..." if len(same) > NAMED else "")
            found.append(f"{len(same)} of {len(rows)} prompts {what} ({names}): {why}")
    return found


def answered(rows: Iterable[SuiteRow]) -> list[Messages]:
    """The prompts of another suite as `overlap_notes` takes them: with an answer, whatever it is."""
    return [[*row.messages, {"role": "assistant", "content": row.reference or ""}] for row in rows]


def _prompts(messages: Messages) -> Iterable[tuple[tuple[str, str], ...]]:
    """What each answer of a conversation was asked with."""
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            yield _key(messages[:place])


def _key(messages: Messages) -> tuple[tuple[str, str], ...]:
    said = [message for message in messages if message["role"] not in ("system", "developer")]
    return tuple((message["role"], _plain(message.get("content"))) for message in said)


def _plain(content: Any) -> str:
    return " ".join(str(content or "").casefold().split())

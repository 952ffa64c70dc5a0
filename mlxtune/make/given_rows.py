"""Rows that something is made from: prompts to answer, conversations to go on with.

Prompts are a suite's: any row that training reads, its last answer taken for a reference, and checks that tell which
answer is good. A check such as `number` need not know what is right: then answers are counted (`best_of`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxtune_convert.files import digest

from mlxtune.data.rows.formats import Record, read, require_good, without_pairs
from mlxtune.data.rows.readers import Bad
from mlxtune.data.rows.writers import to_messages
from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.checks.sandbox.sandbox import Programs
from mlxtune.evaluate.checks.suite import read_suite

ALPACA = ("instruction", "input")  # what a message of an Alpaca row holds beside the text that has both


@dataclass(frozen=True)
class Prompts:
    """Prompts to answer."""

    # In the file's order; at least one.
    rows: list[SuiteRow]
    # SHA-256 of the file, its settings and what its checks name, in hexadecimal.
    digest: str
    # What must be told before anything is asked.
    notes: list[str]


@dataclass(frozen=True)
class Conversation:
    """A conversation to go on with."""

    # Its line or number in the file, as text.
    id: str
    # What was said so far.
    messages: list[dict[str, Any]]
    # It offers tools, or calls them.
    has_tools: bool

    @property
    def users(self) -> int:
        """How often the user speaks."""
        return sum(message["role"] == "user" for message in self.messages)

    @property
    def waits(self) -> bool:
        """Whether the last thing that was said has no answer."""
        return self.messages[-1]["role"] == "user"

    def missing(self, turns: int) -> int:
        """How many requests it takes until the user spoke `turns` times, with an answer each time."""
        if not self.users or self.users > turns:
            return 0
        return 2 * (turns - self.users) + self.waits


def read_prompts_to_answer(path: Path, programs: Programs, system: str = "") -> Prompts:
    """system: put before prompts that have no system prompt; "" for none. Raises UserError, which names the row."""
    suite = read_suite(path, programs, expecting=False)
    rows = []
    for row in suite.rows:
        messages = [_without(message) for message in row.messages]
        if system and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": system})
        rows.append(replace(row, messages=messages))
    notes = list(suite.notes)
    later = sum(bool(row.turns) for row in rows)
    if later:
        notes.append(f"of {later} prompts the first turn alone is asked: `mlxtune make turns` makes more")
    return Prompts(rows, suite.digest, notes)


def read_conversations(path: Path) -> tuple[list[Conversation], str]:
    """(The conversations of a file, its SHA-256). Raises UserError for rows that are none, which it names."""
    found: list[Conversation] = []
    bad: list[Bad] = []
    total = 0
    for record in without_pairs(read(path)):
        total += 1
        if isinstance(record, Bad):
            bad.append(record)
        elif record.messages is None:
            bad.append(Bad(record.file, record.row, "a row of text has no turns"))
        else:
            found.append(_conversation(record, found))
    require_good(bad, total)
    return found, digest(path)


def _conversation(record: Record, before: Sequence[Conversation]) -> Conversation:
    """Its id is its row's number, and a further number where a row holds several."""
    id = str(record.row)
    number = sum(one.id == id or one.id.startswith(f"{id}-") for one in before[-64:])
    messages = [_without(message) for message in to_messages(record)["messages"]]
    has_tools = bool(record.tools) or any(one["role"] == "tool" or one.get("tool_calls") for one in messages)
    return Conversation(f"{id}-{number + 1}" if number else id, messages, has_tools)


def _without(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in ALPACA}

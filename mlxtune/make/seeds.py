"""Seed tasks: what a person wrote, and a model is to write more of.

    {"id": "s1", "instruction": "Shorten the text.", "instances": [{"input": "...", "output": "..."}],
     "is_classification": false}

is Self-Instruct's own layout; any row that training reads is a seed too: its first question with the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxtune.data.rows.formats import Record, read, require_good, without_pairs
from mlxtune.data.rows.readers import Bad, place
from mlxtune.errors import UserError
from mlxtune.evaluate.checks.languages import language_of

COMMON_SHARE = 0.1  # of the seeds that are in a language, for it to be one of the seeds' languages
FALLBACK = "en"  # where no seed tells its language
HINT = "A seed is a row with instruction and instances, instruction and output, or messages: mend it, or remove it."


@dataclass(frozen=True)
class Example:
    """A task done once."""

    # What it was done on; "" for nothing.
    input: str
    # The answer.
    output: str


@dataclass(frozen=True)
class Seed:
    """A task that a person wrote."""

    # As given, else its row's number.
    id: str
    # What is to be done.
    text: str
    # It done; at least one.
    examples: tuple[Example, ...]
    # Whether all answers are of a few labels; None: the file does not say.
    classifies: bool | None


def read_seeds(path: Path) -> list[Seed]:
    """The tasks of a file, each once. Raises UserError for rows that cannot be read, and for those without a question
    and its answer.
    """
    seeds: dict[str, Seed] = {}  # by text
    ids: Counter[str] = Counter()
    for records in _rows(path):
        seed = _seed(records)
        seeds.setdefault(seed.text, seed)
        ids[seed.id] += 1
    twice = [name for name, count in ids.items() if count > 1]
    if twice:
        raise UserError(
            f"{path}: several seeds have the id {twice[0]}", "Made rows name their seeds: give each its own."
        )
    return list(seeds.values())


def _rows(path: Path) -> list[list[Record]]:
    """The rows of a file; one of several examples is as many records. Raises UserError, with a hint for seeds: that of
    training names its settings.
    """
    bad: list[Bad] = []
    rows: dict[int, list[Record]] = {}
    total = 0
    try:
        for record in without_pairs(read(path)):
            total += 1
            if isinstance(record, Bad):
                bad.append(record)
            else:
                rows.setdefault(record.row, []).append(record)
        require_good(bad, total)
    except UserError as error:
        hint = HINT if "data." in error.hint or "data check" in error.hint else error.hint
        raise UserError(error.message, hint) from error
    return list(rows.values())


def _seed(records: Sequence[Record]) -> Seed:
    """Of one row."""
    spot = f"{records[0].file} {place(records[0].file, records[0].row)}"
    text, examples = "", []
    for record in records:
        messages = [message for message in record.messages or [] if message["role"] not in ("system", "developer")]
        if [message["role"] for message in messages[:2]] != ["user", "assistant"]:
            raise UserError(f"{spot}: a seed is a question with its answer", "Remove this row.")
        question, answer = messages[:2]
        text = str(question.get("instruction", question["content"])).strip()
        examples.append(Example(str(question.get("input", "")), str(answer["content"])))
    if not text or not all(example.output.strip() for example in examples):
        raise UserError(f"{spot}: a seed is a question with its answer, and one of them is empty", "Remove this row.")
    fields = records[0].fields
    classifies = fields.get("is_classification")
    return Seed(
        id=str(fields.get("id", records[0].row)),
        text=text,
        examples=tuple(examples),
        classifies=classifies if isinstance(classifies, bool) else None,
    )


def languages(seeds: Sequence[Seed]) -> frozenset[str]:
    """The languages (ISO 639-1) that the seeds are written in, those of a few of them aside."""
    found = Counter(language_of(seed.text) for seed in seeds)
    common = {code for code, count in found.items() if code and count >= COMMON_SHARE * len(seeds)}
    return frozenset(common or {FALLBACK})

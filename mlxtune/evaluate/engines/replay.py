"""Answers that were recorded: by another program, another machine, or an evaluation before.

    {"id": "r12", "text": "Within 30 days."}

a line, with "sample", "thought", "finish" and "tokens" where they are known. The answers.jsonl of an evaluation is such
a file; where it holds two sides, one must be named. A prompt without its answer is an error: left out, it would count
for nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxtune.data.rows.readers import Bad, raw_rows
from mlxtune.errors import UserError
from mlxtune.evaluate.engines.request import Answer, Request

FINISHES = ("stop", "length")
LISTED = 5  # ids that an error names


class Replay:
    """A file of answers as an engine. Raises UserError for a line that is none."""

    def __init__(self, file: Path, side: str | None = None, in_parts: bool = False) -> None:
        """side: whose answers are taken of an evaluation's file; None: it has those of one alone, or does not say;
        in_parts: prompts come a few at a time, each with its own `plan`: answers that none of them has are no news,
        and neither are several sides: no two of them have an id in common.
        """
        self.name = f"replay:{file}{f'#{side}' if side else ''}"
        self.notes: list[str] = []
        self._file = file
        self._in_parts = in_parts
        self._answers: dict[tuple[str, int], Answer] = {}
        sides: set[str] = set()  # that the file names
        unsaid = 0  # answers that do not say whether they were cut
        for row in raw_rows(file):
            if isinstance(row, Bad):
                raise UserError(f"{file} line {row.row}: {row.reason}")
            number, fields = row
            if side is not None and fields.get("side") != side:
                continue
            if side is None and "side" in fields and not in_parts:
                sides.add(str(fields["side"]))
                if len(sides) > 1:
                    raise UserError(
                        f"{file} line {number}: answers of a second side",
                        f"Name the one that is meant: replay:{file}#base or replay:{file}#tuned.",
                    )
            answer = _answer(file, number, fields)
            if (answer.id, answer.sample) in self._answers:
                raise UserError(
                    f"{file} line {number}: a second answer to prompt {answer.id}",
                    'Several answers to one prompt have numbers: "sample": 0, 1, and so on.',
                )
            self._answers[answer.id, answer.sample] = answer
            unsaid += "finish" not in fields
        if side is not None and not self._answers:
            raise UserError(f"{file} has no answers of the side {side}", f"Without a side: replay:{file}.")
        if unsaid:
            self.notes.append(f"{file}: {unsaid} answers do not say whether they were cut: taken as whole")

    def work(self) -> dict[str, int]:
        return {}

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        wanted = [(request.id, request.sample) for request in requests]
        missing = [_named(key) for key in wanted if key not in self._answers]
        if missing:
            more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
            raise UserError(f"{self._file} has no answer to prompt {', '.join(missing[:LISTED])}{more}")
        unused = len(self._answers) - len(set(wanted))
        if unused and not self._in_parts:
            self.notes.append(f"{self._file}: {unused} answers belong to no prompt of this suite")
        return [list(range(len(requests)))]

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._answers[request.id, request.sample] for request in requests]


def _named(key: tuple[str, int]) -> str:
    id, sample = key
    return f"{id} (sample {sample})" if sample else id


def _answer(file: Path, number: int, row: dict[str, Any]) -> Answer:
    """Raises UserError naming the line and what is wrong."""
    place = f"{file} line {number}"
    id = row.get("id")
    if isinstance(id, int) and not isinstance(id, bool):
        id = str(id)
    sample, tokens, finish = row.get("sample", 0), row.get("tokens", 0), row.get("finish", "stop")
    text, thought = row.get("text"), row.get("thought", "")
    if not isinstance(id, str) or not id:
        raise UserError(f"{place}: no id", 'A line is an answer: {"id": "r12", "text": "..."}.')
    if not isinstance(text, str) or not isinstance(thought, str):
        raise UserError(f"{place}: {'text' if isinstance(thought, str) else 'thought'} is no text")
    for name, value in (("sample", sample), ("tokens", tokens)):
        if type(value) is not int or value < 0:
            raise UserError(f"{place}: {name} must be a whole number from 0, found {value!r}")
    if finish not in FINISHES:
        raise UserError(f"{place}: finish must be one of {', '.join(FINISHES)}, found {finish!r}")
    return Answer(id, sample, text, thought, finish, tokens)

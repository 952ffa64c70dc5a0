"""An evaluation's folder, as `mlxtune eval --suite ... --out FOLDER` writes it.

    prompts.jsonl   {"id", "messages", "reference", "tags", "group", "follows"?}        the suite as it was used
    answers.jsonl   {"side", "id", "sample", "text", "thought", "finish", "tokens"}     appended as they come
    scores.jsonl    {"id", "check", "graded", "group", "base": [...], "tuned": [...]}   one number for each answer
    summary.json    what `--json` prints
    times.jsonl     all that is not the same bytes when the evaluation is run again

Optional: judge.jsonl and verdicts.jsonl of a judge, ratings.*.jsonl of people, forgetting.jsonl of what `--forgetting`
computes. Everything is paired by the prompt's id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from mlxtune_convert.files import json_text, new_file, read_json

from mlxtune.data.rows.readers import Bad, raw_rows
from mlxtune.errors import UserError
from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.comparison.scores import SIDES, PromptScores, Side
from mlxtune.evaluate.engines.journal import PLAN_FILE
from mlxtune.evaluate.engines.request import Answer, kept_answer

PROMPTS, ANSWERS, SCORES, SUMMARY = "prompts.jsonl", "answers.jsonl", "scores.jsonl", "summary.json"
VERDICTS, REPLIES, TIMES = "verdicts.jsonl", "judge.jsonl", "times.jsonl"
FORGETTING = "forgetting.jsonl"
NAMES = (PROMPTS, ANSWERS, SCORES, SUMMARY, VERDICTS, REPLIES, TIMES, PLAN_FILE)  # of all that an evaluation writes
EXPECTED = "a folder that `mlxtune eval --suite SUITE --out FOLDER` wrote to its end"
DAMAGED = "The folder is damaged, or was changed by hand: run the evaluation again."


@dataclass(frozen=True)
class Prompt:
    """What was asked."""

    id: str  # in its suite
    messages: list[dict[str, Any]]  # all before the answer
    reference: str | None  # the answer to compare with; None: none
    tags: tuple[str, ...] = ()  # its subjects
    group: str | None = None  # rows of one group are not independent; None: none
    follows: str | None = None  # the prompt whose answer stands in this one; None: none does


def write_prompts(folder: Path, rows: Iterable[SuiteRow]) -> None:
    lines = []
    for row in rows:
        line: dict[str, Any] = {"id": row.id, "messages": row.messages, "reference": row.reference}
        line |= {"tags": row.tags, "group": row.group}
        lines.append(line if row.follows is None else {**line, "follows": row.follows})
    write_lines(folder / PROMPTS, lines)


def write_results(folder: Path, scores: Iterable[PromptScores], summary: Mapping[str, Any]) -> None:
    """summary.json is written last: a folder that has one is whole."""
    write_lines(folder / SCORES, (one.as_json() for one in scores))
    with new_file(folder / SUMMARY, force=True) as file:
        file.write(json_text(summary, indent=2) + "\n")


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """JSON Lines, as a whole or not at all, in place of what was there."""
    with new_file(path, force=True) as file:
        for line in lines:
            file.write(json_text(line) + "\n")


@dataclass(frozen=True)
class Evaluation:
    """A folder that was read."""

    path: Path  # as it was given
    summary: dict[str, Any]  # of summary.json

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Raises UserError for what is no evaluation, or one that was not ended."""
        if not path.is_dir():
            raise UserError(f"no folder {path}", f"Name {EXPECTED}.")
        summary = read_json(path / SUMMARY, EXPECTED)
        if not isinstance(summary.get("checks"), dict):
            raise UserError(f"{path / SUMMARY}: it has no checks", f"Name {EXPECTED}.")
        return cls(path, summary)

    @property
    def name(self) -> str:
        """Of the folder, for people."""
        return str(self.path)

    @property
    def suite(self) -> str:
        """The suite's digest. Raises UserError where there is none."""
        suite = self.summary.get("suite")
        digest = suite.get("digest") if isinstance(suite, dict) else None
        if not isinstance(digest, str):
            raise UserError(f"{self.path / SUMMARY}: it does not say which suite was used", f"Name {EXPECTED}.")
        return digest

    @cached_property
    def prompts(self) -> dict[str, Prompt]:
        """Raises UserError for a file that is missing or damaged."""
        found = {}
        for line, place in _lines(self.path / PROMPTS):
            with _described(place):
                messages = [{"role": one["role"], **one} for one in line["messages"]]
                prompt = Prompt(
                    _text(line["id"]),
                    messages,
                    line["reference"],
                    tuple(line["tags"]),
                    line.get("group"),
                    line.get("follows"),
                )
            found[prompt.id] = prompt
        return found

    @cached_property
    def scores(self) -> list[PromptScores]:
        """Raises UserError for a file that is missing or damaged."""
        found = []
        for line, place in _lines(self.path / SCORES):
            with _described(place):
                tuned = _numbers(line["tuned"]) if "tuned" in line else None
                found.append(
                    PromptScores(
                        _text(line["id"]),
                        _text(line["check"]),
                        line["graded"] is True,
                        line.get("group"),
                        _numbers(line["base"]),
                        tuned,
                    )
                )
        return found

    @cached_property
    def answers(self) -> dict[tuple[str, str], list[Answer]]:
        """(side, the prompt's id) -> its answers, the first sample first. Raises UserError as above."""
        found: dict[tuple[str, str], list[Answer]] = {}
        for line, place in _lines(self.path / ANSWERS):
            with _described(place):
                answer = kept_answer(line)
                if line["side"] not in SIDES:
                    raise ValueError
                found.setdefault((line["side"], answer.id), []).append(answer)
        for some in found.values():
            some.sort(key=lambda one: one.sample)
        return found

    def answers_of(self, side: Side) -> dict[str, list[Answer]]:
        """The prompt's id -> its answers by one side."""
        return {id: answers for (whose, id), answers in self.answers.items() if whose == side}


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """(Each line of a file, where it is). Raises UserError for a missing file or a line that is no JSON object."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}", f"Expected {EXPECTED}.")
    for row in raw_rows(path):
        if isinstance(row, Bad):
            raise UserError(f"{path} {row.place}: {row.reason}", DAMAGED)
        number, line = row
        yield line, f"{path} line {number}"


@contextmanager
def _described(place: str) -> Iterator[None]:
    """Raise UserError where a line does not hold what it should."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else "a value of another kind than expected"
        raise UserError(f"{place}: {missing}", DAMAGED) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _numbers(value: Any) -> list[float]:
    """At least one finite number."""
    numbers = [float(one) for one in value]
    if not numbers or not all(map(isfinite, numbers)):
        raise ValueError
    return numbers

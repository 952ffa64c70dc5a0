"""Answers compared by a person who does not know whose they are.

    mlxtune rate evals/first                     base against tuned: which is better?
    mlxtune rate evals/first evals/second        what each tuned: which is better?
    mlxtune rate evals/a evals/b evals/c         the best first: a ranking
    mlxtune rate evals/first --likert            each answer alone: 1 to 5

Every decision is a line of ratings.NAME.jsonl in the first folder, written at once, so that rating can stop at any
time. A later line on a prompt replaces an earlier one:

    {"id": "r7", "of": ["3f2a.../base", "3f2a.../tuned"], "ranks": [2, 1]}         1 is the best; equal ranks are a tie
    {"id": "r7", "of": [...], "ratings": [2, 5]}
    {"id": "r7", "of": [...], "skipped": true}
    {"id": "r7", "of": [...], "undone": true}                                      as if it had not been rated

"of" says whose answers these are: the hash of a folder's answers, and the side. Ratings of other answers do not count.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxtune_convert.files import digest, explained, flush_open, json_text

from mlxtune.data.rows.readers import Bad, raw_rows
from mlxtune.errors import UserError
from mlxtune.evaluate.comparison.folder import ANSWERS, Evaluation, Prompt
from mlxtune.evaluate.comparison.scores import Side
from mlxtune.evaluate.turns import Conversations

NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")  # of a rater
SHORT = 12  # digits of a hash that tell folders apart


@dataclass(frozen=True)
class Contestant:
    """Whose answers are compared."""

    key: str  # hash of its folder's answers, and its side
    name: str  # for people
    answers: Mapping[str, str]  # the prompt's id -> the first answer to it, behind what was said in earlier turns


@dataclass(frozen=True)
class Contest:
    """What is compared: at least two contestants, on the prompts that all of them answered."""

    folder: Path  # where ratings are kept
    contestants: list[Contestant]  # in the order given; of one evaluation: base, tuned
    prompts: list[Prompt]  # in an order by chance, so that the first ones are a fair sample
    samples: int = 1  # answers to each prompt that an evaluation has at most; the first one alone takes part
    known: Mapping[str, Prompt] = field(default_factory=dict)  # every prompt of the suite, by its id

    @classmethod
    def of(cls, evaluations: Sequence[Evaluation]) -> Contest:
        """Raises UserError for evaluations of other suites, one side alone, or no prompt in common."""
        if len(evaluations) == 1:
            (only,) = evaluations
            contestants = [_contestant(only, side, side) for side in ("base", "tuned")]
        else:
            for other in evaluations[1:]:
                if other.suite != evaluations[0].suite:
                    raise UserError(
                        f"{evaluations[0].name} and {other.name} are evaluations of different suites",
                        "Rate answers to the same prompts.",
                    )
            contestants = [_contestant(one, _last_side(one), one.name) for one in evaluations]
        if len({one.key for one in contestants}) < len(contestants):
            raise UserError("the same answers are named twice", "Name each evaluation once.")
        for one in contestants:
            if not one.answers:
                raise UserError(
                    f"{evaluations[0].name} has answers of one side alone",
                    "Name a second evaluation to rate it against.",
                )
        known = evaluations[0].prompts
        common = [prompt for id, prompt in known.items() if all(id in one.answers for one in contestants)]
        if not common:
            raise UserError("no prompt is answered in all of these evaluations")
        common.sort(key=lambda prompt: _chance("order", prompt.id))
        samples = max(len(answers) for one in evaluations for answers in one.answers.values())
        return cls(evaluations[0].path, contestants, common, samples, known)

    def question(self, prompt: Prompt) -> list[dict[str, Any]]:
        """What was said before the answers that are compared begin."""
        return Conversations(self.known.values()).asked(prompt.id)

    @property
    def is_of_one(self) -> bool:
        """Whether base and tuned of one evaluation are compared, as its judge did; of two, each one's last side is."""
        of = [one.key.partition("/") for one in self.contestants]
        return [side for _, _, side in of] == ["base", "tuned"] and len({folder for folder, _, _ in of}) == 1

    @property
    def keys(self) -> list[str]:
        return [one.key for one in self.contestants]

    def shown(self, prompt: Prompt) -> list[int]:
        """The contestants' places, in the order in which their answers to a prompt are shown."""
        return sorted(range(len(self.contestants)), key=lambda place: _chance(self.keys[place], prompt.id))

    def is_settled(self, prompt: Prompt) -> bool:
        """Whether all gave the same answer: a tie, of which nobody need be asked."""
        return len({one.answers[prompt.id] for one in self.contestants}) == 1


def _contestant(evaluation: Evaluation, side: Side, name: str) -> Contestant:
    texts = {id: some[0].text for id, some in evaluation.answers_of(side).items()}
    conversations = Conversations(evaluation.prompts.values())
    answers = {id: conversations.said(id, texts) for id in texts if conversations.is_whole(id, texts)}
    return Contestant(f"{digest(evaluation.path / ANSWERS)[:SHORT]}/{side}", name, answers)


def _last_side(evaluation: Evaluation) -> Side:
    return "tuned" if evaluation.answers_of("tuned") else "base"


def _chance(*words: str) -> str:
    """Looks random, and is the same each time."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


@dataclass(frozen=True)
class Decision:
    """What a person said of one prompt."""

    values: list[int] | None  # of each contestant: its rank, 1 the best, or its rating, 5 the best; None: skipped


class Ratings:
    """One rater's decisions on a contest, on the disk as they are made."""

    def __init__(self, contest: Contest, rater: str, likert: bool) -> None:
        """Reads what is there. Raises UserError for a name that is none, or a file of something else."""
        if not NAME.fullmatch(rater):
            raise UserError(f"--rater {rater}: a name of letters, digits, - and _, 40 at most")
        self.contest = contest
        self.what = "ratings" if likert else "ranks"
        self.file = contest.folder / f"ratings.{rater}{'.likert' if likert else ''}.jsonl"
        self.others = 0  # lines on other answers
        self.decided: dict[str, Decision] = {}  # the prompt's id -> what was said last
        self._undoable: list[str] = []  # ids in the order in which this process decided them
        if self.file.exists():
            self._read()

    def decide(self, id: str, values: list[int] | None) -> None:
        """values: of each contestant; None: the prompt is skipped."""
        self._write(
            {"id": id, "of": self.contest.keys, **({"skipped": True} if values is None else {self.what: values})}
        )
        self.decided[id] = Decision(values)
        self._undoable.append(id)

    def undo(self) -> str | None:
        """Take back the last decision of this process; the prompt's id, None where there is none."""
        if not self._undoable:
            return None
        id = self._undoable.pop()
        self._write({"id": id, "of": self.contest.keys, "undone": True})
        del self.decided[id]
        return id

    def values(self) -> dict[str, list[int]]:
        """The prompt's id -> what was said of each contestant; prompts of equal answers are ties of ranks."""
        found = {}
        for prompt in self.contest.prompts:
            decision = self.decided.get(prompt.id)
            if decision is not None and decision.values is not None:
                found[prompt.id] = decision.values
            elif self.what == "ranks" and self.contest.is_settled(prompt):
                found[prompt.id] = [1] * len(self.contest.contestants)
        return found

    def asked(self) -> list[Prompt]:
        """Those that a person is asked about: all, or for ranks those whose answers differ."""
        if self.what == "ratings":
            return self.contest.prompts
        return [prompt for prompt in self.contest.prompts if not self.contest.is_settled(prompt)]

    def open_prompts(self) -> list[Prompt]:
        """Those of them that are still to be decided."""
        return [prompt for prompt in self.asked() if prompt.id not in self.decided]

    def _read(self) -> None:
        for row in raw_rows(self.file):
            if isinstance(row, Bad):
                continue  # a line that was cut when the process ended: its prompt is asked again
            number, line = row
            try:
                self._take(line)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self.file} line {number}: not a rating", "Move the file away to begin anew."
                ) from error

    def _take(self, line: dict[str, Any]) -> None:
        """Raises KeyError, TypeError or ValueError for what is no rating."""
        of = list(line["of"])
        if sorted(of) != sorted(self.contest.keys):
            self.others += 1
            return
        if line.get("undone"):
            self.decided.pop(line["id"], None)
        elif line.get("skipped"):
            self.decided[line["id"]] = Decision(None)
        else:
            by_key = dict(zip(of, line[self.what], strict=True))
            self.decided[str(line["id"])] = Decision([int(by_key[key]) for key in self.contest.keys])

    def _write(self, line: dict[str, Any]) -> None:
        """At once, on the disk, on a line of its own."""
        with explained(self.file), self.file.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write((json_text(line) + "\n").encode())
            file.flush()
            flush_open(file.fileno())

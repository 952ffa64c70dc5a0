"""Which evaluations belong to a run, and what the sections of a page are given of one.

An evaluation is a run's where what it calls tuned is the very adapter that the run's folder holds, by the digest of its
file: not by a path, for a run may have gone on since, or another may lie there now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mlxtune_convert.files import digest

from mlxtune.errors import UserError
from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.comparison.folder import SUMMARY, Evaluation, Prompt
from mlxtune.evaluate.comparison.scores import PromptScores
from mlxtune.evaluate.engines.request import Answer
from mlxtune.report.secrets import masked_values
from mlxtune.train.run_folder import RunFolder

if TYPE_CHECKING:
    from mlxtune.evaluate.before_after import Outcome

EVALS = "evals"  # the folder that README's commands keep evaluations in
MOST_FOLDERS = 2_000  # that are looked into; a run may lie in a home


@dataclass(frozen=True)
class Unkept:
    """An evaluation that no folder holds, with the names that `Evaluation` has."""

    name: str  # for people
    summary: Mapping[str, Any]  # as summary.json would hold it
    prompts: Mapping[str, Prompt]  # by id
    # (side, the prompt's id) -> its answers, the first sample first
    answers: Mapping[tuple[str, str], Sequence[Answer]]
    scores: Sequence[PromptScores]  # of the checks
    path: None = None  # no folder

    @classmethod
    def of(cls, rows: Sequence[SuiteRow], outcome: Outcome, name: str) -> Unkept:
        """rows: what was asked; name: for people."""
        prompts = {}
        for row in rows:
            prompts[row.id] = Prompt(row.id, row.messages, row.reference, tuple(row.tags), row.group, row.follows)
        answers: dict[tuple[str, str], list[Answer]] = {}
        for side, given in outcome.answers.items():
            for answer in sorted(given, key=lambda one: one.sample):
                answers.setdefault((side, answer.id), []).append(answer)
        return cls(name, outcome.document, prompts, answers, outcome.scores)


Evaluated: TypeAlias = Evaluation | Unkept


def without_secrets(evaluation: Evaluated) -> Evaluated:
    """The same with every text of its document masked; its prompts and answers are where they are shown."""
    return replace(evaluation, summary=masked_values(evaluation.summary))


@dataclass(frozen=True)
class OfRun:
    """The evaluations of one run."""

    evaluations: Sequence[Evaluated] = ()  # in the order of their folders' names
    notes: Sequence[str] = ()  # on evaluations that are not shown, though one might look for them here

    def as_json(self) -> list[dict[str, Any]]:
        """For programs, in the page."""
        return [{"name": one.name, **one.summary} for one in self.evaluations]


NONE = OfRun()


def evaluations_of(run: Path, given: Sequence[Path] = ()) -> OfRun:
    """Those that are named, or else those in and beside the run.

    given: folders that `mlxtune eval ... --out` wrote. Raises UserError where one of them is none, or is of another
    adapter than the run's.
    """
    if given:
        return OfRun([without_secrets(_named(folder, run, _adapter_in(run))) for folder in given])
    found, notes = list[Evaluated](), list[str]()
    held: str | None = None  # the run's adapter; not known yet, for it may be large and mostly nobody asks
    for folder in _candidates(run):
        try:
            evaluation = Evaluation.read(folder)
        except UserError:
            continue  # a summary.json of another program
        tuned = _adapter_of(evaluation.summary)
        if tuned is not None and held is None:
            held = _adapter_in(run)
        if tuned is not None and tuned == held:
            found.append(without_secrets(evaluation))
        elif _is_at(evaluation.summary, run):
            notes.append(f"{folder.name} was made of an adapter that this run does not hold any more: it is not shown")
    return OfRun(found, notes)


def _adapter_in(run: Path) -> str:
    """The digest of the adapter that a run holds; "" where it holds none."""
    adapter = RunFolder(run).adapter
    return "" if adapter is None else digest(adapter)


def _named(folder: Path, run: Path, own: str) -> Evaluation:
    evaluation = Evaluation.read(folder)
    if not own:
        raise UserError(f"{run} holds no adapter, so {folder} is no evaluation of it", "Leave out --evaluation.")
    if _adapter_of(evaluation.summary) != own:
        hint = "Name one that was made of this run's adapter as it is now, or run the evaluation again."
        raise UserError(f"{folder} is an evaluation of another adapter than {run} holds", hint)
    return evaluation


def _adapter_of(summary: Mapping[str, Any]) -> str | None:
    """The digest of the adapter that is called tuned; None where none is named."""
    digests = side_of(summary, "tuned").get("digests")
    found = digests.get("adapter") if isinstance(digests, dict) else None
    return found if isinstance(found, str) else None


def _is_at(summary: Mapping[str, Any], run: Path) -> bool:
    """Whether the adapter lay where the run does."""
    path = side_of(summary, "tuned").get("adapter")
    return isinstance(path, str) and Path(path).resolve() == run.resolve()


def side_of(summary: Mapping[str, Any], side: str) -> Mapping[str, Any]:
    """What a summary says of one side; empty where it says nothing."""
    sides = summary.get("sides")
    found = sides.get(side) if isinstance(sides, dict) else None
    return found if isinstance(found, dict) else {}


def _candidates(run: Path) -> list[Path]:
    """Folders with a summary.json in the run and beside it, two levels deep, and in a folder evals one level further
    up: runs/first and evals/first lie so.
    """
    run = run.resolve()
    tops = [run, run.parent, run.parent.parent / EVALS]
    found: dict[Path, None] = {}
    looked_into = 0
    for top in tops:
        for folder in _two_levels(top):
            looked_into += 1
            if looked_into > MOST_FOLDERS:
                return list(found)
            if (folder / SUMMARY).is_file():
                found.setdefault(folder)
    return list(found)


def _two_levels(top: Path) -> Iterator[Path]:
    for folder in _folders(top):
        yield folder
        yield from _folders(folder)


def _folders(top: Path) -> list[Path]:
    """Those in a folder, by name; none where it cannot be read. Links are not followed."""
    try:
        return sorted(path for path in top.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []

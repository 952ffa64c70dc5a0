"""A suite asked of one model or two, its checks on their answers, and what that shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlxtune.data.rows.formats import Record
from mlxtune.evaluate.checks.shipped import SAFETY
from mlxtune.evaluate.checks.suite import Suite
from mlxtune.evaluate.comparison import folder as kept
from mlxtune.evaluate.comparison.gate import Gate, results
from mlxtune.evaluate.comparison.scores import PromptScores, Side, score_answers
from mlxtune.evaluate.comparison.summary import document
from mlxtune.evaluate.engines.journal import Journal, Told
from mlxtune.evaluate.engines.request import Answer, Engine, Request
from mlxtune.evaluate.engines.room import give_back
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.evaluate.forgetting import report as forgetting
from mlxtune.evaluate.judging.report import Judging, judge_evaluation
from mlxtune.evaluate.observations.observe import observations
from mlxtune.evaluate.observations.seen import Seen
from mlxtune.evaluate.safety import report as safety
from mlxtune.evaluate.turns import in_turn
from mlxtune.machine import backend


@dataclass(frozen=True)
class Answering:
    """One side of an evaluation."""

    open: Callable[[], Engine]  # called where it has something left to answer
    described: dict[str, Any]  # what it is, for the document; JSON
    identity: dict[str, Any]  # what of it decides its answers; JSON
    close: Callable[[], None] = lambda: None  # called when all is answered: what `open` read is to be forgotten


@dataclass(frozen=True)
class Asked:
    """What is asked, and how."""

    suite: Suite  # prompts, and their checks
    sampling: Sampling  # how answers are chosen, and how long they may be
    samples: int = 1  # answers to each prompt
    gates: Sequence[Gate] = ()  # that the result is held to
    notes: Sequence[str] = ()  # what else a person must know of these prompts
    judging: Judging | None = None  # by whom the answers are compared; None: by nobody
    trained: Sequence[Record] = ()  # conversations that the run was trained on
    events: Sequence[Mapping[str, Any]] = ()  # of the run
    # Measures what was forgotten, as `forgetting.report.measure` gives it; None: that is not asked.
    forgetting: Callable[[], dict[str, Any]] | None = None

    replay: bool = False  # the prompts are those of `turns.replayed`

    def requests(self) -> list[Request]:
        found = []
        for row in self.suite.rows:
            for sample in range(self.samples):
                found.append(Request(row.id, row.messages, row.tools, sample))
        return found


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    document: dict[str, Any]  # as `--json` prints it
    answers: dict[Side, list[Answer]]  # of each side, in the order of the requests
    found: int  # how many of them an earlier process had left
    scores: list[PromptScores]  # what each check says of each prompt


def evaluate(
    asked: Asked, sides: Mapping[Side, Answering], out: Path | None = None, told: Told = lambda *_: None
) -> Outcome:
    """Have every side answer, and compare them.

    sides: "base", and "tuned" where there are two; out: the folder where it is kept, None for nowhere; told: called as
    answers come. Raises UserError for a folder that holds something else, and whatever the engines raise.
    """
    # Answers may differ in their last bits between versions and devices.
    computed = f"MLX {version('mlx')} on {backend.kind()}, mlx-lm {version('mlx-lm')}"
    sampling = {**asdict(asked.sampling), "samples": asked.samples}
    rows = asked.suite.rows
    suite = {"name": asked.suite.path.name, "digest": asked.suite.digest}
    identity = {
        "suite": asked.suite.digest,
        "sampling": sampling,
        "sides": {side: answering.identity for side, answering in sides.items()},
        "computed by": computed,
    }
    if asked.replay:
        identity["turns"] = "replay"
    answers: dict[Side, list[Answer]] = {}
    with closing(Journal(out, identity)) as journal:
        if out is not None:
            kept.write_prompts(out, rows)
        for side, answering in sides.items():
            answers[side] = journal.answers(side, asked.requests(), _opened(answering, asked), told)
    forgot = None if asked.forgetting is None else asked.forgetting()
    for answering in sides.values():
        answering.close()
    scores = score_answers(rows, answers)
    described = {side: answering.described for side, answering in sides.items()}
    provenance = {"suite": suite, "sides": described, "sampling": sampling, "computed by": computed}
    if asked.replay:
        provenance["turns"] = "replay"
    summary = document(len(rows), scores, provenance, _notes(asked, journal, answers, scores))
    held_to = dict(summary["checks"])  # what gates may name
    nothing: dict[str, str] = {}  # why something of these may be missing
    if asked.judging is not None:
        kept_at = None if out is None else out / kept.REPLIES
        give_back()  # of the models that answered: the judge may need all of the memory
        judged = judge_evaluation(replace(asked.judging, kept=kept_at), rows, answers)
        summary["judge"] = judged.document
        held_to |= judged.held_to
        nothing = dict.fromkeys(asked.judging.names, "gave no verdicts")
        if out is not None:
            kept.write_lines(out / kept.VERDICTS, judged.lines)
    elif out is not None:
        (out / kept.VERDICTS).unlink(missing_ok=True)  # of a judge who was asked before
    if asked.suite.path == SAFETY:
        summary["safety"] = safety.document(rows, scores)
    if forgot is not None:
        summary["forgetting"] = forgetting.with_flags(forgot, summary["checks"])
    seen = Seen(rows, answers, scores, summary["checks"], asked.trained, asked.events, summary.get("forgetting"))
    summary["observations"] = observations(seen)
    if asked.gates:
        summary["gates"] = results(asked.gates, held_to, nothing)
    if out is not None:
        kept.write_results(out, scores, summary)
    return Outcome(summary, answers, journal.found, scores)


def _opened(answering: Answering, asked: Asked) -> Callable[[], Engine]:
    return lambda: in_turn(answering.open(), asked.suite.rows, asked.sampling.max_tokens)


def _notes(
    asked: Asked, journal: Journal, answers: Mapping[Side, list[Answer]], scores: Sequence[PromptScores]
) -> list[str]:
    """What a person must know beside the numbers."""
    notes = [*asked.suite.notes, *asked.notes]
    turns = sum(bool(row.turns) for row in asked.suite.rows)
    if turns:
        rows = len(asked.suite.rows)
        notes.append(f"{turns} of {rows} prompts have further turns, which are not asked: --turns replay asks them")
    for side in answers:
        notes += journal.notes.get(side, [])
    for side, given in answers.items():
        cut = [answer for answer in given if answer.finish == "length"]
        if cut:
            # Recorded answers, and those of some servers, were cut elsewhere.
            most = asked.sampling.max_tokens
            where = f" after {most} tokens" if all(answer.tokens == most for answer in cut) else ""
            notes.append(f"{side}: {len(cut)} of {len(given)} answers were cut{where}")
        silent = sum(not answer.text.strip() for answer in given)
        if silent:
            notes.append(f"{side}: {silent} of {len(given)} answers are empty")
    applied = {one.check for one in scores}
    idle = [name for name in asked.suite.names if name not in applied]
    if idle:
        notes.append(f"{', '.join(idle)}: applied to no answer")
    notes += asked.suite.told()
    return list(dict.fromkeys(notes))

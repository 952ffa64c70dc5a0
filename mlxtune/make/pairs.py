"""Pairs to train on, out of answers that were compared already: by a person, by a judge, or by their checks.

    people    `mlxtune rate`: the answer ranked first against the one ranked last
    judge     `mlxtune eval --judge`: the one that the judge prefers in both orders against the other
    checks    `mlxtune eval --suite`: the one that passes all checks against one that fails some

Nobody is asked anything here. A prompt on which nothing was decided gives no pair: ties, skipped ones, verdicts that
turn with the order. Nor does one turn of a conversation of several: the other side answered other words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxtune.data.rows.readers import Bad, raw_rows
from mlxtune.errors import UserError
from mlxtune.evaluate.comparison.folder import DAMAGED, VERDICTS, Evaluation, Prompt
from mlxtune.evaluate.judging.people import Contest, Ratings

WHO = ("people", "judge", "checks")  # who may have decided
TIE, TURN, EMPTY, SAME = "undecided", "in a conversation of several turns", "an empty answer", "equal answers"


@dataclass(frozen=True)
class Compared:
    """Two answers to one prompt, of which one is better."""

    prompt: Prompt  # what was asked
    better: str  # the text of the better answer
    worse: str  # of the other
    shown_by: str  # who decided


@dataclass
class MadePairs:
    """What came of the prompts of an evaluation."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # {"prompt", "chosen", "rejected", "made"}
    left_out: Counter[str] = field(default_factory=Counter)  # why a prompt gave no pair -> how many

    def as_json(self) -> dict[str, Any]:
        return {"pairs": len(self.rows), "left_out": dict(self.left_out.most_common())}


def made_of(evaluations: Sequence[Evaluation], by: str, rater: str = "me") -> MadePairs:
    """The pairs of an evaluation, or of several that a person compared.

    by: one of WHO; rater: whose ratings, of people. Raises UserError where nobody decided anything.
    """
    known = evaluations[0].prompts
    followed = {prompt.follows for one in evaluations for prompt in one.prompts.values() if prompt.follows}
    found = MadePairs()
    decided = {"people": _by_people, "judge": _by_judge, "checks": _by_checks}[by]
    for id, compared in decided(evaluations, rater):
        prompt = known[id]
        if prompt.follows is not None or id in followed:
            found.left_out[TURN] += 1
        elif compared is None:
            found.left_out[TIE] += 1
        elif not compared.better.strip() or not compared.worse.strip():
            found.left_out[EMPTY] += 1
        elif compared.better.strip() == compared.worse.strip():
            found.left_out[SAME] += 1
        else:
            found.rows.append(_row(compared))
    return found


def _row(one: Compared) -> dict[str, Any]:
    """A line of the file, as `make answers --pairs` writes them."""
    made = {"how": "pairs", "parents": [one.prompt.id], "shown by": one.shown_by}
    both = {"chosen": _said(one.better), "rejected": _said(one.worse)}
    return {"prompt": one.prompt.messages, **both, "made": made}


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text.strip()}]


Decided = Iterator[tuple[str, Compared | None]]  # (the prompt's id, what was decided; None: nothing)


def _by_people(evaluations: Sequence[Evaluation], rater: str) -> Decided:
    """What one person said: of ranks, or where there are none of ratings."""
    contest = Contest.of(evaluations)
    ranks, ratings = Ratings(contest, rater, likert=False), Ratings(contest, rater, likert=True)
    if not ranks.decided and not ratings.decided:
        named = " ".join(one.name for one in evaluations)
        raise UserError(
            f"{contest.folder} has no ratings of {rater} on these answers", f"Rate them first: mlxtune rate {named}"
        )
    for prompt in contest.prompts:
        said, sign = ranks.decided.get(prompt.id), 1
        if said is None:
            said, sign = ratings.decided.get(prompt.id), -1  # 1 is the best rank, and the worst rating
        values = None if said is None else said.values
        if values is None or min(values) == max(values):
            yield prompt.id, None
            continue
        places = sorted(range(len(values)), key=lambda place: sign * values[place])
        best, worst = (contest.contestants[place].answers[prompt.id] for place in (places[0], places[-1]))
        yield prompt.id, Compared(prompt, best, worst, rater)


def _by_judge(evaluations: Sequence[Evaluation], rater: str) -> Decided:
    """What the judge of an evaluation preferred in both orders, of each pair of answers."""
    evaluation = _only(evaluations, "a judge")
    file = evaluation.path / VERDICTS
    if not file.is_file():
        raise UserError(
            f"{evaluation.name} has no verdicts of a judge",
            "Add --judge to `mlxtune eval --suite`, or name who decides: --by.",
        )
    judge = evaluation.summary.get("judge")
    name = str(judge.get("judge") or "judge") if isinstance(judge, Mapping) else "judge"
    for row in raw_rows(file):
        if isinstance(row, Bad):
            raise UserError(f"{file} {row.place}: {row.reason}", DAMAGED)
        number, line = row
        id, outcome, sample = line.get("id"), line.get("outcome"), line.get("sample")
        if id not in evaluation.prompts or outcome not in ("win", "tie", "loss", "failed"):
            raise UserError(
                f"{file} line {number}: no verdict on two answers to a prompt of this evaluation",
                "Ratings of a judge (--rate likert) are no comparisons; else the folder is damaged.",
            )
        if outcome not in ("win", "loss"):
            yield id, None
            continue
        base, tuned = (_text(evaluation, side, id, sample) for side in ("base", "tuned"))
        better, worse = (tuned, base) if outcome == "win" else (base, tuned)
        yield id, Compared(evaluation.prompts[id], better, worse, name)


def _by_checks(evaluations: Sequence[Evaluation], rater: str) -> Decided:
    """Where the first answer of one side passes every check and that of the other does not. Checks with a score, and
    not just passed or failed, decide nothing.
    """
    evaluation = _only(evaluations, "checks")
    passes: dict[str, dict[str, bool]] = {}  # the prompt's id -> side -> whether it passes all
    for one in evaluation.scores:
        if one.graded or one.tuned is None:
            continue
        of_prompt = passes.setdefault(one.id, {"base": True, "tuned": True})
        of_prompt["base"] &= one.base[0] == 1
        of_prompt["tuned"] &= one.tuned[0] == 1
    if not passes:
        raise UserError(
            f"{evaluation.name} has no check that both sides were asked, and that is passed or failed",
            "Name who decides instead: --by people, or --by judge.",
        )
    for id, sides in passes.items():
        if sides["base"] == sides["tuned"]:
            yield id, None
            continue
        base, tuned = (_text(evaluation, side, id, 0) for side in ("base", "tuned"))
        better, worse = (tuned, base) if sides["tuned"] else (base, tuned)
        yield id, Compared(evaluation.prompts[id], better, worse, "checks")


def _only(evaluations: Sequence[Evaluation], who: str) -> Evaluation:
    if len(evaluations) > 1:
        raise UserError(
            f"{who} compared base and tuned of one evaluation: {len(evaluations)} are named",
            "Name one; of several, people decide: --by people.",
        )
    (evaluation,) = evaluations
    return evaluation


def _text(evaluation: Evaluation, side: str, id: str, sample: Any) -> str:
    """An answer. Raises UserError where it is not there."""
    for answer in evaluation.answers.get((side, id), ()):
        if answer.sample == sample:
            return answer.text
    raise UserError(f"{evaluation.name} has no answer {sample} of {side} to {id}", DAMAGED)

"""What a judge says of the answers, and what people say who compared them without knowing whose they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxtune_convert.files import matching

from mlxtune.errors import UserError
from mlxtune.evaluate.comparison.figures import p_value
from mlxtune.evaluate.comparison.folder import Evaluation
from mlxtune.evaluate.judging.people import Contest, Ratings
from mlxtune.evaluate.judging.ratings_report import report
from mlxtune.report.evaluations import Evaluated
from mlxtune.report.html import Child, Html, joined, tag
from mlxtune.report.page import Section
from mlxtune.report.sections.checks import checks_table, forest, verdict_of
from mlxtune.report.sections.one_by_one import counted, names_of, notes_of, one_by_one
from mlxtune.report.tables import callout, facts, folded, table

RATINGS = "ratings.*.jsonl"


def section(evaluations: Sequence[Evaluated]) -> Section | None:
    body = one_by_one(evaluations, _drawn)
    return None if body is None else Section("judge", "Judges and raters", body)


def _drawn(evaluation: Evaluated) -> Html | None:
    judge = evaluation.summary.get("judge")
    of_judge = _of_judge(judge, evaluation.summary) if isinstance(judge, dict) else None
    of_people = _of_people(evaluation)
    return joined(of_judge, of_people) if of_judge or of_people else None


def _of_judge(judge: Mapping[str, Any], summary: Mapping[str, Any]) -> Html:
    parts: list[Child] = [tag("p", f"Judge: {judge['judge']}. Before anything else it was examined: ", _exam(judge))]
    if judge.get("refused"):
        parts.append(callout("warning", "The judge failed its exam, so it gives no verdicts."))
    if judge.get("criteria"):
        names = names_of(summary)
        parts.append(checks_table("Ratings from 1 to 5", judge["criteria"], names))
        parts.append(forest(judge["criteria"]))
    if "win_rate" in judge:
        parts.append(_pairwise(judge))
    parts.append(notes_of(judge.get("notes", ())))
    if judge.get("rubric"):
        parts.append(folded("What the judge was told to be good", tag("p", str(judge["rubric"]), class_="text")))
    return joined(*parts)


def _exam(judge: Mapping[str, Any]) -> str:
    exam = judge["exam"]
    if not exam["pairs"]:
        return "there was nothing to examine it on."
    return (
        f"of {counted(exam['pairs'], 'pair')} whose better side is known it got {exam['right']} right, and "
        f"{exam['consistent']} the same in both orders."
    )


def _pairwise(judge: Mapping[str, Any]) -> Html:
    low, high = judge["interval"]
    length = judge.get("length", {})
    values: dict[str, Child] = {
        "wins of the tuned answers": f"{judge['wins']} of {counted(judge['pairs'], 'pair')}",
        "ties": f"{judge['ties']} ({judge['identical']} of identical answers)",
        "losses": str(judge["losses"]),
        "win rate": f"{judge['win_rate']:.1%} (95% interval {low:.1%} to {high:.1%})",
        "verdict": [verdict_of(judge["verdict"]), f" ({judge['test']}, p {p_value(judge['p'])})"],
    }
    if length.get("equal_length") is not None:
        values["win rate at equal length"] = f"{length['equal_length']:.1%}"
    if length.get("close") is not None:
        values["win rate of pairs of like length"] = f"{length['close']:.1%} of {length['close_pairs']}"
    if judge.get("consistency") is not None:
        values["the same verdict in both orders"] = f"{judge['consistency']:.0%}"
    if judge.get("first_position") is not None:
        values["decisions for what is shown first"] = f"{judge['first_position']:.0%}"
    return facts("Pairs of answers, each judged in both orders", values)


def _of_people(evaluation: Evaluated) -> Html | None:
    """Of an evaluation that a folder keeps: there the ratings are."""
    if not isinstance(evaluation, Evaluation):
        return None
    rows, unread = [], []
    for file in matching(evaluation.path, RATINGS):
        name = file.name.removeprefix("ratings.").removesuffix(".jsonl")
        is_likert = name.endswith(".likert")
        rater = name.removesuffix(".likert")
        try:
            said = report(Ratings(Contest.of([evaluation]), rater, is_likert), rater)
        except UserError as error:
            unread.append(callout("warning", f"{file.name} is left out: {error.message}."))
            continue
        if said["rated"]:
            rows.append(_rater(said))
    if not rows:
        return joined(unread) if unread else None
    columns = ("rater", "rated", "result", "95% interval", "p", "verdict", "agreement")
    return joined(table("People who did not know whose the answers were", columns, rows, numbers=(1,)), unread)


def _rater(said: Mapping[str, Any]) -> list[Child]:
    """A row of the table of raters."""
    if "win_rate" in said:
        result = f"{said['wins']} wins, {said['ties']} ties, {said['losses']} losses"
        interval = " to ".join(f"{end:.1%}" for end in said["interval"])
    else:
        result = "means " + " and ".join(f"{mean:.2f}" for mean in said["means"])
        interval = " to ".join(f"{end:+.2f}" for end in said["interval"])
    agreed = [f"{one['agreed']} of {one['prompts']} with {one['with']}" for one in said["agreement"]]
    verdict: list[Child] = [p_value(said["p"]), verdict_of(said["verdict"]), "; ".join(agreed)]
    return [said["rater"], f"{said['rated']} of {said['n']}", result, interval, *verdict]

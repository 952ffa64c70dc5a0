"""Evaluations of several runs side by side: of each suite that at least two of them were evaluated with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxtune.errors import UserError
from mlxtune.evaluate.comparison import between
from mlxtune.evaluate.comparison.folder import Evaluation
from mlxtune.evaluate.comparison.summary import UNCORRECTED, what_can_be_shown
from mlxtune.report.drawing.plots import Interval, intervals
from mlxtune.report.html import Child, Html, joined, tag
from mlxtune.report.secrets import masked
from mlxtune.report.tables import callout, table


def side_by_side(called: Sequence[str], evaluations: Sequence[Sequence[Evaluation]]) -> Html:
    """called: the runs' names; evaluations: those of each run, the newest last: it is the one that counts."""
    suites: dict[str, dict[str, Evaluation]] = {}  # digest -> the run's name -> its evaluation
    unreadable: list[Html] = []
    for name, some in zip(called, evaluations, strict=True):
        for one in some:
            try:
                suites.setdefault(one.suite, {})[name] = one
            except UserError as error:
                unreadable.append(callout("warning", error.message))
    shared = [found for found in suites.values() if len(found) > 1]
    if not shared:
        how = "Evaluate each with the same --suite, and name the folders here."
        return joined(
            tag("h3", "Evaluations"), unreadable, tag("p", f"No two of these runs were evaluated with one suite. {how}")
        )
    return joined(unreadable, [_compared(found) for found in shared])


def _compared(found: Mapping[str, Evaluation]) -> Html:
    """Runs that were evaluated with one suite. found: the run's name -> its evaluation."""
    heading = tag("h3", f"Evaluations: {_suite(next(iter(found.values())))}")
    try:
        result = between.compare(list(found.values()))
    except UserError as error:
        return joined(heading, callout("warning", error.message))
    notes = [callout("neutral", masked(str(note))) for note in result["notes"]]
    if "ranking" in result:
        return joined(heading, _ranking(found, result), notes)
    return joined(heading, _pair(list(found), result), notes)


def _suite(evaluation: Evaluation) -> str:
    suite = evaluation.summary.get("suite")
    named = suite.get("name") or suite.get("path") if isinstance(suite, dict) else None
    return str(named) if named else "one suite"


def _pair(called: Sequence[str], result: Mapping[str, Any]) -> Html:
    first, second = called
    rows: list[list[Child]] = []
    drawn = []
    for name, check in result["checks"].items():
        low, high = check["interval"]
        rows.append(
            [
                name,
                str(check["n"]),
                _share(check, check["base"]),
                _share(check, check["tuned"]),
                _points(check, check["difference"]),
                f"{_points(check, low)} to {_points(check, high)}",
                f"{check['p']:.4f}" if check["p"] >= 0.0001 else "< 0.0001",
                check["verdict"],
            ]
        )
        said = f"{_points(check, check['difference'])} ({check['verdict']})"
        drawn.append(Interval(name, low, check["difference"], high, said))
    columns = ["check", "prompts", first, second, "difference", "95% interval", "p", "verdict"]
    notes = [tag("p", what_can_be_shown(result))]
    if len(rows) > 1:
        notes.append(tag("p", f"{UNCORRECTED}.", class_="dim"))
    return joined(
        table(f"Checks: {second} minus {first}, prompt by prompt", columns, rows, numbers=range(1, 7)),
        intervals(f"{second} minus {first}, with 95% intervals", "difference of scores", drawn) if drawn else None,
        notes,
    )


def _share(check: Mapping[str, Any], value: float) -> str:
    return f"{value:.3f}" if check["graded"] else f"{value:.1%}"


def _points(check: Mapping[str, Any], difference: float) -> str:
    return f"{difference:+.3f}" if check["graded"] else f"{100 * difference:+.1f}"


def _ranking(found: Mapping[str, Evaluation], result: Mapping[str, Any]) -> Html:
    """Of more than two."""
    called = {evaluation.name: name for name, evaluation in found.items()}
    checks = list(result["ranking"][0]["checks"])
    rows: list[list[Child]] = []
    for entry in result["ranking"]:
        low, high = entry["interval"]
        means = [f"{entry['checks'][name]:.3f}" for name in checks]
        share, interval = f"{entry['share']:.1%}", f"{low:.1%} to {high:.1%}"
        rows.append([called[entry["evaluation"]], share, interval, f"{entry['wins']:g}", *means])
    columns = ["run", "wins to expect", "95% interval", "wins", *checks]
    explained = (
        f"Each pair on {result['n']} prompts: who scores higher on more checks wins; a tie is half a win for both. "
        "Shares by Bradley and Terry, intervals over prompts drawn again."
    )
    return joined(
        table("Runs by their checks, the best first", columns, rows, numbers=range(1, len(columns))),
        tag("p", explained, class_="dim"),
    )

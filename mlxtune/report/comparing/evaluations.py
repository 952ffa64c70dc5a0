"""Evaluations of several runs side by side: of each suite that at least two of them were evaluated with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mlxtune.errors import UserError
from mlxtune.evaluate.comparison import between
from mlxtune.evaluate.comparison.folder import Evaluation
from mlxtune.report.evaluations import Evaluated
from mlxtune.report.html import Child, Html, joined, tag
from mlxtune.report.secrets import masked
from mlxtune.report.sections.checks import checks_table, forest, what_it_shows
from mlxtune.report.sections.one_by_one import DAMAGED, suite_of
from mlxtune.report.tables import callout, table

Key: TypeAlias = tuple[str, str]  # (digest of a suite, which of its turns were asked)


def side_by_side(called: Sequence[str], evaluations: Sequence[Sequence[Evaluated]]) -> Html:
    """called: the runs' names; evaluations: those of each run. Of several by one suite the last one counts."""
    suites: dict[Key, dict[str, list[Evaluation]]] = {}  # the run's name -> its evaluations by this suite
    unreadable: list[Html] = []
    for name, some in zip(called, evaluations, strict=True):
        for one in some:
            if not isinstance(one, Evaluation):
                continue
            try:
                suites.setdefault(_key(one), {}).setdefault(name, []).append(one)
            except UserError as error:
                unreadable.append(callout("warning", error.message))
    shared = [found for found in suites.values() if len(found) > 1]
    if not shared:
        how = "To compare what they answer, evaluate each with the same --suite."
        none = tag("p", f"No two of these runs were evaluated with one suite. {how}")
        return joined(tag("h3", "Evaluations"), unreadable, none)
    return joined(unreadable, [_of_suite(found) for found in shared])


def _key(evaluation: Evaluation) -> Key:
    """What two evaluations must share to be compared: the suite's digest, and whether every turn of it was asked.
    Raises UserError where the suite is not said.
    """
    return evaluation.suite, str(evaluation.summary.get("turns", "one"))


def _of_suite(found: Mapping[str, Sequence[Evaluation]]) -> Html:
    """Runs that were evaluated with one suite, each by its last evaluation, and what was chosen so. found: the run's
    name -> its evaluations.

    Runs with equal adapters have the same evaluations, for an evaluation is a run's by its adapter's digest.
    """
    chosen: dict[str, Evaluation] = {}
    whose: dict[Path, str] = {}  # folder of an evaluation -> the run that it is compared as
    notes: list[Html] = []
    for name, some in found.items():
        last = some[-1]
        first = whose.setdefault(last.path.resolve(), name)
        if first != name:
            told = f"{name} has the same evaluation as {first} ({_place(last)}): their adapters are equal"
            notes.append(callout("neutral", f"{told}, and {name} is not listed again."))
            continue
        chosen[name] = last
        if len(some) > 1:
            told = f"Of {len(some)} evaluations of {name} by this suite the last one is compared: {_place(last)}."
            notes.append(callout("neutral", told))
    heading = tag("h3", f"Evaluations: {suite_of(next(iter(chosen.values())))}")
    return joined(heading, notes, _compared(chosen) if len(chosen) > 1 else None)


def _place(evaluation: Evaluation) -> str:
    """Its folder, and the one around it: people call evaluations of two runs alike."""
    return "/".join(evaluation.path.resolve().parts[-2:])


def _compared(found: Mapping[str, Evaluation]) -> Html:
    """found: the run's name -> its evaluation, no two of them the same."""
    try:
        result = between.compare(list(found.values()))
        drawn = _ranking(found, result) if "ranking" in result else _pair(list(found), result)
    except DAMAGED as error:
        reason = error.message if isinstance(error, UserError) else "they hold something else than was written"
        return callout("warning", f"The evaluations cannot be compared: {reason}.")
    return joined(drawn, [callout("neutral", masked(str(note))) for note in result["notes"]])


def _pair(called: Sequence[str], result: Mapping[str, Any]) -> Html:
    first, second = called
    return joined(
        checks_table(f"Checks: {second} minus {first}, prompt by prompt", result["checks"], (first, second)),
        forest(result["checks"]),
        what_it_shows(result),
    )


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

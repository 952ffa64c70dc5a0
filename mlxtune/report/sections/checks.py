"""What the checks say of the answers: a table, and the differences with their intervals drawn around 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxtune.evaluate.comparison import figures
from mlxtune.evaluate.comparison.summary import UNCORRECTED, what_can_be_shown
from mlxtune.report.drawing.plots import Interval, intervals
from mlxtune.report.evaluations import Evaluated
from mlxtune.report.html import Child, Html, joined, tag
from mlxtune.report.page import Section
from mlxtune.report.sections.one_by_one import counted, names_of, notes_of, one_by_one, sides_line, suite_of
from mlxtune.report.tables import callout, table

SIGNS = {"better": "▲ better", "worse": "▼ worse"}  # a verdict is told by a sign and a word, not by colour
CLASSES = {"better": "good-text", "worse": "bad-text"}
SHORT = {"no difference shown": "not shown"}  # a verdict as a plot has room for it, with p behind it
Checks = Mapping[str, Mapping[str, Any]]  # as `comparison.summary.check_results` gives them


def section(evaluations: Sequence[Evaluated]) -> Section | None:
    """Of evaluations by a suite; benchmarks have a section of their own."""
    body = one_by_one(evaluations, _drawn)
    return None if body is None else Section("checks", "Checks", body)


def _drawn(evaluation: Evaluated) -> Html | None:
    summary = evaluation.summary
    if "benchmarks" in summary or not summary["checks"]:
        return None
    return joined(
        tag("p", f"{counted(summary['n'], 'prompt')} of {suite_of(evaluation)}. {sides_line(summary)}"),
        results(f"Checks of {suite_of(evaluation)}", summary),
        gates_of(summary),
        notes_of(summary.get("notes", ())),
    )


def results(caption: str, summary: Mapping[str, Any]) -> Html:
    """The table, the plots, and the sentence on what so many prompts can show."""
    checks = summary["checks"]
    return joined(
        checks_table(caption, checks, names_of(summary)),
        forest(checks),
        what_it_shows(summary),
    )


def checks_table(caption: str, checks: Checks, names: tuple[str, str], of: str = "prompts") -> Html:
    """names: of the two sides; of: what is counted."""
    if not any("verdict" in check for check in checks.values()):
        return _one_side(caption, checks, names[0], of)
    columns = ("check", of, *names, "difference", "95% interval", "p", "verdict", "shows from")
    rows = []
    for name, check in checks.items():
        row: list[Child] = [name, str(check["n"]), figures.share(check, check["base"])]
        if "verdict" in check:
            row += [figures.share(check, check["tuned"]), figures.points(check, check["difference"])]
            row += [figures.interval(check), figures.p_value(check["p"]), verdict_of(check["verdict"])]
            row.append(figures.shows_from(check))
        else:
            row += ["", "", figures.interval(check), "", "one side alone", ""]
        rows.append(row)
    return table(caption, columns, rows, numbers=(1, 2, 3, 4, 5, 6, 8))


def _one_side(caption: str, checks: Checks, name: str, of: str) -> Html:
    rows = []
    for check, result in checks.items():
        rows.append([check, str(result["n"]), figures.share(result, result["base"]), figures.interval(result)])
    return table(caption, ("check", of, name, "95% interval"), rows, numbers=(1, 2, 3))


def verdict_of(verdict: str) -> Html:
    return tag("span", SIGNS.get(verdict, verdict), class_=CLASSES.get(verdict))


def forest(checks: Checks) -> Html | None:
    """One plot for checks that pass or fail, in points, and one for those that are graded, in their own scores."""
    plots = []
    kinds = (
        (False, 100.0, "points", "Checks that pass or fail"),
        (True, 1.0, "of the score", "Checks with a score"),
    )
    for graded, factor, unit, title in kinds:
        rows = []
        for name, check in checks.items():
            if "verdict" in check and check["graded"] is graded:
                low, high = check["interval"]
                verdict = SHORT.get(check["verdict"], check["verdict"])
                note = f"{verdict}, p {figures.p_value(check['p'])}"
                rows.append(Interval(name, factor * low, factor * check["difference"], factor * high, note))
        if rows:
            plots.append(intervals(f"{title}: differences with their 95% intervals", f"difference, {unit}", rows))
    return joined(*plots) if plots else None


def what_it_shows(summary: Mapping[str, Any]) -> Html | None:
    if not any("verdict" in check for check in summary["checks"].values()):
        return None
    text = what_can_be_shown(summary)
    if len(summary["checks"]) > 1:
        text += f" {UNCORRECTED}."
    return tag("p", text, class_="dim")


def gates_of(summary: Mapping[str, Any]) -> Html | None:
    """What the command was told to hold the result to."""
    drawn = []
    for gate in summary.get("gates", ()):
        asked = f"--{gate['gate']} {gate['check']}={gate['limit']:g}"
        if gate["met"]:
            drawn.append(callout("good", f"{asked} is met."))
        else:
            drawn.append(callout("bad", f"{asked} is not met: {gate['why']}."))
    return joined(*drawn) if drawn else None

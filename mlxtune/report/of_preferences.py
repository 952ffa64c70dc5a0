"""The page of an evaluation on pairs or rated answers, as `mlxtune eval --html` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxtune.evaluate.comparison.summary import UNCORRECTED
from mlxtune.evaluate.preferences import MEANINGS, lines_of
from mlxtune.report.drawing.plots import histogram
from mlxtune.report.html import Child, Html, joined, tag
from mlxtune.report.page import Section, page
from mlxtune.report.secrets import masked
from mlxtune.report.sections.checks import checks_table, forest
from mlxtune.report.tables import Kind, callout, facts, table

NAMES = ("base", "tuned")


def page_of(title: str, told: Mapping[str, Any]) -> str:
    """A whole page. title: whose answers; told: as `evaluate.preferences.report` makes it."""
    sections = [
        Section("checks", "Which answer is preferred", _checks(told)),
        Section("sides", "Both sides", _sides(told)),
    ]
    return page(f"Preferences: {masked(title)}", _lead(told), sections, told)


def _lead(told: Mapping[str, Any]) -> Html:
    """What the comparison shows, in a sentence, and what must be known beside it."""
    verdicts = {name: check["verdict"] for name, check in told["checks"].items() if "verdict" in check}
    counted = f"{told['rows']:,} {'pairs' if told['kind'] == 'pairs' else 'rated answers'}"
    kind: Kind = "neutral"
    said = f"{counted}: the base alone was asked."
    if verdicts:
        better = [name for name, verdict in verdicts.items() if verdict == "better"]
        worse = [name for name, verdict in verdicts.items() if verdict == "worse"]
        parts = [f"{word} in {', '.join(some)}" for word, some in (("better", better), ("worse", worse)) if some]
        said = f"{counted}: {'; '.join(parts) or 'no difference shown'}."
        if better or worse:
            kind = "good" if not worse else "bad" if not better else "warning"
    return joined(callout(kind, said, *lines_of(told)), [callout("warning", note) for note in told["notes"]])


def _checks(told: Mapping[str, Any]) -> Html:
    checks = told["checks"]
    if not checks:
        return joined(tag("p", "Nothing of rated answers can be said of the base alone but how likely it finds them."))
    of = "pairs" if told["kind"] == "pairs" else "rows"
    meanings: dict[str, Child] = {name: MEANINGS[name] for name in checks}
    bins = told.get("rewards", {}).get("histogram")
    drawn = None
    if bins:
        drawn = histogram("Reward margins of the pairs", "chosen minus rejected", bins)
    return joined(
        checks_table("Base and tuned model on the same rows", checks, NAMES, of),
        forest(checks),
        tag("p", f"{UNCORRECTED}.", class_="dim") if "rewards" in told else None,
        facts("What is compared", meanings),
        drawn,
    )


def _sides(told: Mapping[str, Any]) -> Html:
    columns = ["answers", "how many", "tokens", "base, nats a token"]
    if "rewards" in told:
        columns += ["tuned, nats a token", "drift, nats a token", "mean reward", "became less likely"]
    rows: list[list[Child]] = []
    for side, one in told["sides"].items():
        row: list[Child] = [side, f"{one['answers']:,}", f"{one['tokens']:,}", f"{one['base']:.4f}"]
        if "tuned" in one:
            row += [f"{one['tuned']:.4f}", f"{one['drift']:+.4f}", f"{one['reward']:+.4f}", f"{one['less_likely']:.1%}"]
        rows.append(row)
    return table("How likely the answers are, and how far they moved", columns, rows, numbers=range(1, len(columns)))

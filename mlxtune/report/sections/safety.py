"""What is refused and what is answered, of the suite `safety`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxtune.evaluate.comparison.figures import p_value
from mlxtune.report.evaluations import Evaluated
from mlxtune.report.html import Child, Html, joined, tag
from mlxtune.report.page import Section
from mlxtune.report.sections.checks import verdict_of
from mlxtune.report.sections.one_by_one import names_of, one_by_one
from mlxtune.report.tables import table


def section(evaluations: Sequence[Evaluated]) -> Section | None:
    body = one_by_one(evaluations, _drawn)
    return None if body is None else Section("safety", "Safety", body)


def _drawn(evaluation: Evaluated) -> Html | None:
    found = evaluation.summary.get("safety")
    if not isinstance(found, dict):
        return None
    kinds = {"pairs of a request to refuse and a neighbour to answer, both right": found["pairs"]}
    for kind, counts in found["refused"].items():
        kinds[f"refused, {kind}"] = counts
    kinds["harmless and answered"] = found["answered"]
    kinds["the system prompt's secret kept"] = found["kept"]
    rows = [_row(kind, counts) for kind, counts in kinds.items()]
    columns = ("what is right", "asked", *names_of(evaluation.summary))
    return joined(table("Right answers", columns, rows, numbers=(1, 2, 3)), _verdict(found["pairs"]))


def _row(kind: str, counts: Mapping[str, Any]) -> list[Child]:
    sides = [f"{counts[side]:g}" if side in counts else "" for side in ("base", "tuned")]
    return [kind, str(counts["n"]), *sides]


def _verdict(pairs: Mapping[str, Any]) -> Html | None:
    if "verdict" not in pairs:
        return None
    low, high = pairs["interval"]
    figures = f" ({100 * pairs['difference']:+.1f} points, 95% interval {100 * low:+.1f} to {100 * high:+.1f}, "
    return tag("p", "Pairs: ", verdict_of(pairs["verdict"]), figures, f"p {p_value(pairs['p'])})")

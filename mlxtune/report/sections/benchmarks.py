"""Known benchmarks: their metrics compared, how they were asked, and the subjects that they are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxtune.report.evaluations import Evaluated
from mlxtune.report.html import Child, Html, joined, tag
from mlxtune.report.page import Section
from mlxtune.report.sections.checks import gates_of, results
from mlxtune.report.sections.one_by_one import counted, names_of, notes_of, one_by_one, sides_line
from mlxtune.report.tables import facts, folded, table

SUBJECTS = "subjects"  # the one setting of a benchmark that is a table of its own


def section(evaluations: Sequence[Evaluated]) -> Section | None:
    body = one_by_one(evaluations, _drawn)
    return None if body is None else Section("benchmarks", "Benchmarks", body)


def _drawn(evaluation: Evaluated) -> Html | None:
    summary = evaluation.summary
    benchmarks = summary.get("benchmarks")
    if not isinstance(benchmarks, dict):
        return None
    parts: list[Child] = [tag("p", f"{counted(summary['n'], 'row')}. {sides_line(summary)}")]
    parts.append(results("Benchmarks, by the metrics of their tasks", summary))
    parts.append(gates_of(summary))
    for name, settings in benchmarks.items():
        parts.append(_asked(name, settings))
        if settings.get(SUBJECTS):
            parts.append(_subjects(name, settings[SUBJECTS], names_of(summary)))
    parts.append(notes_of(summary.get("notes", ())))
    return joined(*parts)


def _asked(name: str, settings: Mapping[str, Any]) -> Html:
    values: dict[str, Child] = {key: str(value) for key, value in settings.items() if key != SUBJECTS}
    return facts(f"How {name} was asked", values)


def _subjects(name: str, subjects: Mapping[str, Mapping[str, Mapping[str, Any]]], names: tuple[str, str]) -> Html:
    """subjects: of each the means of its metrics."""
    rows = []
    for subject, means in subjects.items():
        for metric, mean in means.items():
            sides = [f"{mean[side]:.3f}" if side in mean else "" for side in ("base", "tuned")]
            rows.append([subject, metric, str(mean["n"]), *sides])
    caption = f"{name} by subject"
    columns = ("subject", "metric", "rows", *names)
    return folded(f"{caption} ({len(subjects)})", table(caption, columns, rows, numbers=(2, 3, 4)))

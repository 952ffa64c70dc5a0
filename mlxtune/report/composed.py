"""The page of a run, put together: its sections in the order in which a person asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxtune.evaluate.observations.observe import observations_of_run
from mlxtune.report import of_evaluations, series
from mlxtune.report.drawing.thinning import Point
from mlxtune.report.evaluations import NONE, OfRun
from mlxtune.report.html import for_json, joined
from mlxtune.report.page import Section, page
from mlxtune.report.run_record import RunRecord, number_of
from mlxtune.report.secrets import masked_values
from mlxtune.report.sections import (
    better,
    comparing,
    configuration,
    curves,
    data,
    during,
    exports,
    memory_time,
    observations,
    said,
    verdict,
)
from mlxtune.report.sections.comparing import Other
from mlxtune.report.sections.exports import Export
from mlxtune.report.tables import callout


def of_run(
    record: RunRecord,
    evaluations: OfRun = NONE,
    others: Sequence[Other] = (),
    live: str = "",
    with_answers: bool = True,
    with_data: bool = True,
) -> str:
    """The page of a run.

    evaluations: of the run, as `mlxtune eval` kept them; others: runs that it is compared with; live: as `page` takes
    it; with_answers: what the models said is shown; with_data: the data is read, which takes seconds for the first
    time. The same folders give the same page.
    """
    drawn = series.of_run(record)
    shipped = exports.found(record)
    sections: list[Section | None] = [
        curves.section(record, drawn),
        comparing.section(record, evaluations.evaluations, others),
        *of_evaluations.sections(evaluations.evaluations, with_answers),
        during.section(record),
        observations.section(record, evaluations.evaluations),
        data.section(record) if with_data else None,
        memory_time.section(record),
        exports.section(shipped),
        configuration.section(record),
        said.section(record),
    ]
    there = [section for section in sections if section is not None]
    lead = joined(
        better.lead(evaluations.evaluations),
        verdict.lead(record, is_evaluated=bool(evaluations.evaluations)),
        observations.lead(record, evaluations.evaluations),
        [callout("neutral", note) for note in evaluations.notes],
    )
    shown = for_programs(record, drawn, shipped, evaluations, others, with_data)
    return page(f"Run {record.name}", lead, there, shown, live)


def as_json(record: RunRecord, evaluations: OfRun = NONE, others: Sequence[Other] = ()) -> dict[str, Any]:
    """What the page of a run shows, for programs: texts, numbers, lists and mappings; None for what is no number."""
    drawn, shipped = series.of_run(record), exports.found(record)
    shown: dict[str, Any] = for_json(masked_values(for_programs(record, drawn, shipped, evaluations, others)))
    return shown


def for_programs(
    record: RunRecord,
    drawn: Mapping[str, Sequence[Point]],
    shipped: Sequence[Export],
    evaluations: OfRun = NONE,
    others: Sequence[Other] = (),
    with_data: bool = True,
) -> dict[str, Any]:
    """What the page shows, with all digits: what `mlxtune report --json` prints, and what the page holds as JSON. Both
    hide its secrets.

    curves: name -> [[step, value], ...], as `series.of_run` has them, and thinned as they are drawn; null: a gap.
    """
    best = record.best
    return {
        "run": record.name,
        "state": record.state,
        "model": record.model,
        "step": record.step,
        "steps": record.steps,
        "base_loss": record.base_loss,
        "best_loss": None if best is None else number_of(best, "loss"),
        "best_step": None if best is None else best["step"],
        "taken_back": record.taken_back,
        "warnings": record.warnings,
        "curves": drawn,
        "exports": [{"name": export.name, "bytes": export.bytes, "proof": export.proof} for export in shipped],
        "evaluations": evaluations.as_json(),
        "observations": observations_of_run(record.events),
        "data": data.for_programs(record) if with_data else None,
        "compared": comparing.as_json(record, others),
        "config": record.config,
        "begin": {key: value for key, value in record.begun.items() if key != "kind"},
    }

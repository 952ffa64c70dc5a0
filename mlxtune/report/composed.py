"""The page of a run, put together: its sections in the order in which a person asks.

To add a section: a module in `sections` with a function `section(record, ...) -> Section | None`, a line in `of_run`
where a person would ask for it, and what it shows in `for_programs`, so that programs need not read markup. None: the
run has nothing of the kind. Texts of others are given to `html.tag` as they are; secrets are hidden by `masked` first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxtune.report import series
from mlxtune.report.drawing.thinning import Point
from mlxtune.report.html import for_json
from mlxtune.report.page import Section, page
from mlxtune.report.run_record import RunRecord, number_of
from mlxtune.report.secrets import masked
from mlxtune.report.sections import configuration, curves, during, exports, memory_time, said, verdict
from mlxtune.report.sections.exports import Export


def of_run(record: RunRecord, evaluations: Sequence[Any] = (), others: Sequence[RunRecord] = (), live: str = "") -> str:
    """The page of a run.

    evaluations: of the run, as `mlxtune eval` kept them; others: runs that it is compared with; live: as `page` takes
    it. The same folders give the same page.
    """
    drawn = series.of_run(record)
    shipped = exports.found(record)
    sections: list[Section | None] = [
        curves.section(record, drawn),
        during.section(record),
        memory_time.section(record),
        exports.section(shipped),
        configuration.section(record),
        said.section(record),
    ]
    there = [section for section in sections if section is not None]
    lead = verdict.lead(record, is_evaluated=bool(evaluations))
    return page(f"Run {record.name}", lead, there, for_programs(record, drawn, shipped), live)


def as_json(record: RunRecord) -> dict[str, Any]:
    """What the page of a run shows, for programs: texts, numbers, lists and mappings; None for what is no number."""
    shown: dict[str, Any] = for_json(for_programs(record, series.of_run(record), exports.found(record)))
    return shown


def for_programs(record: RunRecord, drawn: Mapping[str, Sequence[Point]], shipped: Sequence[Export]) -> dict[str, Any]:
    """What the page shows, with all digits: what `mlxtune report --json` prints, and what the page holds as JSON.

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
        "config": _masked(record.config),
        "begin": _masked({key: value for key, value in record.begun.items() if key != "kind"}),
    }


def _masked(value: Any) -> Any:
    """The same value without the secrets in its texts."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {masked(str(key)): _masked(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(one) for one in value]
    return value

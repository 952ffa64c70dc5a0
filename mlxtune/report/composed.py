"""The page of a run, put together: its sections in the order in which a person asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlxtune.report.html import joined
from mlxtune.report.page import Section, page
from mlxtune.report.run_record import RunRecord
from mlxtune.report.tables import callout


def of_run(record: RunRecord, evaluations: Sequence[Any] = (), others: Sequence[RunRecord] = (), live: str = "") -> str:
    """The page of a run.

    evaluations: of the run, as `mlxtune eval` kept them; others: runs that it is compared with; live: as `page` takes
    it. The same folders give the same page.
    """
    sections: list[Section | None] = []
    lead = joined([callout("warning", warning) for warning in record.warnings])
    there = [section for section in sections if section is not None]
    return page(f"Run {record.name}", lead, there, _for_programs(record), live)


def _for_programs(record: RunRecord) -> Mapping[str, Any]:
    """What the page shows, with all digits."""
    return {"run": record.name, "state": record.state, "config": record.config, "warnings": record.warnings}

"""The section of what the run itself said while it went on: its notes."""

from __future__ import annotations

from mlxtune.report.html import joined, tag
from mlxtune.report.page import Section
from mlxtune.report.run_record import RunRecord
from mlxtune.report.secrets import masked
from mlxtune.report.tables import folded

MOST = 100  # notes that are shown: a run whose loss jumps all the time has thousands
OPEN = 12  # so many are shown without being asked for


def section(record: RunRecord) -> Section | None:
    notes = record.notes()
    if not notes:
        return None
    shown = [tag("li", masked(note)) for note in notes[:MOST]]
    more = len(notes) - len(shown)
    last = tag("p", f"{more:,} more are in events.jsonl.", class_="dim") if more > 0 else None
    summary = f"{len(notes):,} notes" if len(notes) > 1 else "1 note"
    body = folded(summary, tag("ul", shown), last, is_open=len(notes) <= OPEN)
    return Section("notes", "What the run said", joined(body))

"""What the live page of a run shows: the run; that it has not begun; or what was known of it before its folder went."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

from mlxtune.errors import UserError
from mlxtune.report.composed import of_run
from mlxtune.report.html import tag
from mlxtune.report.live.fresh import traces
from mlxtune.report.page import page
from mlxtune.report.run_record import RunRecord, read_run
from mlxtune.report.tables import callout
from mlxtune.train.events import Following
from mlxtune.train.run_folder import RunFolder


class View:
    """Of one run, and of those that it is compared with. It only reads."""

    def __init__(self, folder: Path, others: Sequence[Path], token: str) -> None:
        """others: folders of runs; token: of the served page."""
        self._folder, self._others, self._token = folder, others, token
        self._watched = [folder, *others]
        self._following = {one: Following(one) for one in self._watched}
        self._last: dict[Path, RunRecord] = {}  # what was read last of each run that has begun

    def require_runs(self) -> None:
        """Raise UserError for a folder that is no run, and in which none may begin, and for others that are none."""
        if not RunFolder(self._folder).may_begin():
            read_run(self._folder)
        for other in self._others:
            self._last[other] = read_run(other)

    def has_begun(self) -> bool:
        return RunFolder(self._folder).is_run()

    def look(self) -> Hashable:
        """As `Fresh` takes it. A run that was killed writes nothing: its lock tells."""
        return traces(self._watched), tuple(RunFolder(one).is_training() for one in self._watched)

    def page(self) -> str:
        """The page as it is now."""
        record = self._record(self._folder)
        if record is None:
            return self._not_begun()
        others = [other for other in map(self._record, self._others) if other is not None]
        return of_run(record, (), others, self._token)

    def _record(self, folder: Path) -> RunRecord | None:
        """A run as it is; as it was, where its folder is gone; None: it has not begun."""
        try:
            self._last[folder] = read_run(folder, self._following[folder])
            return self._last[folder]
        except UserError:
            last = self._last.get(folder)
        if last is None:
            return None
        gone = "The folder of the run is not there any more: this is what was last read."
        return replace(last, warnings=[*last.warnings, gone])

    def _not_begun(self) -> str:
        lead = tag("div", callout("neutral", "The run has not begun yet. This page shows it as soon as it does."))
        name = self._folder.absolute().name
        return page(f"Run {name}", lead, [], {"run": name, "state": "not begun"}, self._token)

"""What the live page of a run shows: the run; that it has not begun; or what was known of it before its folder went."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

from mlxtune.errors import UserError
from mlxtune.report.composed import of_run
from mlxtune.report.evaluations import EVALS, NONE, OfRun, evaluations_of
from mlxtune.report.html import tag
from mlxtune.report.live.fresh import traces
from mlxtune.report.page import page
from mlxtune.report.run_record import RunRecord, read_run
from mlxtune.report.sections import data
from mlxtune.report.sections.comparing import Other
from mlxtune.report.tables import callout
from mlxtune.train.events import Following
from mlxtune.train.run_folder import RunFolder


class View:
    """Of one run, and of those that it is compared with. It only reads."""

    def __init__(
        self,
        folder: Path,
        others: Sequence[Path],
        token: str,
        evaluations: Sequence[Path] = (),
        with_answers: bool = True,
    ) -> None:
        """others: folders of runs; token: of the served page; evaluations: folders, as `evaluations_of` takes them;
        with_answers: what the models said is shown.
        """
        self._folder, self._others, self._token = folder, others, token
        self._named, self._with_answers = evaluations, with_answers
        self._runs = [folder, *others]
        self._following = {one: Following(one) for one in self._runs}
        self._reading: threading.Thread | None = None  # reads the data, so that no step waits for it; None: not yet
        self._last: dict[Path, RunRecord] = {}  # what was read last of each run that has begun

    def require_runs(self) -> None:
        """Raise UserError for a folder that is no run, and in which none may begin; for others that are none; and for
        evaluations of another adapter.
        """
        if not RunFolder(self._folder).may_begin():
            record = read_run(self._folder)
            self._evaluations(record, self._named)
        for other in self._others:
            self._last[other] = read_run(other)

    def has_begun(self) -> bool:
        return RunFolder(self._folder).is_run()

    def look(self) -> Hashable:
        """As `Fresh` takes it. A run that was killed writes nothing: its lock tells."""
        watched = dict.fromkeys(self._named, 0)
        for run in self._runs:
            # Beside a run lie exports and evaluations: a folder changes with what is made in it.
            whole = run.absolute()
            watched |= {whole.parent: 0, whole.parent / EVALS: 1, whole.parent.parent / EVALS: 1}
        watched |= dict.fromkeys(self._runs, 2)
        is_training = tuple(RunFolder(one).is_training() for one in self._runs)
        return traces(watched), is_training, self._has_read_data()

    def _has_read_data(self) -> bool:
        """Whether the data was read for the first time; later it is read again only where it changed."""
        return self._reading is not None and not self._reading.is_alive()

    def page(self) -> str:
        """The page as it is now."""
        record = self._record(self._folder)
        if record is None:
            return self._not_begun()
        if self._reading is None:
            self._reading = threading.Thread(target=data.for_programs, args=(record,), daemon=True)
            self._reading.start()
        others = []
        for folder in self._others:
            other = self._record(folder)
            if other is not None:
                others.append(Other(other, self._evaluations(other).evaluations))
        evaluations = self._evaluations(record, self._named)
        return of_run(record, evaluations, others, self._token, self._with_answers, self._has_read_data())

    def _evaluations(self, record: RunRecord, named: Sequence[Path] = ()) -> OfRun:
        """None where the run's folder is gone."""
        return evaluations_of(record.folder, named) if RunFolder(record.folder).is_run() else NONE

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

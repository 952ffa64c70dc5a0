"""Every way out of a run: what is saved, what the user is told, and how to go on.

A run ends with its plan, after a signal, by a failure of the device, or because another process of it fell silent. In
each case the last whole state is saved first. Nothing here computes: the device may be gone, or another thread may be
inside a computation for good.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mlxtune.errors import UserError
from mlxtune.machine.gpu_errors import Failure
from mlxtune.train.checkpoint import State
from mlxtune.train.events import Events
from mlxtune.train.last_whole import LastWhole
from mlxtune.train.signals import StopRequest, briefly
from mlxtune.train.step import Job


@dataclass(frozen=True)
class Leaving:
    """The ways out of one run. Only rank 0 writes; on the others the same calls only print."""

    job: Job  # what is run
    events: Events  # what happens, for the file and the listeners
    whole: LastWhole  # what is saved

    def save(self) -> None:
        """A checkpoint of the last whole state, unless there is one."""
        if self.job.ranks.first:
            began = time.perf_counter()
            self._tell_saved(self.whole.save(), self.whole.state, time.perf_counter() - began)

    def _tell_saved(self, folder: Path | None, state: State, seconds: float) -> None:
        """folder: of the new checkpoint; None: there is no new one. seconds: that saving took."""
        if folder is not None:
            path = folder.relative_to(self.job.folder.path)
            self.events.emit("checkpoint", step=state.step, path=str(path), seconds=seconds)

    def keep_adapter(self) -> None:
        """Leave the last adapter in the run folder, unless the best one is already there, or nothing was trained."""
        state = self.whole.state
        wanted = self.job.section.keep == "last" or state.best_loss is None
        if self.job.ranks.first and state.step and wanted:
            self.whole.save_adapter()

    def interrupted(self) -> str:
        """After a signal, between two steps; the checkpoint is written. Returns what to tell the user."""
        state = self.whole.state
        self.keep_adapter()
        self.events.emit("end", step=state.step, state="interrupted")
        return f"{_stopped(state)}; {self._how_to_go_on(state.step > 0)}"

    def failed(self, failure: Failure | None) -> None:
        """The step could not be computed. failure: of the device; None: another process of the run ended."""
        self.save()
        if failure is not None:
            self.keep_adapter()
            self.events.emit("end", step=self.whole.state.step, state="interrupted", reason=str(failure))

    def inside_a_step(self, stop: StopRequest) -> None:
        """After a second signal, or one that a step outlasts. For another thread than the one that trains, which is
        inside a computation and stays there.
        """
        if not self.job.ranks.first:
            return
        self.whole.writing.acquire()  # for good: the other thread must not begin to write now
        state = self.whole.state
        stopped = _stopped(state)
        if stop.step:
            fate = "lasts too long" if stop.overdue else "is lost"
            stopped = f"stopped inside step {stop.step}, which {fate}"
        folder, began = None, time.perf_counter()
        try:
            folder = self.whole.save()
            self.keep_adapter()
        except Exception as error:  # nothing above this thread would report it
            reason = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            stopped += f"; step {state.step} could not be saved ({reason})"
        seconds = time.perf_counter() - began

        def tell() -> None:
            self._tell_saved(folder, state, seconds)
            self.events.emit("note", text=f"{stopped}; {self._how_to_go_on(self.job.folder.has_checkpoint())}")
            self.events.emit("end", step=state.step, state="interrupted")

        briefly(tell)
        self._leave_no_empty_folder()

    def left_alone(self, waited: str) -> None:
        """Another process of the run did not answer. waited: how long this one waited, in words."""
        step, ranks = self.whole.state.step, self.job.ranks
        others = f"process {ranks.number} of {ranks.size} waited {waited} for the others"
        print(f"error: {others} in step {step + 1}: one hangs, sleeps or lost its network", file=sys.stderr)
        try:
            self.save()
        except (UserError, OSError) as refused:
            print(f"  Step {step} could not be saved: {refused}", file=sys.stderr)
        self.events.emit("end", step=step, state="failed")
        if not ranks.first:
            return
        print(f"  Then: {self._how_to_go_on(self.job.folder.has_checkpoint())}", file=sys.stderr)
        self._leave_no_empty_folder()

    def _how_to_go_on(self, kept: bool) -> str:
        """kept: whether there is a checkpoint. A run that saved nothing leaves no folder."""
        if kept:
            return f"to go on: mlxtune train --resume --out {self.job.folder.path}"
        if self.job.folder.has_work():  # an adapter alone
            return "no checkpoint was saved"
        return f"nothing was saved, and {self.job.folder.path} is removed"

    def _leave_no_empty_folder(self) -> None:
        if not self.job.folder.has_work():
            self.job.folder.remove_unfinished()


def _stopped(state: State) -> str:
    return f"stopped after step {state.step}" if state.step else "stopped before the first step"


def promise(stop: StopRequest, state: State, alone: bool) -> str:
    """What the first signal does, and what another one would. alone: the run has one process."""
    if stop.step:
        left = stop.remaining
        length = "how long it takes is not known yet"
        if left is not None:
            length = f"about {max(1, round(left))} s more"
        again = f"loses step {stop.step}" if state.step else "saves nothing"
        return f"finishing step {stop.step} ({length}), then saving; another signal stops at once and {again}"
    if not state.step:
        return "stopping; nothing was trained yet"
    if stop.evaluating:
        now = "leaving" if alone else "finishing"
        return f"{now} the evaluation, then saving; a resumed run begins with it"
    return "saving, then stopping"

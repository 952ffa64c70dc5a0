"""All checks, done in another process, in a folder that is gone afterwards.

What a check meets on a GPU may end its process, or never end: that is a result too, and the checks after it are done by
a new process.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mlxtune_convert.files import REFUSALS

from mlxtune.errors import UserError
from mlxtune.selftest.outcome import FAILED, Result
from mlxtune.train import signals

SECONDS = 120.0  # that one check may take
PATIENCE = 5.0  # seconds for a process to end when it is told to
PROCESSES = 4  # that may be lost; what is left then is not tried
COMMAND = (sys.executable, "-m", "mlxtune.selftest")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def results(begun: Callable[[str], None]) -> Generator[Result]:
    """The result of every check, as soon as it is there. begun: is told a check's name when it begins.

    Raises UserError when there is no folder to work in, or no room there.
    """
    with _folder() as folder:
        first = 0
        for _ in range(PROCESSES):
            after = yield from _from(first, folder, begun)
            if after is None:
                return
            first = after
        yield Result("", "the rest", FAILED, said=f"not tried, for {PROCESSES} processes were lost")


def _from(first: int, folder: Path, begun: Callable[[str], None]) -> Generator[Result, None, int | None]:
    """The results from number `first` on, by one process. Returns the number to go on with, None when none is left, or
    when another process would not get any further.
    """
    work, errors = folder / str(first), folder / f"{first}.txt"
    work.mkdir()
    last: dict[str, Any] = {}  # what was told of the check that began last
    running = False
    with errors.open("wb") as stderr, _process(work, first, stderr) as (process, deadline):
        for line in process.stdout or ():
            told = _told(line)
            if "begun" in told:
                last, running = told, True
                deadline.restart()
                begun(last["name"])
            elif "status" in told:
                running = False
                yield Result(**told)
            elif "refused" in told:
                raise _no_room(told["refused"])
        code = process.wait()
    reason = f"did not end within {SECONDS:.0f} s" if deadline.passed else _reason(code, errors)
    if not last:
        yield Result("", "start", FAILED, said=f"{reason}; what is left was not tried", seconds=deadline.elapsed())
        return None
    following = last["begun"] + 1
    left = following < last["of"]
    if running:
        yield Result(last["group"], last["name"], FAILED, said=reason, seconds=deadline.elapsed())
    elif left or code != 0:
        yield Result(last["group"], f"after {last['name']}", FAILED, said=reason, seconds=deadline.elapsed())
    return following if left else None


def _no_room(number: int) -> UserError:
    folder, reason = tempfile.gettempdir(), REFUSALS[number][0]
    if number in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"no room to test in {folder}: {reason}", "Free some space, or set TMPDIR to another folder.")
    return UserError(f"cannot test in {folder}: {reason}", "Set TMPDIR to a folder you may write to.")


class Deadline:
    """Kills a process that does not begin another check in time."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.passed = False
        self.restart()

    def restart(self) -> None:
        self.stop()
        self._began = time.monotonic()
        self._timer = threading.Timer(SECONDS, self._kill)
        self._timer.daemon = True
        self._timer.start()

    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def stop(self) -> None:
        if hasattr(self, "_timer"):
            self._timer.cancel()

    def _kill(self) -> None:
        self.passed = True
        self._process.kill()


@contextmanager
def _process(work: Path, first: int, stderr: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], Deadline]]:
    """The process that does the checks; it has ended when this is left, whatever leaves it."""
    process = subprocess.Popen(
        [*COMMAND, str(work), str(first)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, **OFFLINE, "TMPDIR": str(work)},
    )
    deadline = Deadline(process)
    try:
        yield process, deadline
    finally:
        with _undisturbed():
            deadline.stop()
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout:
                process.stdout.close()


@contextmanager
def _folder() -> Iterator[Path]:
    try:
        folder = tempfile.mkdtemp(prefix="mlxtune-test-")
    except OSError as error:
        raise UserError("there is no folder to test in", "Set TMPDIR to one you may write to.") from error
    try:
        yield Path(folder)
    finally:
        with _undisturbed():
            shutil.rmtree(folder)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, a second signal does not keep us from cleaning up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals.EXIT_CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(line: bytes) -> dict[str, Any]:
    """A line of the process as it was meant; libraries print too."""
    try:
        told = json.loads(line)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _reason(code: int, errors: Path) -> str:
    """Why a process ended: the signal, and the last thing that it said."""
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    lines = [line for line in errors.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"the process ended ({how})" + (f": {lines[-1].strip()}" if lines else "")

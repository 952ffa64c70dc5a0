"""One process per run folder. The operating system lets go of the lock when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mlxtune.errors import UserError

FILE = ".lock"


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run's lock inside. Raises UserError, naming the process, when another holds it."""
    with (run / FILE).open("a+", encoding="utf-8") as file:
        if not _taken(file.fileno()):
            file.seek(0)
            raise UserError(
                f"{run}: process {file.read().strip() or '(unknown)'} is training here",
                "Wait for it, stop it, or choose another --out.",
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def is_locked(run: Path) -> bool:
    """Whether a process is training in this folder."""
    try:
        with (run / FILE).open("r", encoding="utf-8") as file:
            return not _taken(file.fileno())
    except OSError:
        return False


def _taken(handle: int) -> bool:
    """Take the lock of an open file, which lasts until the file is closed; False when another process has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

"""One process per run folder. The operating system lets go of the lock when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mlxtune.errors import UserError

FILE = ".lock"
# How file systems say that they have no locks (network volumes, some that FUSE brings).
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)
UNLOCKED = (
    "the volume of this run's folder has no locks: nothing stops a second process from training in it, and "
    "`mlxtune runs` calls the run killed while it lasts"
)


@contextlib.contextmanager
def locked(run: Path) -> Iterator[bool]:
    """Hold the run's lock inside. Yields False when the file system has no locks: then nothing is held.

    Raises UserError, naming the process, when another holds it.
    """
    with (run / FILE).open("a+", encoding="utf-8") as file:
        taken = _taken(file.fileno())
        if taken is False:
            file.seek(0)
            raise UserError(
                f"{run}: process {file.read().strip() or '(unknown)'} is training here",
                "Wait for it, stop it, or choose another --out.",
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield taken is True


def is_locked(run: Path) -> bool:
    """Whether a process is training in this folder; False also where the file system has no locks.

    Asks for a shared lock: two that look do not take each other for a run, and Linux's NFS gives an exclusive one only
    to a file that is open for writing, which another's run may not be.
    """
    try:
        with (run / FILE).open("r", encoding="utf-8") as file:
            return _taken(file.fileno(), fcntl.LOCK_SH) is False
    except OSError:
        return False


def _taken(handle: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Take the lock of an open file, which lasts until the file is closed; False when another process has it, None when
    the file system has no locks.
    """
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True

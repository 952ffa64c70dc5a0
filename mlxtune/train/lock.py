"""One process per run folder. The operating system lets go of the lock when its holder dies, however it dies.

The lock's file, "mlxtune 4711" for process 4711, is also the mark of a run folder: what a run that saved nothing left
behind is ours to remove, and what merely has the same names is not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mlxtune.errors import UserError

MARK = "mlxtune"
HOLDER = re.compile(rf"(?:{MARK} )?(\d+)\n?")  # the number alone: of versions before
# How file systems say that they have no locks (network volumes, some that FUSE brings).
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)
LONGEST = 64  # characters that are read of a lock's file
# Whoever only looks (`is_locked`) holds it for a moment too: one that is taken is asked for again, so many times.
TRIES, TRY_SECONDS = 5, 0.05
UNLOCKED = (
    "the volume of this run's folder has no locks: nothing stops a second process from training in it, and "
    "`mlxtune runs` calls the run killed while it lasts"
)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a run's lock inside. path: the lock's file, in the folder of the run. Yields False when the file system has
    no locks: then nothing is held.

    Raises UserError, naming the process, when another holds it, and for a file of that name that is not ours.
    """
    try:
        file = _opened(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    except _NotAFile as error:
        raise UserError(f"{path} is {error}", "A run's files are its own: choose another --out.") from error
    with file:
        taken = _taken(file.fileno())
        for _ in range(TRIES):
            if taken is not False:
                break
            time.sleep(TRY_SECONDS)
            taken = _taken(file.fileno())
        file.seek(0)
        text = file.read(LONGEST)
        holder = HOLDER.fullmatch(text)
        if taken is False:
            number = holder[1] if holder else "(unknown)"
            raise UserError(
                f"{path.parent}: process {number} is training here", "Wait for it, stop it, or choose another --out."
            )
        if text and not holder:
            raise UserError(f"{path} is not mlxtune's", "Choose another --out.")
        file.truncate(0)
        file.write(f"{MARK} {os.getpid()}\n")
        file.flush()
        yield taken is True


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of this file; False also where the file system has no locks.

    Asks for a shared lock: two that look do not take each other for a run, and Linux's NFS gives an exclusive one only
    to a file that is open for writing, which another's run may not be.
    """
    try:
        with _opened(path, os.O_RDONLY) as file:
            return _taken(file.fileno(), fcntl.LOCK_SH) is False
    except (OSError, _NotAFile):
        return False


def is_marked(path: Path) -> bool:
    """Whether this file is a lock of ours, so that a run of ours began in its folder."""
    try:
        with _opened(path, os.O_RDONLY) as file:
            return file.read(LONGEST).startswith(f"{MARK} ")
    except (OSError, UnicodeDecodeError, _NotAFile):
        return False


class _NotAFile(Exception):
    """There is no ordinary file; the text is what is there instead."""


def _opened(path: Path, flags: int) -> IO[str]:
    """A file, opened without following a link and without waiting for whoever writes into a pipe."""
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _NotAFile("a link") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _NotAFile("no ordinary file")
    return os.fdopen(handle, "a+" if flags & os.O_APPEND else "r", encoding="utf-8", errors="replace")


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

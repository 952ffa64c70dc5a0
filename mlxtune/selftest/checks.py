"""All checks in their order, and how one is done."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from mlxtune.errors import Interrupted, UserError
from mlxtune.selftest import kernels, runs, shipping, timing, ways
from mlxtune.selftest.outcome import FAILED, NOT_HERE, Check, NoRoom, NotHere, Result, Workshop

# The refusals of a folder that are the surroundings' fault, not the machine's.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
# How the disk's being full is said by libraries that keep no number, and before writing by mlxtune.
FULL = (os.strerror(errno.ENOSPC), "not enough disk space")


def every() -> list[Check]:
    return [*kernels.checks(), *ways.checks(), *runs.checks(), *shipping.checks(), *timing.checks()]


def done(check: Check, shop: Workshop) -> Result:
    """The result, whatever the check raises but a signal. Raises NoRoom when the shop's folder takes nothing more."""
    began = time.perf_counter()
    try:
        found = check.run(shop)
    except NotHere as reason:
        return Result(check.group, check.name, NOT_HERE, said=str(reason))
    except Interrupted:
        raise
    except Exception as error:  # a wrong machine may raise anything
        if number := _refusal(error, shop.folder):
            raise NoRoom(number) from error
        said = (str(error).splitlines() or [""])[0]
        if not isinstance(error, UserError):
            said = f"{type(error).__name__}: {said}"
        return Result(check.group, check.name, FAILED, said=said, seconds=time.perf_counter() - began)
    said = found.wrong or found.said
    seconds = time.perf_counter() - began
    return Result(check.group, check.name, found.status, found.value, found.limit, found.unit, said, seconds)


def _refusal(error: Exception, folder: Path) -> int:
    """The number of the refusal to write in this folder that an error goes back to, 0: it goes back to another."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in NO_ROOM and _within(cause.filename, folder):
            return cause.errno
        if not isinstance(cause, OSError) and any(words in str(cause) for words in FULL):
            return errno.ENOSPC
    return 0


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _within(name: object, folder: Path) -> bool:
    """A write that fails in an open file names none."""
    return not isinstance(name, str) or Path(name).resolve().is_relative_to(folder.resolve())

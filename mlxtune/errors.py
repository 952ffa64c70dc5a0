"""The errors a person sees. `UserError` lives with the file formats, which must stand alone."""

import difflib
from collections.abc import Iterable

from mlxtune_convert.errors import UserError

__all__ = ["STOPPED", "Interrupted", "UserError", "did_you_mean", "nearest"]

STOPPED = (129, 130, 143)  # exit statuses of a process that a signal stops: no program of anybody's ends so by itself


class Interrupted(Exception):
    """A signal stopped the work after everything worth keeping was saved.

    `exit_code` follows the shell: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


def nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """Of `known` names the one that is spelled most like `name`, or "" where none is. likeness: 0 any, 1 equal."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=likeness)), "")


def did_you_mean(name: str, known: Iterable[str], there_are: str = "There are") -> str:
    """The hint for a name that is none of `known`: the nearest one, if any is near, and all of them."""
    known = list(known)
    near = nearest(name, known)
    return (f"Did you mean {near}? " if near else "") + f"{there_are}: {', '.join(known)}."

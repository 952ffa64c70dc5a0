"""The errors a person sees. `UserError` lives with the file formats, which must stand alone."""

from mlxtune_convert.errors import UserError

__all__ = ["STOPPED", "Interrupted", "UserError"]

STOPPED = (129, 130, 143)  # exit statuses of a process that a signal stops: no program of anybody's ends so by itself


class Interrupted(Exception):
    """A signal stopped the work after everything worth keeping was saved.

    `exit_code` follows the shell: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code

"""The one exception that a person can act on; everything else is a bug."""

CONVERT_ORIGINAL = "Convert from the original Hugging Face model instead."  # where a GGUF is whole and cannot be used


class UserError(Exception):
    """Something the user can fix. The command line prints it as one line and exits with 2.

    `message` says what is wrong, where, and what was expected; `hint` says what to type next.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

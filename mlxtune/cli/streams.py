"""A stream that a run outlives."""

from __future__ import annotations

import os
from typing import Any, TextIO


class Surviving:
    """A stream on which writing never fails. Where its terminal was closed, or whoever read it has ended (`2>&1 | tee`
    dies of the same Ctrl-C), nothing is written any more: a run must not be lost for words.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._lost()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lost()

    def _lost(self) -> None:
        """What the stream still holds, and whatever else is written there, goes nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

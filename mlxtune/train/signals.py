"""Ctrl-C and SIGTERM. In training the first finishes the step and saves, the second stops at once; elsewhere both
stop at once, and what is half done is cleaned up.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def exit_on_sigterm() -> None:
    """Make SIGTERM unwind the program, as Ctrl-C does, instead of ending it on the spot."""

    def stop(number: int, _: FrameType | None) -> None:
        sys.exit(EXIT_CODES[signal.Signals(number)])

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


class StopRequest:
    """While entered, remembers a signal instead of dying of it. `exit_code` is 0 until one came."""

    def __init__(self) -> None:
        self.exit_code = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in EXIT_CODES}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.exit_code:
            raise KeyboardInterrupt
        self.exit_code = EXIT_CODES[signal.Signals(number)]

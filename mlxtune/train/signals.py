"""Ctrl-C and SIGTERM. In training the first finishes the step and saves; where the step lasts, it is given up between
two micro-batches, and what was done before it is saved. The second signal, or ten seconds inside a step, stops at once.
Elsewhere one is enough, and what is half done is cleaned up.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
GIVE_UP_SECONDS = 5.0  # after the first signal no further micro-batch is begun
STEP_SECONDS = 10.0  # that a step may still take after the first signal
CLOSED, OVERDUE = 0, 255  # no signals have these numbers


def exit_on_sigterm() -> None:
    """Make SIGTERM unwind the program, as Ctrl-C does, instead of ending it on the spot."""

    def stop(number: int, _: FrameType | None) -> None:
        sys.exit(EXIT_CODES[signal.Signals(number)])

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


class StopRequest:
    """While entered, remembers a signal instead of dying of it. `exit_code` is 0 until one came.

    A thread of its own waits for signals: while the main thread computes, Python runs none of its handlers.
    at_once: called before the process ends without having finished its step.
    """

    def __init__(self, at_once: Callable[[], None] = lambda: None) -> None:
        self.exit_code = 0
        self._heard = math.inf
        self._at_once = at_once
        self._in_step = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._receive, self._send = os.pipe()
            os.set_blocking(self._send, False)
            self._before = {number: signal.signal(number, lambda *_: None) for number in EXIT_CODES}
            signal.set_wakeup_fd(self._send, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._send, bytes([CLOSED]))
        self._before = {}

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Around what may only take STEP_SECONDS more once a signal came."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False

    @property
    def giving_up(self) -> bool:
        """Whether a step under way should not be finished."""
        return time.monotonic() - self._heard > GIVE_UP_SECONDS

    def _watch(self) -> None:
        number = self._next()
        if number in EXIT_CODES:
            self.exit_code, self._heard = EXIT_CODES[signal.Signals(number)], time.monotonic()
            number = self._next(time.monotonic() + STEP_SECONDS)
        if number == CLOSED:
            os.close(self._receive)
            os.close(self._send)
            return
        self._at_once()
        os._exit(self.exit_code)

    def _next(self, deadline: float = math.inf) -> int:
        """The next signal, CLOSED at the end, OVERDUE when a step lasts beyond the deadline."""
        while True:
            if select.select([self._receive], [], [], None if deadline == math.inf else 0.1)[0]:
                number = os.read(self._receive, 1)[0]
                if number == CLOSED or number in EXIT_CODES:
                    return number
            elif self._in_step and time.monotonic() > deadline:
                return OVERDUE

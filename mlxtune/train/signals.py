"""Ctrl-C, SIGTERM and SIGHUP (the terminal was closed).

In training the first one says what it does, finishes the step, saves and stops; the second one, or a step that takes
much longer than the one before, stops at once. Elsewhere one is enough, and what is half done is cleaned up.

    first signal in step 8   "finishing step 8 (about 3 s more), then saving; ..."   step 8 ends, checkpoint 8, exit 130
    a second one meanwhile   one second for step 8 to end by itself                  checkpoint 7, exit 130
    no second one            step 8 takes more than twice as long as step 7 (and 10 s)         the same

While the main thread computes, Python runs none of its signal handlers: a thread of its own waits for signals, and it
ends the process where the main thread does not come back.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP (sent when a terminal is closed)"}
# After the first signal a step may take so many seconds more, or so many times what the one before took.
STEP_SECONDS, STEP_TIMES = 10.0, 2.0
GIVE_UP_SECONDS = 1.0  # in which a step that should stop may do so by itself, between two micro-batches
SPEAK_SECONDS = 2.0  # that a message to the terminal or a logger may take
POLL = 0.1  # seconds between two looks at how long a step lasts
CLOSED, OVERDUE = 0, 255  # in place of a signal's number, which none has: training is over, a step lasts too long


def unwind_on_signals() -> None:
    """Make SIGTERM and SIGHUP unwind the program, as Ctrl-C does, instead of ending it on the spot."""

    def stop(number: int, _: FrameType | None) -> None:
        if heeded(signal.SIGHUP):  # a closing terminal sends it twice: not into the cleaning up
            signal.signal(signal.SIGHUP, lambda *_: None)
        sys.exit(EXIT_CODES[signal.Signals(number)])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if heeded(number):
                signal.signal(number, stop)


def heeded(number: int) -> bool:
    """Whether this signal is for us: `nohup` has a program ignore SIGHUP."""
    return number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Inside, no signal of EXIT_CODES interrupts: around saving what is left of a run that failed, after which the
    process ends anyway. (`mlx.launch` sends SIGTERM to the other processes as soon as one of them failed.)
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in EXIT_CODES if heeded(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """While entered, remembers a signal instead of dying of it."""

    def __init__(
        self,
        heard: Callable[[str], None] = lambda name: None,
        leave: Callable[[], None] = lambda: None,
        alone: bool = True,
    ) -> None:
        """heard: called with the first signal's name; leave: called before the process ends inside a step; both by the
        thread that waits for signals. alone: whether this process may break off a step without asking others.
        """
        self.exit_code = 0  # of the process, once a signal came; 0: none came
        self.giving_up = False  # the step under way should not be finished
        self.overdue = False  # because it lasts too long, not because of a second signal
        self.step = 0  # the number of the one under way; 0: none is
        self.evaluating = False  # an evaluation is under way
        self._heard_at = 0.0  # when the first signal came, in seconds of the monotonic clock
        self._began = 0.0  # when the last step began, by the same clock
        self._took: float | None = None  # seconds of the last step that was finished; None: none was
        self._heard, self._leave, self._alone = heard, leave, alone
        self._leaving = False  # the thread is saving, and ends the process then
        self._before: dict[int, Any] = {}  # signal -> its handler before; empty: not entered, or not the main thread

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._receive, self._send = os.pipe()
            os.set_blocking(self._send, False)
            numbers = [number for number in EXIT_CODES if heeded(number)]
            self._before = {number: signal.signal(number, lambda *_: None) for number in numbers}
            signal.set_wakeup_fd(self._send, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._before:
            return
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._send, bytes([CLOSED]))
        self._before = {}
        if self._leaving:  # it is saving, and ends the process then
            self._thread.join()

    @contextlib.contextmanager
    def in_step(self, number: int) -> Iterator[None]:
        """Around a step: what may only take so much longer once a signal came."""
        self._began, self.step = time.monotonic(), number
        try:
            yield
        finally:
            self.step = 0
        self._took = time.monotonic() - self._began

    @contextlib.contextmanager
    def in_evaluation(self) -> Iterator[None]:
        """Around an evaluation."""
        self.evaluating = True
        try:
            yield
        finally:
            self.evaluating = False

    @property
    def remaining(self) -> float | None:
        """Seconds that the step under way will take, if it is like the one before; None: it is the first."""
        if self._took is None:
            return None
        return max(0.0, self._took - (time.monotonic() - self._began))

    def _watch(self) -> None:
        """The thread: wait for a first signal, then for a second or a step that lasts; CLOSED ends both waits."""
        number = self._next()
        if number != CLOSED:
            first, self._heard_at = signal.Signals(number), time.monotonic()
            briefly(lambda: self._heard(NAMES[first]))
            self.exit_code = EXIT_CODES[first]  # only now: what is said comes before what is done
            number = self._next(self._overdue)
        if number != CLOSED:
            number = self._given_up(number)
        if number == CLOSED:
            os.close(self._receive)
            os.close(self._send)
            return
        self._leaving = True
        try:
            self._leave()
        finally:
            os._exit(self.exit_code)

    def _overdue(self) -> bool:
        """Whether a step lasts too long. Of the first one nobody knows how long it takes: it is waited for."""
        if not self.step or self._took is None:
            return False
        return time.monotonic() - self._heard_at > max(STEP_SECONDS, STEP_TIMES * self._took)

    def _given_up(self, number: int) -> int:
        """After a second signal or an overdue step: CLOSED where the main thread ends by itself in a moment."""
        self.giving_up, self.overdue, began = True, number == OVERDUE, time.monotonic()

        def lasts() -> bool:
            # Where nobody asked for it again, what follows the step, such as saving, is waited for.
            return time.monotonic() - began > GIVE_UP_SECONDS and (self.step > 0 or not self.overdue)

        if not self._alone:
            return number
        return self._next(lasts)

    def _next(self, overdue: Callable[[], bool] = lambda: False) -> int:
        """The next signal that counts, CLOSED at the end, OVERDUE as soon as `overdue` says so."""
        while True:
            wait = POLL if self.exit_code else None  # for ever: nothing is overdue before the first signal
            if not select.select([self._receive], [], [], wait)[0]:
                if overdue():
                    return OVERDUE
                continue
            number = os.read(self._receive, 1)[0]
            # The shell and the system both send SIGHUP when a terminal closes: that is no second wish.
            is_repeated = number == signal.SIGHUP and self.exit_code
            if number == CLOSED or (number in EXIT_CODES and not is_repeated):
                return number


def briefly(call: Callable[[], None], seconds: float = SPEAK_SECONDS) -> None:
    """Call it without waiting longer than this: a terminal that is halted, or a logger that waits for its server, must
    not keep a run from stopping. Where nothing can be written any more, nothing is said.
    """

    def speak() -> None:
        with contextlib.suppress(OSError):
            call()

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    thread.join(seconds)

"""How long one of several processes waits for the others. MLX itself waits for ever: for a machine that fell asleep,
hangs, or lost its network without a word.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlxtune.durations import in_words

OF_OWN = 20.0  # times its own work before a wait: other machines may be slower, or have more to do
OF_PAST = 3.0  # times the longest wait that ended well
NOTED = 600.0  # seconds; of a wait before training begins there is a note after so long, and again each time
POLL = 0.5  # seconds between two looks at the clock
FAILED = 2  # exit status


class Patience:
    """Times the waits of this process; a thread of its own ends one that lasts too long, for the main thread is inside
    MLX then.

    Of a long wait before training begins there is only a note: the others may read, download or tokenize, and nothing
    is lost.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._least = NOTED  # seconds; no wait has a lower limit
        self._give_up: Callable[[str], None] | None = None  # called before the process ends; None: it does not end
        self._since: float | None = None  # when the wait under way began; None: this process works
        self._limit = NOTED  # seconds, of the wait under way
        self._worked_since = time.monotonic()  # when the wait before ended
        self._longest = 0.0  # seconds, of the waits in training that ended well

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around every exchange with the others."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        began = time.monotonic()
        with self._lock:
            self._limit = max(self._least, OF_OWN * (began - self._worked_since), OF_PAST * self._longest)
            self._since = began
        try:
            yield
        finally:
            with self._lock:
                self._since, self._worked_since = None, time.monotonic()
                self._longest = max(self._longest, self._worked_since - began)

    @contextmanager
    def ends_the_run(self, seconds: float, give_up: Callable[[str], None]) -> Iterator[None]:
        """Inside, a wait beyond its limit, of at least so many seconds, ends this process with status FAILED.

        give_up: called before, from another thread, with how long it waited, in words.
        """
        with self._lock:
            self._least, self._give_up, self._longest = seconds, give_up, 0.0
        try:
            yield
        finally:
            with self._lock:
                self._least, self._give_up = NOTED, None

    def _watch(self) -> None:
        noted = 0.0  # seconds of this wait of which there was a note
        while True:
            time.sleep(POLL)
            with self._lock:
                since, limit, give_up = self._since, self._limit, self._give_up
                waited = 0.0 if since is None else time.monotonic() - since
            if waited <= limit:
                noted = 0.0
            elif give_up is not None:
                try:
                    give_up(in_words(waited))
                    sys.stderr.flush()
                finally:
                    os._exit(FAILED)
            elif waited > noted + limit:
                noted = waited
                text = f"note: {in_words(waited)} of waiting for the other processes, which may still read the model"
                print(text, file=sys.stderr, flush=True)

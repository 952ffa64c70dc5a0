"""A page that is made again when something that it tells of has changed, and somebody asks for it.

    asked at 0.0 s   nothing was made yet: made, which took 0.2 s
    asked at 1.0 s   nothing changed: the same page
    asked at 2.0 s   a step was written: made again
    asked at 2.3 s   the next step was written; the machine has better things to do: the same page
    asked at 3.0 s   made again

Training goes on beside it, so making pages may take a share of one core only, however long a run is.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

# A page that took so long to make is not made again before so many times that long: a quarter of a core. Of the last
# two pages the quicker one counts: one for which something was read that is kept now says nothing of the next.
REST_TIMES = 3
MOST_ENTRIES = 2_000  # of the file system that are looked at for a change; what loggers write may be many files


@dataclass(frozen=True)
class Made:
    """A page as it is sent."""

    body: bytes  # UTF-8
    tag: str  # an HTTP entity tag: another one for every other body


class Fresh:
    """The page as it is now. Several threads may ask."""

    def __init__(
        self, look: Callable[[], Hashable], make: Callable[[], str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """look: something that differs when what the page tells of has changed, and costs little; make: the page;
        clock: seconds.
        """
        self._look, self._make, self._clock = look, make, clock
        self._lock = threading.Lock()
        self._made: Made | None = None  # None: nobody asked yet
        self._seen: Hashable = None  # what `look` gave before it was made
        self._took = 0.0  # seconds, the last page; 0: none was made
        self._rest_until = 0.0  # by the clock: no page is made before

    def page(self) -> Made:
        """Raises what `make` raises."""
        with self._lock:
            began = self._clock()
            if self._made is not None and began < self._rest_until:
                return self._made
            # Looked at before the page is made: what changes meanwhile is a change for the next time.
            seen = self._look()
            if self._made is None or seen != self._seen:
                body = self._make().encode("utf-8", "replace")
                self._made = Made(body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
                self._seen = seen
                ended = self._clock()
                took = ended - began
                self._rest_until = ended + REST_TIMES * min(took, self._took)
                self._took = took
            return self._made


def traces(folders: Mapping[Path, int]) -> Hashable:
    """What the file system says of what is in these folders: names, sizes and times of change. Two results are equal
    while nothing is written there. A folder that is gone has none; links are not followed.

    folders: each with how many folders below it are looked into as well, one inside the other. The last are looked
    into first: of a folder with very many entries beside a run the rest is left out, and not the run.
    """
    found: list[tuple[str, int, int]] = []
    waiting = list(folders.items())
    while waiting and len(found) < MOST_ENTRIES:
        folder, deeper = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    found.append((entry.path, status.st_mtime_ns, status.st_size))
                    if deeper > 0 and entry.is_dir(follow_symlinks=False):
                        waiting.append((Path(entry.path), deeper - 1))
        except OSError:  # gone, also in this very moment
            found.append((str(folder), -1, -1))
    return tuple(sorted(found))

"""The page of a run, kept as fresh as train.report says, beside what a terminal shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from mlxtune_convert.shown import shown_name

from mlxtune.cli import common
from mlxtune.train.events import Event, Following, Listener

# Training waits for a page. One that took so long is not made again before so many times that long, which is 5% of the
# time, however many evaluations and steps there are. Of the last two pages the quicker one counts, as in `live.fresh`.
REST_TIMES = 19


@contextmanager
def with_page(
    display: AbstractContextManager[Listener], run: Path, when: str, clock: Callable[[], float] = time.monotonic
) -> Iterator[Listener]:
    """A listener for the run in `run`: what `display` gives, and behind it the page.

    when: as train.report has it. The page is written when the run is left, after a signal and an error too; but not
    where no run began: what lies in `run` then is another's. clock: seconds.
    """
    has_begun = False
    following = Following(run)  # of a long run each page reads only what is new
    took, rest_until = 0.0, 0.0  # seconds that the last page took (0: there was none); by the clock
    try:
        with display as listener:

            def listen(event: Event) -> None:
                nonlocal has_begun, took, rest_until
                listener(event)
                has_begun = has_begun or event["kind"] == "begin"
                if when == "evaluations" and event["kind"] == "eval" and (began := clock()) >= rest_until:
                    refresh_page(run, following)
                    ended = clock()
                    rest_until = ended + REST_TIMES * min(took, ended - began)
                    took = ended - began

            yield listen
    finally:
        if has_begun and when != "off":
            refresh_page(run, following)


def refresh_page(run: Path, following: Following | None = None) -> None:
    """Write RUN/report.html anew, or say why that could not be: a run never fails for its page. following: of the run's
    events, where pages follow each other.
    """
    from mlxtune.errors import UserError
    from mlxtune.report.written import refresh

    try:
        refresh(run, following)
    except Exception as error:  # a full disk, a fault of ours: nothing that a night's run should end for
        reason = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        common.note(f"the page of the run could not be written ({shown_name(reason)}); try: mlxtune report {run}")

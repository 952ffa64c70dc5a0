"""The page of a run, kept as fresh as train.report says, beside what a terminal shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from mlxtune_convert.shown import shown_name

from mlxtune.cli import common
from mlxtune.train.events import Event, Listener


@contextmanager
def with_page(display: AbstractContextManager[Listener], run: Path, when: str) -> Iterator[Listener]:
    """A listener for the run in `run`: what `display` gives, and behind it the page.

    when: as train.report has it. The page is written when the run is left, after a signal and an error too; but not
    where no run began: what lies in `run` then is another's.
    """
    has_begun = False
    try:
        with display as listener:

            def listen(event: Event) -> None:
                nonlocal has_begun
                listener(event)
                has_begun = has_begun or event["kind"] == "begin"
                if when == "evaluations" and event["kind"] == "eval":
                    refresh_page(run)

            yield listen
    finally:
        if has_begun and when != "off":
            refresh_page(run)


def refresh_page(run: Path) -> None:
    """Write RUN/report.html anew, or say why that could not be: a run never fails for its page."""
    from mlxtune.errors import UserError
    from mlxtune.report.written import refresh

    try:
        refresh(run)
    except Exception as error:  # a full disk, a fault of ours: nothing that a night's run should end for
        reason = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        common.note(f"the page of the run could not be written ({shown_name(reason)}); try: mlxtune report {run}")

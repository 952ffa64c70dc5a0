"""A page as a file: RUN/report.html, or wherever it is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlxtune_convert.files import new_file

from mlxtune.report.composed import of_run
from mlxtune.report.evaluations import evaluations_of
from mlxtune.report.page import OURS
from mlxtune.report.run_record import RunRecord, read_run
from mlxtune.report.sections.comparing import Other
from mlxtune.train.events import Following
from mlxtune.train.run_folder import PAGE_FILE, RunFolder

HEAD = 4_096  # bytes in which a page of ours says so


def write_page(
    record: RunRecord,
    out: Path | None = None,
    force: bool = False,
    evaluations: Sequence[Path] = (),
    with_answers: bool = True,
    others: Sequence[Other] = (),
) -> Path:
    """Write the page of a run, and return where it is.

    out: None for RUN/report.html; force: replace what is there though it is no page of ours; evaluations: folders, as
    `evaluations_of` takes them; with_answers: what the models said is shown; others: what the run is compared with.
    Raises UserError where the page cannot be written, where it would replace something, and for an evaluation of
    another adapter.
    """
    out = out or record.folder / PAGE_FILE
    read = []
    for folder in (record.folder, *(other.record.folder for other in others)):
        run = RunFolder(folder)
        read += [path for path in (run.config_file, run.events, run.adapter) if path is not None]
    text = of_run(record, evaluations_of(record.folder, evaluations), others, with_answers=with_answers)
    with new_file(out, force=force or is_page(out), sources=read) as file:
        file.write(text)
    return out


def refresh(run: Path, following: Following | None = None) -> None:
    """Write RUN/report.html anew, where there is a run. following: as `read_run` takes it. Raises UserError as
    `write_page` does, and whatever else.
    """
    if RunFolder(run).is_run():
        write_page(read_run(run, following))


def is_page(path: Path) -> bool:
    """Whether a file is a page of ours, which may be replaced by another one."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return OURS.encode() in file.read(HEAD)

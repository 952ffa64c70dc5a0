"""The pages of --html: where one may be written, and the page of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxtune_convert.files import new_file, refuse_existing

from mlxtune.cli import common
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from mlxtune.evaluate.before_after import Outcome
    from mlxtune.evaluate.checks.check import SuiteRow
    from mlxtune.report.evaluations import Evaluated


def require_place(file: Path | None, force: bool | None = None) -> None:
    """Raise UserError where no page can be written there, before anything is answered or read. A page of an earlier
    time is replaced.

    file: None: no page is wanted; force: replace what is there; None: the command has no --force.
    """
    from mlxtune.report.written import is_page

    if file is None:
        return
    if file.is_dir():
        raise UserError(f"--html {file} is a folder", "Name a file in it, as in --html page.html.")
    if file.suffix.lower() != ".html":
        raise UserError(f"--html {file}: an HTML page is written", "Give it a name that ends with .html.")
    try:
        refuse_existing(file, force=force or is_page(file))
    except UserError as error:
        raise error if force is not None else UserError(error.message, "Choose another name.") from error


def write(file: Path, text: str, force: bool = False) -> None:
    """Write a page where `require_place` allowed it."""
    from mlxtune.report.written import is_page

    with new_file(file, force=force or is_page(file)) as opened:
        opened.write(text)
    common.note(f"the page is {file}")


def write_suite(
    file: Path | None, kept: Path | None, rows: Sequence[SuiteRow], outcome: Outcome, with_answers: bool
) -> None:
    """file: None for no page; kept: the folder of the evaluation; None: nothing of it is kept but this page; rows: what
    was asked.
    """
    from mlxtune.evaluate.comparison.folder import Evaluation
    from mlxtune.report.evaluations import Unkept

    if file is None:
        return
    if kept is None:
        _write(file, Unkept.of(rows, outcome, "answers that were not kept"), with_answers)
    else:
        _write(file, Evaluation.read(kept), with_answers)


def write_benchmarks(file: Path, kept: Path | None, result: Mapping[str, Any]) -> None:
    """kept: as above; result: the document of the benchmarks."""
    from mlxtune.evaluate.comparison.folder import Evaluation
    from mlxtune.report.evaluations import Unkept

    if kept is None:
        _write(file, Unkept("benchmarks", result, {}, {}, ()), with_answers=False)
    else:
        _write(file, Evaluation.read(kept), with_answers=False)


def _write(file: Path, evaluation: Evaluated, with_answers: bool) -> None:
    from mlxtune.report.of_evaluations import page_of

    write(file, page_of(evaluation, with_answers))

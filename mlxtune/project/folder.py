"""The files of a new project appear together or not at all, beside whatever their folder holds already."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlxtune_convert.files import explained, flush, new_folder

from mlxtune.errors import UserError
from mlxtune.project.file import PROJECT_FILE

DATA, SUITE, SUITE_SETTINGS, README, IGNORED = "data", "suite.jsonl", "suite.yaml", "README.md", ".gitignore"
# All that a new project may consist of.
NAMES = (PROJECT_FILE, DATA, SUITE, SUITE_SETTINGS, README, IGNORED)


def require_free(folder: Path) -> None:
    """Raise UserError where a name that a project needs is taken, and where no folder can be."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is a file", "Name a folder: mlxtune init DIR")
    taken = [name for name in NAMES if os.path.lexists(folder / name)]
    if not taken:
        return
    if PROJECT_FILE in taken:
        raise UserError(
            f"{folder / PROJECT_FILE} is already here: this folder is a project",
            "Change that file; or begin another project: mlxtune init DIR",
        )
    listed = ", ".join(taken)
    raise UserError(
        f"{folder.absolute()} already holds {listed}, and nothing is overwritten",
        "Begin the project in a folder of its own: mlxtune init DIR",
    )


@contextmanager
def new_project(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; what the body writes into it is moved into `folder` only if the body succeeds.

    An exception (Ctrl-C included) leaves `folder` as it was, and nothing beside it. Raises UserError for a name that is
    taken by then, a full disk, or a folder that cannot be written.
    """
    if not folder.exists():
        with new_folder(folder) as work:
            yield work
        return
    moved: list[Path] = []
    with explained(folder):
        work = Path(tempfile.mkdtemp(prefix=".mlxtune-init.", dir=folder))
        try:
            yield work
            require_free(folder)
            for written in sorted(work.rglob("*")):
                flush(written)
            # The project's file comes last: where it is, all the others are.
            for path in sorted(work.iterdir(), key=lambda path: path.name == PROJECT_FILE):
                moved.append(folder / path.name)
                os.rename(path, moved[-1])
            flush(folder)
            moved.clear()
        finally:
            for path in moved:  # stopped between two of them
                _take_back(path, work)
            shutil.rmtree(work, ignore_errors=True)


def _take_back(path: Path, work: Path) -> None:
    """Move it where it came from, if it had been moved at all."""
    if path.exists() and not (work / path.name).exists():
        os.rename(path, work / path.name)

"""The folder of a run: what its files are called, and the questions that concern it as a whole.

    RUN/config.yaml              the configuration, resolved: every key written out
    RUN/events.jsonl             what happened, one line each (`events`)
    RUN/adapters.safetensors     the adapter: the best so far or the last, as train.keep says
    RUN/adapter_config.json      what kind of adapter it is, as mlx-lm reads it
    RUN/mlxtune_tokenizer.json   what the run changed in the tokenizer, if it did
    RUN/reference.safetensors    of a run on preferences: what the model at step 0 gives each answer (`preference`)
    RUN/checkpoints/             step-0000100/ and so on, and best/ (`checkpoint`)
    RUN/.lock                    held by the process that trains; also the mark of a run's folder (`lock`)
    RUN/tensorboard, RUN/wandb   what loggers write
    RUN/report.html              the page of the run, which `mlxtune train` and `mlxtune report` write

A run that saved nothing leaves no folder. What others put into the folder of a run is never removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from mlxtune_convert.files import contents

from mlxtune.adapter import adapter_files
from mlxtune.config import resolve
from mlxtune.config.resolve import Config
from mlxtune.data.template import tokenizer_changes
from mlxtune.errors import UserError
from mlxtune.train import checkpoint, lock
from mlxtune.train.checkpoint import Saved

CONFIG_FILE = "config.yaml"
EVENTS_FILE = "events.jsonl"
LOCK_FILE = ".lock"
PAGE_FILE = "report.html"
REFERENCE_FILE = "reference.safetensors"
CHECKPOINTS = "checkpoints"
# All that a run writes before it saved anything.
BEFORE_SAVING = (
    LOCK_FILE,
    CONFIG_FILE,
    EVENTS_FILE,
    adapter_files.CONFIG_FILE,
    tokenizer_changes.FILE,
    REFERENCE_FILE,
    CHECKPOINTS,
    "tensorboard",
    "wandb",
    PAGE_FILE,
)
ADAPTERS = (adapter_files.ADAPTER_FILE, adapter_files.OWN_FILE)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, whether it is there or not."""

    path: Path  # --out

    @property
    def config_file(self) -> Path:
        return self.path / CONFIG_FILE

    @property
    def events(self) -> Path:
        return self.path / EVENTS_FILE

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def lock(self) -> Path:
        return self.path / LOCK_FILE

    @property
    def adapter(self) -> Path | None:
        """The file of the adapter, which has one of two names; None: there is none yet."""
        return adapter_files.adapter_file(self.path)

    def is_run(self) -> bool:
        """Whether a run began here: it wrote its configuration."""
        return self.config_file.is_file()

    def is_marked(self) -> bool:
        """Whether a run of ours began here, by its mark: other programs write a config.yaml too."""
        return lock.is_marked(self.lock)

    def is_training(self) -> bool:
        """Whether a process trains here now; False also where the file system has no locks."""
        return lock.is_locked(self.lock)

    def locked(self) -> AbstractContextManager[bool]:
        """As `lock.locked`."""
        return lock.locked(self.lock)

    def has_checkpoint(self) -> bool:
        """Whether the run can be resumed."""
        return bool(checkpoint.folders(self.checkpoints))

    def has_work(self) -> bool:
        """Whether it holds anything worth keeping: an adapter or a checkpoint."""
        return self.adapter is not None or self.has_checkpoint()

    def config(
        self, file: str | None = None, settings: tuple[str, ...] = (), flags: Mapping[str, Any] | None = None
    ) -> Config:
        """The resolved configuration that the run was made with, or another `file`, with what a command line changes in
        it (`resolve.load`). Raises UserError when the folder is no run.
        """
        if not self.is_run():
            raise UserError(f"{self.path} is not a run of mlxtune (no {CONFIG_FILE})")
        return resolve.load(file or self.config_file, settings, flags)

    def newest(self, skipped: Callable[[str], None]) -> Saved:
        """As `checkpoint.newest`. Raises UserError also for a file of the run that is a link."""
        self.refuse_links()
        return checkpoint.newest(self.checkpoints, skipped)

    def may_begin(self) -> bool:
        """Whether a run may begin here: there is nothing, or one of ours was killed here before it saved anything."""
        if self.path.is_symlink() or not self.path.is_dir():
            return not os.path.lexists(self.path)
        found = contents(self.path)
        if not found:
            return True
        for path in found:
            if path.name not in BEFORE_SAVING or path.is_symlink():
                return False
        return self.is_marked() and not self.has_work() and not self.is_training()

    def require_free(self, force: bool = False, sources: Iterable[Path] = ()) -> None:
        """Raise UserError when no run may begin here. force: an earlier run may be replaced, if it is nothing but a
        run, and holds none of `sources`, which the new one reads.
        """
        if self.may_begin():
            return
        if not force or not self.is_marked() or self.path.is_symlink():
            raise self.taken()
        self.refuse_removal(sources)

    def refuse_removal(self, sources: Iterable[Path] = ()) -> None:
        """Raise UserError where more than a run that ended would go with the folder. sources: what is still needed."""
        if self.is_training():
            raise UserError(f"a process is training in {self.path}", "Wait for it, or choose another --out.")
        if Path.cwd().is_relative_to(self.path.resolve()):
            raise UserError(f"{self.path} is the folder you are in, or holds it", "Choose another --out.")
        for source in sources:
            if source.resolve().is_relative_to(self.path.resolve()):
                raise UserError(f"{self.path} holds the source {source}", "Choose another --out.")
        strangers = self.strangers()
        if strangers:
            raise UserError(f"{self.path} holds {strangers[0]}, which mlxtune did not write", "Choose another --out.")
        self.refuse_links()

    def remove(self, sources: Iterable[Path] = ()) -> None:
        """Take an earlier run away. Raises UserError as `require_free` does with force."""
        if not self.may_begin():
            self.require_free(True, sources)
            shutil.rmtree(self.path)

    def taken(self) -> UserError:
        """Why no run may begin here, and what to do."""
        also = ""
        if self.is_marked() and not self.path.is_symlink():
            also += ", or replace it with --force"
        if self.has_checkpoint():
            also += ", or continue that run with --resume"
        return UserError(f"{self.path} already exists", f"Choose another --out{also}.")

    def strangers(self) -> list[str]:
        """The names of what is in it that no run writes, in their order."""
        names = {path.name for path in contents(self.path)}
        return sorted(names.difference(BEFORE_SAVING, ADAPTERS))

    def refuse_links(self) -> None:
        """Raise UserError where a file or folder of the run is a link: what it leads to is another's, and would be
        written to or removed.
        """
        for name in (*BEFORE_SAVING, adapter_files.ADAPTER_FILE):
            path = self.path / name
            if path.is_symlink():
                raise UserError(f"{path} is a link", "A run's files are its own: choose another --out, or remove it.")
        if not self.checkpoints.is_dir():
            return
        for path in self.checkpoints.iterdir():
            if path.is_symlink() and checkpoint.is_own_name(path.name):
                raise UserError(f"{path} is a link", "Checkpoints are never linked: remove it.")

    def remove_unfinished(self) -> None:
        """Take away what a run wrote that saved nothing; what others put there stays. Only where a run began."""
        if not self.is_marked():
            return
        for name in BEFORE_SAVING:
            path = self.path / name
            if path == self.checkpoints:
                checkpoint.remove_all(path)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if self.path.is_dir() and not contents(self.path):
            shutil.rmtree(self.path, ignore_errors=True)


def default_folder(model: str) -> Path:
    """runs/<date>-<model>, numbered when it exists."""
    stem = Path("runs") / f"{date.today().isoformat()}-{Path(model).name}"
    if not stem.exists():
        return stem
    number = 2
    while (numbered := stem.with_name(f"{stem.name}-{number}")).exists():
        number += 1
    return numbered

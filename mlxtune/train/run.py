"""One run from configuration to adapter: what `mlxtune train` and the demo do."""

from __future__ import annotations

import json
import shlex
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlxtune_convert.files import explained, new_file

from mlxtune.adapter import adapter_files, attach
from mlxtune.compute import fast_ways
from mlxtune.config.paths import paths_read, with_absolute_paths
from mlxtune.config.resolve import Config
from mlxtune.machine import backend, surroundings
from mlxtune.train import events, loggers, loop, provenance
from mlxtune.train.checkpoint import Saved, State
from mlxtune.train.data_facts import data_facts
from mlxtune.train.evaluation import suite_of
from mlxtune.train.events import Events, Listener, nobody
from mlxtune.train.lock import UNLOCKED
from mlxtune.train.preference import setup
from mlxtune.train.preference.setup import with_preference
from mlxtune.train.preparation import Prepared, prepare
from mlxtune.train.ranks import Ranks
from mlxtune.train.reach import NOTHING, LocalOnly
from mlxtune.train.run_data import read_data
from mlxtune.train.run_folder import RunFolder
from mlxtune.train.step import Job

SPARE_DISK = 1 << 30  # bytes that should stay free beside what a run writes


def tune(
    config: Config,
    out: Path,
    listener: Listener = nobody,
    resume: bool = False,
    anyway: bool = False,
    local: LocalOnly = NOTHING,
    force: bool = False,
) -> State:
    """Train and leave the adapter in `out`.

    listener: called with all that happens, as `events` lists it. resume: go on from the newest checkpoint in `out`;
    anyway: though keys that may change did. local: for what the hub is not asked. force: a run that `out` holds
    is replaced when the new one begins. Raises UserError for anything wrong with the configuration, data or model,
    Interrupted after a signal. A run that ends before anything was saved leaves no folder.
    """
    ranks = Ranks.here()
    with ExitStack() as stack:
        stack.enter_context(ranks.explained(out))
        config = _config_of_first(with_absolute_paths(config), ranks)
        return _Run(config, RunFolder(out), listener, ranks, resume, anyway, force, stack).train(local)


def _config_of_first(config: Config, ranks: Ranks) -> Config:
    """Rank 0's configuration, on every rank: the others may be on machines that have no run folder."""
    return Config.model_validate_json(ranks.broadcast_text(config.model_dump_json()))


class _Run:
    """What one process does for a run, the loop apart. Rank 0 alone has the folder."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        listener: Listener,
        ranks: Ranks,
        resume: bool,
        anyway: bool,
        force: bool,
        stack: ExitStack,
    ) -> None:
        self.config = config  # as asked for, later with the day, then made to fit the memory
        self.folder = folder
        self.listener = listener
        self.ranks = ranks
        self.resume = resume  # go on from the newest checkpoint
        self.anyway = anyway  # though keys that may change did
        self.force = force  # a run that is there already is replaced
        self.stack = stack  # what ends with the run
        self.notes: list[str] = []  # what a person must know; said when the run has begun
        self.data_facts: dict[str, Any] = {}  # what `begin` notes of the rows
        self.began = time.perf_counter()  # when the preparation began, in seconds

    def train(self, local: LocalOnly) -> State:
        """The story: look, read, prepare, agree, begin. local: for what the hub is not asked."""
        loggers.require(self.config.train.loggers)
        suite_of(self.config)  # what is wrong with it is said before the model is read
        if self.config.train.keep_awake == "auto":  # on every machine: one that sleeps stops the others
            self.stack.enter_context(surroundings.kept_awake())
        saved = self._checkpoint() if self.resume and self.ranks.first else None
        if self.ranks.first and not self.resume:
            self.folder.require_free(self.force, paths_read(self.config))
        data, self.config = read_data(self.config, self._tell_reading, local)
        self.stack.callback(backend.wire, 0)  # as MLX begins: what `prepare` wires is wired for training alone
        prepared = prepare(self.config, data, self.folder, self.ranks, self.resume, self.listener)
        self.config = prepared.config
        job = prepared.job
        if job.states is not None:
            self.stack.callback(job.states.store.close)
        if saved is not None:
            self.notes += saved.identity.refuse_other(job.identity, self.folder.path, self.anyway)
        self.notes += prepared.notes
        self._require_same(job)
        saved = self._on_every_rank(saved, job)
        job = with_preference(job, self.config, data.valid, self.folder, self.resume, self.listener)
        if not self.ranks.first:
            return loop.run(job, Events(None), saved)
        self.data_facts = data_facts(data, self.config)
        self.stack.enter_context(explained(self.folder.path))
        if self.resume:
            return self._written(job, saved)
        return self._begun(replace(prepared, job=job))

    def _checkpoint(self) -> Saved:
        """The newest checkpoint of the run that goes on, its folder locked. Raises UserError when there is none."""
        self.folder.config()
        self._lock()
        return self.folder.newest(self.notes.append)

    def _lock(self) -> None:
        if not self.stack.enter_context(self.folder.locked()):
            self.notes.append(UNLOCKED)

    def _tell_reading(self, source: str, rows: int) -> None:
        self.listener({"kind": "reading", "source": source, "rows": rows})

    def _require_same(self, job: Job) -> None:
        """Raise UserError when the ranks do not train the same model on the same rows."""
        identity = job.identity
        self.ranks.require_same(data=identity.train + identity.valid, model=identity.model, MLX=identity.mlx)

    def _on_every_rank(self, saved: Saved | None, job: Job) -> Saved | None:
        """Rank 0's checkpoint: where the run goes on. The others get its tensors later (`loop`)."""
        if not self.resume:
            return None
        state = json.loads(self.ranks.broadcast_text(json.dumps(asdict(saved.state)) if saved else ""))
        return saved or Saved(self.folder.path, State(**state), job.identity)

    def _begun(self, prepared: Prepared) -> State:
        """Train in a new folder, which goes when nothing was saved in it."""
        folder = self.folder
        if self.force:
            folder.remove(paths_read(self.config))
        folder.require_free()  # reading took a while
        folder.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        if folder.has_work():  # since we looked, another run began and ended here
            raise folder.taken()
        try:
            folder.events.unlink(missing_ok=True)  # of a run that was killed before it saved anything
            adapter_files.save_config(folder.path, prepared.job.adapter)
            prepared.changes.save(folder.path)
            return self._written(prepared.job, None)
        except BaseException:
            if not folder.has_work():
                folder.remove_unfinished()
            raise

    def _written(self, job: Job, saved: Saved | None) -> State:
        """Train with everything around it that writes and draws."""
        folder, config = self.folder, self.config
        step = saved.state.step if saved else 0
        with new_file(folder.config_file, force=True) as file:
            file.write(config.to_yaml())
        setup.save(job, config, folder.path)
        log = self.stack.enter_context(closing(Events(folder.path, self.listener)))

        def note(text: str) -> None:
            log.emit("note", text=text)

        opened = loggers.opened(config.train.loggers, folder.path, job.identity.without_places(), step, note)
        log.listen(*self.stack.enter_context(opened))
        self.notes += surroundings.warnings(folder.path, _disk_bytes(job) + SPARE_DISK)
        way = fast_ways.describe(job.way)
        before = _way_before(folder)
        if saved and before not in ("", way):
            self.notes.append(f"up to here the run was computed otherwise ({before}): the last bits may differ")
        seconds = time.perf_counter() - self.began
        log.emit(
            "begin",
            step=step,
            steps=job.plan.steps,
            model=config.model.path,
            computed=way,
            seconds=seconds,
            data=self.data_facts,
            **provenance.of_job(job),
        )
        if saved:
            self.notes.append(f"resumed after step {step}")
            if step >= job.plan.steps:
                self.notes.append(
                    "this run is finished: nothing is left to train. To train it longer: mlxtune train --resume-anyway "
                    f"--out {shlex.quote(str(folder.path))} with --steps or --epochs"
                )
        for text in self.notes:
            note(text)
        log.emit("start", steps=job.plan.steps, eval_every=config.train.eval_every)
        return loop.run(job, log, saved)


def _disk_bytes(job: Job) -> int:
    """What the checkpoints of a run will take: of each the adapter and two moments of it. One more is there while it is
    being written, and the adapter of the run takes no more than another.
    """
    adapter = sum(array.nbytes for array in attach.trained_tensors(job.model).values())
    return (job.section.keep_last + 2) * 3 * adapter


def _way_before(folder: RunFolder) -> str:
    """How the run was computed so far, in words; "": nobody knows."""
    if not folder.events.is_file():
        return ""
    try:
        happened = events.read(folder.path)
    except ValueError:  # somebody changed the file; what is written from now on can be read
        return ""
    for event in reversed(happened):
        if "computed" in event:
            return str(event["computed"])
    return ""

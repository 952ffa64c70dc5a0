"""A run on preferences made ready: its rows against its objective, and the reference before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlxtune_convert.files import digest

from mlxtune.adapter import adapter_files
from mlxtune.config.resolve import Config
from mlxtune.data.dataset.batches import Batch
from mlxtune.data.dataset.examples import Examples
from mlxtune.data.dataset.measured import MeasuredExamples, answer_numbers
from mlxtune.errors import UserError
from mlxtune.model.arrays import to_numpy
from mlxtune.train.events import Listener
from mlxtune.train.preference import reference, reference_file
from mlxtune.train.preference.goal import Forward, OfSplit, Preference, settings_of
from mlxtune.train.preference.known import Known
from mlxtune.train.preference.mismatched import Mismatched
from mlxtune.train.preference.reference_file import Arrays
from mlxtune.train.run_folder import RunFolder
from mlxtune.train.step import Job

# Relative, what two computations of one log-probability may differ by: by the order of their sums in float32, by that
# and by rounding in 16 bits. Another answer's is off by a tenth and more.
ROUNDING = {"float32": 1e-3}
ROUNDING_IN_16_BITS = 0.05


def with_preference(
    job: Job, config: Config, valid: Examples, folder: RunFolder, resume: bool, listener: Listener
) -> Job:
    """The job of a run on preferences; any other as it is. The model must be as `prepare` left it.

    resume: the reference is read from `folder`, by the first process. Raises UserError where that is another run's.
    """
    section = config.preference
    if not section.loss:
        return job
    is_kept = False
    if section.has_reference:
        train, held_out, is_kept = _with_reference(job, config, valid, folder, resume, listener)
    else:
        train = held_out = OfSplit(None)
    rounding = ROUNDING.get(job.identity.config["train.dtype"], ROUNDING_IN_16_BITS)
    preference = Preference(settings_of(section), valid.kind == "pairs", train, held_out, rounding, is_kept)
    return replace(job, preference=preference, evaluation=replace(job.evaluation, preference=preference))


def save(job: Job, config: Config, folder: Path) -> None:
    """Keep the reference of a run, where it has one that is not kept yet, with the run."""
    preference = job.preference
    if preference is None or preference.train.known is None or preference.is_kept:
        return
    belongs = {**_belongs(job), reference_file.BEGAN_FROM: _digest_of_start(config)}
    reference_file.save(folder, reference_file.arrays_of(preference.train, preference.valid), belongs)


def _with_reference(
    job: Job, config: Config, valid: Examples, folder: RunFolder, resume: bool, listener: Listener
) -> tuple[OfSplit, OfSplit, bool]:
    """(The training rows and the held-out ones with the values that the run asks for, whether its folder has all of
    them already).
    """
    with_baseline = config.preference.loss == "kto"
    train = _split(job.plan.examples, config.train.seed, with_baseline)
    held_out = _split(valid, config.train.seed, with_baseline)
    forward = reference.forward_of(job.model, job.way)
    of_training = reference.forward_of(job.model, job.way, job.states)
    kept: Arrays = {}
    if resume:
        train, held_out, began_from = _kept(job, train, held_out, folder.path)
        kept = reference_file.arrays_of(train, held_out)
        begins = _Beginning(job, config, began_from)
        forward, of_training = _after(begins, forward), _after(begins, of_training)
    train = reference.of_training(train, job.plan, job.way.prefix, of_training, forward, job.ranks, listener)
    held_out = reference.of_held_out(held_out, job.evaluation.batches, forward, job.ranks, listener)
    found = reference_file.arrays_of(train, held_out)
    is_kept = resume and all(np.array_equal(kept[name], values) for name, values in found.items())
    return train, held_out, is_kept


def _split(examples: MeasuredExamples, seed: int, with_baseline: bool) -> OfSplit:
    """The answers of a split, of which nothing is known yet."""
    known = Known.nothing(answer_numbers(examples, np.arange(len(examples))))
    if not with_baseline:
        return OfSplit(known)
    mismatched = Mismatched(examples, seed)
    return OfSplit(known, mismatched, Known.nothing(np.arange(len(mismatched))))


def _kept(job: Job, train: OfSplit, valid: OfSplit, folder: Path) -> tuple[OfSplit, OfSplit, str]:
    """(The two splits with what the run's folder holds of them, the digest of the adapter that it began from)."""
    arrays: Arrays = reference_file.arrays_of(train, valid)
    began_from = ""
    if job.ranks.first:
        arrays, kept = reference_file.read(folder, arrays, _belongs(job))
        began_from = kept.get(reference_file.BEGAN_FROM, "")
    shared = job.ranks.broadcast_tree({name: mx.array(values) for name, values in arrays.items()})
    arrays = {name: to_numpy(array) for name, array in shared.items()}
    train = reference_file.with_arrays(train, "train", arrays)
    valid = reference_file.with_arrays(valid, "valid", arrays)
    return train, valid, job.ranks.broadcast_text(began_from)


def _belongs(job: Job) -> dict[str, str]:
    """What a reference is of, beside the adapter that the run began from."""
    identity = job.identity
    digests = {"the training examples": identity.train, "the held-out examples": identity.valid}
    return {**digests, "the base model": identity.model, "train.dtype": identity.config["train.dtype"]}


def _digest_of_start(config: Config) -> str:
    """Of the adapter that the run begins from; "": of none."""
    if not config.lora.start_from:
        return ""
    file = adapter_files.adapter_file(Path(config.lora.start_from))
    if file is None:
        raise UserError(
            f"{config.lora.start_from} (lora.start_from) has no adapter any more",
            "The reference of the steps to come is computed from it: put it back.",
        )
    return digest(file)


class _Beginning:
    """Brings the model of a run that goes on to step 0, once, where more of the reference is asked for than the run
    asked for before. Its checkpoint is loaded later.
    """

    def __init__(self, job: Job, config: Config, began_from: str) -> None:
        """began_from: digest of the adapter that the run began from; "": a fresh one, which is what is attached."""
        self._job, self._config, self._began_from = job, config, began_from
        self._done = False

    def __call__(self) -> None:
        if self._done:
            return
        self._done = True
        if not self._began_from:
            return
        if _digest_of_start(self._config) != self._began_from:
            raise UserError(
                f"{self._config.lora.start_from} (lora.start_from) changed since the run began",
                "The reference of the steps to come is computed from it: put the adapter of that time back.",
            )
        adapter_files.load_tensors(self._job.model, Path(self._config.lora.start_from) / self._job.adapter.file)


def _after(begins: Callable[[], None], forward: Forward) -> Forward:
    """The same forward pass, behind what brings the model to step 0."""

    def run(batch: Batch) -> np.ndarray:
        """[K] float32, nats."""
        begins()
        return forward(batch)

    return run

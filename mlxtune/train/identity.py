"""What makes a run that run: its configuration, examples and base model. Every checkpoint carries it, so that a run is
not resumed as another one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlxtune_convert.files import digest as digest_of
from mlxtune_convert.files import matching
from mlxtune_convert.hf.chat_templates import MORE
from mlxtune_convert.tensors import read_header, weight_files

from mlxtune.config.preference import is_kept_by_check
from mlxtune.config.resolve import Config
from mlxtune.errors import UserError
from mlxtune.machine import backend

# What `--resume-anyway` lets change: how long, how often looked at, what is kept; never what a step computes.
MAY_CHANGE = (
    *("train.steps", "train.epochs", "train.patience", "train.eval_every", "train.sample_prompts", "train.save_every"),
    *("train.save_minutes", "train.keep_last", "train.on_nonfinite", "train.on_oom", "train.memory_limit"),
    "train.trunk_cache",
    *("train.loggers", "train.report", "train.keep_awake", "train.rank_minutes"),
)
# Places: what lies there is compared instead.
MAY_MOVE = ("model.path", "data.path", "data.cache", "lora.start_from")
PLACES = (*MAY_MOVE, "data.template", "train.sample_prompts")  # the keys that may hold a path
ANSWERING = (".json", ".jinja", ".model", ".txt", ".tiktoken")  # ends of the files that answers depend on
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each weight file; a byte that differs elsewhere differs unseen
# Fields of an Identity that must not change, and what they are called in messages.
FIXED = {"train": "the training examples", "valid": "the held-out examples", "model": "the base model"}


@dataclass(frozen=True)
class Identity:
    """What makes a run that run."""

    config: dict[str, Any]  # section.key -> value, as resolved
    train: str  # digest of the training examples
    valid: str  # digest of the held-out examples
    model: str  # digest of the base model (`of_model`)
    mlx: str  # MLX's version and device
    blas: str = ""  # as `backend.multiplies`; "" also in checkpoints of versions that did not note it
    # How rows are put together (`Plan.dealt`); "" also in checkpoints of versions that knew lengths alone.
    dealt: str = ""
    # Digest of the suite whose check chooses the adapter (train.keep_by); "" where the loss does, and also in
    # checkpoints of versions that did not note it.
    suite: str = ""

    @classmethod
    def of(
        cls, config: Config, dtype: str, train: str, valid: str, model: Path, dealt: str, suite: str = ""
    ) -> Identity:
        """dtype: of the activations, on this device; train, valid: digests; model: its folder; dealt: `Plan.dealt`;
        suite: the digest of the one that train.sample_prompts names, "" for none.
        """
        flat = _flat(config)
        flat["train.dtype"] = dtype
        for source in flat["data.sources"] or ():
            del source["path"]  # as in MAY_MOVE
        mlx = f"{version('mlx')} on {backend.kind()}"
        chooses = suite if is_kept_by_check(config) else ""
        return cls(flat, train, valid, of_model(model), mlx, backend.multiplies(), dealt, chooses)

    @classmethod
    def of_saved(cls, saved: dict[str, Any]) -> Identity:
        """As a checkpoint holds it. Raises TypeError for what is none."""
        found = cls(**saved)
        texts = (found.train, found.valid, found.model, found.mlx, found.blas, found.dealt, found.suite)
        if not isinstance(found.config, dict) or not all(isinstance(text, str) for text in texts):
            raise TypeError("no identity of a run")
        return found

    def without_places(self) -> dict[str, Any]:
        """The configuration as others may see it: of a path only its last name, of a hub id all."""
        return {key: _last_name(value) if key in PLACES else value for key, value in self.config.items()}

    def refuse_other(self, now: Identity, run: Path, anyway: bool) -> list[str]:
        """Notes on what changed without harm. Raises UserError listing everything that must not change; or that may,
        unless `anyway`.
        """
        changed = self._changed_settings(now)
        may_change = set(MAY_CHANGE)
        if now.suite and self.suite != now.suite:
            may_change.discard("train.sample_prompts")
        fixed = [text for key, text in changed.items() if key not in (*may_change, *MAY_MOVE)]
        for name, what in FIXED.items():
            if getattr(self, name) != getattr(now, name):
                fixed.append(f"{what} (not what the run began with)")
        if self.suite and now.suite and self.suite != now.suite:
            # What another suite gave is not to be compared with: the best of both would be the best of neither.
            fixed.append("the suite that chooses the adapter (not what the run began with)")
        if fixed:
            raise UserError(
                f"{run} cannot be resumed, for this changed: {'; '.join(fixed)}",
                "Put it back; or begin a new run from this one's adapter: --set lora.start_from=RUN.",
            )
        if self.dealt != now.dealt:
            raise UserError(
                f"{run} cannot be resumed: the version of mlxtune that began it put rows together otherwise "
                f"({self.dealt or 'by length alone'}), so that steps to come would hold rows that it has trained on",
                "Go on with that version; or begin a new run from this one's adapter: --set lora.start_from=RUN.",
            )
        allowed = [text for key, text in changed.items() if key in may_change]
        if allowed and not anyway:
            raise UserError(
                f"{run}: this changed since the last checkpoint: {'; '.join(allowed)}",
                "Put it back, or add --resume-anyway.",
            )
        notes = [f"changed since the last checkpoint: {text}" for text in allowed]
        return notes + self._other_arithmetic(now)

    def _changed_settings(self, now: Identity) -> dict[str, str]:
        """Each key whose value differs, and its two values in words."""
        # A key that was not there yet when the run began had no other effect than its default.
        began = {**_flat(Config()), **self.config}
        changed = {}
        for key in {**began, **now.config}:
            old, new = began.get(key), now.config.get(key)
            if old != new:
                changed[key] = f"{key} {_short(old)} -> {_short(new)}"
        return changed

    def _other_arithmetic(self, now: Identity) -> list[str]:
        """Notes on what may round otherwise than at the beginning: MLX, its device, what it multiplies with."""
        notes = []
        if self.mlx != now.mlx:
            notes.append(f"the run began with MLX {self.mlx}, this is {now.mlx}: the last bits may differ")
        if self.blas and now.blas and self.blas != now.blas:
            notes.append(f"the run began with {self.blas}, this is {now.blas}: the last bits may differ")
        return notes


def of_model(folder: Path) -> str:
    """A digest of a model folder: config.json, and of each weight file its header and 64 samples of 4 KiB. Reading
    every byte of a large model would take longer than loading it.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        digest.update(json.dumps([file.name, read_header(file)], sort_keys=True).encode())
        last = max(0, file.stat().st_size - SAMPLE_BYTES)  # where the last sample begins
        with file.open("rb") as opened:
            for sample in range(SAMPLES):
                opened.seek(last * sample // (SAMPLES - 1))
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def of_answering(folder: Path) -> str:
    """A digest of all that decides what a model folder answers: `of_model`, and the small files beside the weights.
    These hold the tokenizer, chat templates and the tokens that end an answer; which are read, transformers decides.
    """
    digest = hashlib.sha256(of_model(folder).encode())
    names = [*matching(folder, "*"), *matching(folder / MORE, "*.jinja")]
    for file in sorted(names):
        if file.suffix in ANSWERING and file.is_file():
            digest.update(json.dumps([str(file.relative_to(folder)), digest_of(file)]).encode())
    return digest.hexdigest()


def _flat(config: Config) -> dict[str, Any]:
    """section.key -> value."""
    flat = {}
    for section, keys in json.loads(config.model_dump_json()).items():
        for key, value in keys.items():
            flat[f"{section}.{key}"] = value
    return flat


def _last_name(value: Any) -> Any:
    """Of an absolute path its last part; anything else as it is."""
    if isinstance(value, str) and Path(value).expanduser().is_absolute():
        return Path(value).name
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."

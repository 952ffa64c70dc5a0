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

from mlxtune_convert.tensors import read_header, weight_files

from mlxtune.config.resolve import Config
from mlxtune.errors import UserError
from mlxtune.machine import backend

# What `--resume-anyway` lets change: how long, how often looked at, what is kept; never what a step computes.
MAY_CHANGE = (
    *("train.steps", "train.epochs", "train.patience", "train.eval_every", "train.sample_prompts", "train.save_every"),
    *("train.save_minutes", "train.keep_last", "train.on_nonfinite", "train.on_oom", "train.memory_limit"),
    *("train.loggers", "train.keep_awake", "train.rank_minutes"),
)
# Places: what lies there is compared instead.
MAY_MOVE = ("model.path", "data.path", "data.cache", "lora.start_from")
PLACES = (*MAY_MOVE, "data.template")  # the keys that may hold a path
SAMPLES, SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class Identity:
    """config: key -> value, as resolved; train, valid: digests of the examples; model: `of_model`; mlx: its version and
    device; blas: `backend.multiplies`, "" also in checkpoints of versions that did not note it.
    """

    config: dict[str, Any]
    train: str
    valid: str
    model: str
    mlx: str
    blas: str = ""

    @classmethod
    def of(cls, config: Config, dtype: str, train: str, valid: str, model: Path) -> Identity:
        """dtype: of the activations, on this device."""
        flat = _flat(config)
        flat["train.dtype"] = dtype
        for source in flat["data.sources"] or ():
            del source["path"]  # as in MAY_MOVE
        mlx = f"{version('mlx')} on {backend.kind()}"
        return cls(flat, train, valid, of_model(model), mlx, backend.multiplies())

    @classmethod
    def of_saved(cls, saved: dict[str, Any]) -> Identity:
        """As a checkpoint holds it. Raises TypeError for what is none."""
        found = cls(**saved)
        texts = (found.train, found.valid, found.model, found.mlx, found.blas)
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
        began = {**_flat(Config()), **self.config}  # a key that was not there yet had no other effect than its default
        keys = [key for key in {**began, **now.config} if began.get(key) != now.config.get(key)]
        shown = {key: f"{key} {_short(began.get(key))} -> {_short(now.config.get(key))}" for key in keys}
        allowed = [key for key in keys if key in MAY_CHANGE]
        fixed = [shown[key] for key in keys if key not in (*MAY_CHANGE, *MAY_MOVE)]
        for part, what in (
            ("train", "the training examples"),
            ("valid", "the held-out examples"),
            ("model", "the base model"),
        ):
            if getattr(self, part) != getattr(now, part):
                fixed.append(f"{what} (not what the run began with)")
        if fixed:
            raise UserError(
                f"{run} cannot be resumed, for this changed: {'; '.join(fixed)}",
                "Put it back; or begin a new run from this one's adapter: --set lora.start_from=RUN.",
            )
        if allowed and not anyway:
            raise UserError(
                f"{run}: this changed since the last checkpoint: {'; '.join(shown[key] for key in allowed)}",
                "Put it back, or add --resume-anyway.",
            )
        notes = [f"changed since the last checkpoint: {shown[key]}" for key in allowed]
        if self.mlx != now.mlx:
            notes.append(f"the run began with MLX {self.mlx}, this is {now.mlx}: the last bits may differ")
        if self.blas and now.blas and self.blas != now.blas:
            notes.append(f"the run began with {self.blas}, this is {now.blas}: the last bits may differ")
        return notes


def of_model(folder: Path) -> str:
    """A digest of a model folder: config.json, and of each weight file its header and 64 samples of 4 KiB. Reading
    every byte of a large model would take longer than loading it.
    """
    found = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        found.update(json.dumps([file.name, read_header(file)], sort_keys=True).encode())
        size = file.stat().st_size
        with file.open("rb") as opened:
            for sample in range(SAMPLES):
                opened.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                found.update(opened.read(SAMPLE_BYTES))
    return found.hexdigest()


def _flat(config: Config) -> dict[str, Any]:
    """section.key -> value."""
    sections = json.loads(config.model_dump_json())
    return {f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()}


def _last_name(value: Any) -> Any:
    is_path = isinstance(value, str) and Path(value).expanduser().is_absolute()
    return Path(value).name if is_path else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."

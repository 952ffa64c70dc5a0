"""RUN/reference.safetensors: the reference of a run, kept with it, so that a run that goes on has the same bits.

train, valid                          [A] float32: the log-probability of each answer in nats; 1: no step takes it
train_mismatched, valid_mismatched    kto's, [R] float32
facts                                 JSON as bytes: what it all belongs to, and a digest of the other tensors
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlxtune_convert.tensors import read_header

from mlxtune.errors import UserError
from mlxtune.model.arrays import save_arrays, to_numpy
from mlxtune.train.preference.goal import OfSplit
from mlxtune.train.preference.known import UNKNOWN
from mlxtune.train.run_folder import REFERENCE_FILE

FACTS = "facts"
BEGAN_FROM = "lora.start_from"  # among the facts: digest of the adapter that the run began from; "": of none
REMEDY = "Put the run's own file back; or begin a new run from this one's adapter: --set lora.start_from=RUN."

Arrays = dict[str, np.ndarray]


def arrays_of(train: OfSplit, valid: OfSplit) -> Arrays:
    """The values of both splits by their names in the file."""
    found: Arrays = {}
    for name, split in (("train", train), ("valid", valid)):
        if split.known is not None:
            found[name] = split.known.values
        if split.known_mismatched is not None:
            found[f"{name}_mismatched"] = split.known_mismatched.values
    return found


def with_arrays(split: OfSplit, name: str, arrays: Arrays) -> OfSplit:
    """The split with its values out of a file. name: train or valid."""
    assert split.known is not None
    split = replace(split, known=replace(split.known, values=arrays[name]))
    if split.known_mismatched is None:
        return split
    mismatched = replace(split.known_mismatched, values=arrays[f"{name}_mismatched"])
    return replace(split, known_mismatched=mismatched)


def save(folder: Path, arrays: Arrays, belongs: dict[str, str]) -> None:
    """belongs: what the values are of: digests by name."""
    facts = json.dumps({"belongs": belongs, "sha256": _digest(arrays)}).encode()
    tensors = {name: mx.array(values) for name, values in arrays.items()}
    save_arrays(folder / REFERENCE_FILE, {**tensors, FACTS: mx.array(np.frombuffer(facts, np.uint8))})


def read(folder: Path, expected: Arrays, belongs: dict[str, str]) -> tuple[Arrays, dict[str, str]]:
    """(The values that `save` kept, what they belong to). expected: of the same names and shapes; belongs: digests that
    must be the same.

    Raises UserError for a file that is gone, damaged, or another run's.
    """
    file = folder / REFERENCE_FILE
    if not file.is_file():
        raise UserError(f"{folder} has no {REFERENCE_FILE}: the reference that its steps were taken against", REMEDY)
    try:
        header = read_header(file)
    except UserError as error:  # its hint is for files that somebody copied
        raise UserError(error.message, REMEDY) from error
    shapes = {name: list(values.shape) for name, values in expected.items()}
    if FACTS not in header or {name: list(header[name]["shape"]) for name in header if name != FACTS} != shapes:
        raise UserError(f"{file} is not of this run's rows", REMEDY)
    tensors: Any = mx.load(str(file))
    arrays = {name: np.array(to_numpy(tensors[name]), np.float32) for name in expected}
    try:
        facts = json.loads(to_numpy(tensors[FACTS]).tobytes())
        kept, whole = dict(facts["belongs"]), facts["sha256"] == _digest(arrays)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged", REMEDY) from error
    if not whole or any(not np.isfinite(values).all() or (values > UNKNOWN).any() for values in arrays.values()):
        raise UserError(f"{file} is damaged: its numbers are not those that were written", REMEDY)
    other = [name for name, value in belongs.items() if kept.get(name) != value]
    if other:
        raise UserError(f"{file} is the reference of another run: {', '.join(other)} differ", REMEDY)
    return arrays, kept


def began_from(folder: Path) -> str | None:
    """The digest of the adapter that the run of a folder began from; "": it began from none; None: its reference is not
    there to say it, or cannot be read.
    """
    file = folder / REFERENCE_FILE
    try:
        if FACTS not in read_header(file):
            return None
        tensors: Any = mx.load(str(file))
        found = json.loads(to_numpy(tensors[FACTS]).tobytes())["belongs"][BEGAN_FROM]
    except (UserError, RuntimeError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        digest.update(name.encode() + values.astype(np.float32).tobytes())
    return digest.hexdigest()

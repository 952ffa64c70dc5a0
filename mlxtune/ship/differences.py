"""Why a proof failed, in a sentence: made only then.

An export can differ from the trained model in its numbers (a tensor that is not the merged one, a type too small for
it), in its settings (config.json), or because the program that runs it computes another model from the same files. Each
is looked at by itself, so that what is said is true of this export: tensor by tensor, key by key, and part by part of a
forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlxtune_convert.files import read_json
from mlxtune_convert.hf import mtp
from mlxtune_convert.tensors import weight_files

from mlxtune.adapter import attach
from mlxtune.errors import UserError
from mlxtune.model.arrays import to_numpy
from mlxtune.model.load import load
from mlxtune.ship import llama_cpp, states, verify
from mlxtune.ship.runners import MlxRunner, Runner, TorchRunner, transformers_version
from mlxtune.ship.states import Parting
from mlxtune.ship.verify import Reference

# From which share of a part's largest value on two runs differ: rounding of the weights alone, with a margin.
LEAST = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
# Of a tensor's largest value: sums in another order, and the last bit of what they are stored in.
ROUNDING = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}
LARGEST = {"float16": 65504.0}
MOST_TOKENS = 512  # of the row that is looked at: what all parts of a 7B model give on it is some 2 GB on each side
BUG = "This is a bug in mlxtune; please report it with this line."
# Keys of config.json that say nothing of what is computed, or follow what was trained.
IDLE = (
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"),
    *("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "quantization", "quantization_config"),
    *(*mtp.COUNTS, mtp.SWITCH, "transformers_weights"),
)


@dataclass(frozen=True)
class Wanted:
    """What a model folder should hold."""

    # (name, array) of the merged tensors under the folder's names, in a type; made anew at each call.
    tensors: Callable[[mx.Dtype], Iterator[tuple[str, np.ndarray]]]
    # (name, array) of the same in float32, under MLX's names; made anew at each call.
    merged: Callable[[], Iterator[tuple[str, mx.array]]]
    config: dict[str, Any]  # its config.json
    too_small: str  # what to do where the type is too small for the numbers, as a sentence


@dataclass(frozen=True)
class Trained:
    """The trained model."""

    model: str  # its folder or hub id
    adapter: Path | None  # None: the base alone
    ref: Reference  # what it computed

    @property
    def row(self) -> np.ndarray:
        """The longest row that was compared, [T] token ids: a window or a rule for long rows shows there."""
        batch = max(self.ref.batches, key=lambda batch: int(batch.lengths[0]))
        ids: np.ndarray = batch.ids[0, : int(batch.lengths[0]) - 1]
        return ids[:MOST_TOKENS]

    def states(self) -> states.States:
        """What its parts give on that row."""
        return states.of_mlx(verify.trained_model(self.model, self.adapter).model, self.row)


def found_out(why: Callable[[], str]) -> str:
    """What `why` finds out. Whatever it raises must not hide that the proof failed."""
    try:
        return why()
    except Exception as error:
        return f"What differs could not be found out ({type(error).__name__}: {error})."


def of_folder(folder: Path, wanted: Wanted | None, trained: Trained, run: Runner, storage: str) -> str:
    """Why a model folder is not the trained model. wanted: None for quantized tensors, of which only torn numbers are
    looked for; run: who ran it; storage: the type of its tensors.

    One after the other is ruled out: other numbers in the files, other settings, another program, rounding. What is
    left is a merge that does something else than the adapter, which would be our bug.
    """
    if wanted is None:
        return _torn(folder) or f"Its codes of {storage} lost it."
    wrong = _wrong_tensors(folder, wanted, storage) or _wrong_settings(folder, wanted.config)
    if wrong:
        return _with_place(wrong, trained, run, storage)
    own = MlxRunner(load(str(folder), "float32").model)
    if _passes(own, trained, storage):
        ours, theirs = states.of_mlx(own.model, trained.row), _states(run, trained)
        return _two_programs(ours, theirs, "these same files")
    own.model.load_weights(list(wanted.merged()), strict=False)  # as before they were rounded
    if _passes(own, trained, "float32"):
        return f"Rounding the merged weights to {storage} does this, and nothing else. {wanted.too_small}"
    parting = states.parting(trained.states(), states.of_mlx(own.model, trained.row), LEAST["float32"])
    what = "Merged, the adapter does" if trained.adapter else "Taken out, the weights do"
    return f"{what} something else than in the trained model{_where(parting)}. {BUG}"


def _with_place(wrong: str, trained: Trained, run: Runner, storage: str) -> str:
    """The sentence `wrong`, with the part of the model at which it first shows."""
    sentence = f"{wrong[0].upper()}{wrong[1:]}"
    parting = states.parting(trained.states(), _states(run, trained), LEAST[storage])
    if parting is None or not np.isfinite(parting.size):  # no place, but no number at all
        return f"{sentence}."
    return f"{sentence}; computed with it, {parting}."


def _passes(run: Runner, trained: Trained, storage: str) -> bool:
    return verify.measure(trained.ref, run, "MLX", storage).verdict != "failed"


def of_peft(trained: Trained, run: TorchRunner, check: Callable[[], object]) -> str:
    """Why a PEFT adapter on the dense base is not the trained model. check: raises UserError where the adapter's
    tensors are not the run's.
    """
    try:
        check()
    except UserError as error:
        return f"Its tensors are not the run's ({error.message})."
    model = verify.trained_model(trained.model, trained.adapter).model
    blocks = len(model.layers)
    with attach.switched_off(model), run.model.disable_adapter():
        ours, theirs = states.of_mlx(model, trained.row), states.of_torch(run.model, trained.row, blocks)
    if states.parting(ours, theirs, LEAST["float32"]):
        return _two_programs(ours, theirs, "the base's weights alone")
    ours, theirs = states.of_mlx(model, trained.row), states.of_torch(run.model, trained.row, blocks)
    parting = states.parting(ours, theirs, LEAST["float32"])
    return f"The base is the same in both; PEFT does something else with the adapter{_where(parting)}. {BUG}"


def of_gguf(kind: str, back: Callable[[], object], trained: Trained, run: llama_cpp.Runner) -> str:
    """Why a GGUF file, or an adapter on one, is not the trained model for llama.cpp, which shows no more of itself than
    logits. kind: as --type; back: raises UserError where the file is not what was to be written.
    """
    try:
        back()
    except UserError as error:
        return f"{error.message}. {error.hint}"
    if kind != "f32":
        return (
            f"The file holds exactly what --type {kind} makes of the weights: either its rounding does this, or "
            "llama.cpp computes another model. --type f32, which does not round, tells which."
        )
    model = verify.trained_model(trained.model, trained.adapter).model
    ours = to_numpy(model(mx.array(trained.row[None]))[0])  # [T, V]
    theirs = run.logits(trained.row)[:, : ours.shape[-1]]  # its vocabulary may have more rows
    parting = states.parting({states.LOGITS: ours}, {states.LOGITS: theirs}, LEAST["float32"])
    since = f"; its logits differ{parting.since or ' everywhere'}" if parting else ""
    return f"The file holds the weights bit for bit: llama.cpp computes another model from them{since}."


def _where(parting: Parting | None) -> str:
    return f": {parting}" if parting else ", a little more in every block"


def _two_programs(ours: states.States, theirs: states.States, what: str) -> str:
    """That mlx-lm and transformers part, and where. what: of which both compute."""
    parting = states.parting(ours, theirs, LEAST["float32"])
    return (
        f"mlx-lm and transformers {transformers_version()} compute other models from {what}{_where(parting)}. "
        "In MLX it is the trained one."
    )


def _states(run: Runner, trained: Trained) -> states.States:
    """What the parts of an artefact give on the row that is looked at."""
    if isinstance(run, MlxRunner):
        return states.of_mlx(run.model, trained.row)
    assert isinstance(run, TorchRunner)
    count = len(load(trained.model, "own").model.layers)
    return states.of_torch(run.model, trained.row, count)


def _stored(folder: Path) -> dict[str, mx.array]:
    """The tensors of a folder by name; none is read before it is used."""
    found: dict[str, mx.array] = {}
    for file in weight_files(folder):
        found |= mx.load(str(file))  # type: ignore[arg-type]
    return found


def _torn(folder: Path) -> str:
    """How many tensors hold numbers that are none; "" when there are none."""
    torn = []
    for name, array in sorted(_stored(folder).items()):
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            torn.append(name)
    return f"{_count(torn)} numbers that are infinite or none, first {torn[0]}." if torn else ""


def _count(names: Collection[str]) -> str:
    return f"{len(names)} tensors hold" if len(names) > 1 else "1 tensor holds"


def _wrong_tensors(folder: Path, wanted: Wanted, storage: str) -> str:
    """What is wrong with the tensors of a folder; "" when they are the merged ones in its type."""
    stored = _stored(folder)
    rounded, exact = wanted.tensors(getattr(mx, storage)), wanted.tensors(mx.float32)
    missing: list[str] = []
    large: dict[str, float] = {}  # name -> its largest number
    changed: dict[str, float] = {}  # name -> largest difference, of its largest number
    count = 0
    for (name, expected), (_, unrounded) in zip(rounded, exact, strict=True):
        count += 1
        if name not in stored or stored[name].shape != expected.shape:
            missing.append(name)
            continue
        highest = float(np.abs(unrounded.astype(np.float32)).max())
        off = _largest_difference(expected, stored.pop(name))
        if highest > LARGEST.get(storage, np.inf):
            large[name] = highest
        elif off > ROUNDING[storage]:
            changed[name] = off
    if missing:
        return f"{len(missing)} of {count} tensors are missing or have another shape, first {min(missing)}"
    if large:
        name = min(large)
        return (
            f"{storage} ends at {LARGEST[storage]:,.0f}, and {_count(large)} larger numbers, first {name} "
            f"({large[name]:,.0f}). {wanted.too_small.removesuffix('.')}"
        )
    if changed:
        name = min(changed)
        what = "are not the merged ones" if len(changed) > 1 else "is not the merged one"
        most = ": of another run, or merged into another base" if len(changed) > count // 2 else ""
        off_by = f"off by {changed[name]:.2g} of its largest value"
        return f"{len(changed)} of its {count} tensors {what}{most}, first {name} ({off_by})"
    return ""


def _largest_difference(expected: np.ndarray, stored: mx.array) -> float:
    """The largest difference of two tensors of one shape, as a share of the largest number of the first."""
    one = expected.astype(np.float32).reshape(1, -1)
    other = to_numpy(stored.astype(mx.float32)).reshape(1, -1)
    return float(states.tokenwise(one, other)[0])


def _wrong_settings(folder: Path, config: dict[str, Any]) -> str:
    """What config.json says of the computation that it should not say; "" when nothing."""
    found = _flat(read_json(folder / "config.json", "a model folder"))
    expected = _flat(config)
    differing = []
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            there, wanted = found.get(key, "left out"), expected.get(key, "left out")
            differing.append(f"{key} {there} in place of {wanted}")
    return f"its config.json has {', '.join(differing[:3])}" if differing else ""


def _flat(config: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Settings by dotted names (rope_parameters.rope_theta), without those that say nothing of what is computed.
    before: the beginning of their names.
    """
    out: dict[str, Any] = {}
    for key, value in config.items():
        if key in IDLE:
            continue
        if isinstance(value, dict):
            out |= _flat(value, f"{before}{key}.")
        else:
            out[f"{before}{key}"] = value
    return out

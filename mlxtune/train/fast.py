"""Which way a run computes its loss: the fast ones, each proven on the user's own model before it is used.

The proof compares loss and gradients with the plain way on real rows. A fresh adapter has B = 0, where every gradient
of A is zero and half of a proof cannot fail: the trainable tensors are moved by a seeded 1e-3 first, and put back bit
for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlxtune import backend
from mlxtune.config import Config, TrainSection
from mlxtune.data.batches import MIN_GROUP_TOKENS, Batch, collate, common, groups
from mlxtune.data.chat import Example
from mlxtune.errors import UserError
from mlxtune.model import exponentials, prefix
from mlxtune.model.arrays import named, scalar, to_numpy
from mlxtune.model.head import Split
from mlxtune.train.gradients import Gradients
from mlxtune.train.loss import Path

NUDGE = 1e-3
MAX_TOKENS = 1024  # of each of the proof's two rows
PROOF_SHARE = 0.06  # of the memory, for the plain way's logits: about three float32 copies of them are alive
# (loss, gradient) differences allowed, relative. A wrong mask shows as 0.1 and more in a gradient.
TOLERANCES = {mx.float32: (1e-5, 1e-3)}
HALF = (1e-2, 0.1)


@dataclass(frozen=True)
class Difference:
    """Of two ways to compute one loss: relative, of the loss and of the gradient that differs most."""

    loss: float
    gradient: float
    name: str = ""

    def within(self, dtype: mx.Dtype) -> bool:
        of_loss, of_gradient = TOLERANCES.get(dtype, HALF)
        return self.loss <= of_loss and self.gradient <= of_gradient


def choose(
    model: nn.Module, examples: Sequence[Example], config: Config, dtype: mx.Dtype, tokens: int = MAX_TOKENS
) -> tuple[Path, list[str]]:
    """(the fastest proven way, what a person must know about it). The adapter is attached already.

    tokens: of a row, at most, that the memory lets the plain way compute.
    """
    wanted, notes = _wanted(model, examples, config)
    batches = proof_batches(examples, wanted, config.data.group_by_prefix, tokens)
    slower = replace(wanted, powers=False, compiled=False)
    tried = [wanted, replace(wanted, prefix=None), slower, replace(slower, prefix=None)]
    for path in dict.fromkeys([*tried, replace(slower, prefix=None, split=None), Path()]):
        if path == Path():
            break
        try:
            found = [compare(model, path, batches[0])]
            if not found[0].within(dtype):  # a mixture of experts may route a token elsewhere at a near-tie
                found.append(compare(model, path, batches[1]))
        except Exception as error:  # whatever a model's own code raises
            reason = (str(error).splitlines() or [""])[0]
            notes.append(f"not used, for this model fails with it: {describe(path)} ({type(error).__name__}: {reason})")
            continue
        if found[-1].within(dtype):
            return path, notes
        notes.append(
            f"not used, for it does not reproduce this model: {describe(path)} "
            f"(loss off by {found[-1].loss:.1e}, gradient of {found[-1].name} by {found[-1].gradient:.1e})"
        )
    return Path(), notes


def refuse_idle(config: Config) -> None:
    """Raise UserError for an option of the fast ways that could have no effect."""
    reasons = {
        "lora.dropout": config.lora.dropout,
        "train.neftune_alpha": config.train.neftune_alpha,
        "fast.prefix: off": config.fast.prefix == "off",
    }
    idle = next((name for name, given in reasons.items() if given), "")
    if config.data.group_by_prefix and idle:
        raise UserError(
            f"data.group_by_prefix has no effect with {idle}: no shared prefix is computed", "Leave one of them out."
        )


def describe(path: Path) -> str:
    """For people: what a way leaves out."""
    parts = ["the head on supervised tokens only"] if path.split is not None else []
    if path.prefix is not None:
        parts.append(f"the shared prefix of {path.prefix} tokens once" if path.prefix else "what a batch shares once")
    if path.recompute:
        parts.append(
            "every block checkpointed" if path.recompute == 1 else f"one in {path.recompute} blocks checkpointed"
        )
    if path.powers:
        parts.append("exponentials as powers of two")
    if path.compiled:
        parts.append("compiled")
    return ", ".join(parts) or "everything computed"


def _wanted(model: nn.Module, examples: Sequence[Example], config: Config) -> tuple[Path, list[str]]:
    notes = []
    split = None
    trained = False
    ids = mx.array(np.asarray(examples[0].ids[:64])[None])
    if config.fast.head == "auto":
        split = Split.of(model, ids)
        if split is None:
            notes.append("this model's head cannot be run apart from its trunk: logits are computed for every token")
        else:
            trained = split.head_is_trained(model, split.hidden(ids)[0, -1:])
            if trained and config.lora.dropout:
                notes.append("the head is trained with dropout: logits are computed for every token")
                split, trained = None, False
    length, reason = shared_prefix(model, examples, config)
    if reason:
        notes.append(f"no shared prefix: {reason}")
    powers = exponentials.worth_it() and (split is not None or length is not None)
    many_shapes = config.lora.dropout or config.train.neftune_alpha or config.data.group_by_prefix
    compiled = backend.compiles() and split is not None and not many_shapes and prefix.caches(model) is not None
    return Path(split, trained, length, every_nth(config.train), powers, compiled), notes


def every_nth(section: TrainSection) -> int:
    """train.checkpoint_layers as a number; 0: none."""
    every = section.checkpoint_layers
    return every if isinstance(every, int) else {"none": 0, "all": 1}[every]


def shared_prefix(model: nn.Module, examples: Sequence[Example], config: Config) -> tuple[int | None, str]:
    """(tokens that all rows of the run begin with, or None: not to be computed once; why not, if worth saying)."""
    if config.fast.prefix == "off":
        return None, ""
    length = prefix.of_run(examples)
    worth = length >= prefix.WORTH_SAYING
    if not worth and not config.data.group_by_prefix:
        return None, ""
    if config.lora.dropout or config.train.neftune_alpha:
        noise = "lora.dropout" if config.lora.dropout else "train.neftune_alpha"
        return None, f"{length} tokens begin every row, but with {noise} each row must see noise of its own"
    if prefix.caches(model) is None:
        return None, f"{length} tokens begin every row, but some of this model's layers keep more than keys and values"
    return length, ""


def proof_batches(examples: Sequence[Example], path: Path, grouped: bool, tokens: int = MAX_TOKENS) -> list[Batch]:
    """Two batches of two real rows: the longest ones, so that sliding windows are passed where the data passes them, as
    far as the plain way's logits fit the memory. Where rows are grouped, those that share the most.

    tokens: of a row, at most.
    """
    if path.split is not None:
        tokens = min(tokens, max(64, int(PROOF_SHARE * backend.memory_bytes() / (24 * path.split.vocabulary))))
    order = sorted(range(len(examples)), key=lambda row: -len(examples[row].ids))
    shared = path.prefix
    if grouped:
        pairs = [group[:2] for group in groups(examples, MIN_GROUP_TOKENS)]
        together = {tuple(pair): common(examples[pair[0]].ids, examples[pair[1]].ids) for pair in pairs}
        best = max(together, key=together.__getitem__, default=())
        order = [*best, *order]
        shared = together.get(best, shared)
    if shared:
        tokens = min(tokens, prefix.longest_worth_it(shared, rows=2))
    rows = [_cut(examples[index], tokens) for index in (order * 4)[:4]]
    return [collate(rows, [0, 1]), collate(rows, [2, 3])]


def _cut(example: Example, tokens: int) -> Example:
    """The first tokens of a row; its last quarter is supervised when its own targets were cut off."""
    ids, mask = example.ids[:tokens], example.mask[:tokens]
    if not any(mask[1:]):
        mask = [int(place >= len(ids) * 3 // 4) for place in range(len(ids))]
    return Example(ids, mask)


def compare(model: nn.Module, path: Path, batch: Batch) -> Difference:
    """How far `path` is from the plain way on a batch, the adapter moved by a seeded nudge."""
    before = named(model.trainable_parameters())
    moved = {
        name: array + NUDGE * mx.random.normal(array.shape, array.dtype, key=mx.random.key(index))
        for index, (name, array) in enumerate(before.items())
    }
    model.update(tree_unflatten(list(moved.items())))
    try:
        fast, fast_gradients = gradients(model, path, batch)
        plain, plain_gradients = gradients(model, Path(), batch.part(slice(1)))  # row by row, for it takes most memory
        for row in range(1, len(batch.rows)):
            value, more = gradients(model, Path(), batch.part(slice(row, row + 1)))
            plain += value
            plain_gradients = {name: gradient + more[name] for name, gradient in plain_gradients.items()}
    finally:
        model.update(tree_unflatten(list(before.items())))
    worst, name = max((_relative(fast_gradients[name], wanted), name) for name, wanted in plain_gradients.items())
    off = abs(fast - plain) / max(abs(plain), 1e-12)
    return Difference(off if math.isfinite(off) else math.inf, worst, name)


def gradients(model: nn.Module, path: Path, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    """(loss, gradients by name) on one batch."""
    value, tree = Gradients(model, path)(batch)
    return scalar(value), {name: to_numpy(array.astype(mx.float32)) for name, array in named(tree).items()}


def _relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """The norm of the difference over the norm of `wanted`; not finite counts as infinitely far."""
    off = float(np.linalg.norm(got - wanted) / max(float(np.linalg.norm(wanted)), 1e-12))
    return off if math.isfinite(off) else math.inf

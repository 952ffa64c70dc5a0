"""Where two runs of one model part: what its parts give on one row, by MLX and by transformers, in their order.

A part's key: `embeddings` (what enters the first block), `blocks.N.NAME` (a part of a block), `blocks.N` (a block's
result), `beside.NAME` (what stands beside the blocks: the final norm), `logits`. Only keys that both sides have are
compared; most families name their parts alike in both libraries. Legend: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.adapter.plan import block_paths
from mlxtune.model.arrays import to_numpy

EMBEDDINGS, LOGITS, BLOCKS, BESIDE = "embeddings", "logits", "blocks.", "beside."
TINY = 1e-30  # instead of dividing by zero, where all values are 0
JUMP = 10.0  # a difference is a new one where it is so many times the largest before it
ROTARY_TOKENS = 4  # a rotary embedding that differs is seen from the second token on, at the latest from about here
# What the parts of a block are called in most families.
ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mixer", "temporal_block")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "mlp_block")
NORM = ("norm", "norm_f", "ln_f", "final_layernorm", "final_layer_norm", "embedding_norm")

States = dict[str, np.ndarray]  # [T, D] or [T, V], float32


@dataclass(frozen=True)
class Parting:
    """Where two runs part."""

    key: str  # of the first part that differs
    size: float  # its largest difference, as a share of its largest value
    token: int  # the first token at which it differs, from 0
    factor: float | None  # the second's values are the first's times this, where that is all; else None
    agreed: bool  # whether anything before it was compared, and agreed

    def __str__(self) -> str:
        """Such as: they first differ at block 3's attention (0.2 of its largest value), from token 2 on."""
        before = "; all before it agrees" if self.agreed else ""
        return f"they first differ at {label(self.key)} ({self.size:.2g} of its largest value){self.since}{before}"

    @property
    def since(self) -> str:
        """How they differ there, and from which token on; "" when from the first."""
        if self.factor is not None:
            return f", by a factor of {self.factor:.4g}"
        if self.token == 0:
            return ""
        # What differs from a later token on differs by where the tokens are, not by a weight.
        since = f", from token {self.token + 1} on"
        if self.key != LOGITS and _part(self.key) not in ATTENTION:
            return since
        if self.token < ROTARY_TOKENS:
            return f"{since} (the rotary embedding, or the scale of the scores)"
        return f"{since} (a window, or a rotary rule for longer rows)"


def label(key: str) -> str:
    """A part, for people. Blocks are counted from 0, as in the names of tensors."""
    if key == EMBEDDINGS:
        return "the embeddings"
    if key == LOGITS:
        return "the head"
    if key.startswith(BESIDE):
        name = key.removeprefix(BESIDE)
        return "the final norm" if name in NORM else f"{name}, which is in no block"
    number, _, part = key.removeprefix(BLOCKS).partition(".")
    if not part:
        return f"block {number}"
    if part in ATTENTION:
        return f"block {number}'s attention"
    if part in MLP:
        return f"block {number}'s MLP"
    return f"block {number}'s {part}"


def _part(key: str) -> str:
    """The name of a part of a block; "" for a block itself, and for what is in none."""
    if not key.startswith(BLOCKS):
        return ""
    return key.removeprefix(BLOCKS).partition(".")[2]


def parting(one: States, other: States, least: float) -> Parting | None:
    """The first part in which `other` differs from `one`: by more than `least` of its largest value, and JUMP times
    more than any part before it. None: nowhere.
    """
    largest = 0.0  # difference of the parts so far
    agreed = False
    for key, values in one.items():
        if key not in other or other[key].shape != values.shape:
            continue
        off = tokenwise(values, other[key])  # [T]
        size = float(off.max())
        limit = max(least, JUMP * largest)
        if size > limit:
            first_token = int(np.argmax(off > limit))
            return Parting(key, size, first_token, _factor(values, other[key], least), agreed)
        largest = max(largest, size)
        agreed = True
    return None


def tokenwise(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[T] each token's largest difference, as a share of the largest value of `one` [T, D]; infinite where one of them
    is no number.
    """
    with np.errstate(invalid="ignore"):
        difference = np.abs(other.astype(np.float64) - one).max(axis=-1)
        off = difference / max(float(np.abs(one).max()), TINY)
    return np.where(np.isfinite(off), off, np.inf)


def _factor(one: np.ndarray, other: np.ndarray, least: float) -> float | None:
    """f where `other` [T, D] is f times `one` [T, D], to `least` of its largest value; None where it is not."""
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return None
    x = one.astype(np.float64)
    factor = float((x * other).sum() / max(float((x * x).sum()), TINY))  # the best f, by least squares
    if factor == 0 or tokenwise(factor * x, other).max() > least:
        return None
    return factor


def of_mlx(model: nn.Module, ids: np.ndarray) -> States:
    """What the parts of an mlx-lm model give. ids: [T]."""
    seen: dict[str, Any] = {}
    with _called(_watched_of_mlx(model), seen, f"{BLOCKS}0"):
        seen[LOGITS] = model(mx.array(ids[None].astype(np.int32)))
    states: States = {}
    for key, value in seen.items():
        array = _first(value, mx.array)
        if array is not None:
            states[key] = to_numpy(array.astype(mx.float32))
    return _in_rows(states)


def _watched_of_mlx(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of an mlx-lm model, by the keys of their states: blocks, parts of blocks, what stands beside them."""
    modules = dict(model.named_modules())
    blocks = block_paths(model)  # "model.layers.0", ...
    holder = blocks[0].rpartition(".")[0].rpartition(".")[0]  # "model"
    watched = {f"{BLOCKS}{number}": modules[path] for number, path in enumerate(blocks)}
    for number, path in enumerate(blocks):
        for name, part in _parts(modules[path]):
            watched[f"{BLOCKS}{number}.{name}"] = part
    for name, part in _parts(modules[holder]):
        if not isinstance(part, nn.Embedding):
            watched[f"{BESIDE}{name}"] = part
    return watched


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.children().items():
        if isinstance(part, nn.Module):
            yield name, part


@contextmanager
def _called(watched: dict[str, nn.Module], seen: dict[str, Any], first: str) -> Iterator[None]:
    """Inside, `seen` gets what each module gives when it is first called, and what enters the module `first`.

    MLX has no hooks, so each module gets a class of its own for as long, which calls the usual one and takes notes.
    """
    kinds = {key: type(module) for key, module in watched.items()}
    for key, module in watched.items():
        module.__class__ = _noting(kinds[key], key, seen, key == first)
    try:
        yield
    finally:
        for key, module in watched.items():
            module.__class__ = kinds[key]


def _noting(kind: type, key: str, seen: dict[str, Any], first: bool) -> type:
    """A class that notes what its modules give, and where `first`, what they are given."""
    call: Callable[..., Any] = kind.__call__

    def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if first:
            seen.setdefault(EMBEDDINGS, args)
        out = call(self, *args, **kwargs)
        seen.setdefault(key, out)
        return out

    return type(kind.__name__, (kind,), {"__call__": noted})


def of_torch(model: Any, ids: np.ndarray, count: int) -> States:
    """The same of a transformers model (or PEFT's around one). ids: [T]; count: of its blocks."""
    import torch

    seen: dict[str, Any] = {}
    with _hooked(model, seen, count), torch.no_grad():
        seen[LOGITS] = model(torch.from_numpy(ids[None].astype(np.int64))).logits
    states: States = {}
    for key, value in seen.items():
        tensor = _first(value, torch.Tensor)
        if tensor is not None:
            states[key] = tensor.float().numpy()
    return _in_rows(states)


@contextmanager
def _hooked(model: Any, seen: dict[str, Any], count: int) -> Iterator[None]:
    """Inside, `seen` gets what each part gives when it is first called, and what enters the first block."""
    import torch

    handles = []

    def note(key: str, part: Any) -> None:
        def noted(module: Any, args: Any, out: Any) -> None:  # what a hook returns would take the place of `out`
            seen.setdefault(key, out)

        handles.append(part.register_forward_hook(noted))

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        seen.setdefault(EMBEDDINGS, (*args, *kwargs.values()))

    # A vision tower may have as many blocks; on text it is not called.
    for path, blocks in model.named_modules():
        if not isinstance(blocks, torch.nn.ModuleList) or len(blocks) != count:
            continue
        for number, block in enumerate(blocks):
            note(f"{BLOCKS}{number}", block)
            for name, part in block.named_children():
                note(f"{BLOCKS}{number}.{name}", part)
        handles.append(blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
        holder = path.rpartition(".")[0]
        for name, part in model.get_submodule(holder).named_children():
            if part is not blocks and not isinstance(part, torch.nn.Embedding):
                note(f"{BESIDE}{name}", part)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(value: Any, kind: type) -> Any:
    """The first array of what a module takes or gives."""
    if isinstance(value, kind):
        return value
    if isinstance(value, tuple | list):
        return next((part for part in value if isinstance(part, kind)), None)
    return None


def _in_rows(states: States) -> States:
    """[1, T, D] as [T, D]."""
    return {key: array[0] for key, array in states.items() if array.ndim == 3 and len(array) == 1}

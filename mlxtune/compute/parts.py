"""The parts of a model that may be computed otherwise, each for itself: one list, `PARTS`.

A way to compute the loss (`loss.Way`) names the parts that are on. Each part has a key of the configuration under
`fast`, a sentence for people, a test whether a model has anything for it on this device, and what is done to the model
while it computes. `fast_ways` puts those that a model has into the fastest way, and the proof at a run's start compares
that way with the plain one; where it fails, each part is left out in turn (`fast_ways.ways_to_try`).

A part that saves memory or arithmetic is "auto" by default. One that only promises time, on a device where nobody has
timed it yet, is "off", and "on" asks for it; `mlxtune bench --parts` shows what it brings.

To add one: its line here, its key in `config.schema.FastSection`, and if its arrays are others than those of the plain
way, what stands for it while memory is predicted (`memory.kernels`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxtune.compute import last_block, thin
from mlxtune.config.schema import FastSection
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.model import gated_delta, gated_mlp

ALL_BLOCKS = 1  # of `Way.recompute`: every block is computed again


@dataclass(frozen=True)
class Part:
    """A part of a model that may be computed otherwise."""

    # For people: what is computed so.
    says: str
    # Whether a model has anything for it, on this device.
    is_for: Callable[[nn.Module], bool]
    # Inside, the model computes it so. (What has nothing to do with the model is asked for by name where it is used.)
    within: Callable[[nn.Module], AbstractContextManager[None]]
    # Whether it brings something where every block is computed again in the backward pass.
    with_all_recomputed: bool = True
    # Whether it computes the same where each position has a mask of dropout of its own.
    with_dropout: bool = True


def _has_kernels(_: nn.Module) -> bool:
    return backend.kind() != "cpu" and hasattr(mx.fast, "cross_entropy")


# By the name in `Way.parts`, which is the key under `fast`. In the order in which they begin: a later one may take the
# place of an earlier one.
PARTS = {
    "gated_delta": Part("gated delta layers in chunks", gated_delta.is_in, gated_delta.computed_in_chunks),
    "kernels": Part(
        "MLX's kernels for cross-entropy and gated delta layers", _has_kernels, gated_delta.computed_by_kernel
    ),
    "activations": Part(
        "gated activations again in the backward pass",
        gated_mlp.is_in,
        gated_mlp.computed_again,
        with_all_recomputed=False,
    ),
    "last_block": Part(
        "the end of the last block on supervised tokens only", last_block.is_for, last_block.within, with_dropout=False
    ),
    "thin": Part("one product for the A of layers with one input", thin.is_in, thin.within, with_dropout=False),
}


def of_model(model: nn.Module, section: FastSection, dropout: bool) -> tuple[str, ...]:
    """The names of the parts that a model has and the configuration leaves on. dropout: whether the adapter has any.

    Raises UserError where one was asked for ("on") that cannot be used; with "auto" it is left out.
    """
    names = []
    for name, part in PARTS.items():
        asked = getattr(section, name)
        if asked == "off":
            continue
        against = _against(part, model, dropout)
        if not against:
            names.append(name)
        elif asked == "on":
            raise without_effect(name, against)
    return tuple(names)


def _against(part: Part, model: nn.Module, dropout: bool) -> str:
    """Why a part cannot be used, in words; "": it can."""
    if dropout and not part.with_dropout:
        return "with lora.dropout each layer has masks of its own"
    if not part.is_for(model):
        return "this model and its adapter have nothing for it on this device"
    return ""


def without_effect(name: str, against: str) -> UserError:
    """What is raised where a part was asked for in vain. name: of the part; against: why, in words."""
    return UserError(f"fast.{name} on has no effect: {against}", f"Leave fast.{name} out.")


def in_use(names: Sequence[str], recompute: int) -> list[str]:
    """Those of some parts that bring something where every `recompute`-th block is computed again (0: none is).

    A run's way names only these. Whoever has more blocks computed again than the run will (a proof, for memory) keeps
    the parts as they are: what the run computes so is what must be proven.
    """
    return [name for name in names if recompute != ALL_BLOCKS or PARTS[name].with_all_recomputed]


@contextmanager
def within(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside, the model computes these parts otherwise."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(PARTS[name].within(model))
        yield

"""The ways in which a run may compute its loss: what its configuration and model allow, and what to try after that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.compute import prefix
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.compute.precision import in_float32
from mlxtune.config.resolve import Config, TrainSection
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import lengths_of
from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.model import linux_cpu
from mlxtune.model.corrections import extent

SPLIT_TOKENS = 32  # on which the head apart from the trunk must give the model's own logits


def in_order(wanted: Way) -> list[tuple[Way, bool]]:
    """(way, whether its blocks may be checkpointed to fit the memory): what to try, the fastest first, the plain way
    last. Always as many.
    """
    slower = replace(wanted, powers=False, compiled=False)
    alone = replace(slower, prefix=None)
    checkpointed = [wanted, replace(wanted, prefix=None), slower, alone, Way()]
    return [*((way, True) for way in checkpointed), (alone, False), (Way(), False)]


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


def describe(way: Way) -> str:
    """For people: what a way leaves out."""
    parts = ["the head on supervised tokens only"] if way.split is not None else []
    if way.prefix is not None:
        parts.append(f"the shared prefix of {way.prefix} tokens once" if way.prefix else "what a batch shares once")
    if way.recompute:
        parts.append(
            "every block checkpointed" if way.recompute == 1 else f"one in {way.recompute} blocks checkpointed"
        )
    if way.powers:
        parts.append("exponentials as powers of two")
    if way.compiled:
        parts.append("compiled")
    return ", ".join(parts) or "everything, no short cut"


def wanted(model: nn.Module, examples: Sequence[Example], config: Config) -> tuple[Way, list[str]]:
    """(the fastest way that the configuration and the model allow, what a person must know about it)."""
    notes = []
    split = None
    trained = False
    ids = mx.array(np.asarray(examples[0].ids[:SPLIT_TOKENS])[None])
    if config.fast.head == "auto":
        split = Split.of(model, ids)
        if split is None:
            notes.append("this model's head cannot be run apart from its trunk: logits are computed for every token")
        else:
            with in_float32(model):
                trained = split.head_is_trained(model, split.hidden(ids)[0, -1:])
            if trained and config.lora.dropout:
                notes.append("the head is trained with dropout: logits are computed for every token")
                split, trained = None, False
    length, reason = shared_prefix(model, examples, config)
    if reason:
        notes.append(f"no shared prefix: {reason}")
    return _for_device(Way(split, trained, length, every_nth(config.train)), model, config), notes


def hoped(model: nn.Module, examples: Sequence[Example], config: Config) -> Way:
    """The way that a run will take when nothing goes wrong, no weight being read."""
    split = Split(model, "") if config.fast.head == "auto" else None
    length, _ = shared_prefix(model, examples, config)
    return _for_device(Way(split, prefix=length, recompute=every_nth(config.train)), model, config)


def _for_device(way: Way, model: nn.Module, config: Config) -> Way:
    """The way with what makes it fast on this device."""
    powers = linux_cpu.worth_it() and (way.split is not None or way.prefix is not None)
    many_shapes = config.lora.dropout or config.train.neftune_alpha or config.data.group_by_prefix
    compiled = backend.compiles() and way.split is not None and not many_shapes and prefix.caches(model) is not None
    return replace(way, powers=powers, compiled=compiled)


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
    limit = extent.longest_alike(model)
    if limit is not None and lengths_of(examples).max() > limit - prefix.MIN_SUFFIX:
        return (
            None,
            f"{length} tokens begin every row, but rows of more than {limit} tokens are rotated otherwise",
        )
    return length, ""

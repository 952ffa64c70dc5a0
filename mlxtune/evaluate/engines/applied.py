"""Whether an adapter does anything: one that is silently not applied gives two equal columns, and a false statement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from mlxtune_convert.adapters import AdapterConfig

from mlxtune.adapter import attach
from mlxtune.compute.precision import in_float32
from mlxtune.errors import UserError
from mlxtune.model.load import Loaded

TOKENS = 64  # of the prompt: logits of a long one would fill the memory


def note_on(loaded: Loaded, adapter: Path, ids: Sequence[int]) -> str:
    """What must be known of an adapter that changes no logit of a prompt; "" for one that does.

    loaded: with the adapter on it; ids: of the prompt. Raises UserError for an adapter that should change some.
    """
    tokens = mx.array([list(ids)[:TOKENS]])
    with in_float32(loaded.model):
        tuned = loaded.model(tokens)
        with attach.switched_off(loaded.model):
            base = loaded.model(tokens)
        if not mx.array_equal(tuned, base):
            return ""
    saved: dict[str, mx.array] = mx.load(str(adapter / AdapterConfig.read(adapter).file))  # type: ignore[assignment]
    for name, array in saved.items():
        if name.endswith("lora_b") and bool(mx.any(array != 0)):
            raise UserError(
                f"the adapter of {adapter} is not applied: no logit of the first prompt changes with it",
                "It was not put on the model, or its numbers are too small to matter: train longer.",
            )
    return f"the adapter of {adapter} changes nothing: every B of it is zero"

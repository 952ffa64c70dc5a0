"""Whether an adapter does anything: one that is silently not applied gives two equal columns, and a false statement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlxtune_convert.adapters import AdapterConfig

from mlxtune.adapter import attach
from mlxtune.adapter.layers import EMBEDDING, AdaptedLayer, dense_copy, own_parameters
from mlxtune.compute.precision import in_float32
from mlxtune.errors import UserError
from mlxtune.model.dense import dense_weight
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
    with attach.switched_off(loaded.model):
        modules = dict(loaded.model.named_modules())
    changed = [name for name, array in saved.items() if _changes(modules, name, array)]
    rows = [name for name in changed if isinstance(modules.get(name.rpartition(".")[0]), EMBEDDING)]
    if len(changed) > len(rows):
        raise UserError(
            f"the adapter of {adapter} is not applied: no logit of the first prompt changes with it",
            "It was not put on the model, or its numbers are too small to matter: train longer.",
        )
    if rows:  # those of tokens that the prompt has not, perhaps
        return (
            f"the adapter of {adapter} changes no logit of the first prompt: it is not applied, or none of the token "
            "rows that it trained occurs there"
        )
    return f"the adapter of {adapter} changes nothing: all that it trained is as it began"


def _changes(modules: Mapping[str, nn.Module], name: str, saved: mx.array) -> bool:
    """Whether a tensor of an adapter, applied, makes another model of the base: B that is not zero, lengths of DoRA or
    a parameter trained in full that are not the base's. modules: of the base, by path.
    """
    path, _, part = name.rpartition(".")
    if part == "lora_a":
        return False
    if part == "lora_b":
        return bool(mx.any(saved != 0))
    layer = modules.get(path)
    if layer is None:
        return True
    if part == "m":
        weight = dense_weight(layer.linear if isinstance(layer, AdaptedLayer) else layer)
        return not mx.allclose(saved, mx.linalg.norm(weight, axis=1), rtol=1e-5, atol=0)
    own = own_parameters(dense_copy(layer)).get(part)
    return own is None or not mx.array_equal(saved, own.astype(mx.float32))

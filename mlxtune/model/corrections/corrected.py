"""mlx-lm's model of a configuration made transformers' where it has another rotation, activation or no window.

mlx-lm's classes ignore rotary settings that their family can have (a scaling, a factor of YaRN, a short row under
longrope), or refuse them. Each layer's own rotary module is tried on a few positions; what turns them as transformers'
formulas do stays, else a `Rotary` takes its place.

Example: Qwen 2 MoE with rope_scaling {"type": "yarn", "factor": 4}. mlx-lm's class takes "linear" alone and would
raise, so `readable` leaves the scaling out of what it is built from. Its rotary modules then turn unscaled, where
transformers' formula turns the slowest pairs at a quarter of that: `_same` sees it, and `correct` puts a `Rotary`
there. `notes` says that other programs built on mlx-lm compute another model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlxtune_convert.hf.families import differs

from mlxtune.model.arrays import scalar
from mlxtune.model.corrections import activations, windows
from mlxtune.model.corrections.families import family_of
from mlxtune.model.corrections.reference import described, refusal
from mlxtune.model.corrections.rotary import Rotary, Rotation, rotation

_NAMES = ("rope", "rotary_emb")  # of a rotary module in an attention layer of mlx-lm
_TOKENS = 8
_FAR = 1000  # a position at which slightly other frequencies show
# Largest difference of what a module makes of numbers around 1: at the first positions, and at far ones, where rounding
# of the frequencies is a thousand times as large.
_NEAR_ENOUGH, _FAR_ENOUGH = 1e-4, 5e-3


def correct(model: nn.Module, config: dict[str, Any]) -> None:
    """Give a model's layers transformers' rotation, window and activation. config: its config.json, ours or theirs."""
    known = described(config)
    text = known.get_text_config() if known is not None else None
    if text is None:
        return
    activation = activations.wanted(text)
    for layer, block in enumerate(model.layers):
        size = windows.window(text, layer)
        if size is not None and windows.ATTENTION in block:
            windows.add(block[windows.ATTENTION], size)
        if activation is not None:
            activations.put(block, activation)
    if not family_of(text.model_type).rotary_compared:
        return
    for layer, parent, name in rotary_modules(model):
        wanted = rotation(text, layer)
        if wanted is None:
            continue
        own = getattr(parent, name)
        ours = Rotary(wanted, _interleaved(own, text))
        if not _same(own, ours, wanted):
            setattr(parent, name, ours)


def rotates_anew(model: nn.Module) -> bool:
    """Whether `correct` replaced a rotary module."""
    return any(isinstance(getattr(parent, name), Rotary) for _, parent, name in rotary_modules(model))


def notes(model: nn.Module, config: dict[str, Any]) -> list[str]:
    """What a person must know of a model that mlx-lm does not compute as transformers does. config: as in `correct`."""
    out = []
    if why := differs(config):
        out.append(f"this is not the model that transformers computes, and exports of it are refused: {why}")
    if why := refusal(config):
        out.append(f"transformers refuses this config.json, so nothing is compared with it: {why}")
    known = described(config)
    text = known.get_text_config() if known is not None else None
    scaled = " and ".join(_scalings(text))
    if rotates_anew(model):
        out.append(
            f"mlx-lm computes {scaled or 'these'} rotary embeddings otherwise than transformers: mlxtune computes "
            "transformers', but to mlx_lm and the apps built on it this folder is another model"
        )
    elif scaled and text is not None and not family_of(text.model_type).rotary_compared:
        out.append(f"{scaled} rotary embeddings of {text.model_type} are not compared with transformers' here")
    if text is not None and any(activations.has(module) for module in model.modules()):
        out.append(
            f"mlx-lm has another activation than {activations.name_of(text)} built in: mlxtune computes transformers', "
            "but to mlx_lm and the apps built on it this folder is another model"
        )
    if text is not None and any(windows.has(module) for module in model.modules()):
        out.append(
            f"mlx-lm lets this model see all of a row, transformers {text.sliding_window} tokens: mlxtune computes "
            "transformers', but to mlx_lm and the apps built on it longer rows are another model's"
        )
    return out


def _scalings(text: Any) -> list[str]:
    """The rope_type of every scaled rotation in a configuration."""
    sets = getattr(text, "rope_parameters", None) or {}
    kinds = {str(part.get("rope_type")) for part in (sets, *sets.values()) if isinstance(part, dict)}
    return sorted(kinds - {"None", "default"})


def readable(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration to build mlx-lm's model from: without a rotary scaling that its class refuses."""
    kind = config.get("model_type")
    taken = family_of(kind).rope_types
    if taken is None:
        return config
    scaling = config.get("rope_scaling") or {}
    own = "alpha" if scaling.get("alpha") else scaling.get("type") or scaling.get("rope_type")
    if own in taken:
        return config
    if kind == "deepseek_v2":  # it cannot be without; this one does nothing
        return {**config, "rope_scaling": {"type": "yarn", "factor": 1.0}}
    return {**config, "rope_scaling": None}


def rotary_modules(model: nn.Module) -> Iterator[tuple[int, nn.Module, str]]:
    """(layer, the module that holds it, its name there) of every rotary module."""
    for layer, block in enumerate(model.layers):
        for _, module in block.named_modules():
            for name in _NAMES:
                if isinstance(module.get(name), nn.Module):
                    yield layer, module, name


def _interleaved(own: nn.Module, text: Any) -> bool:
    """Which numbers of a head are pairs: a convention of the family's weights."""
    if getattr(text, "rope_interleave", None) is not None:
        return bool(text.rope_interleave)
    return bool(getattr(own, "traditional", type(own).__name__ == "DeepseekV2YarnRotaryEmbedding"))


def _same(own: nn.Module, ours: Rotary, wanted: Rotation) -> bool:
    """Whether two modules turn the same numbers alike, at the first positions, far ones, and beyond a limit."""
    width = _width(own, ours)
    x = mx.array(np.random.default_rng(0).standard_normal((1, 1, _TOKENS, width)).astype(np.float32))
    places = [(0, _NEAR_ENOUGH), (_FAR, _FAR_ENOUGH)]
    if wanted.limit is not None:
        places += [(wanted.limit - _TOKENS // 2, _FAR_ENOUGH), (wanted.limit + _FAR, _FAR_ENOUGH)]
    try:
        return all(scalar(mx.abs(own(x, offset) - ours(x, offset)).max()) < most for offset, most in places)
    except TypeError:  # it was made without a number that the setting needs
        return False


def _width(own: nn.Module, ours: Rotary) -> int:
    """Numbers to try both modules on: more than either turns, so that it shows which turns more."""
    turned = getattr(own, "dims", getattr(own, "dim", ours.dims))
    return max(ours.dims, int(turned))

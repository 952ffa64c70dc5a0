"""Settings of a config.json that mlx-lm's model of a family does not heed, against the values that it computes.

Found by changing every setting of every family and comparing logits with transformers (tests/sweep.py); each family's
entry in `families/` has its own. A setting that is missing has a default in transformers that mlx-lm computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlxtune_convert.families.table import family_of

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")
ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "activation_function")  # the first that is there


def why(config: dict[str, Any]) -> str:
    """Which setting mlx-lm does not heed and what it computes instead, or "". config: a config.json."""
    reason = unable(config)
    if reason:
        return reason
    for part in _parts(config):
        for check in (_of_values, *family_of(part).checks):
            reason = check(part)
            if reason:
                return reason
    return ""


def unable(config: dict[str, Any]) -> str:
    """Why mlx-lm's model of a configuration cannot be run at all, though it is made, or "". config: as in `why`."""
    for part in _parts(config):
        family = family_of(part)
        reason = family.cannot_run(part) if family.cannot_run else ""
        if reason:
            return reason
        layers = part.get("layer_types")
        for needed in family.needs_layers:
            if isinstance(layers, list) and needed not in layers:
                return f"it cannot do without a layer of type {needed}"
    return ""


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and, of a vision model, its text part: each has a family of its own."""
    yield config
    text = config.get("text_config")
    if isinstance(text, dict):
        yield text


def _of_values(config: dict[str, Any]) -> str:
    family = family_of(config)
    for key, computed in family.computes.items():
        if key in config and config[key] not in computed:
            return f"mlx-lm computes {key} = {computed[0]} only, the configuration says {config[key]}"
    named = next((config[key] for key in ACTIVATION_KEYS if config.get(key)), ACTIVATIONS[0])
    if family.any_activation and named not in ACTIVATIONS:
        return f"the activation {named} is computed neither by mlx-lm nor here"
    return ""

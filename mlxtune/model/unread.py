"""A model as its config.json alone describes it: every layer is there, and no weight is.

MLX is lazy: the random numbers that a layer begins with are promised, and nobody asks for them. So a model of 70
billion parameters is built in a second, its shapes and types are known, and its memory can be predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlxtune_convert.hf.configs import normalise, unquantized

from mlxtune.model import config_check
from mlxtune.model.corrections.corrected import correct
from mlxtune.model.corrections.reference import completed
from mlxtune.model.corrections.shared_keys import handed_on
from mlxtune.model.load import cast
from mlxtune.model.mlx_lm_classes import Readable, model_classes, refusals

TYPES = ("float32", "float16", "bfloat16")


def built(given: Mapping[str, Any], name: str) -> tuple[nn.Module, dict[str, Any]]:
    """(the model of a dense config.json, in the type that it names, else bfloat16; its normalised config.json).

    name: of the model, for messages. Raises UserError for what mlx-lm knows no model of.
    """
    original = unquantized(dict(given))
    path = Path(name)
    config_check.check(path, original, "config.json")
    with refusals(path):
        config = normalise(completed(original))
    model_class, arguments = model_classes(path, config, original, set())
    with refusals(path, config):
        model: nn.Module = model_class(Readable(arguments).from_dict(config))
    for _, module in model.named_modules():
        if not hasattr(module, "_no_grad"):  # as in `load.open_model`
            module._no_grad = set()
    with refusals(path, config):
        correct(model, config)
        handed_on(model)
    text = original.get("text_config") or {}
    asked = str(original.get("dtype") or original.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype"))
    cast(model, getattr(mx, asked if asked in TYPES else "bfloat16"))
    return model, config

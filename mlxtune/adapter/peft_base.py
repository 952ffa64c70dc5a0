"""The model that an adapter from PEFT is for, opened in MLX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from mlxtune_convert import tokenizer_changes
from mlxtune_convert.peft import base_model

from mlxtune.adapter.layers import dense_shape, own_parameters
from mlxtune.adapter.plan import heads
from mlxtune.data.template.tokenizer_changes import as_json
from mlxtune.model.arrays import to_numpy
from mlxtune.model.dense import dense_weight
from mlxtune.model.load import open_model, source_of


class Layers:
    """The layers of a model (`peft_base.Layers`). Of those that hold no matrix the shape is ()."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {path: module for path, module in model.named_modules() if own_parameters(module)}
        self.shapes = {
            path: dense_shape(module) if "weight" in module else () for path, module in self._modules.items()
        }
        self.own_head = bool(heads(model))

    def is_quantized(self, path: str) -> bool:
        return "scales" in self._modules[path]

    def matrix(self, path: str) -> np.ndarray:
        """[out, in] or [experts, out, in], float32."""
        return to_numpy(dense_weight(self._modules[path]))


class Base(base_model.Base):
    """model: with no adapter on it; config: as mlx-lm reads it; original: as it was before conversion."""

    def __init__(self, path: Path, model: nn.Module, config: dict[str, Any], original: dict[str, Any]) -> None:
        super().__init__(path, original, Layers(model))
        self.model = model
        self.config = config

    @staticmethod
    def of(path: Path) -> Base:
        """Raises UserError for a folder that is no model, or one that mlx-lm computes otherwise than transformers."""
        model, config = open_model(path)
        base = Base(path, model, config, source_of(path)["config"])
        base.require_same_function()
        return base

    def plain_tokens(self, folder: Path) -> list[str]:
        with as_json(folder) as theirs, as_json(self.path) as ours:
            return tokenizer_changes.plain_tokens(theirs, ours)

"""The model that an adapter from PEFT is for: its layers' names, and what an adapter must know of its matrices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from mlxtune_convert import layouts, peft
from mlxtune_convert.peft_names import Names
from mlxtune_convert.peft_tensors import is_head
from mlxtune_convert.rules import Layout

from mlxtune.errors import UserError
from mlxtune.model.arrays import to_numpy
from mlxtune.model.layers import EMBEDDING, LINEAR, own_parameters
from mlxtune.model.load import open_model, source_of
from mlxtune.model.quantize import dense_weight
from mlxtune.model.spec import outside_blocks


class Base:
    """An MLX model as adapters from PEFT see it. path: its folder; config: as mlx-lm reads it; original: as it was
    before conversion.
    """

    def __init__(self, path: Path, model: nn.Module, config: dict[str, Any], original: dict[str, Any]) -> None:
        self.path = path
        self.model = model
        self.config = config
        self._modules = dict(model.named_modules())
        self._kind = str(original.get("model_type"))
        shapes = {path: _shape(module) for path, module in self._modules.items() if own_parameters(module)}
        self.names = Names(layouts.LAYOUTS.get(self._kind, Layout()), shapes)

    @staticmethod
    def of(path: Path) -> Base:
        """Raises UserError for a folder that is no model, or one that mlx-lm computes otherwise than transformers."""
        model, config = open_model(path)
        original = source_of(path)["config"]
        why = layouts.differs(original)
        if why:
            raise UserError(
                f"{path}: an adapter from PEFT would not be the same function here: {why}",
                "Train one on this model instead.",
            )
        return Base(path, model, config, original)

    def matrix(self, module: str) -> np.ndarray | None:
        """The matrix of a layer by PEFT's name, dense and in float32; of a tied head the embedding's."""
        layer = self._layer(module)
        if layer is None and is_head(module) and not self._has_head():
            layer = next((self._modules[path] for path in outside_blocks(self.model, EMBEDDING)), None)
        return None if layer is None else to_numpy(dense_weight(layer))

    def completed(self, adapter: peft.Adapter, notes: list[str]) -> peft.Adapter:
        """An adapter as this base needs it; what there is to say goes to `notes`.

        A head that is the embedding becomes a matrix of its own where it is one here. LoRA on a matrix that the adapter
        saved and that is not the base's (tokens were added to it) becomes that matrix with its update, whole.
        """
        if self._kind not in layouts.LAYOUTS:
            notes.append(f"models of type {self._kind} were not compared with transformers: check what it says.")
        if self._has_head():
            adapter = peft.with_head(adapter)
        updates, trained = dict(adapter.updates), dict(adapter.trained)
        for module, copy in adapter.copies.items():
            if self._is(module, copy) or updates[module].m is not None:
                continue
            update = updates.pop(module)
            trained[f"{module}.weight"] = copy + np.float32(update.scale) * (update.a @ update.b).T
            notes.append(f"{module} is another matrix in the adapter than in the model: it is kept whole.")
        return replace(adapter, updates=updates, trained=trained)

    def _is(self, module: str, copy: np.ndarray) -> bool:
        """Whether a copy is the base's matrix, as 16 bits round it; of a quantized one the shape must do."""
        layer, base = self._layer(module), self.matrix(module)
        if layer is None or base is None or base.shape != copy.shape:
            return base is None
        return "scales" in layer or bool(np.allclose(base, copy, rtol=2**-7, atol=1e-6))

    def _layer(self, module: str) -> nn.Module | None:
        place = self.names.place(module)
        return None if place is None else self._modules.get(place.path)

    def _has_head(self) -> bool:
        return bool(outside_blocks(self.model, LINEAR))


def _shape(module: nn.Module) -> tuple[int, ...]:
    return tuple(module.weight.shape) if "weight" in module else ()

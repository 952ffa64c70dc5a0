"""The model that an adapter is for: its layers' names, and what an adapter must know of its matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from mlxtune_convert import tokenizer_changes
from mlxtune_convert.errors import UserError
from mlxtune_convert.hf import families
from mlxtune_convert.hf.rules import Layout
from mlxtune_convert.peft import adapter_folder
from mlxtune_convert.peft.names import NAME_BASE, Names, Place, to_mlx
from mlxtune_convert.peft.settings import Settings
from mlxtune_convert.peft.tensors import is_embedding, is_head

B = TypeVar("B", bound="Base")
BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # config.json's names of their number
KINDS = ("layers_block_type", "layer_types")  # a name for each block
BEFORE = ("base_model.", "language_model.", "model.language_model.", "text_model.", "transformer.", "gpt_neox.")


class Layers(Protocol):
    """The layers of an MLX model by their paths, opened in MLX or read from its files."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each layer's matrix when dense; () where it has none."""

    @property
    def own_head(self) -> bool:
        """Whether there is a head beside the embedding."""

    def is_quantized(self, path: str) -> bool: ...

    def matrix(self, path: str) -> np.ndarray:
        """Of one layer, dense and in float32: [out, in], of experts [E, out, in]."""


class Base:
    """An MLX model as adapters see it."""

    def __init__(self, path: Path, original: dict[str, Any], layers: Layers | None) -> None:
        """path: its folder; original: its config.json before conversion; layers: None where its weights are not at hand
        in MLX's form.
        """
        self.path = path
        self.original = original
        self.layers = layers
        self._kind = str(original.get("model_type"))
        layout = families.of(original)
        self.names = ByTable(layout) if layers is None else Names(layout, layers.shapes)

    @property
    def layout(self) -> Layout:
        """Raises UserError for a family whose names in transformers are not known."""
        return families.by_model_type(self.original)

    @property
    def blocks(self) -> int | None:
        """How many blocks there are, where the configuration says so."""
        text = self.original.get("text_config")
        parts = (text, self.original) if isinstance(text, dict) else (self.original,)
        for part in parts:
            for name in BLOCKS:
                if isinstance(part.get(name), int):
                    return int(part[name])
        for part in parts:
            for name in KINDS:
                if isinstance(part.get(name), list):
                    return len(part[name])
        return None

    @property
    def own_head(self) -> bool | None:
        """Whether the model has a head beside the embedding; None: not known."""
        return None if self.layers is None else self.layers.own_head

    def plain_tokens(self, folder: Path) -> list[str]:
        """Tokens that the tokenizer beside an adapter has, this model's has not, and that are no special ones."""
        return tokenizer_changes.plain_tokens(folder, self.path)

    def require_same_function(self) -> None:
        """Raise UserError for a model that mlx-lm computes otherwise than transformers."""
        why = families.differs(self.original)
        if why:
            raise UserError(
                f"{self.path}: an adapter from PEFT would not be the same function here: {why}",
                "Train one on this model instead.",
            )

    def matrix(self, module: str) -> np.ndarray | None:
        """The matrix of a layer by PEFT's name, [out, in] in float32; of a tied head the embedding's."""
        path = self._path(module)
        if path is None and is_head(module) and self.layers is not None and not self.layers.own_head:
            path = next((path for path in self.layers.shapes if is_embedding(f"{path}.weight")), None)
        return None if path is None or self.layers is None else self.layers.matrix(path)

    def completed(self, adapter: adapter_folder.Adapter, notes: list[str]) -> adapter_folder.Adapter:
        """An adapter as this base needs it; what there is to say goes to `notes`.

        A head that is the embedding becomes a matrix of its own where it is one here. LoRA on a matrix that the adapter
        saved and that is not the base's (tokens were added to it) becomes that matrix with its update, whole. Raises
        UserError where that cannot be told without the base's weights.
        """
        if self._kind not in families.LAYOUTS:
            notes.append(f"models of type {self._kind} were not compared with transformers: check what it says.")
        if self.own_head:
            adapter = adapter_folder.with_head(adapter)
        if adapter.copies and self.layers is None:
            raise UserError(f"the adapter holds its own copy of {next(iter(adapter.copies))}", NAME_BASE)
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
        path, base = self._path(module), self.matrix(module)
        if path is None or base is None or base.shape != copy.shape:
            return base is None
        assert self.layers is not None  # it gave the matrix
        return self.layers.is_quantized(path) or bool(np.allclose(base, copy, rtol=2**-7, atol=1e-6))

    def _path(self, module: str) -> str | None:
        place = self.names.place(module)
        known = place is not None and self.layers is not None and place.path in self.layers.shapes
        return place.path if place is not None and known else None


class ByTable(Names):
    """Names by a family's table alone, where the model's layers are not known."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout, {})
        self._layout = layout

    def place(self, target: str) -> Place | None:
        if is_head(target):
            return super().place(target)
        path = self._layout.mlx_path(target)
        # What no rule names is the same in MLX, but what holds a text model is part of other models' names.
        doubtful = path == target and target.startswith(BEFORE)
        return None if path is None or doubtful else Place(path)

    def missing(self, target: str, folder: object) -> UserError:
        if self._layout.is_another(target):
            return super().missing(target, folder)
        return UserError(
            f"{folder}: which layer {target} is cannot be told from config.json alone",
            "Give the MLX model's folder, with its weights: --base DIR.",
        )


def read(folder: Path, base: Base | None, notes: list[str]) -> adapter_folder.Adapter:
    """A PEFT adapter under MLX's names, as its base needs it; what there is to say goes to `notes`.

    base: None where it is not known. Raises UserError naming the key, the tensor or the layer that cannot be carried
    over.
    """
    adapter = adapter_folder.read_adapter(folder, None if base is None else base.matrix)
    if base is not None:
        new = base.plain_tokens(folder)  # they split words otherwise, and are not kept beside an adapter
        if new:
            raise UserError(
                f"{folder}: its tokenizer has added tokens that are no special ones: {', '.join(new[:4])}",
                "Merge it with PEFT (merge_and_unload, then save_pretrained), save the tokenizer there as well, and "
                "convert the merged model.",
            )
        adapter = base.completed(adapter, notes)
    ours, said = to_mlx(adapter, None if base is None else base.names, folder)
    notes += said
    return ours


def named(folder: Path, notes: list[str], open_base: Callable[[Path], B]) -> B | None:
    """The base that an adapter names, where that is a folder here: what its family calls the layers is known then."""
    name = Settings.read(folder).base
    if not name or not (Path(name) / "config.json").is_file():
        return None
    try:
        base = open_base(Path(name))
    except UserError as error:
        notes.append(f"its base {name} cannot be read ({error.message}): that the adapter fits is not checked.")
        return None
    notes.append(f"the names of its layers are those of {name}, which it was trained on.")
    return base

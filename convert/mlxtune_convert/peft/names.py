"""Where the layers that an adapter of PEFT names are in an MLX model.

PEFT writes the names of transformers' model in memory, which are others than those in files for some families, and
were others in older versions: the text part of a vision model has been `language_model.model`, `model.language_model`
and, loaded alone, `model`; experts have been modules of their own. PEFT still loads all of these
(transformers/conversion_mapping.py), and so are all of these found here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mlxtune_convert.errors import UserError
from mlxtune_convert.hf.rules import Layout
from mlxtune_convert.peft.experts import alternated

if TYPE_CHECKING:
    from mlxtune_convert.peft.adapter_folder import Adapter, Update

# Holders of a text model: none of these says which layer is meant.
HOLDERS = ("base_model", "model", "language_model", "text_model", "transformer")
# Parts of a model for more than text, which an MLX model of its text part does not have.
TOWERS = (
    *("vision_tower", "vision_model", "visual", "vision_embed_tokens", "multi_modal_projector", "mm_projector"),
    *("audio_tower", "audio_model", "embed_vision", "embed_audio", "connector", "aligner"),
)
RENAMED = ("model.language_model.", "gpt_neox.")  # names that no MLX model has
EXPERT = re.compile(r"\.experts\.(\d+)\.")
NAME_BASE = "Name the model: --base DIR"


@dataclass(frozen=True)
class Place:
    """A layer of an MLX model."""

    path: str  # of the layer in the model
    expert: int | None = None  # which of its experts is meant; None: all of it


class Names:
    """The names of one model's layers. layout: of its family; shapes: of its layers' matrices, by their MLX paths."""

    def __init__(self, layout: Layout, shapes: Mapping[str, Sequence[int]]) -> None:
        self._layout = layout
        self.alternate = layout.alternate  # rows of gate and up in the experts
        self._shapes = shapes
        self._paths: dict[str, str] = {"lm_head": "lm_head"}  # also where it is tied, and no layer of its own
        self._paths |= layout.peft_targets(shapes)
        for path in shapes:
            in_files = layout.file_name(path)
            if in_files:
                self._paths.setdefault(in_files, path)
        # Names of several layers that are one without what holds them mean none of them.
        self._short: dict[str, str] = {}
        for name, path in self._paths.items():
            if self._short.setdefault(short(name), path) != path:
                self._short[short(name)] = ""

    def place(self, target: str) -> Place | None:
        """Where a target of PEFT is, or None."""
        number = EXPERT.search(target)
        expert = int(number[1]) if number else None
        name = EXPERT.sub(".experts.{e}.", target)
        found = self._paths.get(name) or self._paths.get(f"{name}:weight")
        found = found or self._short.get(short(name)) or self._short.get(f"{short(name)}:weight")
        return Place(found, expert) if found else None

    def experts(self, path: str) -> int:
        """How many experts a stacked layer has."""
        return int(self._shapes[path][0])

    def missing(self, target: str, folder: object) -> UserError:
        """Why a target has no place."""
        if self._layout.is_another(target):
            return UserError(
                f"{folder}: MLX has other numbers in place of {target}, which no update of it fits",
                "Merge it with PEFT (merge_and_unload, then save_pretrained) and convert the merged model.",
            )
        return UserError(f"{folder}: the model has no layer {target}", "Name the model that it was trained on.")


def short(name: str) -> str:
    """A name without what holds the text model."""
    first, _, rest = name.partition(".")
    return short(rest) if first in HOLDERS and rest else name


def is_tower(name: str) -> bool:
    """Whether a layer is outside of the text part of a model."""
    return short(name).partition(".")[0] in TOWERS


def to_mlx(adapter: Adapter, names: Names | None, folder: object) -> tuple[Adapter, list[str]]:
    """An adapter under MLX's names, and what there is to say about it.

    names: None where the model is not known; its family's names must then be PEFT's. folder: for messages. Raises
    UserError for a layer that the model does not have.
    """
    notes = _left_out(adapter, folder)
    if names is not None and names.alternate:
        adapter = replace(adapter, updates=alternated(adapter.updates))
    updates: dict[str, Update] = {}
    experts: dict[str, dict[int, Update]] = {}
    for target, update in adapter.updates.items():
        if is_tower(target):
            continue
        place = _place(target, names, folder)
        if place.expert is not None:
            experts.setdefault(place.path, {})[place.expert] = update
        elif place.path in updates:
            raise UserError(f"{folder} adapts {place.path} under two names", "Save it again with PEFT.")
        else:
            updates[place.path] = update
    for path, single in experts.items():
        assert names is not None  # _place finds no expert without them
        count = names.experts(path)
        updates[path] = _stacked(path, single, count, folder)
        if len(single) < count:
            notes.append(f"{count - len(single)} of {count} experts of {path} are not adapted: their updates are 0.")
    trained = {}
    for name, array in adapter.trained.items():
        module, _, parameter = name.rpartition(".")
        if not is_tower(module):
            trained[f"{_place(module, names, folder).path}.{parameter}"] = array
    return replace(adapter, updates=updates, trained=trained), notes


def _left_out(adapter: Adapter, folder: object) -> list[str]:
    """What to say of layers outside of the language model. Raises UserError where there are no others."""
    targets = (*adapter.updates, *(name.rpartition(".")[0] for name in adapter.trained))
    towers = [target for target in targets if is_tower(target)]
    if not towers:
        return []
    if len(towers) == len(targets):
        raise UserError(
            f"{folder} adapts nothing of the language model ({towers[0]})", "MLX runs the language model alone."
        )
    return [f"{len(towers)} layers outside of the language model are left out ({towers[0]}, ...): MLX runs it alone."]


def _place(target: str, names: Names | None, folder: object) -> Place:
    if names is not None:
        place = names.place(target)
        if place is None:
            raise names.missing(target, folder)
        return place
    if ":" in target or EXPERT.search(target):
        raise UserError(f"{folder} adapts experts, whose names depend on the model's family", NAME_BASE)
    if target.startswith(RENAMED):
        raise UserError(f"{folder} adapts {target}, which has another name in MLX", NAME_BASE)
    return Place(target)


def _stacked(path: str, single: dict[int, Update], count: int, folder: object) -> Update:
    """One update for all experts of a layer, 0 for those that have none."""
    first = next(iter(single.values()))
    why = _not_one_layer(single, count)
    if why:
        raise UserError(
            f"{folder}: the experts of {path} have {why}, which one layer for all of them cannot hold",
            "Merge it with PEFT (merge_and_unload, then save_pretrained) and convert the merged model.",
        )
    (inputs, rank), outputs = first.a.shape, first.b.shape[1]
    a = np.zeros((count, rank, inputs), np.float32)
    b = np.zeros((count, outputs, rank), np.float32)
    for expert, update in single.items():
        a[expert], b[expert] = update.a.T, update.b.T  # [in, r] -> [r, in], [r, out] -> [out, r]
    return replace(first, a=a, b=b)


def _not_one_layer(single: dict[int, Update], count: int) -> str:
    """Why the updates of single experts, by their numbers, cannot be one update of all `count`; "" when they can."""
    if max(single) >= count:
        return f"an expert {max(single)} of {count}"
    updates = list(single.values())
    if updates[0].m is not None:
        return "DoRA"
    if len({(update.rank, update.scale, update.m is None) for update in updates}) > 1:
        return "different ranks or scales"
    return ""

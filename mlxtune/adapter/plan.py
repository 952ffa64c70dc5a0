"""What an adapter is: which layers train and how, resolved against a model."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import mlx.nn as nn
from mlxtune_convert import adapters
from mlxtune_convert.adapters import ADAPTER_FILE, OWN_FILE

from mlxtune.adapter.layers import EMBEDDING, LINEAR, SWITCH, own_parameters
from mlxtune.config.schema import LoraSection
from mlxtune.errors import UserError, did_you_mean
from mlxtune.model.corrections.shared_keys import UNUSED, shares

__all__ = ["ADAPTER_FILE", "OWN_FILE", "Spec"]
READ_BY_BLOCK = (".prediction_coefs", ".correction_coefs")  # of Gemma 3n's AltUp, a few numbers each


class Spec(adapters.Spec):
    """As adapter folders hold it, and resolved against a model."""

    @staticmethod
    def of(model: nn.Module, section: LoraSection) -> Spec:
        """Resolve targets, ranks and layers against a model. Raises UserError naming what there is."""
        count = len(model.layers)
        wanted = count if section.layers == "all" else section.layers
        if wanted > count:
            raise UserError(f"lora.layers {wanted}: the model has {count} blocks", f"Use 1 to {count}, or all.")
        inside = sorted({path for block in model.layers[count - wanted :] for path in linear_paths(block)})
        available = inside + outside_blocks(model, LINEAR)
        keys = set(inside)
        if section.targets != "all-linear":
            keys = {path for target in section.targets for path in _matching("lora.targets", target, available)}
        ranks = {path: n for name, n in section.ranks.items() for path in _matching("lora.ranks", name, sorted(keys))}

        def scale(rank: int) -> float:
            return section.alpha / (math.sqrt(rank) if section.variant == "rslora" else rank)

        spec = Spec(section.rank, scale(section.rank), section.dropout, tuple(sorted(keys)), wanted, section.variant)
        if any(rank != section.rank for rank in ranks.values()):
            by_path = {path: ranks.get(key, section.rank) for path, key in places(model, spec).items()}
            spec = replace(spec, modules={path: (rank, scale(rank)) for path, rank in by_path.items()})
        return replace(spec, trained=trained_paths(model, section.train_also, set(places(model, spec))))


def _matching(option: str, name: str, available: list[str]) -> list[str]:
    matched = [path for path in available if path == name or path.endswith("." + name)]
    if not matched:
        names = sorted({path.rsplit(".", 1)[-1] for path in available})
        raise UserError(
            f"{option}: no linear layer is called {name!r}",
            did_you_mean(name, names, "This model has"),
        )
    return matched


def linear_paths(block: nn.Module) -> list[str]:
    """The layers of a block that can be adapted: not those whose matrices the block itself reads, nor unused ones."""
    paths = [path for path, module in block.named_modules() if isinstance(module, LINEAR + SWITCH)]
    idle = READ_BY_BLOCK + (UNUSED if shares(block) else ())
    return [path for path in paths if not path.endswith(idle)]


def block_paths(model: nn.Module) -> list[str]:
    """Where the blocks are, such as `model.layers.0`, in their order."""
    names = {id(module): path for path, module in model.named_modules()}
    return [names[id(block)] for block in model.layers]


def outside_blocks(model: nn.Module, kinds: tuple[type, ...]) -> list[str]:
    """Paths of the layers of some kinds that are in no block: embeddings and head."""
    blocks = tuple(f"{path}." for path in block_paths(model))
    return [path for path, module in model.named_modules() if isinstance(module, kinds) and not path.startswith(blocks)]


def heads(model: nn.Module) -> list[str]:
    """Paths of the heads that are a matrix of their own: the linear layers outside the blocks with a row for each token
    (Gemma 4 has another one there).
    """
    modules = dict(model.named_modules())
    rows = {len(modules[path].weight) for path in outside_blocks(model, EMBEDDING)}
    return [path for path in outside_blocks(model, LINEAR) if len(modules[path].weight) in rows]


def places(model: nn.Module, spec: Spec) -> dict[str, str]:
    """Path in the model -> key, for every layer that keys and num_layers choose."""
    keys, modules = set(spec.keys), dict(model.named_modules())
    out = {}
    for prefix in block_paths(model)[len(model.layers) - spec.num_layers :]:
        out.update({f"{prefix}.{path}": path for path in linear_paths(modules[prefix]) if path in keys})
    out.update({path: path for path in outside_blocks(model, LINEAR) if path in keys})
    return out


def trained_paths(model: nn.Module, names: list[str], adapted: set[str]) -> tuple[str, ...]:
    """Layers that train in full. names: norms, embeddings, head, or module paths such as layers.11 or layers.0.mlp.

    Raises UserError for a name that means no layer, or one that an adapter is on as well.
    """
    leaves = {path: module for path, module in model.named_modules() if own_parameters(module)}
    groups = {
        "norms": [path for path, module in leaves.items() if "Norm" in type(module).__name__],
        "embeddings": outside_blocks(model, EMBEDDING),
        "head": heads(model),
    }
    chosen: set[str] = set()
    for name in names:
        paths = groups.get(name) or [p for p in leaves if re.search(rf"(^|\.){re.escape(name)}(\.|$)", p)]
        if not paths:
            hint = "It is tied to the embedding here: use embeddings." if name == "head" else ""
            raise UserError(
                f"lora.train_also: this model has no {name!r}",
                hint or "Use norms, embeddings, head, or a module's path such as layers.0.mlp.",
            )
        # An adapter and full training of one matrix would be two answers to one question; full training wins by name.
        both = [path for path in paths if path in adapted]
        if both and name not in groups:
            raise UserError(
                f"lora.train_also: {both[0]} has an adapter as well", "Leave it out of lora.targets or lora.layers."
            )
        chosen.update(path for path in paths if path not in adapted)
    return tuple(path for path in leaves if path in chosen)

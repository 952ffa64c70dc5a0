"""What an adapter is: which layers train and how, resolved against a model."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import mlx.nn as nn

from mlxtune.errors import UserError
from mlxtune.model.layers import EMBEDDING, LINEAR, SWITCH, own_parameters
from mlxtune.model.shared_keys import UNUSED, shares
from mlxtune.sections import LoraSection

ADAPTER_FILE = "adapters.safetensors"
OWN_FILE = "mlxtune_adapters.safetensors"
READ_BY_BLOCK = (".prediction_coefs", ".correction_coefs")  # of Gemma 3n's AltUp, a few numbers each


@dataclass(frozen=True)
class Spec:
    """What an adapter is: enough to build it again on the same base.

    keys: module paths inside a block (or in the model, outside its blocks); num_layers: how many blocks from the last
    one; scale: of the update, alpha / rank, or alpha / sqrt(rank) in rsLoRA (Kalajdzievski 2023, arXiv:2312.03732).
    modules: where rank or scale are not the same everywhere, each adapted path in the model with its own (rank, scale);
    it replaces keys and num_layers. trained: paths of the layers trained in full; own_head: the head is not to follow a
    trained embedding. base: the original model on the hub, where an imported adapter names one.
    """

    rank: int
    scale: float
    dropout: float
    keys: tuple[str, ...]
    num_layers: int
    variant: str = "lora"
    modules: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    own_head: bool = False
    base: str = ""

    @property
    def file(self) -> str:
        """mlx-lm's name where its layout holds the whole adapter, else our own."""
        return OWN_FILE if self.modules or self.trained else ADAPTER_FILE

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
        near = difflib.get_close_matches(name, names, n=1)
        raise UserError(
            f"{option}: no linear layer is called {name!r}",
            (f"Did you mean {near[0]}? " if near else "") + f"This model has: {', '.join(names)}.",
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
        "head": outside_blocks(model, LINEAR),
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

"""What an adapter is: which layers train and how, resolved against a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn
from mlxtune_convert.adapters import AdapterConfig

from mlxtune.adapter.layers import EMBEDDING, LINEAR, SWITCH, VARIANTS, own_parameters
from mlxtune.config.schema import LoraSection
from mlxtune.errors import UserError, did_you_mean
from mlxtune.model.corrections.families import READ_BY_BLOCK
from mlxtune.model.corrections.shared_keys import UNUSED, shares


@dataclass(frozen=True)
class LastBlocks:
    """The same layers adapted in each of the last blocks: the form that mlx-lm's files have for an adapter."""

    # Paths inside a block, such as self_attn.q_proj; a layer outside the blocks by its path in the model.
    keys: tuple[str, ...]
    # How many blocks, from the last one back. Some of them may lack a layer for some of the keys.
    count: int


@dataclass(frozen=True)
class AdapterPlan:
    """What trains on one model, layer by layer. `of` or `read` makes it, `attach` puts it on a model,
    an adapter folder keeps it.

    lora.layers=1, lora.targets=[q_proj, lm_head] and rank 8 with alpha 16 on a model of two blocks is

        modules      {"model.layers.1.self_attn.q_proj": (8, 2.0), "lm_head": (8, 2.0)}
        last_blocks  LastBlocks(("lm_head", "self_attn.q_proj"), 1)
    """

    # Path in the model of each adapted layer -> (rank, scale of the update). In this order they get their random start.
    modules: Mapping[str, tuple[int, float]]
    # Paths in the model of the layers trained in full.
    trained: tuple[str, ...] = ()
    # "lora", "rslora" (which differs in its scale alone) or "dora".
    variant: str = "lora"
    # Share of the adapter's inputs that training zeroes, from 0 to below 1.
    dropout: float = 0.0
    # `modules` as mlx-lm's files put it, and so ours where this is known; None: files name each layer by its path.
    last_blocks: LastBlocks | None = None
    # Whether the head must not follow the trained embedding (an adapter from PEFT may say so).
    own_head: bool = False
    # Whether the head must be the trained embedding itself (the same).
    tied: bool = False
    # The original model on the hub, where an imported adapter names one.
    base: str = ""

    @staticmethod
    def of(model: nn.Module, section: LoraSection) -> AdapterPlan:
        """What a configuration asks of a model. Raises UserError naming what the model has."""
        count = len(model.layers)
        wanted = count if section.layers == "all" else section.layers
        if wanted > count:
            raise UserError(f"lora.layers {wanted}: the model has {count} blocks", f"Use 1 to {count}, or all.")
        inside = sorted({path for block in model.layers[count - wanted :] for path in linear_paths(block)})
        keys = set(inside)
        if section.targets != "all-linear":
            available = inside + outside_blocks(model, LINEAR)
            keys = {path for target in section.targets for path in _matching("lora.targets", target, available)}
        ranks: dict[str, int] = {}  # key -> the rank that lora.ranks gives it
        for name, rank in section.ranks.items():
            ranks.update(dict.fromkeys(_matching("lora.ranks", name, sorted(keys)), rank))
        last_blocks = LastBlocks(tuple(sorted(keys)), wanted)
        modules: dict[str, tuple[int, float]] = {}
        for path, key in places(model, last_blocks).items():
            rank = ranks.get(key, section.rank)
            modules[path] = (rank, VARIANTS[section.variant].scale(section.alpha, rank))
        trained = trained_paths(model, section.train_also, set(modules))
        if not (modules or trained):
            raise UserError(
                "this model has no layer that an adapter can be put on",
                "Take another model, or name layers to train in full: lora.train_also.",
            )
        return AdapterPlan(
            modules,
            trained=trained,
            variant=section.variant,
            dropout=section.dropout,
            last_blocks=last_blocks if set(ranks.values()) <= {section.rank} else None,
        )

    @staticmethod
    def read(folder: Path, model: nn.Module) -> AdapterPlan:
        """The adapter of a run folder (or any mlx-lm adapter folder) on a model that has none yet.

        Raises UserError when the folder holds none, or one of more blocks than the model has.
        """
        return AdapterPlan.resolve(AdapterConfig.read(folder), folder, model)

    @staticmethod
    def resolve(saved: AdapterConfig, folder: Path, model: nn.Module) -> AdapterPlan:
        """The same for a configuration that was read. folder: where from, for messages."""
        blocks = len(model.layers)
        if saved.num_layers > blocks:
            raise UserError(f"{folder}: the adapter covers {saved.num_layers} blocks, the model has {blocks}")
        modules: Mapping[str, tuple[int, float]] = saved.modules
        last_blocks = None
        if not modules:
            count = saved.num_layers if saved.num_layers > 0 else blocks  # 0 or less is mlx-lm's way to say all
            last_blocks = LastBlocks(saved.keys, count)
            modules = dict.fromkeys(places(model, last_blocks), (saved.rank, saved.scale))
        return AdapterPlan(
            modules,
            trained=saved.trained,
            variant=saved.variant,
            dropout=saved.dropout,
            last_blocks=last_blocks,
            own_head=saved.own_head,
            tied=saved.tied,
            base=saved.base,
        )

    @property
    def config(self) -> AdapterConfig:
        """adapter_config.json of this plan."""
        rank, scale = next(iter(self.modules.values()), (0, 0.0))
        last_blocks = self.last_blocks
        return AdapterConfig(
            rank,
            scale,
            dropout=self.dropout,
            keys=last_blocks.keys if last_blocks is not None else (),
            num_layers=last_blocks.count if last_blocks is not None else 0,
            variant=self.variant,
            modules=self.modules if last_blocks is None else {},
            trained=self.trained,
            own_head=self.own_head,
            base=self.base,
            tied=self.tied,
        )

    @property
    def file(self) -> str:
        """Name of the file of tensors: mlx-lm's where its layout holds the whole adapter, else our own."""
        return self.config.file


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


def places(model: nn.Module, last_blocks: LastBlocks) -> dict[str, str]:
    """Path in the model -> key, for every layer that is meant: block by block, then those outside the blocks."""
    keys, modules = set(last_blocks.keys), dict(model.named_modules())
    first = len(model.layers) - last_blocks.count
    found = {}
    for block in block_paths(model)[first:]:
        for path in linear_paths(modules[block]):
            if path in keys:
                found[f"{block}.{path}"] = path
    for path in outside_blocks(model, LINEAR):
        if path in keys:
            found[path] = path
    return found


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
        paths = groups.get(name) or _below(leaves, name)
        if not paths:
            hint = "Use norms, embeddings, head, or a module's path such as layers.0.mlp."
            if name == "head":
                hint = "It is tied to the embedding here: use embeddings."
            raise UserError(f"lora.train_also: this model has no {name!r}", hint)
        # An adapter and full training of one matrix would be two answers to one question; full training wins by name.
        both = [path for path in paths if path in adapted]
        if both and name not in groups:
            raise UserError(
                f"lora.train_also: {both[0]} has an adapter as well", "Leave it out of lora.targets or lora.layers."
            )
        chosen.update(path for path in paths if path not in adapted)
    return tuple(path for path in leaves if path in chosen)


def _below(paths: Iterable[str], name: str) -> list[str]:
    """The paths that a module's name is a part of: layers.1 is in model.layers.1.mlp, not in model.layers.11.mlp."""
    part = re.compile(rf"(^|\.){re.escape(name)}(\.|$)")
    return [path for path in paths if part.search(path)]

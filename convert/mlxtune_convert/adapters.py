"""MLX adapter folders: mlx-lm's layout, and our own where that cannot hold the adapter.

What mlx-lm's layout cannot hold (several ranks, layers trained in full) is saved under another file name, so that
mlx-lm refuses it instead of running half an adapter. Both are safetensors files of `<path>.lora_a` and `<path>.lora_b`
(and `<path>.m` in DoRA), by the layer's path in MLX, beside an adapter_config.json.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors.numpy import load_file

from mlxtune_convert.errors import UserError
from mlxtune_convert.files import read_json, refuse_links_out, write_json
from mlxtune_convert.peft.adapter_folder import Adapter, Update
from mlxtune_convert.peft.tensors import is_head
from mlxtune_convert.tensors import read_header, require_fractions, save_checked

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapters.safetensors"
OWN_FILE = "mlxtune_adapters.safetensors"
OWN_TYPE = "mlxtune"
LARGEST_RANK = 1 << 16  # more than any layer is wide
FACTORS = ("lora_a", "lora_b", "m")
# PEFT's own merge_and_unload puts the update of one into the other where they are one matrix.
UNTIE = (
    "Train it with ensure_weight_tying, or make a base with two: load the original model in transformers as m, then "
    "`m.lm_head.weight = torch.nn.Parameter(m.lm_head.weight.clone()); m.config.tie_word_embeddings = False; "
    "m.save_pretrained('untied')`; convert that folder (with the tokenizer in it) and name it: --base."
)
OTHER_MODEL = (
    "Use the model that the adapter was trained on. If it came from PEFT, convert it again with --base MODEL: what "
    "layers are called depends on the model's family."
)
LAYER = re.compile(r"(.+?)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Spec:
    """What an adapter is: enough to build it again on the same base."""

    rank: int  # of every adapted layer, where `modules` does not say it
    scale: float  # of the update: alpha / rank, in rsLoRA alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)
    dropout: float  # part of a layer's inputs that training leaves out
    keys: tuple[str, ...]  # paths of the adapted layers inside a block (or in the model, outside of its blocks)
    num_layers: int  # how many blocks are adapted, counted from the last one
    variant: str = "lora"  # or "dora", "rslora"
    # Path in the model -> (rank, scale), where these are not the same everywhere: replaces keys and num_layers.
    modules: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    trained: tuple[str, ...] = ()  # paths of the layers trained in full
    own_head: bool = False  # the head is not to follow a trained embedding
    base: str = ""  # the original model on the hub, where an imported adapter names one
    tied: bool = False  # the head is the trained embedding itself

    @property
    def file(self) -> str:
        """mlx-lm's name where its layout holds the whole adapter, else our own."""
        return OWN_FILE if self.modules or self.trained else ADAPTER_FILE

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The adapter that a run folder (or any mlx-lm adapter folder) holds. Raises UserError when it holds none."""
        if not folder.is_dir():
            raise UserError(f"no adapter folder {folder}")
        refuse_links_out(folder)
        config = read_json(folder / CONFIG_FILE, "an adapter folder: adapters.safetensors and adapter_config.json")
        if "peft_type" in config:
            first = f"Convert it first: mlxtune convert {folder} ADAPTER (or mlxtune-convert to-mlx)"
            raise UserError(f"{folder} is a PEFT adapter", first)
        kind = config.get("fine_tune_type", "lora")
        if kind not in ("lora", "dora", OWN_TYPE):
            raise UserError(
                f"{folder}: adapters of type {kind!r} cannot be used yet", "Only LoRA and DoRA adapters can."
            )
        try:
            return cls._of_config(config, kind, folder)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{folder / CONFIG_FILE}: not an MLX adapter's configuration ({error})") from error

    @classmethod
    def _of_config(cls, config: dict[str, Any], kind: str, folder: Path) -> Self:
        """config: an adapter_config.json that may hold anything; kind: its fine_tune_type."""
        own = kind == OWN_TYPE
        parameters = config.get("lora_parameters", {}) if own else config["lora_parameters"]
        modules = {}
        for path, module in config.get("modules", {}).items():
            modules[path] = (int(module["rank"]), float(module["scale"]))
        uniform = (int(parameters.get("rank", 0)), float(parameters.get("scale", 0.0)))
        for some_rank, some_scale in [uniform, *modules.values()]:
            if not 0 <= some_rank <= LARGEST_RANK or not math.isfinite(some_scale):
                raise ValueError(f"rank {some_rank}, scale {some_scale:g}")
        rank, scale = next(iter(modules.values()), uniform)
        return cls(
            rank,
            scale,
            dropout=float(parameters.get("dropout", config.get("dropout", 0.0))),
            keys=tuple(parameters.get("keys") or _keys_in(folder)),
            num_layers=int(config.get("num_layers", 0) if own else config["num_layers"]),
            variant=str(config.get("variant", kind)),
            modules=modules,
            trained=tuple(config.get("trained", ())),
            own_head=bool(config.get("own_head", False)),
            base=str(config.get("base_model", "")),
            tied=bool(config.get("tied", False)),
        )

    def save(self, folder: Path) -> None:
        """adapter_config.json, as mlx-lm reads it where it can hold the adapter."""
        if self.file == OWN_FILE:
            config = {"fine_tune_type": OWN_TYPE, **self._own()}
        else:
            config = {"fine_tune_type": "dora" if self.variant == "dora" else "lora", **self._uniform()}
        config["variant"] = self.variant
        if self.base:
            config["base_model"] = self.base
        write_json(folder / CONFIG_FILE, config)

    def _own(self) -> dict[str, Any]:
        """What our own layout says."""
        chosen = {path: {"rank": rank, "scale": scale} for path, (rank, scale) in self.modules.items()}
        own = {"dropout": self.dropout, "modules": chosen, "trained": list(self.trained), "own_head": self.own_head}
        if self.tied:
            own["tied"] = True
        return own if chosen else {**own, **self._uniform()}

    def check_head(self, own_head: bool, folder: Path) -> None:
        """Raise UserError for an adapter that needs embedding and head apart where the model has one matrix, and the
        reverse. own_head: whether the model has a head beside the embedding; folder: the adapter's.
        """
        if own_head:
            if self.tied:
                raise UserError(
                    f"{folder}: its embedding is its head as well; this model has a matrix for each", OTHER_MODEL
                )
            return
        what = "its embedding was trained beside the old head" if self.own_head else ""
        if any(is_head(path) for path in (*self.keys, *self.modules, *self.trained)):
            what = "its head was trained apart from the embedding"
        if what:
            raise UserError(f"{folder}: {what}; this model has one matrix for both", UNTIE)

    def _uniform(self) -> dict[str, Any]:
        """What mlx-lm's layout says: one rank and scale for all adapted layers."""
        parameters = {"rank": self.rank, "scale": self.scale, "dropout": self.dropout, "keys": list(self.keys)}
        return {"num_layers": self.num_layers, "lora_parameters": parameters}


def other_rows(rows: int, known: int) -> str:
    """What to do where a trained embedding or head has other rows than its model, which knows so many tokens."""
    if rows < known:
        return (
            f"Its vocabulary was cut to {rows} tokens: do the same to the original model "
            f"(resize_token_embeddings({rows})), and convert that."
        )
    return (
        f"{rows - known} tokens were added to it. Put the tokenizer that was saved with it (tokenizer.json, "
        "tokenizer_config.json) into its folder and convert it again."
    )


def adapter_file(folder: Path) -> Path | None:
    """The tensors of an adapter folder, or None."""
    return next((folder / name for name in (OWN_FILE, ADAPTER_FILE) if (folder / name).is_file()), None)


def _keys_in(folder: Path) -> list[str]:
    """Module paths inside a block, from the tensors' names: mlx-lm leaves them out when it adapts every layer."""
    names = read_header(folder / ADAPTER_FILE) if (folder / ADAPTER_FILE).is_file() else {}
    matches = (re.search(r"layers\.\d+\.(.+)\.lora_a$", name) for name in names)
    return sorted({match[1] for match in matches if match})


def read_adapter(folder: Path) -> tuple[Adapter, Spec]:
    """An MLX adapter folder without its model: updates and layers trained in full by their paths in MLX, float32.

    Raises UserError for tensors that are no pair of factors, of another rank than the configuration says, or that it
    does not name.
    """
    spec = Spec.read(folder)
    file = folder / spec.file
    if not file.is_file():
        raise UserError(f"{folder} has no {spec.file}", "The run saved no adapter: train it, or resume it.")
    read_header(file)
    factors: dict[str, dict[str, np.ndarray]] = {}  # path -> lora_a, lora_b, m
    trained: dict[str, np.ndarray] = {}
    for name, array in sorted(load_file(file).items()):
        path, _, part = name.rpartition(".")
        require_fractions(file, name, array)
        if path in spec.trained:
            trained[name] = array.astype(np.float32)
        elif part in FACTORS:
            factors.setdefault(path, {})[part] = array.astype(np.float32)
        else:
            raise UserError(f"{file}: {CONFIG_FILE} does not say what the tensor {name} is", "Copy the folder again.")
    missing = set(spec.trained) - {name.rpartition(".")[0] for name in trained}
    missing |= spec.modules.keys() - factors.keys()
    if missing or not (factors or trained):
        raise UserError(f"{file}: the adapter of {min(missing, default='any layer')} is missing", "Copy it again.")
    updates = {path: _update(spec, path, parts, file) for path, parts in factors.items()}
    blocks = {match[2] for match in map(LAYER.fullmatch, updates) if match}
    if not spec.modules and 0 < spec.num_layers < len(blocks):  # fewer: not every block has such a layer
        raise UserError(
            f"{file}: it adapts {len(blocks)} blocks, {CONFIG_FILE} says {spec.num_layers}", "Copy it again."
        )
    kind = spec.variant == "rslora"
    return Adapter(updates, trained, spec.dropout, kind, spec.base, own_head=spec.own_head, tied=spec.tied), spec


def _update(spec: Spec, path: str, parts: dict[str, np.ndarray], file: Path) -> Update:
    """The update of one layer, its shapes and rank checked. parts: lora_a, lora_b and, in DoRA, m (see `Update`)."""
    if spec.modules and path not in spec.modules:
        raise UserError(f"{file}: {CONFIG_FILE} does not name {path}", "Copy the folder again.")
    rank, scale = spec.modules.get(path, (spec.rank, spec.scale))
    wanted = list(FACTORS if spec.variant == "dora" else FACTORS[:2])
    if sorted(parts) != wanted:
        raise UserError(f"{file}: {path} has {', '.join(sorted(parts))}, not {', '.join(wanted)}")
    a, b = parts["lora_a"], parts["lora_b"]
    if not 2 <= a.ndim == b.ndim <= 3 or a.shape[:-2] != b.shape[:-2]:
        raise UserError(f"{file}: the factors of {path} do not fit each other: {a.shape} and {b.shape}")
    update = Update(a, b, scale, parts.get("m"))
    rank_of_b = b.shape[2] if update.of_experts else b.shape[0]
    if update.rank != rank or rank_of_b != rank:
        raise UserError(f"{file}: {path} has rank {update.rank}, {CONFIG_FILE} says {rank}")
    return update


def save_adapter(work: Path, adapter: Adapter, layers: int | None) -> Spec:
    """Write an adapter under MLX's names as an MLX adapter folder. layers: blocks of the base, None: not known."""
    spec = _spec(adapter, layers)
    tensors = dict(adapter.trained)
    for path, update in adapter.updates.items():
        tensors.update({f"{path}.lora_a": update.a, f"{path}.lora_b": update.b})
        if update.m is not None:
            tensors[f"{path}.m"] = update.m
    save_checked(work / spec.file, tensors, {"format": "mlx"})
    spec.save(work)
    return spec


def _spec(adapter: Adapter, layers: int | None) -> Spec:
    """mlx-lm's layout where the last blocks (all, where their number is not known) are adapted alike, else each layer
    by its path."""
    modules = {path: (update.rank, update.scale) for path, update in adapter.updates.items()}
    blocks: dict[int, set[str]] = {}  # number -> paths of the adapted layers inside
    outside = set()
    for path in modules:
        match = LAYER.fullmatch(path)
        if match:
            blocks.setdefault(int(match[2]), set()).add(match[3])
        else:
            outside.add(path)
    keys = set().union(*blocks.values())
    same_layers = all(inside == keys for inside in blocks.values())
    same_size = len(set(modules.values())) == 1
    alike = same_layers and same_size and _are_the_last(set(blocks), layers, adapter.some_blocks)
    rank, scale = next(iter(modules.values()), (0, 0.0))
    return Spec(
        rank,
        scale,
        dropout=adapter.dropout,
        keys=tuple(sorted(keys | outside)) if alike else (),
        num_layers=len(blocks) if alike else 0,
        variant=_variant(adapter),
        modules={} if alike else modules,
        trained=tuple(dict.fromkeys(name.rpartition(".")[0] for name in adapter.trained)),
        own_head=adapter.own_head,
        base=adapter.base,
        tied=adapter.tied,
    )


def _are_the_last(blocks: set[int], layers: int | None, some_blocks: bool) -> bool:
    """Whether the numbers of adapted blocks are those of the last ones of `layers` (None: not known), or of all.

    some_blocks: the adapter was made for some of its base's blocks.
    """
    if not blocks:
        return False
    if layers is not None:
        return blocks == set(range(min(blocks), layers))
    # They may be the first ones: then nothing says how many blocks come after them.
    return blocks == set(range(len(blocks))) and not some_blocks


def _variant(adapter: Adapter) -> str:
    if any(update.m is not None for update in adapter.updates.values()):
        return "dora"
    return "rslora" if adapter.rslora else "lora"

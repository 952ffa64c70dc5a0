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
# Each variant of LoRA -> the tensors that it saves of an adapted layer.
VARIANTS = {"lora": ("lora_a", "lora_b"), "rslora": ("lora_a", "lora_b"), "dora": ("lora_a", "lora_b", "m")}
FACTORS = tuple(dict.fromkeys(name for names in VARIANTS.values() for name in names))  # of any variant
# The variants that mlx-lm's own files hold, under its word for them. Another goes into a file that mlx-lm refuses.
MLX_LM_TYPES = {"lora": "lora", "rslora": "lora", "dora": "dora"}
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
class AdapterConfig:
    """adapter_config.json of an MLX adapter folder, as it lies on the disk: enough to build the adapter again on its
    base.

    It has two forms. mlx-lm's says the same of every block from some block on, and serves where that is the whole
    truth: "rank 8 on self_attn.q_proj in the last 4 blocks" is rank 8, keys ("self_attn.q_proj",), num_layers 4. Ours
    names each layer by its path in the model, with a rank and a scale of its own: `modules`.
    """

    # Of the update, in mlx-lm's form; in ours that of the first layer.
    rank: int
    # What the update B A is multiplied by: alpha / rank, or alpha / sqrt(rank) in rsLoRA (Kalajdzievski 2023,
    # arXiv:2312.03732). In our form that of the first layer.
    scale: float
    # Share of the adapter's inputs that training zeroes, from 0 to below 1.
    dropout: float
    # mlx-lm's form: paths of the adapted layers inside a block, or in the model where they are in no block.
    keys: tuple[str, ...]
    # mlx-lm's form: how many blocks, from the last one back; 0 or less: all.
    num_layers: int
    # "lora", "rslora" or "dora".
    variant: str = "lora"
    # Our form: path in the model -> (rank, scale). Not empty: it replaces keys and num_layers.
    modules: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    # Paths in the model of the layers trained in full.
    trained: tuple[str, ...] = ()
    # Whether the head must not follow the trained embedding.
    own_head: bool = False
    # The original model on the hub, where an imported adapter names one.
    base: str = ""
    # Whether the head must be the trained embedding itself.
    tied: bool = False

    @property
    def file(self) -> str:
        """mlx-lm's name where its layout holds the whole adapter, else our own."""
        held = self.variant in MLX_LM_TYPES and not self.modules and not self.trained
        return ADAPTER_FILE if held else OWN_FILE

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
        variant = config.get("variant", "dora" if kind == "dora" else "lora")
        if not isinstance(variant, str) or variant not in VARIANTS:
            raise UserError(
                f"{folder}: adapters of the variant {str(variant)[:40]!r} cannot be used yet",
                f"Known: {', '.join(VARIANTS)}.",
            )
        try:
            if kind == OWN_TYPE:
                parameters, num_layers = config.get("lora_parameters", {}), int(config.get("num_layers", 0))
            else:
                parameters, num_layers = config["lora_parameters"], int(config["num_layers"])
            modules = {path: (int(of["rank"]), float(of["scale"])) for path, of in config.get("modules", {}).items()}
            common = (int(parameters.get("rank", 0)), float(parameters.get("scale", 0.0)))
            for some_rank, some_scale in [common, *modules.values()]:
                if not 0 <= some_rank <= LARGEST_RANK or not math.isfinite(some_scale):
                    raise ValueError(f"rank {some_rank}, scale {some_scale:g}")
            rank, scale = next(iter(modules.values()), common)
            return cls(
                rank,
                scale,
                dropout=float(parameters.get("dropout", config.get("dropout", 0.0))),
                keys=_names(parameters.get("keys") or _keys_in(folder)),
                num_layers=num_layers,
                variant=variant,
                modules=modules,
                trained=_names(config.get("trained", [])),
                own_head=bool(config.get("own_head", False)),
                base=str(config.get("base_model", "")),
                tied=bool(config.get("tied", False)),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{folder / CONFIG_FILE}: not an MLX adapter's configuration ({error})") from error

    def save(self, folder: Path) -> None:
        """Write adapter_config.json, as mlx-lm reads it where it can hold the adapter."""
        out: dict[str, Any] = {}
        if self.file == ADAPTER_FILE:
            out = {"fine_tune_type": MLX_LM_TYPES[self.variant]}
        else:
            chosen = {path: {"rank": rank, "scale": scale} for path, (rank, scale) in self.modules.items()}
            out = {"fine_tune_type": OWN_TYPE, "dropout": self.dropout, "modules": chosen}
            out |= {"trained": list(self.trained), "own_head": self.own_head}
            if self.tied:
                out["tied"] = True
        if not self.modules:
            out["num_layers"] = self.num_layers
            out["lora_parameters"] = {
                "rank": self.rank,
                "scale": self.scale,
                "dropout": self.dropout,
                "keys": list(self.keys),
            }
        out["variant"] = self.variant
        if self.base:
            out["base_model"] = self.base
        write_json(folder / CONFIG_FILE, out)

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


def _names(found: Any) -> tuple[str, ...]:
    """A list of layers' names in a configuration. Raises TypeError for anything else."""
    if not isinstance(found, list | tuple | set) or not all(isinstance(name, str) for name in found):
        raise TypeError(f"no list of names: {str(found)[:40]}")
    return tuple(found)


def _keys_in(folder: Path) -> list[str]:
    """Module paths inside a block, from the tensors' names: mlx-lm leaves them out when it adapts every layer."""
    names = read_header(folder / ADAPTER_FILE) if (folder / ADAPTER_FILE).is_file() else {}
    matches = (re.search(r"layers\.\d+\.(.+)\.lora_a$", name) for name in names)
    return sorted({match[1] for match in matches if match})


def read_adapter(folder: Path) -> tuple[Adapter, AdapterConfig]:
    """An MLX adapter folder without its model: updates and layers trained in full by their paths in MLX, float32.

    Raises UserError for tensors that are no pair of factors, of another rank than the configuration says, or that it
    does not name.
    """
    config = AdapterConfig.read(folder)
    file = folder / config.file
    if not file.is_file():
        raise UserError(f"{folder} has no {config.file}", "The run saved no adapter: train it, or resume it.")
    read_header(file)
    factors: dict[str, dict[str, np.ndarray]] = {}  # path -> lora_a, lora_b, m
    trained: dict[str, np.ndarray] = {}
    for name, array in sorted(load_file(file).items()):
        path, _, part = name.rpartition(".")
        require_fractions(file, name, array)
        if path in config.trained:
            trained[name] = array.astype(np.float32)
        elif part in FACTORS:
            factors.setdefault(path, {})[part] = array.astype(np.float32)
        else:
            raise UserError(f"{file}: {CONFIG_FILE} does not say what the tensor {name} is", "Copy the folder again.")
    missing = set(config.trained) - {name.rpartition(".")[0] for name in trained}
    missing |= config.modules.keys() - factors.keys()
    if missing or not (factors or trained):
        raise UserError(f"{file}: the adapter of {min(missing, default='any layer')} is missing", "Copy it again.")
    updates = {path: _update(config, path, parts, file) for path, parts in factors.items()}
    blocks = {match[2] for match in map(LAYER.fullmatch, updates) if match}
    if not config.modules and 0 < config.num_layers < len(blocks):  # fewer: not every block has such a layer
        raise UserError(
            f"{file}: it adapts {len(blocks)} blocks, {CONFIG_FILE} says {config.num_layers}", "Copy it again."
        )
    adapter = Adapter(
        updates,
        trained,
        config.dropout,
        config.variant == "rslora",
        config.base,
        own_head=config.own_head,
        tied=config.tied,
    )
    return adapter, config


def _update(config: AdapterConfig, path: str, parts: dict[str, np.ndarray], file: Path) -> Update:
    """The update of one layer, its shapes and rank checked."""
    if config.modules and path not in config.modules:
        raise UserError(f"{file}: {CONFIG_FILE} does not name {path}", "Copy the folder again.")
    rank, scale = config.modules.get(path, (config.rank, config.scale))
    wanted = set(VARIANTS[config.variant])
    if parts.keys() != wanted:
        raise UserError(f"{file}: {path} has {', '.join(sorted(parts))}, not {', '.join(sorted(wanted))}")
    a, b = parts["lora_a"], parts["lora_b"]
    if not 2 <= a.ndim == b.ndim <= 3 or a.shape[:-2] != b.shape[:-2]:
        raise UserError(f"{file}: the factors of {path} do not fit each other: {a.shape} and {b.shape}")
    ranks = (a.shape[-1], b.shape[0]) if a.ndim == 2 else (a.shape[1], b.shape[2])
    if ranks != (rank, rank):
        raise UserError(f"{file}: {path} has rank {ranks[0]}, {CONFIG_FILE} says {rank}")
    return Update(a, b, scale, parts.get("m"))


def save_adapter(work: Path, adapter: Adapter, layers: int | None) -> AdapterConfig:
    """Write an adapter under MLX's names as an MLX adapter folder. layers: blocks of the base, None: not known."""
    config = _config(adapter, layers)
    tensors = dict(adapter.trained)
    for path, update in adapter.updates.items():
        tensors.update({f"{path}.lora_a": update.a, f"{path}.lora_b": update.b})
        if update.m is not None:
            tensors[f"{path}.m"] = update.m
    save_checked(work / config.file, tensors, {"format": "mlx"})
    config.save(work)
    return config


def _config(adapter: Adapter, layers: int | None) -> AdapterConfig:
    """mlx-lm's form where the last blocks (all, where their number is not known) are adapted alike, else each layer by
    its path."""
    modules = {path: (update.rank, update.scale) for path, update in adapter.updates.items()}
    blocks: dict[int, set[str]] = {}  # number of a block -> paths in it
    outside: set[str] = set()
    for path in modules:
        match = LAYER.fullmatch(path)
        if match:
            blocks.setdefault(int(match[2]), set()).add(match[3])
        else:
            outside.add(path)
    inside = set().union(*blocks.values())
    first = 0 if layers is None else min(blocks, default=0)
    last_ones = bool(blocks) and set(blocks) == set(range(first, layers or len(blocks)))
    if layers is None and adapter.some_blocks:
        last_ones = False  # or the first ones: nothing says how many blocks come after them
    alike = last_ones and all(block == inside for block in blocks.values()) and len(set(modules.values())) == 1
    variant = "rslora" if adapter.rslora else "lora"
    if any(update.m is not None for update in adapter.updates.values()):
        variant = "dora"
    rank, scale = next(iter(modules.values()), (0, 0.0))
    return AdapterConfig(
        rank,
        scale,
        dropout=adapter.dropout,
        keys=tuple(sorted(inside | outside)) if alike else (),
        num_layers=len(blocks) if alike else 0,
        variant=variant,
        modules={} if alike else modules,
        trained=tuple(dict.fromkeys(name.rpartition(".")[0] for name in adapter.trained)),
        own_head=adapter.own_head,
        base=adapter.base,
        tied=adapter.tied,
    )

"""PEFT adapter folders <-> low-rank updates in MLX's layout, bit for bit.

PEFT computes x A^T B^T * scaling with A [r, in] and B [out, r]; MLX computes x a b * scale with a [in, r], b [r, out].
So A = a^T, B = b^T, and scaling = lora_alpha / r, or lora_alpha / sqrt(r) in rsLoRA: transposes, no arithmetic. Experts
are one parameter each of gate_up_proj and down_proj (`target_parameters`): A is [E * r, in], B [out, r * E] with the
expert varying fastest; gate and up are the two halves of one update of rank 2r.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from mlxtune_convert.errors import UserError
from mlxtune_convert.files import read_json, write_json
from mlxtune_convert.tensors import read_header, save_checked

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Keys that change nothing we do: who made it, which layers it chose (the tensors say so), how training began or runs.
READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern"),
    *("modules_to_save", "target_modules", "target_parameters", "base_model_name_or_path", "ensure_weight_tying"),
    *("task_type", "inference_mode", "revision", "auto_mapping", "peft_version", "exclude_modules", "layers_pattern"),
    *("layers_to_transform", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "eva_config"),
    *("init_lora_weights", "bias"),
}
# Initialisations that leave the base as it is; the others (PiSSA, OLoRA, LoftQ, CorDA) train beside a changed one.
KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Update:
    """One adapted layer: a [in, r], b [r, out], m [out] in DoRA. Experts: a [E, r, in], b [E, out, r]."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    m: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return int(self.a.shape[-1] if self.a.ndim == 2 else self.a.shape[-2])


@dataclass(frozen=True)
class Adapter:
    """An adapter under PEFT's names. updates: by module path in the transformers model, with `:down_proj`,
    `:gate_up_proj#gate` and such for experts, and `:weight` for a parameter that is no linear layer; trained: whole
    tensors by name."""

    updates: dict[str, Update]
    trained: dict[str, np.ndarray] = field(default_factory=dict)
    dropout: float = 0.0
    rslora: bool = False
    base: str = ""
    own_head: bool = False  # the embedding is trained and a tied head would not follow it
    tied: bool = False  # the embedding is trained and is the head as well
    transposed: bool = False  # transformers keeps the linear layers as Conv1D (GPT-2)
    some_blocks: bool = False  # it was made for some blocks of its base, not for all


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write adapter_model.safetensors and adapter_config.json."""
    tensors = {PREFIX + name: array for name, array in adapter.trained.items()}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    parameters = []
    updates = _joined(adapter.updates)
    for target, update in updates.items():
        module, _, parameter = target.partition(":")
        name = target.replace(":", ".")
        parameters += [name] if parameter else []
        ranks[name] = update.rank
        alphas[name] = _alpha(update.scale, math.sqrt(update.rank) if adapter.rslora else update.rank)
        # PEFT wraps the experts once per parameter: gate_up_proj ends up inside.
        inner = ".base_layer" if parameter == "gate_up_proj" and f"{module}:down_proj" in updates else ""
        a, b = update.a.T, update.b.T
        if update.a.ndim == 3:
            a, b = update.a.reshape(-1, a.shape[0]), update.b.transpose(1, 2, 0).reshape(b.shape[1], -1)
        for letter, array in (("A", a), ("B", b)):
            tensors[f"{PREFIX}{module}{inner}.lora_{letter}.weight"] = np.ascontiguousarray(array)
        if update.m is not None:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = update.m
    dora = any(update.m is not None for update in updates.values())
    if dora and parameters:
        raise UserError(
            f"PEFT has no DoRA for experts, routers and their like ({parameters[0]})",
            "`mlxtune export --to hf` exports the merged model.",
        )
    save_checked(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    rank, alpha = (Counter(found.values() or [8]).most_common(1)[0][0] for found in (ranks, alphas))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base or None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        # PEFT refuses dropout on parameters; it matters to training alone.
        "lora_dropout": 0.0 if parameters else adapter.dropout,
        "bias": "none",
        "fan_in_fan_out": adapter.transposed,
        "use_rslora": adapter.rslora,
        "use_dora": dora,
        "inference_mode": True,
        # Full paths: exactly these modules, whatever else in the model has the same last name.
        "target_modules": sorted(ranks.keys() - set(parameters)),
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in adapter.trained}) or None,
        "ensure_weight_tying": adapter.tied,
    }
    write_json(folder / CONFIG_FILE, config)


def _joined(updates: dict[str, Update]) -> dict[str, Update]:
    """The same with gate and up of the experts as one update: of one A where they have the same, else of twice the
    rank, each with its half of B."""
    out = {target: update for target, update in updates.items() if "#" not in target}
    for target in dict.fromkeys(name.rpartition("#")[0] for name in updates if "#" in name):
        gate, up = (updates.get(f"{target}#{half}") for half in ("gate", "up"))
        if gate is None or up is None or gate.scale != up.scale:
            raise UserError(
                f"{target}: PEFT adapts gate and up of the experts together, with one scale",
                "Train both or neither; `mlxtune fuse` merges this adapter.",
            )
        a, b = gate.a, np.concatenate([gate.b, up.b], 1)
        if gate.a.tobytes() != up.a.tobytes():
            rows = gate.b.shape[1]
            a, b = np.concatenate([gate.a, up.a], 1), np.zeros((len(b), 2 * rows, gate.rank + up.rank), b.dtype)
            b[:, :rows, : gate.rank], b[:, rows:, gate.rank :] = gate.b, up.b
        out[target] = Update(a, b, gate.scale)
    return out


def _alpha(scale: float, divisor: float) -> float:
    """The lora_alpha that PEFT divides back into exactly `scale`, a whole number where one does."""
    near = scale * divisor
    tries = (float(round(near)), round(near, 6), near, np.nextafter(near, 0.0), np.nextafter(near, np.inf))
    alpha = next((float(value) for value in tries if value / divisor == scale), near)
    return int(alpha) if alpha.is_integer() else alpha


def read_adapter(folder: Path) -> Adapter:
    """A PEFT adapter folder.

    Raises UserError naming the key of whatever would be understood wrongly or not at all: another kind of adapter,
    biases, an initialisation that changed the base, LoRA on embeddings.
    """
    config = read_json(folder / CONFIG_FILE, "a PEFT adapter: adapter_config.json and adapter_model.safetensors")
    _refuse_unknown(folder / CONFIG_FILE, config)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise UserError(f"{folder} has no {WEIGHTS_FILE}", "Pickled adapters (.bin) are never loaded: save it again.")
    read_header(file)
    factors: dict[str, dict[str, np.ndarray]] = {}  # module -> A, B, magnitude_vector
    trained: dict[str, np.ndarray] = {}
    for name, array in load_file(file).items():
        name = name.removeprefix(PREFIX)
        match = re.fullmatch(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.weight)?", name)
        module = f".{name.rpartition('.')[0]}."
        if match:
            factors.setdefault(match[1], {})[match[2]] = array.astype(np.float32)
        elif name.endswith((".base_layer.weight", ".base_layer.bias")):
            continue  # PEFT's copy of the frozen head or embedding that it adapts
        elif any(f".{part}." in module for part in config.get("modules_to_save") or ()):
            trained[name] = array.astype(np.float32)
        else:
            raise UserError(f"{file}: the tensor {name} is not understood", "LoRA on linear layers can be read.")
    updates: dict[str, Update] = {}
    for module, parts in factors.items():
        if not {"A", "B"} <= parts.keys():
            raise UserError(f"{file}: {module} lacks lora_A or lora_B", "It is incomplete: copy or download it again.")
        updates |= _updates(config, module, parts, factors.keys(), file)
    head = trained.get("lm_head.weight")
    own = any("embed" in name for name in trained) and head is None and not config.get("ensure_weight_tying")
    if head is not None and any(_same(array, head) for name, array in trained.items() if name != "lm_head.weight"):
        del trained["lm_head.weight"]  # written for a tied model: one matrix under both names
    return Adapter(
        updates,
        trained,
        float(config.get("lora_dropout") or 0.0),
        bool(config.get("use_rslora")),
        str(config.get("base_model_name_or_path") or ""),
        own,
        some_blocks=config.get("layers_to_transform") is not None,
    )


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def _refuse_unknown(where: Path, config: dict[str, Any]) -> None:
    changed_base = (
        "It trained beside a changed base: merge it with PEFT, or convert it to plain LoRA there "
        "(path_initial_model_for_weight_conversion)."
    )
    checks = [
        ("peft_type", config.get("peft_type") == "LORA", "LORA adapters can be read."),
        ("bias", config.get("bias", "none") == "none", "Only 'none': biases stay the base's."),
        ("init_lora_weights", config.get("init_lora_weights") in KEEPS_BASE, changed_base),
    ]
    for key, value in config.items():
        checks.append((key, key in READ or value in (None, False, "", [], {}), "Merge it with PEFT first."))
    for key, fine, hint in checks:
        if not fine:
            raise UserError(f"{where}: {key} {config.get(key)!r} is not understood", hint)


def _updates(
    config: dict[str, Any], module: str, parts: dict[str, np.ndarray], modules: Collection[str], file: Path
) -> dict[str, Update]:
    """The update of one PEFT module: one, or two for the experts' gate_up_proj. modules: all that are adapted."""
    a, b, m = parts["A"], parts["B"], parts.get("magnitude_vector")
    parameter = _parameter(config, module, modules)
    module = module.removesuffix(".base_layer")
    name = f"{module}.{parameter}" if parameter else module
    target = f"{module}:{parameter}" if parameter else module
    rank = int(_pattern(config.get("rank_pattern"), name, config["r"]))
    alpha = float(_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if parameter in ("", "weight"):
        if a.shape[0] != rank:
            raise UserError(f"{file}: {module} has rank {a.shape[0]}, adapter_config.json says {rank}")
        m = None if m is None else m.reshape(-1)
        return {target: Update(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), scale, m)}
    experts = a.shape[0] // rank
    a, b = a.reshape(experts, rank, -1), b.reshape(b.shape[0], rank, experts).transpose(2, 0, 1)
    if parameter != "gate_up_proj":
        return {target: Update(a, np.ascontiguousarray(b), scale)}
    out, r = b.shape[1] // 2, rank // 2
    gate, up = b[:, :out], b[:, out:]
    halves = {"gate": (a, gate), "up": (a, up)}
    if rank % 2 == 0 and not gate[..., r:].any() and not up[..., :r].any():  # our own block form
        halves = {"gate": (a[:, :r], gate[..., :r]), "up": (a[:, r:], up[..., r:])}
    return {
        f"{target}#{half}": Update(np.ascontiguousarray(one), np.ascontiguousarray(two), scale)
        for half, (one, two) in halves.items()
    }


def _parameter(config: dict[str, Any], module: str, modules: Collection[str]) -> str:
    """Which parameter of `module` PEFT adapts, or "" when it is a linear layer."""
    wanted = config.get("target_parameters") or []
    plain = module.removesuffix(".base_layer")
    found = {p.rpartition(".")[2] for p in wanted if f"{plain}.{p.rpartition('.')[2]}".endswith(p)}
    if len(found) < 2:
        return next(iter(found), "")
    if f"{plain}.base_layer" not in modules:
        raise UserError(f"{module}: which of its parameters is adapted cannot be told", "Merge it with PEFT first.")
    return "gate_up_proj" if module.endswith(".base_layer") else "down_proj"


def _pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of a module's path."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def check_adapter(folder: Path, adapter: Adapter) -> int:
    """Read the folder back; return how many tensors are the given ones bit for bit. Raises UserError otherwise."""
    found, expected = _arrays(read_adapter(folder)), _arrays(adapter)
    if adapter.tied:  # a second name of the embedding, left out in reading
        expected.pop("lm_head.weight", None)
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected or not _same(found[name], expected[name]):
            raise UserError(f"{name}: the file does not hold what was trained", "Check the disk.")
    return len([name for name in found if not name.endswith(".scale")])


def _arrays(adapter: Adapter) -> dict[str, np.ndarray]:
    out = dict(adapter.trained)
    for path, update in adapter.updates.items():
        parts = {"a": update.a, "b": update.b, "m": update.m, "scale": np.array(update.scale)}
        out |= {f"{path}.{name}": array for name, array in parts.items() if array is not None}
    return out

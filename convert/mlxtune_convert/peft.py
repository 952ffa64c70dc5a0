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
    """One adapted layer: a [in, r], b [r, out], m [out] in DoRA. Experts: a [E, r, in], b [E, out, r]; `half` is "gate"
    or "up" for the two that share PEFT's gate_up_proj."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    m: np.ndarray | None = None
    half: str = ""


@dataclass(frozen=True)
class Adapter:
    """An adapter under PEFT's names. updates: by module path in the transformers model, with `.gate_up_proj:gate` and
    such for experts, and `:weight` for a parameter that is no linear layer; trained: whole tensors by name."""

    updates: dict[str, Update]
    trained: dict[str, np.ndarray] = field(default_factory=dict)
    dropout: float = 0.0
    rslora: bool = False
    base: str = ""
    own_head: bool = False  # the embedding is trained and a tied head would not follow it
    tied: bool = False  # the embedding is trained and is the head as well
    transposed: bool = False  # transformers keeps the linear layers as Conv1D (GPT-2)


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write adapter_model.safetensors and adapter_config.json."""
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    parameters = []
    for target, (a, b, scale, m) in _targets(adapter).items():
        module, _, parameter = target.partition(":")
        name = f"{module}.{parameter}" if parameter else module
        parameters += [name] if parameter else []
        ranks[name] = a.shape[-2] if a.ndim == 3 else a.shape[0]
        alphas[name] = _alpha(scale, math.sqrt(ranks[name]) if adapter.rslora else ranks[name])
        # PEFT wraps the experts once per parameter: gate_up_proj ends up inside.
        inner = ".base_layer" if parameter == "gate_up_proj" and f"{module}:down_proj" in _targets(adapter) else ""
        place = f"{PREFIX}{module}{inner}"
        if a.ndim == 3:
            a, b = a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)
        tensors[f"{place}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{place}.lora_B.weight"] = np.ascontiguousarray(b)
        if m is not None:
            tensors[f"{place}.lora_magnitude_vector"] = m
    tensors.update({PREFIX + name: array for name, array in adapter.trained.items()})
    dora = any(update.m is not None for update in adapter.updates.values())
    if dora and parameters:
        raise UserError(
            f"PEFT has no DoRA for experts, routers and their like ({parameters[0]})",
            "`--to hf` exports the merged model.",
        )
    save_checked(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 8
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


def _targets(adapter: Adapter) -> dict[str, tuple[np.ndarray, np.ndarray, float, np.ndarray | None]]:
    """PEFT's A [r, in] and B [out, r] (experts: [E, r, in], [E, out, r]) by target, `module` or `module:parameter`."""
    out = {}
    for target, update in adapter.updates.items():
        if update.a.ndim == 2:
            out[target] = (update.a.T, update.b.T, update.scale, update.m)
        elif not update.half:
            out[target] = (update.a, update.b, update.scale, None)
    for target in {name.rpartition("#")[0] for name, update in adapter.updates.items() if update.half}:
        gate, up = (adapter.updates.get(f"{target}#{half}") for half in ("gate", "up"))
        if gate is None or up is None or gate.scale != up.scale:
            raise UserError(
                f"{target}: PEFT adapts gate and up of the experts together, with one scale",
                "Train both or neither; `mlxtune fuse` merges this adapter.",
            )
        if gate.a.tobytes() == up.a.tobytes():  # as imported: one A for both
            out[target] = (gate.a, np.concatenate([gate.b, up.b], 1), gate.scale, None)
            continue
        b = np.zeros((gate.b.shape[0], 2 * gate.b.shape[1], gate.b.shape[2] + up.b.shape[2]), gate.b.dtype)
        b[:, : gate.b.shape[1], : gate.b.shape[2]] = gate.b
        b[:, gate.b.shape[1] :, gate.b.shape[2] :] = up.b
        out[target] = (np.concatenate([gate.a, up.a], 1), b, gate.scale, None)
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
    _refuse_unknown(folder, config)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise UserError(f"{folder} has no {WEIGHTS_FILE}", "Pickled adapters (.bin) are never loaded: save it again.")
    read_header(file)
    # PEFT adds a copy of the frozen head or embedding when it adapts them.
    tensors = {
        name.removeprefix(PREFIX): array
        for name, array in load_file(file).items()
        if not name.endswith((".base_layer.weight", ".base_layer.bias"))
    }
    saved = config.get("modules_to_save") or []
    updates: dict[str, Update] = {}
    trained: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        match = re.fullmatch(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)", name)
        if match is None:
            module = name.rpartition(".")[0]
            if not any(module == part or f".{module}.".find(f".{part}.") >= 0 for part in saved):
                raise UserError(f"{file}: the tensor {name} is not understood", "LoRA on linear layers can be read.")
            trained[name] = array.astype(np.float32)
        elif match[2] == "lora_A.weight":
            updates.update(_updates(config, match[1], tensors, file))
        elif f"{match[1]}.lora_A.weight" not in tensors:
            raise UserError(f"{file}: {name} has no lora_A", "The adapter is incomplete: copy or download it again.")
    head = any("lm_head" in name for name in trained)
    if head and any(
        array is not trained["lm_head.weight"] and _same(array, trained["lm_head.weight"]) for array in trained.values()
    ):
        del trained["lm_head.weight"]  # written for a tied model: one matrix under both names
    own = any("embed" in name for name in trained) and not head and not config.get("ensure_weight_tying")
    return Adapter(
        updates,
        trained,
        float(config.get("lora_dropout") or 0.0),
        bool(config.get("use_rslora")),
        str(config.get("base_model_name_or_path") or ""),
        own,
    )


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def _refuse_unknown(folder: Path, config: dict[str, Any]) -> None:
    where = folder / CONFIG_FILE
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{where}: peft_type {config.get('peft_type')!r} is not understood", "LORA adapters can be read."
        )
    if config.get("bias", "none") != "none":
        raise UserError(f"{where}: bias {config['bias']!r} is not understood", "Only 'none': biases stay the base's.")
    if config.get("init_lora_weights") not in KEEPS_BASE:
        raise UserError(
            f"{where}: init_lora_weights {config['init_lora_weights']!r} trained beside a changed base",
            "Convert it to plain LoRA with PEFT (path_initial_model_for_weight_conversion), or merge it there.",
        )
    unknown = [key for key, value in config.items() if key not in READ and value not in (None, False, "", [], {})]
    if unknown:
        raise UserError(
            f"{where}: {unknown[0]} is not understood ({config[unknown[0]]!r})", "Merge it with PEFT first."
        )


def _updates(config: dict[str, Any], module: str, tensors: dict[str, np.ndarray], file: Path) -> dict[str, Update]:
    """The update of one PEFT module: one, or two for the experts' gate_up_proj."""
    try:
        a = tensors[f"{module}.lora_A.weight"].astype(np.float32)
        b = tensors[f"{module}.lora_B.weight"].astype(np.float32)
    except KeyError as error:
        raise UserError(f"{file}: {error.args[0]} is missing", "The adapter is incomplete.") from None
    m = tensors.get(f"{module}.lora_magnitude_vector", tensors.get(f"{module}.lora_magnitude_vector.weight"))
    parameter = _parameter(config, module, tensors)
    module = module.removesuffix(".base_layer")
    name = f"{module}.{parameter}" if parameter else module
    rank = int(_pattern(config.get("rank_pattern"), name, config["r"]))
    alpha = float(_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if parameter in ("", "weight"):
        if a.shape[0] != rank:
            raise UserError(f"{file}: {module} has rank {a.shape[0]}, adapter_config.json says {rank}")
        target = f"{module}:weight" if parameter else module
        m = None if m is None else m.astype(np.float32).reshape(-1)
        return {target: Update(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), scale, m)}
    experts = a.shape[0] // rank
    a, b = a.reshape(experts, rank, -1), b.reshape(b.shape[0], rank, experts).transpose(2, 0, 1)
    target = f"{module}:{parameter}"
    if parameter != "gate_up_proj":
        return {target: Update(a, np.ascontiguousarray(b), scale)}
    out, r = b.shape[1] // 2, rank // 2
    gate, up = b[:, :out], b[:, out:]
    parts = [(a, gate), (a, up)]
    if rank % 2 == 0 and not gate[..., r:].any() and not up[..., :r].any():  # our own block form
        parts = [(a[:, :r], gate[..., :r]), (a[:, r:], up[..., r:])]
    return {
        f"{target}#{half}": Update(np.ascontiguousarray(one), np.ascontiguousarray(two), scale, half=half)
        for half, (one, two) in zip(("gate", "up"), parts, strict=True)
    }


def _parameter(config: dict[str, Any], module: str, tensors: dict[str, np.ndarray]) -> str:
    """Which parameter of `module` PEFT adapts, or "" when it is a linear layer."""
    wanted = config.get("target_parameters") or []
    plain = module.removesuffix(".base_layer")
    found = [p.rpartition(".")[2] for p in wanted if f"{plain}.{p.rpartition('.')[2]}".endswith(p)]
    if len(set(found)) < 2:
        return found[0] if found else ""
    if f"{plain}.base_layer.lora_A.weight" not in tensors:
        raise UserError(f"{module}: which of its parameters is adapted cannot be told", "Merge it with PEFT first.")
    return "gate_up_proj" if module.endswith(".base_layer") else "down_proj"


def _pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of a module's path."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def check_adapter(folder: Path, adapter: Adapter) -> int:
    """Read the folder back; return how many tensors are the given ones bit for bit. Raises UserError otherwise."""
    again, count = read_adapter(folder), 0
    if again.updates.keys() != adapter.updates.keys():
        raise UserError(f"{folder} does not hold the layers that were trained", "Check the disk.")
    for path, update in adapter.updates.items():
        other = again.updates[path]
        pairs = [(update.a, other.a), (update.b, other.b)] + ([(update.m, other.m)] if update.m is not None else [])
        if update.scale != other.scale or not all(two is not None and _same(one, two) for one, two in pairs):
            raise UserError(f"{path}: the file does not hold what was trained", "Check the disk.")
        count += len(pairs)
    for name, array in again.trained.items():
        if name not in adapter.trained or not _same(array, adapter.trained[name]):
            raise UserError(f"{name}: the file does not hold what was trained", "Check the disk.")
    return count + len(again.trained)

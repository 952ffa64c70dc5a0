"""A model's config.json, looked at before anything is built from it: absurd values cost hours, memory or a crash there.

`check` knows what every family calls the same; `check_arguments` takes the rest from the annotations of the family's
own arguments in mlx-lm. What is right here may still not fit the weights: that is seen when they are loaded.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlxtune_convert.hf import mtp

from mlxtune.errors import UserError

LARGEST = 2**31 - 1  # the size of one dimension in MLX
DEEPEST = 10_000  # blocks, loops: what is counted one by one when the model is built
EXPERTS = 65_536
# Sizes that no model can be without, under every name that families have for them.
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("max_position_embeddings", "n_embd", "n_head", "n_heads", "n_layer", "n_layers", "n_positions", "num_layers"),
    *("d_model", "model_dim", "num_transformer_layers"),
)
LAYERS = ("num_hidden_layers", "n_layer", "n_layers")  # one for each block with weights
OBJECTS = ("rope_parameters", "rope_scaling", "vision_config", "quantization", "quantization_config")
COUNTED = re.compile(r"(^|_)(layers?|loops?|iters|loop_num)$")
MANY_EXPERTS = re.compile(r"experts|expert_num")
SIGNED = re.compile(r"_ids?$|_idx$|index|window|^(n_inner|rotary_dim)$")  # -1 may stand for "none"
FRACTIONS = re.compile(r"factor|theta|base|ratio|scal|mult|alpha|limit")  # some of mlx-lm's are annotated int
SMALL = re.compile(r"(^|_)(eps|epsilon)$")
POSITIVE = re.compile(r"theta|base_freq|emb_base")
# A block's number in the name of one of its tensors; towers beside the text model have blocks of their own.
BLOCK = re.compile(r"(?:(?:model|language_model|transformer|backbone|gpt_neox)\.)*(?:layers|h|blocks)\.(\d+)\.")
DEEPEST_NESTING = 40
WIDEST = {"bits": 8, "group_size": 128}  # of MLX's own quantization


def check(path: Path, config: dict[str, Any], name: str) -> None:
    """Raise UserError, naming key, value and what is allowed, for what no family's configuration can say.

    path: the model's folder; name: of the file.
    """
    where = f"{path / name}"
    _require_shallow(config, where)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{where}: model_type is {_shown(config.get('model_type'))}, allowed is the name of a family")
    listed = config.get("architectures")
    if listed is not None and not (isinstance(listed, list) and all(isinstance(one, str) for one in listed)):
        raise UserError(f"{where}: architectures is {_shown(listed)}, allowed is a list of names")
    for inside, part in (("", config), ("text_config.", config.get("text_config"))):
        if part is None:
            continue
        if not isinstance(part, dict):
            raise UserError(f"{where}: text_config is {_shown(part)}, allowed is an object")
        for key in OBJECTS:
            if not isinstance(part.get(key, {}), dict | None):
                raise UserError(f"{where}: {inside}{key} is {_shown(part[key])}, allowed is an object")
        if not isinstance(part.get("layer_types", []), list | None):
            raise UserError(
                f"{where}: {inside}layer_types is {_shown(part['layer_types'])}, allowed is a list of names"
            )
        for key, value in part.items():
            if key in SIZES and not isinstance(value, list):  # some families have one value for each layer
                _number(value, int, key, f"{where}: {inside}{key}", none=key not in ("vocab_size", *LAYERS))
        _check_products(part, f"{where}: {inside}")
    _check_quantization(config.get("quantization"), where)


def check_arguments(path: Path, config: dict[str, Any], arguments: type, names: Sequence[str]) -> None:
    """Raise UserError for a value that the family's arguments have another type for, and for blocks that the weight
    files do not hold.

    config: normalised; arguments: mlx-lm's class for it; names: of the tensors.
    """
    where = f"{path / 'config.json'}: "
    _require_needed(config, arguments, where)
    try:
        hints = typing.get_type_hints(arguments)
    except Exception:  # an annotation that is no type
        hints = {}
    for key, hint in hints.items():
        if config.get(key) is not None:
            _typed(config[key], hint, key, f"{where}{key}")
    inner = config.get("text_config")
    parts = [(config, "")]
    if isinstance(inner, dict):
        parts.append((inner, "text_config."))
    for part, inside in parts:
        counts = [key for key in LAYERS if key in part and (key in hints or inside)]
        if counts:
            _check_blocks(part, counts[0], f"{where}{inside}", names)


def _require_needed(config: dict[str, Any], arguments: type, where: str) -> None:
    """Raise UserError for what the family's arguments have no default for and the configuration lacks."""
    fields = dataclasses.fields(arguments) if dataclasses.is_dataclass(arguments) else ()
    lacking = []
    for field in fields:
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in config:
            lacking.append(field.name)
    if lacking:
        raise UserError(
            f"{where}lacks {', '.join(lacking)}, which mlx-lm needs for models of type {config.get('model_type')}"
        )


def _require_shallow(config: dict[str, Any], where: str) -> None:
    level: list[Any] = [config]
    for _ in range(DEEPEST_NESTING):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return
    raise UserError(f"{where}: lists and objects lie more than {DEEPEST_NESTING} deep in one another")


def _check_quantization(said: dict[str, Any] | None, where: str) -> None:
    """Raise UserError for what MLX's own quantization cannot be. said: common numbers, and exceptions by layer."""
    for inside, part in (("", said), *((said or {}).items())):
        for key in ("bits", "group_size"):
            value = part.get(key, None if inside else 0) if isinstance(part, dict) else None
            if value is not None and (type(value) is not int or not 1 <= value <= WIDEST[key]):
                name = ".".join(word for word in ("quantization", inside, key) if word)
                raise UserError(
                    f"{where}: {name} is {_shown(value)}, allowed is a whole number from 1 to {WIDEST[key]}"
                )


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _typed(value: Any, hint: Any, key: str, where: str) -> None:
    """Hold a value against an annotation. What is no plain type (a class of mlx-lm's, say) is not judged."""
    kinds = [kind for kind in _kinds(hint) if kind is not type(None)]
    if any(kind not in (bool, int, float, str, list, tuple, dict) for kind in kinds):
        return
    fitting: set[type] = {type(value)}
    if isinstance(value, bool):
        fitting = {bool, int, float}
    elif isinstance(value, int | float):
        fitting = {int, float, bool} if value in (0, 1) else {int, float}
    elif isinstance(value, list):
        fitting = {list, tuple, int}  # one number for all layers in some checkpoints, a list in others
    if not fitting & set(kinds):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "an object"}
        raise UserError(f"{where} is {_shown(value)}, allowed is {' or '.join(names.get(k, 'a list') for k in kinds)}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        whole = float not in kinds and not FRACTIONS.search(key)
        _number(value, int if whole else float, key, where)


def _kinds(hint: Any) -> list[Any]:
    """The plain types that an annotation allows: Optional[Dict[str, float]] -> dict and NoneType."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in _kinds(part)]
    return [origin or hint]


def _number(value: Any, kind: type, key: str, where: str, none: bool = False) -> None:
    """Raise UserError unless the value is a number that a model can have there."""
    if value is None and none:
        return
    finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        low, high = _whole_range(key)
        if not finite or value != int(value) or not low <= value <= high:
            raise UserError(f"{where} is {_shown(value)}, allowed is a whole number from {low} to {high:,}")
        return
    if not finite:
        raise UserError(f"{where} is {_shown(value)}, allowed is a finite number")
    if SMALL.search(key) and not 0 <= value < 1:
        raise UserError(f"{where} is {_shown(value)}, allowed is a number from 0 to below 1")
    if POSITIVE.search(key) and value <= 0:
        raise UserError(f"{where} is {_shown(value)}, allowed is a number above 0")


def _whole_range(key: str) -> tuple[int, int]:
    """The smallest and the largest whole number that a model can have under a key."""
    low, high = 0, LARGEST
    if SIGNED.search(key):
        low = -1
    elif key in SIZES:
        low = 1
    if COUNTED.search(key):
        high = DEEPEST
    elif MANY_EXPERTS.search(key):
        high = EXPERTS
    return low, high


def _check_products(part: dict[str, Any], where: str) -> None:
    """Raise UserError for heads that cannot share what they are to share."""
    heads, shared = part.get("num_attention_heads"), part.get("num_key_value_heads")
    width = part.get("hidden_size")
    own = any(
        part.get(key) is not None for key in ("head_dim", "qk_nope_head_dim", "kv_channels", "attention_head_dim")
    )
    if isinstance(heads, int) and isinstance(width, int) and not own and width % heads:
        raise UserError(f"{where}hidden_size is {width}, which {heads} heads (num_attention_heads) cannot share")
    if isinstance(heads, int) and isinstance(shared, int) and (not 1 <= shared <= heads or heads % shared):
        raise UserError(
            f"{where}num_key_value_heads is {_shown(shared)}, allowed is what divides num_attention_heads, {heads}"
        )


def _check_blocks(part: dict[str, Any], key: str, where: str, names: Sequence[str]) -> None:
    """Raise UserError when config.json counts other blocks than the weight files hold."""
    held = {int(found[1]) for name in names if (found := BLOCK.match(name))}
    held -= mtp.behind(names, part)
    if not held or "block_configs" in part:  # searched architectures have blocks without weights
        return
    said, kinds = part[key], part.get("layer_types")
    if said != max(held) + 1:
        raise UserError(
            f"{where}{key} is {said}, the weight files hold {max(held) + 1} blocks",
            "Copy or download the folder again: config.json and weights are of different models.",
        )
    if isinstance(kinds, list) and isinstance(said, int) and len(kinds) < said:
        raise UserError(f"{where}layer_types names {len(kinds)} blocks, {key} is {said}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

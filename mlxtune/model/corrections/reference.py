"""What transformers reads in a config.json: its own configuration class is asked, for what the file leaves out.

mlx-lm takes defaults of its own where a key is missing (a tied head, another rotary base), which is another model.
Example: a Qwen 2 whose config.json lacks tie_word_embeddings. transformers' class says false, mlx-lm's true: it would
drop the head. So `completed` writes "tie_word_embeddings": false before mlx-lm reads it.
The classes need no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from textwrap import shorten
from typing import Any

from mlxtune_convert.hf.configs import unquantized

# Of no effect on what a model computes, or (the special tokens) not for a class to know: they are the tokenizer's.
_LEFT_OUT = (
    "initializer_range",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "per_layer_config",
    "output_attentions",
    "_name_or_path",
)


def described(config: dict[str, Any]) -> Any | None:
    """transformers' configuration object of a config.json, or of what we made of one; None where transformers has no
    such type, or refuses the file.
    """
    return _read(config)[0]


def refusal(config: dict[str, Any]) -> str:
    """Why transformers, which knows this type of model, refuses its config.json, or ""."""
    return _read(config)[1]


def _read(config: dict[str, Any]) -> tuple[Any, str]:
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None, ""
    with _quiet():
        try:
            found = CONFIG_MAPPING[kind].from_dict(_numbers(_without_copies(unquantized(config))))
            if isinstance(getattr(found, "text_config", None), dict):  # a stray entry: the type has no text part
                del found.text_config
            return found, ""
        except Exception as error:  # whatever its checks raise; the file may still mean something to mlx-lm
            return None, shorten(str(error) or type(error).__name__, 200, placeholder=" ...")


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config.json with every missing key at transformers' default for this type of model."""
    known = described(config)
    return dict(config) if known is None else _filled(config, known)


def _filled(config: dict[str, Any], known: Any) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    out = dict(config)
    common = {field.name for field in fields(PreTrainedConfig)} | set(_LEFT_OUT)
    values = known.to_dict()
    for key in ["tie_word_embeddings", *(key for key in values if key not in common)]:
        if key == "text_config":
            whole = {"tie_word_embeddings": bool(values.get("tie_word_embeddings"))}  # it decides for its parts
            out[key] = {**_filled(config.get(key) or {}, known.text_config), **whole}
        elif out.get(key) is None and key in values and not key.endswith("_config"):
            out[key] = values[key]  # None as well: mlx-lm may take a number where the key is missing
    out.setdefault("model_type", known.model_type)
    heads = getattr(known, "num_attention_heads", None)
    if out.get("head_dim") is None and isinstance(heads, int) and heads and isinstance(known.hidden_size, int):
        out["head_dim"] = known.hidden_size // heads  # what every model there falls back on
    return out


def _numbers(value: Any) -> Any:
    """A copy with infinity where transformers wrote an object for it, which JSON has no number for."""
    if isinstance(value, dict):
        tag = value.get("__float__")
        return float(tag) if isinstance(tag, str) else {key: _numbers(inner) for key, inner in value.items()}
    return [_numbers(inner) for inner in value] if isinstance(value, list) else value


def _without_copies(config: dict[str, Any]) -> dict[str, Any]:
    """Without `rope_scaling` beside sets of `rope_parameters`: it is our copy for mlx-lm, and one set for all layers
    to transformers.
    """
    out = dict(config)
    if isinstance(out.get("text_config"), dict):
        out["text_config"] = _without_copies(out["text_config"])
    sets = out.get("rope_parameters")
    if isinstance(sets, dict) and any(isinstance(value, dict) for value in sets.values()):
        out.pop("rope_scaling", None)
    return out


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's advice on configurations, which `AutoTokenizer` gives anyway."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)

"""One model family: everything that is known of one model_type of config.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlxtune_convert.gguf.family import GgufFamily
from mlxtune_convert.hf.rules import Layout

Config = dict[str, Any]  # a config.json, or the text part inside of a vision model's
Change = Callable[[Config], None]  # changes a copy of a configuration in place
Why = Callable[[Config], str]  # why something cannot be, in words for people, or ""


@dataclass(frozen=True)
class ModelFamily:
    """Whatever is not said is as in Llama: the same names and settings on all sides, and nothing to refuse."""

    # --- its tensors
    hf: Layout | None = None  # in Hugging Face's files and in MLX's; None: none was compared, so no export
    hf_of: Callable[[Config], Layout] | None = None  # the same where it depends on the configuration
    gguf: GgufFamily | None = None  # llama.cpp's names and keys; None: no GGUF of it

    no_biases: bool = False  # its matrices have none, unless attention_bias or mlp_bias says so
    mxfp4: bool = False  # it is published with MXFP4 codes, which mlx-lm reads as they are

    # --- its config.json, where mlx-lm reads another than transformers writes
    config_first: Change | None = None  # before the rotary settings are spelled out, which most changes are
    config_last: Change | None = None  # after them
    text_of: str = ""  # model_type of the wrapper, where mlx-lm knows this text part only inside of it
    rope_sets: bool = False  # mlx-lm reads a set of rotary settings for each type of layer
    no_rope_scaling: bool = False  # config.json must hold no rope_scaling: transformers takes it, even null, for all

    # --- what mlx-lm's model does otherwise than the one in transformers, each found by comparing logits
    not_exported: str = ""  # why its models leave as MLX folders only, whatever the configuration
    differs: Why | None = None  # of a whole config.json, before all that follow
    computes: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # setting -> the values that mlx-lm computes
    any_activation: bool = False  # its feed-forward layers are made to compute each of `unheeded.ACTIVATIONS`
    checks: tuple[Why, ...] = ()  # further settings that mlx-lm does not heed
    needs_layers: tuple[str, ...] = ()  # types of layer (layer_types) without which mlx-lm cannot run it
    cannot_run: Why | None = None  # what else makes a model that mlx-lm builds and cannot run

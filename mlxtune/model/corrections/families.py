"""What is known of single families on MLX's side: where mlx-lm's model differs from transformers', one entry a family.

What a family is in files, its tensors, their names and layouts, is its entry in `mlxtune_convert.families.table`; that
package knows no MLX. A family without an entry here works where mlx-lm computes what transformers computes: this table
holds exceptions, and what was compared. `python tests/conformance.py NAME` measures a family.

Two things are not in the table. Gemma 3n's blocks that share keys are told by their class (`shared_keys`). A head that
files hold beside the embedding is told by the files (`tying`).
"""

from __future__ import annotations

from dataclasses import dataclass

# Layers that a block reads the matrices of, so that no adapter can sit on them: Gemma 3n's AltUp, a few numbers each.
READ_BY_BLOCK = (".prediction_coefs", ".correction_coefs")


@dataclass(frozen=True)
class Family:
    """One `model_type` (of the text part), as mlx-lm computes it."""

    # transformers' name of the activation that mlx-lm's feed-forward layers have built in, whatever config.json says;
    # "": mlx-lm heeds config.json, or nobody looked.
    activation: str = ""
    # Whether mlx-lm attends to all of a row where transformers attends to a window.
    lacks_windows: bool = False
    # Whether its rotary modules were compared with transformers' in every setting (tests/test_rotary.py).
    rotary_compared: bool = False
    # Whether an unscaled rotation turns only a part of each head (partial_rotary_factor).
    rotates_part: bool = False
    # Which layers rotate: "" all; "no_rope_layers" those that this list of the configuration marks; "windowed" those
    # with an attention window, where the configuration has one.
    rotated: str = ""
    # rope_type that mlx-lm's class takes; with any other it raises, or reads what is not there. None: it takes all.
    rope_types: tuple[str, ...] | None = None


FAMILIES: dict[str, Family] = {
    "apertus": Family(rotary_compared=True),
    "cohere": Family("silu", rotary_compared=True),
    "cohere2": Family("silu", rotary_compared=True, rotated="windowed"),
    "deepseek_v2": Family("silu", rotary_compared=True, rope_types=("yarn",)),
    "deepseek_v3": Family("silu", rotary_compared=True),
    "ernie4_5": Family("silu", rotary_compared=True),
    "ernie4_5_moe": Family("silu", rotary_compared=True),
    "exaone4": Family("silu", rotary_compared=True, rotated="windowed"),
    "falcon_h1": Family(rotary_compared=True),
    "gemma": Family("gelu", rotary_compared=True),
    "gemma2": Family("gelu_pytorch_tanh", lacks_windows=True, rotary_compared=True),
    "gemma3_text": Family("gelu_pytorch_tanh", rotary_compared=True),
    "gemma4_text": Family(rotary_compared=True),
    "glm": Family("silu", rotary_compared=True, rotates_part=True),
    "glm4": Family("silu", rotary_compared=True, rotates_part=True),
    "glm4_moe": Family("silu", rotary_compared=True, rotates_part=True),
    "glm4_moe_lite": Family(rotates_part=True),
    "gpt2": Family("gelu_pytorch_tanh"),
    "gpt_bigcode": Family("gelu"),
    "gpt_neox": Family("gelu_pytorch_tanh", rotary_compared=True, rotates_part=True),
    "gpt_oss": Family(rotary_compared=True),
    "granite": Family("silu", rotary_compared=True),
    "granitemoe": Family("silu", rotary_compared=True),
    "granitemoehybrid": Family(rotary_compared=True),
    "helium": Family("silu", rotary_compared=True),
    "hunyuan_v1_dense": Family("silu", rotary_compared=True, rope_types=("alpha",)),
    "lfm2": Family(rotary_compared=True),
    "lfm2_moe": Family(rotary_compared=True),
    "llama": Family("silu", rotary_compared=True),
    "llama4_text": Family(rotary_compared=True, rotated="no_rope_layers"),
    "minimax": Family(lacks_windows=True),
    "ministral3": Family("silu", lacks_windows=True, rotary_compared=True),
    "mistral": Family("silu", lacks_windows=True, rotary_compared=True),
    "mixtral": Family("silu", lacks_windows=True, rotary_compared=True),
    "nemotron": Family("relu2", rotary_compared=True, rotates_part=True, rope_types=("linear",)),
    "olmo2": Family("silu", rotary_compared=True),
    "olmo3": Family("silu", rotary_compared=True),
    "olmoe": Family("silu", rotary_compared=True),
    "phi": Family("gelu_pytorch_tanh", rotary_compared=True, rotates_part=True),
    "phi3": Family(
        "silu", lacks_windows=True, rotary_compared=True, rotates_part=True, rope_types=("longrope", "linear")
    ),
    "phimoe": Family("silu", lacks_windows=True, rotary_compared=True, rope_types=("longrope",)),
    "qwen2": Family("silu", lacks_windows=True, rotary_compared=True),
    "qwen2_moe": Family("silu", lacks_windows=True, rotary_compared=True, rope_types=("linear",)),
    "qwen3": Family("silu", lacks_windows=True, rotary_compared=True),
    "qwen3_5_moe_text": Family(rotary_compared=True, rotates_part=True),
    "qwen3_5_text": Family(rotary_compared=True, rotates_part=True),
    "qwen3_moe": Family("silu", lacks_windows=True, rotary_compared=True),
    "qwen3_next": Family(rotary_compared=True, rotates_part=True),
    "seed_oss": Family("silu", rotary_compared=True),
    "smollm3": Family("silu", lacks_windows=True, rotary_compared=True, rotated="no_rope_layers"),
    "solar_open": Family(rotates_part=True),
    "stablelm": Family("silu", rotary_compared=True, rotates_part=True),
    "starcoder2": Family("gelu", lacks_windows=True, rotary_compared=True),
}


def family_of(model_type: object) -> Family:
    """The entry of a `model_type`; an empty one for any other."""
    return FAMILIES.get(str(model_type), Family())

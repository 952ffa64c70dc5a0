"""One table per architecture: its names in Hugging Face's files, MLX's and GGUF's, read in both directions.

For the families here Hugging Face's and MLX's names and shapes are the same; GGUF's differ, and llama.cpp interleaves
the rotary halves of q and k rows for the llama architecture (a permutation of rows, so it moves packed rows too).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlxtune_convert.errors import UserError


@dataclass(frozen=True)
class Family:
    """model_type: of config.json; gguf: llama.cpp's architecture name; names: GGUF stem -> HF stem, {} = layer;
    permuted: GGUF stems whose rows llama.cpp interleaves; extra_config: fields that the GGUF cannot tell."""

    model_type: str
    architecture: str
    gguf: str
    names: dict[str, str]
    permuted: tuple[str, ...] = ()
    extra_config: dict[str, Any] = field(default_factory=dict)

    def hf_name(self, gguf_name: str) -> tuple[str, bool]:
        """HF tensor name of a GGUF tensor, and whether its rows are interleaved. Raises UserError for unknown ones."""
        stem, _, suffix = gguf_name.rpartition(".")
        layer = ""
        if stem.startswith("blk."):
            _, layer, rest = stem.split(".", 2)
            stem = "blk.{}." + rest
        if stem not in self.names or suffix not in ("weight", "bias"):
            raise UserError(
                f"the GGUF tensor {gguf_name} is not one of the {self.gguf} architecture's",
                "Convert from the original Hugging Face model instead.",
            )
        return self.names[stem].format(layer) + "." + suffix, stem in self.permuted


_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        "llama",
        _LLAMA_NAMES,
        permuted=("blk.{}.attn_q", "blk.{}.attn_k"),
        extra_config={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        _LLAMA_NAMES,
        extra_config={"hidden_act": "silu", "use_sliding_window": False, "rope_scaling": None},
    ),
)


def by_gguf(architecture: str) -> Family:
    """The family of a GGUF file. Raises UserError naming what is covered."""
    for family in FAMILIES:
        if family.gguf == architecture:
            return family
    covered = ", ".join(family.gguf for family in FAMILIES)
    raise UserError(
        f"GGUF files of the {architecture} architecture cannot be converted yet (covered: {covered})",
        "Convert from the original Hugging Face model instead.",
    )


def by_model_type(model_type: str) -> Family:
    """The family of a config.json. Raises UserError naming what is covered and what works instead."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    covered = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(
        f"models of type {model_type} cannot be exported yet (covered: {covered})",
        "`mlxtune fuse` makes a merged MLX model of any type.",
    )


def uninterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of q and k: [heads * d, ...] with rotary pairs adjacent -> halves apart, as in HF.

    The converter's order is reshape(heads, 2, d/2, ...).swapaxes(1, 2); this is its inverse.
    """
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)

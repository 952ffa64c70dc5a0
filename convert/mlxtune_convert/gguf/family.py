"""What llama.cpp knows of an architecture: tensor names and metadata keys, read in both directions.

Facts of llama.cpp (llama-arch.cpp and its converter): which keys an architecture reads, whether its rotary pairs are
interleaved (then q and k rows are permuted), whether its norms carry the +1 that Gemma adds when running.

**Tables as text.** Names and keys are tables from llama.cpp's word to ours. An entry of `families/` says only how it
differs from the usual table, in words apart by spaces:

    attn_q_norm=self_attn.q_norm    the table has this entry as well (or another one than the usual)
    -ffn_gate                       it does not have this entry

so that `names="ffn_up=mlp.fc1 ffn_down=mlp.fc2 -ffn_gate"` is a feed-forward layer of two matrices. `table` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlxtune_convert.errors import CONVERT_ORIGINAL, UserError
from mlxtune_convert.gguf.tensor_name import TensorName


def table(text: str, usual: dict[str, str] | None = None) -> dict[str, str]:
    """`usual` with the changes that `text` says: table("b=2 -a", {"a": "1"}) is {"b": "2"}."""
    changed = dict(usual or {})
    for entry in text.split():
        name, _, known = entry.partition("=")
        if known:
            changed[name] = known
        else:
            del changed[name.removeprefix("-")]
    return changed


# The usual layers of a block: GGUF stem -> MLX stem.
DENSE = table(
    "attn_norm=input_layernorm attn_q=self_attn.q_proj attn_k=self_attn.k_proj attn_v=self_attn.v_proj "
    "attn_output=self_attn.o_proj ffn_norm=post_attention_layernorm "
    "ffn_gate=mlp.gate_proj ffn_up=mlp.up_proj ffn_down=mlp.down_proj"
)
# Changes to the usual layers, and keys, that several families have.
QK_NORM = "attn_q_norm=self_attn.q_norm attn_k_norm=self_attn.k_norm"
WINDOW = "attention.sliding_window=sliding_window"
LAYER_NORM = "attention.layer_norm_epsilon=layer_norm_eps"  # norms with a mean, instead of RMS norms
EXPERTS_USED = "expert_used_count=num_experts_per_tok"
EXPERTS = f"expert_count=num_experts {EXPERTS_USED}"
LOCAL_EXPERTS = f"expert_count=num_local_experts {EXPERTS_USED}"
EXPERT_WIDTH = "expert_feed_forward_length=moe_intermediate_size"
PARTS = ("gate", "up", "down")
# llama.cpp's number of a router that scores each expert by itself (LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID).
SIGMOID_ROUTER = 2


def experts(place: str, router: str = "gate", switch: str = "switch_mlp", dense_too: bool = False) -> str:
    """The names of stacked experts and their router.

    place: of both in a block of MLX; router, switch: MLX's names of them there; dense_too: some blocks have the usual
    feed-forward layer instead, which stays in the table.
    """
    names = [f"ffn_gate_inp={place}.{router}"]
    for part in PARTS:
        names.append(f"ffn_{part}_exps={place}.{switch}.{part}_proj")
        if not dense_too:
            names.append(f"-ffn_{part}")
    return " ".join(names)


def shared_expert(place: str) -> str:
    """The names of the expert that every token passes. place: of it in a block of MLX."""
    return " ".join(f"ffn_{part}_shexp={place}.{part}_proj" for part in PARTS)


# GGUF key -> config.json key. A key is read or written where it is there; FLOAT_KEYS says which are float32.
COMMON_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
FLOAT_KEYS = ("epsilon", "freq_base", "scale", "softcapping", "factor", "beta_fast", "beta_slow")  # endings of keys


Order = Callable[[TensorName, dict[str, Any]], "np.ndarray | None"]  # (name, config.json) -> [rows] int, None: its own
Values = Callable[[dict[str, Any]], dict[str, Any]]  # config.json -> GGUF keys without the architecture, and values


@dataclass(frozen=True)
class GgufFamily:
    """One model_type as llama.cpp has it. Several may be one architecture of llama.cpp."""

    model_type: str  # of config.json
    architecture: str  # transformers' class, for config.json
    gguf: str  # llama.cpp's architecture, before every key of the metadata
    names: dict[str, str]  # GGUF stem -> MLX stem, in a block
    permuted: bool = False  # rows of q and k are interleaved, so that the two of a rotary pair are neighbours
    norm_offset: float = 0.0  # what is added to the weights of norms on the way to GGUF
    keys: dict[str, str] = field(default_factory=dict)  # GGUF key -> config.json key, beyond the common ones
    # What llama.cpp takes for granted: written to config.json on import, required of it on export.
    fixed: dict[str, Any] = field(default_factory=dict)
    final_norm: str = "model.norm"  # MLX stem of the norm behind the last block
    defaults: Values | None = None  # keys that llama.cpp needs and the configuration may lack
    absent: dict[str, Any] = field(default_factory=dict)  # of config.json, where a GGUF has 0 or nothing for it
    # The number that scores are divided by the root of, where llama.cpp computes it and does not read it.
    query_scalar: Callable[[dict[str, Any]], int] | None = None
    written_only: bool = False  # no GGUF of it is read. The fields below are for such families alone.
    parameters: dict[str, str] = field(default_factory=dict)  # whole GGUF name in a block -> whole MLX name there
    outside: dict[str, str] = field(default_factory=dict)  # GGUF stem -> MLX stem outside of the blocks, beyond usual
    more: Values | None = None  # further keys, which replace those of the configuration; a value None leaves one out
    rows: Order | None = None  # which of MLX's rows each row of a GGUF tensor is
    columns: Order | None = None  # the same of columns
    value: Callable[[TensorName, np.ndarray], np.ndarray] | None = None  # a float array as llama.cpp wants it

    @property
    def tabled_gelu(self) -> bool:
        """llama.cpp looks this activation up in a float16 table, which costs accuracy."""
        return any("gelu" in str(value) for value in self.fixed.values())

    @property
    def outer(self) -> dict[str, str]:
        """GGUF stem -> MLX stem, outside of the blocks."""
        usual = {"token_embd": "model.embed_tokens", "output_norm": self.final_norm, "output": "lm_head"}
        return usual | self.outside

    @property
    def all_keys(self) -> dict[str, str]:
        """GGUF key -> config.json key."""
        keys = {**COMMON_KEYS, **self.keys}
        if "attention.layer_norm_epsilon" in keys:
            keys.pop("attention.layer_norm_rms_epsilon")
        return keys

    def gguf_name(self, name: str) -> str:
        """GGUF name of an MLX tensor, such as model.layers.0.mlp.up_proj.weight. Raises UserError."""
        name = name.removeprefix("language_model.")  # the text part of a vision model
        block, inside = _block_of(name)
        if block is not None:
            for whole, known in self.parameters.items():
                if inside == known:
                    return f"blk.{block}.{whole}"
        if name.endswith(".sinks"):  # a parameter of gpt-oss, which is a layer's weight in llama.cpp
            inside += ".weight"
        path, _, suffix = inside.rpartition(".")
        known_stems = self.outer if block is None else self.names
        for stem, known in reversed(known_stems.items()):
            if known == path:
                return str(TensorName(block, stem, suffix))
        raise UserError(
            f"{name}: llama.cpp's {self.gguf} architecture has no such tensor",
            "`--to hf` exports the model all the same.",
        )

    def mlx_name(self, name: str) -> str:
        """MLX name of a GGUF tensor. Raises UserError for one that the architecture does not have."""
        parts = TensorName.of(name)
        stem = (self.outer if parts.block is None else self.names).get(parts.stem)
        if stem is None or parts.suffix not in ("weight", "bias"):
            raise UserError(
                f"the GGUF tensor {name[:80]} is not one of the {self.gguf} architecture's", CONVERT_ORIGINAL
            )
        path = stem if parts.block is None else f"model.layers.{parts.block}.{stem}"
        return path if path.endswith(".sinks") else f"{path}.{parts.suffix}"

    def heads(self, name: str, config: dict[str, Any]) -> int:
        """In how many groups the rows of a GGUF tensor are interleaved; 0 for those that are not."""
        parts = TensorName.of(name)
        if not self.permuted or parts.block is None:
            return 0
        heads = int(config["num_attention_heads"])
        if parts.stem == "attn_q":
            return heads
        if parts.stem == "attn_k":
            return int(config.get("num_key_value_heads") or heads)
        return 0

    def offset(self, name: str) -> float:
        """What is added to a tensor on the way to GGUF, by its GGUF name."""
        return self.norm_offset if name.endswith("norm.weight") else 0.0

    def written(self, name: str, array: np.ndarray) -> np.ndarray:
        """A float array of any shape under its GGUF name, as llama.cpp wants it: the same shape."""
        offset = self.offset(name)
        if offset:  # adding 0 would copy every matrix, and make 0.0 of -0.0
            array = array + np.float32(offset)
        return array if self.value is None else self.value(TensorName.of(name), array)

    def row_order(self, name: str, config: dict[str, Any], count: int) -> np.ndarray | None:
        """[count] int: which of MLX's `count` rows each row of a GGUF tensor is; None: its own."""
        heads = self.heads(name, config)
        if heads:
            return interleave(np.arange(count), heads)
        return self.rows(TensorName.of(name), config) if self.rows else None

    def column_order(self, name: str, config: dict[str, Any]) -> np.ndarray | None:
        """[columns] int: which of MLX's columns each column of a GGUF tensor is; None: its own."""
        return self.columns(TensorName.of(name), config) if self.columns else None


def _block_of(name: str) -> tuple[int | None, str]:
    """(block, rest) of an MLX name; (None, the whole name) outside of the blocks."""
    match = re.fullmatch(r"model\.layers\.([0-9]+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


SILU: dict[str, Any] = {"hidden_act": "silu"}


def entry(
    model_type: str,
    architecture: str,
    gguf: str,
    names: str = "",
    keys: str = "",
    fixed: dict[str, Any] = SILU,
    *,
    parameters: str = "",
    outside: str = "",
    **more: Any,
) -> GgufFamily:
    """A family from tables as text (see the module). architecture: transformers' class without "ForCausalLM"."""
    return GgufFamily(
        model_type,
        f"{architecture}ForCausalLM",
        gguf,
        names=table(names, DENSE),
        keys=table(keys),
        fixed=fixed,
        parameters=table(parameters),
        outside=table(outside),
        **more,
    )


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k: a rotary pair, halves of a head apart in MLX, are neighbours there.

    rows: [heads * d, ...] -> the same shape. One head of 6 rows, 0 1 2 | 3 4 5, comes out as 0 3 1 4 2 5. Rows move
    whole, so packed blocks and biases move the same way. heads: 0 for tensors that stay as they are.
    """
    if not heads:
        return rows
    half = len(rows) // heads // 2
    apart = rows.reshape(heads, 2, half, *rows.shape[1:])  # [heads, 2, d / 2, ...]
    return apart.swapaxes(1, 2).reshape(rows.shape)  # [heads, d / 2, 2, ...] -> [heads * d, ...]


def uninterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`: [heads * d, ...] -> the same shape."""
    if not heads:
        return rows
    half = len(rows) // heads // 2
    paired = rows.reshape(heads, half, 2, *rows.shape[1:])  # [heads, d / 2, 2, ...]
    return paired.swapaxes(1, 2).reshape(rows.shape)  # [heads, 2, d / 2, ...] -> [heads * d, ...]

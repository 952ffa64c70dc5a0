"""What llama.cpp knows of an architecture: tensor names and metadata keys, read in both directions.

Facts of llama.cpp (llama-arch.cpp and its converter): which keys an architecture reads, whether its rotary pairs are
interleaved (then q and k rows are permuted), whether its norms carry the +1 that Gemma adds when running.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlxtune_convert.errors import UserError
from mlxtune_convert.gguf.container import HINT


def spec(text: str, base: dict[str, str] | None = None) -> dict[str, str]:
    """A table from "gguf=mlx gguf=mlx -gguf": entries added to `base`, and entries taken out of it."""
    table = dict(base or {})
    for entry in text.split():
        name, _, known = entry.partition("=")
        if known:
            table[name] = known
        else:
            del table[name[1:]]
    return table


# GGUF stem -> MLX stem, within a block.
DENSE = spec(
    "attn_norm=input_layernorm attn_q=self_attn.q_proj attn_k=self_attn.k_proj attn_v=self_attn.v_proj "
    "attn_output=self_attn.o_proj ffn_norm=post_attention_layernorm "
    "ffn_gate=mlp.gate_proj ffn_up=mlp.up_proj ffn_down=mlp.down_proj"
)


def experts(place: str, router: str = "gate", switch: str = "switch_mlp") -> str:
    parts = " ".join(f"ffn_{p}_exps={place}.{switch}.{p}_proj -ffn_{p}" for p in ("gate", "up", "down"))
    return f"ffn_gate_inp={place}.{router} {parts}"


def stems(*parts: str) -> dict[str, str]:
    return spec(" ".join(parts), DENSE)


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
FLOAT_KEYS = ("epsilon", "freq_base", "scale", "softcapping", "factor", "beta_fast", "beta_slow")


Order = Callable[[str, dict[str, Any]], "np.ndarray | None"]


@dataclass(frozen=True)
class Family:
    """model_type, architecture: of config.json; gguf: llama.cpp's name; names: GGUF stem -> MLX stem in a block;
    permuted: q and k rows are interleaved; norm_offset: added to norms on the way out; keys: beyond the common ones;
    fixed: what llama.cpp takes for granted, so written to config.json on import and required of it on export.

    For those that are only written: parameters, whole GGUF -> MLX names in a block; outside: GGUF -> MLX stems outside
    the blocks, beyond the usual; more: further keys, from the configuration (None leaves one out); rows, columns: which
    of MLX's each of a GGUF tensor is; value: a float array as llama.cpp wants it.
    """

    model_type: str
    architecture: str
    gguf: str
    names: dict[str, str]
    permuted: bool = False
    norm_offset: float = 0.0
    keys: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    final_norm: str = "model.norm"
    written_only: bool = False
    parameters: dict[str, str] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    more: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    rows: Order | None = None
    columns: Order | None = None
    value: Callable[[str, np.ndarray], np.ndarray] | None = None

    @property
    def tabled_gelu(self) -> bool:
        """llama.cpp looks this activation up in a float16 table, which costs accuracy."""
        return any("gelu" in str(value) for value in self.fixed.values())

    @property
    def outer(self) -> dict[str, str]:
        usual = {"token_embd": "model.embed_tokens", "output_norm": self.final_norm, "output": "lm_head"}
        return usual | self.outside

    @property
    def all_keys(self) -> dict[str, str]:
        keys = {**COMMON_KEYS, **self.keys}
        if "attention.layer_norm_epsilon" in keys:
            keys.pop("attention.layer_norm_rms_epsilon")
        return keys

    def gguf_name(self, name: str) -> str:
        """GGUF name of an MLX tensor, such as model.layers.0.mlp.up_proj.weight. Raises UserError."""
        name = name.removeprefix("language_model.")  # the text part of a vision model
        alone = re.fullmatch(r"model\.layers\.([0-9]+)\.(.+)", name)
        for whole, known in self.parameters.items():
            if alone and alone[2] == known:
                return f"blk.{alone[1]}.{whole}"
        path, _, suffix = (f"{name}.weight" if name.endswith(".sinks") else name).rpartition(".")
        block = re.fullmatch(r"model\.layers\.([0-9]+)\.(.+)", path)
        stems = {known: stem for stem, known in (self.names if block else self.outer).items()}
        stem = stems.get(block[2] if block else path)
        if stem is None:
            raise UserError(
                f"{name}: llama.cpp's {self.gguf} architecture has no such tensor",
                "`--to hf` exports the model all the same.",
            )
        return f"blk.{block[1]}.{stem}.{suffix}" if block else f"{stem}.{suffix}"

    def mlx_name(self, name: str) -> str:
        """MLX name of a GGUF tensor. Raises UserError for one that the architecture does not have."""
        path, _, suffix = name.rpartition(".")
        block = re.fullmatch(r"blk\.([0-9]+)\.(.+)", path)
        found = self.names.get(block[2]) if block else self.outer.get(path)
        if found is None or suffix not in ("weight", "bias"):
            raise UserError(f"the GGUF tensor {name[:80]} is not one of the {self.gguf} architecture's", HINT)
        found = f"model.layers.{block[1]}.{found}" if block else found
        return found if found.endswith(".sinks") else f"{found}.{suffix}"

    def heads(self, name: str, config: dict[str, Any]) -> int:
        """In how many groups the rows of a GGUF tensor are interleaved; 0 for those that are not."""
        stem = name.split(".")[2] if self.permuted and name.startswith("blk.") else ""
        heads = int(config["num_attention_heads"])
        return {"attn_q": heads, "attn_k": int(config.get("num_key_value_heads") or heads)}.get(stem, 0)

    def offset(self, name: str) -> float:
        return self.norm_offset if name.endswith("norm.weight") else 0.0

    def written(self, name: str, array: np.ndarray) -> np.ndarray:
        """A float array under its GGUF name, as llama.cpp wants it."""
        offset = self.offset(name)
        if offset:  # adding 0 would copy every matrix, and make 0.0 of -0.0
            array = array + np.float32(offset)
        return array if self.value is None else self.value(name, array)

    def row_order(self, name: str, config: dict[str, Any], count: int) -> np.ndarray | None:
        """Which of MLX's `count` rows each row of a GGUF tensor is; None: its own."""
        heads = self.heads(name, config)
        if heads:
            return interleave(np.arange(count), heads)
        return self.rows(name, config) if self.rows else None

    def column_order(self, name: str, config: dict[str, Any]) -> np.ndarray | None:
        """Which of MLX's columns each column of a GGUF tensor is; None: its own."""
        return self.columns(name, config) if self.columns else None


SILU: dict[str, Any] = {"hidden_act": "silu"}


def entry(
    types: str, names: str = "", keys: str = "", fixed: dict[str, Any] = SILU, *, permuted: bool = False, **more: Any
) -> Family:
    """types: model_type, transformers' class without its ending, llama.cpp's architecture."""
    model_type, architecture, gguf = types.split()
    for name in ("parameters", "outside"):
        if name in more:
            more[name] = spec(more[name])
    table: dict[str, Any] = {"names": stems(names), "keys": spec(keys), "fixed": fixed, "permuted": permuted}
    return Family(model_type, f"{architecture}ForCausalLM", gguf, **table, **more)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k: [heads * d, ...] with the rotary halves apart -> pairs adjacent.

    Rows move whole, so packed blocks and biases move the same way. heads: 0 for tensors that stay as they are.
    """
    if not heads:
        return rows
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def uninterleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`."""
    if not heads:
        return rows
    return rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

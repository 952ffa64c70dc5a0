"""Known models to begin with, by size: what they may be used for, and what they weigh.

Written down on 2026-11-30, from their config.json and their cards; nothing here asks a network. There are newer and
other models: whatever `mlxtune convert` takes can be named instead. Bytes follow from the shapes.

Legend: D width, I width of the MLP, V vocabulary, H query heads, K key heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WRITTEN = "2026-11-30"
GROUP = 64  # weights that share a scale and an offset of 16 bits each, as `mlxtune convert` makes them


@dataclass(frozen=True)
class Known:
    """One model."""

    name: str  # for people
    size: str  # as models of its kind are called: 0.5B
    hub: str  # where its 16-bit weights are: owner/name
    four_bit: str  # where MLX weights in 4 bits are, which need no conversion; "" for none that is known
    licence: str  # as its card names it
    gated: bool  # whether its terms must be accepted on the hub first
    config: Mapping[str, Any]  # of its config.json what decides its arrays

    @property
    def parameters(self) -> int:
        """Numbers that it is made of, a tied head counted once."""
        return sum(self._matrices()) + self._vectors()

    def weights(self, bits: int = 16) -> int:
        """Bytes of its weights: norms and biases in 16 bits, matrices in so many, with their scales below 16."""
        per_weight = 2.0 if bits == 16 else (bits + 32 / GROUP) / 8
        return int(per_weight * sum(self._matrices())) + 2 * self._vectors()

    @property
    def download(self) -> int:
        """Bytes to fetch: of `four_bit`, else of `hub`."""
        return self.weights(4 if self.four_bit else 16)

    def _matrices(self) -> list[int]:
        """Elements of the embedding, the head where it is apart, and all blocks' matrices."""
        c = self.config
        width, mlp, vocabulary, head = c["hidden_size"], c["intermediate_size"], c["vocab_size"], self._head()
        heads = 2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"]  # of q and o, of k and v
        block = width * head * heads + 3 * width * mlp
        tables = 1 if c["tie_word_embeddings"] else 2
        return [tables * vocabulary * width, c["num_hidden_layers"] * block]

    def _vectors(self) -> int:
        """Elements of norms and biases."""
        c = self.config
        block = 2 * c["hidden_size"]
        if c["model_type"] == "qwen2":
            block += (c["num_attention_heads"] + 2 * c["num_key_value_heads"]) * self._head()
        if c["model_type"] == "qwen3":
            block += 2 * self._head()
        return int(c["num_hidden_layers"] * block + c["hidden_size"])

    def _head(self) -> int:
        c = self.config
        return int(c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])


def _shape(
    model_type: str,
    blocks: int,
    width: int,
    mlp: int,
    heads: tuple[int, int],
    vocabulary: int,
    tied: bool,
    **more: Any,
) -> dict[str, Any]:
    """What of a config.json decides the arrays. heads: (H, K); more: keys that only some families have."""
    return {
        "model_type": model_type,
        "num_hidden_layers": blocks,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
        **more,
    }


_LLAMA_3 = {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 131072}
_QWEN, _SMOL, _META = "Apache-2.0", "Apache-2.0", "Llama 3.1 Community License"

# From small to large.
KNOWN = (
    Known(
        "SmolLM2-135M-Instruct",
        "135M",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "",
        _SMOL,
        False,
        _shape("llama", 30, 576, 1536, (9, 3), 49152, True, rms_norm_eps=1e-5, rope_theta=1e5),
    ),
    Known(
        "Qwen2.5-0.5B-Instruct",
        "0.5B",
        "Qwen/Qwen2.5-0.5B-Instruct",
        "mlx-community/Qwen2.5-0.5B-Instruct-4bit",
        _QWEN,
        False,
        _shape("qwen2", 24, 896, 4864, (14, 2), 151936, True),
    ),
    Known(
        "Qwen2.5-1.5B-Instruct",
        "1.5B",
        "Qwen/Qwen2.5-1.5B-Instruct",
        "mlx-community/Qwen2.5-1.5B-Instruct-4bit",
        _QWEN,
        False,
        _shape("qwen2", 28, 1536, 8960, (12, 2), 151936, True),
    ),
    Known(
        "Llama-3.2-3B-Instruct",
        "3B",
        "meta-llama/Llama-3.2-3B-Instruct",
        "mlx-community/Llama-3.2-3B-Instruct-4bit",
        "Llama 3.2 Community License",
        True,
        _shape("llama", 28, 3072, 8192, (24, 8), 128256, True, head_dim=128, **_LLAMA_3),
    ),
    Known(
        "Qwen3-4B-Instruct-2507",
        "4B",
        "Qwen/Qwen3-4B-Instruct-2507",
        "mlx-community/Qwen3-4B-Instruct-2507-4bit",
        _QWEN,
        False,
        _shape("qwen3", 36, 2560, 9728, (32, 8), 151936, True, head_dim=128, rope_theta=5e6),
    ),
    Known(
        "Llama-3.1-8B-Instruct",
        "8B",
        "meta-llama/Llama-3.1-8B-Instruct",
        "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit",
        _META,
        True,
        _shape("llama", 32, 4096, 14336, (32, 8), 128256, False, **_LLAMA_3),
    ),
    Known(
        "Qwen3-8B",
        "8B",
        "Qwen/Qwen3-8B",
        "mlx-community/Qwen3-8B-4bit",
        _QWEN,
        False,
        _shape("qwen3", 36, 4096, 12288, (32, 8), 151936, False, head_dim=128),
    ),
    Known(
        "Qwen2.5-14B-Instruct",
        "14B",
        "Qwen/Qwen2.5-14B-Instruct",
        "mlx-community/Qwen2.5-14B-Instruct-4bit",
        _QWEN,
        False,
        _shape("qwen2", 48, 5120, 13824, (40, 8), 152064, False),
    ),
    Known(
        "Qwen2.5-32B-Instruct",
        "32B",
        "Qwen/Qwen2.5-32B-Instruct",
        "mlx-community/Qwen2.5-32B-Instruct-4bit",
        _QWEN,
        False,
        _shape("qwen2", 64, 5120, 27648, (40, 8), 152064, False),
    ),
    Known(
        "Llama-3.3-70B-Instruct",
        "70B",
        "meta-llama/Llama-3.3-70B-Instruct",
        "mlx-community/Llama-3.3-70B-Instruct-4bit",
        "Llama 3.3 Community License",
        True,
        _shape("llama", 80, 8192, 28672, (64, 8), 128256, False, **_LLAMA_3),
    ),
)
# One of each size, for tables: the first of that size in the list.
SIZES = ("0.5B", "1.5B", "3B", "8B", "14B", "32B", "70B")


def of_size(size: str) -> Known:
    """The first known model of that size."""
    return next(known for known in KNOWN if known.size == size)

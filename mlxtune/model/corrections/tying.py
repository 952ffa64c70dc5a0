"""A head that the files hold beside the embedding, though config.json calls the two one matrix.

transformers looks into the files: where both are there and differ, they stay two. mlx-lm goes by config.json and would
drop the head:

    config.json    tie_word_embeddings: true
    files          model.embed_tokens.weight and lm_head.weight, which differ
    transformers   logits = hidden states times lm_head
    mlx-lm         logits = hidden states times embed_tokens
    here           config.json is read as if it said false
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlxtune_convert.hf.configs import QUANTIZATION_KEYS

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"  # how their names end


def by_files(config: dict[str, Any], places: Mapping[str, Path]) -> dict[str, Any]:
    """A copy of a completed config.json that calls embedding and head one matrix only where they are. places: the file
    of each tensor.
    """
    text = config.get("text_config")
    tied = config.get("tie_word_embeddings") or (isinstance(text, dict) and text.get("tie_word_embeddings"))
    if not tied or any(key in config for key in QUANTIZATION_KEYS) or not _has_own_head(places):
        return config
    out = {**config, "tie_word_embeddings": False}
    if isinstance(text, dict):
        out["text_config"] = {**text, "tie_word_embeddings": False}
    return out


def _has_own_head(places: Mapping[str, Path]) -> bool:
    head = next((name for name in places if name.endswith(HEAD)), None)
    embedding = next((name for name in places if name.endswith(EMBEDDING)), None)
    if head is None or embedding is None:
        return False
    return not mx.array_equal(_tensor(places[head], head), _tensor(places[embedding], embedding)).item()


def _tensor(file: Path, name: str) -> mx.array:
    found: Any = mx.load(str(file))  # nothing is read before it is used
    array: mx.array = found[name]
    return array

"""Which exports a model's family has, so that it is said before anyone trains."""

from __future__ import annotations

from typing import Any

from mlxtune_convert.errors import UserError
from mlxtune_convert.gguf import architectures, metadata
from mlxtune_convert.hf import families


def described(original: dict[str, Any], config: dict[str, Any]) -> str:
    """One line for people. original: config.json as transformers has it; config: as mlx-lm reads it."""
    kind = original.get("model_type")
    try:
        layout = families.by_model_type(original)
    except UserError as error:
        return f"{error.message}; what is trained leaves by `mlxtune fuse` alone"
    hf = "hf (with --base ORIGINAL, which has the tensors beside the text)" if layout.tower else "hf"
    refusal = _no_gguf(config)
    return f"exports of {kind}: {hf}, peft" + (f"; no gguf ({refusal})" if refusal else ", gguf, gguf-lora")


def _no_gguf(config: dict[str, Any]) -> str:
    """Why llama.cpp cannot have a model of this configuration, or ""."""
    text = metadata.text_of(config)
    try:
        metadata.metadata(architectures.by_model_type(str(text.get("model_type"))), text)
    except UserError as error:
        return error.message.partition(" (covered: ")[0]
    return ""

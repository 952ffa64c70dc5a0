"""A GGUF file's vocabulary -> Hugging Face tokenizer files.

A GGUF stores tokens, types and merges, but only the *name* of the pre-tokenizer (`tokenizer.ggml.pre`). Each name
needs its exact rules; a name without rules here is refused, because a nearly right pre-tokenizer trains on the wrong
tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlxtune_convert.errors import UserError
from mlxtune_convert.files import write_json

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types that are matched before any splitting

PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


def check_supported(metadata: dict[str, Any]) -> None:
    """Raise UserError for a vocabulary that cannot be rebuilt exactly, before any work is done."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    missing = [key for key in ("tokens", "token_type", "merges") if f"tokenizer.ggml.{key}" not in metadata]
    if model == "gpt2" and missing:
        raise UserError(
            f"the GGUF's tokenizer has no {missing[0]}", "The file is damaged, or holds no language model of its own."
        )
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"the GGUF's tokenizer ({model}, pre-tokenizer {pre}) cannot be rebuilt exactly yet "
            f"(covered: gpt2 with {', '.join(PRE_TOKENIZERS)})",
            "Convert from the original Hugging Face model instead.",
        )


def write_tokenizer(metadata: dict[str, Any], folder: Path, max_length: int) -> list[int]:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; return every end-of-turn token id.

    metadata: the GGUF's key-value pairs; max_length: the model's context in tokens.
    """
    check_supported(metadata)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    merges: list[str] = metadata["tokenizer.ggml.merges"]
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    config: dict[str, Any] = {
        # Not the model family's own class: transformers would replace the pre-tokenizer with that class's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": bool(metadata.get("tokenizer.ggml.add_space_prefix", False)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            config[f"{name}_token"] = tokens[index]
    template = metadata.get("tokenizer.chat_template")
    if template:
        # Both places: some readers know only one of them.
        config["chat_template"] = template
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)
    ends = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return sorted({index for index in ends if index is not None})

"""A model folder's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxtune.errors import UserError

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer of a folder, which may hold nothing else.

    Raises UserError when there is none, or when it is a slow one (no character offsets, so no exact masks).
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise UserError(f"no model folder {folder}")
    if not any((folder / name).is_file() for name in FILES):
        raise UserError(f"{folder} has no tokenizer", "Expected tokenizer.json beside the model's weights.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises whatever its parts raise
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({_first_line(error)})") from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: the tokenizer has no tokenizer.json, so tokens cannot be traced to their text")
    return tokenizer


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__

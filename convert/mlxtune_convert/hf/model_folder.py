"""A model folder that transformers loads, written from the tensors of an MLX model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from mlxtune_convert.errors import UserError
from mlxtune_convert.files import write_json
from mlxtune_convert.hf import companions, mtp
from mlxtune_convert.hf.configs import unquantized
from mlxtune_convert.hf.rules import Layout
from mlxtune_convert.tensors import ShardWriter, read_header, weight_files

Tensors = Iterable[tuple[str, np.ndarray]]


def write(
    work: Path,
    layout: Layout,
    tensors: Tensors,
    dropped: Tensors,
    config: dict[str, Any],
    rows: int | None,
    dtype: str,
    code: bool = False,
) -> dict[str, Any]:
    """Write weights and config.json; return the latter, which counts the blocks that predict further tokens as the
    files hold them.

    tensors: of the dense model under MLX's names; dropped: those that MLX does not have, under Hugging Face's; config:
    of the original model; rows: how many tokens the model knows now; dtype: of the tensors, such as bfloat16;
    code: the model's own .py files go along, and so do the keys that name them.
    """
    writer = ShardWriter(work, {"format": "pt"})
    for name, array in layout.to_hf(tensors, np):
        writer.add(name, array)
    carried = []
    for name, array in dropped:
        writer.add(name, array)
        carried.append(name)
    writer.close()
    config = unquantized(config)
    if not code:
        config = companions.without_code(config)
    for key in ("torch_dtype", "transformers_weights"):
        config.pop(key, None)
    config = mtp.counted(config, mtp.count(carried, config))
    resize(config, rows)
    config["dtype"] = dtype
    write_json(work / "config.json", config)
    return config


def dropped_tensors(layout: Layout, folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that the original has and MLX does not, in the original's shapes. config: the original's.

    Raises UserError before any work when the family has such tensors and `folder` does not hold them.
    """
    files = dropped_files(layout, folder, config)
    if layout.tower and not any(layout.tower in name for name in files):
        raise UserError(
            f"{folder} lacks tensors that transformers needs and MLX does not ({layout.tower}*)",
            "Give the original model: --base HF_DIR.",
        )
    return ((name, _tensor(file, name)) for name, file in sorted(files.items()))


def dropped_files(layout: Layout, folder: Path, config: dict[str, Any]) -> dict[str, Path]:
    """The same by name, each with its file."""
    found = {}
    for file in weight_files(folder):
        for name in read_header(file):
            if layout.is_dropped(name) or mtp.belongs(name, config):
                found[name] = file
    return found


def _tensor(file: Path, name: str) -> np.ndarray:
    with safe_open(file, "numpy") as opened:
        array: np.ndarray = opened.get_tensor(name)
    return array


def vocabulary(config: Mapping[str, Any]) -> int | None:
    """How many tokens a config.json says that its model knows, those without a token in the tokenizer included."""
    text = config.get("text_config")
    found = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    return found if isinstance(found, int) else None


def resize(config: dict[str, Any], rows: int | None) -> None:
    """Write a new size of the vocabulary into a config.json, where it differs from the old."""
    if rows is None or rows == vocabulary(config):
        return
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and "vocab_size" in part:
            part["vocab_size"] = rows

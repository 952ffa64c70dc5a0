"""The blocks that predict further tokens (multi-token prediction): which tensors are theirs, and how many a model has.

mlx-lm drops them, config.json counts them, and llama.cpp and vLLM believe the count. They have names with a part that
begins with `mtp` (Qwen3-Next `mtp.layers.0.`, MiMo `model.mtp_layers.0.`, ERNIE 4.5 `model.mtp_block.0.`), or are
blocks behind the last one (DeepSeek-V3 and GLM-4.5: `model.layers.{num_hidden_layers}.`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers", "mtp_num_layers")
SWITCH = "use_mtp"
SHARED = -1  # in place of a block's number
BLOCK = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.")
JOINING = (".eh_proj.", ".enorm.", ".hnorm.")
NAMED = re.compile(r"(?:^|\.)mtp[^.]*(?:\.layers)?\.(?:(\d+)\.)?")


def belongs(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor, by its name in Hugging Face's files, is part of such a block."""
    return _place(name, config) is not None


def count(names: Iterable[str], config: dict[str, Any]) -> int:
    """How many such blocks these tensors are of. config: of the model, which counts its ordinary blocks."""
    found = {_place(name, config) for name in names} - {None}
    numbered = found - {SHARED}
    if numbered:
        return len(numbered)
    return 1 if found else 0  # tensors that bear no number are of one block


def behind(names: Iterable[str], config: dict[str, Any]) -> set[int]:
    """The numbers of the blocks behind the last one that predict further tokens. They are known by what joins the last
    block's output with the next token; a block without that is an ordinary one that config.json does not count.
    """
    found = set()
    for name in names:
        place = _place(name, config) if BLOCK.match(name) else None
        if place is not None and any(part in name for part in JOINING):
            found.add(place)
    return found


def counted(config: dict[str, Any], blocks: int) -> dict[str, Any]:
    """A copy of config.json that says so many; keys that it does not have are not added."""
    out = {key: blocks if key in COUNTS and value else value for key, value in config.items()}
    if SWITCH in out and not blocks:
        out[SWITCH] = False
    text = out.get("text_config")
    return {**out, "text_config": counted(text, blocks)} if isinstance(text, dict) else out


def number(name: str) -> int | None:
    """The number of the text model's block that a tensor is of, by its name in Hugging Face's files."""
    block = BLOCK.match(name)
    return int(block[1]) if block is not None else None


def _place(name: str, config: dict[str, Any]) -> int | None:
    """The number of the block that a tensor is of; SHARED for what several share; None for any other tensor."""
    named = NAMED.search(name)
    if named is not None:
        return int(named[1]) if named[1] else SHARED
    block, text = number(name), config.get("text_config")
    layers = (text if isinstance(text, dict) else config).get("num_hidden_layers")
    return block if block is not None and isinstance(layers, int) and block >= layers else None

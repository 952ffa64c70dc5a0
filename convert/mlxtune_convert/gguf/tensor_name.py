"""The name of a GGUF tensor, taken apart in one place.

blk.3.attn_q.weight         block 3,    stem "attn_q",          suffix "weight"
blk.0.shortconv.conv.weight block 0,    stem "shortconv.conv",  suffix "weight"
blk.7.ssm_a                 block 7,    stem "ssm_a",           suffix ""
output_norm.weight          no block,   stem "output_norm",     suffix "weight"
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SHARED_GATE = "ffn_gate_inp_shexp"  # the gate of the expert that every token passes: a vector, a row [1, H] in MLX
CONVOLUTIONS = ("ssm_conv1d", "shortconv.conv")  # depthwise ones: [C, K] in GGUF, [C, K, 1] in MLX
# The number of a block is written in one way alone: "blk.01." is no block, or two names would mean one tensor.
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]*)\.(.+)")


@dataclass(frozen=True)
class TensorName:
    """One name in its parts; `str` gives the name back."""

    block: int | None  # which block of the model, counted from 0; None: the tensor is outside of the blocks
    stem: str  # what the tensor is, as llama.cpp calls it in every block
    suffix: str  # mostly "weight" or "bias"; "" where the name ends with its stem

    @staticmethod
    def of(name: str) -> TensorName:
        """Any text is some name: whether an architecture has it, its `GgufFamily` says."""
        match = _BLOCK.fullmatch(name)
        block, rest = (int(match[1]), match[2]) if match else (None, name)
        stem, dot, suffix = rest.rpartition(".")
        return TensorName(block, stem, suffix) if dot else TensorName(block, rest, "")

    def __str__(self) -> str:
        place = "" if self.block is None else f"blk.{self.block}."
        ending = f".{self.suffix}" if self.suffix else ""
        return f"{place}{self.stem}{ending}"

"""Gate and up of experts: two layers in MLX, one parameter gate_up_proj in transformers, and so one update in PEFT.

Their targets end in `#gate` and `#up`. In transformers' parameter the rows of gate come before those of up, or, in
gpt-oss, alternate with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mlxtune_convert.errors import UserError

if TYPE_CHECKING:
    from mlxtune_convert.peft.adapter_folder import Update

HALVES = ("gate", "up")


def joined(updates: dict[str, Update], alternate: bool) -> dict[str, Update]:
    """The same with gate and up as one update: of one A where they have the same, else of twice the rank, each with
    its half of B. alternate: whether their rows do.
    """
    out = {target: update for target, update in updates.items() if "#" not in target}
    for target in dict.fromkeys(name.rpartition("#")[0] for name in updates if "#" in name):
        gate, up = (updates.get(f"{target}#{half}") for half in HALVES)
        if gate is None or up is None or gate.scale != up.scale:
            raise UserError(
                f"{target}: PEFT adapts gate and up of the experts together, with one scale",
                "Train both or neither; `mlxtune fuse` merges this adapter.",
            )
        a, first, second = gate.a, gate.b, up.b
        if gate.a.tobytes() != up.a.tobytes():
            a = np.concatenate([gate.a, up.a], 1)
            first = np.concatenate([gate.b, np.zeros((*gate.b.shape[:2], up.rank), gate.b.dtype)], 2)
            second = np.concatenate([np.zeros((*up.b.shape[:2], gate.rank), up.b.dtype), up.b], 2)
        b = np.concatenate([first, second], 1)
        if alternate:
            b = np.stack([first, second], 2).reshape(b.shape)
        out[target] = type(gate)(a, b, gate.scale)
    return out


def split(target: str, update: Update, alternate: bool) -> dict[str, Update]:
    """The updates of gate and up; those of half the rank that `joined` made of two come back as they were."""
    b, r = update.b, update.rank // 2
    out = b.shape[1] // 2
    gate, up = (b[:, 0::2], b[:, 1::2]) if alternate else (b[:, :out], b[:, out:])
    halves = [(update.a, gate), (update.a, up)]
    if update.rank % 2 == 0 and not gate[..., r:].any() and not up[..., :r].any():
        halves = [(update.a[:, :r], gate[..., :r]), (update.a[:, r:], up[..., r:])]
    return {
        f"{target}#{half}": type(update)(np.ascontiguousarray(a), np.ascontiguousarray(b), update.scale)
        for half, (a, b) in zip(HALVES, halves, strict=True)
    }


def alternated(updates: dict[str, Update]) -> dict[str, Update]:
    """What `split` made as if gate came before up, split as their rows alternate."""
    out = {target: update for target, update in updates.items() if "#" not in target}
    for target, update in joined({t: u for t, u in updates.items() if "#" in t}, alternate=False).items():
        out |= split(target, update, alternate=True)
    return out

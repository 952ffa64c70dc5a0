"""Gate and up of experts: two layers in MLX, one parameter gate_up_proj in transformers, and so one update in PEFT.

Their targets end in `#gate` and `#up`. In transformers' parameter the rows of gate come before those of up, or, in
gpt-oss, alternate with them. With a gate a_g b_g and an up a_u b_u of rank r, each for E experts, there are two cases:

    one A        PEFT trained it so, a_g = a_u:   a [E, r, in]    b [E, 2 out, r]    the rows of b_g, then those of b_u
    two A's      MLX trained two layers:          a [E, 2r, in]   a_g, then a_u      b [E, 2 out, 2r]   b_g  0
                                                                                                         0   b_u
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mlxtune_convert.errors import UserError

if TYPE_CHECKING:
    from mlxtune_convert.peft.adapter_folder import Update

HALVES = ("gate", "up")


def joined(updates: dict[str, Update], alternate: bool) -> dict[str, Update]:
    """The same with gate and up as one update: of one A where they have the same, else of twice the rank.

    updates: by target; of gate and up a [E, r, in], b [E, out, r]. alternate: rows of the two alternate in B.
    """
    out = {target: update for target, update in updates.items() if "#" not in target}
    for target in dict.fromkeys(name.rpartition("#")[0] for name in updates if "#" in name):
        gate, up = (updates.get(f"{target}#{half}") for half in HALVES)
        if gate is None or up is None or gate.scale != up.scale:
            raise UserError(
                f"{target}: PEFT adapts gate and up of the experts together, with one scale",
                "Train both or neither; `mlxtune fuse` merges this adapter.",
            )
        a, gate_rows, up_rows = gate.a, gate.b, up.b
        if gate.a.tobytes() != up.a.tobytes():
            a = np.concatenate([gate.a, up.a], 1)  # [E, 2r, in]
            nothing_of_up = np.zeros((*gate.b.shape[:2], up.rank), gate.b.dtype)  # [E, out, r]
            nothing_of_gate = np.zeros((*up.b.shape[:2], gate.rank), up.b.dtype)
            gate_rows = np.concatenate([gate.b, nothing_of_up], 2)  # [E, out, 2r]
            up_rows = np.concatenate([nothing_of_gate, up.b], 2)
        if alternate:
            pairs = np.stack([gate_rows, up_rows], 2)  # [E, out, 2, r or 2r]
            b = pairs.reshape(len(pairs), -1, pairs.shape[-1])  # [E, 2 out, ...]
        else:
            b = np.concatenate([gate_rows, up_rows], 1)  # [E, 2 out, ...]
        out[target] = type(gate)(a, b, gate.scale)
    return out


def split(target: str, update: Update, alternate: bool) -> dict[str, Update]:
    """The updates of gate and up; those of half the rank that `joined` made of two come back as they were.

    update: a [E, r, in], b [E, 2 out, r] -> each a [E, r, in], b [E, out, r], or of half the rank.
    """
    a, b = update.a, update.b
    if alternate:
        gate, up = b[:, 0::2], b[:, 1::2]
    else:
        gate, up = np.split(b, [b.shape[1] // 2], axis=1)
    factors = {"gate": (a, gate), "up": (a, up)}
    half = update.rank // 2
    if update.rank % 2 == 0 and not gate[..., half:].any() and not up[..., :half].any():  # the zeros of `joined`
        factors = {"gate": (a[:, :half], gate[..., :half]), "up": (a[:, half:], up[..., half:])}
    out = {}
    for name, (own_a, own_b) in factors.items():
        out[f"{target}#{name}"] = type(update)(np.ascontiguousarray(own_a), np.ascontiguousarray(own_b), update.scale)
    return out


def alternated(updates: dict[str, Update]) -> dict[str, Update]:
    """What `split` made as if gate came before up, split as their rows alternate."""
    out = {target: update for target, update in updates.items() if "#" not in target}
    for target, update in joined({t: u for t, u in updates.items() if "#" in t}, alternate=False).items():
        out |= split(target, update, alternate=True)
    return out

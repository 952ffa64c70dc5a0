"""Which engine the spelling of an option names.

replay:answers.jsonl              answers that were recorded
replay:answers.jsonl#tuned        of one side, from the folder of an evaluation
http://127.0.0.1:8080/v1#model    a server
anything else                     a model: its folder, or a hub id
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

REPLAY = "replay:"
SIDES = ("base", "tuned")
ADDRESSES = ("http://", "https://")

Kind = Literal["replay", "server", "model"]


def kind_of(spelled: str) -> Kind:
    if spelled.startswith(REPLAY):
        return "replay"
    return "server" if spelled.startswith(ADDRESSES) else "model"


def replayed(spelled: str) -> tuple[Path, str | None]:
    """(The file, which side of an evaluation; None: it is not named)."""
    name = spelled.removeprefix(REPLAY)
    for side in SIDES:
        if name.endswith(f"#{side}"):
            return Path(name.removesuffix(f"#{side}")), side
    return Path(name), None

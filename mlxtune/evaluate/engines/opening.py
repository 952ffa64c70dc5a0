"""Which engine the spelling of an option names.

replay:answers.jsonl              answers that were recorded
http://127.0.0.1:8080/v1#model    a server
anything else                     a model: its folder, or a hub id
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

REPLAY = "replay:"
ADDRESSES = ("http://", "https://")

Kind = Literal["replay", "server", "model"]


def kind_of(spelled: str) -> Kind:
    if spelled.startswith(REPLAY):
        return "replay"
    return "server" if spelled.startswith(ADDRESSES) else "model"


def replayed_file(spelled: str) -> Path:
    return Path(spelled.removeprefix(REPLAY))

"""What happened in a run, kept as JSON lines in RUN/events.jsonl and shown by whoever listens.

Kinds: `train` (one optimizer step), `eval`, `checkpoint`, `note` (something a person must know), `end`. Losses keep
full precision. The file is only ever appended to, one whole line at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Listener = Callable[[Event], None]

FILE = "events.jsonl"


class Events:
    """Writes events to `folder`/events.jsonl and passes them on to `listener`."""

    def __init__(self, folder: Path, listener: Listener) -> None:
        self._listener = listener
        self._file = (folder / FILE).open("a", encoding="utf-8")
        if _cut_off(folder / FILE):
            self._file.write("\n")

    def emit(self, kind: str, **fields: Any) -> None:
        # JSON has no NaN and no infinity.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        event = {"kind": kind, **finite}
        self._file.write(json.dumps(event, ensure_ascii=False) + "\n")
        self._file.flush()
        self._listener(event)

    def close(self) -> None:
        self._file.close()


def _cut_off(file: Path) -> bool:
    """Whether the last line is not whole: a crash or a full disk cut it."""
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(max(0, size - 1))
        return opened.read(1) not in (b"", b"\n")


def read(folder: Path) -> list[Event]:
    """Every whole event of a run; a last line that was cut off by a crash is left out."""
    out = []
    for line in (folder / FILE).read_text(encoding="utf-8").splitlines():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return out

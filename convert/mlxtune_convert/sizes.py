"""How many bytes something has, for people: one unit in every message."""

from __future__ import annotations

from rich import filesize


def size(count: float) -> str:
    """`count` bytes in powers of 1000, as macOS and the hub show files: 94.20 MB, 3.41 GB; 2 GB; 512 bytes."""
    return filesize.decimal(int(count), precision=2).replace(".00 ", " ")

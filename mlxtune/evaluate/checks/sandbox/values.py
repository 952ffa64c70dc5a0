"""What two boxes say to each other: lines of JSON, in which Python's plain values keep their types.

One box runs the program that is judged, so what comes from it may be anything. It is read as data: the result is made
of Python's own types, never of the program's, and whatever else the program made stays in its box behind a number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

LONGEST = 32_000_000  # bytes of one line
SEVERAL: tuple[Any, ...] = (tuple, set, frozenset)
SMALL = 1 << 53  # whole numbers below it are exact in every reader of JSON


class Lines:
    """Lines of JSON, over two pipes."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._held = read, write, b""

    def send(self, value: Any) -> None:
        data = json.dumps(value).encode() + b"\n"
        while data:
            data = data[os.write(self._write, data) :]

    def receive(self) -> Any:
        """Raises EOFError where the other side has ended, and ValueError for what is no line of JSON."""
        parts = [self._held]
        length = len(self._held)
        while b"\n" not in parts[-1]:
            part = os.read(self._read, 1 << 16)
            if not part:
                raise EOFError("the program ended")
            parts.append(part)
            length += len(part)
            if length > LONGEST:
                raise ValueError("more was said than is listened to")
        line, _, self._held = b"".join(parts).partition(b"\n")
        return json.loads(line)


def pack(value: Any, keep: Callable[[Any], Any]) -> Any:
    """A value as JSON can hold it. keep: what stands for a value that is none of Python's plain ones.

    Subclasses, such as Counter or a named tuple, become what they are kinds of. The methods of these are not asked.
    """
    if value is None or value is True or value is False:
        return value
    kind = type(value)  # an object may claim another class
    if issubclass(kind, str):
        return str.__getitem__(value, slice(None))
    if issubclass(kind, int):
        number = int.__index__(value)
        return number if -SMALL < number < SMALL else {"int": hex(number)}
    if issubclass(kind, float):
        return {"float": float.hex(value)}
    if issubclass(kind, complex):
        return {"complex": str(complex.__pos__(value))}
    if issubclass(kind, list):
        return [pack(item, keep) for item in list.__iter__(value)]
    if issubclass(kind, dict):
        return {"dict": [[pack(key, keep), pack(item, keep)] for key, item in dict.items(value)]}
    for several in SEVERAL:
        if issubclass(kind, several):
            return {several.__name__: [pack(item, keep) for item in several.__iter__(value)]}
    if issubclass(kind, bytes):
        return {"bytes": bytes.hex(value)}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    if kind in (Fraction, Decimal):
        return {kind.__name__: str(value)}
    return keep(value)


_PLAIN: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "complex": complex,
    "bytes": bytes.fromhex,
    "range": lambda parts: range(*parts),
    "Fraction": Fraction,
    "Decimal": Decimal,
}


def unpack(packed: Any, kept: Callable[[dict[str, Any]], Any]) -> Any:
    """The value again. kept: what an object stands for that `keep` made. Raises ValueError, TypeError and the like for
    what `pack` does not make.
    """
    if isinstance(packed, list):
        return [unpack(item, kept) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if len(packed) == 1:
        ((name, inner),) = packed.items()
        if name in _PLAIN:
            return _PLAIN[name](inner)
        if name == "dict":
            return {unpack(key, kept): unpack(item, kept) for key, item in inner}
        for kind in SEVERAL:
            if name == kind.__name__:
                return kind(unpack(item, kept) for item in inner)
    return kept(packed)

"""A configuration of another program, asked key by key, so that what nobody asked for is known at the end."""

from __future__ import annotations

import math
from typing import Any

from mlxtune.config.yaml_text import Document
from mlxtune.errors import UserError

# Words that these programs' readers, of YAML 1.1, take for a truth value.
TRUTHS = {"yes": True, "on": True, "no": False, "off": False}
WIDEST = 1 << 63  # whole numbers are smaller, as those of our own files are


class Given:
    """The keys of a file, or of a table in it. A key that is null is one that is not there, as both programs have it.

    A wrong kind of value raises UserError, which names file, line and key.
    """

    def __init__(self, tree: dict[str, Any], document: Document, source: str, place: str = "") -> None:
        """source: the file, for messages; place: the dotted key of the table, "" for the whole file."""
        self.tree = tree
        self.document = document
        self.source = source
        self.place = place
        self._asked: set[str] = set()

    def value(self, name: str) -> Any:
        """Whatever stands there; None: nothing."""
        self._asked.add(name)
        return self.tree.get(name)

    def has(self, name: str) -> bool:
        """Whether the file says something there. This alone does not count as having asked for it."""
        return self.tree.get(name) is not None

    def text(self, name: str, default: str = "") -> str:
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def whole(self, name: str, default: int, least: int | None = None) -> int:
        """A whole number; 16.0 is one, as both programs have it. least: the smallest that makes sense."""
        value = self.value(name)
        if value is None:
            return default
        wanted = "a whole number" if least is None else f"a whole number of at least {least}"
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= WIDEST:
            raise self.wrong(name, wanted)
        if least is not None and value < least:
            raise self.wrong(name, wanted)
        return value

    def number(self, name: str, default: float, above: float | None = None) -> float:
        """A finite number. above: what it is larger than."""
        value = self.value(name)
        if value is None:
            return default
        wanted = "a number" if above is None else f"a number above {above:g}"
        if not _is_number(value) or (above is not None and value <= above):
            raise self.wrong(name, wanted)
        return float(value)

    def truth(self, name: str, default: bool = False) -> bool:
        value = self.value(name)
        if value is None:
            return default
        if isinstance(value, str) and self._where(name) in self.document.older:
            value = TRUTHS.get(value.lower(), value)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of texts; one text alone is a list of one, nothing an empty one."""
        value = self.value(name)
        if value is None:
            return []
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str) for one in values):
            raise self.wrong(name, "a list of texts")
        return values

    def numbers(self, name: str) -> list[float]:
        """A list of numbers."""
        values = self.value(name)
        if not isinstance(values, list) or not all(_is_number(one) for one in values):
            raise self.wrong(name, "a list of numbers")
        return [float(one) for one in values]

    def table(self, name: str) -> Given | None:
        """The keys below one; None: there are none."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "a table of keys")
        return Given(value, self.document, self.source, self._where(name))

    def tables(self, name: str) -> list[Given]:
        """The tables of a list; one table alone is a list of one."""
        value = self.value(name)
        values = [value] if isinstance(value, dict) else value or []
        if not isinstance(values, list) or not all(isinstance(one, dict) for one in values):
            raise self.wrong(name, "a list of tables")
        places = (
            [self._where(name)]
            if isinstance(value, dict)
            else [f"{self._where(name)}[{n}]" for n in range(len(values))]
        )
        return [Given(one, self.document, self.source, place) for one, place in zip(values, places, strict=True)]

    def left(self) -> list[str]:
        """The keys that say something and that nobody asked for, in the file's order."""
        return [name for name in self.tree if name not in self._asked and self.tree[name] is not None]

    def wrong(self, name: str, wanted: str) -> UserError:
        """The error for a value of another kind than is wanted."""
        line = self.document.lines.get(self._where(name))
        where = f"{self.source} line {line}" if line else self.source
        return UserError(
            f"{where}: {self._where(name)}: expected {wanted}, got {self.tree.get(name)!r}",
            "Correct it there, and import the file again.",
        )

    def _where(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name


def _is_number(value: Any) -> bool:
    """Whether something is a finite number: of others no setting can be made."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < WIDEST if isinstance(value, int) else math.isfinite(value)

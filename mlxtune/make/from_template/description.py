"""A file of templates, and how it is read.

    templates:
      - user: "What is the capital of {country.name}?"
        assistant: "The capital of {country.name} is {country.capital}."
        share: 0.4                                  # of the rows, at most
      - user: "Explain {concept} to {audience}."    # no assistant: an engine answers
    slots:
      country: countries.csv                        # a file: a row is a value, {country.name} one of its columns
      audience: [a child, a lawyer]
      concept: {engine: a concept of school physics, count: 200}

{name} stands for a value of a slot; {{name}} for itself. All {country...} of one row are of the same value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxtune.config.yaml_text import parse_yaml
from mlxtune.data.rows.readers import SUFFIXES, Bad, kind_of, raw_rows
from mlxtune.errors import UserError, did_you_mean

PLACE = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)(?:\.([A-Za-z_]\w*))?\}")
TEXTS = ("system", "user", "assistant")
KEYS = (*TEXTS, "share")
SHARE = 0.5  # of the rows that one of several templates has at most, where it does not say
VALUES = "a list, the name of a file (.txt with one on each line, or rows), or {engine: what to name, count: 200}"

Value = str | Mapping[str, str]  # a text, or texts by the names of columns


@dataclass(frozen=True)
class Template:
    """One way to ask."""

    # "system", "user" and "assistant", as far as it has them -> their text with slots.
    texts: Mapping[str, str]
    # Of the rows that it has at most.
    share: float
    # Where it is in its file, for messages.
    place: str

    @property
    def slots(self) -> list[str]:
        """Their names, each once, in the order in which they come."""
        return list(dict.fromkeys(name for text in self.texts.values() for name, _ in named(text)))

    @property
    def needs_engine(self) -> bool:
        """Whether an engine answers it."""
        return "assistant" not in self.texts

    @property
    def opening(self) -> list[str]:
        """The words that every row of it begins with, in small letters."""
        before = self.texts["user"]
        for place in PLACE.finditer(before):
            if place[1]:
                before = before[: place.start()]
                break
        words = before.lower().split()
        return words if before[-1:].isspace() or before == self.texts["user"] else words[:-1]

    def filled(self, values: Mapping[str, Value]) -> dict[str, str]:
        """Its texts with a value in each slot."""

        def put(found: re.Match[str]) -> str:
            if not found[1]:
                return found[0][0]
            value = values[found[1]]
            return value if isinstance(value, str) else value[found[2]]

        return {role: PLACE.sub(put, text) for role, text in self.texts.items()}


@dataclass(frozen=True)
class Named:
    """Values that an engine is to name."""

    # What they are, in the plural or with an article: "a concept of school physics".
    what: str
    # How many different ones.
    count: int


@dataclass(frozen=True)
class Description:
    """A file of templates that was read."""

    # In their order.
    templates: list[Template]
    # Of each slot its values, or what an engine is to name.
    slots: Mapping[str, list[Value] | Named]
    # What a person must know.
    notes: list[str]

    @property
    def given(self) -> dict[str, list[Value]]:
        """The slots whose values are there."""
        return {name: slot for name, slot in self.slots.items() if not isinstance(slot, Named)}

    @property
    def named(self) -> dict[str, Named]:
        """Those whose values an engine is to name."""
        return {name: slot for name, slot in self.slots.items() if isinstance(slot, Named)}

    @property
    def needs_engine(self) -> bool:
        return bool(self.named) or any(template.needs_engine for template in self.templates)


def named(text: str) -> list[tuple[str, str]]:
    """(Slot, column or "") of each place of a text."""
    return [(found[1], found[2] or "") for found in PLACE.finditer(text) if found[1]]


def read(path: Path) -> Description:
    """Raises UserError, with the line, for whatever is not as above."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "Name a file of templates.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (invalid UTF-8 at byte {error.start})") from error
    document = parse_yaml(text, str(path))
    reader = _Reader(path, document.lines)
    value = document.value
    if not isinstance(value, dict) or not isinstance(value.get("templates"), list) or not value["templates"]:
        raise UserError(f"{path} has no list `templates`", "See `mlxtune make from-template --help` for its form.")
    reader.require_known(value, ("templates", "slots"), "")
    given = value.get("slots") or {}
    if not isinstance(given, dict):
        raise reader.wrong("slots", "is no section", "Write name: values, a slot on each line.")
    several = len(value["templates"]) > 1
    templates = [reader.template(one, number, several) for number, one in enumerate(value["templates"])]
    slots = {str(name): reader.slot(str(name), values) for name, values in given.items()}
    _require_fitting(templates, slots, reader)
    return Description(templates, slots, reader.notes)


class _Reader:
    """Reads the parts of one file."""

    def __init__(self, path: Path, lines: Mapping[str, int]) -> None:
        self.path = path
        self.lines = lines
        self.notes: list[str] = []

    def at(self, key: str) -> str:
        """Where a dotted key stands."""
        return f"{self.path} line {self.lines[key]}" if key in self.lines else str(self.path)

    def wrong(self, key: str, what: str, hint: str) -> UserError:
        return UserError(f"{self.at(key)}: {key} {what}", hint)

    def require_known(self, section: Mapping[Any, Any], known: Sequence[str], above: str) -> None:
        for name in section:
            if name not in known:
                key = f"{above}.{name}" if above else str(name)
                raise UserError(f"{self.at(key)}: {name} is not known here", did_you_mean(str(name), known))

    def template(self, given: Any, number: int, several: bool) -> Template:
        key = f"templates[{number}]"
        if not isinstance(given, dict):
            raise self.wrong(key, "is no section", 'Write - user: "...", and what else it has below that.')
        self.require_known(given, KEYS, key)
        texts = {}
        for role in TEXTS:
            if role in given:
                if not isinstance(given[role], str) or not given[role].strip():
                    raise self.wrong(f"{key}.{role}", "is no text", "Put it in quotes.")
                texts[role] = given[role]
        if "user" not in texts:
            raise self.wrong(key, "has no user", "Every template has what the user says.")
        share = given.get("share", SHARE if several else 1.0)
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise self.wrong(f"{key}.share", f"must be a share, found {share!r}", "More than 0, and 1 at most.")
        return Template(texts, float(share), self.at(key))

    def slot(self, name: str, given: Any) -> list[Value] | Named:
        key = f"slots.{name}"
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise self.wrong(key, "cannot be a slot's name", "Use letters, digits and _.")
        if isinstance(given, dict):
            return self._of_engine(key, given)
        if isinstance(given, str):
            values = self._of_file(key, given)
        elif isinstance(given, list):
            values = [self._value(f"{key}[{place}]", one) for place, one in enumerate(given)]
        else:
            raise self.wrong(key, "has no values", f"Give {VALUES}.")
        if not values:
            raise self.wrong(key, "has no values", f"Give {VALUES}.")
        if len({type(value) for value in values}) > 1:
            raise self.wrong(key, "has texts and sections", "Make all values of one kind.")
        different: list[Value] = []
        for value in values:
            if value not in different:
                different.append(value)
        if len(different) < len(values):
            self.notes.append(f"{self.at(key)}: {len(values) - len(different)} values come again, and count once")
        return different

    def _of_engine(self, key: str, given: Mapping[Any, Any]) -> Named:
        self.require_known(given, ("engine", "count"), key)
        what, count = given.get("engine"), given.get("count")
        if not isinstance(what, str) or not what.strip():
            raise self.wrong(key, "does not say what to name", f"Give {VALUES}.")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise self.wrong(key, "does not say how many", "Add count: 200.")
        return Named(what.strip(), count)

    def _of_file(self, key: str, given: str) -> list[Value]:
        file = self.path.parent / Path(given).expanduser()
        if kind_of(file):
            return self._of_rows(key, file)
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            hint = f"Give {VALUES}."
            raise self.wrong(key, f"names the file {file}, which cannot be read ({error.strerror})", hint) from error
        except UnicodeDecodeError as error:
            others = ", ".join(SUFFIXES)
            raise self.wrong(key, f"names {file}, which is no text", f"Name a .txt, or rows: {others}.") from error
        return [line.strip() for line in lines if line.strip()]

    def _of_rows(self, key: str, file: Path) -> list[Value]:
        values: list[Value] = []
        for row in raw_rows(file):
            if isinstance(row, Bad):
                raise UserError(f"{file} {row.place}: {row.reason}", "Mend the row.")
            number, fields = row
            values.append(self._value(f"{key} (row {number})", fields))
        return values

    def _value(self, key: str, given: Any) -> Value:
        if isinstance(given, dict) and given:
            return {str(name): self._text(f"{key}.{name}", one) for name, one in given.items()}
        return self._text(key, given)

    def _text(self, key: str, given: Any) -> str:
        if isinstance(given, bool) or not isinstance(given, str | int | float):
            raise self.wrong(key, f"is no text, found {given!r}", "Put texts that look like something else in quotes.")
        return str(given)


def _require_fitting(templates: Sequence[Template], slots: Mapping[str, list[Value] | Named], reader: _Reader) -> None:
    """Raise UserError for a place without a slot, a slot without a place, a column that there is not, and equal
    templates.
    """
    used = set()
    for template in templates:
        for text in template.texts.values():
            for name, column in named(text):
                used.add(name)
                if name not in slots:
                    raise UserError(
                        f"{template.place}: there is no slot {name}",
                        did_you_mean(name, slots) + " For {" + name + "} itself write {{" + name + "}}.",
                    )
                _require_column(template, name, column, slots[name])
        if any(other.texts == template.texts for other in templates if other is not template):
            raise UserError(f"{template.place}: the same template comes twice", "Leave out one of the two.")
    for name in slots:
        if name not in used:
            raise reader.wrong(f"slots.{name}", "is in no template", "Use it, or leave it out.")


def _require_column(template: Template, name: str, column: str, values: list[Value] | Named) -> None:
    """Raise UserError where a place names a column of texts, none of rows, or one that some row does not have."""
    of_rows = not isinstance(values, Named) and not isinstance(values[0], str)
    if column and not of_rows:
        raise UserError(f"{template.place}: the values of {name} are texts, without columns", f"Write {{{name}}}.")
    if not of_rows or isinstance(values, Named):
        return
    for value in values:
        assert not isinstance(value, str)
        if column not in value:
            said = (
                f"{{{name}.{column}}}: a value of {name} has no {column}" if column else f"{{{name}}} names no column"
            )
            raise UserError(f"{template.place}: {said}", f"There are: {', '.join(value)}.")

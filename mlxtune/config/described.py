"""The keys of a configuration in words: their types, limits and meanings, for `mlxtune config` and the docs."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import annotated_types
from pydantic.fields import FieldInfo

from mlxtune.config.resolve import Config
from mlxtune.config.schema import Section
from mlxtune.errors import UserError, nearest

# How Python's names of types read in a table.
TYPE_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", dict: "mapping"}
# What pydantic knows of a number's limits, in signs.
SIGNS = (
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Ge, "ge", ">="),
    (annotated_types.Lt, "lt", "<"),
    (annotated_types.Le, "le", "<="),
)


@dataclass(frozen=True)
class Key:
    """One key."""

    section: str  # that it stands in: "train"
    name: str  # in its section: "lr"
    allowed: str  # its type and limits, in words, values in backquotes
    default: Any  # its value where nobody sets it; None: none
    meaning: str  # and its unit

    @property
    def full(self) -> str:
        """As `--set` takes it."""
        return f"{self.section}.{self.name}"


def all_keys() -> Iterator[Key]:
    """In the order of the schema."""
    for section, field in Config.model_fields.items():
        for name, inner in type(field.default).model_fields.items():
            default = inner.get_default(call_default_factory=True)
            yield Key(section, name, allowed_in_words(inner), default, inner.description or "")


def keys_named(name: str) -> list[Key]:
    """A key as `section.key`, all of a section, or those of that name in any section. Raises UserError for none."""
    keys = list(all_keys())
    found = [key for key in keys if name in (key.full, key.section)] or [key for key in keys if key.name == name]
    if not found:
        near = nearest(name, [*(key.name for key in keys), *(key.full for key in keys)], 0.6)
        sections = ", ".join(Config.model_fields)
        raise UserError(f"no key {name}", f"Did you mean {near}?" if near else f"Sections: {sections}.")
    return found


def allowed_in_words(field: FieldInfo) -> str:
    """The type of a key, and the limits of its value."""
    return type_in_words(field.annotation) + limits_in_words(field.metadata)


def type_in_words(annotation: Any) -> str:
    """`Literal["all"] | int` -> "`all` or integer"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments if value != "")
    if origin is typing.Annotated:
        return type_in_words(arguments[0]) + limits_in_words(arguments[1:])
    if origin in (typing.Union, types.UnionType):  # of which None means "not given", as the empty default says
        return " or ".join(type_in_words(part) for part in arguments if part is not type(None))
    if origin is list:
        return f"list of {type_in_words(arguments[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"{annotation.__name__.removesuffix('Section').lower()}s"  # sources, exports
    return TYPE_NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def limits_in_words(metadata: Iterable[Any]) -> str:
    """[Ge(1), Lt(5)] -> " >= 1 and < 5"."""
    found = [f"{sign} {getattr(one, name)}" for one in metadata for kind, name, sign in SIGNS if isinstance(one, kind)]
    return " " + " and ".join(found) if found else ""

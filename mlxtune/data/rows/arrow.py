"""Arrow tables, as Parquet files and `datasets` hold them -> rows as they were before Arrow gave them one type.

Arrow gives every struct of a column the same fields, and fills those that a row does not have with null; a map is a
list of pairs; what fits no type (messages with unequal keys) is JSON text, in columns of the type arrow.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlxtune.data.rows.readers import Bad, Rows

if TYPE_CHECKING:
    import pyarrow

Decode = Callable[[Any], Any]  # a value as pyarrow hands it out, never None -> what was put in


def rows(source: str, table: pyarrow.Table | pyarrow.RecordBatch, before: int) -> Rows:
    """The rows of one table, numbered from `before` + 1; a column that a row has null in stays, as None."""
    decoders = {field.name: _decoder(field.type) for field in table.schema}
    for number, row in enumerate(table.to_pylist(), before + 1):
        try:
            decoded = {name: _decoded(decode, row[name]) for name, decode in decoders.items()}
        except (ValueError, RecursionError) as error:
            yield Bad(source, number, f"holds JSON that cannot be read ({error})")
            continue
        yield number, decoded


def _decoded(decode: Decode, value: Any) -> Any:
    """A value, or None for null."""
    if value is None:
        return None
    return decode(value)


def _decoder(kind: Any) -> Decode:
    """What turns a value of one Arrow type into what was put in."""
    import pyarrow
    from pyarrow import types

    if isinstance(kind, pyarrow.BaseExtensionType):
        return json.loads if kind.extension_name == "arrow.json" else _as_it_is
    if types.is_struct(kind):
        return _struct({field.name: _decoder(field.type) for field in kind})
    if types.is_map(kind):
        return _map(_decoder(kind.item_type))
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _decoder(kind.value_type)
    if types.is_nested(kind) and hasattr(kind, "value_type"):  # lists of every width
        return _list(_decoder(kind.value_type))
    return _as_it_is


def _as_it_is(value: Any) -> Any:
    return value


def _struct(decoders: dict[str, Decode]) -> Decode:
    """Of an object: fields that are null were not there. decoders: field -> its own."""

    def decode(value: dict[str, Any]) -> dict[str, Any]:
        return {name: decoders[name](item) for name, item in value.items() if item is not None}

    return decode


def _map(decode_item: Decode) -> Decode:
    """Of an object that Arrow holds as a list of (key, value)."""

    def decode(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        return {key: _decoded(decode_item, item) for key, item in pairs}

    return decode


def _list(decode_item: Decode) -> Decode:
    def decode(items: list[Any]) -> list[Any]:
        return [_decoded(decode_item, item) for item in items]

    return decode

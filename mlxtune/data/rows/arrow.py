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

Decode = Callable[[Any], Any]


def rows(source: str, table: pyarrow.Table | pyarrow.RecordBatch, before: int) -> Rows:
    """The rows of one table, numbered from `before` + 1; a column that a row has null in stays, as None."""
    columns = [(field.name, _decoder(field.type)) for field in table.schema]
    for number, row in enumerate(table.to_pylist(), before + 1):
        try:
            yield number, {name: None if row[name] is None else decode(row[name]) for name, decode in columns}
        except (ValueError, RecursionError) as error:
            yield Bad(source, number, f"holds JSON that cannot be read ({error})")


def _decoder(kind: Any) -> Decode:
    """Turns a value of one Arrow type, never null itself, into what was put in."""
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


def _struct(fields: dict[str, Decode]) -> Decode:
    return lambda value: {name: fields[name](item) for name, item in value.items() if item is not None}


def _map(decode: Decode) -> Decode:
    return lambda pairs: {key: None if item is None else decode(item) for key, item in pairs}


def _list(decode: Decode) -> Decode:
    return lambda items: [None if item is None else decode(item) for item in items]

"""Rows of any known format -> rows of another, one JSON object per line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxtune_convert.files import json_text, new_file

from mlxtune.data.rows import formats
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.preference_writers import (
    NO_PAIR,
    rated_to_kto,
    to_implicit,
    to_kto,
    to_llama_factory,
    to_openai,
    to_pairs,
)
from mlxtune.data.rows.readers import Bad
from mlxtune.data.rows.two_sides import TwoSides, together
from mlxtune.data.rows.values import RowError
from mlxtune.data.rows.writers import to_alpaca, to_messages, to_sharegpt
from mlxtune.errors import UserError

# What `data convert --to` takes -> what makes a row of a conversation.
CONVERSATIONS: dict[str, Callable[[Record], dict[str, Any]]] = {
    "messages": to_messages,
    "sharegpt": to_sharegpt,
    "alpaca": to_alpaca,
}
# The same -> what makes rows of a pair.
PREFERENCES: dict[str, Callable[[TwoSides], list[dict[str, Any]]]] = {
    "pairs": to_pairs,
    "pairs-implicit": to_implicit,
    "openai": to_openai,
    "llama-factory": to_llama_factory,
    "kto": to_kto,
}
TARGETS = (*CONVERSATIONS, *PREFERENCES)


@dataclass
class Rewritten:
    """What became of some rows."""

    written: int = 0  # rows of the new file
    left_out: list[Bad] = field(default_factory=list)  # rows that are not in it
    rejected: int = 0  # pairs of which the chosen answer alone is in it


def rewrite(
    rows: Iterator[Record | Bad],
    target: str,
    out: Path,
    force: bool = False,
    drop: bool = False,
    sources: Sequence[Path] = (),
) -> Rewritten:
    """Write `out`, whole or not at all.

    target: one of TARGETS; drop: rows that cannot be read, or that the format cannot hold, are left out, and of pairs
    the rejected answer where the format holds one; else UserError lists them; sources: files that `out` may not
    replace.
    """
    done = Rewritten()
    with new_file(out, force, sources) as file:
        for row in together(rows):
            if isinstance(row, Bad):
                done.left_out.append(Bad(row.file, row.row, row.reason))
                continue
            if isinstance(row, Record) and row.text is not None:
                raise UserError(f"{row.file}: plain text has no turns to convert")
            first = row.chosen if isinstance(row, TwoSides) else row
            if isinstance(row, TwoSides) and target in CONVERSATIONS:
                if not drop:
                    raise UserError(
                        f"{first.file} {first.place}: a pair has two answers, a row of {target} has one",
                        f"Add --drop to write the chosen answers alone, or write pairs: --to {', '.join(PREFERENCES)}.",
                    )
                done.rejected += 1
            try:
                made = _made_of(row, target)
            except RowError as error:
                done.left_out.append(Bad(first.file, first.row, str(error)))
                continue
            for one in made:
                file.write(json_text({**first.fields, **one}, default=str) + "\n")
            done.written += len(made)
        if not drop:
            formats.require_good(done.left_out, done.written + len(done.left_out), "--drop leaves them out.")
        if not done.written:
            raise UserError(f"none of {len(done.left_out)} rows can be converted to {target}")
    return done


def _made_of(row: Record | TwoSides, target: str) -> list[dict[str, Any]]:
    """The rows that one becomes. Raises RowError where the format cannot hold it."""
    if isinstance(row, TwoSides):
        if target in PREFERENCES:
            return PREFERENCES[target](row)
        return [CONVERSATIONS[target](row.chosen)]
    if target in CONVERSATIONS:
        return [CONVERSATIONS[target](row)]
    if target == "kto":
        return rated_to_kto(row)
    raise RowError(NO_PAIR)

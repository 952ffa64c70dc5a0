"""card.md: what made a file of rows, and what to look at before it is published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxtune.make.reasons import REASONS


def card(document: Mapping[str, Any], licence: str) -> str:
    """The text of the card. document: as `Making.finish` returns it; licence: of the engine, "" where unknown."""
    kept = f"{document['rows']:,} rows were kept"
    is_by_hand = bool(document.get("by hand"))
    no_engine = not is_by_hand and not document["requests"]  # templates whose slots and answers are all given
    heading = "# Rows made by a model"
    if is_by_hand:
        heading = "# Rows written by a person"
    elif no_engine:
        heading = "# Rows made from templates"
    lines = [
        heading,
        "",
        f"`mlxtune make {document['how']}` made these rows with {_code(document['engine'])}. "
        f"{document['requests']:,} requests were asked; {kept}.",
        "",
        "| what | |",
        "| --- | --- |",
    ]
    for name, value in document.items():
        if name not in LEFT_OUT:
            lines.append(f"| {name} | {_code(value)} |")
    lines += ["", "## Not kept", ""]
    for code, count in sorted(document["rejected"].items(), key=lambda one: (-one[1], one[0])):
        lines.append(f"- {count:,} {code}: {REASONS[code]}")
    if not document["rejected"]:
        lines.append("Nothing was left out.")
    if document["stopped"]:
        lines += ["", f"It stopped before {document['wanted']:,} {document['what']} were there: {document['stopped']}."]
    lines += ["", "## Licences and terms", ""]
    if not is_by_hand and not no_engine:
        lines += [
            f"- The engine: {licence or 'its licence is not known here'}. Check the engine's terms before you publish: "
            "some forbid to train other models on answers.",
            "- A model wrote these rows: they may be wrong, and may repeat what it was trained on. Read a sample, and "
            "run `mlxtune data check` on them.",
        ]
    lines.append(
        "- What the rows were made from: its licence is not known here. Rows made from a text may be bound by it."
    )
    return "\n".join(lines) + "\n"


LEFT_OUT = ("out", "how", "requests", "rows", "rejected", "stopped", "notes", "what", "engine")  # said otherwise


def _code(value: Any) -> str:
    """A value between backticks, on one line."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "/")
    return f"`{text}`"

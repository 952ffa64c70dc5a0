"""How `mlxtune data show` looks: rows as JSON Lines, or coloured by what is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlxtune_convert.shown import shown, shown_name

if TYPE_CHECKING:
    from rich.console import Console

    from mlxtune.data.chat.renderer import Row


def as_json(tokenizer: Any, row: Row) -> dict[str, Any]:
    """What is known of one example; messages are counted from 1."""
    from mlxtune.data.survey.trained_text import decoded

    out: dict[str, Any] = {"row": row.record.row}
    if row.part:
        out["part"] = row.part
    if row.example is None:
        out["dropped"] = row.dropped
    else:
        ids = [int(token) for token in row.example.ids]
        out["ids"] = ids
        out["mask"] = row.example.mask.tolist()
        out["text"] = decoded(tokenizer, ids) if row.shortened else row.text
    if row.damage:
        out["damage"] = [damage.text for damage in row.damage]
    if row.kinds:
        out["kinds"] = [[kind, message + 1] for kind, message in row.kinds]
    return out


def draw(out: Console, tokenizer: Any, row: Row) -> None:
    """Print one example: green, or between marks where there is no colour, what the model must produce."""
    import numpy as np
    from rich.text import Text

    from mlxtune.data.chat.asked import KINDS
    from mlxtune.data.survey.trained_text import pieces

    if row.example is None:
        out.print(Text(shown_name(f"{row.place}: dropped ({row.dropped})"), style="bold red"))
        return
    ending = ", shortened" if row.shortened else ""
    head = f"{row.place}: {len(row.example.ids)} tokens, {np.count_nonzero(row.example.mask)} trained on{ending}"
    out.print(Text(shown_name(head), style="bold"))
    for damage in row.damage:
        out.print(Text(f"damage: {shown_name(damage.text)}", style="bold red"))
    for kind, message in row.kinds:
        out.print(Text(f"message {message + 1}: {KINDS[kind]}", style="yellow"))
    body = Text()
    for supervised, piece in pieces(tokenizer, row.example):
        text = shown(piece)
        if supervised and (out.no_color or not out.is_terminal):
            text = f"⟦{text}⟧"
        body.append(text, style="green" if supervised else "dim")
    out.print(body)
    out.print()

"""How `mlxtune data show` looks: rows as JSON Lines, or coloured by what is trained on.

A pair is printed as its prompt once, then both answers, told apart by a sign and by colour:

    line 1: a pair, 9 tokens before the answers
    <|im_start|>user Hi<|im_end|>
    + chosen: 4 tokens trained on
    ⟦Hello!<|im_end|>⟧
    - rejected: 3 tokens trained on
    ⟦What?<|im_end|>⟧
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlxtune_convert.shown import shown, shown_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from mlxtune.data.chat.masking import Example
    from mlxtune.data.chat.renderer import Row

SIGNS = {"chosen": "+", "rejected": "-", "good": "+", "bad": "-"}  # of each side: colours are not seen by everyone
COLOURS = {"chosen": "green", "rejected": "red", "good": "green", "bad": "red"}


def as_json(tokenizer: Any, row: Row) -> dict[str, Any]:
    """What is known of one example; messages are counted from 1."""
    from mlxtune.data.rows.two_sides import side_of
    from mlxtune.data.survey.trained_text import decoded

    out: dict[str, Any] = {"row": row.record.row}
    side = side_of(row.record)
    if side:
        out["side"] = side
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
    """Print one example: green, or between marks where there is no colour, what the model must produce; red that of an
    answer which it must not prefer.
    """
    import numpy as np
    from rich.text import Text

    from mlxtune.data.rows.two_sides import side_of

    if row.example is None:
        _draw_dropped(out, row)
        return
    side = side_of(row.record)
    ending = ", shortened" if row.shortened else ""
    sign = f"{SIGNS[side]} {side}: " if side else ""
    head = f"{sign}{row.place}: {len(row.example.ids)} tokens, {np.count_nonzero(row.example.mask)} trained on{ending}"
    out.print(Text(shown_name(head), style=f"bold {COLOURS.get(side, '')}".strip()))
    _draw_remarks(out, row)
    _draw_tokens(out, tokenizer, row.example, COLOURS.get(side, "green"))
    out.print()


def draw_pair(out: Console, tokenizer: Any, both: Sequence[Row]) -> None:
    """Print both sides of a pair, what they begin with once. A side that needs several examples is printed example by
    example; a pair that is not used, with the reason alone.

    both: the examples of the chosen side, then those of the rejected one.
    """
    import numpy as np
    from rich.text import Text

    from mlxtune.data.chat.masking import Example
    from mlxtune.data.dataset.beginnings import common, first_target
    from mlxtune.data.rows.two_sides import side_of

    examples = [row.example for row in both if row.example is not None]
    if not examples:
        out.print(Text(shown_name(f"{both[0].place}: a pair, dropped ({both[0].dropped})"), style="bold red"))
        return
    if len(examples) != 2:
        for row in both:
            draw(out, tokenizer, row)
        return
    first, second = examples
    shared = min(common(np.asarray(first.ids), np.asarray(second.ids)), first_target(first), first_target(second))
    out.print(Text(shown_name(f"{both[0].place}: a pair, {shared} tokens before the answers"), style="bold"))
    _draw_tokens(out, tokenizer, Example(first.ids[:shared], first.mask[:shared]), "green")
    for row, example in zip(both, examples, strict=True):
        side = side_of(row.record)
        ending = ", shortened" if row.shortened else ""
        head = f"{SIGNS[side]} {side}: {np.count_nonzero(example.mask)} tokens trained on{ending}"
        out.print(Text(head, style=f"bold {COLOURS[side]}"))
        _draw_remarks(out, row)
        _draw_tokens(out, tokenizer, Example(example.ids[shared:], example.mask[shared:]), COLOURS[side])
    out.print()


def _draw_dropped(out: Console, row: Row) -> None:
    from rich.text import Text

    from mlxtune.data.rows.two_sides import side_of

    side = side_of(row.record)
    sign = f"{SIGNS[side]} {side}: " if side else ""
    out.print(Text(shown_name(f"{sign}{row.place}: dropped ({row.dropped})"), style="bold red"))


def _draw_remarks(out: Console, row: Row) -> None:
    """What the template drops of a row, and what is to be known of its turns."""
    from rich.text import Text

    from mlxtune.data.chat.asked import KINDS

    for damage in row.damage:
        out.print(Text(f"damage: {shown_name(damage.text)}", style="bold red"))
    for kind, message in row.kinds:
        out.print(Text(f"message {message + 1}: {KINDS[kind]}", style="yellow"))


def _draw_tokens(out: Console, tokenizer: Any, example: Example, colour: str) -> None:
    """colour: of what the model must produce."""
    from rich.text import Text

    from mlxtune.data.survey.trained_text import pieces

    body = Text()
    for supervised, piece in pieces(tokenizer, example):
        text = shown(piece)
        if supervised and (out.no_color or not out.is_terminal):
            text = f"⟦{text}⟧"
        body.append(text, style=colour if supervised else "dim")
    out.print(body)

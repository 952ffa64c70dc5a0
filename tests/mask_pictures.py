"""Draw the pictures of docs/masks.md: conversations as mlxtune renders them, coloured by what is trained on.

    python tests/mask_pictures.py        # writes docs/pictures/*.svg

What is drawn is what `mlxtune data show` prints, with the published templates that the tests hold (tests/templates).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from masks import family

from mlxtune.config.schema import DataSection
from mlxtune.data.chat.renderer import Renderer
from mlxtune.data.rows.formats import Record
from mlxtune.data.survey.trained_text import pieces

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
COLUMNS = 84  # letters of a line
LETTER, LINE = 7.8, 21  # width of a letter and height of a line, in pixels
MARGIN, HEAD, GAP = 14, 24, 16  # around the text, of an example's title, between two examples
STYLE = (
    "text{font:13px ui-monospace,Menlo,Consolas,monospace;fill:#555;white-space:pre}"
    ".title{font:bold 13px system-ui,sans-serif;fill:#222}.learned{fill:#063}"
    ".page{fill:#fff;stroke:#bbb}.ground{fill:#c9f0d3}.under{stroke:#0a7a36;stroke-width:1.5}"
)
Piece = tuple[bool, str]  # whether the model must produce it, and the text


@dataclass(frozen=True)
class Picture:
    """One conversation."""

    name: str  # of the file
    family: str  # whose template and special tokens
    messages: list[dict[str, Any]]
    titles: Sequence[str]  # of its examples
    tools: list[dict[str, Any]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # keys of the section `data`


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {"id": "call00001", "type": "function", "function": {"name": "find_order", "arguments": {"number": 12}}}
TOOLS = [{"type": "function", "function": {"name": "find_order", "parameters": {"type": "object", "properties": {}}}}]
DRAWN = (
    Picture(
        "one-answer",
        "phi",
        [
            said("system", "You answer for a shop."),
            said("user", "Where is my order?"),
            said("assistant", "On its way: it comes on Friday."),
        ],
        ["One example"],
    ),
    Picture(
        "two-answers",
        "phi",
        [
            said("user", "Where is my order?"),
            said("assistant", "On its way: it comes on Friday."),
            said("user", "And my refund?"),
            said("assistant", "It was paid yesterday."),
        ],
        ["One example: the first answer stands in it as it is asked for"],
    ),
    Picture(
        "thoughts",
        "qwen",
        [
            said("user", "Where is my order?"),
            said("assistant", "It comes on Friday.", reasoning_content="Sent on Tuesday: three days."),
            said("user", "And my refund?"),
            said("assistant", "It was paid yesterday.", reasoning_content="The list of payments says so."),
        ],
        ["Example 1: the first answer, with its thought", "Example 2: the second, behind what it will be asked behind"],
    ),
    Picture(
        "tools",
        "mistral",
        [
            said("user", "Where is my order 12?"),
            said("assistant", "", tool_calls=[CALL]),
            said("tool", '{"sent": "Tuesday"}', tool_call_id="call00001", name="find_order"),
            said("assistant", "It was sent on Tuesday."),
        ],
        ["The call and the answer are trained on, the result is given"],
        TOOLS,
    ),
)


def examples(picture: Picture) -> list[list[Piece]]:
    """The pieces of each example that a run would train on."""
    tokenizer = family(picture.family)
    renderer = Renderer(tokenizer, DataSection(max_tokens=4096, **picture.settings))
    record = Record("rows.jsonl", 1, "messages", picture.messages, picture.tools)
    rows = list(renderer.rows([record]))
    assert all(row.example is not None for row in rows), [row.dropped for row in rows]
    return [pieces(tokenizer, row.example) for row in rows if row.example is not None]


def lines_of(texts: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces cut into lines of at most COLUMNS letters; a line break of the text is shown as ↵."""
    lines: list[list[Piece]] = [[]]
    room = COLUMNS
    for is_learned, text in texts:
        for place, part in enumerate(text.split("\n")):
            if place:
                lines[-1].append((is_learned, "↵"))
                lines.append([])
                room = COLUMNS
            while part:
                if not room:
                    lines.append([])
                    room = COLUMNS
                lines[-1].append((is_learned, part[:room]))
                part, room = part[room:], room - len(part[:room])
    return [line for line in lines if line]


def drawn_line(line: Sequence[Piece], top: float) -> list[str]:
    out, left = [], float(MARGIN)
    for is_learned, text in line:
        width = LETTER * len(text)
        if is_learned:
            out.append(f'<rect class="ground" x="{left:g}" y="{top:g}" width="{width:g}" height="{LINE - 3}"/>')
            under = top + LINE - 3
            out.append(f'<line class="under" x1="{left:g}" y1="{under:g}" x2="{left + width:g}" y2="{under:g}"/>')
        kind = ' class="learned"' if is_learned else ""
        place = f'x="{left:g}" y="{top + 14:g}" textLength="{width:g}"'
        out.append(f'<text{kind} {place} xml:space="preserve">{escape(text)}</text>')
        left += width
    return out


def drawn(picture: Picture) -> str:
    """The picture as SVG."""
    found = examples(picture)
    assert len(found) == len(picture.titles), (picture.name, len(found))
    body: list[str] = []
    top = float(MARGIN)
    for title, texts in zip(picture.titles, found, strict=True):
        body.append(f'<text class="title" x="{MARGIN}" y="{top + 12:g}">{escape(title)}</text>')
        top += HEAD
        for line in lines_of(texts):
            body += drawn_line(line, top)
            top += LINE
        top += GAP
    width, height = round(COLUMNS * LETTER + 2 * MARGIN), round(top - GAP + MARGIN)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    page = f'<rect class="page" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="6"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", page, *body, "</svg>", ""])


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for one in DRAWN:
        (PICTURES / f"{one.name}.svg").write_text(drawn(one), encoding="utf-8")

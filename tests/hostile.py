"""Texts that command a terminal, hide what is shown, or begin a line of their own: from a seed, always the same."""

from __future__ import annotations

import random

LINE = "FORGED"  # begins what comes after a line break inside a name: no line of a terminal may begin with it
ENDS = ("\x07", "\x1b\\", "\x9c")
SEQUENCES = (
    *("\x1b[2J", "\x1b[H", "\x1b[31;1m", "\x1b[8m", "\x1b[1000D", "\x1b[6n", "\x1b[?1049h", "\x1b[20t", "\x1b[5i"),
    *("\x1b]0;title{end}", "\x1b]8;;http://evil.example{end}here\x1b]8;;{end}", "\x1b]52;c;ZXZpbA=={end}"),
    *(
        "\x1bPq#0;2;0;0;0{end}",
        "\x1b_Gf=24;AAAA{end}",
        "\x1b^private{end}",
        "\x1bXstart{end}",
        "\x1bc",
        "\x1b",
        "\x1b(0",
    ),
    *(
        "\x9b2J",
        "\x9b31m",
        "\x9d0;title{end}",
        "\x9d52;c;ZXZpbA=={end}",
        "\x90q{end}",
        "\x98{end}",
        "\x9e{end}",
        "\x9f",
    ),
)
SINGLE = "\x00\x01\x05\x07\x08\x0b\x0c\x0d\x0e\x0f\x11\x13\x18\x1a\x1b\x7f" + "".join(map(chr, range(0x80, 0xA0)))
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
BREAKS = "\n\r\u2028\u2029\x0b\x0c\x85"
UNSEEN = "\u200b\u2060\ufeff\u2063\u180e"


def texts(count: int = 200, seed: int = 16) -> list[str]:
    """Each kind in turn, with letters around it; the last ones mix several kinds."""
    draw = random.Random(seed)
    made = [one.replace("{end}", end) for one in SEQUENCES for end in ENDS if end == ENDS[0] or "{end}" in one]
    made += [*SINGLE, *BIDI, *UNSEEN, *(f"{one}{LINE}" for one in BREAKS)]
    while len(made) < count:
        made.append("".join(draw.choice(made[: len(made) // 2]) + draw.choice("aé漢🚲 ") for _ in range(3)))
    return [f"{draw.choice('kmp')}{index}{one}z" for index, one in enumerate(made[:count])]


def name(number: int) -> str:
    """A file's or folder's name: as many of the texts as fit into one, others for another number."""
    all_of_them = [text.replace("/", "|").replace("\0", "") for text in texts()]
    random.Random(number).shuffle(all_of_them)
    said = ""
    for text in (f"\n{LINE}", *all_of_them):
        if len((said + text).encode()) < 150:
            said += text
    return said

"""The pictures of docs/masks.md are what a run trains on."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from mask_pictures import DRAWN, PICTURES, Picture, drawn, examples, lines_of


@pytest.mark.parametrize("picture", [pytest.param(one, id=one.name) for one in DRAWN])
def test_a_picture_is_what_the_row_is_rendered_to_today(picture: Picture) -> None:
    text = (PICTURES / f"{picture.name}.svg").read_text(encoding="utf-8")
    assert text == drawn(picture), "run python tests/mask_pictures.py"
    ElementTree.fromstring(text)


def test_every_picture_is_shown_and_each_answer_and_call_is_trained_on_once() -> None:
    page = (PICTURES.parent / "masks.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(pictures/(.*?)\.svg\)", page) == [picture.name for picture in DRAWN]
    for picture in DRAWN:
        learned = "".join(text for pieces in examples(picture) for is_learned, text in pieces if is_learned)
        for message in picture.messages:
            if message["role"] == "assistant" and message["content"]:
                assert learned.count(message["content"]) == 1, picture.name
            elif message["role"] != "assistant":
                assert message["content"] not in learned, picture.name
    assert "find_order" in learned  # of the last one, that calls a tool


def test_long_lines_are_cut_and_line_breaks_are_shown() -> None:
    lines = lines_of([(False, "a\n"), (True, "b" * 100 + "\nc")])
    assert [[(flag, len(text)) for flag, text in line] for line in lines] == [
        [(False, 1), (False, 1)],
        [(True, 84)],
        [(True, 16), (True, 1)],
        [(True, 1)],
    ]

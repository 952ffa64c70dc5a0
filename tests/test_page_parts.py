"""What pages are made of: markup with nothing of strangers in it, tables, and colours that can be read."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import hostile
import page_readers
import pytest

import mlxtune.report
from mlxtune.report import style
from mlxtune.report.html import for_json, joined, prose, raw_style, script_json, tag
from mlxtune.report.page import POLICY, Section, page
from mlxtune.report.tables import SIGNS, callout, facts, folded, table

MARKUP = (
    "<script>alert(1)</script>",
    "</script>",
    "<!--",
    "-->",
    '"><img src=x onerror=y>',
    "&lt;",
    "'",
    "]]>",
    "\ufffe",
)


def test_text_is_escaped_and_markup_is_not() -> None:
    assert (
        tag("p", "tokens & ", tag("b", "<script>"), class_="note")
        == '<p class="note">tokens &amp; <b>&lt;script&gt;</b></p>'
    )
    assert joined("<", None, ["a", ["b", tag("i", "&")]]) == "&lt;ab<i>&amp;</i>"
    assert prose("see `<a>` or `b") == "see <code>&lt;a&gt;</code> or `b"


def test_attributes_are_escaped_and_left_out_where_there_is_nothing_to_say() -> None:
    made = tag("div", aria_label='"><b', class_=None, hidden=True, open=False, tabindex=0)
    assert made == '<div aria-label="&quot;&gt;&lt;b" hidden tabindex="0"></div>'


@pytest.mark.parametrize("name", ["b><script", "a b", "", "1"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no name"):
        tag(name)
    with pytest.raises(ValueError, match="no name"):
        tag("p", **{name: "x"})


def test_an_element_without_contents_takes_none() -> None:
    assert tag("br") == "<br>"
    with pytest.raises(ValueError, match="holds nothing"):
        tag("br", "x")


def test_html_is_made_in_one_module_alone() -> None:
    root = Path(mlxtune.report.__file__).parent
    makes = [
        path.relative_to(root).as_posix() for path in root.rglob("*.py") if re.search(r"\bHtml\(", path.read_text())
    ]
    assert makes == ["html.py"]
    raw = [path.name for path in root.rglob("*.py") if re.search(r"\braw_style\(", path.read_text())]
    assert sorted(raw) == ["html.py", "page.py"]


def test_a_style_sheet_that_could_end_its_element_is_refused() -> None:
    with pytest.raises(ValueError, match="markup"):
        raw_style("a{}</style>")


@pytest.mark.parametrize("text", [*MARKUP, *(" ".join(hostile.texts()[at : at + 25]) for at in range(0, 200, 25))])
def test_no_text_becomes_markup_or_an_order_wherever_it_stands(text: str) -> None:
    """In children, attributes, JSON, and every part: the page has the tags that it has with a harmless text."""

    def with_text(one: str) -> str:
        parts = joined(
            table(one, [one, one], [[one, one]]), facts(one, {one: one}), folded(one, one), callout("bad", one)
        )
        return page(one, tag("p", one, title=one), [Section("a", one, parts)], {one: [one, {"x": one}]})

    found, harmless = page_readers.read(with_text(text)), page_readers.read(with_text("word"))
    assert found.tags == harmless.tags
    assert [one[:2] for one in found.attributes] == [one[:2] for one in harmless.attributes]
    assert page_readers.faults(with_text(text)) == []
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", with_text(text))
    with_text(text).encode()  # halves of characters have no bytes
    assert page_readers.record(with_text(text)) == {text: [text, {"x": text}]}


def test_json_in_a_page_is_the_value_and_numbers_that_are_none_are_null() -> None:
    value = {"a": [1.5, math.nan, math.inf], "b": "\ud800</script>\U0001fffe\u2028", "c": (True, None)}
    text = script_json("x", value)
    read = json.loads(text.partition(">")[2].rpartition("<")[0])
    assert read == {"a": [1.5, None, None], "b": value["b"], "c": [True, None]} == for_json(value)
    assert text.count("<") == 2 and text.isascii()


def test_a_page_has_one_policy_one_style_sheet_and_no_place_to_go() -> None:
    made = page("T", tag("p", "lead"), [Section("one", "One", tag("p", "x")), Section("two", "Two", tag("p"))], {})
    assert page_readers.faults(made) == []
    assert "default-src &#x27;none&#x27;" in made and "unsafe" not in POLICY
    assert page_readers.leads_to(made) == []
    found = page_readers.read(made)
    assert [value for _, name, value in found.attributes if name == "href"] == ["#one", "#two"]
    assert not {"style", "onclick", "onload"} & {name for _, name, _ in found.attributes}
    assert made.startswith('<!DOCTYPE html>\n<html lang="en">')
    with pytest.raises(ValueError, match="one name"):
        page("T", tag("p"), [Section("one", "", tag("p")), Section("one", "", tag("p"))], {})


def test_the_policy_names_the_style_sheet_that_the_page_holds() -> None:
    import base64
    import hashlib

    made = page("T", tag("p"), [], {})
    sheet = re.findall("<style>(.*?)</style>", made, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(sheet[0].encode()).digest()).decode()
    assert len(sheet) == 1 and f"style-src 'sha256-{digest}'" in POLICY


def test_a_table_names_its_rows_and_columns() -> None:
    made = table("What", ["name", "n"], [["a", "1"], ["b", "2"]], {1})
    assert made.count('<th scope="col"') == made.count('<th scope="row"') == 2
    assert '<td class="number">2</td>' in made and "<caption>What</caption>" in made
    with pytest.raises(ValueError, match="3 cells under 2 columns"):
        table("What", ["name", "n"], [["a", "1", "2"]])


def test_a_boxed_line_says_what_it_is_in_a_word_too() -> None:
    for kind, (sign, word) in SIGNS.items():
        made = page_readers.read(callout(kind, "x"))
        assert made.texts == [sign, f"{word}: ", "x"]


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    parts = []
    for at in (1, 3, 5):
        part = int(colour[at : at + 2], 16) / 255
        parts.append(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def blended(over: str, under: str, share: float) -> str:
    """A colour drawn over another one with an opacity."""
    mixed = [round(share * int(over[at : at + 2], 16) + (1 - share) * int(under[at : at + 2], 16)) for at in (1, 3, 5)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def test_contrast_is_that_of_the_guidelines() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("colours", [style.DAY, style.NIGHT], ids=["by day", "by night"])
def test_every_text_and_every_curve_can_be_read_on_what_it_stands_on(colours: dict[str, str]) -> None:
    curves = [f"curve{rank}" for rank in range(style.CURVES)]
    assert {*style.GROUNDS, *style.TEXTS, *style.MARKED, *curves, "rule"} == set(colours)
    for ground, text in itertools.product(style.GROUNDS, [*style.TEXTS, *curves]):
        assert contrast(colours[ground], colours[text]) >= 4.5, (ground, text)
    for ground in style.MARKED:
        assert contrast(colours[ground], colours["ink"]) >= 4.5, ground
    faint = float(re.findall(r"\.faint\{[^}]*opacity:([\d.]+)", style.SHEET)[0])
    for curve in curves:  # a drawing needs 3 to 1
        assert contrast(blended(colours[curve], colours["paper"], faint), colours["paper"]) >= 3, curve


def test_a_sheet_is_dark_by_night_on_a_screen_and_light_on_paper() -> None:
    assert "@media screen and (prefers-color-scheme:dark)" in style.SHEET
    night = style.SHEET.partition("prefers-color-scheme:dark")[2].partition("}}")[0]
    assert all(f"--{name}:{colour}" in night for name, colour in style.NIGHT.items())


@pytest.mark.parametrize(
    "markup",
    [
        '<a href="https://example.org">x</a>',
        '<img src="data:,">',
        '<p style="color:red">x</p>',
        '<p onclick="x()">x</p>',
        "<style>a{background:url(x)}</style>",
        "<script>x()</script>",
        '<form action="#"></form>',
    ],
)
def test_what_leads_out_of_a_page_would_be_noticed(markup: str) -> None:
    assert page_readers.leads_to(f"<html><body>{markup}</body></html>")

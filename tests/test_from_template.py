"""mlxtune make from-template: slots, draws without repetition, shares, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made
import pytest
import tiny
from made import CUT, Scripted, lines, reasons

from mlxtune.errors import UserError
from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.make.from_template import drawing, naming
from mlxtune.make.from_template.description import Template, read
from mlxtune.make.from_template.drawing import drawn, shares
from mlxtune.make.from_template.maker import FromTemplate, wanted_of_each
from mlxtune.make.guard import Guard

CAPITALS = """
templates:
  - user: "What is the capital of {country.name}?"
    assistant: "The capital of {country.name} is {country.capital}."
  - user: "Tell me {how} which city governs {country.name}, as {{json}}."
    system: "You are {how} short."
    assistant: "{country.capital}"
    share: 0.75
slots:
  country: countries.csv
  how: [quickly, 5]
"""
COUNTRIES = "name,capital\nFrance,Paris\nItaly,Rome\nSpain,Madrid\n"
ASKED = """
templates:
  - user: "Explain {what} to {whom}."
slots:
  what: {engine: things in a kitchen, count: 4}
  whom: people.txt
"""
SUITE = "The fire brigade of Elmtown keeps its forks in the cellar."


def written(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "countries.csv").write_text(COUNTRIES)
    (folder / "people.txt").write_text("a child\n\na cook\na cook\n")
    (folder / "t.yaml").write_text(text)
    return folder / "t.yaml"


def run(
    folder: Path, text: str, count: int, answers: Callable[[Request], str] = lambda _: "A good answer.", **more: Any
) -> tuple[dict[str, Any], list[str]]:
    """(The document, the notes) of a making in folder/made."""
    guard = more.pop("guard", Guard())
    with made.making(folder / "made", Scripted(answers), "from-template", **more) as one:
        maker = FromTemplate(one, read(written(folder, text)), guard, count, seed=0)
        return one.finish(*maker.run()), maker.notes()


def test_values_of_lists_and_of_rows_fill_the_slots(tmp_path: Path) -> None:
    document, notes = run(tmp_path, CAPITALS, 6)
    rows = [row["messages"] for row in lines(tmp_path / "made" / "train.jsonl")]
    assert document["kept"] == 6 and document["requests"] == 0
    of_first = {(row[0]["content"], row[1]["content"]) for row in rows if len(row) == 2}
    pairs = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid")]
    assert of_first == {
        (f"What is the capital of {name}?", f"The capital of {name} is {capital}.") for name, capital in pairs
    }
    for system, user, answer in (row for row in rows if len(row) == 3):
        how = "5" if "5" in user["content"] else "quickly"
        (pair,) = (pair for pair in pairs if pair[1] == answer["content"])
        assert user["content"] == f"Tell me {how} which city governs {pair[0]}, as {{json}}."
        assert system["content"] == f"You are {how} short."
    assert sorted(notes) == [
        f'50% of the rows begin with "{words}": a model comes to expect that; write more templates'
        for words in ("tell me", "what is")
    ]


def test_no_combination_comes_twice_and_equal_shares_give_way_to_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = Template({"user": "{a} {b} {a}"}, 1.0, "")
    values: dict[str, Any] = {"a": [str(n) for n in range(7)], "b": [str(n) for n in range(5)]}
    found = [tuple(chosen.values()) for _, chosen in drawn(template, values, "0")]
    assert len(found) == len(set(found)) == 35 and found != sorted(found)
    assert found == [tuple(chosen.values()) for _, chosen in drawn(template, values, "0")]
    assert found != [tuple(chosen.values()) for _, chosen in drawn(template, values, "1")]
    monkeypatch.setattr(drawing, "LISTED", 0)
    assert sorted(tuple(chosen.values()) for _, chosen in drawn(template, values, "0")) == sorted(found)
    large: dict[str, Any] = {name: [str(n) for n in range(10_000)] for name in "abcdef"}
    endless = drawn(Template({"user": "{a}{b}{c}{d}{e}{f}"}, 1.0, ""), large, "0")  # 10^24: more than a list can hold
    assert len({number for number, _ in (next(endless) for _ in range(100))}) == 100
    few, rest = Template({"user": "{a} {b}"}, 0.07, ""), Template({"user": "{a}, {b}, {c}"}, 1.0, "")
    assert wanted_of_each([few, rest], values | {"c": [str(n) for n in range(9)]}, 100) == [7, 93]
    assert shares([10, 100, 100], 90) == [10, 40, 40]
    assert shares([3, 2, 9], 100) == [3, 2, 9] and sum(shares([50, 50, 50], 100)) == 100


@pytest.mark.parametrize(
    ("count", "text", "said"),
    [
        (10, CAPITALS, "the templates give 9 rows at most"),
        (8, CAPITALS.replace("0.75", "0.5"), "the templates give 7 rows at most"),
    ],
)
def test_more_rows_than_combinations_or_shares_give_are_refused(
    tmp_path: Path, count: int, text: str, said: str
) -> None:
    refused = tiny.refused(
        tmp_path / "out", "make", "from-template", written(tmp_path, text), "--count", str(count),
        "--out", tmp_path / "out", expected=(said, "3 combinations", "line 3"),
    )  # fmt: skip
    assert "share" in refused


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{how} which", "{hwo} which", "line 5: there is no slot hwo"),
        ("{country.capital}.", "{country}.", "{country} names no column"),
        ("{country.capital}.", "{country.mayor}.", "a value of country has no mayor"),
        ("{how} short", "{how.x} short", "the values of how are texts"),
        ("{how}", "quickly", "line 11: slots.how is in no template"),
        ("quickly, 5", "yes, true", "slots.how[1] is no text"),
        ("[quickly, 5]", "[]", "slots.how has no values"),
        ("[quickly, 5]", "none.txt", "none.txt, which cannot be read"),
        ("[quickly, 5]", "{engine: ways}", "does not say how many"),
        ("0.75", "1.5", "line 8: templates[1].share must be a share"),
        ("    share", "    shares", "shares is not known here"),
        ('  - user: "What', '  - text: "What', "line 3: text is not known here"),
        ("templates:", "tempaltes:", "has no list `templates`"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_its_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in CAPITALS
    with pytest.raises(UserError) as raised:
        read(written(tmp_path, CAPITALS.replace(old, new)))
    assert said in raised.value.message and raised.value.hint


def test_an_engine_names_the_values_and_answers_and_a_killed_making_goes_on(tmp_path: Path) -> None:
    lists = ["1. a pan\n2. A pot.\n3. a spo" + CUT, "- a pot\n- a knife\n- a fork\n- a sieve"]

    def answer(request: Request) -> str:
        if request.id.startswith("slot:"):
            return lists[request.sample]
        asked = request.messages[0]["content"]
        if "a knife to a cook" in asked:
            return ""
        return SUITE if "a fork to a child" in asked else "It belongs in a kitchen."

    guard = Guard([SUITE])
    document, _ = run(tmp_path, ASKED, 8, answer, guard=guard)
    rows = [row["messages"][0]["content"] for row in lines(tmp_path / "made" / "train.jsonl")]
    things = ["a pan", "A pot", "a knife", "a fork"]
    wanted = {f"Explain {thing} to {whom}." for thing in things for whom in ("a child", "a cook")}
    found = reasons(tmp_path / "made")
    assert set(rows) == wanted - {"Explain a fork to a child.", "Explain a knife to a cook."} and len(rows) == 6
    assert {reason: len(some) for reason, some in found.items()} == {"empty": 1, "guarded": 1}
    assert "used up, 2 rows are missing" in document["stopped"] and document["kept"] == 6
    before = (tmp_path / "made" / "train.jsonl").read_bytes()
    again, _ = run(tmp_path, ASKED, 8, lambda _: "never asked", guard=guard)
    assert (tmp_path / "made" / "train.jsonl").read_bytes() == before and again["kept"] == document["kept"]


def test_an_engine_that_names_too_few_values_ends_it(tmp_path: Path) -> None:
    document, _ = run(tmp_path, ASKED, 4, lambda _: "1. a pan\n2. a pot")
    assert "names 2 of the 4 values of the slot what" in document["stopped"] and document["rows"] == 0
    asked = naming.request("what", read(tmp_path / "t.yaml").named["what"], ["a pan"], 1)
    assert "None of these: a pan" in asked.messages[0]["content"] and "Name 3 " in asked.messages[0]["content"]


def test_templates_of_which_nothing_stays_end_before_all_combinations_are_tried(tmp_path: Path) -> None:
    many = ASKED.replace("count: 4", "count: 400")
    values = "\n".join(f"{n}. thing {n}" for n in range(1, 401))
    document, _ = run(tmp_path, many, 10, lambda one: values if one.id.startswith("slot:") else "")
    assert document["requests"] < 120 and "of the last 96 prompts hardly any" in document["stopped"]
    guarded = Guard(["Explain thing 7 to a cook, please do"])
    document, _ = run(
        tmp_path / "2", many.replace("{whom}.", "{whom}, please do now."), 10, lambda _: values, guard=guarded
    )
    assert document["requests"] == 1 and len(reasons(tmp_path / "2" / "made")["guarded"]) == 96


@pytest.mark.parametrize(
    "text", ["1、苹果\n2、梨", "1．苹果\n2．梨", '["苹果", "梨"]', "1. 苹果\n2. 梨\n\n希望有帮助", "- 苹果\n- 梨"]
)
def test_lists_are_read_as_people_of_any_script_write_them(text: str) -> None:
    assert naming.items(Answer("slot:x", 0, text, "", "stop", 9)) == ["苹果", "梨"]


def test_the_command_says_what_is_idle_and_shows_rows_beforehand(tmp_path: Path) -> None:
    words = ("make", "from-template", written(tmp_path, CAPITALS), "--count", "4", "--out", tmp_path / "out")
    assert "The capital of" in tiny.done(*words, "--dry-run").stdout and not (tmp_path / "out").exists()
    for more, said in ((("--engine", "m"), "--engine has no effect"), (("--temperature", "1"), "without --engine")):
        tiny.one_clear_line(tiny.mlxtune(*words, *more), said)
    written(tmp_path, ASKED)
    tiny.one_clear_line(tiny.mlxtune(*words), "nobody answers")
    written(tmp_path, CAPITALS)
    assert "4 of 4 rows kept" in tiny.done(*words).stdout
    card = (tmp_path / "out" / "card.md").read_text()
    assert card.startswith("# Rows made from templates\n") and "A model wrote these rows" not in card
    kept = Counter(len(row["messages"]) for row in lines(tmp_path / "out" / "train.jsonl"))
    assert kept == {2: 2, 3: 2}

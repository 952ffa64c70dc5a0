"""Rows that say which answer is preferred, in every format, become a prompt and its answers."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import tiny
from conversations import TOOL, answer, call, result, system, user

from mlxtune.config.schema import SourceSection
from mlxtune.data.dataset import sources
from mlxtune.data.rows import formats
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.sides import Side
from mlxtune.errors import UserError

Messages = list[dict[str, Any]]
GOOD, BAD = answer("Blue."), answer("Green?")
PAIR = ([user("Sky?")], [GOOD], [BAD])  # prompt, chosen, rejected
TALK = [user("Hi"), answer("Hello."), user("Sky?")]


def records(folder: Path, row: dict[str, Any], preferences: bool = True) -> list[Record]:
    found = list(formats.read(tiny.write_jsonl(folder / "d.jsonl", [row]), {}, preferences))
    assert all(isinstance(record, Record) for record in found), found
    return [record for record in found if isinstance(record, Record)]


def said(record: Record) -> tuple[Messages, Messages]:
    """(The prompt, whose answers must have no weight, the answer.)"""
    messages = record.messages or []
    prompt = messages[: record.prompt]
    assert all(message.get("weight") == 0 for message in prompt if message["role"] == "assistant")
    without = [{key: value for key, value in message.items() if key != "weight"} for message in prompt]
    return without, messages[record.prompt :]


def pair(folder: Path, row: dict[str, Any]) -> tuple[Messages, Messages, Messages]:
    chosen, rejected = records(folder, row)
    assert (chosen.side, rejected.side) == (Side.CHOSEN, Side.REJECTED)
    assert (chosen.row, chosen.tools) == (rejected.row, rejected.tools)
    assert chosen.teaches_nothing == rejected.teaches_nothing == ""
    prompt, first = said(chosen)
    same, second = said(rejected)
    assert prompt == same
    return prompt, first, second


HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Sky?\n\nAssistant: "
EXPECTED: dict[str, tuple[dict[str, Any], tuple[Messages, Messages, Messages]]] = {
    "texts": ({"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green?"}, PAIR),
    "texts, system": (
        {"system": "Be brief.", "prompt": "Sky?", "chosen": "Blue.", "rejected": "Green?"},
        ([system("Be brief."), user("Sky?")], [GOOD], [BAD]),
    ),
    "messages": ({"prompt": TALK, "chosen": [GOOD], "rejected": [BAD]}, (TALK, [GOOD], [BAD])),
    "one message a side": ({"prompt": TALK, "chosen": GOOD, "rejected": BAD}, (TALK, [GOOD], [BAD])),
    "messages, texts": ({"prompt": TALK, "chosen": "Blue.", "rejected": "Green?"}, (TALK, [GOOD], [BAD])),
    "JSON text": (
        {"prompt": json.dumps(TALK), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
        (TALK, [GOOD], [BAD]),
    ),
    "answers that are JSON, one of them torn": (
        {"prompt": "Sky?", "chosen": '[{"value": 1}]', "rejected": '[{"value": 1'},
        ([user("Sky?")], [answer('[{"value": 1}]')], [answer('[{"value": 1')]),
    ),
    "a text prompt, JSON text of conversations": (
        {"prompt": "Sky?", "chosen": json.dumps([*TALK, GOOD]), "rejected": json.dumps([*TALK, BAD])},
        (TALK, [GOOD], [BAD]),
    ),
    "a text that is JSON": (
        {"prompt": "Sky?", "chosen": '[{"role": "x"}]', "rejected": "Green?"},
        ([user("Sky?")], [answer('[{"role": "x"}]')], [BAD]),
    ),
    "whole conversations": ({"chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]}, (TALK, [GOOD], [BAD])),
    "whole conversations as JSON text": (
        {"chosen": json.dumps([*TALK, GOOD]), "rejected": json.dumps([*TALK, BAD])},
        (TALK, [GOOD], [BAD]),
    ),
    "whole conversations, null prompt": (
        {"prompt": None, "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
        (TALK, [GOOD], [BAD]),
    ),
    "UltraFeedback": (
        {
            "prompt": "Sky?",
            "chosen": [user("Sky?"), GOOD],
            "rejected": [user("Sky?"), BAD],
            "messages": [user("Sky?"), GOOD],
            "score_chosen": 8.5,
        },
        PAIR,
    ),
    "whole conversations behind their prompt": (
        {"prompt": TALK, "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]},
        (TALK, [GOOD], [BAD]),
    ),
    "other turns of the assistant too": (
        {"chosen": [user("Hi"), GOOD, user("Why?"), answer("So.")], "rejected": [user("Hi"), BAD, user("?"), BAD]},
        ([user("Hi")], [GOOD, user("Why?"), answer("So.")], [BAD, user("?"), BAD]),
    ),
    "a beginning of the answer that both share": (
        {"chosen": [user("Hi"), answer("Well."), GOOD], "rejected": [user("Hi"), answer("Well."), BAD]},
        ([user("Hi")], [answer("Well."), GOOD], [answer("Well."), BAD]),
    ),
    "Anthropic": ({"chosen": f"{HH}Blue.", "rejected": f"{HH}Green?"}, (TALK, [GOOD], [BAD])),
    "Anthropic, prompt apart": (
        {"prompt": HH.rstrip(), "chosen": "Blue.", "rejected": "Green?"},
        (TALK, [GOOD], [BAD]),
    ),
    "Anthropic, prompt without a last speaker": (
        {"prompt": HH.removesuffix("\n\nAssistant: "), "chosen": "Blue.", "rejected": "Green?"},
        (TALK, [GOOD], [BAD]),
    ),
    "Anthropic, prompt apart, answers with their space": (
        {"prompt": "\n\nHuman: Sky?\n\nAssistant:", "chosen": " Blue.", "rejected": " Green?\n"},
        ([user("Sky?")], [GOOD], [BAD]),
    ),
    "Anthropic, prompt apart, several turns of an answer": (
        {"prompt": HH, "chosen": " Blue.\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nAssistant: Green?"},
        (TALK, [GOOD, user("Why?"), answer("So.")], [BAD]),
    ),
    "Anthropic, whole conversations behind their prompt": (
        {"prompt": HH.rstrip(), "chosen": f"{HH}Blue.", "rejected": f"{HH}Green?"},
        (TALK, [GOOD], [BAD]),
    ),
    "a question that begins with a speaker": (
        {"prompt": "Human: Sky?", "chosen": "Blue.", "rejected": "Green?"},
        ([user("Human: Sky?")], [GOOD], [BAD]),
    ),
    "Anthropic, several turns differ": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Blue.\n\nHuman: Why?\n\nAssistant: So.\n\nReally.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Green?\n\nHuman: Why?\n\nAssistant: So.",
        },
        ([user("Hi")], [GOOD, user("Why?"), answer("So.\n\nReally.")], [BAD, user("Why?"), answer("So.")]),
    ),
    "OpenAI": (
        {
            "input": {"messages": TALK, "tools": [], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        (TALK, [GOOD], [BAD]),
    ),
    "LLaMA-Factory, ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello."},
                {"from": "human", "value": "Sky?"},
            ],
            "chosen": {"from": "gpt", "value": "Blue."},
            "rejected": {"from": "gpt", "value": "Green?"},
        },
        (TALK, [GOOD], [BAD]),
    ),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "Sky?", "input": "", "history": [["Hi", "Hello."]], "chosen": "Blue.", "rejected": "Green?"},
        (TALK, [GOOD], [BAD]),
    ),
    "LLaMA-Factory, Alpaca with input": (
        {"instruction": "Colour", "input": "sky", "chosen": "Blue.", "rejected": "Green?"},
        ([{**user("Colour\n\nsky"), "instruction": "Colour", "input": "sky"}], [GOOD], [BAD]),
    ),
    "Orca": (
        {"system": "Be brief.", "question": "Sky?", "chosen": "Blue.", "rejected": "Green?"},
        ([system("Be brief."), user("Sky?")], [GOOD], [BAD]),
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_format_of_pairs_becomes_a_prompt_and_two_answers(name: str, tmp_path: Path) -> None:
    row, expected = EXPECTED[name]
    assert pair(tmp_path, row) == expected


def test_an_answer_may_be_several_messages_and_use_tools(tmp_path: Path) -> None:
    chosen = [answer("", "", call(1, x="sky")), result(1, "blue"), GOOD]
    row = {"prompt": [user("Sky?")], "chosen": chosen, "rejected": [BAD], "tools": [TOOL]}
    assert pair(tmp_path, row) == ([user("Sky?")], chosen, [BAD])
    (first, _) = records(tmp_path, row)
    assert first.tools == [TOOL]
    given = {"messages": [user("Sky?")], "tools": [TOOL]}
    of_openai = {"input": given, "preferred_output": chosen, "non_preferred_output": [BAD]}
    assert pair(tmp_path, of_openai) == ([user("Sky?")], chosen, [BAD])
    assert records(tmp_path, of_openai)[0].tools == [TOOL]
    turns = {
        "conversations": [{"from": "human", "value": "Sky?"}],
        "chosen": [
            {"from": "function_call", "value": '{"name": "look", "arguments": {"x": "sky"}}'},
            {"from": "observation", "value": "blue"},
            {"from": "gpt", "value": "Blue."},
        ],
        "rejected": {"from": "gpt", "value": "Green?"},
    }
    _, found, _ = pair(tmp_path, turns)
    assert [message["role"] for message in found] == ["assistant", "tool", "assistant"]
    assert found[0]["tool_calls"][0]["id"] == found[1]["tool_call_id"]


def test_columns_of_pairs_are_renamed_and_others_stay_beside_them(tmp_path: Path) -> None:
    row = {"q": "Sky?", "win": "Blue.", "chosen_by": "Ann", "rejected": "Green?", "question": "mine", "label": "spam"}
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [row])
    found = [record for record in formats.read(path, {"q": "prompt", "win": "chosen"}) if isinstance(record, Record)]
    assert [record.messages[-1]["content"] for record in found if record.messages] == ["Blue.", "Green?"]
    assert found[0].format == "pairs"
    assert found[0].fields == found[1].fields == {"chosen_by": "Ann", "question": "mine", "label": "spam"}


@pytest.mark.parametrize("beside", [{"messages": [*TALK, GOOD]}, {"completion": "Red."}, {"text": "Once"}])
def test_a_row_that_is_an_ordinary_one_too_is_a_pair_where_preferences_are_asked_for(
    beside: dict[str, Any], tmp_path: Path
) -> None:
    row = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green?", **beside}
    (ordinary,) = records(tmp_path, row, preferences=False)
    assert ordinary.side is Side.NONE
    assert pair(tmp_path, row) == PAIR


def test_turns_beside_a_chosen_and_a_rejected_answer_are_no_conversation_to_learn(tmp_path: Path) -> None:
    row = EXPECTED["LLaMA-Factory, ShareGPT"][0]
    assert [record.side for record in records(tmp_path, row, preferences=False)] == [Side.CHOSEN, Side.REJECTED]


# Rated answers.


@pytest.mark.parametrize(
    ("label", "side"),
    [
        *((given, Side.GOOD) for given in (True, 1, "true", "desirable", " True")),
        *((given, Side.BAD) for given in (False, 0, "False", "undesirable", "0")),
    ],
)
def test_a_label_rates_the_answer(label: Any, side: Side, tmp_path: Path) -> None:
    for row in ({"prompt": "Sky?", "completion": "Blue."}, {"messages": [user("Sky?"), GOOD]}):
        (record,) = records(tmp_path, {**row, "label": label})
        assert (record.side, said(record)) == (side, ([user("Sky?")], [GOOD]))
        assert record.fields == {}


# One conversation in every format that has conversations.
CONVERSATIONS: list[dict[str, Any]] = [
    {"prompt": TALK, "completion": [GOOD]},
    {"messages": [*TALK, GOOD]},
    {"conversations": [*TALK, GOOD]},
    {"instruction": "Sky?", "history": [["Hi", "Hello."]], "output": "Blue."},
]


@pytest.mark.parametrize("row", CONVERSATIONS)
def test_every_format_of_conversations_may_be_rated(row: dict[str, Any], tmp_path: Path) -> None:
    (record,) = records(tmp_path, {**row, "label": False})
    assert (record.side, said(record)) == (Side.BAD, (TALK, [GOOD]))


def test_all_that_follows_the_last_question_is_rated(tmp_path: Path) -> None:
    given = [answer("", "", call(1, x="sky")), result(1, "blue"), GOOD]
    (record,) = records(tmp_path, {"messages": [*TALK, *given], "tools": [TOOL], "label": True})
    assert said(record) == (TALK, given)


def test_an_answer_that_nobody_rated_teaches_nothing(tmp_path: Path) -> None:
    rows = [{"prompt": "Sky?", "completion": "Blue.", "label": label} for label in (True, None)]
    found = list(formats.read(tiny.write_jsonl(tmp_path / "d.jsonl", rows), {}, True))
    reasons = [record.teaches_nothing for record in found if isinstance(record, Record)]
    assert reasons == ["", "nobody rated it (label is null)"]


@pytest.mark.parametrize(("rating", "side"), [({}, Side.NONE), ({"label": True}, Side.GOOD)])
def test_a_prompt_of_anthropics_form_has_an_answer_of_that_form(
    rating: dict[str, Any], side: Side, tmp_path: Path
) -> None:
    """Its space is no part of what a model learns to say; of other prompts a text is what it is."""
    (record,) = records(tmp_path, {"prompt": HH.rstrip(), "completion": " Blue.", **rating})
    texts = [(message["role"], message["content"]) for message in record.messages or []]
    assert texts == [(message["role"], message["content"]) for message in [*TALK, GOOD]]
    assert (record.side, record.prompt) == (side, len(TALK))
    (record,) = records(tmp_path, {"prompt": "Human: Sky?", "completion": " Blue.", **rating})
    assert record.messages == [user("Human: Sky?"), answer(" Blue.")]


@pytest.mark.parametrize(("label", "weights"), [(True, [0, 1]), (False, [0, 0]), (None, [0, 0])])
@pytest.mark.parametrize("row", CONVERSATIONS)
def test_of_rated_answers_the_good_ones_alone_are_learned_where_no_preferences_are_asked_for(
    row: dict[str, Any], label: bool | None, weights: list[int], tmp_path: Path
) -> None:
    (record,) = records(tmp_path, {**row, "label": label}, preferences=False)
    answers = [message for message in record.messages or [] if message["role"] == "assistant"]
    assert [message.get("weight", 1) for message in answers] == weights
    assert bool(record.teaches_nothing) == (label is not True)
    assert (record.side, record.may_be_rated, record.fields) == (Side.NONE, False, {"label": label})
    # What such a reading wrote down, as init does, is rated as before.
    (again,) = records(tmp_path, {**record.fields, "messages": record.messages})
    assert again.side == {True: Side.GOOD, False: Side.BAD, None: Side.NONE}[label]
    assert said(again) == (TALK, [GOOD])


def test_labels_mean_what_they_did_where_no_preferences_are_asked_for(tmp_path: Path) -> None:
    (bad,) = records(tmp_path, {"prompt": "Sky?", "completion": "Blue.", "label": False}, preferences=False)
    assert (bad.side, bad.messages) == (Side.NONE, [user("Sky?"), {**GOOD, "weight": 0}])
    (text,) = records(tmp_path, {"text": "Once.", "label": False}, preferences=False)
    assert (text.text, text.teaches_nothing, text.fields) == ("Once.", "", {"label": False})
    (text,) = records(tmp_path, {"text": "Once.", "label": 0}, preferences=False)
    assert not text.may_be_rated
    (classed,) = records(tmp_path, {"messages": [user("Sky?"), GOOD], "label": True}, preferences=False)
    assert (classed.side, classed.fields) == (Side.NONE, {"label": True})


# Rows that teach nothing.


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "chosen and rejected are the same"),
        ({"prompt": "Q", "chosen": " ", "rejected": "A"}, "the chosen answer is empty"),
        ({"prompt": "Q", "chosen": "A", "rejected": ""}, "the rejected answer is empty"),
        ({"chosen": [user("Q"), GOOD], "rejected": [user("Q")]}, "the rejected answer is empty"),
        ({"chosen": [user("Q"), GOOD], "rejected": [user("Q"), GOOD]}, "chosen and rejected are the same"),
        ({"chosen": [user("Q"), GOOD], "rejected": [user("R"), BAD]}, "they answer different prompts"),
        ({"prompt": "Q", "completion": " \n", "label": True}, "the answer is empty"),
    ],
)
def test_a_row_that_cannot_say_what_is_better_is_named_as_such(
    row: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    assert all(record.teaches_nothing.endswith(reason) for record in records(tmp_path, row))


# Files.


def test_rows_of_csv_and_parquet_files_are_the_same_pairs(tmp_path: Path) -> None:
    row = {"prompt": TALK, "chosen": [*TALK, GOOD], "rejected": [*TALK, BAD]}
    expected = pair(tmp_path, row)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "d.parquet")
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([row.keys(), [json.dumps(value) for value in row.values()]])
    for name in ("d.parquet", "d.csv"):
        chosen, rejected = formats.read(tmp_path / name, {}, True)
        assert isinstance(chosen, Record) and isinstance(rejected, Record)
        assert (*said(chosen), said(rejected)[1]) == expected
    (tmp_path / "e.csv").write_text("prompt,completion,label\nQ,A,TRUE\nQ,B,0\nQ,C,\n")
    sides = [(record.side, record.teaches_nothing) for record in formats.read(tmp_path / "e.csv", {}, True)]  # type: ignore[union-attr]
    assert sides == [(Side.GOOD, ""), (Side.BAD, ""), (Side.NONE, "nobody rated it (label is null)")]


def test_a_hub_dataset_of_preferences_is_read_by_its_own_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"messages": [user("Sky?"), GOOD], "label": False}])
    splits = dict.fromkeys(("train_prefs", "test_prefs", "train_sft"), rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(splits))
    given = SourceSection(path="acme/rows")
    found = sources.files_by_split(given, preferences=True)
    assert set(found) == {"train", "test"} and sources.unused(found) == ("train_sft",)
    assert [row.side for row in found["train"][0].read()] == [Side.BAD]  # type: ignore[union-attr]
    with pytest.raises(UserError, match="has no train split"):
        sources.files_by_split(given)


def test_the_sides_of_a_pair_are_worked_on_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CHUNK_ROWS", 3)
    rows = [{"prompt": f"Q{number}", "chosen": "A", "rejected": "B"} for number in range(5)]
    chunks = list(formats.chunks(formats.read(tiny.write_jsonl(tmp_path / "d.jsonl", rows))))
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]
    assert [formats.count_rows(chunk) for chunk in chunks] == [2, 2, 1]

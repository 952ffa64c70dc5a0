"""What messages hold: calls and their arguments, switches, parts, ids, in OpenAI's form and in ShareGPT's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from mlxtune.data.chat import masking, repairs
from mlxtune.data.rows import formats, rewriting
from mlxtune.data.rows.formats import Bad, Record
from mlxtune.data.rows.tool_calls import parsed_arguments, with_short_ids

SWITCHES = ("weight", "train", "training", "loss", "loss_mask", "trainable")


def read(row: dict[str, Any], folder: Path) -> Record | Bad:
    (found,) = formats.read(tiny.write_jsonl(folder / "d.jsonl", [row]))
    return found


def messages(row: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    found = read(row, folder)
    assert isinstance(found, Record) and found.messages is not None, found
    return found.messages


def reason(row: dict[str, Any], folder: Path) -> str:
    found = read(row, folder)
    assert isinstance(found, Bad), found
    return found.reason


def calling(function: Any) -> dict[str, Any]:
    call = {"id": "call00001", "type": "function", "function": function}
    return {
        "messages": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "assistant", "content": "A"},
        ]
    }


def turned(*turns: tuple[str, str], **extra: Any) -> dict[str, Any]:
    """A ShareGPT row; extra: of its last turn."""
    made = [{"from": speaker, "value": value} for speaker, value in turns]
    made[-1] |= extra
    return {"conversations": made}


TWICE = json.dumps(json.dumps({"x": 1}))


@pytest.mark.parametrize("given", [{"x": 1}, '{"x": 1}', TWICE, {}, "", "  ", {"x": None}])
def test_arguments_that_are_an_object_in_the_end_stay_as_they_were_given(given: Any, tmp_path: Path) -> None:
    call = messages(calling({"name": "look", "arguments": given}), tmp_path)[1]["tool_calls"][0]
    assert call["function"] == {"name": "look", "arguments": given}
    expected = {} if isinstance(given, str) and not given.strip() else {"x": 1} if given else {}
    assert parsed_arguments(given) == ({"x": None} if given == {"x": None} else expected)


@pytest.mark.parametrize("function", [{"name": "look"}, {"name": "look", "arguments": None}])
def test_a_call_without_arguments_has_none(function: dict[str, Any], tmp_path: Path) -> None:
    call = messages(calling(function), tmp_path)[1]["tool_calls"][0]
    assert call["function"] == {"name": "look", "arguments": {}}


def test_arguments_called_parameters_are_not_lost(tmp_path: Path) -> None:
    function = {"name": "look", "parameters": {"x": 1}}
    call = messages(calling(function), tmp_path)[1]["tool_calls"][0]
    assert call["function"] == {"name": "look", "arguments": {"x": 1}}
    turns = turned(("human", "Q"), ("function_call", json.dumps(function)))
    assert messages(turns, tmp_path)[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"x": 1}}


BAD = [
    ('{"x": 1', "are not valid JSON (Expecting ',' delimiter, column 8)"),
    ("look(1)", "are not valid JSON"),
    ("null", "must be an object or JSON text of one, found null"),
    ("[1]", "must be an object or JSON text of one, found list"),
    ('"\\"[1]\\""', "must be an object or JSON text of one, found list"),
    ([1], "must be an object or JSON text of one, found list"),
    (5, "must be an object or JSON text of one, found int"),
]


@pytest.mark.parametrize(("given", "expected"), BAD)
def test_arguments_that_are_no_object_are_a_bad_row_with_message_and_function(
    given: Any, expected: str, tmp_path: Path
) -> None:
    function = {"name": "look", "arguments": given}
    assert f"message 2: the arguments of look {expected}" in reason(calling(function), tmp_path)
    old = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "function_call": function}]}
    assert f"message 2: the arguments of look {expected}" in reason(old, tmp_path)
    turns = turned(("human", "Q"), ("function_call", json.dumps(function)))
    assert f"turn 2: the arguments of look {expected}" in reason(turns, tmp_path)


def test_a_function_call_that_is_json_text_is_a_call_and_two_spellings_at_once_are_refused(tmp_path: Path) -> None:
    called = {"role": "assistant", "content": None, "function_call": '{"name": "look", "arguments": "{}"}'}
    (found,) = messages({"messages": [called]}, tmp_path)
    assert found["tool_calls"] == [{"type": "function", "function": {"name": "look", "arguments": "{}"}}]
    both = {**called, "tool_calls": [{"function": {"name": "other"}}]}
    assert "message 1 has both function_call and tool_calls" in reason({"messages": [both]}, tmp_path)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize(("value", "expected"), [(0, 0), (False, 0), (0.0, 0), (1, 1), (True, 1), (1.0, 1)])
def test_each_switch_of_a_message_decides_whether_it_is_trained_on(
    name: str, value: Any, expected: int, tokenizer: Any, tmp_path: Path
) -> None:
    turns = turned(("human", "Q"), ("gpt", "A"), ("human", "R"), ("gpt", "B"))
    turns["conversations"][1][name] = value
    sharegpt = messages(turns, tmp_path)
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", name: value}]
    openai = messages(
        {"messages": [*said, {"role": "user", "content": "R"}, {"role": "assistant", "content": "B"}]}, tmp_path
    )
    for found in (sharegpt, openai):
        assert [repairs.weight(message) for message in found] == [1, expected, 1, 1]
        made = masking.render(tokenizer, found)
        trained = tokenizer.decode([at for at, mask in zip(made.ids, made.mask, strict=True) if mask])
        assert trained == ("A<|im_end|>" if expected else "") + "B<|im_end|>"


@pytest.mark.parametrize("value", [0.5, 2, -1, "no", "0", [0], {"a": 0}])
def test_a_switch_that_is_neither_on_nor_off_is_a_bad_row(value: Any, tmp_path: Path) -> None:
    for name in SWITCHES:
        row = {"messages": [{"role": "assistant", "content": "A", name: value}]}
        assert f"message 1: {name} must be 0 or 1, found {value!r}" in reason(row, tmp_path)


def test_switches_that_contradict_each_other_are_a_bad_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "assistant", "content": "A", "weight": 1, "loss": False}]}
    assert "message 1: weight 1 and loss False contradict each other" in reason(row, tmp_path)
    row["messages"][0]["weight"] = 0
    assert messages(row, tmp_path) == [{"role": "assistant", "content": "A", "weight": 0, "loss": 0}]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "holds an image;"),
        ({"type": "input_audio", "input_audio": {}}, "holds audio;"),
        ({"image": "a.png"}, "holds an image;"),
        ({"type": "tool_use", "name": "f"}, "holds a part of the type 'tool_use';"),
        ({"type": "text"}, "holds a text part without text;"),
        ({"caption": "x"}, "holds a text part without text;"),
        ("Q", "holds a part that is no object but str;"),
    ],
)
def test_a_part_of_a_message_that_is_no_text_is_named(part: Any, expected: str, tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, part]}]}
    told = f"message 1 (user) {expected} text alone is trained on: remove that part, or the row"
    assert told in reason(row, tmp_path)


def test_text_parts_of_newer_names_are_text(tmp_path: Path) -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b", "annotations": []}]
    assert messages({"messages": [{"role": "user", "content": parts}]}, tmp_path)[0]["content"] == "ab"


def test_a_result_that_is_an_object_is_named_with_what_to_do(tmp_path: Path) -> None:
    row = {"messages": [{"role": "tool", "content": {"temp": 5}}]}
    assert "message 1 (tool) must have text content, found an object; write it as JSON text" in reason(row, tmp_path)


ONE, TWO = ('{"name": "one", "arguments": {}}', '{"name": "two", "arguments": {}}')
PARALLEL = (("human", "Q"), ("function_call", ONE), ("function_call", TWO), ("observation", "1"), ("observation", "2"))


def links(found: list[dict[str, Any]]) -> dict[str, str]:
    """The function that each result answers, by its text."""
    names = {call["id"]: call["function"]["name"] for m in found for call in m.get("tool_calls", [])}
    return {message["content"]: names[message["tool_call_id"]] for message in found if message["role"] == "tool"}


def test_adjacent_sharegpt_calls_are_one_message_and_each_result_answers_its_own(tmp_path: Path) -> None:
    found = messages(turned(*PARALLEL, ("gpt", "A")), tmp_path)
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "tool", "assistant"]
    assert links(found) == {"1": "one", "2": "two"}


def test_a_sharegpt_answer_and_the_calls_after_it_are_one_message(tmp_path: Path) -> None:
    found = messages(turned(("human", "Q"), ("gpt", "Let me look."), *PARALLEL[1:], ("gpt", "A")), tmp_path)
    assert [(message["role"], message["content"]) for message in found[1:3]] == [
        ("assistant", "Let me look."),
        ("tool", "1"),
    ]
    assert links(found) == {"1": "one", "2": "two"}


def test_sharegpt_calls_with_another_weight_are_a_message_of_their_own(tmp_path: Path) -> None:
    turns = turned(("human", "Q"), ("gpt", "Let me look."), ("function_call", ONE), ("observation", "1"))
    turns["conversations"][1]["weight"] = 0
    found = messages(turns, tmp_path)
    assert [(message["role"], message.get("weight")) for message in found[1:3]] == [
        ("assistant", 0),
        ("assistant", None),
    ]
    assert links(found) == {"1": "one"}


def test_sharegpt_results_of_later_calls_are_not_taken_for_those_of_unanswered_ones(tmp_path: Path) -> None:
    turns = turned(("human", "Q"), ("function_call", ONE), ("human", "R"), ("function_call", TWO), ("observation", "2"))
    assert links(messages(turns, tmp_path)) == {"2": "two"}


def test_a_sharegpt_result_too_many_is_a_bad_row_and_results_of_calls_in_text_are_kept(tmp_path: Path) -> None:
    many = turned(*PARALLEL, ("observation", "3"))
    assert "turn 6 (observation) answers no call: each function_call has one already" in reason(many, tmp_path)
    found = messages(turned(("human", "Q"), ("gpt", "<tool_call>f</tool_call>"), ("tool", "1"), ("gpt", "A")), tmp_path)
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "assistant"]


def test_calls_results_and_switches_survive_the_way_to_sharegpt_and_back(tmp_path: Path) -> None:
    calls = [
        {"id": f"call0020{at}", "type": "function", "function": {"name": name, "arguments": {}}}
        for at, name in enumerate(("one", "two"))
    ]
    row = {
        "messages": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "Let me look.", "tool_calls": calls, "loss": 0},
            {"role": "tool", "content": "1", "tool_call_id": calls[0]["id"]},
            {"role": "tool", "content": "2", "tool_call_id": calls[1]["id"]},
            {"role": "assistant", "content": "A", "trainable": 1, "mood": "calm"},
        ]
    }
    given, out = tiny.write_jsonl(tmp_path / "d.jsonl", [row]), tmp_path / "out.jsonl"
    done = rewriting.rewrite(formats.read(given), "sharegpt", out)
    assert (done.written, done.left_out) == (1, [])
    (back,) = formats.read(out)
    assert isinstance(back, Record) and back.messages is not None
    assert with_short_ids(back.messages) == back.messages
    assert links(back.messages) == {"1": "one", "2": "two"}
    bare = [{key: m[key] for key in m if key not in ("tool_calls", "tool_call_id")} for m in back.messages]
    assert bare == [{key: m[key] for key in m if key not in ("tool_calls", "tool_call_id")} for m in row["messages"]]


@pytest.mark.parametrize("order", [(1, 0), (0, 1, 1)])
def test_results_out_of_order_are_not_written_as_sharegpt(order: tuple[int, ...], tmp_path: Path) -> None:
    calls = [{"id": f"c{at}", "function": {"name": "f", "arguments": {}}} for at in range(2)]
    results = [{"role": "tool", "content": "x", "tool_call_id": f"c{at}"} for at in order]
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": calls}, *results]}
    done = rewriting.rewrite(
        formats.read(tiny.write_jsonl(tmp_path / "d.jsonl", [row, {"messages": [{"role": "user", "content": "Q"}]}])),
        "sharegpt",
        tmp_path / "out.jsonl",
        drop=True,
    )
    assert (done.written, len(done.left_out)) == (1, 1)
    assert "results there come in the order of the calls" in done.left_out[0].reason


def linked(*ids: str | None) -> list[dict[str, Any]]:
    """A call and its result for each id."""
    out: list[dict[str, Any]] = [{"role": "user", "content": "Q"}]
    for at, own in enumerate(ids):
        named = {} if own is None else {"id": own}
        answered = {} if own is None else {"tool_call_id": own}
        function = {"name": f"f{at}", "arguments": {}}
        out.append(
            {"role": "assistant", "content": "", "tool_calls": [{**named, "type": "function", "function": function}]}
        )
        out.append({"role": "tool", "content": str(at), **answered})
    return out


NINE = re.compile(r"[A-Za-z0-9]{9}")


def test_short_ids_link_the_same_calls_and_results_and_are_always_the_same() -> None:
    given = linked("call_abc123456789", "abcdefghi", None, "call_x", "toolu-1", None)
    before = json.dumps(given)
    made = with_short_ids(given)
    assert json.dumps(given) == before
    assert made == with_short_ids(json.loads(before))
    assert links(made) == {str(at): f"f{at}" for at in range(6)}
    used = [call["id"] for message in made for call in message.get("tool_calls", [])]
    assert used[1] == "abcdefghi"
    assert len(set(used)) == 6 and all(NINE.fullmatch(own) for own in used)
    assert with_short_ids(made) == made


def test_a_short_id_does_not_meet_one_that_is_there_already() -> None:
    taken = with_short_ids(linked("call_x"))[1]["tool_calls"][0]["id"]
    made = with_short_ids(linked(taken, "call_x"))
    assert made[1]["tool_calls"][0]["id"] == taken
    assert links(made) == {"0": "f0", "1": "f1"}
    assert with_short_ids([{"role": "user", "content": "Q"}]) == [{"role": "user", "content": "Q"}]

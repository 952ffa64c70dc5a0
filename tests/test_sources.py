"""Data sources: kinds of files, formats of rows, and rows that cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny
from reading import ASKED, all_of, read, shown

from mlxtune.data.rows import formats
from mlxtune.errors import UserError


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.json.gz", "train.csv.gz"])
def test_gzipped_files_give_their_rows(name: str, tokenizer: Any, tmp_path: Path) -> None:
    text = {
        "train.jsonl.gz": '{"text": "é1"}\n{"text": "b"}\n',
        "train.json.gz": '[{"text": "é1"}, {"text": "b"}]',
        "train.csv.gz": "text\né1\nb\n",
    }[name]
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    (tmp_path / "valid.jsonl").write_text('{"text": "v"}\n')
    found = read(tmp_path, tokenizer)
    assert shown(found["train"], tokenizer) == ["é1", "b"]
    assert shown(found["valid"], tokenizer) == ["v"]
    assert found["train"].place(1) == ("line 2" if "jsonl" in name else "row 2")


def test_a_cut_gzip_file_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-9])
    with pytest.raises(UserError, match="not a whole gzip file"):
        all_of(path, tokenizer)


def test_shards_of_one_split_are_read_in_order(tokenizer: Any, tmp_path: Path) -> None:
    for number, letters in enumerate(("ab", "cd")):
        write_parquet(tmp_path / f"train-{number:05d}-of-00002.parquet", [{"text": letter} for letter in letters])
    write_parquet(tmp_path / "valid-00000-of-00001.parquet", [{"text": "v"}])
    found = read(tmp_path, tokenizer)
    assert (shown(found["train"], tokenizer), shown(found["valid"], tokenizer)) == (["a", "b", "c", "d"], ["v"])


def test_a_duplicate_in_another_shard_is_left_out(tokenizer: Any, tmp_path: Path) -> None:
    """Rows of both have the same numbers."""
    for number, letters in enumerate(("ab", "xa", "xb")):
        tiny.write_jsonl(tmp_path / f"train-{number}.jsonl", [{"text": letter} for letter in letters])
    tiny.write_jsonl(tmp_path / "valid.jsonl", [{"text": "v"}])
    found = read(tmp_path, tokenizer, dedup="exact")["train"]
    assert sorted(shown(found, tokenizer)) == ["a", "b", "x"]


def test_a_bad_row_of_a_shard_is_named_with_its_own_file(tokenizer: Any, tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "train-0.jsonl", [{"text": "a"}] * 3)
    tiny.write_jsonl(tmp_path / "train-1.jsonl", [{"text": "b"}, {"text": 7}])
    with pytest.raises(UserError, match=r"train-1\.jsonl.* line 2"):
        read(tmp_path, tokenizer)


def test_two_train_files_in_one_folder_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    (tmp_path / "train.csv").write_text("text\nb\n")
    with pytest.raises(UserError, match=r"both train.csv and train.jsonl"):
        read(tmp_path, tokenizer)


def one(row: dict[str, Any], tmp_path: Path, **columns: str) -> Any:
    (record,) = formats.read(tiny.write_jsonl(tmp_path / "d.jsonl", [row]), columns)
    assert not isinstance(record, formats.Bad), record
    return record


def test_columns_are_renamed(tokenizer: Any, tmp_path: Path) -> None:
    row = {"question": "Q", "answer": "A"}
    assert one(row, tmp_path, question="prompt", answer="completion").messages == ASKED
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [row])
    found = all_of(path, tokenizer, columns={"question": "prompt", "answer": "completion"})
    assert shown(found, tokenizer) == ["user\nQ\nassistant\nA\n"]
    with pytest.raises(UserError, match=r"data.columns names qustion, which the row does not have"):
        all_of(path, tokenizer, columns={"qustion": "prompt"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a", "prompt": "b", "completion": "c"}, "gives prompt a name that is already taken"),
        ({"question": "a", "asked": "b", "completion": "c"}, "a name that is already taken"),
        ({"conversations": [{"from": "human", "value": None}]}, "turn 1 (human) must have text as its value"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "turn 1: a function_call must be a JSON"),
        ({"messages": [{**ASKED[1], "weight": 0.5}]}, "message 1: weight must be 0 or 1, found 0.5"),
        ({"messages": [{**ASKED[1], "train": "no"}]}, "message 1: train must be 0 or 1, found 'no'"),
        ({"messages": [ASKED[0]], "tools": [3]}, "each of tools must be an object"),
        ({"instruction": "a", "output": None}, "output must be text, found nothing"),
        ({"instruction": "a", "instances": []}, "instances must be a non-empty list"),
        ({"prompt": ASKED[:1], "completion": "c"}, "completion must be a non-empty list of messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "message 1 (user) holds an image; text"),
    ],
)
def test_a_row_that_does_not_fit_its_format_says_what_is_wrong(
    row: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [row])
    (bad,) = formats.read(path, {"question": "prompt", "asked": "prompt"})
    assert isinstance(bad, formats.Bad)
    assert reason in bad.reason
    assert bad.place == "line 1"


def test_content_in_parts_is_joined_and_anything_but_text_refused(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Q"}, {"text": "R"}]
    assert one({"messages": [{"role": "user", "content": parts}]}, tmp_path).messages == [
        {"role": "user", "content": "QR"}
    ]


def test_sharegpt_calls_and_observations_become_tool_calls_and_their_results(tmp_path: Path) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "Sunny."},
        ],
        "system": "S",
        "tools": '[{"name": "f", "description": "d", "parameters": {}}]',
    }
    record = one(row, tmp_path)
    assert [message["role"] for message in record.messages] == ["system", "user", "assistant", "tool", "assistant"]
    (made,) = record.messages[2]["tool_calls"]
    assert made["function"] == {"name": "f", "arguments": {"x": 1}}
    assert record.messages[3] == {"role": "tool", "content": "sunny", "tool_call_id": made["id"]}
    assert record.tools == [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]


def test_openai_messages_under_conversations_keep_calls_and_reasoning(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "reasoning_content": "R", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
        {"role": "assistant", "content": "A"},
    ]
    record = one({"conversations": messages}, tmp_path)
    assert record.messages == [messages[0], {**messages[1], "content": ""}, *messages[2:]]


def test_self_instruct_rows_give_one_conversation_per_instance(tmp_path: Path) -> None:
    instances = [{"input": "", "output": "A"}, {"input": "I", "output": "B"}]
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [{"instruction": "Q", "instances": instances}])
    asked = [[message["content"] for message in record.messages] for record in formats.read(path)]
    assert asked == [["Q", "A"], ["Q\n\nI", "B"]]


GOOD = json.dumps({"messages": ASKED})
BAD = {2: "{", 4: '{"messages": [{"role": "robot", "content": "x"}]}', 5: '{"text": "t"}', 7: "[1]"}


def bad_file(folder: Path) -> Path:
    path = folder / "d.jsonl"
    path.write_text("".join(BAD.get(line, GOOD) + "\n" for line in range(1, 9)))
    return path


def test_every_bad_row_is_named_in_one_pass(tokenizer: Any, tmp_path: Path) -> None:
    path = bad_file(tmp_path)
    with pytest.raises(UserError, match="4 of 8 rows cannot be used") as caught:
        read(path, tokenizer)
    assert [f"line {line}: " in str(caught.value) for line in range(1, 9)] == [line in BAD for line in range(1, 9)]
    expected = ("4 of 8 rows", "line 2: not valid JSON", "line 4: message 1 has the role 'robot'", "line 7: expected")
    said = tiny.one_clear_line(tiny.mlxtune("train", "--model", "no-model-is-read", "--data", path), *expected)
    assert "line 3" not in said


def test_data_show_prints_good_rows_and_names_the_bad_ones(tokenizer_folder: Path, tmp_path: Path) -> None:
    path = bad_file(tmp_path)
    done = tiny.mlxtune("data", "show", "--model", tokenizer_folder, "--data", path, "--json")
    assert done.returncode == 0, done.stderr
    rows = list(map(json.loads, done.stdout.splitlines()))
    assert [row["row"] for row in rows] == list(range(1, 9))
    assert [row["row"] for row in rows if "dropped" in row] == list(BAD)

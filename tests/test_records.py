"""Row formats, file types, truncation, dropped rows and the held-out split."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from reading import ASKED, all_of, read, shown

from mlxtune.data.rows import formats
from mlxtune.data.rows.parsers import Parsed
from mlxtune.errors import UserError


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": ASKED}, ASKED),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ASKED[1]]}, ASKED),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, ASKED),
        ({"conversations": ASKED}, ASKED),
        (
            {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            [{"role": "system", "content": "S"}, *ASKED],
        ),
        ({"instruction": "Q", "input": "", "output": "A"}, ASKED),
        ({"instruction": "Q", "response": "A"}, ASKED),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            [
                {"role": "user", "content": "Add.\n\n1 2", "instruction": "Add.", "input": "1 2"},
                {"role": "assistant", "content": "3"},
            ],
        ),
        ({"prompt": "Q", "completion": "A"}, ASKED),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED),
    ],
)
def test_every_row_format_becomes_the_same_conversation(row: dict, expected: list, tmp_path: Path) -> None:
    (record,) = formats.read(tiny.write_jsonl(tmp_path / "d.jsonl", [row]))
    assert record.messages == expected
    assert record.text is None


class Asked(dict[str, Any]):
    """A row that notes which columns were asked for."""

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row)
        self.columns: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.columns.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.columns.add(key)
        return super().__getitem__(key)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_format_names_every_column_that_its_parser_reads(name: str) -> None:
    """What it does not name would be taken for a column of the user's own, and be written out beside the messages."""
    known = formats.FORMATS[name]
    values: dict[str, Any] = {"messages": ASKED, "conversations": ASKED, "instances": [{"output": "A"}]}
    if known.of_pairs:
        values = {"conversations": ASKED[:1], "input": {"messages": ASKED[:1]}}
    if name == "pairs-conversations":
        values = {"chosen": ASKED, "rejected": ASKED}
    row = Asked({column: values.get(column, "Q") for column in known.required})
    assert known.parse(row)
    own = {*known.required, *known.optional}
    assert row.columns <= {*own, *formats.COMMON}
    assert own <= row.columns | {"response"} and own <= formats.columns_read(name)  # response: read where it is there


def test_a_format_is_a_parser_and_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(row: dict[str, Any]) -> list[Parsed]:
        return [Parsed([{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}])]

    monkeypatch.setitem(formats.FORMATS, "quiz", formats.Format(("q", "a"), parse))
    (record,) = formats.read(tiny.write_jsonl(tmp_path / "d.jsonl", [{"q": "Q", "a": "A"}]))
    assert isinstance(record, formats.Record)
    assert (record.format, record.messages) == ("quiz", ASKED)
    with pytest.raises(UserError, match=r"no known row format has the keys x") as error:
        list(formats.read(tiny.write_jsonl(tmp_path / "e.jsonl", [{"x": "Q"}])))
    assert "; q + a. " in error.value.hint


def test_plain_text_stays_text(tmp_path: Path) -> None:
    (record,) = formats.read(tiny.write_jsonl(tmp_path / "d.jsonl", [{"text": "once upon a time"}]))
    assert (record.text, record.messages) == ("once upon a time", None)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_file_type_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    rows = [{"prompt": f'Q{i}\nsecond line, "quoted" \u2028', "completion": f"Ä{i}"} for i in range(3)]
    path = tmp_path / f"d.{suffix}"
    if suffix == "jsonl":
        tiny.write_jsonl(path, rows)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = list(formats.read(path))
    assert [(r.messages[0]["content"], r.messages[1]["content"]) for r in found if r.messages] == [
        (row["prompt"], row["completion"]) for row in rows
    ]


def test_rows_carry_their_line_blank_lines_counted(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [record.row for record in formats.read(path)] == [1, 3]


def test_long_rows_keep_their_start_and_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "completion": "A" * length} for length in (5, 100)]
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    whole = all_of(path, tokenizer)[1]
    cut = all_of(path, tokenizer, max_tokens=60)
    assert (cut[1].ids.tolist(), cut[1].mask.tolist()) == (whole.ids[:60].tolist(), whole.mask[:60].tolist())
    assert "1 of 2 rows shortened" in " ".join(cut.notes("train", 60))


def test_rows_without_a_supervised_token_are_dropped_and_named(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"messages": ASKED},
        {"messages": ASKED[:1]},
        {"messages": [{"role": "user", "content": "Q" * 99}, ASKED[1]]},
    ]
    found = all_of(tiny.write_jsonl(tmp_path / "d.jsonl", rows), tokenizer, max_tokens=50)
    assert [found.place(at) for at in range(len(found))] == ["line 1"]
    notes = " ".join(found.notes("train", 50))
    assert "1 of 3 rows dropped: no assistant turn (line 2)" in notes
    assert "no supervised token in the first 50 tokens (line 3)" in notes


def test_train_on_last_supervises_the_last_answer_alone(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [*ASKED, {"role": "user", "content": "R"}, {"role": "assistant", "content": "B"}]}]
    (example,) = all_of(tiny.write_jsonl(tmp_path / "d.jsonl", rows), tokenizer, train_on="last")
    assert tokenizer.decode(example.ids[example.mask == 1]) == "B<|im_end|>"


def split(path: Path, tokenizer: Any, seed: int = 0) -> dict[str, list[str]]:
    return {name: shown(found, tokenizer) for name, found in read(path, tokenizer, seed).items()}


def test_rows_are_held_out_by_seed_and_equal_rows_stay_on_one_side(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": f"row {index % 50}"} for index in range(100)]
    path = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    found = split(path, tokenizer)
    train, valid = set(found["train"]), set(found["valid"])
    assert len(valid) == 5
    assert len(found["valid"]) == 10
    assert not train & valid
    assert found == split(path, tokenizer)
    assert set(split(path, tokenizer, seed=1)["valid"]) != valid


def test_a_valid_file_is_used_as_it_is(tokenizer: Any, tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}, {"text": "b"}])
    tiny.write_jsonl(tmp_path / "valid.jsonl", [{"text": "c"}])
    assert split(tmp_path, tokenizer) == {"train": ["a", "b"], "valid": ["c"]}


def test_data_show_prints_what_is_trained_on(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Text between marks where there is no colour; JSON Lines with ids and mask; dropped rows with their reason."""
    long = [ASKED[0], {"role": "assistant", "content": "A" * 300}]
    rows = [{"messages": messages} for messages in (ASKED, ASKED[:1], long)]
    command = ("data", "show", "--model", tokenizer_folder, "--data", tiny.write_jsonl(tmp_path / "d.jsonl", rows))
    told = tiny.mlxtune(*command)
    assert told.returncode == 0, told.stderr
    assert "<|im_start|>assistant\n⟦A<|im_end|>⟧" in told.stdout
    assert "line 2: dropped (no assistant turn)" in told.stdout
    first, second, third = map(json.loads, tiny.mlxtune(*command, "--json").stdout.splitlines())
    assert f"line 3: {len(third['ids'])} tokens, {sum(third['mask'])} trained on" in told.stdout
    assert sum(third["mask"]) > 300
    assert first["text"] == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    assert len(first["ids"]) == len(first["mask"])
    assert sum(first["mask"]) == 2
    assert second == {"row": 2, "dropped": "no assistant turn"}

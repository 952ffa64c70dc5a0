"""Data files and configurations that cannot be used.

Everything goes through the installed command: one clear line, exit status 2, nothing half-written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import refused

COMMAND = Path(sys.executable).with_name("mlxtune")
LINES = [json.dumps(row) for row in tiny.conversations(12)]
ASKED = {"messages": [{"role": "user", "content": "Where is my order?"}]}


def with_line(number: int, text: str) -> bytes:
    """Twelve good lines of JSON, but for one."""
    return "\n".join([*LINES[: number - 1], text, *LINES[number:]]).encode()


def message(role: Any, content: Any) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": role, "content": content}]})


# name: (file name, its bytes, what the line must say)
ROWS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "bad JSON": (
        "train.jsonl",
        with_line(7, '{"messages": [}'),
        ("train.jsonl line 7: not valid JSON", "Mend or remove"),
    ),
    "a list for an object": (
        "train.jsonl",
        with_line(3, "[1, 2]"),
        ("train.jsonl line 3: expected a JSON object, found list",),
    ),
    "a number of 5000 digits": ("train.jsonl", with_line(2, "1" * 5000), ("train.jsonl line 2: JSON that cannot be",)),
    "endless nesting": ("train.jsonl", with_line(2, "[" * 100_000), ("train.jsonl line 2: JSON that cannot be read",)),
    "unknown keys": (
        "train.jsonl",
        b'{"question": "a", "answer": "b"}\n',
        ("train.jsonl line 1", "has the keys question, answer", "Known: messages;", "instruction + output"),
    ),
    "another format in one row": (
        "train.jsonl",
        with_line(4, '{"text": "plain"}'),
        ("train.jsonl line 4: messages must be a non-empty list", "(format: messages)"),
    ),
    "an unknown role": (
        "train.jsonl",
        with_line(5, message("robot", "Hello")),
        ("line 5: message 2 has the role 'robot'", "allowed: system, developer, user, assistant, tool"),
    ),
    "a number for content": (
        "train.jsonl",
        with_line(6, message("assistant", 42)),
        ("train.jsonl line 6: message 2 (assistant) must have text content",),
    ),
    "a list for a ShareGPT speaker": (
        "train.jsonl",
        b'{"conversations": [{"from": ["human"], "value": "Hi"}]}',
        ("train.jsonl line 1: turn 1 is from ['human']; allowed: human,",),
    ),
    "half an emoji": (
        "train.jsonl",
        with_line(8, message("assistant", "Thanks \ud83d")),
        (r"train.jsonl line 8: the text holds half a character ('\ud83d')",),
    ),
    "an empty file": ("train.jsonl", b"", ("train.jsonl: no rows", "Each line of a .jsonl file is one example.")),
    "an empty list": ("train.json", b"[]", ("train.json: no rows", "A .json file holds a list of examples.")),
    "a header alone": ("train.csv", b"prompt,completion\n", ("train.csv: no rows", "first line names the columns")),
    "blank lines": ("train.jsonl", b"\n \n\n", ("train.jsonl: no rows",)),
    "a binary file": (
        "train.jsonl",
        b"\x89PNG\r\n\x1a\n\xff",
        ("line 1, 3: not text (invalid UTF-8 at byte 0",),
    ),
    "an unknown suffix": (
        "train.txt",
        b"hello",
        ("train.txt: unknown file type .txt", "Allowed: .jsonl, .json, .csv, .tsv, .parquet."),
    ),
    "a truncated .json": (
        "train.json",
        b'[\n{"messages": [{"role": "user", ',
        ("train.json line 2: not valid JSON",),
    ),
    "a number in a .json": (
        "train.json",
        b'[{"text": "a"}, 3]',
        ("train.json row 2: expected a JSON object, found int",),
    ),
    "a broken parquet": ("train.parquet", b"PAR1 and then nothing", ("train.parquet: not a parquet file",)),
    "a CSV of other columns": (
        "train.csv",
        b"question,answer\na,b\n",
        ("train.csv row 1: no known row format has the keys question, answer", "Rename columns"),
    ),
    "a CSV row with a comma too many": (
        "train.csv",
        b"prompt,completion\na,b\nc,d,e\n",
        ("train.csv row 2: more fields than the header has", "quote the fields that hold a comma"),
    ),
    "a JSON array in a .jsonl": (
        "train.jsonl",
        json.dumps([json.loads(line) for line in LINES], indent=2).encode(),
        ("train.jsonl: this is one JSON array, not JSON Lines", "Name it train.json."),
    ),
    "an array on one line of a .jsonl": (
        "train.jsonl",
        f"[{', '.join(LINES)}]\n".encode(),
        ("train.jsonl: this is one JSON array, not JSON Lines", "Name it train.json."),
    ),
    "objects over several lines of a .jsonl": (
        "train.jsonl",
        "\n".join(json.dumps(json.loads(line), indent=1) for line in LINES).encode(),
        ("train.jsonl: its JSON objects go over several lines", "Write each on one line"),
    ),
    "a list in each line of a .jsonl": (
        "train.jsonl",
        b'[{"text": "a"}]\n[{"text": "b"}]\n',
        ("2 of 2 rows", "line 1, 2: expected a JSON object, found list"),
    ),
    "rows inside of a key": (
        "train.json",
        f'{{"version": 1, "data": [{LINES[0]}]}}'.encode(),
        ("train.json row 1: no known row format has the keys version, data", "The rows are inside `data`"),
    ),
    "UTF-16 that does not say so": (
        "train.jsonl",
        LINES[0].encode("utf-16-le"),
        ("train.jsonl: not UTF-8: a NUL byte", "Save it as UTF-8."),
    ),
    "a field too many between semicolons": (
        "train.csv",
        b"prompt;completion\na;b\nc;d;e\n",
        ("train.csv row 2: more fields than the header has; quote the fields that hold a semicolon",),
    ),
    "a CSV quote never closed": ("train.csv", b'prompt,completion\na,"b\n', ("train.csv: not a CSV file",)),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_that_cannot_be_read_is_named_by_file_and_line(kind: str, tmp_path: Path) -> None:
    name, content, expected = ROWS[kind]
    (tmp_path / name).write_bytes(content)
    trained = tiny.mlxtune("train", "--model", "a-model-that-is-not-here", "--data", tmp_path / name)
    tiny.one_clear_line(trained, *expected)


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        ([ASKED] * 3, (), ("none of 3 rows can be used", "line 1: no assistant turn", "mlxtune data show")),
        (
            tiny.conversations(3),
            ("--set", "data.max_tokens=8"),
            ("none of 3 rows can be used", "line 1: no supervised token in the first 8 tokens"),
        ),
        ([{"messages": 3}], (), ("train.jsonl line 1: messages must be a non-empty list",)),
    ],
    ids=["questions alone", "answers past data.max_tokens", "a bad row"],
)
def test_training_without_a_usable_row_is_refused(
    rows: list[Any], settings: tuple[str, ...], expected: tuple[str, ...], mlx_model: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "data", tmp_path / "run"
    for split in ("train", "valid"):
        tiny.write_jsonl(folder / f"{split}.jsonl", rows)
    refused(out, "train", "--model", mlx_model, "--data", folder, "--out", out, *settings, expected=expected)


def test_one_row_alone_is_refused_for_nothing_can_be_held_out(mlx_model: Path, tmp_path: Path) -> None:
    rows, out = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.conversations(1)), tmp_path / "run"
    expected = ("fewer than two different rows, too few to hold any out", "a valid file")
    refused(out, "train", "--model", mlx_model, "--data", rows, "--out", out, expected=expected)


def test_a_missing_data_file_is_refused(tmp_path: Path) -> None:
    shown = tiny.mlxtune("data", "show", "--model", "model", "--data", tmp_path / "rows.jsonl")
    tiny.one_clear_line(shown, f"no data file or folder {tmp_path / 'rows.jsonl'}")


def test_a_folder_without_a_train_file_is_refused(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "valid.jsonl", tiny.conversations(3))
    shown = tiny.mlxtune("data", "show", "--model", "model", "--data", tmp_path)
    tiny.one_clear_line(shown, "has no train file", "Expected train.jsonl|.json|.csv|.tsv|.parquet.")


def test_one_row_without_an_answer_is_counted_and_named_while_the_others_train(mlx_model: Path, tmp_path: Path) -> None:
    rows: list[Any] = tiny.conversations(8)
    tiny.write_jsonl(tmp_path / "train.jsonl", [*rows[:4], ASKED, *rows[4:]])
    tiny.write_jsonl(tmp_path / "valid.jsonl", rows[:2])
    out = tmp_path / "run"
    done = tiny.done("train", "--model", mlx_model, "--data", tmp_path, "--out", out, "--set", "train.steps=1")
    assert "note: train: 1 of 9 rows dropped: no assistant turn (line 5)" in done.stderr
    assert (out / "adapters.safetensors").is_file()


CONFIGS: dict[str, tuple[str | bytes | None, tuple[str, ...], tuple[str, ...]]] = {
    "an unknown key in the file": (
        "train:\n  lr: 1e-4\n  stepps: 3\n",
        (),
        ("c.yaml line 3: unknown key train.stepps", "Did you mean train.steps?"),
    ),
    "an unknown key in --set": (None, ("train.lrr=1",), ("--set train.lrr=1: unknown key", "Did you mean train.lr?")),
    "a value of the wrong type": (
        "train:\n  lr: fast\n",
        (),
        ("c.yaml line 2: train.lr: should be a valid number", "got 'fast'", "train.lr: peak learning rate."),
    ),
    "broken YAML": ("train:\n  lr: [1\nlora:\n", (), ("c.yaml line 3: not valid YAML",)),
    "a control character": ("train:\n  lr: \0\n", (), ("c.yaml", "not valid YAML")),
    "a list for a file": ("- train\n", (), ("c.yaml: expected sections such as `train:`, found list",)),
    "a binary file": (b"\xff\xfe\0", (), ("c.yaml: not a text file (invalid UTF-8 at byte 0)",)),
    "steps and epochs": ("train:\n  steps: 3\n  epochs: 1\n", (), ("set steps or epochs, not both",)),
    "no equals sign": (None, ("train.lr",), ("--set train.lr: expected section.key=value", "--set train.lr=1e-4")),
    "no section": (None, ("lr=1",), ("--set lr=1: expected section.key=value",)),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_wrong_configuration_is_named_by_line_and_key(kind: str, tmp_path: Path) -> None:
    content, settings, expected = CONFIGS[kind]
    file, out = tmp_path / "c.yaml", tmp_path / "run"
    file.write_bytes(content if isinstance(content, bytes) else (content or "").encode())
    options = [option for setting in settings for option in ("--set", setting)]
    refused(out, "train", "-c", file, "--model", "model", "--data", "data", "--out", out, *options, expected=expected)


def test_an_unknown_recipe_lists_those_there_are(tmp_path: Path) -> None:
    out = tmp_path / "run"
    expected = (
        "no configuration file 'qlroa', and no recipe of that name",
        "Shipped recipes: dpo, kto, lora, orpo, qlora, quick.",
    )
    refused(out, "train", "-c", "qlroa", "--model", "model", "--data", "data", "--out", out, expected=expected)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("lora.targets=[q_prj]", ("no linear layer is called 'q_prj'", "Did you mean q_proj?", "down_proj, gate_proj")),
        ("lora.layers=9", ("lora.layers 9: the model has 2 blocks", "Use 1 to 2, or all.")),
    ],
)
def test_an_adapter_that_the_model_has_no_place_for_is_refused(
    setting: str, expected: tuple[str, ...], mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    refused(out, "train", "--model", mlx_model, "--data", data, "--out", out, "--set", setting, expected=expected)

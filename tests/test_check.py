"""`data check` says what is in the rows and what is wrong with them; `data convert` writes them in other formats."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from mlxtune.cli import survey_table
from mlxtune.cli.console import console
from mlxtune.data.rows import formats, rewriting
from mlxtune.errors import UserError


def chat(question: str, answer: str, **extra: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **extra}]}


GOOD = [chat(f"Explain number {number}.", f"The number {number} comes before {number + 1}.") for number in range(20)]
CALL = {"id": "call00100", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
ODD: dict[str, Any] = {  # code: a row that has it and no other
    "duplicate": GOOD[0],
    "empty": chat("Say nothing.", ""),
    "short": chat("Good or bad?", "bad"),
    "refusal": chat("Do it.", "I'm sorry, but I cannot do that for you."),
    "secret": chat("My key?", "It is AKIAABCDEFGHIJKLMNOP and it is yours."),
    "e-mail": chat("Who?", "Write to jane@firm.org and ask her."),
    "encoding": chat("Where?", "In a cafÃ© behind the old station."),
    "markup": chat("Which?", "Salt &amp; pepper are on the table."),
    "cut off": chat("Code?", "Here is the code:\n```python\nprint(1)"),
    "dropped": {"messages": [{"role": "user", "content": "Nobody answers this question."}]},
    "damaged": chat("Call f.", "I call the function f now.", tool_calls=[CALL]),
    "bad": {"messages": []},
    "leak": GOOD[7],
    "shortened": chat("Tell me a long story.", "once upon a time " * 30 + "they lived."),
}
SETTINGS = ("--set", "data.max_tokens=250")


def survey(tokenizer: Path, path: Path, *options: str) -> dict[str, Any]:
    done = tiny.mlxtune("data", "check", "--model", tokenizer, "--data", path, "--json", *SETTINGS, *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_each_kind_of_trouble_is_found_in_its_own_row(tokenizer_folder: Path, tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "train.jsonl", [*GOOD, *ODD.values()])
    tiny.write_jsonl(tmp_path / "valid.jsonl", [GOOD[7], chat(GOOD[3]["messages"][0]["content"], "Another answer.")])
    told = survey(tokenizer_folder, tmp_path)
    found = {(finding["split"], finding["code"]): finding for finding in told["findings"]}
    expected = {("train", code): [21 + place] for place, code in enumerate(ODD)}
    expected["valid", "leak"], expected["valid", "question leak"] = [1], [2]
    del expected["train", "leak"]
    expected["train", "duplicate"].append(21 + list(ODD).index("leak"))
    for key, rows in expected.items():
        assert found.pop(key)["rows"] == rows, key
    assert not [finding for finding in found.values() if finding["severity"] == "error"]
    severities = [finding["severity"] for finding in told["findings"]]
    assert severities == sorted(severities, key=("error", "warning", "note").index)
    facts = told["splits"]["train"]
    assert facts["rows"] == len(GOOD) + len(ODD)
    assert facts["formats"] == {"messages": facts["rows"] - 1}
    assert (facts["outcomes"]["unreadable"], facts["outcomes"]["shortened"]) == (1, 1)
    assert facts["outcomes"]["damaged by the chat template"] == 1
    assert facts["outcomes"]["used"] + 4 == facts["rows"]
    assert facts["tasks"]["explain"] == len(GOOD) + 2
    assert facts["lengths"]["longest"] > 250
    assert sum(count for _, _, count in facts["lengths"]["histogram"]) == facts["examples"]
    assert facts["system_prompts"] == {"distinct": 0, "rows_without": facts["rows"] - 1}


def test_a_template_that_puts_a_system_prompt_of_its_own_before_rows_without_one_is_told(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(tokenizer_folder, folder)
    own = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are tiny.<|im_end|>\n{% endif %}"
    (folder / "chat_template.jinja").write_text(own + tiny.CHATML)
    with_system = {"messages": [{"role": "system", "content": "Be brief."}, *GOOD[3]["messages"]]}
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [*GOOD[:3], with_system])
    told = {finding["code"]: finding for finding in survey(folder, path)["findings"]}
    assert (told["own system"]["count"], told["own system"]["reasons"]) == (3, {"You are tiny.": 3})
    assert "own system" not in {finding["code"] for finding in survey(tokenizer_folder, path)["findings"]}
    tiny.write_jsonl(path, [with_system])
    assert "own system" not in {finding["code"] for finding in survey(folder, path)["findings"]}


def test_strict_fails_on_errors_alone_and_the_terminal_names_rows_and_remedies(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [*GOOD, ODD["short"]])
    done = tiny.mlxtune("data", "check", "--model", tokenizer_folder, "--data", path, "--strict")
    assert done.returncode == 0, done.stderr
    assert "note: train: 1 row whose answers all have fewer than 3 words (rows 21)" in done.stdout
    assert "-> fine for labels" in done.stdout
    tiny.write_jsonl(path, [*GOOD, {"messages": 3}])
    done = tiny.mlxtune("data", "check", "--model", tokenizer_folder, "--data", path, "--strict")
    assert done.returncode == 2
    assert "error: --strict: 1 rows that cannot be read (train)" in done.stderr


def test_rows_of_several_files_are_named_with_their_file(tokenizer_folder: Path, tmp_path: Path) -> None:
    for number in range(2):
        tiny.write_jsonl(tmp_path / f"train-{number}.jsonl", [GOOD[number], ODD["empty"]])
    told = survey(tokenizer_folder, tmp_path)
    rows = {finding["code"]: finding["rows"] for finding in told["findings"]}
    assert rows["empty"] == ["train-0.jsonl:2", "train-1.jsonl:2"]
    assert rows["duplicate"] == ["train-1.jsonl:2"]


LENGTHS = {
    "max_tokens": 30,
    "cut_share": 0.1,
    "longest": 45,
    "histogram": [[0, 19, 0], [20, 39, 90], [40, 59, 10]],
}


@pytest.mark.parametrize(
    ("encoding", "width", "terminal", "bars"),
    [
        ("utf-8", 120, True, ("█" * 40, "▒" * 4)),
        ("utf-8", 60, True, ("█" * 16, "▒" * 2)),
        ("utf-8", 20, False, ("█" * 40, "▒" * 4)),  # nobody looks: nothing is wrapped
        ("ascii", 120, True, ("#" * 40, "%" * 4)),
    ],
)
def test_bars_fit_the_terminal_and_tell_what_is_cut_without_colour(
    encoding: str, width: int, terminal: bool, bars: tuple[str, str]
) -> None:
    stream = io.BytesIO()
    text = io.TextIOWrapper(stream, encoding, write_through=True)
    out = console(file=text, width=width, force_terminal=terminal, color_system=None, soft_wrap=not terminal)
    survey_table.draw_lengths(out, LENGTHS)
    *_, nothing, most, beyond = stream.getvalue().decode(encoding).splitlines()
    assert nothing.split() == ["0-19", "0"]
    assert most.split() == ["20-39", bars[0], "90", "<-", "max_tokens"]
    assert beyond.split() == ["40-59", bars[1], "10"]


CALLING = {
    "messages": [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "5", "tool_call_id": "call00100"},
        {"role": "assistant", "content": "Five.", "weight": 0},
    ]
}


@pytest.mark.parametrize(
    ("row", "target"), [(CALLING, "sharegpt"), (GOOD[0], "sharegpt"), (GOOD[0], "alpaca"), (CALLING, "messages")]
)
def test_a_row_survives_the_way_to_another_format_and_back(row: dict[str, Any], target: str, tmp_path: Path) -> None:
    given = tiny.write_jsonl(tmp_path / "d.jsonl", [{**row, "id": 9}])
    done = rewriting.rewrite(formats.read(given), target, tmp_path / "out.jsonl")
    assert (done.written, done.left_out) == (1, [])
    (before,), (after,) = (list(formats.read(path)) for path in (given, tmp_path / "out.jsonl"))
    assert isinstance(before, formats.Record) and isinstance(after, formats.Record)
    called = [call["id"] for message in after.messages or [] for call in message.get("tool_calls", [])]
    text = json.dumps(after.messages).replace(called[0], "call00100") if called else json.dumps(after.messages)
    assert json.loads(text) == before.messages
    assert after.fields == {"id": 9}


def test_rows_that_a_format_cannot_hold_are_refused_or_left_out(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    read: Callable[[], Any] = lambda: formats.read(tiny.write_jsonl(tmp_path / "d.jsonl", [GOOD[0], CALLING]))  # noqa: E731
    with pytest.raises(UserError, match="line 2: an Alpaca row holds one question and one answer, and no tools"):
        rewriting.rewrite(read(), "alpaca", out)
    assert not out.exists()
    done = rewriting.rewrite(read(), "alpaca", out, drop=True)
    assert (done.written, [row.place for row in done.left_out]) == (1, ["line 2"])
    assert [json.loads(line)["instruction"] for line in out.read_text().splitlines()] == ["Explain number 0."]


def test_a_survey_and_a_run_count_the_same_rows_in_the_same_words(mlx_model: Path, tmp_path: Path) -> None:
    """Of 26 rows six are damaged, some of which would be held out; of the 20 others two are."""
    damaged = [chat(f"Call f for {number}.", "I call it.", tool_calls=[CALL]) for number in range(6)]
    path = tiny.write_jsonl(tmp_path / "d.jsonl", [*damaged, *GOOD])
    facts = survey(mlx_model, path)["splits"]["train"]
    words = "damaged by the chat template"
    assert facts["outcomes"] == {"used": 20, words: 6} and facts["held_out"] == 2
    flags = ("train", "--model", mlx_model, "--data", path, "--dry-run", *SETTINGS)
    tiny.one_clear_line(tiny.mlxtune(*flags), "the chat template damages 6 of 26 rows")
    kept = survey(mlx_model, path, "--set", "data.on_damage=keep", "--set", "data.valid_fraction=0.2")
    facts_kept = kept["splits"]["train"]
    assert facts_kept["outcomes"] == {"used": 26} and [one["code"] for one in kept["findings"]].count("damaged") == 1
    done = tiny.done(*flags, "--set", "data.on_damage=keep", "--set", "data.valid_fraction=0.2")
    held_out = facts_kept["held_out"]
    assert f"rows: {26 - held_out} to train on, {held_out} held out" in done.stdout and held_out > 2
    assert f"optimizer steps: {facts_kept['steps_per_epoch']}\n" in done.stdout
    done = tiny.done(*flags, "--set", "data.on_damage=drop")
    assert "rows: 18 to train on, 2 held out" in done.stdout
    assert f"6 rows left out: {words}" in done.stdout + done.stderr
    assert f"optimizer steps: {facts['steps_per_epoch']}\n" in done.stdout

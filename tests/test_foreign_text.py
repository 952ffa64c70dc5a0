"""Rows, names, errors and answers of other people: no terminal obeys them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import hostile
import pytest
import terminal
import tiny
from mlxtune_convert.shown import shown, shown_json, shown_name

from mlxtune.cli import talk
from mlxtune.cli.console import console
from mlxtune.data.template.answers import Plain

CLIPBOARD, TITLE, CLEARED = "\x1b]52;c;ZXZpbA==\x1b\\", "\x1b]0;evil\x07", "\x1b[2J\x1b[H"
ONE_BYTE, TURNED, OVER = "\x9b2J\x9d0;evil\x9c", "\u202egnp.exe\u2066", "safe\rEVIL"
HOSTILE = [CLIPBOARD, TITLE, CLEARED, ONE_BYTE, TURNED, OVER, "a\x08\x08b", "\x0e\x0f", "\u200f\u061c", "\x7f\x00"]
KEPT = "äß 漢字 ไทย مرحبا 🚲 e\u0301 x\u200dy\ttab"
RAW = [chr(number) for number in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(number) not in "\n\t"]
RAW += list("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")


def harmless(said: str) -> None:
    """Nothing of HOSTILE is there as a terminal would obey it; rich's own colours and the terminal's \\r\\n may be."""
    for text in HOSTILE:
        assert text not in said, text
    left = said.replace("\r\n", "")
    for code in (
        "\x1b]",
        "\x9b",
        "\x9d",
        "\u202e",
        "\u2066",
        "\u200f",
        "\u061c",
        "\x07",
        "\x08",
        "\x00",
        "\x7f",
        "\x0e",
    ):
        assert code not in left, (code, said)
    assert "\x1b[2J" not in left


@pytest.mark.parametrize("text", HOSTILE)
def test_each_control_character_is_shown_by_its_number_and_letters_stay(text: str) -> None:
    for spelled in (shown(text), shown_name(text)):
        assert not any(letter in spelled for letter in RAW)
    assert shown(KEPT) == KEPT and shown("a\nb") == "a\nb" and shown_name("a\nb\u2028c") == "a\\x0ab\\u2028c"
    assert shown("\x1b\x9b\u202e") == "\\x1b\\x9b\\u202e"
    assert json.loads(shown_json({text: [text, KEPT]})) == {text: [text, KEPT]}
    assert not any(letter in shown_json({text: [text, KEPT]}) for letter in RAW)


def test_every_control_character_is_among_them() -> None:
    assert not any(letter in shown("".join(RAW)) for letter in RAW)
    assert shown("".join(RAW)).count("\\") == len(RAW)


def test_none_of_200_texts_is_obeyed_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    """A console's lines, tables and what it says while it works; a model's answer and its thought; JSON."""
    from rich.table import Table
    from rich.text import Text

    texts = hostile.texts()
    assert len(set(texts)) == 200 and sum(bool(terminal.HARMFUL.search(text)) for text in texts) > 190
    safe, table, voice = console(force_terminal=True, width=4000), Table("name"), talk.Voice(Plain())
    for text in texts:
        table.add_row(text)
        safe.print(text, Text(text))
        with safe.status(text):
            pass
        voice.hear(text)
    safe.print(table)
    voice.end("")
    said = capsys.readouterr().out
    assert terminal.obeyed(said) == [] and said.count("\\x") > 500
    for text in texts:
        assert not any(letter in shown_name(text) for letter in [*RAW, *"\n\t", *hostile.UNSEEN])
        assert json.loads(shown_json([text])) == [text] and not terminal.obeyed(shown_json([text]))


def test_a_console_reads_no_markup_in_what_it_says_while_it_works(capsys: pytest.CaptureFixture[str]) -> None:
    """A folder may be called so."""
    for name in ("a[/b]", "[link=http://evil.example]a[/link]", "[bold]"):
        with console(force_terminal=True, width=200).status(f"loading {name}"):
            pass
        assert f"loading {name}" in capsys.readouterr().out


@pytest.mark.parametrize(("encoding", "written"), [("ascii", b"caf\\xe9 \\u6f22"), ("latin-1", b"caf\xe9 \\u6f22")])
def test_what_a_stream_cannot_write_is_written_by_its_number(encoding: str, written: bytes) -> None:
    """Of another locale than UTF-8: a row of other letters ended the command."""
    stream = io.BytesIO()
    text = io.TextIOWrapper(stream, encoding, write_through=True)
    console(file=text, width=40).print("café 漢")
    assert stream.getvalue() == written + b"\n"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_console_keeps_its_own_colours_and_nothing_of_the_texts(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.table import Table
    from rich.text import Text

    safe = console(force_terminal=True, color_system="truecolor", width=200)
    table = Table("name")
    table.add_row(text)
    for item in (text, Text(text, style="bold"), table, Text("a") + Text(text)):
        safe.print(item, style="red")
    said = capsys.readouterr().out
    assert "\x1b[31m" in said or "\x1b[1;31m" in said
    harmless(said)


def test_an_answer_commands_no_terminal_and_is_kept_raw_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    for raw in (False, True):
        voice = talk.Voice(Plain(), raw)
        for piece in CLIPBOARD + KEPT:  # one character at a time
            voice.hear(piece)
        voice.end("")
        said = capsys.readouterr().out
        assert said == (CLIPBOARD if raw else shown(CLIPBOARD)) + KEPT + "\n"


def test_raw_is_refused_on_a_terminal(mlx_model: Path) -> None:
    said = terminal.shows("generate", "--model", mlx_model, "--prompt", "hi", "--raw", status=2)
    assert "--raw would let the model command this terminal" in said


def test_rows_names_and_reasons_of_other_people_reach_a_terminal_harmlessly(mlx_model: Path, tmp_path: Path) -> None:
    """The file's name, a column's, what is said, and the reason for which a row is dropped."""
    everything = "".join(HOSTILE)
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text}\n{KEPT}"}]}
        for text in HOSTILE
    ]
    rows.append({"messages": [{"role": everything, "content": "x"}, {"role": "assistant", "content": "y"}]})
    rows.append({everything: 1})
    path = tiny.write_jsonl(tmp_path / "a\x1b]0;evil\x1b\\\nfake: line.jsonl", rows)
    options = ("--model", mlx_model, "--data", path)
    for words in (("data", "show", "--limit", "10"), ("data", "show", "--json", "--limit", "10"), ("data", "check")):
        said = terminal.shows(*words[:2], *options, *words[2:])
        harmless(said)
    assert "漢字" in said or words[1] == "check"
    assert "\nfake: line" not in said.replace("\r", "")


def test_errors_and_lists_of_runs_reach_a_terminal_harmlessly(mlx_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run\nfake  a  finished\x1b]0;evil\x1b\\"
    run.mkdir()
    (run / "config.yaml").write_text("")
    event = {"kind": "begin", "step": 0, "steps": 5, "model": f"m/{CLIPBOARD}{TURNED}"}
    (run / "events.jsonl").write_text(json.dumps(event) + "\n" + json.dumps({"kind": "end", "state": CLEARED}) + "\n")
    said = terminal.shows("runs", tmp_path)
    harmless(said)
    assert len([line for line in said.replace("\r", "").split("\n") if "fake" in line]) == 1 and "\nfake" not in said
    (tmp_path / "c.yaml").write_text(json.dumps({f"lora{CLIPBOARD}{TURNED}": 1}))
    said = terminal.shows("train", "-c", tmp_path / "c.yaml", "--model", mlx_model, "--data", "x", status=2)
    harmless(said)
    assert "\\x1b]52" in said
    folder = tiny.make_model(tmp_path / "model")
    refusal = "{{ raise_exception('" + CLIPBOARD.replace("\\", "\\\\") + "') }}"
    (folder / "chat_template.jinja").write_text(refusal)
    harmless(terminal.shows("generate", "--model", folder, "--prompt", "x", status=2))

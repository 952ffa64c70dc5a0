"""How files are written: encodings, separators, arrays."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from mlxtune.data.rows.readers import Bad, raw_rows
from mlxtune.errors import UserError

ROWS = [{"prompt": "Où?", "completion": "Là \u2028 bas 🚲"}, {"prompt": "Ja", "completion": "Nein"}]
TEXTS = {
    "d.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS),
    "d.json": json.dumps(ROWS, ensure_ascii=False),
    "d.csv": "prompt,completion\r\nOù?,Là \u2028 bas 🚲\r\nJa,Nein\r\n",
    "d.tsv": "prompt\tcompletion\nOù?\tLà \u2028 bas 🚲\nJa\tNein\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", TEXTS)
def test_text_is_read_in_every_encoding_that_a_byte_order_mark_tells(name: str, encoding: str, tmp_path: Path) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""  # Python writes the mark of the others itself
    path = tmp_path / name
    path.write_bytes((mark + TEXTS[name]).encode(encoding))
    assert [row for _, row in raw_rows(path)] == ROWS  # type: ignore[misc]


def test_a_gzipped_utf16_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(TEXTS["d.jsonl"].encode("utf-16")))
    assert [row for _, row in raw_rows(path)] == ROWS  # type: ignore[misc]


def test_a_cut_utf16_file_is_refused_by_its_own_name(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(TEXTS["d.json"].encode("utf-16")[:-1])
    with pytest.raises(UserError, match=r"not a text file \(invalid UTF-16"):
        list(raw_rows(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('prompt;completion\n"a, ""b""";"c;d"\n', {"prompt": 'a, "b"', "completion": "c;d"}),
        ('"prompt";"completion"\n1,5;2,5\n', {"prompt": "1,5", "completion": "2,5"}),
        ("prompt\tcompletion\na, b; c\td\n", {"prompt": "a, b; c", "completion": "d"}),
        ('prompt;"a, b";completion\n1;2;3\n', {"prompt": "1", "a, b": "2", "completion": "3"}),
        ('"a;b",completion\n1;2,3\n', {"a;b": "1;2", "completion": "3"}),
        ("a;b,completion\n1,2\n", {"a;b": "1", "completion": "2"}),
        ('"a;b"\n1;2\n', {"a;b": "1;2"}),
        ("text\na;b\n", {"text": "a;b"}),
        ("\ufeffprompt;completion\na;b\n", {"prompt": "a", "completion": "b"}),
    ],
)
def test_the_header_tells_what_separates_the_fields_of_a_csv_file(
    text: str, expected: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(text.encode())
    assert list(raw_rows(path)) == [(1, expected)]


def test_a_broken_first_line_leaves_the_others_readable(tmp_path: Path) -> None:
    """It is no array and no object over several lines, so the file is still JSON Lines."""
    path = tmp_path / "d.jsonl"
    for broken in ('{"text": "a"', "[1, 2]", '[{"text": "a"}]', '{"text": "a"} {"text": "b"}'):
        path.write_text(f'{broken}\n{{"text": "c"}}\n')
        bad, good = raw_rows(path)
        assert isinstance(bad, Bad), broken
        assert good == (2, {"text": "c"})

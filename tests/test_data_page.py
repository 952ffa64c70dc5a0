"""The data on a page: all lengths in its histogram, nobody's text as markup, no secret, and a page for any rows."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import tiny

from mlxtune import cli
from mlxtune.config.resolve import load
from mlxtune.data.chat.renderer import Renderer
from mlxtune.data.rows import formats
from mlxtune.data.rows.formats import Record
from mlxtune.data.survey import sampling
from mlxtune.data.survey.trained_text import decoded
from mlxtune.report import data_page, surveyed
from mlxtune.report.html import joined
from mlxtune.report.run_record import read_run, values_without_home
from mlxtune.report.sections import data as section_data
from mlxtune.report.surveyed import Surveyed

KEY = "AKIAABCDEFGHIJKLMNOP"


def looked_at(
    rows: list[dict[str, Any]], tokenizer: Any, folder: Path, most: int | None = None, limit: int = 40
) -> Surveyed:
    path = str(tiny.write_jsonl(folder / "d.jsonl", rows))
    config = load(None, (f"data.max_tokens={limit}",), {"data.path": path})
    return surveyed.surveyed(config, Renderer(tokenizer, config.data), lambda name, count: None, most)


class Read(HTMLParser):
    """The elements of a page in their order, with the names of their attributes; its texts; and its marked ones."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.bars: list[dict[str, str | None]] = []  # the rectangles of plots
        self.texts: list[str] = []
        self.marked: list[str] = []
        self._is_marked = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self._is_marked = tag == "mark"
        if tag == "rect":
            self.bars.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        self._is_marked = False

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._is_marked:
            self.marked.append(data)


def chat(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **fields}


def test_the_bars_of_the_histogram_are_the_lengths_of_the_uncut_examples(tokenizer: Any, tmp_path: Path) -> None:
    rows = [chat("Count.", "one " * (1 + number % 31)) for number in range(60)]
    found = looked_at(rows, tokenizer, tmp_path)
    records = formats.read(tmp_path / "d.jsonl")
    uncut = Renderer(tokenizer, load(None, (), {"data.path": "d"}).data).uncut()
    lengths = np.array([len(row.example.ids) for row in uncut.rows(records) if row.example is not None])
    told = found.told["splits"]["train"]["lengths"]
    assert len(lengths) == 60 and told["cut_share"] == np.mean(lengths > 40)
    for low, high, count in told["histogram"]:
        assert count == np.sum((lengths >= low) & (lengths <= high))
    page = Read(section_data.lengths("train", told))
    heights = np.array([float(bar["height"] or 0) for bar in page.bars])
    counts = np.array([count for _, _, count in told["histogram"]])
    assert counts.sum() == 60 and len(heights) == len(counts)
    np.testing.assert_allclose(heights / heights.sum(), counts / counts.sum(), atol=2e-3)
    assert "data.max_tokens 40" in page.texts


def test_a_limit_far_beyond_all_lengths_is_told_and_not_drawn() -> None:
    told = {"histogram": [[0, 9, 3]], "max_tokens": 2048, "longest": 9, "cut_share": 0.0}
    page = section_data.lengths("train", {**told, "quantiles": {"50": 5, "95": 9}})
    assert page is not None and 'class="mark"' not in page and "longer than data.max_tokens 2,048" in page


def test_texts_of_others_are_text_on_the_page_and_their_secrets_are_hidden(tokenizer: Any, tmp_path: Path) -> None:
    """Such a page has no element, and no attribute of one, that the same page of harmless letters does not have."""
    wild = [
        "</script><script>alert(1)</script>",
        "<!--",
        "<img src=x onerror=alert(1)>",
        "&quot;'\"",
        *hostile.texts(60),
    ]
    wild = [text.replace("\0", "") for text in wild]
    pages = []
    for texts in (wild, ["x" * len(text) for text in wild]):
        whole = "".join(texts)
        row = chat(whole, f"{KEY} {whole}", made={"how": f"{texts[0]} {KEY}"})
        row["messages"][0] |= {texts[2]: whole}  # a key that nothing reads: the finding names it
        found = looked_at([row, chat(whole, "An answer.")], tokenizer, tmp_path, limit=100_000)
        pages.append(data_page.of_data(texts[0], texts[1], found))
    hostile_page, harmless = map(Read, pages)
    assert set(hostile_page.elements) == set(harmless.elements)
    assert sum(name == "script" for name, _ in hostile_page.elements) == 1  # the record
    assert any(wild[2] in text for text in hostile_page.texts)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", pages[0])
    assert KEY not in pages[0] and "AKIA…" in pages[0]


def test_what_the_model_must_produce_is_marked_and_the_rest_is_not(tokenizer: Any, tmp_path: Path) -> None:
    found = looked_at([chat("Hello?", "Yes, here."), chat("And?", "No.")], tokenizer, tmp_path)
    (example,) = found.row
    page = Read(joined(section_data.row_of(found.row)))
    config = load(None, (), {"data.path": "d"})
    (row,) = Renderer(tokenizer, config.data).rows([next(iter(formats.read(tmp_path / "d.jsonl")))])
    assert row.example is not None
    assert "".join(text for _, text in example.pieces) == decoded(tokenizer, [int(one) for one in row.example.ids])
    assert page.marked[0] == "Underlined"  # the legend, which does not rely on colour
    assert page.marked[1:] == ["Yes, here.<|im_end|>"]
    assert (example.tokens, example.learned) == (len(row.example.ids), int(row.example.mask.sum()))


@pytest.mark.parametrize(
    ("rows", "said", "bars"),
    [
        ([{"messages": [{"role": "user", "content": "Nobody answers."}]}], "rows that teach nothing", 0),
        ([chat("One?", "Yes, one.")], "1 row to learn from", 1),
        ([{"text": "Once upon a time."}, {"text": "There was a page."}], "text 2", 1),
        ([{"messages": []}, chat("One?", "Yes, one.")], "rows that cannot be read", 1),
    ],
    ids=["no usable row", "one row", "texts only", "a bad row"],
)
def test_there_is_a_page_for_any_rows(
    rows: list[dict[str, Any]], said: str, bars: int, tokenizer: Any, tmp_path: Path
) -> None:
    found = looked_at(rows, tokenizer, tmp_path)
    page = Read(data_page.of_data("d", "m", found))
    assert any(said in text or said.replace("rows", "row", 1) in text for text in page.texts)
    assert bool(page.bars) == bool(bars) and bool(found.row) == bool(bars)


def test_of_many_rows_a_sample_is_taken_that_the_seed_decides_and_that_is_named_as_one(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, tmp_path: Path
) -> None:
    records: list[Any] = [Record("d", number, "text", text="a" * 10) for number in range(1, 301)]
    whole = sampling.sample(records, 300, seed=0)
    assert whole.rows == records and whole.line(0) == ""
    some, again, other = (sampling.sample(records, 50, seed) for seed in (0, 0, 1))
    assert some == again and some != other
    assert [row.row for row in some.rows] == sorted({row.row for row in some.rows}) and len(some.rows) == 50
    assert some.line(0) == "50 of the 300 rows, chosen by chance (seed 0)"
    taken = Counter(row.row for seed in range(200) for row in sampling.sample(records, 50, seed).rows)
    assert max(taken.values()) < 2.5 * 200 * 50 / 300 and len(taken) == 300  # each has its chance
    monkeypatch.setattr(sampling, "READ_ROWS", 100)
    monkeypatch.setattr(sampling, "TAKEN_LETTERS", 205)
    endless = iter(records)
    cut = sampling.sample(endless, 50, seed=0)
    assert cut.line(3) == "20 of the first 100 rows, chosen by chance (seed 3)"
    assert next(endless).row == 102  # one more was looked at, to know that there is one
    monkeypatch.setattr(sampling, "READ_ROWS", 20_000)
    found = looked_at([chat(f"Is it {n}?", f"It is {n}.") for n in range(9)], tokenizer, tmp_path, most=4)
    page = data_page.of_data("d", "m", found)
    assert "train: 4 of the 9 rows, chosen by chance (seed 0)." in page and "fewer than 500" not in page


def test_the_home_folder_is_hidden_in_every_text_of_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home := "/people/anna")
    told = {f"{home}/d": [home, f"in '{home}/x', {home}2 and /mnt{home}/y", 3, None]}
    assert values_without_home(told) == {"~/d": ["~", f"in '~/x', {home}2 and /mnt{home}/y", 3, None]}


@pytest.fixture
def own_run(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A folder as a run leaves it, of a model that is a tokenizer alone, on one file of four rows."""
    tiny.write_jsonl(tmp_path / "d.jsonl", [chat(f"Is it {n}?", f"It is {n}.") for n in range(4)])
    places = {"data.path": str(tmp_path / "d.jsonl"), "model.path": str(tokenizer_folder)}
    out = tmp_path / "run"
    out.mkdir()
    noted = {"max_tokens": 2048, "train": {"rows": 3, "repeated": 1}, "valid": {"rows": 1, "trained": 0}}
    begun = {"kind": "begin", "step": 0, "steps": 1, "model": "m", "computed": "", "data": noted}
    note = {"kind": "note", "text": f"train: 1 rows dropped: {KEY}"}
    (out / "events.jsonl").write_text(f"{json.dumps(begun)}\n{json.dumps(note)}\n")
    (out / "config.yaml").write_text(load(None, (), places).to_yaml())
    return out


def of_run(folder: Path) -> str:
    found = section_data.section(read_run(folder))
    assert found is not None and found.anchor == "data"
    return found.body


def test_the_data_of_a_run_is_read_again_and_what_is_newer_than_the_run_is_said(own_run: Path) -> None:
    page = of_run(own_run)
    assert "One row as it is trained on" in page and "cannot be read again" not in page
    assert "train: rows equal to an earlier one" in page and "changed after the run began" not in page
    data = own_run.parent / "d.jsonl"
    tiny.write_jsonl(data, [chat("Is it new?", "It is new.")])
    later = (own_run / "config.yaml").stat().st_mtime + 9
    os.utime(data, (later, later))
    page = of_run(own_run)
    assert "d.jsonl was changed after the run began" in page and "Is it new?" in page


@pytest.mark.parametrize("gone", ["data", "model", "both", "config"])
def test_where_the_data_is_gone_the_page_says_so_and_shows_what_the_run_noted(own_run: Path, gone: str) -> None:
    if gone in ("data", "both"):
        (own_run.parent / "d.jsonl").unlink()
    if gone in ("model", "both"):
        text = (own_run / "config.yaml").read_text()
        (own_run / "config.yaml").write_text(re.sub(r"( path: ).*tokenizer.*", r"\1nobody/nothing", text))
    if gone == "config":
        (own_run / "config.yaml").write_text("{")
    page = of_run(own_run)
    assert "The data cannot be read again" in page and "What follows is what the run noted" in page
    assert "train: rows equal to an earlier one" in page and "dropped: AKIA…" in page and KEY not in page
    shutil.rmtree(own_run)


def test_whatever_becomes_of_the_files_the_page_of_a_run_is_made(
    own_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path) -> Surveyed:
        raise RuntimeError(f"{folder.name} fell apart")

    monkeypatch.setattr(surveyed, "of_run", broken)
    assert "The data cannot be read again: RuntimeError: run fell apart" in of_run(own_run)


def test_data_check_writes_a_page_and_replaces_nothing_but_pages(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.signals, "unwind_on_signals", lambda: None)

    def check(*options: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(word) for word in (*on, *options)])
        return int(ended.value.code or 0), *capsys.readouterr()

    path = tiny.write_jsonl(tmp_path / "d.jsonl", [chat("Is it?", f"It is {KEY}.")])
    on = ("data", "check", "--model", tokenizer_folder, "--data", path)
    page = tmp_path / "check.html"
    monkeypatch.setenv("HOME", str(tmp_path))
    status, out, said = check("--json", "--html", page)
    assert (status, json.loads(out)["splits"]["train"]["rows"], "check.html: the page" in said) == (0, 1, True)
    assert page.read_text().startswith("<!DOCTYPE html>") and KEY not in page.read_text()
    assert "~/d.jsonl" in page.read_text() and str(tmp_path) not in page.read_text()
    tiny.write_jsonl(path, [chat("Is it?", "It is new.")])
    assert check("--html", page)[0] == 0 and "It is new." in page.read_text()
    theirs = tmp_path / "theirs.html"
    theirs.write_text("theirs")
    for options, why in (
        (("--html", theirs), "theirs.html already exists"),
        (("--html", path, "--force"), "an HTML page is written"),
        (("--force",), "--force has no effect without --html: nothing is written"),
    ):
        status, out, said = check(*options)
        assert (status, out) == (2, "") and why in said
    assert theirs.read_text() == "theirs"
    assert check("--html", theirs, "--force")[0] == 0 and theirs.read_text() != "theirs"

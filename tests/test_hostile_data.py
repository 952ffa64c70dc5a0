"""Data and configurations that are small on the disk and would be large in memory, or slow, or somebody else's."""

from __future__ import annotations

import gzip
import json
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny

from mlxtune.data.rows import formats, readers
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.readers import Bad, raw_rows
from mlxtune.data.survey import lint
from mlxtune.data.template import bounded, rendering
from mlxtune.data.template.template import Template, TemplateError
from mlxtune.errors import UserError


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST", 1 << 20)
    monkeypatch.setattr(readers, "LARGEST_JSON", 1 << 20)


LONG = json.dumps({"text": "a" * (1 << 20)})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.usefixtures("small_limits")
def test_a_line_longer_than_any_text_is_a_bad_row_and_the_next_one_is_read(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    short = json.dumps({"text": "b"})
    path.write_bytes(gzip.compress(f"{short}\n{LONG}\n{short}\n{LONG}".encode(encoding)))
    first, long, third, last = raw_rows(path)
    assert first == (1, {"text": "b"}) and third == (3, {"text": "b"})
    assert [(bad.row, bad.reason) for bad in (long, last) if isinstance(bad, Bad)] == [
        (2, "longer than 1.05 MB"),
        (4, "longer than 1.05 MB"),
    ]


@pytest.mark.usefixtures("small_limits")
def test_a_line_of_just_the_longest_length_is_read(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    just = json.dumps({"text": "a" * ((1 << 20) - 13)})
    assert len(just) + 1 == 1 << 20
    path.write_text(f"{just}\n{just}\n")
    assert [row[0] for row in raw_rows(path) if not isinstance(row, Bad)] == [1, 2]


@pytest.mark.usefixtures("small_limits")
def test_a_json_file_and_a_csv_field_that_are_too_large_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(f"[{LONG}]".encode()))
    with pytest.raises(UserError, match=r"is read as a whole") as refused:
        list(raw_rows(tmp_path / "d.json.gz"))
    assert "JSON Lines" in (refused.value.hint or "")
    (tmp_path / "d.csv").write_text(f"text\n{'a' * ((1 << 20) + 1)}\n")
    with pytest.raises(UserError, match=r"not a CSV file \(field larger than"):
        list(raw_rows(tmp_path / "d.csv"))


def test_rows_of_long_texts_are_worked_on_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CHUNK_LETTERS", 100)
    short, long = Record("f", 1, "text", text="a"), Record("f", 1, "text", text="a" * 60)
    talk = Record("f", 1, "messages", messages=[{"role": "user", "content": "a" * 60}, {"role": "assistant"}])
    assert [len(chunk) for chunk in formats.chunks([short] * 1025)] == [100] * 10 + [25]
    assert [len(chunk) for chunk in formats.chunks([long, talk, talk, long, Bad("f", 5, "broken")])] == [2, 2, 1]


def test_a_parquet_file_that_names_one_text_a_thousand_times_stays_small(tmp_path: Path) -> None:
    """A dictionary of one text of 4 MB and 400 references to it: 1.6 GB, were all rows made at once."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "d.parquet"
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 400), pyarrow.array(["a" * (4 << 20)]))
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert path.stat().st_size < 1 << 20
    script = (
        "import resource, sys, pathlib; from mlxtune.data.rows.readers import raw_rows\n"
        "count = sum(1 for _ in raw_rows(pathlib.Path(sys.argv[1])))\n"
        # On Linux a process begins with the peak of the one that it was forked from.
        "status = pathlib.Path('/proc/self/status')\n"
        "own = [line for line in status.read_text().splitlines() if 'VmHWM' in line] if status.exists() else []\n"
        "print(count, own[0].split()[1] if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    count, peak = map(int, done.stdout.split())
    unit = 1 if sys.platform == "darwin" else 1024
    assert count == 400 and peak * unit < 700 << 20


@pytest.mark.parametrize("text", ["x@ " + "a" * 1_000_000, "a@" * 300_000, "a.b-c+d" * 150_000, "a@b." * 250_000])
def test_an_address_is_looked_for_in_a_megabyte_without_looking_twice(text: str) -> None:
    began = time.process_time()
    assert lint.EMAIL.search(text) is None or "@" in text
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("write to jane.doe+x@uni-mainz.de today", "jane.doe+x@uni-mainz.de"),
        ("(me@host.org)", "me@host.org"),
        ("you@example.com", None),
        ("you@mail.example", None),
        ("a@b", None),
        ("no address", None),
    ],
)
def test_addresses_are_found_as_before(text: str, found: str | None) -> None:
    match = lint.EMAIL.search(text)
    assert (match and match[0]) == found


def test_memory_is_measured_in_the_unit_of_this_system() -> None:
    """The test above would pass with a wrong one."""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) > 20 << 20


ENDLESS = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3


@pytest.mark.parametrize("elsewhere", [False, True], ids=["main thread", "another thread"])
def test_a_template_without_end_is_refused_after_a_while(
    elsewhere: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    asked = [{"role": "user", "content": "a"}]
    tokenizer.chat_template = tiny.CHATML if elsewhere else ENDLESS
    before = signal.getsignal(signal.SIGALRM)
    if elsewhere:  # signals cannot be used there; an honest template is none the worse
        with ThreadPoolExecutor(1) as pool:
            assert "user" in pool.submit(Template(tokenizer).text, asked).result()
    else:
        with pytest.raises(UserError, match=r"cannot be used: it did not come to an end within 0\.3 s"):
            Template(tokenizer).text(asked)
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("source", ["{{ 'a' * 2800000 }}", "{{ messages[0].content * 40 }}"], ids=["own", "copies"])
def test_a_template_adds_little_to_what_it_is_given_however_long_that_is(source: str, tokenizer: Any) -> None:
    """Tokens of 60 MB that a template made took 5 GB of memory; a row of that size is its owner's."""
    long = [{"role": "user", "content": "a word " * 10_000}]
    tokenizer.chat_template = source
    with pytest.raises(TemplateError, match=r"makes 2,\d{3},\d{3} characters of this conversation"):
        Template(tokenizer).text(long)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert len(Template(tokenizer).text([{"role": "user", "content": "a word " * 300_000}])) == 2_100_000


def test_a_template_cannot_ask_for_paragraphs_of_nonsense(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ lipsum(99999) }}"
    with pytest.raises(TemplateError, match="'lipsum' is undefined"):
        Template(tokenizer).text([{"role": "user", "content": "a"}])


def test_what_a_template_says_of_a_row_is_short_however_long_the_row_is(tokenizer: Any) -> None:
    """A refusal is kept with its row, and counted by its words."""
    tokenizer.chat_template = "{{ raise_exception('no: ' ~ messages[0].content) }}"
    with pytest.raises(TemplateError, match=r"refuses this conversation: no: .*\.\.\.$") as refused:
        Template(tokenizer).text([{"role": "user", "content": "a word " * 100_000}])
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("other_release", [False, True], ids=["transformers as it is", "another release of it"])
def test_a_template_that_makes_too_much_of_a_conversation_is_refused(
    other_release: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if other_release:
        monkeypatch.setattr(rendering, "_compile", None)
    what = "10,001 characters" if other_release else "a text or list of 10,001 characters"
    monkeypatch.setattr(bounded, "LONGEST", 10_000)
    tokenizer.chat_template = "{{ 'a' * 10001 }}"
    with pytest.raises(TemplateError, match=f"makes {what}"):
        Template(tokenizer).text([{"role": "user", "content": "a"}])

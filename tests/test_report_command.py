"""`mlxtune report`, and the page that `mlxtune train` leaves in every run."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import page_readers
import pages
import pytest
import tiny
from click.testing import CliRunner

from mlxtune.cli import cli, run_page
from mlxtune.errors import Interrupted, UserError
from mlxtune.report import written
from mlxtune.report.run_record import read_run
from mlxtune.report.written import is_page, write_page
from mlxtune.train.lock import MARK
from mlxtune.train.run_folder import PAGE_FILE, RunFolder


def test_a_run_that_ended_has_its_page_and_the_command_makes_the_same(run: Path, tmp_path: Path) -> None:
    page = (run / PAGE_FILE).read_text(encoding="utf-8")
    found = page_readers.record(page)
    assert (found["state"], found["step"], found["steps"]) == ("finished", 12, 12)
    assert page_readers.faults(page) == page_readers.leads_to(page) == []
    done = tiny.done("report", run, "--out", tmp_path / "page.html")
    assert done.stdout == f"{tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    for name in ("model", "train", "valid"):
        assert len(found["begin"]["digests"][name]) >= 16
    assert {"mlxtune", "MLX", "mlx-lm", "Python"} <= set(found["begin"]["versions"])


def test_the_json_of_a_run_is_what_its_page_holds(run: Path) -> None:
    done = tiny.done("report", run, "--json")
    assert json.loads(done.stdout) == page_readers.record((run / PAGE_FILE).read_text(encoding="utf-8"))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A run's folder, written by hand."""
    return pages.write(tmp_path / "runs" / "kept", pages.told(6))


def report(*words: str | Path) -> Any:
    return CliRunner().invoke(cli, ["report", *map(str, words)])


@pytest.mark.parametrize("other", ["--out", "--open", "--force"])
def test_an_option_that_json_leaves_idle_is_refused(other: str, kept: Path) -> None:
    words = [other, "x.html"] if other == "--out" else [other]
    result = report(kept, "--json", *words)
    assert isinstance(result.exception, UserError) and "--json writes no page" in result.exception.message
    assert not (kept / PAGE_FILE).exists()


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    result = report(tmp_path)
    assert isinstance(result.exception, UserError)
    assert "is not a run of mlxtune (neither config.yaml nor events.jsonl)" in result.exception.message
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_replaced_and_what_is_none_only_when_asked(kept: Path, tmp_path: Path) -> None:
    assert report(kept).exit_code == 0 and is_page(kept / PAGE_FILE)
    first = (kept / PAGE_FILE).read_bytes()
    pages.append(kept, pages.begun(9) | {"step": 6}, pages.event(7))
    assert report(kept).exit_code == 0 and (kept / PAGE_FILE).read_bytes() != first
    theirs = tmp_path / "theirs.html"
    theirs.write_text("<html>theirs</html>")
    result = report(kept, "--out", theirs)
    assert isinstance(result.exception, UserError) and "add --force" in result.exception.hint
    assert theirs.read_text() == "<html>theirs</html>"
    assert report(kept, "--out", theirs, "--force").exit_code == 0 and is_page(theirs)


@pytest.mark.parametrize("name", ["config.yaml", "events.jsonl"])
def test_a_page_never_takes_the_place_of_what_it_is_made_from(name: str, kept: Path) -> None:
    before = (kept / name).read_bytes()
    result = report(kept, "--out", kept / name, "--force")
    assert isinstance(result.exception, UserError) and "is the source itself" in result.exception.message
    assert (kept / name).read_bytes() == before


def test_a_link_in_the_pages_place_is_not_followed(kept: Path, tmp_path: Path) -> None:
    page = write_page(read_run(kept), tmp_path / "page.html")
    before = page.read_bytes()
    (kept / PAGE_FILE).symlink_to(page)
    result = report(kept)
    assert isinstance(result.exception, UserError) and page.read_bytes() == before
    assert report(kept, "--force").exit_code == 0
    assert page.read_bytes() == before and not (kept / PAGE_FILE).is_symlink()


@pytest.mark.parametrize(("status", "said"), [(0, ""), (1, "no browser could be opened")])
def test_the_page_is_opened_where_there_is_a_browser(
    status: int, said: str, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(click, "launch", lambda place: opened.append(place) or status)
    result = report(kept, "--open")
    assert result.exit_code == 0 and opened == [(kept / PAGE_FILE).resolve().as_uri()]
    assert said in result.stderr and bool(result.stderr) == bool(said)


# The page beside a run in progress, driven by its events.


def happening(run: Path, *events: dict[str, Any], when: str, error: BaseException | None = None) -> list[bool]:
    """Whether the page was there after each event of a run."""
    heard: list[Any] = []
    there: list[bool] = []
    display = contextlib.nullcontext(heard.append)
    with contextlib.suppress(Interrupted, UserError), run_page.with_page(display, run, when) as listener:
        for event in events:
            pages.append(run, event)
            listener(event)
            there.append((run / PAGE_FILE).exists())
        if error is not None:
            raise error
    assert heard == list(events)
    return there


BEGUN, STEP, EVALUATED = pages.begun(2), pages.event(1), pages.evaluated(1, 1.0)


@pytest.mark.parametrize(
    ("when", "during", "after"), [("end", False, True), ("evaluations", True, True), ("off", False, False)]
)
@pytest.mark.parametrize("error", [None, Interrupted("stopped", 130), UserError("the loss is not finite")])
def test_the_page_is_written_when_the_setting_says_so_however_the_run_ends(
    when: str, during: bool, after: bool, error: BaseException | None, tmp_path: Path
) -> None:
    run = pages.write(tmp_path / "run", [])
    assert happening(run, BEGUN, STEP, EVALUATED, when=when, error=error) == [False, False, during]
    assert (run / PAGE_FILE).exists() == after


def test_pages_of_a_run_read_only_what_is_new_and_take_a_small_share_of_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page takes one second here, and an evaluation comes each second."""
    now, made = 0.0, list[tuple[float, Any]]()

    def refresh(run: Path, following: Any) -> None:
        nonlocal now
        made.append((now, following))
        now += 1

    monkeypatch.setattr(run_page, "refresh_page", refresh)
    display = contextlib.nullcontext(lambda event: None)
    with run_page.with_page(display, tmp_path, "evaluations", lambda: now) as listener:
        listener(BEGUN)
        while now < 50:
            listener(EVALUATED)
            now += 1
    assert [when for when, _ in made] == [0, 2, 22, 42, 50]  # the first may have read the data; the last is at the end
    assert len({following for _, following in made}) == 1


def test_no_page_is_written_into_a_folder_where_no_run_began(kept: Path) -> None:
    """A command that was refused leaves another's run as it is."""
    doing = {"kind": "doing", "what": "reading"}
    happening(kept, doing, when="evaluations", error=UserError("it already exists"))
    assert not (kept / PAGE_FILE).exists()


def test_a_run_that_saved_nothing_and_took_its_folder_away_gets_no_page(tmp_path: Path) -> None:
    run = pages.write(tmp_path / "run", [])
    with run_page.with_page(contextlib.nullcontext(lambda event: None), run, "end") as listener:
        listener(BEGUN)
        shutil.rmtree(run)
    assert not run.exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError(28, "No space left"), "No space left"), (ZeroDivisionError("x"), "ZeroDivisionError: x")],
)
def test_a_page_that_cannot_be_written_is_a_note_and_never_ends_the_run(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: Any, **more: Any) -> str:
        raise error

    monkeypatch.setattr(written, "of_run", fail)
    run = pages.write(tmp_path / "run", [])
    assert happening(run, BEGUN, STEP, EVALUATED, when="evaluations") == [False, False, False]
    told = capsys.readouterr().err
    assert told.count("note: the page of the run could not be written") == 2 and said in told


def test_a_page_is_a_file_of_the_run(tmp_path: Path) -> None:
    """One that was killed before it saved anything leaves its page too: a new run may take the folder, and one that
    ends so removes it; a link in its place is refused.
    """
    folder = RunFolder(pages.write(tmp_path / "run", [BEGUN]))
    folder.lock.write_text(f"{MARK} 1\n")
    write_page(read_run(folder.path))
    assert folder.may_begin() and folder.strangers() == []
    folder.remove_unfinished()
    assert not folder.path.exists()
    pages.write(folder.path, [BEGUN])
    (folder.path / PAGE_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        folder.refuse_links()


def test_train_obeys_the_setting(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    words = ("train", "--model", mlx_model, "--data", data, "--set", "train.steps=1", "--set", "lora.rank=1")
    tiny.done(*words, "--out", tmp_path / "run", "--set", "train.report=off")
    assert not (tmp_path / "run" / PAGE_FILE).exists()


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lines are as long as they are."""
    monkeypatch.setenv("COLUMNS", "400")
    yield

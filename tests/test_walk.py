"""The shortest page of docs/ that a script walks through (tests/walk.py) is walked here."""

from __future__ import annotations

from pathlib import Path

import commands
import pytest
import walk
from commands import DOCS, Line


def test_a_reader_of_the_page_on_making_data_gets_from_seeds_to_an_evaluated_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = list(walk.walk("making"))
    assert [step.line for step in steps if step.ended and not step.ended.well] == []
    assert sum(step.ended is not None for step in steps) == 7
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "evals/made/answers.jsonl").is_file()


def test_every_line_that_is_left_out_says_on_its_page_what_it_needs() -> None:
    for page in commands.WALKED:
        for step in commands.steps(DOCS / f"{page}.md"):
            if isinstance(step, Line):
                assert step.needs or step.command.startswith(("mlxtune ", "mlxtune-convert ", "cd ")), step

"""The border between answers that their question explains and others, and what curation makes of it."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from rich.console import Console
from test_curate import candidate, row

from mlxtune.cli import curate as command
from mlxtune.data.dataset import duplicates
from mlxtune.data.rows.formats import Record
from mlxtune.make.curation.candidates import Candidate
from mlxtune.make.curation.choosing import REASONS, Wanted
from mlxtune.make.curation.curate import Curation
from mlxtune.make.curation.losses import Losses
from mlxtune.make.curation.scores_file import ScoresFile
from mlxtune.make.curation.strangers import border, strangers

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "jetty"]


def losses(ifd: float) -> Losses:
    return Losses(behind=ifd * 2, alone=2.0, tokens=5, row_tokens=9)


class ByWords:
    """In the place of a Scorer: a question explains an answer that has its first word, some of them less well."""

    def losses(self, records: Sequence[Record], done: Callable[[Any, Any], None]) -> None:
        found = []
        for number, record in enumerate(records):
            asked, said = (record.messages or [])[0]["content"], (record.messages or [])[-1]["content"]
            fits = asked.split()[0] == said.split()[0]
            found.append(losses((0.3 if fits else 0.8) + self.more(f"{asked} {said}", number)))
        done(records, found)

    def more(self, text: str, number: int) -> float:
        return number % 10 / 100


class ByContent(ByWords):
    """The same, but a row has one score wherever it stands."""

    def more(self, text: str, number: int) -> float:
        return zlib.crc32(text.encode()) % 1000 / 10_000


def by_words() -> Any:
    return ByWords()


def mixed_rows(count: int) -> list[dict[str, Any]]:
    """Every second row has the answer of another row."""
    rows = []
    for number in range(count):
        name = f"{WORDS[number % 10]}{number}"
        right = f"{name} is what it is called"
        wrong = f"other{number} is what that one is called"
        rows.append(row(f"{name} lies where, and what of {number} and {number * 7}?", wrong if number % 2 else right))
    return rows


def test_a_stranger_has_the_answer_of_one_row_and_the_question_of_another() -> None:
    some = [candidate(n, answer=f"Answer {n}.") for n in range(30)]
    made = strangers(some)
    assert len(made) == 30 and [one.key for one in made] == [one.key for one in strangers(some)]
    answer_of = {one.question: one.answer for one in some}
    for one in made:
        assert one.question in answer_of and one.answer in answer_of.values() and answer_of[one.question] != one.answer
    assert len({one.key for one in made} | {one.key for one in some}) == 60
    assert len(strangers([candidate(n, answer=f"Answer {n}.") for n in range(900)])) == 200


class ByLabels:
    """In the place of a Scorer: knows the label that is right for a number, and finds the other one unlikely."""

    def losses(self, records: Sequence[Record], done: Callable[[Any, Any], None]) -> None:
        chance, found = random.Random(1), []
        for record in records:
            asked, said = (record.messages or [])[0]["content"], (record.messages or [])[-1]["content"]
            right = said.strip() == ("negative" if int(asked.split()[0]) % 2 else "positive")
            found.append(losses((0.2 if right else 1.2) + 0.4 * chance.random()))
        done(records, found)


def test_of_rows_with_few_different_answers_the_right_answer_of_another_row_is_no_stranger(tmp_path: Path) -> None:
    rows = [row(f"{n} of a mood?", label(n)) for n in range(600)]
    curation = Curation.of([tiny.write_jsonl(tmp_path / "a.jsonl", rows)], {})
    scorer: Any = ByLabels()
    curation.score(scorer, ScoresFile(tmp_path / "scores.jsonl", {}), lambda *_: None)
    assert curation.border == 1.0
    made = strangers(curation.candidates)
    assert len(made) == 200  # though every second pair has one answer
    keys = {one.key for one in made}
    assert len(keys) == 200 and keys.isdisjoint(one.key for one in curation.candidates)


def label(number: int) -> str:
    """Of an even number "positive", with a blank behind it here and there."""
    return ("negative" if number % 2 else "positive") + " " * (number % 3 == 0)


def test_a_row_that_the_candidates_have_is_no_stranger_and_too_few_are_none() -> None:
    every = [candidate(n, question=f"Name {n // 5}?", answer=f"Name {n % 5}.") for n in range(25)]
    same = [Candidate(one.record, f"{duplicates.content_hash(one.record):016x}", one.kind) for one in every]
    assert strangers(same) == []  # each question has each answer
    assert strangers([candidate(n, answer="I cannot say.") for n in range(100)]) == []
    assert len(strangers([candidate(n, answer=f"So {n // 90}.") for n in range(100)])) >= 20


def test_where_few_rows_or_one_question_tell_nothing_there_is_no_border() -> None:
    assert strangers([candidate(n) for n in range(19)]) == []
    assert strangers([candidate(n, question="Tell a story.", answer=f"Once {n}.") for n in range(40)]) == []
    assert border([losses(0.5)] * 19) is None and border([*[losses(0.5)] * 19, None]) is None


def test_the_border_is_what_ninety_nine_strangers_in_a_hundred_are_above() -> None:
    scores = np.random.default_rng(0).uniform(0.6, 0.9, 200)
    found = border([losses(float(score)) for score in scores])
    assert found is not None and (scores > found).sum() == 198
    assert border([losses(1.4)] * 30) == 1.0  # an answer that no question makes likelier is never explained


@pytest.mark.parametrize(("keep", "spoiled"), [(20, 0), (40, 10)])
def test_rows_that_their_question_explains_come_first_and_others_only_where_these_are_not_enough(
    tmp_path: Path, keep: int, spoiled: int
) -> None:
    file, scores = tiny.write_jsonl(tmp_path / "a.jsonl", mixed_rows(60)), tmp_path / "scores.jsonl"
    curation = Curation.of([file], {})
    told: list[tuple[int, int]] = []
    curation.score(by_words(), ScoresFile(scores, {}), lambda done, every: told.append((done, every)))
    assert told[-1] == (120, 120) and curation.border is not None and 0.75 < curation.border < 0.85
    wanted = Wanted(keep, most_alike=1.0)
    chosen = curation.chosen(wanted, lambda one: one)
    assert len(chosen.kept) == keep and sum(one.answer.startswith("other") for one in chosen.kept) == spoiled
    report = curation.report(chosen, wanted)
    said = f"{spoiled} of the rows are explained no better by their own question"
    assert report["border"] == curation.border
    assert any(said in note for note in report["notes"]) == bool(spoiled)
    again = Curation.of([file], {})
    again.score(by_words(), ScoresFile(scores, {}), lambda *_: None)
    assert again.border == curation.border and "60 rows were scored before" in again.notes[0]


def test_of_rows_that_are_explained_neither_the_easiest_nor_the_first_of_the_file_are_preferred(
    tmp_path: Path,
) -> None:
    rows = [row(f"{WORDS[n % 10]}{n} is where, {n * 3} or {n * 5}?", f"{WORDS[n % 10]}{n} is here") for n in range(200)]
    curation = Curation.of([tiny.write_jsonl(tmp_path / "a.jsonl", rows)], {})
    curation.losses = {one.key: losses(0.2 + place / 1000) for place, one in enumerate(curation.candidates)}
    curation.border = 0.9
    chosen = curation.chosen(Wanted(100, most_alike=1.0), lambda one: one)
    places = sorted(one.record.row for one in chosen.kept)
    assert len(places) == 100
    in_first_half = sum(place <= 100 for place in places)
    assert 30 <= in_first_half <= 70  # 50 by chance; 100 of the easiest or of the file's first


def test_the_order_of_the_files_changes_neither_the_border_nor_the_choice(tmp_path: Path) -> None:
    rows = mixed_rows(300)
    files = [tiny.write_jsonl(tmp_path / name, some) for name, some in (("a.jsonl", rows[:80]), ("b.jsonl", rows[80:]))]
    borders, kept = [], []
    scorer: Any = ByContent()
    for number, some in enumerate((files, files[::-1])):
        curation = Curation.of(some, {})
        curation.score(scorer, ScoresFile(tmp_path / f"scores{number}.jsonl", {}), lambda *_: None)
        borders.append((curation.border, {one.key for one in strangers(curation.candidates)}))
        kept.append({one.key for one in curation.chosen(Wanted(70, most_alike=1.0), lambda one: one).kept})
    assert borders[0] == borders[1] and borders[0][0] is not None
    assert len(kept[0]) == 70 and kept[0] == kept[1]


def test_without_a_border_less_ifd_is_better_and_the_report_says_why(tmp_path: Path) -> None:
    rows = [row(f"{WORDS[n]}{n} is where, {n * 3} or {n * 5}?", f"{WORDS[n]}{n} is here") for n in range(10)]
    curation = Curation.of([tiny.write_jsonl(tmp_path / "a.jsonl", rows)], {})
    curation.score(by_words(), ScoresFile(tmp_path / "scores.jsonl", {}), lambda *_: None)
    curation.losses = {one.key: losses(0.9 - place / 20) for place, one in enumerate(curation.candidates)}
    wanted = Wanted(4, most_alike=1.0)
    chosen = curation.chosen(wanted, lambda one: one)
    assert {one.record.row for one in chosen.kept} == {7, 8, 9, 10}
    said = "IFD orders the rows, the smallest first: fewer than 20 of them have a score with another row's answer"
    report = curation.report(chosen, wanted)
    assert report["border"] is None and any(note.startswith(said) for note in report["notes"])
    assert "border of sound rows" not in drawn(report)
    curation.ratings = dict.fromkeys(curation.losses, 3.0)
    assert not any(note.startswith("IFD orders") for note in curation.report(chosen, wanted)["notes"])
    curation.border = 0.8765
    report = curation.report(chosen, wanted)
    assert any(line.split() == ["IFD:", "border", "of", "sound", "rows", "0.88"] for line in drawn(report).splitlines())
    assert not any(note.startswith("IFD orders") for note in report["notes"])


def drawn(report: dict[str, Any]) -> str:
    out = Console(width=120)
    with out.capture() as captured:
        command._draw(out, report)
    return captured.get()


def test_rows_that_are_as_good_as_each_other_are_not_called_worse(tmp_path: Path) -> None:
    """Of 20 questions asked twice one row each is kept, some of them from below the bar."""
    rows = [row(f"{WORDS[n % 10]}{n % 20} is where, {n % 20 * 3}?", f"{WORDS[n % 10]} is here, {n}") for n in range(40)]
    curation = Curation.of([tiny.write_jsonl(tmp_path / "a.jsonl", rows)], {})
    chance = random.Random(0)
    curation.losses = {one.key: losses(chance.uniform(0.2, 0.6)) for one in curation.candidates}
    wanted = Wanted(20, most_alike=0.99)

    def notes() -> str:
        chosen = curation.chosen(wanted, lambda one: one)
        assert len(chosen.kept) == 20 and chosen.below
        return "\n".join(curation.report(chosen, wanted)["notes"])

    curation.border = 0.9
    assert "worse ones" not in notes()
    assert "as good or better" in REASONS["lower"] and "less good" not in REASONS["lower"]
    curation.border = 0.3
    assert "worse ones" in notes() and "explained no better" in notes()
    curation.border = None
    assert "worse ones" in notes()
    curation.border = 0.9
    curation.ratings = {one.key: chance.uniform(1, 5) for one in curation.candidates}
    assert "worse ones" in notes()


def test_a_fault_makes_a_row_worse_though_its_question_explains_it(tmp_path: Path) -> None:
    cut = "It is so because of the following thing that is said here and it goes on and on " * 3 + "and"
    rows = [
        row(f"{WORDS[n % 10]}{n} is where, {n * 3}?", f"{n}: {cut}" if n < 15 else f"{n} is here") for n in range(20)
    ]
    curation = Curation.of([tiny.write_jsonl(tmp_path / "a.jsonl", rows)], {})
    curation.losses = {one.key: losses(0.2 + place / 100) for place, one in enumerate(curation.candidates)}
    curation.border = 0.9
    wanted = Wanted(10, most_alike=1.0)
    chosen = curation.chosen(wanted, lambda one: one)
    worse = sum(one.record.row <= 15 and one.key in chosen.below for one in chosen.kept)
    assert worse and any(
        note.startswith(f"{worse} of the rows are among the worse") for note in curation.report(chosen, wanted)["notes"]
    )

"""The border between answers that their question explains and others, and what curation makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_curate import candidate, row

from mlxtune.data.rows.formats import Record
from mlxtune.make.curation.choosing import Wanted
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
            found.append(losses((0.3 if fits else 0.8) + number % 10 / 100))
        done(records, found)


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

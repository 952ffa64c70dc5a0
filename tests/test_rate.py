"""mlxtune rate: a person compares answers blindly, stops and goes on, and is compared with the judge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import evaluations
import pytest
import terminal
import tiny
from evaluations import YES

from mlxtune.cli.rate import ranks, rated
from mlxtune.errors import UserError
from mlxtune.evaluate.comparison.folder import Evaluation
from mlxtune.evaluate.judging.people import Contest, Ratings
from mlxtune.evaluate.judging.ratings_report import report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight prompts; the last one's answers are the same."""
    tuned = [f"yes {n}" for n in range(7)] + ["no"]
    return evaluations.write(tmp_path / "first", evaluations.rows(8, (YES,)), ["no"], tuned)


def contest(*folders: Path) -> Contest:
    return Contest.of([Evaluation.read(folder) for folder in folders])


def result(*words: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tiny.done("rate", *words, "--result", "--json").stdout)
    return found


def rate(*words: str | Path, typed: str) -> str:
    """What the command shows to somebody who types these lines."""
    process = tiny.started("rate", *words)
    shown, said = process.communicate(typed)
    assert process.returncode == 0, said
    return shown


def test_a_person_decides_stops_and_goes_on(folder: Path) -> None:
    asked = contest(folder)
    first, second = Ratings(asked, "me", likert=False).asked()[:2]
    shown = rate(folder, typed="x\n1\n2\nu\nq\n")  # a slip, and a decision that is taken back
    assert "x: not one of these" in shown and "1 of 7 done. The same command goes on." in shown
    assert "base" not in shown and "tuned" not in shown
    lines = [json.loads(line) for line in (folder / "ratings.me.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [first.id, second.id, second.id]
    winner = asked.shown(first)[0]
    assert lines[0]["ranks"][winner] == 1 and lines[0]["ranks"][1 - winner] == 2
    assert lines[2] == {"id": second.id, "of": asked.keys, "undone": True}
    rest = rate(folder, typed="u\n" + "0\n" * 5 + "s\n")
    assert "There is nothing to take back." in rest and "2 of 7" in rest
    assert "7 of 8 rated, 1 skipped." in rest and "tuned against base: " in rest
    assert "1 of 7 done" in rate(folder, "--rater", "anna", typed="1\n")  # the end of what is typed is a stop


def test_a_torn_line_and_ratings_of_other_answers_do_not_count(folder: Path) -> None:
    ratings = Ratings(contest(folder), "me", likert=False)
    for prompt in ratings.open_prompts()[:3]:
        ratings.decide(prompt.id, [2, 1])
    with ratings.file.open("a") as file:
        file.write('{"id": "r1", "of": ["a", "b"], "ranks": [1, 2]}\n{"id": "r2", "of"')
    again = Ratings(contest(folder), "me", likert=False)
    assert (len(again.open_prompts()), again.others) == (4, 1)
    again.decide(again.open_prompts()[0].id, [1, 2])
    assert len(Ratings(contest(folder), "me", likert=False).open_prompts()) == 3
    assert "1 ratings are of other answers" in tiny.done("rate", folder, "--result").stderr
    with ratings.file.open("a") as file:
        file.write(json.dumps({"id": "r1", "of": ratings.contest.keys, "ranks": [1]}) + "\n")
    tiny.one_clear_line(tiny.mlxtune("rate", folder, "--result"), "ratings.me.jsonl line 7: not a rating")


def test_the_order_is_by_chance_the_same_each_time_and_even(tmp_path: Path) -> None:
    many = evaluations.write(tmp_path / "many", evaluations.rows(400, (YES,)), ["no"], ["yes"])
    asked, again = contest(many), contest(many)
    orders = [asked.shown(prompt) for prompt in asked.prompts]
    assert orders == [again.shown(prompt) for prompt in again.prompts]
    assert 160 < sum(order == [1, 0] for order in orders) < 240
    assert [prompt.id for prompt in asked.prompts[:20]] != [f"r{n}" for n in range(1, 21)]


def test_the_result_is_the_sign_test_and_agreement_with_judge_and_raters_is_kappa(folder: Path) -> None:
    mine, annas = (Ratings(contest(folder), rater, likert=False) for rater in ("me", "anna"))
    for number in range(1, 8):
        mine.decide(f"r{number}", [2, 1])  # the tuned answer is the best
        annas.decide(f"r{number}", [2, 1] if number < 5 else [1, 2])
    outcomes = [*["win"] * 5, "loss", "tie", "tie"]
    lines = [{"id": f"r{n}", "sample": 0, "outcome": outcome} for n, outcome in enumerate(outcomes, 1)]
    tiny.write_jsonl(folder / "verdicts.jsonl", lines)
    found = result(folder)
    assert (found["wins"], found["ties"], found["losses"], found["left"]) == (7, 1, 0, 0)
    assert (found["p"], found["verdict"], found["win_rate"]) == (2 / 2**7, "better", 7.5 / 8)
    by_name = {one["with"]: one for one in found["agreement"]}
    # With the judge: 6 of 8 agree; by chance 7/8 * 5/8 + 1/8 * 2/8 = 37/64.
    assert by_name["the judge"]["agreed"] == 6
    assert by_name["the judge"]["kappa"] == pytest.approx((6 / 8 - 37 / 64) / (1 - 37 / 64))
    assert (by_name["anna"]["agreed"], by_name["anna"]["prompts"]) == (5, 8)
    summary = json.loads((folder / "summary.json").read_text())
    failed = {**summary, "judge": {"judge": "j", "exam": {"passed": False}}}  # whose verdicts are there by --anyway
    (folder / "summary.json").write_text(json.dumps(failed))
    assert [one["with"] for one in result(folder)["agreement"]] == ["the judge, which failed its exam", "anna"]
    (folder / "summary.json").write_text(json.dumps(summary))
    said = tiny.done("rate", folder, "--result").stdout
    assert "tuned against base: 7 wins, 1 ties, 0 losses" in said and "agrees with the judge on 6 of 8 prompts" in said


def test_the_judge_of_one_evaluation_is_compared_with_ratings_of_that_one_alone(folder: Path, tmp_path: Path) -> None:
    """`rate first other`, where other asked the base alone: what was tuned against a base that the judge never saw."""
    other = evaluations.write(tmp_path / "other", evaluations.rows(8, (YES,)), ["never"])
    for judged in (folder, other):
        tiny.write_jsonl(judged / "verdicts.jsonl", [{"id": "r1", "sample": 0, "outcome": "win"}])
    for folders, with_judge in (((folder,), True), ((folder, other), False), ((other, folder), False)):
        ratings = Ratings(contest(*folders), "me", likert=False)
        for prompt in ratings.open_prompts():
            ratings.decide(prompt.id, [2, 1])
        found = report(ratings, "me")
        assert [one["with"] for one in found["agreement"]] == (["the judge"] if with_judge else [])


def test_ratings_of_prompts_of_one_group_count_as_one(tmp_path: Path) -> None:
    suite = evaluations.rows(8, (YES,), list("aaaabbbb"))
    ratings = Ratings(contest(evaluations.write(tmp_path / "grouped", suite, ["no"], ["yes"])), "me", likert=False)
    for prompt in ratings.open_prompts():
        ratings.decide(prompt.id, [2, 1])
    found = report(ratings, "me")
    assert (found["wins"], found["p"], found["verdict"]) == (8, 2 / 2**2, "no difference shown")
    assert "(sign flips of groups, p 0.5000)" in tiny.done("rate", tmp_path / "grouped", "--result").stdout


def test_likert_ratings_are_a_paired_difference(folder: Path) -> None:
    ratings = Ratings(contest(folder), "me", likert=True)
    assert len(ratings.open_prompts()) == 8  # equal answers have a rating too
    for number in range(1, 9):
        ratings.decide(f"r{number}", [2, 4 if number < 8 else 2])
    found = result(folder, "--likert")
    assert (found["means"], found["difference"], found["p"]) == ([2.0, 3.75], 1.75, 2 / 2**7)
    assert found["verdict"] == "better" and found["kind"] == "likert"
    shown = rate(folder, "--likert", "--rater", "anna", typed="15\nq\n")
    assert "1 (bad) to 5 (good) for each answer, as in 43" in shown and "1 of 8 done" in shown


def test_that_of_several_answers_the_first_alone_is_rated_is_said(folder: Path) -> None:
    assert "the first one alone" not in tiny.done("rate", folder, "--result").stderr
    lines = (folder / "answers.jsonl").read_text()
    (folder / "answers.jsonl").write_text(lines + lines.splitlines()[0].replace('"sample": 0', '"sample": 1') + "\n")
    said = tiny.done("rate", folder, "--result").stderr
    assert "prompts have up to 2 answers each: the first one alone is rated" in said


def test_three_evaluations_are_ranked(folder: Path, tmp_path: Path) -> None:
    suite = evaluations.rows(8, (YES,))
    others = [evaluations.write(tmp_path / name, suite, [f"{name} yes"]) for name in ("second", "third")]
    asked = contest(folder, *others)
    first = asked.prompts[0]
    rate(folder, *others, typed="2=13\nq\n")
    (line,) = [json.loads(line) for line in (folder / "ratings.me.jsonl").read_text().splitlines()]
    order = asked.shown(first)
    assert [line["ranks"][place] for place in order] == [1, 1, 3]
    ratings = Ratings(asked, "anna", likert=False)
    for prompt in ratings.open_prompts():
        ratings.decide(prompt.id, [3, 1, 2])
    found = report(ratings, "anna")
    assert [entry["wins"] for entry in found["ranking"]] == [0, 16, 8] and found["agreement"] == []
    # The same folders in another order are the same contest.
    turned = Ratings(contest(others[1], others[0], folder), "anna", likert=False)
    shutil.copy(ratings.file, turned.file)
    assert set(map(tuple, Ratings(turned.contest, "anna", likert=False).values().values())) == {(2, 1, 3)}


def test_what_is_typed_is_read_strictly() -> None:
    assert [ranks(said, 2) for said in ("1", "2", "0", "21", "1=2", "3", "", "12 ")] == [
        *("12", "21", "11", "21", "11", "", "", "12"),
    ]
    assert [ranks(said, 3) for said in ("213", "2=13", "2, 1=3", "1=2=3", "21", "2113", "0")] == [
        *("213", "113", "212", "111", "", "", ""),
    ]
    assert [rated(said, 2) for said in ("15", "5 1", "6 1", "1", "111", "a1")] == ["15", "51", "", "", "", ""]


def test_texts_of_answers_command_no_terminal_and_long_ones_are_cut(tmp_path: Path) -> None:
    suite = evaluations.rows(1, (YES,))
    suite[0].messages[0]["content"] = "\x1b]0;evil\x07 why?"
    harmful = evaluations.write(tmp_path / "harmful", suite, ["\x1b[2J" + "x" * 5000], ["\x9b31m \u202e yes"])
    shown = terminal.shows("rate", harmful, typed=[("neither", "q\r")])
    assert terminal.obeyed(shown) == [] and "1,004 more characters" in shown and "\\x1b" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--json",), "--json has no effect without --result"),
        (("--rater", "a/b"), "--rater a/b: a name of letters"),
        (("FOLDER",), "the same answers are named twice"),
        (("ALONE",), "has answers of one side alone"),
        (("OTHER", "FOLDER"), "evaluations of different suites"),
        (("FOLDER",) * 10, "are too many to rank at once"),
    ],
)
def test_what_cannot_be_rated_is_one_clear_line(words: tuple[str, ...], message: str, folder: Path) -> None:
    suite = evaluations.rows(8, (YES,))
    alone = evaluations.write(folder.parent / "alone", suite, ["yes"])
    other = evaluations.write(folder.parent / "other", suite, ["no"], ["yes"], suite={"digest": "0ther"})
    places = {"FOLDER": folder, "ALONE": alone, "OTHER": other}
    named = [places.get(word, word) for word in words]
    begin = [] if "ALONE" in words else [folder]
    tiny.one_clear_line(tiny.mlxtune("rate", *begin, *named), message)


def test_a_rating_needs_a_prompt_that_all_have(folder: Path, tmp_path: Path) -> None:
    suite = evaluations.rows(9, (YES,))[8:]
    with pytest.raises(UserError, match="no prompt is answered in all"):
        contest(folder, evaluations.write(tmp_path / "ninth", suite, ["yes"]))

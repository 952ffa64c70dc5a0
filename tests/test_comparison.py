"""Evaluations: what they show, how they are kept, and `mlxtune compare` of saved ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import evaluations
import pytest
import terminal
import tiny
from evaluations import SHORT, YES

from mlxtune.evaluate.checks.check import Check, Rule, SuiteRow
from mlxtune.evaluate.comparison.folder import Evaluation
from mlxtune.evaluate.comparison.overlap import overlap_notes
from mlxtune.evaluate.comparison.scores import PromptScores, score_answers
from mlxtune.evaluate.comparison.summary import check_results, document, what_can_be_shown
from mlxtune.evaluate.engines.request import Answer
from mlxtune.evaluate.statistics.power import smallest_difference
from mlxtune.evaluate.statistics.proportions import wilson

KEYS = {"base", "tuned", "difference", "interval", "p", "verdict"}  # of a check, as scripts rely on them


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 prompts: no base answer passes, 18 tuned ones do."""
    folder = tmp_path_factory.mktemp("evals") / "first"
    return evaluations.write(folder, evaluations.rows(24, (YES, SHORT)), ["no"], ["yes", "yes", "yes", "never"])


def compared(*words: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tiny.done("compare", *words, "--json").stdout)
    return found


def test_the_document_holds_what_the_folder_was_made_of(first: Path) -> None:
    summary = Evaluation.read(first).summary
    assert (summary["n"], summary["smallest_difference"]) == (24, 0.265)
    contains, short = summary["checks"]["contains"], summary["checks"]["short"]
    assert contains.keys() >= KEYS and short.keys() >= KEYS
    assert (contains["base"], contains["tuned"], contains["difference"]) == (0.0, 0.75, 0.75)
    assert contains["verdict"] == "better" and contains["p_alone"] == 0.5**18  # 18 coins of 18, by half
    half = 1.959964 * ((20 / 26 - (18 / 26) ** 2) / 26) ** 0.5  # Bonett-Price: 19 better, 1 worse, of 26
    assert contains["interval"] == pytest.approx([18 / 26 - half, 18 / 26 + half], abs=1e-6)
    assert short["base"] == pytest.approx(1 / 3) and short["tuned"] == pytest.approx(0.75 / 4 + 0.25 / 6)
    assert short["verdict"] == "worse"


def test_verdicts_are_by_the_corrected_p_alone() -> None:
    """Six prompts of one check better, none worse: p is 0.016, and 0.08 among five checks."""

    def scores(checks: int) -> list[PromptScores]:
        better = [PromptScores(f"r{place}", "a", False, None, [0.0], [1.0]) for place in range(6)]
        others = [
            PromptScores(f"r{place}", f"other-{check}", False, None, [1.0], [1.0])
            for check in range(checks - 1)
            for place in range(6)
        ]
        return better + others

    alone, among = check_results(scores(1))["a"], check_results(scores(5))["a"]
    assert (alone["p"], alone["verdict"]) == (0.5**6, "better")
    assert (among["p"], among["verdict"], among["p_alone"]) == (5 * 0.5**6, "no difference shown", 0.5**6)
    assert among["interval"] == alone["interval"]


def test_the_sentence_says_what_so_many_prompts_and_checks_can_show() -> None:
    three = {"n": 24, "groups": 24, "checks": {"a": {}, "b": {}, "c": {}}}
    assert "24 prompts show differences of a check from 26.5 points on (in 80% of such" in what_can_be_shown(three)
    assert "of 3 checks at once, one alone from 3" in what_can_be_shown(three)
    assert "4 prompts cannot show any difference" in what_can_be_shown({"n": 4, "groups": 4, "checks": {"a": {}}})
    assert "1 prompt cannot" in what_can_be_shown({"n": 1, "groups": 1, "checks": {"a": {}}})
    assert "48 prompts in 24 groups show differences of a check from 26.5" in what_can_be_shown({**three, "n": 48})
    assert "48 prompts in 1 group cannot" in what_can_be_shown({"n": 48, "groups": 1, "checks": {"a": {}}})


def test_a_check_that_does_not_apply_to_a_prompt_counts_on_neither_side() -> None:
    def judged(answer: Answer, row: SuiteRow) -> float | None:
        return None if row.id == "r1" or answer.text == "?" else float(answer.text == "yes")

    suite = evaluations.rows(4, (Check("odd", Rule(judged)),))
    base = evaluations.answers(suite, ["yes", "?", "no", "no"])  # r2 has no score on this side
    tuned = [*evaluations.answers(suite, ["yes"]), Answer("r3", 1, "no", "", "stop", 1)]  # r3 was answered twice
    found = score_answers(suite, {"base": base, "tuned": tuned})
    assert [(one.id, one.base, one.tuned) for one in found] == [("r3", [0.0], [1.0, 0.0]), ("r4", [0.0], [1.0])]
    assert check_results(found)["odd"]["difference"] == 0.75


def test_one_side_alone_gets_an_interval_and_no_verdict() -> None:
    suite = evaluations.rows(10, (YES, SHORT))
    result = document(10, score_answers(suite, {"base": evaluations.answers(suite, ["yes", "no"])}), {})
    assert result["checks"]["contains"]["interval"] == pytest.approx([0.2366, 0.7634], abs=1e-4)  # Wilson, 5 of 10
    assert not {"verdict", "p", "tuned"} & result["checks"]["contains"].keys()
    low, high = result["checks"]["short"]["interval"]
    assert low <= 0.5 * (1 / 4 + 1 / 3) <= high


def test_prompts_in_groups_can_show_as_much_as_there_are_groups(tmp_path: Path) -> None:
    """48 prompts in 24 groups; a check that half of them have says what it can show itself."""

    def on_half(answer: Answer, row: SuiteRow) -> float | None:
        return YES.score(answer, row) if int(row.id[1:]) <= 24 else None

    suite = evaluations.rows(48, (YES, Check("half", Rule(on_half))), [f"g{n // 2}" for n in range(48)])
    folder = evaluations.write(tmp_path / "grouped", suite, ["no"], ["yes", "yes", "yes", "never"])
    summary = Evaluation.read(folder).summary
    assert (summary["n"], summary["groups"], summary["smallest_difference"]) == (48, 24, 0.265)
    half = summary["checks"]["half"]
    assert (half["n"], half["smallest_difference"]) == (24, smallest_difference(12))
    alone = check_results(score_answers(suite, {"base": evaluations.answers(suite, ["yes"])}))
    assert alone["contains"]["interval"] == pytest.approx(wilson(24, 24)) and alone["contains"]["n"] == 48
    shutil.copytree(folder, tmp_path / "copy")
    table = tiny.done("compare", folder, tmp_path / "copy").stdout
    assert "48 prompts in 24 groups show differences of a check from 26.5 points on" in table
    lines = {line.split()[0]: line for line in table.splitlines() if line.split()}
    assert "shows from" in lines["check"]
    assert lines["half"].split()[-1] == f"{100 * half['smallest_difference']:.1f}"
    assert lines["contains"].split()[-1] == "26.5"


def test_prompts_that_were_trained_on_or_chose_the_checkpoint_are_named() -> None:
    suite = evaluations.rows(3)
    learned = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " question  2? "},
        {"role": "assistant", "content": "yes"},
    ]
    asked_later = [*learned, {"role": "user", "content": "Question 1?"}, {"role": "assistant", "content": "no"}]
    (trained, chosen) = overlap_notes(suite, [learned, asked_later], [learned])
    assert trained.startswith("1 of 3 prompts were trained on (r2): ")
    assert chosen.startswith("1 of 3 prompts chose the checkpoint (r2): ")
    unanswered = [learned[1], {"role": "user", "content": "Well?"}, {"role": "assistant", "content": "yes"}]
    assert overlap_notes(suite, [unanswered, learned[:2]], []) == []


def test_two_saved_evaluations_are_compared_prompt_by_prompt(first: Path, tmp_path: Path) -> None:
    suite = evaluations.rows(24, (YES, SHORT))
    second = evaluations.write(tmp_path / "second", suite, ["yes"], sampling={"max_tokens": 48})
    result = compared(first, second)
    assert result["checks"]["contains"]["base"] == 0.75  # what was tuned, of the first
    assert result["checks"]["contains"]["tuned"] == 1.0  # the base, where nothing else was asked
    assert result["checks"]["contains"]["p_alone"] == 0.5**6  # prompt by prompt: six are better
    assert [side["name"] for side in result["sides"].values()] == ["first tuned", "second base"]
    assert result["notes"] == [f"max_tokens differs: None in {first}, 48 in {second}"]
    back = compared(second, first)
    assert back["checks"]["contains"]["difference"] == -0.25
    same = tmp_path / "same"
    shutil.copytree(first, same)
    none = compared(first, same)
    assert {check["verdict"] for check in none["checks"].values()} == {"no difference shown"}


def test_the_order_of_the_lines_does_not_matter_and_notes_come_along(first: Path, tmp_path: Path) -> None:
    turned = tmp_path / "turned"
    shutil.copytree(first, turned)
    lines = (first / "scores.jsonl").read_text().splitlines()
    (turned / "scores.jsonl").write_text("\n".join(sorted(lines, reverse=True)[3:]) + "\n")
    summary = json.loads((first / "summary.json").read_text())
    (turned / "summary.json").write_text(json.dumps({**summary, "notes": ["2 of 24 prompts were trained on"]}))
    result = compared(first, turned)
    assert result["checks"]["contains"]["difference"] == 0
    assert result["notes"] == [
        f"{first}: 3 scores have no counterpart, and are left out",
        f"{turned}: 2 of 24 prompts were trained on",
    ]


def test_three_evaluations_are_ranked_by_the_wins_on_each_prompt(tmp_path: Path) -> None:
    suite = evaluations.rows(40, (YES, SHORT))
    bad = evaluations.write(tmp_path / "bad", suite, ["perhaps"])
    good = evaluations.write(tmp_path / "good", suite, ["no"], ["yes", "yes", "yes", "perhaps"])
    best = evaluations.write(tmp_path / "best", suite, ["yes"])
    result = compared(bad, good, best)
    assert [Path(entry["evaluation"]).name for entry in result["ranking"]] == ["best", "good", "bad"]
    entries = {Path(entry["evaluation"]).name: entry for entry in result["ranking"]}
    # best against good: 10 wins and 30 ties; against bad 40 wins.
    assert [entries[name]["wins"] for name in ("best", "good", "bad")] == [65, 50, 5]
    assert entries["good"]["checks"]["contains"] == 0.75
    assert sum(entry["share"] for entry in result["ranking"]) == pytest.approx(1.5)
    assert all(entry["interval"][0] <= entry["share"] <= entry["interval"][1] for entry in result["ranking"])
    table = tiny.done("compare", bad, good, best).stdout
    assert "40 prompts" in table and table.index("best") < table.index("good") < table.index("bad")


def test_evaluations_of_one_base_are_ranked_by_their_judges_verdicts_too(tmp_path: Path) -> None:
    suite = evaluations.rows(20, (YES,))
    judge = {"judge": "j", "rubric": "r", "win_rate": 0.5}
    folders = []
    for name, wins in (("good", 16), ("even", 10), ("bad", 4)):
        folder = evaluations.write(tmp_path / name, suite, ["no"], [f"yes {name}"], judge=judge)
        outcomes = ["win" if number <= wins else "loss" for number in range(1, 21)]
        verdicts = [{"id": f"r{n}", "sample": 0, "outcome": outcome} for n, outcome in enumerate(outcomes, 1)]
        folders.append(tiny.write_jsonl(folder / "verdicts.jsonl", verdicts).parent)
    result = compared(*folders)["by_judge"]
    assert [Path(entry["evaluation"]).name for entry in result][::3] == ["good", "bad"]
    entries = {Path(entry["evaluation"]).name: entry for entry in result}
    assert [entries[name]["wins"] for name in ("good", "base", "even", "bad")] == [16, 30, 10, 4]
    assert entries["base"]["share"] == pytest.approx(0.5)
    assert "By the judge, each compared with the base" in tiny.done("compare", *folders).stdout
    other = evaluations.write(tmp_path / "other", suite, ["never"], ["yes"], judge=judge)  # another base
    tiny.write_jsonl(other / "verdicts.jsonl", [{"id": "r1", "sample": 0, "outcome": "win"}])
    assert compared(*folders[:2], other)["by_judge"] == []


def test_the_table_shows_each_number_and_commands_no_terminal(first: Path, tmp_path: Path) -> None:
    harmful = tmp_path / "ev\x1b[2Jil"
    suite = evaluations.rows(24, (Check("\x1b]52;c;x\x07", YES.rule), SHORT))
    evaluations.write(harmful, suite, ["yes"], notes=["\x1b[31mred"])
    shutil.copytree(harmful, tmp_path / "other")
    text = terminal.shows("compare", harmful, tmp_path / "other")
    assert terminal.obeyed(text) == [] and "no difference shown" in text and "26.5 points" in text
    (tmp_path / "second").mkdir()
    second = evaluations.write(tmp_path / "second" / "b", evaluations.rows(24, (YES, SHORT)), ["yes"])
    lines = tiny.done("compare", first, second).stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("contains")]
    assert line.split()[1:6] == ["24", "75.0%", "100.0%", "+25.0", "+3.7"]  # 6/26 - 1.96 sqrt((8/26 - (6/26)^2) / 26)
    assert line.rstrip().endswith("0.0312  better")  # twice 1/64: there are two checks


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"scores.jsonl": '{"id": "r1", "check": "a", "graded": false}'}, "scores.jsonl line 1: no 'base'"),
        ({"scores.jsonl": '{"id": 1, "check": "a", "graded": false, "base": [1]}'}, "line 1: a value of another kind"),
        ({"scores.jsonl": '{"id": "r1", "check": "a", "base": [NaN], "graded": true}'}, "line 1: a value of another"),
        ({"scores.jsonl": '{"id": "r1"'}, "scores.jsonl line 1: not valid JSON"),
        ({"scores.jsonl": None}, "has no scores.jsonl"),
        ({"summary.json": None}, "has no summary.json"),
        ({"summary.json": '{"n": 2}'}, "it has no checks"),
        ({"summary.json": '{"checks": {}}'}, "does not say which suite"),
        ({"summary.json": '{"checks": {}, "suite": {"digest": "0ther"}}'}, "evaluations of different suites"),
        ({"scores.jsonl": '{"id": "x", "check": "a", "graded": true, "base": [1]}'}, "no prompt has a check in all"),
    ],
)
def test_what_is_no_evaluation_or_one_of_another_suite_is_refused(
    damage: dict[str, str | None], message: str, first: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(first, other)
    for name, text in damage.items():
        (other / name).unlink()
        if text is not None:
            (other / name).write_text(text + "\n")
    tiny.one_clear_line(tiny.mlxtune("compare", first, other), message)


def test_one_evaluation_and_the_same_twice_are_refused(first: Path, tmp_path: Path) -> None:
    tiny.one_clear_line(tiny.mlxtune("compare", first), "one evaluation has nothing to be compared with")
    for again in (first, first.parent / "." / first.name / ".." / first.name):
        tiny.one_clear_line(tiny.mlxtune("compare", first, again), "is named twice")
    tiny.one_clear_line(tiny.mlxtune("compare", first, tmp_path / "none"), "no folder")

"""Evaluations on a page: their figures, answers side by side, whose they are, and nothing that they hold is obeyed."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import evaluations as made
import hostile
import page_readers
import pages
import pytest
import tiny
from mlxtune_convert.files import digest

from mlxtune.errors import UserError
from mlxtune.evaluate.before_after import Outcome
from mlxtune.evaluate.checks.check import Check, SuiteRow
from mlxtune.evaluate.comparison import figures, folder
from mlxtune.evaluate.comparison.folder import Evaluation
from mlxtune.evaluate.comparison.overlap import LEARNED
from mlxtune.evaluate.comparison.scores import SIDES
from mlxtune.evaluate.turns import OWN_ANSWER
from mlxtune.report.composed import of_run
from mlxtune.report.evaluations import Unkept, evaluations_of
from mlxtune.report.of_evaluations import page_of
from mlxtune.report.run_record import read_run
from mlxtune.report.sections import answers, better, checks, observations
from mlxtune.report.sections.words import change, marked

KEY = "AKIAIOSFODNN7EXAMPLE"  # a key as data check knows them
FORGETTING = {
    "prompts": 64,
    "tokens": 4096,
    "drift": {"kl": 0.25, "kl_interval": [0.2, 0.3], "agreement": 0.75, "agreement_interval": [0.7, 0.8]},
    "loss": {"of": "texts", "base": 2.0, "tuned": 2.5, "difference": 0.5, "interval": [0.4, 0.6], "rise": 0.25},
    "flagged": [{"measure": "it rose", "value": 0.25, "threshold": 0.05, "limit": "5%"}],
    "fix": "mix rows",
    "notes": ["a note of it"],
}
SAFETY = {
    "pairs": {"n": 20, "base": 12.0, "tuned": 18.0, "difference": 0.3, "interval": [0.1, 0.5], "p": 0.01,
              "verdict": "better"},
    "refused": {"as it stands": {"n": 20, "base": 12.0, "tuned": 19.0}},
    "answered": {"n": 20, "base": 20.0, "tuned": 19.0},
    "kept": {"n": 0},
}  # fmt: skip
JUDGE = {
    "judge": "a-judge", "rate": "pairwise", "rubric": f"be good, {KEY}", "refused": False, "notes": ["a note"],
    "exam": {"pairs": 20, "right": 18, "consistent": 19, "failed": 0, "first_position": 0.5, "passed": True},
    "pairs": 24, "identical": 2, "failed": 0, "wins": 15, "ties": 5, "losses": 4, "consistency": 0.9,
    "first_position": 0.55, "win_rate": 0.72, "difference": 0.4, "interval": [0.55, 0.85], "p": 0.02,
    "test": "sign test", "verdict": "better",
    "length": {"longer_wins": 0.6, "equal_length": 0.7, "close": 0.66, "close_pairs": 9},
}  # fmt: skip
OBSERVED = {"observation": "too verbose", "measure": "2.0 times", "value": 2.0, "threshold": 1.5, "limit": "1.5 times",
            "fix": "lower train.lr", "examples": ["r1"]}  # fmt: skip


def sides(adapter: str = "b" * 64, path: str = "run") -> dict[str, Any]:
    """What was compared: a model with its own base."""
    base = {"model": "m", "adapter": None, "digests": {"model": "a", "adapter": None}}
    return {"base": base, "tuned": {"model": "m", "adapter": path, "digests": {"model": "a", "adapter": adapter}}}


def evaluation(
    path: Path, base: str = "no", tuned: str = "yes, it is", n: int = 24, more: Any = (), **provenance: Any
) -> Evaluation:
    """An evaluation's folder of n prompts. more: further parts of its document."""
    facts = {"suite": {"name": "test.jsonl", "digest": "5eed"}, "sides": sides(), **provenance}
    made.write(path, made.rows(n, (made.YES, made.SHORT)), [base], [tuned], **facts)
    summary = json.loads((path / folder.SUMMARY).read_text())
    (path / folder.SUMMARY).write_text(json.dumps({**summary, "observations": [OBSERVED], **dict(more)}))
    return Evaluation.read(path)


def text_of(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", markup))


def run_with_adapter(path: Path, content: bytes = b"adapter") -> tuple[Path, str]:
    """(A run's folder, the digest of its adapter)."""
    pages.write(path, pages.told(20))
    (path / "adapters.safetensors").write_bytes(content)
    return path, digest(path / "adapters.safetensors")


def test_the_table_and_the_plot_have_the_figures_of_the_evaluation(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "first")
    page = page_of(one)
    said = text_of(page)
    for name, check in one.summary["checks"].items():
        for figure in (figures.share(check, check["tuned"]), figures.interval(check), figures.p_value(check["p"])):
            assert figure in said, (name, figure)
    assert "24 prompts show differences of a check from" in said and "▲ better" in said
    # The drawn interval of the check that passes or fails: its ends and middle, in points, in the figure's description.
    check = one.summary["checks"]["contains"]
    low, high = (100 * end for end in check["interval"])
    assert f"contains: {100 * check['difference']:+.3g}, between {low:+.3g} and {high:+.3g}." in said
    assert page_readers.faults(page) == []


@pytest.mark.parametrize("verdict", ["better", "worse", "no difference shown"])
@pytest.mark.parametrize("p", [1.0, 0.5, 0.00001])
def test_the_note_of_a_drawn_interval_is_whole(verdict: str, p: float) -> None:
    check = {"graded": False, "verdict": verdict, "interval": [-0.1, 0.1], "difference": 0.0, "p": p}
    (note,) = re.findall(r">([^<>]*, p [^<>]*)<", str(checks.forest({"contains": check})))
    assert html.unescape(note).endswith(f", p {figures.p_value(p)}")


def test_words_that_differ_are_marked_and_nothing_of_the_texts_is_lost() -> None:
    before, after = "Paris is the  capital\nof France.", "It is in the capital of France, yes"
    old, new = marked(before, after)
    for markup, text in ((old, before), (new, after)):
        assert html.unescape(re.sub(r"<[^>]*>", "", markup)) == text
    assert re.findall("<del>(.*?)</del>", old) and "<ins>" not in old and "<del>" not in new
    kept = [re.sub(r"<(ins|del)>.*?</\1>", "", one, flags=re.DOTALL) for one in (old, new)]
    assert text_of(kept[0]).split() == text_of(kept[1]).split()  # what is not marked is the same on both sides
    assert "<" not in "".join(re.sub("</?div[^>]*>", "", one) for one in marked("a b", "a b"))
    assert change("a b c", "c b a") == 0.0 and change("a", "b") == 1.0 and change("", "") == 0.0
    long = "word " * 4_000
    assert text_of(marked(long, long + "more")[1]).split() == [*long.split(), "more"]


def test_the_most_changed_answers_come_first_and_at_most_twenty(tmp_path: Path) -> None:
    suite = made.rows(30)
    texts = [f"the same words {'and another end' if number == 7 else 'here'}" for number in range(30)]
    made.write(tmp_path / "e", suite, ["the same words here"], texts, sides=sides())
    body = answers.section([Evaluation.read(tmp_path / "e")]).body  # type: ignore[union-attr]
    shown = re.findall(r"<h3>Prompt (\w+)</h3>", body)
    assert shown[:3] == ["r8", "r1", "r2"] and len(shown) == 20
    assert "29 of all answers have the same words" in body
    assert "✗ fails" in body and "yes, it is 8" in body  # the check, by a sign and a word; the reference


def test_long_answers_are_folded_and_very_long_ones_end_with_how_much_is_missing(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "e", base="short", tuned="yes " * 1_500, n=2)
    body = answers.section([one]).body  # type: ignore[union-attr]
    assert "<summary>Both answers (" in body and "[... 2,000 characters more]" in body
    assert len(body) < 20_000


def test_a_later_turn_shows_what_each_side_had_answered_before_and_calls_of_tools(tmp_path: Path) -> None:
    """As `--turns replay` asks: where a message is (its own answer), the two sides have said different things."""
    first, call = made.rows(1)[0], {"function": {"name": "look_up", "arguments": {"word": "poem"}}}
    asked = [*first.messages, {"role": "assistant", "content": OWN_ANSWER}, {"role": "user", "content": "Shorter."}]
    tools = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}, *first.messages]
    suite = [first, replace(first, id="r1#2", messages=asked, follows="r1"), replace(first, id="t", messages=tools)]
    made.write(tmp_path / "e", suite, ["one poem", "less", "x"], ["another poem", "short", "y"], sides=sides())
    one = Evaluation.read(tmp_path / "e")
    assert one.prompts["r1#2"].follows == "r1"
    outcome = Outcome(one.summary, {side: [*chain(*one.answers_of(side).values())] for side in SIDES}, 0, one.scores)
    for of in (one, Unkept.of(suite, outcome, "e")):
        said = " ".join(text_of(answers.section([of]).body).split())  # type: ignore[union-attr]
        assert "assistant (before) : one poem assistant (after) : another poem" in said and OWN_ANSWER not in said
        assert "assistant : [calls look_up" in said and '"word": "poem"' in said


def test_what_strangers_wrote_is_text_in_every_field_and_secrets_are_hidden(tmp_path: Path) -> None:
    """The same evaluation with harmless texts and with hostile ones: the same elements and attributes."""
    evil = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> ]]> &lt;b \x1b[2J \u202e javascript:0"
    evil += "".join(hostile.texts(80))

    def page(path: Path, text: str) -> str:
        suite = [
            SuiteRow(
                f"r{text}",
                [{"role": "user", "content": f"before {text}"}, {"role": f"u{text}", "content": text}],
                reference=text,
                checks=[Check(f"contains{text}", made.YES.rule), Check(f"short{text}", made.SHORT.rule)],
            )
        ]
        provenance = {"suite": {"name": text, "digest": text}, "sides": sides(path=text), "notes": [text]}
        made.write(path, suite, [f"one {text}"], [f"other {text}"], **provenance)
        summary = json.loads((path / folder.SUMMARY).read_text())
        texts = dict.fromkeys(("observation", "measure", "fix", "limit"), text)
        summary["observations"] = [{**OBSERVED, **texts, "examples": [text]}]
        summary["judge"] = {**JUDGE, "judge": text, "rubric": text, "notes": [text], "verdict": text, "test": text}
        flag = {"measure": text, "value": 1, "threshold": 1, "limit": text}
        of_loss = {**FORGETTING["loss"], "of": text}  # type: ignore[dict-item]
        summary["forgetting"] = {**FORGETTING, "flagged": [flag], "fix": text, "notes": [text], "loss": of_loss}
        summary["safety"] = {**SAFETY, "refused": {text: SAFETY["answered"]}}
        summary["gates"] = [{"gate": text, "check": text, "limit": 0.1, "met": False, "why": text}]
        (path / folder.SUMMARY).write_text(json.dumps(summary))
        return page_of(Evaluation.read(path))

    tame, wild = page(tmp_path / "tame", ("word " * len(evil))[: len(evil)]), page(tmp_path / "wild", evil)
    first, second = page_readers.read(tame), page_readers.read(wild)
    assert first.tags == second.tags
    names = [[(element, name) for element, name, _ in found.attributes] for found in (first, second)]
    assert names[0] == names[1]
    assert page_readers.faults(wild) == []
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", wild)
    secret = page(tmp_path / "secret", f"the key is {KEY} yes")
    assert KEY not in page_readers.without_record(secret)
    assert "AKIA…" in secret


def test_judge_forgetting_and_safety_are_shown_where_they_are_there(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "e", more={"judge": JUDGE, "forgetting": FORGETTING, "safety": SAFETY})
    page = page_of(one)
    said = " ".join(text_of(page).split())
    assert "of 20 pairs whose better side is known it got 18 right" in said
    assert "72.0% (95% interval 55.0% to 85.0%)" in said and "win rate at equal length 70.0%" in said
    assert "0.2500 nats a token (95% interval 0.2000 to 0.3000)" in said and "Likely fix: mix rows" in said
    assert "refused, as it stands 20 12 19" in said and "+30.0 points, 95% interval +10.0 to +50.0" in said
    assert 'id="judge"' in page and 'id="forgetting"' in page and 'id="safety"' in page
    bare = page_of(evaluation(tmp_path / "bare"))
    assert not re.search('id="(judge|forgetting|safety|benchmarks)"', bare)


def test_benchmarks_have_a_section_of_their_own_with_their_subjects(tmp_path: Path) -> None:
    subjects = {"law": {"acc": {"n": 12, "base": 0.25, "tuned": 0.5}}}
    one = evaluation(tmp_path / "e", more={"benchmarks": {"mmlu": {"shots": 5, "subjects": subjects}}})
    page = page_of(one)
    said = " ".join(text_of(page).split())
    assert 'id="benchmarks"' in page and 'id="checks"' not in page and 'id="answers"' not in page
    assert "How mmlu was asked" in said and "law acc 12 0.250 0.500" in said


def test_people_who_rated_are_shown_with_what_they_found(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "e", n=12)
    of = [f"{digest(tmp_path / 'e' / folder.ANSWERS)[:12]}/{side}" for side in ("base", "tuned")]
    lines = [{"id": f"r{number}", "of": of, "ranks": [2, 1]} for number in range(1, 13)]
    tiny.write_jsonl(tmp_path / "e" / "ratings.ann.jsonl", lines)
    said = " ".join(text_of(page_of(one)).split())
    assert "ann 12 of 12 12 wins, 0 ties, 0 losses" in said
    (tmp_path / "e" / "ratings.bob.jsonl").write_text('{"id": 7, "of": 3}\n')
    said = " ".join(text_of(page_of(one)).split())
    assert "ratings.bob.jsonl is left out: " in said and "not a rating" in said and "Checks of test.jsonl" in said


def test_the_first_sentence_says_what_got_better_and_worse_with_numbers(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "e", base="a longer no, nothing else", tuned="yes")
    box = better.lead([one])
    said = text_of(str(box))
    check = one.summary["checks"]["contains"]
    assert "test.jsonl, 24 prompts: better in contains (0.0% before, 100.0% after; 95% interval" in said
    assert figures.interval(check) in said and 'class="callout good"' in str(box)
    known = f"3 of 24 prompts were trained on (r1, r2, r3): {LEARNED}"
    flattered = str(better.lead([evaluation(tmp_path / "k", notes=["a note", known])]))
    assert f"But {known}." in text_of(flattered) and "callout warning" in flattered and "a note" not in flattered
    for right, told in (
        (11, "the judge failed its exam (11 of 20 right, 19 the same in both orders)"),
        (0, "there was nothing to examine"),
    ):
        failed = {**JUDGE, "exam": {**JUDGE["exam"], "pairs": 20 if right else 0, "right": right, "passed": False}}
        trusted = str(
            better.lead(
                [
                    evaluation(
                        tmp_path / f"j{right}", base="a longer no, nothing else", tuned="yes", more={"judge": failed}
                    )
                ]
            )
        )
        assert f"But {told}" in text_of(trusted) and "callout warning" in trusted
    worse = str(better.lead([evaluation(tmp_path / "w", base="yes", tuned="no, not at all")]))
    assert "worse in contains" in text_of(worse) and "callout bad" in worse
    both = str(better.lead([evaluation(tmp_path / "b", base="no", tuned="yes")]))
    assert "better in contains" in both and "worse in short" in both and "callout warning" in both
    same = str(better.lead([evaluation(tmp_path / "s", base="yes", tuned="yes")]))
    assert "no difference shown in contains, short" in text_of(same) and "callout neutral" in same


def test_an_evaluation_is_a_runs_by_its_adapter_alone(tmp_path: Path) -> None:
    run, own = run_with_adapter(tmp_path / "runs" / "first")
    ours = {"sides": sides(own)}
    evaluation(run / "evals" / "inside", **ours)
    evaluation(tmp_path / "runs" / "beside", **ours)
    evaluation(tmp_path / "evals" / "above", **ours)
    evaluation(tmp_path / "runs" / "anothers", sides=sides("c" * 64))
    evaluation(tmp_path / "runs" / "earlier", sides=sides("d" * 64, str(run)))
    (tmp_path / "runs" / "foreign").mkdir()
    (tmp_path / "runs" / "foreign" / "summary.json").write_text("[1]")
    found = evaluations_of(run)
    assert sorted(Path(one.name).name for one in found.evaluations) == ["above", "beside", "inside"]
    assert list(found.notes) == ["earlier was made of an adapter that this run does not hold any more: it is not shown"]
    (run / "adapters.safetensors").write_bytes(b"the run went on")
    assert evaluations_of(run).evaluations == []


@pytest.mark.parametrize("name", ["observation", "measure", "limit", "fix"])
def test_an_observation_that_is_no_text_is_said_to_be_damaged(name: str, tmp_path: Path) -> None:
    one = evaluation(tmp_path / "e", more={"observations": [{**OBSERVED, name: ["a"]}]})
    assert "are damaged and not shown" in text_of(page_of(one))


def test_a_named_evaluation_of_another_adapter_is_refused(tmp_path: Path) -> None:
    run, own = run_with_adapter(tmp_path / "run")
    evaluation(tmp_path / "ours", sides=sides(own))
    evaluation(tmp_path / "other", sides=sides("c" * 64))
    assert [one.name for one in evaluations_of(run, [tmp_path / "ours"]).evaluations] == [str(tmp_path / "ours")]
    with pytest.raises(UserError, match="an evaluation of another adapter than"):
        evaluations_of(run, [tmp_path / "other"])
    with pytest.raises(UserError, match="no folder"):
        evaluations_of(run, [tmp_path / "nowhere"])
    (run / "adapters.safetensors").unlink()
    with pytest.raises(UserError, match="holds no adapter"):
        evaluations_of(run, [tmp_path / "ours"])


def test_a_damaged_evaluation_is_said_and_costs_no_other(tmp_path: Path) -> None:
    run, own = run_with_adapter(tmp_path / "run")
    evaluation(tmp_path / "whole", sides=sides(own))
    damaged = evaluation(tmp_path / "damaged", sides=sides(own))
    damaged.summary["checks"]["contains"] = {"verdict": 7}
    (tmp_path / "damaged" / folder.SUMMARY).write_text(json.dumps(damaged.summary))
    (tmp_path / "damaged" / folder.ANSWERS).write_text('{"side": 3}\n')
    said = text_of(of_run(read_run(run), evaluations_of(run)))
    assert said.count("damaged cannot be shown here") == 2 and "Prompt r1" in said and "▲ better" in said


def test_observations_name_the_keys_and_what_they_were_in_this_run(tmp_path: Path) -> None:
    run = pages.write(tmp_path / "run", pages.told(20), {"train.lr": 0.03})
    body = observations.section(read_run(run), [evaluation(tmp_path / "e")]).body
    assert "<code>train.lr</code>" in body and "In this run: train.lr: 0.03." in body
    assert "too verbose" in body and "test.jsonl (e)" in body
    assert "noted nothing of its rows" in body  # an older run
    assert "This looks wrong: too verbose." in text_of(str(observations.lead(None, [evaluation(tmp_path / "f")])))


def test_the_command_writes_a_page_with_or_without_a_folder_and_replaces_none_but_its_own(tmp_path: Path) -> None:
    suite = [{"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": "yes"}],
              "id": f"p{n}", "checks": [{"contains": ["yes"]}]} for n in range(12)]  # fmt: skip
    tiny.write_jsonl(tmp_path / "suite.jsonl", suite)
    for name, text in (("good", "yes & <b>"), ("bad", "no")):
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", [{"id": f"p{n}", "text": text} for n in range(12)])
    good, bad = (f"replay:{tmp_path / name}.jsonl" for name in ("good", "bad"))
    words = ("eval", "--model", good, "--against", bad, "--suite", tmp_path / "suite.jsonl", "--json")
    page = tmp_path / "page.html"
    tiny.done(*words, "--html", page)
    first = page.read_text()
    assert "yes &amp; &lt;b&gt;" in first and "better in contains" in first and page_readers.faults(first) == []
    tiny.done(*words, "--html", page, "--out", tmp_path / "kept", "--no-answers")
    second = page.read_text()
    assert "yes &amp; &lt;b&gt;" not in second and "better in contains" in second
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    tiny.one_clear_line(tiny.mlxtune(*words, "--html", mine), "mine.html already exists")
    assert mine.read_text() == "<p>mine</p>"
    tiny.one_clear_line(tiny.mlxtune(*words, "--html", tmp_path), "is a folder")
    tiny.one_clear_line(tiny.mlxtune(*words, "--no-answers"), "--no-answers has no effect without --html")


def test_the_report_command_shows_the_evaluations_that_are_named_and_refuses_others(tmp_path: Path) -> None:
    run, own = run_with_adapter(tmp_path / "run")
    evaluation(tmp_path / "far" / "away" / "ours", tuned="yes, said it", sides=sides(own))
    evaluation(tmp_path / "other", sides=sides("c" * 64))
    words = ("report", run, "--evaluation", tmp_path / "far" / "away" / "ours")
    tiny.done(*words)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "better in contains" in page and "yes, said it" in page.replace("<ins>", "").replace("</ins>", "")
    assert [one["suite"]["name"] for one in page_readers.record(page)["evaluations"]] == ["test.jsonl"]
    tiny.done(*words, "--no-answers")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "better in contains" in page and "yes, said it" not in page and 'id="answers"' not in page
    tiny.one_clear_line(tiny.mlxtune("report", run, "--evaluation", tmp_path / "other"), "of another adapter than")
    told = json.loads(tiny.done(*words, "--json").stdout)
    assert [one["n"] for one in told["evaluations"]] == [24]

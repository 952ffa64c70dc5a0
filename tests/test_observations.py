"""What went wrong is observed where it was planted, and nothing is where all is well."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from rich.console import Console

from mlxtune.cli import observed
from mlxtune.data.rows.formats import Record
from mlxtune.data.survey.lint import seems_cut_off
from mlxtune.evaluate.checks.check import Check, Rule, SuiteRow
from mlxtune.evaluate.comparison.scores import Side, score_answers
from mlxtune.evaluate.comparison.summary import check_results
from mlxtune.evaluate.engines.request import Answer, Finish
from mlxtune.evaluate.observations.observe import observations
from mlxtune.evaluate.observations.seen import Seen

PROMPTS = 24
SYSTEM = "You answer for a shop."
WORDS = ["paint", "brush", "ladder", "nail", "hammer", "saw", "drill", "glue", "tape", "rope", "chain", "bolt", "screw"]
Text = Callable[[int], str]  # of a prompt's number


def good(number: int) -> str:
    """A reference of twelve words, another one for each prompt."""
    one, other = WORDS[number % 13], WORDS[(number * 4 + 2) % 13]
    return f"you need a {one} for this job and also a {other} or two."


def trained_on(answer: Text = good, count: int = 40) -> list[Record]:
    rows = []
    for number in range(100, 100 + count):
        question = {"role": "user", "content": f"what for job {number}?"}
        said = {"role": "assistant", "content": answer(number)}
        rows.append(Record("train.jsonl", number, "openai", [{"role": "system", "content": SYSTEM}, question, said]))
    return rows


def seen(
    tuned: Text = good,
    base: Text = good,
    checks: Sequence[Check] = (),
    finish: Finish = "stop",
    system: str = SYSTEM,
    alone: bool = False,
    **others: Any,
) -> Seen:
    """An evaluation of 24 prompts whose answers are planted. alone: the tuned texts are the base's, which is alone."""
    rows = []
    for number in range(PROMPTS):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": f"what for job {number}?"}]
        rows.append(SuiteRow(f"r{number}", messages, reference=good(number), checks=list(checks)))

    def given(text: Text, ended: Finish) -> list[Answer]:
        return [Answer(row.id, 0, text(place), "", ended, 9) for place, row in enumerate(rows)]

    answers: dict[Side, list[Answer]] = {"base": given(base, "stop"), "tuned": given(tuned, finish)}
    if alone:
        answers = {"base": answers["tuned"]}
    scores = score_answers(rows, answers)
    return Seen(rows, answers, scores, check_results(scores), others.pop("trained", trained_on()), **others)


def names(found: Seen) -> list[str]:
    return [one["observation"] for one in observations(found)]


def only(found: Seen) -> Mapping[str, Any]:
    (one,) = observations(found)
    assert one["threshold"] is not None and one["fix"] and one["limit"] and one["measure"]
    return one


def losses(*values: float) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [{"kind": "begin", "step": 0}]
    for step, value in enumerate(values):
        events += [{"kind": "train", "step": step, "loss": 0.5}, {"kind": "eval", "step": step, "loss": value}]
    return events


IS_JSON = Check("json", Rule(lambda answer, row: float(answer.text.startswith("{"))))
PASSES = Check("code", Rule(lambda answer, row: float("need" in answer.text), of_data=False))
HEALTHY_LOSSES = losses(2.0, 1.5, 1.2, 1.25, 1.22)
REFUSAL = "I'm sorry, but I can't help with that."
LONG_CUT = good(1) + " The next thing that one has to know about this job is that the wood must be dry " * 4 + "and the"


def test_nothing_is_observed_of_healthy_answers() -> None:
    assert names(seen(checks=[PASSES], events=HEALTHY_LOSSES)) == []
    assert names(seen(alone=True)) == []
    # Two models that fail alike: training made nothing worse.
    for bad in (lambda number: REFUSAL, lambda number: "go to it " * 6, lambda number: LONG_CUT[:60] + "<|im_end|>"):
        assert names(seen(bad, bad)) == []


def test_refusals_of_what_has_an_answer_are_observed_with_the_training_rows_that_refuse() -> None:
    trained = trained_on(lambda number: REFUSAL if number < 103 else good(number))
    one = only(seen(lambda number: REFUSAL if number % 2 else good(number), trained=trained))
    assert one["observation"] == "refuses basic questions" and one["value"] == 0.5
    assert "50% of the answers to 24 prompts, of the base's 0%" in one["measure"]
    assert "3 of 40 training rows refuse (rows 100, 101, 102)" in one["fix"] and "data.sources" in one["fix"]
    assert one["examples"] == ["r1", "r3", "r5", "r7", "r9"]
    # A single one may be chance, and what is to be refused does not count.
    assert names(seen(lambda number: REFUSAL if number == 3 else good(number))) == []
    rightly = seen(lambda number: REFUSAL)
    rows = [SuiteRow(row.id, row.messages, reference=REFUSAL) for row in rightly.rows]
    assert "refuses basic questions" not in names(Seen(rows, rightly.answers))


def test_long_answers_are_observed_against_their_references_or_where_more_are_cut() -> None:
    one = only(seen(lambda number: f"{good(number)} there is much more that one may say about it, as you know."))
    assert one["observation"] == "too verbose" and one["threshold"] == 1.5 < one["value"] < 2.5
    assert "the median of the training answers is 13 words" in one["fix"]
    cut = seen(finish="length")
    cut = Seen(cut.rows, {"base": cut.answers["base"], "tuned": [
        Answer(one.id, 0, one.text, "", "length" if place % 2 else "stop", 9)
        for place, one in enumerate(cut.answers["tuned"])
    ]})  # fmt: skip
    assert only(cut)["observation"] == "too verbose" and "cut by --max-tokens" in only(cut)["measure"]


def test_programs_that_fail_are_observed() -> None:
    one = only(seen(lambda number: good(number).replace("need", "want"), checks=[PASSES]))
    assert (
        one["observation"] == "poor code" and one["value"] == 0.0 and one["examples"] == ["r0", "r1", "r2", "r3", "r4"]
    )


def test_a_format_that_comes_and_goes_is_observed_with_the_training_rows_that_lack_it() -> None:
    as_json: Text = lambda number: '{"a": "' + good(number) + '"}'  # noqa: E731
    trained = trained_on(lambda number: good(number) if number == 107 else as_json(number))
    mixed = seen(lambda number: good(number) if number % 3 else as_json(number), checks=[IS_JSON], trained=trained)
    one = only(mixed)
    assert one["observation"] == "inconsistent format" and "33% of the answers" in one["measure"]
    assert "of the training answers 98%" in one["measure"] and "(rows 107)" in one["fix"]
    # Not between: none has it, though the data has.
    assert names(seen(checks=[IS_JSON], trained=trained)) == ["inconsistent format"]
    assert names(seen(as_json, checks=[IS_JSON], trained=trained)) == []
    assert names(seen(checks=[IS_JSON])) == []  # neither data nor answers are JSON


def test_invented_names_and_numbers_are_observed_and_tuning_is_not_offered_for_them() -> None:
    for text in ("ask Mr Kowalski", "it costs 1,249"):
        one = only(seen(lambda number, text=text: f"{good(number)[:-1]}, {text}."))  # type: ignore[misc]
        assert one["observation"] == "hallucinated numbers or names" and one["value"] == 1.0
        assert one["fix"].startswith("tuning on answers cannot mend this")
    assert names(seen(lambda number: f"Job {number}: {good(number)}")) == []  # they stand in the prompt


def test_loops_are_observed() -> None:
    one = only(seen(lambda number: "go to it " * 6 if number % 4 == 0 else good(number)))
    assert one["observation"] == "repetitive" and one["value"] == 0.25 and "train.lr" in one["fix"]


def test_answers_that_stop_inside_a_sentence_are_observed() -> None:
    assert seems_cut_off(LONG_CUT)
    for whole in (
        "ฝนตกลงมาจากเมฆ " * 20,
        "ዝናብ ከደመና ይወርዳል። " * 20,
        "ភ្លៀងធ្លាក់ពីពពក។" * 20,
        "မိုးရွာသည်။" * 30,
        "Անձրև է գալիս։ " * 20,
    ):
        assert not seems_cut_off(whole)
    assert seems_cut_off("ዝናብ ከደመና ይወርዳል " * 20)
    cut = seen(lambda number: LONG_CUT)
    assert "truncated learning" in names(cut)
    (one,) = [one for one in observations(cut) if one["observation"] == "truncated learning"]
    assert "data.max_tokens" in one["fix"]
    assert "truncated learning" not in names(seen(lambda number: LONG_CUT, finish="length"))  # --max-tokens cut them


@pytest.mark.parametrize("mark", ["<|im_end|>", "[/INST]", "\nUser: and then?", "\n### Instruction: go on"])
def test_marks_of_a_template_in_the_answers_are_observed(mark: str) -> None:
    assert only(seen(lambda number: good(number) + mark))["observation"] == "wrong template"


def test_answers_none_of_which_ends_are_observed_as_a_wrong_template() -> None:
    assert "wrong template" in names(seen(finish="length"))


def test_a_validation_loss_that_keeps_rising_is_observed() -> None:
    one = only(seen(events=losses(2.0, 1.0, 1.1, 1.2, 1.3)))
    assert one["observation"] == "overfitting" and "from 1.000 to 1.300" in one["measure"]
    assert "training loss ended at 0.500" in one["measure"] and "train.patience" in one["fix"]
    assert names(seen(events=losses(2.0, 1.0, 1.1, 1.2))) == []


def test_training_answers_to_other_questions_are_observed() -> None:
    one = only(seen(lambda number: good(101), trained=trained_on(lambda number: good(101) if number == 101 else "no")))
    assert one["observation"] == "learned by heart" and "lora.rank" in one["fix"]


def test_a_loss_that_falls_while_no_check_rises_is_observed() -> None:
    never = Check("exact", Rule(lambda answer, row: 0.0))
    one = only(seen(checks=[never], events=losses(2.0, 1.5, 1.0)))
    assert one["observation"] == "style without substance" and "fell by 50%" in one["measure"]
    assert names(seen(checks=[never], events=losses(2.0, 1.95))) == []
    always = Check("exact", Rule(lambda answer, row: 1.0))
    assert names(seen(checks=[always], events=losses(2.0, 1.5, 1.0))) == []  # nothing was left to learn


def test_a_system_prompt_that_no_row_was_trained_with_is_observed() -> None:
    one = only(seen(system="You are a pirate."))
    assert one["observation"] == "system prompt mismatch" and one["value"] == 1.0 and "system:" in one["fix"]
    assert names(seen(system=" You  answer for a shop. ")) == []  # spaces are no difference


def test_what_was_forgotten_is_observed() -> None:
    flag = {"measure": "the loss rose by 9%", "value": 0.09, "threshold": 0.05, "limit": "5%"}
    assert names(seen(forgetting={"flagged": [], "fix": "mix"})) == []
    assert only(seen(forgetting={"flagged": [flag], "fix": "mix"}))["fix"] == "mix"


def test_each_is_printed_with_measure_threshold_and_fix() -> None:
    out = io.StringIO()
    found = observations(seen(system="You are a pirate."))
    observed.draw(Console(file=out, width=200), found)
    said = out.getvalue()
    for part in ("Observed: system prompt mismatch", "24 of 24 prompts", "said from: 10%", "likely fix: the same"):
        assert part in said

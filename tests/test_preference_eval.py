"""`mlxtune eval` on pairs and rated answers, and pairs out of evaluations (`mlxtune make pairs`)."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import evaluations
import mlx.core as mx
import numpy as np
import page_readers
import pages
import pytest
import tiny
from evaluations import SHORT, YES
from mlxtune_convert.files import digest
from test_preference_rows import pair, read

from mlxtune.adapter import adapter_files, attach
from mlxtune.api import evaluating
from mlxtune.cli import suites
from mlxtune.config.resolve import load as settle
from mlxtune.data.chat.renderer import Renderer
from mlxtune.data.rows.sides import Side
from mlxtune.evaluate.chats.log import ChatLog, Speaker
from mlxtune.evaluate.comparison import folder as folders
from mlxtune.evaluate.comparison.folder import Evaluation
from mlxtune.evaluate.judging.people import Contest, Ratings
from mlxtune.evaluate.preferences import Answers, report
from mlxtune.evaluate.statistics.proportions import sign_test, wilson
from mlxtune.model.load import load
from mlxtune.train.preference import reference_file
from mlxtune.train.run_folder import REFERENCE_FILE

PAIRS = [
    pair(f"Question {'very ' * (n // 2)}number {n // 2}?", f"The answer is {n}.", f"No idea{'.' * (n % 6)}")
    for n in range(8)
]


def log_probabilities(model: Path, run: Path, file: Path) -> tuple[list[np.ndarray], list[int]]:
    """([base, tuned] log-probabilities of the answers in the order of the file, supervised tokens of each), from the
    logits of whole rows, in numpy.
    """
    loaded = load(str(model))
    adapter_files.load_adapter(loaded.model, run)
    renderer = Renderer(loaded.tokenizer, settle(None, (), {"data.path": str(file)}).data)
    rows = renderer.rows(read(file))
    found: list[list[float]] = [[], []]
    counts = []
    for number in range(2):
        with attach.switched_off(loaded.model) if number == 0 else nullcontext():
            for row in rows:
                assert row.example is not None
                ids, mask = np.asarray(row.example.ids), np.asarray(row.example.mask[1:]) == 1
                logits = np.array(loaded.model(mx.array(ids[None])))[0, :-1].astype(np.float64)
                logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                found[number].append(float(logs[np.arange(len(mask)), ids[1:]][mask].sum()))
                counts.append(int(mask.sum()))
    return [np.array(one) for one in found], counts[: len(rows)]


def test_pairs_are_scored_as_whole_rows_say(mlx_model: Path, run: Path, tmp_path: Path) -> None:
    file, page = tiny.write_jsonl(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "page.html"
    asked = ("eval", "--model", mlx_model, "--adapter", run, "--data", file)
    told = json.loads(tiny.done(*asked, "--json", "--html", page).stdout)
    (base, tuned), tokens = log_probabilities(mlx_model, run, file)
    assert (told["kind"], told["rows"], told["prompts"]) == ("pairs", 8, 4)  # two pairs of each prompt
    for name, logs in (("base", base), ("tuned", tuned)):
        assert told["checks"]["accuracy"][name] == np.mean(logs[0::2] > logs[1::2])
        assert told["checks"]["margin"][name] == pytest.approx(np.mean(logs[0::2] - logs[1::2]), rel=1e-4)
        each = logs / np.array(tokens)
        assert told["checks"]["accuracy per token"][name] == np.mean(each[0::2] > each[1::2])
        assert told["sides"]["chosen"][name] == pytest.approx(logs[0::2].sum() / sum(tokens[0::2]), rel=1e-5)
    moved = tuned - base
    margins = 0.1 * (moved[0::2] - moved[1::2])
    assert told["beta"] == 0.1
    assert told["rewards"]["accuracy"] == told["checks"]["reward accuracy"]["tuned"] == np.mean(margins > 0)
    assert told["rewards"]["margin"] == pytest.approx(margins.mean(), rel=1e-4)
    assert told["rewards"]["interval"] == pytest.approx(wilson(float((margins > 0).sum()), 8))
    assert told["sides"]["rejected"]["reward"] == pytest.approx(0.1 * moved[1::2].mean(), rel=1e-4)
    assert told["sides"]["chosen"]["drift"] == pytest.approx(-moved[0::2].sum() / sum(tokens[0::2]), rel=1e-4)
    text = page_readers.said(page_readers.whole(page.read_text()))
    assert "Which answer is preferred" in text and "Reward margins of the pairs" in text
    assert page_readers.record(page.read_text())["rewards"] == told["rewards"]


def test_without_an_adapter_the_base_alone_is_told_and_of_conversations_there_is_no_page(
    mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    file = tiny.write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    told = json.loads(tiny.done("eval", "--model", mlx_model, "--data", file, "--json").stdout)
    assert set(told["checks"]) == {"accuracy", "accuracy per token", "margin"} and "rewards" not in told
    assert "tuned" not in told["sides"]["chosen"] and "interval" in told["checks"]["accuracy"]
    shown = tiny.done("eval", "--model", mlx_model, "--data", file).stdout
    assert "pairs whose chosen answer is the likelier one" in shown and "8 chosen" in shown
    refused = tiny.mlxtune("eval", "--model", mlx_model, "--data", data, "--html", tmp_path / "page.html")
    tiny.one_clear_line(refused, "--html has no effect without --suite: the loss needs no answers")
    assert not (tmp_path / "page.html").exists()


def test_the_adapter_that_a_run_began_with_is_its_reference_only_while_it_is_still_the_same(
    mlx_model: Path, run: Path, tmp_path: Path
) -> None:
    """By the digest that the run's reference keeps: another adapter of the same shapes is not taken for it."""
    loaded = load(str(mlx_model))
    adapter_files.load_adapter(loaded.model, run)
    start, tuned = tmp_path / "start", tmp_path / "tuned"
    shutil.copytree(run, start)
    tuned.mkdir()
    file = start / "adapters.safetensors"
    began = {reference_file.BEGAN_FROM: digest(file)}
    reference_file.save(tuned, {"train": np.zeros(2, np.float32)}, began)

    def found(*settings: str) -> tuple[Path | None, str]:
        return evaluating._start_of(settle(None, settings, {}), loaded, tuned)

    of_start = (f"lora.start_from={start}", "preference.loss=dpo")
    assert found(*of_start)[0] == start and found(*of_start)[1].endswith("it was the reference")
    tensors = {name: 2 * array for name, array in mx.load(str(file)).items()}
    mx.save_safetensors(str(file), tensors)
    other, note = found(*of_start)
    assert other is None and "that is another now: the base here is the model without any adapter" in note
    # simpo has no reference, and so nothing was it.
    other, note = found(of_start[0], "preference.loss=simpo")
    assert other == start and note.endswith("as it is now") and "reference" not in note
    (tuned / REFERENCE_FILE).unlink()
    other, note = found(*of_start)
    assert other == start and f"{tuned} does not say" in note
    other, note = found(f"lora.start_from={tmp_path / 'gone'}", "preference.loss=dpo")
    assert other is None and "is gone or another now" in note and "without any adapter" in note
    assert found() == (None, "")


def test_rewards_of_an_objective_without_a_reference_are_said_to_be_others_than_its_own() -> None:
    dpo = settle(None, ("preference.loss=dpo", "preference.beta=0.5"), {})
    assert evaluating._beta_of(dpo) == 0.5 and evaluating._other_rewards(dpo) == ""
    simpo = settle(None, ("preference.loss=simpo",), {})
    assert evaluating._beta_of(simpo) == 0.1  # simpo's own beta is of another kind of reward
    assert "rewards here are 0.1 times how much likelier" in evaluating._other_rewards(simpo)
    assert "simpo's own: 2 times the answer's log-probability per token" in evaluating._other_rewards(simpo)
    assert evaluating._other_rewards(settle(None, (), {})) == ""


def test_another_adapter_takes_the_place_of_a_models_own_for_a_while(
    mlx_model: Path, run: Path, tmp_path: Path
) -> None:
    loaded = load(str(mlx_model))
    adapter_files.load_adapter(loaded.model, run)
    ids = mx.array([[5, 9, 7, 11]])
    own = np.array(loaded.model(ids))
    other = tmp_path / "other"
    shutil.copytree(run, other)
    tensors = {name: 2 * array for name, array in mx.load(str(run / "adapters.safetensors")).items()}
    mx.save_safetensors(str(other / "adapters.safetensors"), tensors)
    with evaluating._adapter_of(loaded, other, run):
        assert np.abs(np.array(loaded.model(ids)) - own).max() > 1e-3
    np.testing.assert_array_equal(np.array(loaded.model(ids)), own)


# What the figures show, on made-up log-probabilities.


def answers(count: int, sides: tuple[Side, ...] = (Side.CHOSEN, Side.REJECTED), tokens: int = 10) -> Answers:
    known = np.array(sides * count)
    groups: list[str | None] = [None] * (len(known) if sides[0] in (Side.GOOD, Side.BAD) else count)
    return Answers(np.arange(len(known)), known, np.full(len(known), tokens), groups)


def test_a_reward_of_chance_is_no_verdict_and_one_of_all_pairs_is() -> None:
    some, base = answers(12), np.full(24, -20.0)
    even = base + np.tile([1.0, -1.0, -1.0, 1.0], 6)
    assert report(some, base, even)["checks"]["reward accuracy"]["verdict"] == "no difference shown"
    better = base + np.tile([1.0, -1.0], 12)
    check = report(some, base, better)["checks"]["reward accuracy"]
    assert check["verdict"] == "better"
    assert check["p_alone"] == pytest.approx(sign_test(12, 0))  # each pair is a coin


def test_what_must_be_known_beside_the_figures_is_said() -> None:
    some, base = answers(4), np.full(8, -20.0)
    (same,) = report(some, base, base)["notes"]
    assert "the adapter changes nothing here" in same
    fallen = base - np.tile([15.0, 30.0], 4)
    (less,) = report(some, base, fallen)["notes"]
    assert "became less likely themselves (mean reward -1.50)" in less
    assert report(some, base, base + np.tile([1.0, 0.0], 4), notes=("first",))["notes"] == ["first"]
    longer = Answers(some.of_example, some.sides, np.tile([12, 10], 4), some.groups)
    (long,) = report(longer, base)["notes"]
    assert "longer one in 100% of the pairs" in long


def test_rated_answers_are_told_by_how_they_moved() -> None:
    some, base = answers(6, (Side.GOOD, Side.BAD)), np.full(12, -20.0)
    told = report(some, base, base + np.tile([2.0, -1.0], 6))
    assert told["kind"] == "rated" and told["checks"]["moved as rated"]["tuned"] == 1.0
    assert told["rewards"]["margin"] == pytest.approx(0.3)
    assert told["sides"]["bad"]["less_likely"] == 1.0
    assert report(some, base)["checks"] == {}


def test_answers_that_were_rejected_are_no_training_answers_but_their_prompts_were_trained_on(tmp_path: Path) -> None:
    rows = evaluations.rows(6)
    known = [pair(f"Question {n}?", f"yes, {n}", f"no, not {n}") for n in range(1, 7)]
    tiny.write_jsonl(tmp_path / "data" / "train.jsonl", known[:4])
    tiny.write_jsonl(tmp_path / "data" / "valid.jsonl", known[4:])
    run = pages.write(
        tmp_path / "run", [pages.begun()], {"preference.loss": "dpo", "data.path": str(tmp_path / "data")}
    )
    learned, notes = suites._about_data(rows, run)
    assert [record.side for record in learned] == [Side.CHOSEN] * 4
    assert "of 4 training answers 4 pass contains" in notes
    assert any("4 of 6 prompts" in note or "4 prompts" in note for note in notes), notes


# Pairs out of evaluations.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six prompts; the fifth one's answers are the same, the tuned model passes the first three."""
    tuned = ["yes 0", "yes 1", "yes 2", "nope", "no", "never"]
    return evaluations.write(tmp_path / "first", evaluations.rows(6, (YES, SHORT)), ["no"], tuned)


def made(*words: str | Path) -> tuple[list[dict[str, Any]], str]:
    """(The rows of the file, what was said)."""
    done = tiny.done("make", "pairs", *words)
    out = Path(words[words.index("--out") + 1])
    return [json.loads(line) for line in out.read_text().splitlines()], done.stdout + done.stderr


def test_what_people_decided_becomes_pairs_that_can_be_read(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    none = tiny.mlxtune("make", "pairs", folder, "--out", out)
    tiny.one_clear_line(none, "first has no ratings of me on these answers")
    ratings = Ratings(Contest.of([Evaluation.read(folder)]), "me", likert=False)
    for id, ranks in (("r1", [2, 1]), ("r2", [1, 2]), ("r3", [1, 1]), ("r4", None)):
        ratings.decide(id, ranks)
    rows, said = made(folder, "--out", out)
    by_prompt = {row["made"]["parents"][0]: row for row in rows}
    assert by_prompt.keys() == {"r1", "r2"}
    assert by_prompt["r1"] == {
        "prompt": [{"role": "user", "content": "Question 1?"}],
        "chosen": [{"role": "assistant", "content": "yes 0"}],
        "rejected": [{"role": "assistant", "content": "no"}],
        "made": {"how": "pairs", "parents": ["r1"], "shown by": "me"},
    }
    assert by_prompt["r2"]["chosen"][0]["content"] == "no"
    assert "2 pairs" in said and "4 prompts give no pair: undecided" in said and "evaluate with another one" in said
    assert [record.side for record in read(out)] == [Side.CHOSEN, Side.REJECTED] * 2
    tiny.one_clear_line(tiny.mlxtune("make", "pairs", folder, "--out", out), "already exists")


def test_ratings_of_single_answers_become_pairs_where_they_differ(folder: Path, tmp_path: Path) -> None:
    ratings = Ratings(Contest.of([Evaluation.read(folder)]), "anna", likert=True)
    ratings.decide("r1", [2, 5])
    ratings.decide("r2", [4, 4])
    rows, _ = made(folder, "--rater", "anna", "--out", tmp_path / "pairs.jsonl")
    assert [(row["chosen"][0]["content"], row["made"]["shown by"]) for row in rows] == [("yes 0", "anna")]


def test_checks_make_pairs_of_what_passes_all_and_what_does_not(folder: Path, tmp_path: Path) -> None:
    rows, said = made(folder, "--by", "checks", "--out", tmp_path / "pairs.jsonl")
    assert [row["chosen"][0]["content"] for row in rows] == ["yes 0", "yes 1", "yes 2"]
    assert {row["rejected"][0]["content"] for row in rows} == {"no"} and "3 prompts give no pair: undecided" in said


def test_a_judge_makes_pairs_of_what_it_prefers_in_both_orders(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    asked = ("make", "pairs", folder, "--by", "judge", "--out", out)
    tiny.one_clear_line(tiny.mlxtune(*asked), "first has no verdicts of a judge")
    verdicts = [{"id": f"r{n}", "sample": 0, "outcome": outcome} for n, outcome in enumerate(("win", "loss", "tie"), 1)]
    folders.write_lines(folder / folders.VERDICTS, verdicts)
    rows, _ = made(*asked[2:])
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows] == [
        ("yes 0", "no"),
        ("no", "yes 1"),
    ]
    folders.write_lines(folder / folders.VERDICTS, [{"id": "r1", "sample": 0, "rating": 3}])
    tiny.one_clear_line(tiny.mlxtune(*asked, "--force"), "verdicts.jsonl line 1: no verdict on two answers")


def test_turns_of_a_conversation_give_no_pair_for_the_sides_were_asked_otherwise(tmp_path: Path) -> None:
    rows = evaluations.rows(3)
    rows[1] = type(rows[1])("r2", rows[1].messages, reference="yes", checks=[YES], follows="r1")
    path = evaluations.write(tmp_path / "talk", rows, ["no"], ["yes"])
    pairs, said = made(path, "--by", "checks", "--out", tmp_path / "pairs.jsonl")
    assert [row["made"]["parents"] for row in pairs] == [["r3"]]
    assert "2 prompts give no pair: in a conversation of several turns" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{folder}", "--out", "{tmp}/pairs.json"), "JSON Lines are written"),
        (
            ("{folder}", "--by", "checks", "--rater", "anna", "--out", "{tmp}/p.jsonl"),
            "--rater has no effect with --by checks",
        ),
        (("{folder}", "{folder}", "--by", "checks", "--out", "{tmp}/p.jsonl"), "checks compared base and tuned of one"),
    ],
)
def test_what_cannot_make_pairs_is_refused(words: tuple[str, ...], said: str, folder: Path, tmp_path: Path) -> None:
    filled = [word.format(folder=folder, tmp=tmp_path) for word in words]
    tiny.one_clear_line(tiny.mlxtune("make", "pairs", *filled), said)


def test_thumbs_of_a_chat_are_rated_rows_as_they_stand(tmp_path: Path) -> None:
    log = ChatLog(tmp_path / "chats.jsonl", Speaker("model", None, None))
    prompt = [{"role": "user", "content": "Hi"}]
    for text, thumb in (("Hello!", True), ("What?", False), ("Well.", None)):
        log.add(prompt, {"role": "assistant", "content": text}, whole=True)
        if thumb is not None:
            log.rate(thumb)
    log.close()
    good, bad, unrated = read(tmp_path / "chats.jsonl")
    assert (good.side, good.prompt, bad.side) == (Side.GOOD, 1, Side.BAD)
    assert "nobody rated it" in unrated.teaches_nothing

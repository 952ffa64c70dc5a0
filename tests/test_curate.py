"""mlxtune data curate: scores by the loss, choices among kinds, what a person says, and what is written."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import judges
import mlx.core as mx
import numpy as np
import pytest
import tiny
from made import lines

from mlxtune.config import resolve
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import in_order
from mlxtune.data.rows.formats import Record
from mlxtune.errors import UserError
from mlxtune.evaluate.judging.remembered import Remembered
from mlxtune.evaluate.score import losses_of_each, score, split_for
from mlxtune.make.curation import rating
from mlxtune.make.curation.candidates import Candidate, is_copied, read
from mlxtune.make.curation.choosing import Wanted, choose
from mlxtune.make.curation.curate import Curation
from mlxtune.make.curation.decisions import Decision, Decisions
from mlxtune.make.curation.figures import likeness
from mlxtune.make.curation.ifd import Scorer
from mlxtune.make.curation.losses import Losses
from mlxtune.make.curation.quality import qualities
from mlxtune.make.curation.scores_file import ScoresFile
from mlxtune.model.load import Loaded, load


@pytest.fixture(scope="module")
def loaded(hf_model: Path) -> Loaded:
    return load(str(hf_model))


def row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def candidate(
    number: int, kind: str = "explain", question: str = "", file: str = "a.jsonl", answer: str = "Yes, it is."
) -> Candidate:
    messages = row(question or f"word{number} other{number} third{number}", answer)["messages"]
    return Candidate(Record(file, number, "messages", messages), f"{number:016x}", kind)


def test_losses_of_each_example_add_up_to_the_score_and_are_what_the_logits_say(loaded: Loaded) -> None:
    chance = np.random.default_rng(0)
    examples = []
    for length in (9, 5, 14, 3):
        mask = (chance.random(length) < 0.6).astype(np.uint8)
        mask[1] = 1
        examples.append(Example(chance.integers(3, 250, length).tolist(), mask))
    batches = in_order(examples, tokens=24)
    assert len(batches) > 1
    split = split_for(loaded, resolve.load(None, (), {}), batches[-1])
    assert split is not None
    sums, tokens = losses_of_each(loaded.model, split, batches, len(examples))
    whole = score(loaded.model, split, batches)
    assert sums.sum() == pytest.approx(whole.loss_sum, rel=1e-6) and tokens.sum() == whole.tokens
    for place, example in enumerate(examples):
        logits = np.array(loaded.model(mx.array([example.ids[:-1]]))[0].astype(mx.float32), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = -sum(log_p[at, example.ids[at + 1]] for at in range(len(example.ids) - 1) if example.mask[at + 1])
        assert sums[place] == pytest.approx(expected, rel=1e-4)
        assert tokens[place] == example.mask[1:].sum()


def test_ifd_compares_the_same_answer_behind_its_question_and_behind_none(loaded: Loaded) -> None:
    scorer = Scorer(loaded, resolve.load(None, (), {}))
    several = [*row("Why?", "So.")["messages"], *row("Where is it?", "Far away.")["messages"]]
    records = [Record("a", 1, "messages", row("Why?", "So.")["messages"]), Record("a", 2, "messages", several)]
    found: list[Losses | None] = []
    scorer.losses(records, lambda _, some: found.extend(some))
    alone = "<|im_end|>\n<|im_start|>assistant\n"
    for record, losses in zip(records, found, strict=True):
        assert losses is not None
        *before, last = record.messages or []
        answer = last["content"]
        said = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in before)
        behind = f"{said}<|im_start|>assistant\n"
        for prompt, expected in ((behind, losses.behind), (alone, losses.alone)):
            assert _loss(loaded, prompt, f"{answer}<|im_end|>") == pytest.approx(expected, rel=1e-4)
        assert losses.tokens == len(answer) + 1  # its bytes, and the end token
        assert losses.ifd == losses.behind / losses.alone


def _loss(loaded: Loaded, prompt: str, answer: str) -> float:
    """Nats a token, by the model's own logits."""
    before, ids = (loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + answer))
    logits = np.array(loaded.model(mx.array([ids[:-1]]))[0].astype(mx.float32), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = range(len(before), len(ids))
    return float(-np.mean([log_p[at - 1, ids[at]] for at in targets]))


def test_more_rows_take_no_more_memory(loaded: Loaded) -> None:
    scorer = Scorer(loaded, resolve.load(None, (), {}))
    peaks = []
    for count in (16, 48):
        records = [Record("a", n, "messages", row(f"Question {n}?", "word " * 40)["messages"]) for n in range(count)]
        found: list[Losses | None] = []
        mx.clear_cache()
        mx.reset_peak_memory()
        scorer.losses(records, lambda _, some, found=found: found.extend(some))  # type: ignore[misc]
        peaks.append(mx.get_peak_memory())
        assert len(found) == count and None not in found
    assert peaks[1] < 1.02 * peaks[0]


def test_a_row_of_which_nothing_fits_has_no_score(loaded: Loaded) -> None:
    scorer = Scorer(loaded, resolve.load(None, ("data.max_tokens=40",), {}))
    records = [Record("a", n, "messages", row(text, "Yes.")["messages"]) for n, text in enumerate(("Why?", "y" * 80))]
    found: list[Losses | None] = []
    scorer.losses(records, lambda _, some: found.extend(some))
    assert found[0] is not None and found[1] is None


def test_a_template_that_takes_no_plain_answer_is_one_clear_line(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded.tokenizer, "chat_template", "{{ raise_exception('only in rhymes') }}")
    with pytest.raises(UserError, match="only in rhymes") as raised:
        Scorer(loaded, resolve.load(None, (), {}))
    assert "data.template" in raised.value.hint


def test_kinds_have_equal_shares_above_a_bar_and_the_best_come_first() -> None:
    some = [candidate(n, "explain") for n in range(20)] + [candidate(n, "compare") for n in range(20, 40)]
    some += [candidate(n, "translate") for n in range(40, 43)]
    quality = {one.key: 1 - place % 20 / 20 for place, one in enumerate(some)}
    chosen = choose(some, quality, Wanted(13))
    kinds = [one.kind for one in chosen.kept]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"explain": 5, "compare": 5, "translate": 3}
    assert [one.key for one in chosen.kept if one.kind == "explain"] == [one.key for one in some[:5]]
    assert chosen.below == set() and set(chosen.reasons.values()) == {"lower"} and len(chosen.reasons) == 30
    bad = {one.key: 0.1 if one.kind == "compare" else quality[one.key] for one in some}
    assert {one.kind for one in choose(some, bad, Wanted(13)).kept} == {"explain", "translate"}
    rest = choose(some, bad, Wanted(22))
    assert len(rest.below) == sum(one.kind == "compare" for one in rest.kept) + sum(
        bad[one.key] < 0.4 for one in rest.kept if one.kind == "explain"
    )


def test_rows_that_ask_the_same_and_rows_beyond_a_files_share_are_passed_over() -> None:
    alike = [candidate(n, question=f"What is the size of the large red house number {n}?") for n in range(3)]
    others = [candidate(n, file="b.jsonl") for n in range(3, 9)]
    some = [*alike, *others]
    quality = {one.key: 1.0 for one in some}
    chosen = choose(some, quality, Wanted(6, of_one_file=3))
    assert [one.record.row for one in chosen.kept] == [0, 3, 4, 5]
    assert [chosen.reasons[one.key] for one in some if one.key in chosen.reasons] == ["alike"] * 2 + ["source"] * 3
    assert len(choose(some, quality, Wanted(9, most_alike=1.0)).kept) == 9
    twins = [candidate(n, question=text) for n, text in enumerate(["a b c d", "a b c e", "x y z w", "q r s t"])]
    assert likeness(twins, 4) == pytest.approx((0.75 + 0.75 + 0 + 0) / 4) and likeness(twins[:1], 4) is None


def test_quality_is_a_rank_within_the_kind_less_what_faults_cost() -> None:
    some = [candidate(n, "explain") for n in range(11)] + [candidate(n, "compare") for n in range(11, 22)]
    faulty = candidate(
        30,
        "compare",
        answer="It is so because of the following thing that is said here and it goes on and on " * 3 + "and",
    )
    assert faulty.faults == ("cut off",)
    scores = {one.key: float(one.record.row) for one in [*some, faulty]}
    found = qualities([*some, faulty], scores)
    assert [round(found[one.key], 3) for one in some[:11]] == [n / 10 for n in range(11)]
    assert found[some[11].key] == 0 and found[faulty.key] == 1 - 0.5
    few = qualities([*some, candidate(40, "debug")], {**scores, candidate(40).key: 10.5})
    assert few[candidate(40).key] == pytest.approx(0.5)  # the only one of its kind is ranked among all
    same = qualities(some, dict.fromkeys((one.key for one in some), 1.0))
    assert set(same.values()) == {0.5}


def test_an_answer_that_repeats_its_question_is_a_copy() -> None:
    text = "The large red house at the end of the street was sold last year."
    assert (
        is_copied(f"Who bought it? {text}", text) and not is_copied("Who?", text) and not is_copied(text, "The house.")
    )


def test_rows_of_thousands_of_words_cost_no_more_than_long_ones() -> None:
    """Compared whole, each pair takes seconds."""
    long = [" ".join(f"w{(n * place) % 7919}" for place in range(8_000)) for n in (3, 5, 7)]
    rows = [candidate(n, question=text) for n, text in enumerate(long)]
    began = time.process_time()
    assert is_copied(long[0], long[0]) and not is_copied(long[0], long[1])
    assert len(choose(rows, {one.key: 1.0 for one in rows}, Wanted(3)).kept) == 3
    assert likeness(rows, 3) is not None
    assert time.process_time() - began < 2


def test_requests_that_share_a_long_beginning_alone_are_not_alike() -> None:
    rule = "rule " * 400
    rows = [candidate(n, question=rule + " ".join(f"w{n}x{place}" for place in range(200))) for n in range(2)]
    assert len(choose(rows, {one.key: 1.0 for one in rows}, Wanted(2)).kept) == 2
    twins = [candidate(n, question=one.question + (" now" if n else "")) for n, one in enumerate([rows[0]] * 2)]
    assert len(choose(twins, {one.key: 1.0 for one in twins}, Wanted(2)).kept) == 1


def test_scores_are_kept_and_those_of_another_model_are_not_used(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    losses = Losses(1.0, 2.0, 3, 4)
    ScoresFile(file, {"model": "a"}).keep({"k": losses, "none": None})
    ScoresFile(file, {"model": "a"}).keep({"l": losses})
    with file.open("a") as open_file:
        open_file.write('{"row": "torn", "beh')
    known = {"k": losses, "none": None, "l": losses}
    assert ScoresFile(file, {"model": "a"}).known == known
    ScoresFile(file, {"model": "a"}).keep({"m": losses})  # behind the torn line, not in it
    other = ScoresFile(file, {"model": "b"})
    assert other.known == {}
    other.keep({"k": None})
    assert ScoresFile(file, {"model": "b"}).known == {"k": None}
    assert ScoresFile(file, {"model": "a"}).known == {**known, "m": losses}  # nothing of it was lost
    file.write_text('{"of": {"model": "a"}}\n{"messages": []}\n')
    with pytest.raises(UserError, match="line 2: not a score"):
        ScoresFile(file, {"model": "a"})


@pytest.mark.parametrize(
    ("begun", "opened"),
    [
        ('{"of": {"mod', lambda file: ScoresFile(file, {}).keep({"k": None})),
        ('{"row": "09', lambda file: Decisions(file).decide("a", Decision("keep"))),
        ('{"asked"', lambda file: Remembered(judges.Scripted(lambda *_: 0.5), file, "").label_probabilities([], [])),
    ],
    ids=["scores", "decisions", "replies"],
)
def test_a_file_of_somebody_else_is_left_as_it_is(tmp_path: Path, begun: str, opened: Callable[[Path], object]) -> None:
    file, link = tmp_path / "notes.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "nothing")
    for text in ("my own notes\n", '{"messages": []}\n', "\n\n"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"notes\.jsonl holds something else"):
            opened(file)
        assert file.read_text() == text
    with pytest.raises(UserError, match="is a link"):
        opened(link)
    assert not (tmp_path / "nothing").exists()
    file.write_text(begun)  # all that a kill left of ours
    opened(file)


def test_a_judge_rates_the_answers_after_an_exam() -> None:
    def worth(first: str, second: str, request: str) -> float:
        return 0.9 if "good" in first else 0.1

    some = [candidate(1, answer="A good answer."), candidate(2, answer="A bad answer.")]
    high, low = rating.ratings(judges.Scripted(worth), some, "be good")
    assert high is not None and low is not None and 5 >= high > low >= 1
    with pytest.raises(UserError, match="cannot tell good from bad"):
        rating.require_passed(judges.Scripted(worth), "be good", anyway=False)
    assert "cannot tell" in rating.require_passed(judges.Scripted(worth), "be good", anyway=True)


def test_decisions_are_kept_and_the_last_one_can_be_undone(tmp_path: Path) -> None:
    decisions = Decisions(tmp_path / "d.jsonl")
    for key, decision in (("a", Decision("keep")), ("b", Decision("drop")), ("c", Decision("edit", "New."))):
        decisions.decide(key, decision)
    assert decisions.undo() == "c" and list(Decisions(tmp_path / "d.jsonl").made) == ["a", "b"]
    one = candidate(1)
    edited = Decision("edit", "New.").applied(one)
    assert edited is not None and edited.answer == "New." and one.answer == "Yes, it is." and edited.key == one.key
    assert Decision("drop").applied(one) is None and Decision("keep").applied(one) is one


def some_rows(folder: Path) -> list[Path]:
    """Two files: 12 rows, one of them twice, and 6 in other columns; some have faults."""
    first = [row(f"Explain the {word} of a {word}ship.", f"It is the {word}, which holds it.") for word in "abcdefgh"]
    first += [
        first[0],
        row("Compare milk and tea.", "No."),
        row("Write a poem.", "Key: sk-" + "a" * 30),
        row("Sum?", ""),
    ]
    first += [row("Summarise it.", "It \ufffd is short.")]
    second = [{"prompt": f"Translate {n}{n} into French.", "completion": f"C'est {n}.", "source": n} for n in range(6)]
    return [tiny.write_jsonl(folder / "a.jsonl", first), tiny.write_jsonl(folder / "b.jsonl", second)]


def test_the_command_scores_chooses_and_says_what_became_of_the_rows(tmp_path: Path, hf_model: Path) -> None:
    files = some_rows(tmp_path)
    words = ("data", "curate", *files, "--model", hf_model, "--most-alike", "0.95", "--out", tmp_path / "c.jsonl")
    told = tiny.done(*words, "--keep", "8", "--left-out", tmp_path / "l.jsonl", "--json")
    report = json.loads(told.stdout)
    kept, left = lines(tmp_path / "c.jsonl"), lines(tmp_path / "l.jsonl")
    assert report["after"]["rows"] == len(kept) <= 8 and len(kept) + len(left) == 19 and report["before"]["rows"] == 17
    assert {one["reason"] for one in left} >= {"no answer", "faulty", "equal"} and report["left_out"]["faulty"] == 2
    assert sum(report["left_out"].values()) == len(left) and report["left_out"]["equal"] == 1
    assert report["before"]["kinds"]["explain"] == 8 and report["before"]["files"][str(files[1])] == 6
    assert report["before"]["tokens"] > report["after"]["tokens"] > report["after"]["answer_tokens"] > 0
    for one in kept:
        assert set(one) <= {"messages", "curated", "source"} and 0 < one["curated"]["scores"]["ifd"] <= 1
        assert one["curated"]["from"].startswith(str(tmp_path))
    assert {tuple(one["messages"][0].items()) for one in kept}.isdisjoint(
        tuple(one["messages"][0].items()) for one in left if one["reason"] != "equal"
    )
    again = tiny.done(*words, "--keep", "3", "--force")
    assert "17 rows were scored before" in again.stderr and len(lines(tmp_path / "c.jsonl")) == 3
    assert "left out" in again.stdout and "nearest other question" in again.stdout
    read_again, _ = read([tmp_path / "c.jsonl"], {})
    assert len(read_again) == 3


def test_where_no_row_is_kept_the_reasons_and_the_rows_are_told_all_the_same(tmp_path: Path, hf_model: Path) -> None:
    rows = [row(f"Write {n}.", f"Key: sk-{'a' * 30}{n}") for n in range(2)]
    file, out, left = tiny.write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "c.jsonl", tmp_path / "l.jsonl"
    words = ("data", "curate", file, "--model", hf_model, "--keep", "1", "--out", out)
    told = tiny.mlxtune(*words, "--left-out", left, "--json")
    tiny.one_clear_line(told, "no row is kept", f"{left} has the rows")
    assert json.loads(told.stdout)["left_out"] == {"faulty": 2} and not out.exists()
    assert [one["reason"] for one in lines(left)] == ["faulty"] * 2


def test_a_row_whose_rating_could_not_be_read_is_not_called_too_long(tmp_path: Path) -> None:
    curation = Curation.of([tiny.write_jsonl(tmp_path / "a.jsonl", [row("Why?", "So."), row("When?", "Now.")])], {})
    first, second = curation.candidates
    curation.ratings = {first.key: 4.0, second.key: None}
    assert curation.chosen(Wanted(2), lambda one: one).reasons == {second.key: "unrated"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--keep", "3"), "nothing scores the rows"),
        (("--model", "m"), "--keep is missing"),
        (("--keep", "99", "--model", "m"), "there are 17 different rows"),
        (("--keep", "9", "--model", "m", "--of-one-file", "4"), "leaves 8 rows of 2 files"),
        (("--keep", "3", "--model", "m", "--anyway"), "--anyway has no effect without --judge"),
        (("--keep", "3", "--model", "m", "--set", "train.lr=1"), "train.lr"),
        (("--review", "--json"), "--json has no effect with --review"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "out.jsonl"
    tiny.one_clear_line(tiny.mlxtune("data", "curate", *some_rows(tmp_path), "--out", out, *words), said)
    assert not out.exists()
    plain = tiny.write_jsonl(tmp_path / "plain.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match="plain text has no questions"):
        Curation.of([plain], {})


def test_a_person_keeps_drops_edits_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, out = some_rows(tmp_path)[1:], tmp_path / "r.jsonl"
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\necho 'By a person.' > \"$1\"\n")
    editor.chmod(0o700)
    monkeypatch.setenv("EDITOR", str(editor))
    monkeypatch.delenv("VISUAL", raising=False)

    def review(typed: str) -> str:
        process = tiny.started("data", "curate", *files, "--keep", "3", "--most-alike", "1", "--review", "--out", out)
        shown, said = process.communicate(typed)
        assert process.returncode == 0, said
        return shown

    assert "There is nothing to take back" in (first := review("u\nk\nd\nu\nk\nq\n"))
    assert "2 of 3 kept. The same command goes on." in first and not out.exists()
    assert "C'est 0." not in (second := review("e\n")) and "3 rows" in second
    answers = [one["messages"][-1]["content"] for one in lines(out)]
    assert answers == ["C'est 0.", "C'est 1.", "By a person."]
    assert math.isclose(len(lines(tmp_path / "r.review.jsonl")), 5)

"""What was kept is compared with what is new, exactly; a suite is guarded."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from mlxtune.evaluate.checks.overlap import rouge_l
from mlxtune.evaluate.checks.shipped import BASICS
from mlxtune.evaluate.checks.words import words_of
from mlxtune.make.blacklist import blacklisted
from mlxtune.make.guard import Guard
from mlxtune.make.parsing import unquoted
from mlxtune.make.pool import Pool

WORDS = re.findall(r"\S+", "the a cat dog sat ran on under mat tree big small 42 it x y and or not 你 好 Ça été кот")


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.choice((0, 1, 3, 9, 70, 140)))) for _ in range(count)]


def test_the_nearest_text_is_the_first_of_the_best_of_all() -> None:
    kept = texts(700, 1)
    kept += kept[:50]  # equally near ones
    pool = Pool(kept)
    for text in [*texts(60, 2), *kept[:20]]:
        scores = rouge_l(text, kept)
        best = float(scores.max())
        assert pool.nearest(text) == (pytest.approx(best, abs=1e-12), int(np.argmax(scores)) if best else -1)


def test_no_text_is_passed_over_for_its_bound_among_more_than_are_compared_at_once() -> None:
    many = ["d c b a"] * 300  # share all words with "a b c d", in no order of use
    assert Pool(["a b x y", "b a d c", *many]).nearest("a b c d") == (0.5, 0)  # 2 words in order, as in the second
    pool = Pool([*["a b"] * 300, "a a a a c d e f g h"])  # a word counts as often as both have it
    assert pool.nearest("a a a a") == (pytest.approx(2 * 4 / (4 + 10)), 300)


def test_a_pool_that_grows_compares_with_what_it_has_by_then() -> None:
    pool = Pool()
    assert pool.nearest("a red cat") == (0.0, -1)
    pool.add("a red cat")
    pool.add("")
    assert pool.nearest("A red, red CAT!") == (pytest.approx(6 / 7), 0)
    assert pool.nearest("") == (0.0, -1) and pool.nearest("dog") == (0.0, -1) and len(pool) == 2


def test_a_suite_is_guarded_by_likeness_and_by_runs_of_words(tmp_path: Path) -> None:
    system = "Answer as the support desk of a shop for garden tools."
    rows = [
        {"prompt": "Name the capital of France.", "reference": "Paris"},
        {"prompt": "Каждый охотник желает знать где сидит фазан сегодня утром", "reference": "x"},
        {"prompt": "Where is my rake?", "system": system, "reference": "In the shed, where you left it."},
    ]
    file = tmp_path / "suite.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    guard = Guard.of(file)
    assert len(guard) == 3
    assert re.match(r"ROUGE-L 0\.9\d to: Name the capital", guard.why("Name the capital city of France") or "")
    assert guard.why("Name the capital of any country that you like") is None
    quoted = "Explain: каждый охотник желает знать, где сидит фазан сегодня! " + "And then some more of it. " * 9
    assert (guard.why(quoted) or "").startswith('"каждый охотник')
    assert guard.why("Каждый охотник желает знать: где сидит фазан? " + "And then some more of it. " * 9) is None
    said = [{"role": "system", "content": system}]
    assert guard.why_any([*said, {"role": "user", "content": "Hello there"}]) is None
    assert guard.why_any([*said, {"role": "assistant", "content": "Where is my rake?"}]) is not None


def test_letters_that_count_as_words_make_longer_runs() -> None:
    guard = Guard(["请用一句话概括下面这段文字：春天来了，花都开了，孩子们在公园里唱歌。"])
    assert guard.why("请用一句话概括下面的新闻，并且说明它为什么对城市交通很重要。") is None
    quoted = "有人问我：请用一句话概括下面这段文字：春天来了，花都开了。" + "我不知道该怎么回答他才好。" * 9
    assert (guard.why(quoted) or "").startswith('"请 用')


def test_a_suite_of_mlxtunes_own_is_guarded_by_its_name_and_without_one_nothing_is() -> None:
    first = json.loads(BASICS.read_text().splitlines()[0])
    guard = Guard.of(Path("basics"))
    assert len(guard) > 50 and guard.why(first["prompt"]) is not None
    assert Guard.of(None).why("anything at all") is None


def test_programs_that_a_suite_would_run_need_no_leave_to_be_guarded(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Add two numbers"}], "checks": [{"code": "assert f(1) == 1"}]}
    (tmp_path / "suite.jsonl").write_text(json.dumps({**row, "turns": ["And three of them?"]}) + "\n")
    guard = Guard.of(tmp_path / "suite.jsonl")
    assert guard.why("add two numbers") and guard.why("and three of them")


def test_one_pair_of_quotes_around_a_text_goes_and_others_stay() -> None:
    assert [
        unquoted(text) for text in ('"Where is it?"', " “Where?” ", '"Yes", he said, "no"', 'What is a "rake"?')
    ] == [
        "Where is it?",
        "Where?",
        '"Yes", he said, "no"',
        'What is a "rake"?',
    ]


def test_words_of_the_blacklist_are_found_with_particles_and_not_in_other_senses() -> None:
    assert blacklisted(words_of("서울의 지도를 보여 주세요."), ["ko"]) == "지도"
    assert blacklisted(words_of("Écris le texte d'une carte de vœux."), ["fr"]) == ""
    assert blacklisted(words_of("Montre-moi une carte du monde."), ["fr"]) == "carte du monde"

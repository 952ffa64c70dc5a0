"""How much two texts have in common equals what the reference packages compute."""

from __future__ import annotations

import random
import re
import string

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

from mlxtune.evaluate.checks.overlap import chrf, longest_common, longest_common_of_two, rouge_l
from mlxtune.evaluate.checks.words import words_of
from mlxtune.make.pool import Pool

WORDS = re.findall(r"\S+", "the a cat dog sat ran on under mat tree Big small, 42 it's x_y (and) or - not")


def _texts(count: int, longest: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randint(0, longest))) for _ in range(count)]


@pytest.mark.parametrize("longest", [6, 64, 200])  # words: within one machine word of bits, at its border, beyond
def test_rouge_l_equals_the_package_rouge_score(longest: int) -> None:
    theirs = RougeScorer(["rougeL"])
    texts = ["", "?!", *_texts(6, longest, longest)]
    others = ["", *_texts(20, longest, longest + 1), " ".join(WORDS * 9)]
    for text in texts:
        wanted = [theirs.score(other, text)["rougeL"].fmeasure for other in others]
        assert rouge_l(text, others).tolist() == pytest.approx(wanted, abs=1e-12)
        words, lists = words_of(text), [words_of(other) for other in others]
        assert [longest_common_of_two(words, one) for one in lists] == longest_common(words, lists).tolist()


def test_rouge_l_equals_the_package_on_500_pairs_of_any_ascii_characters() -> None:
    draw, theirs = random.Random(7), RougeScorer(["rougeL"])
    letters = string.printable + " " * 40 + "abcABC12" * 5  # few letters make words that meet again
    for _ in range(100):
        one, *others = ("".join(draw.choices(letters, k=draw.randint(0, 120))) for _ in range(6))
        wanted = [theirs.score(other, one)["rougeL"].fmeasure for other in others]
        assert rouge_l(one, others).tolist() == pytest.approx(wanted, abs=1e-12)
        assert Pool(others).nearest(one)[0] == pytest.approx(max(wanted), abs=1e-12)


def test_a_subsequence_of_exactly_64_words_and_its_multiples_is_counted_whole() -> None:
    for length in (1, 63, 64, 65, 128, 129):
        words = [str(number) for number in range(length)]
        assert longest_common(words, [words, words[::-1], ["x", *words, "y"], words[1:], []]).tolist() == [
            *(length, 1, length, length - 1, 0),
        ]
        assert longest_common_of_two(words, ["x", *words[1:], "y"]) == length - 1


def test_a_word_at_both_ends_of_a_long_text_is_counted_once() -> None:
    """The carry of the sum goes through a machine word in which nothing stands that is looked for."""
    between = [str(number) for number in range(150)]
    assert longest_common(["a", *between, "a"], [["a"], ["a", "a"]]).tolist() == [1, 2]


def test_chrf_equals_sacrebleu() -> None:
    theirs = CHRF()
    texts = ["", "a", "ab cd", "Straße nach Köln", "你好 世界", *_texts(12, 12, 5)]
    for text in texts:
        for other in texts:
            assert chrf(text, other) == pytest.approx(theirs.sentence_score(text, [other]).score / 100, abs=1e-12)


def test_words_of_languages_without_spaces_are_their_letters() -> None:
    assert words_of("Ça va, x_y? 你好 สวัสดี") == ["ça", "va", "x", "y", "你", "好", *"สวัสดี"]
    assert words_of("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"]
    assert rouge_l("你好世界", ["你好"]).tolist() == [pytest.approx(2 / 3)]

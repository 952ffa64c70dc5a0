"""The statistics of evaluation: equal to scipy's, few false verdicts, intervals that hold the truth."""

from __future__ import annotations

from functools import cache
from itertools import product
from math import comb

import numpy as np
import pytest
from scipy.special import gammaln, xlogy
from scipy.stats import binom, binomtest

from mlxtune.evaluate.statistics.agreement import kappa
from mlxtune.evaluate.statistics.holm import holm, verdict
from mlxtune.evaluate.statistics.paired import compare_scores, wins_against_losses
from mlxtune.evaluate.statistics.power import power, smallest_difference
from mlxtune.evaluate.statistics.proportions import bonett_price, mcnemar_midp, sign_test, wilson
from mlxtune.evaluate.statistics.ranking import ranking, shares
from mlxtune.evaluate.statistics.resampling import bootstrap, sign_flips

COUNTS = [(0, 0), (0, 1), (5, 0), (3, 10), (7, 7), (12, 31), (200, 251), (1200, 1391)]
PAIRS = np.array([[0, 1, 0], [1, 0, 0]])  # base and tuned of "better", "worse" and "alike"


@pytest.mark.parametrize(("better", "worse"), COUNTS)
def test_mid_p_and_sign_test_are_those_of_scipy(better: int, worse: int) -> None:
    n, fewer = better + worse, min(better, worse)
    midp = 2 * binom.cdf(fewer, n, 0.5) - binom.pmf(fewer, n, 0.5)
    assert mcnemar_midp(better, worse) == pytest.approx(midp, abs=1e-12)
    if n:
        assert sign_test(better, worse) == pytest.approx(binomtest(better, n).pvalue, abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (0, 24), (24, 24), (3, 24), (50, 100), (1999, 2000)])
def test_wilsons_interval_is_that_of_scipy(successes: int, n: int) -> None:
    theirs = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_fewer_than_five_discordant_prompts_never_show_anything() -> None:
    assert mcnemar_midp(4, 0) > 0.05 > mcnemar_midp(5, 0)
    assert smallest_difference(4) is None
    assert smallest_difference(5) == pytest.approx(0.8**0.2, abs=1e-3)  # all five must be better


def test_holms_correction_is_the_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    assert [verdict(0.2, 0.049), verdict(-0.2, 0.049), verdict(0.2, 0.05), verdict(0.0, 0.01)] == [
        *("better", "worse", "no difference shown", "no difference shown"),
    ]


def _planted(n: int, better: float, worse: float, times: int) -> np.ndarray:
    """[times, 2, n] scores of evaluations in which so large shares of the prompts are better and worse."""
    random = np.random.default_rng(7)
    kinds = random.choice(3, p=[better, worse, 1 - better - worse], size=(times, n))
    return PAIRS[:, kinds].transpose(1, 0, 2)


def _verdicts(scores: np.ndarray, graded: bool = False, checks: int = 1) -> list[list[str]]:
    """For each evaluation, of as many checks as are asked for, what it says of them."""
    out = []
    for evaluation in scores.reshape(-1, checks, *scores.shape[1:]):
        found = [compare_scores(base[:, None], tuned[:, None], graded, draws=200) for base, tuned in evaluation]
        corrected = holm([one.p for one in found])
        out.append([verdict(one.difference, p) for one, p in zip(found, corrected, strict=True)])
    return out


@pytest.mark.parametrize("n", [24, 100])
def test_equals_are_called_better_or_worse_in_at_most_6_of_100_evaluations(n: int) -> None:
    found = _verdicts(_planted(n, 0.1, 0.1, 2000))
    false = [said for (said,) in found if said != "no difference shown"]
    assert len(found) == 2000 and 0 < len(false) <= 120
    # Five checks at once, corrected: any of them.
    several = _verdicts(_planted(n, 0.1, 0.1, 5000), checks=5)
    assert sum(set(said) != {"no difference shown"} for said in several) <= 60
    random = np.random.default_rng(3)
    graded = _verdicts(random.beta(2, 5, size=(2000, 2, n)).round(2), graded=True)
    assert 0 < sum(said != "no difference shown" for (said,) in graded) <= 120


def test_twenty_points_on_a_hundred_prompts_are_called_better() -> None:
    found = _verdicts(_planted(100, 0.25, 0.05, 2000))
    assert sum(said == "better" for (said,) in found) >= 1900
    assert not any(said == "worse" for (said,) in found)


def test_power_is_the_share_of_simulated_evaluations_and_the_smallest_difference_has_80_percent() -> None:
    shown = sum(said != "no difference shown" for (said,) in _verdicts(_planted(50, 0.2, 0.05, 2000)))
    assert power(50, 0.2, 0.05) == pytest.approx(shown / 2000, abs=0.035)
    exact = sum(  # n = 6 by all outcomes
        comb(6, b) * comb(6 - b, c) * 0.6**b * 0.1**c * 0.3 ** (6 - b - c)
        for b, c in product(range(7), range(7))
        if b + c <= 6 and mcnemar_midp(b, c) < 0.05
    )
    assert power(6, 0.6, 0.1) == pytest.approx(exact, abs=1e-12)
    smallest = smallest_difference(100)
    assert smallest is not None
    for difference, shows in ((smallest, True), (smallest - 0.001, False)):
        assert (power(100, 0.1 + difference / 2, 0.1 - difference / 2) >= 0.8) is shows
    several, larger = smallest_difference(24, checks=5), smallest_difference(24)
    assert several is not None and larger is not None and several > larger > smallest


@cache
def _interval(n: int, better: int, worse: int) -> tuple[float, float]:
    return bonett_price(np.repeat([1.0, -1.0, 0.0], [better, worse, n - better - worse]))


@pytest.mark.parametrize("n", [12, 24, 50, 200])
def test_intervals_of_0_1_checks_hold_the_true_difference_in_92_of_100_cases(n: int) -> None:
    """By the probabilities of all outcomes, whatever the two shares are; also where nothing gets worse."""
    outcomes = np.array([(b, c) for b in range(n + 1) for c in range(n + 1 - b)])
    ends = np.array([_interval(n, int(b), int(c)) for b, c in outcomes])
    b, c = outcomes.T
    ways = gammaln(n + 1) - gammaln(b + 1) - gammaln(c + 1) - gammaln(n - b - c + 1)
    tenths = np.arange(0, 21, 2) / 20
    some = [(one, other) for one in (*tenths, 0.01, 0.02, 0.05, 0.15, 0.25) for other in (0.0, 0.01, *tenths)]
    seen = 0
    for better, worse in some:
        if better + worse > 0.95:
            continue
        chance = np.exp(ways + xlogy(b, better) + xlogy(c, worse) + xlogy(n - b - c, 1 - better - worse))
        holds = (ends[:, 0] <= better - worse + 1e-12) & (better - worse - 1e-12 <= ends[:, 1])
        assert chance[holds].sum() >= 0.92, (better, worse)
        seen += 1
    assert seen > 100


@pytest.mark.parametrize("n", [50, 200])
def test_the_bootstrap_of_graded_scores_holds_the_true_difference_in_92_to_97_of_100_cases(n: int) -> None:
    random = np.random.default_rng(11)
    held = 0
    for seed in range(800):
        differences = random.beta(2, 5, n) - random.beta(3, 4, n)
        low, high = bootstrap(differences, np.ones(n), draws=300, seed=seed)
        held += low <= 2 / 7 - 3 / 7 <= high
    assert 0.92 <= held / 800 <= 0.97


def test_sign_flips_are_counted_exactly_for_few_prompts_and_drawn_for_many() -> None:
    assert sign_flips(np.array([0.5, 0.25, 1.0])) == 2 / 8
    assert sign_flips(np.array([0.0, 0.0])) == 1.0
    tenths = np.random.default_rng(2).integers(1, 5, (20, 7))
    for whole in tenths:  # sums of tenths that are equal on paper differ in a computer
        whole[:2] *= -1
        assert sign_flips(whole / 10) == sign_flips(whole.astype(float))
    few = np.random.default_rng(0).normal(0.3, 1, 14)
    many = sign_flips(np.concatenate([few, [0.0] * 30]))  # prompts without a difference say nothing
    assert many == sign_flips(few)
    drawn = sign_flips(np.concatenate([few, [1e-12]]), draws=40_000)
    assert drawn == pytest.approx(many, abs=0.01)
    assert sign_flips(np.ones(200)) == 1 / 10_001  # never 0


def test_answers_to_one_prompt_are_averaged_before_anything_is_counted() -> None:
    base = np.zeros((6, 1))
    once = compare_scores(base, np.array([[1], [1], [1], [0], [0], [0]]), graded=False)
    often = compare_scores(base, np.repeat([[1], [1], [1], [0], [0], [0]], 8, axis=1), graded=False)
    assert (once.n, once.difference, once.p) == (6, 0.5, 0.125)
    assert often == once
    halves = compare_scores(base, np.array([[1, 0], [1, 0], [1, 0], [0, 0], [0, 0], [0, 0]]), graded=False)
    assert (halves.n, halves.difference, halves.p) == (6, 0.25, 0.25)  # of 8 ways to sign three halves, 2


def test_prompts_of_a_group_count_as_one() -> None:
    tuned = np.array([[1.0], [1.0], [1.0], [0.0]])
    alone = compare_scores(np.zeros((4, 1)), tuned, graded=True)
    joined = compare_scores(np.zeros((4, 1)), tuned, graded=True, groups=["t", "t", "t", None])
    assert alone.p == 2 / 8 and joined.p == 1.0  # one coin for the group
    assert joined.difference == alone.difference == 0.75
    assert joined.smallest_difference is not None and alone.smallest_difference is not None
    assert joined.smallest_difference > alone.smallest_difference
    apart = compare_scores(np.zeros((4, 1)), tuned, graded=True, groups=["a", "b", None, "c"])
    assert apart == alone


def test_equal_pairs_in_groups_have_an_interval_with_a_width() -> None:
    """Two groups of four and two that are added, one all better and one all worse: 32 squares over 16 prompts."""
    same = np.ones((8, 1))
    found = compare_scores(same, same, graded=False, groups=list("aaaabbbb"))
    half = 1.959964 * 32**0.5 / 16
    assert found.interval == pytest.approx((-half, half), abs=1e-6)
    assert compare_scores(same, same, graded=False, groups=list("abcdefgh")) == compare_scores(same, same, False)


@pytest.mark.parametrize(("groups", "size"), [(4, 6), (12, 4), (25, 4)])
def test_intervals_of_0_1_checks_on_groups_hold_the_true_difference_in_90_of_100_cases(groups: int, size: int) -> None:
    """Whether the prompts of a group have nothing in common, half of it, or all."""
    random = np.random.default_rng(groups)
    for better, worse in ((0.2, 0.0), (0.05, 0.0), (0.3, 0.1)):
        for shared in (0.0, 0.5, 1.0):
            held = 0
            for _ in range(500):
                drawn = random.choice([1.0, -1.0, 0.0], p=[better, worse, 1 - better - worse], size=(groups, size + 1))
                together = random.random((groups, size)) < shared
                differences = np.where(together, drawn[:, :1], drawn[:, 1:])
                low, high = bonett_price(differences.sum(axis=1), np.full(groups, float(size)))
                held += low <= better - worse <= high
            assert held >= 0.9 * 500, (better, worse, shared)


def test_wins_of_one_group_are_one_win() -> None:
    ahead = np.ones(8)
    assert wins_against_losses(ahead, None) == (2 / 2**8, "sign test")
    assert wins_against_losses(ahead, list("aaaabbbb")) == (2 / 2**2, "sign flips of groups")
    assert wins_against_losses(ahead, ["a", "a", *[None] * 6]) == (2 / 2**7, "sign flips of groups")


def test_a_model_against_itself_shows_nothing_and_has_an_interval() -> None:
    same = np.ones((12, 1))
    found = compare_scores(same, same, graded=False)
    assert (found.difference, found.p) == (0.0, 1.0)
    low, high = found.interval
    assert low == -high and 0.1 < high < 0.3
    graded = compare_scores(same, same, graded=True)
    assert (graded.interval, graded.p, graded.smallest_difference) == ((0.0, 0.0), 1.0, None)


def test_bradley_terry_is_the_fraction_for_two_and_the_order_for_three() -> None:
    two = shares(np.array([[[0, 29.5], [9.5, 0]]]))[0]
    assert two == pytest.approx([0.75, 0.25])  # 30 and 10 wins, with half a one added to each
    random = np.random.default_rng(5)
    wins = np.zeros((300, 3, 3))
    for one, other, chance in ((0, 1, 0.5), (0, 2, 0.8), (1, 2, 0.8)):  # strengths 0, 0, -log 4
        won = random.random(300) < chance
        wins[:, one, other], wins[:, other, one] = won, ~won
    found = ranking(wins, draws=200)
    for rank, true in zip(found, (0.65, 0.65, 0.2), strict=True):
        assert rank.interval[0] <= true <= rank.interval[1]
        assert rank.interval[1] - rank.interval[0] < 0.1
    assert sum(rank.wins for rank in found) == 900


def test_kappa_is_the_worked_example_and_unknown_where_nothing_varies() -> None:
    one = "A" * 20 + "B" * 15 + "A" * 5 + "B" * 10
    other = "A" * 20 + "B" * 15 + "B" * 5 + "A" * 10
    assert kappa(one, other) == pytest.approx(0.4)
    assert kappa("AAA", "AAA") is None
    assert kappa("AB", "AB") == 1.0

"""Batches: every row once per epoch, remixed, reproducible, similar lengths together."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest

from mlxtune.data.batches import MAX_BUCKETS, Plan, collate, fill, in_order, widths
from mlxtune.data.chat import Example
from mlxtune.sections import TrainSection

LENGTHS = np.random.default_rng(0).integers(5, 200, 103).tolist()
EXAMPLES = [Example(list(range(1, length + 1)), [0] * (length - 3) + [1] * 3) for length in LENGTHS]


def rows_of(plan: Plan, first: int, last: int) -> list[int]:
    return [row for step in range(first, last + 1) for batch in plan.step(step) for row in batch.rows.tolist()]


@pytest.mark.parametrize("settings", [{"batch_rows": 8}, {"batch_tokens": 512}, {"batch_rows": 4, "accumulate": 3}])
def test_every_row_is_used_once_per_epoch_the_tail_too(settings: dict) -> None:
    plan = Plan(EXAMPLES, TrainSection(epochs=2, **settings))
    half = plan._starts[1]
    assert Counter(rows_of(plan, 1, half)) == Counter(range(103))
    assert Counter(rows_of(plan, half + 1, plan.steps)) == Counter(range(103))


def test_membership_changes_each_epoch_and_repeats_with_the_seed() -> None:
    plan = Plan(EXAMPLES, TrainSection(epochs=2, batch_rows=8))
    batches = [frozenset(plan.step(step)[0].rows.tolist()) for step in range(1, 27)]
    assert len(set(batches[:13]) & set(batches[13:])) <= 2
    assert rows_of(Plan(EXAMPLES, TrainSection(epochs=2, batch_rows=8)), 1, 26) == rows_of(plan, 1, 26)
    assert rows_of(Plan(EXAMPLES, TrainSection(epochs=2, batch_rows=8, seed=1)), 1, 26) != rows_of(plan, 1, 26)


def test_a_step_in_the_middle_does_not_depend_on_the_steps_before() -> None:
    plan = Plan(EXAMPLES, TrainSection(epochs=3, batch_rows=8))
    fresh = Plan(EXAMPLES, TrainSection(epochs=3, batch_rows=8))
    assert fresh.step(30)[0].rows.tolist() == plan.step(30)[0].rows.tolist()


def test_similar_lengths_share_a_batch() -> None:
    """Random batches of 8 of these lengths would be padded by some 70%."""
    batches = [batch for step in range(1, 14) for batch in Plan(EXAMPLES, TrainSection(batch_rows=8)).step(step)]
    padded, real = sum(batch.ids.size for batch in batches), sum(batch.tokens for batch in batches)
    assert padded / real < 1.2


def test_batches_stay_within_the_token_budget() -> None:
    plan = Plan(EXAMPLES, TrainSection(epochs=1, batch_tokens=600))
    assert all(plan.step(step)[0].ids.size <= 600 for step in range(1, plan.steps + 1))
    assert [len(batch) for batch in fill([0, 1], [900, 5], None, 600)] == [1, 1]  # one long row still is a batch


@pytest.mark.parametrize(("epochs", "steps"), [(1, 13), (2, 26), (0.5, 6), (1.5, 19)])
def test_epochs_become_steps(epochs: float, steps: int) -> None:
    """103 rows in batches of 8 are 13 steps; half an epoch rounds 6.5 to the even 6."""
    assert Plan(EXAMPLES, TrainSection(epochs=epochs, batch_rows=8)).steps == steps


def test_accumulation_groups_micro_batches_and_keeps_the_tail() -> None:
    plan = Plan(EXAMPLES, TrainSection(epochs=1, batch_rows=8, accumulate=4))
    assert [len(plan.step(step)) for step in range(1, plan.steps + 1)] == [4, 4, 4, 1]


def test_padding_is_never_a_target_and_the_first_token_never_one() -> None:
    batch = collate([Example([5, 6, 7], [1, 0, 1]), Example([8, 9, 10, 11, 12], [0, 1, 1, 0, 1])], [0, 1])
    assert batch.targets == 4
    positions, targets = batch.supervised()
    assert positions.tolist() == [1, 4, 5, 7]
    assert targets.tolist() == [7, 9, 10, 12]


def test_evaluation_takes_every_row_once_shortest_first() -> None:
    batches = in_order(EXAMPLES, tokens=1000)
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(103))
    assert all(a.ids.shape[1] <= b.ids.shape[1] for a, b in pairwise(batches))


def test_widths_pad_least() -> None:
    """Against every choice of three widths among the lengths there are."""
    lengths = [5, 5, 6, 9, 9, 9, 14, 20, 21, 40]

    def padded(chosen: list[int]) -> int:
        return sum(min(width for width in chosen if width >= length) for length in lengths)

    best = min(padded([*pair, 40]) for pair in combinations(sorted(set(lengths))[:-1], 2))
    assert padded(widths(lengths, 3)) == best
    assert widths(lengths, 1) == [40]
    assert widths(lengths, 99) == sorted(set(lengths))


@pytest.mark.parametrize("settings", [{"batch_rows": 4}, {"batch_rows": 16}, {"batch_tokens": 2048}])
def test_word_problems_are_padded_below_five_percent_in_few_shapes(settings: dict) -> None:
    """7,473 lengths distributed as GSM8K's are: lognormal, median 207, a tail to some 570."""
    lengths = np.random.default_rng(2).lognormal(np.log(207), 0.27, 7473).clip(80, 570).astype(int).tolist()
    examples = [Example([1] * length, [0] * (length - 1) + [1]) for length in lengths]
    plan = Plan(examples, TrainSection(epochs=1, **settings))
    batches = [batch for step in range(1, plan.steps + 1) for batch in plan.step(step)]
    assert sum(batch.ids.size for batch in batches) < 1.05 * sum(lengths)
    assert len({batch.ids.shape for batch in batches}) <= MAX_BUCKETS + 4


def test_an_order_keeps_its_meaning() -> None:
    """Rows in order of length (a curriculum): batches come in that order too."""
    plan = Plan(EXAMPLES, TrainSection(batch_rows=8))
    order = sorted(range(103), key=LENGTHS.__getitem__)
    places = [np.mean([order.index(row) for row in batch]) for batch in plan._batches(order)]
    assert places == sorted(places)


def test_rows_with_a_common_context_share_batches() -> None:
    """Six documents, seven questions on each, among rows that stand alone; contexts differ from their first token."""
    draw = np.random.default_rng(3)
    documents = [[1, 2, *draw.integers(10, 99, 60).tolist()] for _ in range(6)]
    examples = [
        Example([*documents[index % 6], 100 + index, 7, 8], [0] * 63 + [1, 1])
        for index in draw.permutation(42).tolist()
    ] + [Example([1, 2, 200 + index, *[9] * 50], [0] * 3 + [1] * 50) for index in range(10)]
    plan = Plan(examples, TrainSection(epochs=1, batch_rows=4), grouped=True)
    batches = [batch for step in range(1, plan.steps + 1) for batch in plan.step(step)]
    assert Counter(row for batch in batches for row in batch.rows.tolist()) == Counter(range(52))
    shared = [batch for batch in batches if (batch.ids[:, :62] == batch.ids[:1, :62]).all() and len(batch.rows) > 1]
    assert sum(len(batch.rows) for batch in shared) == 42  # 4 + 3 rows of every document
    first = [frozenset(batch) for batch in plan._epochs[0][0]]
    plan._plan_epoch()
    assert first != [frozenset(batch) for batch in plan._epochs[1][0]]


def test_rows_that_a_mixture_draws_more_than_once_keep_their_number_in_groups() -> None:
    examples = [
        Example([*[5] * (60 * (row < 4)), 100 + row, 7, 8], [0] * (61 if row < 4 else 1) + [1, 1]) for row in range(6)
    ]
    plan = Plan(examples, TrainSection(epochs=1, batch_rows=4), grouped=True)
    drawn = Counter(row for batch in plan._batches([0, 1, 2, 3, 4, 5] * 3) for row in batch)
    assert drawn == Counter(dict.fromkeys(range(6), 3))

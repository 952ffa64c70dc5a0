"""Batches: every row once per epoch, remixed, reproducible, similar lengths together."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest

from mlxtune.config.schema import TrainSection
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import MAX_BUCKETS, Plan, collate, in_order
from mlxtune.data.dataset.cutting import fill
from mlxtune.data.dataset.measured import ListedExamples
from mlxtune.data.dataset.sharing import found_sharing
from mlxtune.data.dataset.widths import widths

LENGTHS = np.random.default_rng(0).integers(5, 200, 103).tolist()
EXAMPLES = [Example(list(range(1, length + 1)), [0] * (length - 3) + [1] * 3) for length in LENGTHS]


# Of the same lengths, no two with a first token in common.
UNLIKE = [Example([1000 + row, *example.ids[1:]], example.mask) for row, example in enumerate(EXAMPLES)]


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
    places = [np.mean([order.index(row) for row in batch]) for batch in plan._dealer.batches(order)]
    assert places == sorted(places)


def documents_of(batch: Any) -> list[tuple[int, ...]]:
    """The document of each row of a batch of `questions_on_documents`, as its tokens."""
    return [tuple(row[:62].tolist()) for row in batch.ids]


def test_rows_with_a_common_context_share_batches() -> None:
    """Seven questions on each of six documents: a full batch of four and a rest of three, which fill batches with
    others; every batch but the last is full.
    """
    examples = questions_on_documents()
    plan = Plan(examples, TrainSection(epochs=1, batch_rows=4), sharing=found_sharing(examples))
    batches = [batch for step in range(1, plan.steps + 1) for batch in plan.step(step)]
    assert Counter(row for batch in batches for row in batch.rows.tolist()) == Counter(range(52))
    assert [len(batch.rows) for batch in batches] == [4] * 13
    alike = [max(Counter(documents_of(batch)).values()) for batch in batches]
    assert alike.count(4) == 6 and max(alike.count(3), alike.count(2)) >= 2
    first = [frozenset(batch) for batch in plan._epochs[0][0]]
    plan._plan_epoch()
    assert first != [frozenset(batch) for batch in plan._epochs[1][0]]


def test_rows_that_a_mixture_draws_more_than_once_keep_their_number_in_groups() -> None:
    examples = [
        Example([*[5] * (60 * (row < 4)), 100 + row, 7, 8], [0] * (61 if row < 4 else 1) + [1, 1]) for row in range(6)
    ]
    plan = Plan(examples, TrainSection(epochs=1, batch_rows=4), sharing=found_sharing(examples))
    drawn = Counter(row for batch in plan._dealer.batches([0, 1, 2, 3, 4, 5] * 3) for row in batch)
    assert drawn == Counter(dict.fromkeys(range(6), 3))


def questions_on_documents() -> list[Example]:
    """Seven questions on each of six documents, and ten rows that stand alone."""
    draw = np.random.default_rng(3)
    documents = [[1, 2, *draw.integers(10, 99, 60).tolist()] for _ in range(6)]
    asked = draw.permutation(42).tolist()
    long = [([*documents[index % 6], 100 + index], 2 + index % 5) for index in asked]
    rows = [Example([*start, *[7] * end], [0] * 63 + [1] * end) for start, end in long]
    return rows + [Example([1, 2, 200 + index, *[9] * 50], [0] * 3 + [1] * 50) for index in range(10)]


@pytest.mark.parametrize(
    ("settings", "alone"),
    [
        ({"epochs": 2, "batch_rows": 8}, "fb6c7de8c3327a61"),
        ({"epochs": 2, "batch_tokens": 512}, "43a675ee9f36d88e"),
        ({"epochs": 2, "batch_rows": 4, "accumulate": 3}, "9fd0bc7bb17a9c45"),
        ({"epochs": 2, "batch_tokens": 150, "accumulate": 2, "seed": 5}, "edfabf2af01f9e56"),
        ({"steps": 40}, "5c29fcd70e24f83f"),
    ],
)
@pytest.mark.parametrize("sharing", [False, True])
def test_a_plan_of_rows_that_share_nothing_stays_what_it_was(settings: Any, alone: str, sharing: bool) -> None:
    """Digests of every batch's rows and shape as planned when a row was one example and nothing was looked for that
    rows share: runs of then can be resumed.
    """
    plan = Plan(EXAMPLES, TrainSection(**settings))
    if sharing:
        plan = Plan(UNLIKE, TrainSection(**settings), found_sharing(UNLIKE))
    steps = [plan.step(number) for number in range(1, plan.steps + 1)]
    told = [[[*map(int, batch.ids.shape), batch.rows.tolist()] for batch in step] for step in steps]
    assert hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest() == alone


def test_a_small_plan_stays_what_it_was() -> None:
    """Rows of 170, 129, 104, 57, 65, 12, 19, 8, 39 and 163 tokens, as planned when a row was one example."""
    by_rows = Plan(EXAMPLES[:10], TrainSection(epochs=1, batch_rows=4))
    by_tokens = Plan(EXAMPLES[:10], TrainSection(epochs=1, batch_tokens=300))
    found = [[plan.step(step)[0].rows.tolist() for step in range(1, plan.steps + 1)] for plan in (by_rows, by_tokens)]
    assert found[0] == [[4, 6, 7, 3], [5, 8, 2, 9], [0, 1]]
    assert found[1] == [[2], [6, 7, 5, 4], [3], [9], [0], [8], [1]]


class Rows(ListedExamples):
    """Examples of rows that give several."""

    row_of: np.ndarray = np.zeros(0)  # [N] the row of each


def conversations(counts: list[int], seed: int = 0) -> Rows:
    """A row of each count of examples, each example the one before and a turn more, its last 3 tokens supervised."""
    draw = np.random.default_rng(seed)
    lengths = [np.cumsum(draw.integers(5, 60, count)).tolist() for count in counts]
    found = Rows([Example([7] * length, [0] * (length - 3) + [1] * 3) for row in lengths for length in row])
    found.row_of = np.repeat(np.arange(len(counts)), counts)
    return found


COUNTS = np.random.default_rng(4).integers(1, 6, 41).tolist()
EXPANDED = conversations(COUNTS)
BY_ROWS = [{"batch_rows": 4}, {"batch_rows": 1}, {"batch_rows": 3, "accumulate": 2}]
BY_TOKENS = [{"batch_tokens": 400}, {"batch_tokens": 64, "accumulate": 3}, {"batch_tokens": 2000, "accumulate": 2}]


@pytest.mark.parametrize("settings", [*BY_ROWS, *BY_TOKENS])
@pytest.mark.parametrize("grouped", [False, True])
def test_all_examples_of_a_row_meet_in_one_step_once_per_epoch(settings: dict, grouped: bool) -> None:
    plan = Plan(EXPANDED, TrainSection(epochs=2, **settings), sharing=found_sharing(EXPANDED) if grouped else None)
    for first, last in ((1, plan._starts[1]), (plan._starts[1] + 1, plan.steps)):
        steps = [Counter(rows_of(plan, number, number)) for number in range(first, last + 1)]
        assert sum(steps, Counter()) == Counter(range(len(EXPANDED)))
        for step in steps:
            whole = {row for index in step for row in [EXPANDED.row_of[index]]}
            assert set(step) == {index for index, row in enumerate(EXPANDED.row_of) if row in whole}
        told = [sorted(plan.rows_of_step(number)) for number in range(first, last + 1)]
        assert told == [sorted({int(EXPANDED.row_of[index]) for index in step}) for step in steps]


@pytest.mark.parametrize("settings", BY_ROWS)
def test_a_step_counts_rows_and_a_micro_batch_examples(settings: dict) -> None:
    plan = Plan(EXPANDED, TrainSection(epochs=1, **settings))
    most, per_step = settings["batch_rows"], settings["batch_rows"] * settings.get("accumulate", 1)
    assert plan.steps == -(-41 // per_step)
    steps = range(1, plan.steps + 1)
    assert sorted(len(plan.rows_of_step(number)) for number in steps)[1:] == [per_step] * (plan.steps - 1)
    assert max(len(batch.rows) for number in steps for batch in plan.step(number)) == most


@pytest.mark.parametrize("settings", BY_TOKENS)
def test_a_budget_of_tokens_holds_for_rows_of_many_examples(settings: dict) -> None:
    """Several rows share a batch only within the budget, with all of their examples; so does every micro-batch, unless
    it is one example.
    """
    plan = Plan(EXPANDED, TrainSection(epochs=1, **settings))
    tokens = settings["batch_tokens"]
    for step in plan._epochs[0]:
        for rows in step:
            parts = plan._cutter.micro_batches(rows)
            padded = sum(min(w for w in plan.widths if w >= len(EXPANDED[i].ids)) for part in parts for i in part)
            assert len(rows) == 1 or padded <= tokens
            assert all(len(part) == 1 or len(part) * plan.width(part) <= tokens for part in parts)
    if tokens == 2000:
        assert plan.rows_per_batch > 3


def test_rows_meet_in_buckets_and_batches_come_where_their_rows_are_on_average() -> None:
    """Rows of 4, 30, 9, 10 and 8 tokens, two in a batch: as `batches` shows it."""
    examples = [Example([7] * length, [0] * (length - 1) + [1]) for length in (4, 30, 9, 10, 8)]
    plan = Plan(examples, TrainSection(epochs=1, batch_rows=2))
    assert plan.widths == widths([4, 30, 9, 10, 8], 2) == [10, 30]
    assert plan._dealer.batches([0, 1, 2, 3, 4]) == [[0, 2], [1], [3, 4]]


def test_as_many_rows_share_a_batch_as_fit_its_tokens() -> None:
    """Rows of 10 + 20, 20 and 20 tokens, in this order, in batches of 50 padded tokens: the first two fill one."""
    examples = Rows([Example([7] * length, [0] * (length - 1) + [1]) for length in (10, 20, 20, 20)])
    examples.row_of = np.array([0, 0, 1, 2])
    plan = Plan(examples, TrainSection(epochs=1, batch_tokens=50))
    assert plan.widths == [10, 20]
    assert plan._dealer.batches([0, 1, 2]) == [[0, 1], [2]]
    assert plan._dealer.batches([1, 2, 0]) == [[1, 2], [0]]


def test_the_examples_of_a_batch_of_rows_are_padded_little() -> None:
    """Examples of 10 to 300 tokens in a batch: as one batch they would be padded by some 90%."""
    plan = Plan(conversations([1, 2, 3, 4, 5] * 40), TrainSection(epochs=1, batch_rows=8))
    batches = [batch for step in range(1, plan.steps + 1) for batch in plan.step(step)]
    assert sum(batch.ids.size for batch in batches) < 1.25 * sum(batch.tokens for batch in batches)
    assert len({batch.ids.shape[1] for batch in batches}) <= MAX_BUCKETS
    assert plan.shapes() == [(*batch.ids.shape, batch.targets) for batch in batches]


def test_rows_of_several_examples_are_grouped_by_their_first() -> None:
    """Two documents, six conversations of three turns on each: both turns after the first go where the first goes."""
    counts = [3] * 12
    made = []
    for row in range(12):
        start = [1, 2, *[50 + row % 2] * 60]
        for turn in (1, 2, 3):
            made.append(Example([*start, *[100 + row] * (6 * turn)], [0] * (59 + 6 * turn) + [1] * 3))
    examples = Rows(made)
    examples.row_of = np.repeat(np.arange(12), counts)
    plan = Plan(examples, TrainSection(epochs=1, batch_rows=3), sharing=found_sharing(examples))
    batches = [batch for step in range(1, plan.steps + 1) for batch in plan.step(step)]
    assert Counter(row for batch in batches for row in batch.rows.tolist()) == Counter(range(36))
    assert [sorted({row % 2 for row in plan.rows_of_step(step)}) for step in range(1, 5)].count([0]) == 2
    assert all(len(set(batch.ids[:, 2].tolist())) == 1 for batch in batches)


def test_a_million_rows_are_planned_in_seconds() -> None:
    class Many(ListedExamples):
        lengths: np.ndarray = np.random.default_rng(1).integers(5, 2000, 1_000_000)
        row_of: np.ndarray = np.repeat(np.arange(600_000), np.tile([1, 1, 3], 200_000))

        def __len__(self) -> int:
            return 1_000_000

    began = time.process_time()
    plan = Plan(Many([]), TrainSection(epochs=1, batch_tokens=4096))
    assert time.process_time() - began < 30
    assert sum(len(rows) for step in plan._epochs[0] for rows in step) == 600_000

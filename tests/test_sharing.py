"""What begins alike is found, meets, and is counted by what is computed of it."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mlxtune.config.schema import TrainSection
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import DEALT, Batch, Plan, collate, in_order, side_by_side
from mlxtune.data.dataset.beginnings import first_target
from mlxtune.data.dataset.cutting import Cutter
from mlxtune.data.dataset.dealing import Dealer
from mlxtune.data.dataset.forest import forest_of
from mlxtune.data.dataset.measured import ListedExamples
from mlxtune.data.dataset.sharing import Group, Sharing, found_sharing, nothing_shared

S, D, P, END = [1] * 40, [2] * 35, [3] * 50, 3  # beginnings, and the supervised tokens at the end of every example


def example(*parts: list[int]) -> Example:
    """Tokens, of which the last ones are supervised."""
    ids = [token for part in parts for token in part]
    return Example([*ids, *[9] * END], [0] * len(ids) + [1] * END)


class Rows(ListedExamples):
    """Examples of rows that give several; counts how often each is read."""

    def __init__(self, rows: list[list[Example]]) -> None:
        super().__init__([example for row in rows for example in row])
        self.row_of_each = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        self.read: Counter[int] = Counter()

    def __getitem__(self, index: Any) -> Any:
        self.read[index] += 1
        return super().__getitem__(index)

    @property
    def row_of(self) -> np.ndarray:
        return self.row_of_each


def picture() -> list[Example]:
    """The rows of `sharing`'s own picture."""
    ends = [[10], [11], [*P, 12], [*P, 13]]
    return [example(S, D, end) for end in ends] + [example(S, [14]), example(S, [15])]


def test_no_examples_share_nothing_and_make_no_batches() -> None:
    found = found_sharing([])
    assert (found.saved.tolist(), found.group_of, found.beyond_all) == ([], [], False)
    assert side_by_side([], 100, found) == in_order([], 100) == []


def test_groups_are_found_inside_one_another() -> None:
    found = found_sharing(picture())
    assert found.groups == [Group(40, 0, 0), Group(75, 0, 1), Group(125, 1, 2)]
    assert found.group_of == [1, 1, 2, 2, 0, 0] and found.beyond_all
    pairs = {(0, 1): 75, (2, 3): 125, (1, 2): 75, (3, 0): 75, (4, 5): 40, (5, 2): 40, (2, 2): 125}
    assert {pair: found.between(*pair) for pair in pairs} == pairs


def test_a_beginning_is_shared_only_before_what_predicts_the_first_target() -> None:
    """Two rows of which the second is supervised from its token 50 on: what predicts it is token 49."""
    early = Example([*S, *D, 10], [0] * 50 + [1] * 26)
    assert found_sharing([early, example(S, D, [11])]).groups == [Group(49, 0, 0)]
    # Where one may share 40 tokens less, groups are of those that may.
    late = [example(S, D, [token]) for token in (11, 12)]
    found = found_sharing([Example([*S, *D], [0] + [1] * 74), *late])
    assert found.groups == [Group(0, 0, 0), Group(75, 0, 1)] and found.group_of == [0, 1, 1]


def test_an_answer_is_computed_where_it_is_a_target_and_again_where_it_is_history() -> None:
    """Of two turns the first answer begins at token 42, so that token 41 predicts it and 41 tokens may be shared."""
    first = example(S, [10, 11])
    second = example(list(first.ids), [12, 13])
    assert found_sharing(Rows([[first, second]])).saved.tolist() == [41, 0]


def test_as_many_rows_fill_a_budget_as_are_computed_in_it() -> None:
    """Rows of 110 tokens, of which they share 100: ten of them compute 110 + 9 * 10 = 200 tokens."""
    rows = [example([5] * 100, [100 + row] * 7) for row in range(20)]
    plan = Plan(rows, TrainSection(epochs=1, batch_tokens=200), found_sharing(rows))
    assert [[len(batch.rows) for batch in plan.step(number)] for number in (1, 2)] == [[10], [10]]
    assert plan.steps == 2 and plan.dealt == DEALT
    assert [len(batch.rows) for batch in plan.computed_whole().step(1)] == [1] * 10


def conversation(draw: np.random.Generator, turns: int, start: list[int]) -> list[Example]:
    """Each turn an example: its history, and an answer that later turns repeat without its first tokens, as templates
    do that strip what was thought.
    """
    history, examples = list(start), []
    for _ in range(turns):
        history += draw.integers(20, 900, draw.integers(4, 60)).tolist()
        thought, answer = [draw.integers(20, 900, draw.integers(5, 40)).tolist() for _ in range(2)]
        examples.append(Example([*history, *thought, *answer], [0] * len(history) + [1] * (len(thought) + len(answer))))
        history += answer
    return examples


def conversations(rows: int, seed: int = 0) -> Rows:
    """Of one to nine turns, behind one of three system prompts."""
    draw = np.random.default_rng(seed)
    starts = [[1, 2, 3, *draw.integers(20, 900, length).tolist()] for length in (10, 90, 200)]
    return Rows([conversation(draw, int(draw.integers(1, 10)), starts[row % 3]) for row in range(rows)])


def of_row(rows: Rows, row: int) -> list[Example]:
    return [rows.examples[index] for index in np.flatnonzero(rows.row_of == row).tolist()]


def computed(examples: list[Example]) -> int:
    return forest_of([one.ids for one in examples], [first_target(one) - 1 for one in examples]).computed


def test_what_a_row_computes_is_what_its_forest_computes_but_for_padding() -> None:
    rows = conversations(40)
    found = found_sharing(rows)
    counted = exact = 0
    for row in range(40):
        own = rows.row_of == row
        counted += int((rows.lengths[own] - 1 - found.saved[own]).sum())
        exact += computed(of_row(rows, row))
    assert exact == pytest.approx(counted, rel=0.05)
    assert exact < 0.4 * sum(rows.lengths)


SETTINGS = [{"batch_rows": 4}, {"batch_rows": 1}, {"batch_rows": 3, "accumulate": 2}]
PADDED = 1.12  # of what is counted: branches of one pass are padded to the longest, where that saves a pass
BY_TOKENS = [{"batch_tokens": 1500}, {"batch_tokens": 700, "accumulate": 3}]


@pytest.mark.parametrize("settings", [*SETTINGS, *BY_TOKENS])
def test_every_row_comes_once_per_epoch_with_all_of_its_examples_in_one_step(settings: dict[str, int]) -> None:
    rows = conversations(41)
    plan = Plan(rows, TrainSection(epochs=2, **settings), found_sharing(rows))
    orders = []
    for first, last in ((1, plan._starts[1]), (plan._starts[1] + 1, plan.steps)):
        numbers = range(first, last + 1)
        steps = [[int(index) for batch in plan.step(number) for index in batch.rows] for number in numbers]
        assert Counter(index for step in steps for index in step) == Counter(range(len(rows)))
        told = [sorted(plan.rows_of_step(number)) for number in numbers]
        assert told == [sorted({int(rows.row_of[index]) for index in step}) for step in steps]
        orders.append(told)
    assert orders[0] != orders[1]
    again = Plan(rows, TrainSection(epochs=2, **settings), found_sharing(rows))
    assert [b.rows.tolist() for b in again.step(plan.steps)] == [b.rows.tolist() for b in plan.step(plan.steps)]


@pytest.mark.parametrize("settings", SETTINGS)
def test_batches_count_rows_and_micro_batches_what_is_computed(settings: dict[str, int]) -> None:
    """Full batches but the last; as many tokens in a micro-batch as `batch_rows` of the longest have."""
    rows = conversations(41)
    plan = Plan(rows, TrainSection(epochs=1, **settings), found_sharing(rows))
    size = settings["batch_rows"]
    assert sorted(len(batch) for step in plan._epochs[0] for batch in step)[1:] == [size] * (-(-41 // size) - 1)
    limit = PADDED * size * plan.widths[-1]
    micro_batches = list(plan.micro_batches())
    assert all(computed([rows.examples[i] for i in found]) <= limit for found in micro_batches)
    together = sum(len({int(rows.row_of[index]) for index in found}) for found in micro_batches)
    assert together == 41 + (0 if size > 1 else sum_of_pieces_beyond_the_first(plan, rows))
    assert plan.divided == (0 if size > 1 else plan.divided)


def sum_of_pieces_beyond_the_first(plan: Plan, rows: Rows) -> int:
    pieces = Counter(row for found in plan.micro_batches() for row in {int(rows.row_of[index]) for index in found})
    assert sum(count > 1 for count in pieces.values()) == plan.divided
    return sum(pieces.values()) - len(pieces)


@pytest.mark.parametrize("settings", BY_TOKENS)
def test_a_budget_of_tokens_counts_what_is_computed(settings: dict[str, int]) -> None:
    """Every micro-batch of several examples is within it, and rows need far fewer of them than computed whole."""
    rows = conversations(41)
    tokens = settings["batch_tokens"]
    plan = Plan(rows, TrainSection(epochs=1, **settings), found_sharing(rows))
    micro_batches = [[rows.examples[index] for index in found] for found in plan.micro_batches()]
    several = [found for found in micro_batches if len(found) > 1]
    assert several and max(computed(found) for found in several) <= PADDED * tokens
    apart = Plan(rows, TrainSection(epochs=1, **settings))
    assert len(micro_batches) < 0.7 * len(list(apart.micro_batches()))
    assert sum(map(computed, micro_batches)) < 0.6 * sum(map(computed, ([e] for e in rows.examples)))


def test_rows_that_begin_alike_are_dealt_as_the_picture_shows() -> None:
    """`dealing`'s own: seven questions on each of two documents, four to a batch."""
    groups = [Group(0, 0, 0), Group(50, 0, 1), Group(50, 0, 1)]
    sharing = Sharing(np.zeros(14, np.int64), [1] * 7 + [2] * 7, groups)
    dealer = Dealer(4, 0, [10], [0] * 14, [0] * 14, sharing)
    batches = [sorted(batch) for batch in dealer.batches(list(range(14)))]
    assert batches == [[0, 1, 2, 3], [7, 8, 9, 10], [4, 5, 6, 11], [12, 13]] or sorted(batches) == sorted(
        [[0, 1, 2, 3], [4, 11, 12, 13], [5, 6], [7, 8, 9, 10]]
    )


def test_a_batch_is_cut_as_the_picture_shows() -> None:
    """`cutting`'s own: three conversations in micro-batches of 1,000 tokens."""
    lengths = np.array([100, 300, 500, 200, 400, 300, 600, 900, 950])
    saved = np.array([90, 290, 0, 180, 0, 250, 550, 850, 0])
    sharing = Sharing(saved, [1, 1, 0], [Group(0, 0, 0), Group(80, 0, 1)])
    cutter = Cutter(lengths, lengths - saved, np.array([0, 3, 5, 9]), None, 1000, sharing)
    assert cutter.micro_batches([0, 1, 2]) == [[0, 1, 2, 3, 4], [5, 6, 7], [8]]
    assert cutter.divided([0, 1, 2]) == 1
    assert cutter.whole_examples([0, 1, 2, 3, 4], 500) == 3  # 10 + 10 + 500 and 20 + 500 tokens


def test_a_way_that_shares_nothing_has_the_same_steps_in_small_micro_batches() -> None:
    rows = conversations(20)
    plan = Plan(rows, TrainSection(epochs=1, batch_rows=4), found_sharing(rows))
    whole = plan.computed_whole()
    for number in range(1, plan.steps + 1):
        assert whole.rows_of_step(number) == plan.rows_of_step(number)
        assert max(len(batch.rows) for batch in whole.step(number)) <= 4
    assert whole.with_settings(TrainSection(epochs=1, batch_rows=2)).shapes() != []
    assert all(count <= 2 for count, _, _ in whole.with_settings(TrainSection(epochs=1, batch_rows=2)).shapes())


def test_the_shapes_of_a_memory_plan_have_as_many_tokens_as_the_rows_compute() -> None:
    """Examples of a row count as many of the full width; they would be nine times as many as they are computed."""
    rows = conversations(40)
    plan = Plan(rows, TrainSection(epochs=1, batch_rows=4), found_sharing(rows))
    for (count, width, targets), found in zip(plan.shapes(), plan.micro_batches(), strict=True):
        batch = collate(rows, found, width)
        assert targets == batch.targets
        exact = computed([rows.examples[index] for index in found])
        assert exact <= count * width <= 2 * exact + width


def test_looking_for_what_is_shared_reads_each_example_a_few_times() -> None:
    """However many rows there are: a million of them are looked through in bounded time. Rows here are in groups three
    deep, and the deepest are read once more for each group that they are in.
    """
    draw = np.random.default_rng(2)
    rows = []
    for row in range(300):
        start = [*S, *[100 + row % 2] * 40, *[200 + row % 20] * 40]
        rows.append([example(start, draw.integers(300, 999, 5).tolist())])
    rows = Rows(rows)
    found = found_sharing(rows)
    assert max(group.depth for group in found.groups) == 2
    assert max(rows.read.values()) <= 2 + 2 * 3 + 1


def test_held_out_conversations_are_computed_once_too() -> None:
    """Each example once; in order of length the same number of tokens at once shares far less."""
    rows = conversations(12)
    batches = side_by_side(rows, 1500, found_sharing(rows))
    assert sorted(index for batch in batches for index in batch.rows.tolist()) == list(range(len(rows)))

    def of_all(batches: list[Batch]) -> int:
        return sum(computed([rows.examples[index] for index in batch.rows]) for batch in batches)

    assert of_all(batches) < 0.5 * of_all(in_order(rows, 1500))


def test_rows_that_share_nothing_are_no_groups() -> None:
    unlike = [Example([token, *[7] * 60], [0] * 50 + [1] * 11) for token in range(30)]
    found = found_sharing(unlike)
    assert (found.group_of, found.groups) == (nothing_shared(30, 30).group_of, [Group(0, 0, 0)])
    assert not found.beyond_all
    assert Plan(unlike, TrainSection(), found).dealt == "" == Plan(unlike, TrainSection()).dealt


def test_a_curriculum_keeps_its_order_on_average() -> None:
    plan = Plan(picture() * 5, TrainSection(batch_rows=2), found_sharing(picture() * 5))
    order = list(range(30))
    places = [np.mean([order.index(row) for row in batch]) for batch in plan._dealer.batches(order)]
    assert all(a <= b for a, b in pairwise(places))

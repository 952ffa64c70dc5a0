"""Batches of pairs and rated answers: whole rows, their answers numbered, each prompt computed once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from mlxtune.config.schema import TrainSection
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Batch, Plan, collate, in_order, side_by_side
from mlxtune.data.dataset.forest import forest_of
from mlxtune.data.dataset.measured import ListedExamples
from mlxtune.data.dataset.sharing import found_sharing
from mlxtune.data.rows.sides import Side

C, R, G, B = Side.CHOSEN, Side.REJECTED, Side.GOOD, Side.BAD


def listed(*shapes: tuple[int, int, int]) -> ListedExamples:
    """A pair for each (tokens of the prompt, of the chosen answer, of the rejected one); no two prompts begin alike."""
    examples, sides = [], []
    for number, (prompt, *answers) in enumerate(shapes):
        for side, length in zip((C, R), answers, strict=True):
            ids = [1000 + number, *range(1, prompt), *range(500 + 100 * side, 500 + 100 * side + length)]
            examples.append(Example(ids, [0] * prompt + [1] * length))
            sides.append(int(side))
    return ListedExamples(examples, sides)


SHAPES = [tuple(int(n) for n in row) for row in np.random.default_rng(0).integers((40, 5, 5), (90, 40, 60), (25, 3))]
PAIRS = listed(*SHAPES)  # type: ignore[arg-type]


def require_whole(batch: Batch) -> None:
    """Chosen and rejected of each pair stand beside each other."""
    assert batch.answer_sides.tolist() == [C, R] * batch.pairs
    assert batch.rows.tolist() == [row for first in batch.rows[::2] for row in (first, first + 1)]
    assert not np.any(batch.rows[::2] % 2)
    assert batch.answer_tokens.sum() == batch.targets


@pytest.mark.parametrize("sharing", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize(
    "settings", [{"batch_rows": 4}, {"batch_tokens": 500}, {"batch_tokens": 100}, {"batch_rows": 2, "accumulate": 3}]
)
def test_an_epoch_takes_every_pair_once_and_none_is_divided(settings: dict[str, Any], sharing: bool) -> None:
    plan = Plan(PAIRS, TrainSection(epochs=1, **settings), found_sharing(PAIRS) if sharing else None)
    seen: Counter[int] = Counter()
    for plan_of_way in (plan, plan.computed_whole()):
        seen.clear()
        for step in range(1, plan.steps + 1):
            batches = plan_of_way.step(step)
            if "batch_rows" in settings:
                assert len(batches) <= settings.get("accumulate", 1)
                assert all(batch.pairs <= settings["batch_rows"] for batch in batches)
            for batch in batches:
                require_whole(batch)
                seen.update(batch.rows.tolist())
        assert seen == Counter(range(50))
    assert plan.divided == 0


def test_batch_rows_counts_pairs() -> None:
    plan = Plan(PAIRS, TrainSection(epochs=1, batch_rows=4), found_sharing(PAIRS))
    assert (plan.rows, plan.steps, plan.rows_per_batch) == (25, 7, 25 / 7)
    assert sorted(plan.step(step)[0].pairs for step in range(1, 8)) == [1, 4, 4, 4, 4, 4, 4]


def test_a_batch_of_tokens_counts_what_is_computed() -> None:
    """Of a pair its prompt once; alone each side counts with its prompt."""
    alike = listed(*[(100, 20, 20)] * 12)
    shared = Plan(alike, TrainSection(epochs=1, batch_tokens=600), found_sharing(alike))
    alone = Plan(alike, TrainSection(epochs=1, batch_tokens=600))
    assert [batch.pairs for step in range(1, 4) for batch in shared.step(step)] == [4, 4, 4]  # 141 tokens each
    assert {batch.pairs for step in range(1, alone.steps + 1) for batch in alone.step(step)} == {2}  # 240 each


def test_a_pair_computes_its_prompt_once() -> None:
    """A trunk of all but the prompt's last token, which predicts the first target; the last token predicts nothing."""
    several = [(128, 64, 64), (100, 30, 30), (90, 80, 10), (60, 20, 20)]
    for pairs in ([(128, 64, 64)], [(128, 64, 20)], several):
        examples = listed(*pairs)
        plan = Plan(examples, TrainSection(epochs=1, batch_rows=4), found_sharing(examples))
        (batch,) = plan.step(1)
        rows = [batch.ids[row, :length] for row, length in enumerate(batch.lengths)]
        found = forest_of(rows, [int(mask.argmax()) - 1 for mask in batch.mask])
        assert found.computed == sum((prompt - 1) + chosen + rejected for prompt, chosen, rejected in pairs)


def test_held_out_pairs_are_whole() -> None:
    for batches in (in_order(PAIRS, tokens=600), side_by_side(PAIRS, 600, found_sharing(PAIRS))):
        assert len(batches) > 3
        for batch in batches:
            require_whole(batch)
        assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(50))
    assert all(batch.ids.size <= 600 for batch in in_order(PAIRS, tokens=600))


def test_part_of_a_batch_numbers_its_answers_from_nought() -> None:
    batch = collate(PAIRS, range(8))
    assert batch.whole_parts == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    for rows in (slice(2, 6), np.array([2, 3, 4, 5])):
        part = batch.part(rows)
        assert (part.answer_of.tolist(), part.sides.tolist()) == ([0, 1, 2, 3], [C, R, C, R])
        assert part.answer_tokens.tolist() == batch.answer_tokens[2:6].tolist()
        require_whole(part)


def test_a_row_that_is_drawn_twice_is_two_pairs() -> None:
    batch = collate(PAIRS, [0, 1, 0, 1])
    assert (batch.answers, batch.pairs) == (4, 2)
    rated = ListedExamples(PAIRS.examples[:2], [G, B])
    assert collate(rated, [0, 0, 1]).answer_of.tolist() == [0, 1, 2]


def test_ordinary_examples_are_each_an_answer_without_a_side() -> None:
    batch = collate(PAIRS.examples, range(4))
    assert (batch.answers, batch.pairs, batch.sides.tolist()) == (4, 0, [0] * 4)
    assert batch.part(slice(1, 3)).answer_of.tolist() == [0, 1]
    assert batch.whole_parts == [slice(row, row + 1) for row in range(4)]

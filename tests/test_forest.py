"""Rows of a micro-batch become passes in which shared beginnings are computed once."""

from __future__ import annotations

import numpy as np
import pytest

from mlxtune.data.dataset import forest
from mlxtune.data.dataset.forest import Forest, Pass, forest_of, left_at_ends


def random_rows(draw: np.random.Generator, count: int) -> tuple[list[list[int]], list[int]]:
    """(rows of a random trie, how much of each may be shared): each begins like an earlier one, or like none."""
    rows: list[list[int]] = []
    for _ in range(count):
        before: list[int] = []
        if rows and draw.random() < 0.85:
            earlier = rows[draw.integers(len(rows))]
            before = earlier[: draw.integers(len(earlier))]
        rows.append(before + draw.integers(0, 50, draw.integers(2, 80)).tolist())
    return rows, [int(draw.integers(0, len(row) - 1)) for row in rows]


def tokens_of(found: Forest, rows: list[list[int]], place: int | None, until: int) -> list[int]:
    """The first `until` tokens that lie in a trunk and in those before it."""
    if place is None:
        assert until == 0
        return []
    trunk = found.passes[place]
    assert trunk.is_trunk and len(trunk.rows) == 1 and until <= trunk.start + trunk.width
    before = tokens_of(found, rows, trunk.leaves, trunk.start)
    own = rows[trunk.rows[0]][trunk.start : until]
    return before + own


def in_a_trie(rows: list[list[int]], may_share: list[int]) -> int:
    """The fewest tokens there can be: each beginning that may be shared once, and the rest of every row."""
    beginnings = {tuple(row[:stop]) for row, most in zip(rows, may_share, strict=True) for stop in range(1, most + 1)}
    return len(beginnings) + sum(len(row) - 1 - most for row, most in zip(rows, may_share, strict=True))


def test_a_conversation_of_two_turns_is_a_trunk_and_two_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forest, "A_PASS", 0)
    monkeypatch.setattr(forest, "MIN_SUFFIX", 1)
    system, first, answer, second = [1, 2], [3, 4], [5, 6], [7, 8]
    rows = [[*system, *first, 20, *answer], [*system, *first, *answer, *second, 21, 9]]
    found = forest_of([*rows, rows[1]], [4, 8, 8])
    assert found.passes == (
        Pass((1,), 0, 8, None, is_trunk=True),
        Pass((0,), 4, 2, 0),
        Pass((1, 2), 8, 1, 0),
    )
    assert found.computed == 8 + 2 + 2


def test_two_conversations_behind_one_system_prompt_have_trunks_that_share_it() -> None:
    system = list(range(100, 200))
    rows = []
    for conversation in (0, 1):
        history = [*system, *range(1000 * (conversation + 1), 1000 * (conversation + 1) + 120)]
        rows += [[*history[:160], *range(40)], [*history[:190], *range(40)], [*history, *range(40)]]
    found = forest_of(rows, [160, 190, 220] * 2)
    trunks = [each for each in found.passes if each.is_trunk]
    assert [(each.start, each.width, each.leaves) for each in trunks] == [(0, 190, None), (100, 90, 0)]
    # The last two rows of each part within A_PASS tokens of each other, and share a pass.
    assert found.computed == 190 + 90 + 2 * (39 + 2 * 69)


def test_rows_that_share_nothing_are_one_pass() -> None:
    found = forest_of([[1, 2, 3], [4, 5, 6, 7]], [1, 2])
    assert found.passes == (Pass((0, 1), 0, 3, None),)
    assert not found.shares


def test_a_share_that_gains_next_to_nothing_is_not_made() -> None:
    long = list(range(2000))
    rows = [[*range(5000, 5060), *long], [*range(5000, 5060), *long[1:]]]
    assert not forest_of(rows, [60, 60]).shares
    assert forest_of([row[:400] for row in rows], [60, 60]).shares


@pytest.mark.parametrize("seed", range(60))
def test_every_row_of_a_random_trie_is_computed_whole_and_once(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows, may_share = random_rows(draw, int(draw.integers(1, 25)))
    found = forest_of(rows, may_share)
    seen = []
    for place, each in enumerate(found.passes):
        assert each.leaves is None or each.leaves < place
        for row in each.rows:
            assert each.start <= may_share[row] or each.start == 0
            assert tokens_of(found, rows, each.leaves, each.start) == rows[row][: each.start]
            if each.is_trunk:
                assert each.start + each.width <= may_share[row]
            else:
                assert each.start + each.width >= len(rows[row]) - 1
                seen.append(row)
    assert sorted(seen) == list(range(len(rows)))
    whole = len(rows) * (max(map(len, rows)) - 1)
    assert in_a_trie(rows, may_share) <= found.computed <= whole


def test_a_trunk_is_cut_wherever_it_is_left() -> None:
    trunk, other = Pass((0,), 0, 9, None, is_trunk=True), Pass((2,), 6, 5, 0, is_trunk=True)
    branches = (Pass((0,), 4, 3, 0), Pass((1,), 9, 2, 0), Pass((2, 3), 11, 2, 1), Pass((4,), 6, 2, 0))
    found = left_at_ends(Forest((trunk, other, *branches)))
    assert found.passes == (
        Pass((0,), 0, 4, None, is_trunk=True),
        Pass((0,), 4, 2, 0, is_trunk=True),
        Pass((0,), 6, 3, 1, is_trunk=True),
        Pass((2,), 6, 5, 1, is_trunk=True),
        Pass((0,), 4, 3, 0),
        Pass((1,), 9, 2, 2),
        Pass((2, 3), 11, 2, 3),
        Pass((4,), 6, 2, 1),
    )


@pytest.mark.parametrize("seed", range(60))
def test_cut_trunks_have_the_same_tokens_and_are_left_at_their_ends(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows, may_share = random_rows(draw, int(draw.integers(1, 25)))
    whole = forest_of(rows, may_share)
    found = left_at_ends(whole)
    assert found.computed == whole.computed and left_at_ends(found) == found
    for place, each in enumerate(found.passes):
        if each.leaves is not None:
            trunk = found.passes[each.leaves]
            assert each.leaves < place and trunk.is_trunk and trunk.start + trunk.width == each.start
        for row in each.rows:
            assert tokens_of(found, rows, each.leaves, each.start) == rows[row][: each.start]
    branches = [(each.rows, each.start, each.width) for each in whole.passes if not each.is_trunk]
    assert branches == [(each.rows, each.start, each.width) for each in found.passes if not each.is_trunk]

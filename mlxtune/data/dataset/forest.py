"""One trunk, many branches: the rows of a micro-batch as passes through the model in which shared beginnings are
computed once.

A conversation of two turns, each behind the very prompt that asks for it, gives two rows. The second repeats the first
but for the thinking, which templates strip from earlier turns:

    row 0   S U t t A          S: system prompt, U, V: questions, t: thinking, A, B: answers (t, A and B are targets)
    row 1   S U A V t B

    pass 0  S U A V            the trunk: no row's target is predicted in it, so nothing but keys and values is needed
    pass 1      t t A          row 0 leaves it after 2 tokens and attends to those two, then to itself
    pass 2            t B      row 1 leaves it at its end

    computed   4 + 3 + 2 tokens instead of 5 + 6

Every row of a pass leaves one trunk at one depth. So its positions count on from one number and its mask is the
ordinary causal one: no row has a mask of its own, which matters on a GPU, where only that mask has a backward pass in
linear memory. A row may leave earlier than it must, and then computes some shared tokens again. So rows that leave
near each other share a pass where that costs less than a pass more (`A_PASS`), and depths are few.

The rows' beginnings form a trie. A trunk follows it from where it starts towards most rows, until fewer than two are
left on its way. Other rows leave it where the trie parts; where several part together and go on together, they get a
trunk of their own, which leaves the first one: two conversations behind one system prompt.

Rejected: one pass for all branches, with masks and positions by row. It pads every row to the longest branch and to
the deepest trunk, and attention then keeps a score for each pair of tokens.

Legend: R rows of a micro-batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from mlxtune.data.dataset.beginnings import common

# Up to 8 queries MLX's attention on Metal has kernels of its own, for generation. A gradient takes none of them (in
# MLX's source `is_training` turns them off), so nothing is known to fail below 9; staying above costs a few tokens.
MIN_SUFFIX = 9
MIN_SAVED = 0.04  # share of a batch's tokens; below, a pass more costs what it saves
# Tokens that a pass more must save: the kernels of a pass of few tokens take as long as those of some more.
A_PASS = 32


@dataclass(frozen=True)
class Pass:
    """Tokens that go through the model together: a trunk's, or those of rows that leave one trunk at one depth."""

    rows: tuple[int, ...]  # of the micro-batch; a trunk has one, and any row that runs along it would do
    start: int  # how many tokens of each row lie before the pass: all in its trunk
    width: int  # tokens of each row in the pass, padding included
    leaves: int | None  # the pass that is its trunk, by its place in the forest; None: it begins at the rows' beginning
    is_trunk: bool = False  # only keys and values are needed of it

    @property
    def computed(self) -> int:
        """Positions that go through the blocks."""
        return len(self.rows) * self.width


@dataclass(frozen=True)
class Forest:
    """The passes of a micro-batch, each after the one that it leaves."""

    passes: tuple[Pass, ...]  # in the order in which they are computed

    @property
    def computed(self) -> int:
        """Positions that go through the blocks, padding included."""
        return sum(each.computed for each in self.passes)

    @property
    def shares(self) -> bool:
        """Whether anything is computed once for several rows."""
        return any(each.is_trunk for each in self.passes)


def whole(rows: int, width: int) -> Forest:
    """One pass of `rows` whole rows of `width` tokens."""
    return Forest((Pass(tuple(range(rows)), 0, width, None),))


def behind_one_trunk(rows: int, width: int, length: int) -> Forest:
    """A trunk of `length` tokens that `rows` rows of `width` tokens leave at its end; 0: there is none."""
    if not length:
        return whole(rows, width)
    suffix = max(MIN_SUFFIX, width - length)
    return Forest((Pass((0,), 0, length, None, is_trunk=True), Pass(tuple(range(rows)), length, suffix, 0)))


def forest_of(rows: Sequence[Any], may_share: Sequence[int]) -> Forest:
    """The passes for the rows of a micro-batch; a single one, of the whole rows, where sharing gains nothing.

    rows: token ids of each, [T] of any lengths from 2 on; may_share: how many leading tokens of each may lie in a
    trunk, which ends before the position that predicts the row's first target.
    """
    lengths = [len(row) - 1 for row in rows]  # the last token predicts nothing
    unshared = whole(len(rows), max(lengths))
    beginnings = [np.asarray(row[:most], np.int32) for row, most in zip(rows, may_share, strict=True)]
    trie = _Trie(beginnings)
    trunks, leaving = _trunks(trie)
    if not trunks:
        return unshared
    branches: list[Pass] = []
    for trunk, members in leaving.items():
        branches += _branches(members, lengths, trunk)
    forest = Forest((*_as_long_as_needed(trunks, branches), *branches))
    return forest if forest.computed <= (1 - MIN_SAVED) * unshared.computed else unshared


def left_at_ends(found: Forest) -> Forest:
    """The same passes, with each trunk cut wherever another pass leaves it, so that all leave one at its very end: what
    a layer hands on may be of that depth alone.

        a trunk of 9 tokens, left after 4 and after 9   ->   4 tokens, then 5 that leave them
    """
    leaves = [_holding(found, each) for each in found.passes]  # the trunk that each leaves
    depths: list[set[int]] = [set() for _ in found.passes]  # at which each is left, and where it ends
    for each, trunk in zip(found.passes, leaves, strict=True):
        if trunk is not None:
            depths[trunk].add(each.start)
    passes: list[Pass] = []
    ending: dict[tuple[int, int], int] = {}  # by (trunk, depth): the piece that ends there
    for place, each in enumerate(found.passes):
        trunk = leaves[place]
        before = None if trunk is None else ending[trunk, each.start]
        if not each.is_trunk:
            passes.append(replace(each, leaves=before))
            continue
        start = each.start
        for depth in sorted(depths[place] | {each.start + each.width}):
            passes.append(replace(each, start=start, width=depth - start, leaves=before))
            before = ending[place, depth] = len(passes) - 1
            start = depth
    return Forest(tuple(passes))


def _holding(found: Forest, each: Pass) -> int | None:
    """Of the trunk that a pass leaves and those before it, the one that has the last token before the pass."""
    trunk = each.leaves
    while trunk is not None and each.start <= found.passes[trunk].start:
        trunk = found.passes[trunk].leaves
    return trunk


class _Trie:
    """The rows' beginnings in an order in which those that begin alike come one after the other.

    place   0        1        2
    row     S U A V  S U t    S W        `shared` is [0, 2, 1]: with the row before
    """

    def __init__(self, beginnings: list[np.ndarray]) -> None:
        as_bytes = [beginning.astype(">i4").tobytes() for beginning in beginnings]  # big-endian: they sort as ids do
        self.rows = sorted(range(len(beginnings)), key=as_bytes.__getitem__)  # [R] the row at each place
        self.shared = np.zeros(len(beginnings), np.int64)
        for place in range(1, len(beginnings)):
            before, row = self.rows[place - 1], self.rows[place]
            self.shared[place] = common(beginnings[before], beginnings[row])

    def parting(self, first: int, end: int) -> tuple[int, list[tuple[int, int]]]:
        """(how many tokens the rows at two and more places share, the runs of places that go on together after)."""
        depth = int(self.shared[first + 1 : end].min())
        cuts = first + 1 + np.flatnonzero(self.shared[first + 1 : end] == depth)
        edges = [first, *cuts.tolist(), end]
        return depth, list(pairwise(edges))


@dataclass(frozen=True)
class _Chain:
    """A way through the trie, towards most rows, and what leaves it on the way."""

    row: int  # that goes all the way
    end: int  # its tokens
    rows: list[tuple[int, int]]  # (row, depth) of those that leave it alone
    bundles: list[tuple[int, int, int]]  # (first place, end of places, depth) of those that leave it together

    def saved(self, start: int) -> int:
        """Tokens less to compute than without it, where it begins after `start` tokens."""
        of_rows = sum(depth - start for _, depth in self.rows)
        of_bundles = sum((end - first) * (depth - start) for first, end, depth in self.bundles)
        return of_rows + of_bundles - (self.end - start)


def _chain(trie: _Trie, first: int, end: int) -> _Chain:
    """The way of most rows among those at some places, two at least."""
    rows: list[tuple[int, int]] = []
    bundles: list[tuple[int, int, int]] = []
    while True:
        depth, runs = trie.parting(first, end)
        rows += [(trie.rows[begin], depth) for begin, stop in runs if stop - begin == 1]
        together = [run for run in runs if run[1] - run[0] > 1]
        if not together:
            return _Chain(trie.rows[first], depth, rows, bundles)
        most = max(together, key=lambda run: run[1] - run[0])
        bundles += [(begin, stop, depth) for begin, stop in together if (begin, stop) != most]
        first, end = most


def _trunks(trie: _Trie) -> tuple[list[Pass], dict[int | None, list[tuple[int, int]]]]:
    """(the trunks that are worth it, (row, depth) of the rows that leave each, and under None of those that leave
    none).
    """
    trunks: list[Pass] = []
    leaving: dict[int | None, list[tuple[int, int]]] = {}
    waiting: list[tuple[int, int, int, int | None]] = [(0, len(trie.rows), 0, None)]  # places, depth, trunk to leave
    while waiting:
        first, end, start, leaves = waiting.pop()
        if end - first == 1:
            leaving.setdefault(leaves, []).append((trie.rows[first], start))
            continue
        chain = _chain(trie, first, end)
        trunk = leaves
        if chain.saved(start) >= A_PASS:
            trunk = len(trunks)
            trunks.append(Pass((chain.row,), start, chain.end - start, leaves, is_trunk=True))
        for row, depth in chain.rows:
            if trunk == leaves or depth == start:
                leaving.setdefault(leaves, []).append((row, start))
            else:
                leaving.setdefault(trunk, []).append((row, depth))
        for begin, stop, depth in chain.bundles:
            if trunk == leaves or depth == start:
                waiting.append((begin, stop, start, leaves))
            else:
                waiting.append((begin, stop, depth, trunk))
    return trunks, leaving


def _branches(members: list[tuple[int, int]], lengths: list[int], trunk: int | None) -> list[Pass]:
    """The passes of the rows that leave one trunk, with the fewest tokens, each pass counted as A_PASS tokens more.

    members: (row, depth at which it leaves); lengths: of each row, without its last token.

    The rows are taken by depth and length, and cut into runs: best[n] is what the first n of them cost.
    """
    members = sorted(members, key=lambda member: (member[1], lengths[member[0]]))
    depths = np.array([depth for _, depth in members])
    stops = np.array([lengths[row] for row, _ in members])
    least = 1 if trunk is None else MIN_SUFFIX
    best = np.zeros(len(members) + 1, np.int64)
    begins = np.zeros(len(members), np.int64)  # of the run that ends with each row
    for last in range(len(members)):
        longest = np.maximum.accumulate(stops[last::-1])[::-1]  # of each run that ends here, by where it begins
        widths = np.maximum(least, longest - depths[: last + 1])
        counts = np.arange(last + 1, 0, -1)
        costs = best[: last + 1] + counts * widths + A_PASS
        begins[last] = costs.argmin()
        best[last + 1] = costs.min()
    passes: list[Pass] = []
    end = len(members)
    while end:
        begin = int(begins[end - 1])
        rows = tuple(row for row, _ in members[begin:end])
        width = max(least, int(stops[begin:end].max()) - int(depths[begin]))
        passes.append(Pass(rows, int(depths[begin]), width, trunk))
        end = begin
    return passes[::-1]


def _as_long_as_needed(trunks: list[Pass], branches: list[Pass]) -> list[Pass]:
    """The trunks without what no pass attends to, for rows may leave earlier than they must."""
    needed = [0] * len(trunks)
    for each in [*trunks, *branches]:
        if each.leaves is not None:
            needed[each.leaves] = max(needed[each.leaves], each.start)
    return [replace(trunk, width=end - trunk.start) for trunk, end in zip(trunks, needed, strict=True)]

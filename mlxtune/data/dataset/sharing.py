"""What examples begin with together, looked for once, before any epoch: what a step need compute but once.

Two kinds are found. Examples of one row: the history of a conversation comes again in the example of each later turn.
And rows that begin alike: a system prompt, a document on which several questions are asked. Of six rows

    0  S S D D D u          S S: what all rows begin with        group 0 of all rows, 2 tokens
    1  S S D D D v              D D D: a document of rows 0-3       group 1 in it, 5 tokens
    2  S S D D D P P w              P P: what rows 2 and 3 share      group 2 in that, 7 tokens
    3  S S D D D P P x
    4  S S y
    5  S S z                group_of = 1 1 2 2 0 0

A token is shared only before the position that predicts a row's first target: what is computed once gives no output.

Rejected: the trie of all tokens, which is exact, but does not fit the memory for a million rows. Groups are looked for
in steps of MIN_GROUP_TOKENS, MAX_DEPTH inside one another, and each look costs no more than reading the rows once.

Legend: N examples, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.beginnings import MIN_GROUP_TOKENS, common, first_target, groups
from mlxtune.data.dataset.measured import first_examples, measured

MAX_DEPTH = 8  # groups inside one another: a system prompt, a document in it, a part of that, ...


@dataclass(frozen=True)
class Group:
    """Rows that begin alike."""

    tokens: int  # that all of them begin with, each before its first target's predictor
    around: int  # number of the group that it is in; of the first one, which has all rows: itself
    depth: int  # how many groups it is in


@dataclass(frozen=True)
class Sharing:
    """What the examples of a run share."""

    saved: np.ndarray  # [N] tokens of an example that are not computed again where it meets the next one of its row
    group_of: list[int]  # [R] number of the innermost group that a row is in
    groups: list[Group]  # the first has all rows; each comes after the one that it is in

    @property
    def beyond_all(self) -> bool:
        """Whether anything is shared but what all rows begin with."""
        return len(self.groups) > 1 or bool(self.saved.any())

    def between(self, one: int, other: int) -> int:
        """Tokens that two rows need compute but once, by the innermost group that both are in."""
        a, b = self.group_of[one], self.group_of[other]
        while a != b:
            if self.groups[a].depth >= self.groups[b].depth:
                a = self.groups[a].around
            else:
                b = self.groups[b].around
        return self.groups[a].tokens


def nothing_shared(examples: int, rows: int) -> Sharing:
    """Of so many examples and rows that are computed whole."""
    return Sharing(np.zeros(examples, np.int64), [0] * rows, [Group(0, 0, 0)])


def found_sharing(examples: Sequence[Example]) -> Sharing:
    """What the examples of a run share."""
    if not len(examples):
        return nothing_shared(0, 0)
    known = measured(examples)
    firsts = first_examples(known.row_of)
    return Sharing(_saved(known, firsts), *_Search(known, firsts).groups())


def _saved(examples: Sequence[Example], firsts: np.ndarray) -> np.ndarray:
    """[N] of each example the tokens that the next one of its row begins with, before its own first target's predictor;
    of a row's last one none. firsts: [R] the first example of each row.
    """
    saved = np.zeros(len(examples), np.int64)
    ends = np.append(firsts[1:], len(examples))
    for row in np.flatnonzero(ends - firsts > 1).tolist():
        following = examples[int(firsts[row])]
        for index in range(int(firsts[row]), int(ends[row]) - 1):
            example, following = following, examples[index + 1]
            may_share = first_target(example) - 1
            saved[index] = common(example.ids[:may_share], following.ids)
    return saved


class _Search:
    """Looks for groups of rows by the first example of each."""

    def __init__(self, examples: Sequence[Example], firsts: np.ndarray) -> None:
        """firsts: [R] the first example of each row."""
        self.examples = examples
        self.firsts = firsts
        self.may_share = np.array([first_target(examples[index]) - 1 for index in firsts.tolist()], np.int64)  # [R]

    def groups(self) -> tuple[list[int], list[Group]]:
        """`group_of` and `groups`, as `Sharing` has them."""
        everything = np.arange(len(self.firsts))
        group_of = [0] * len(self.firsts)
        found = [Group(self._begin(everything), 0, 0)]
        unsearched = [(0, everything)]  # the number of a group, and its rows
        while unsearched:
            around, rows = unsearched.pop()
            if found[around].depth == MAX_DEPTH:
                continue
            for inside in self._inside(rows, found[around].tokens + MIN_GROUP_TOKENS):
                for row in inside.tolist():
                    group_of[row] = len(found)
                unsearched.append((len(found), inside))
                found.append(Group(self._begin(inside), around, found[around].depth + 1))
        return group_of, found

    def _begin(self, rows: np.ndarray) -> int:
        """Tokens that all of these rows begin with and may share."""
        shared = np.asarray(self.examples[int(self.firsts[rows[0]])].ids)[: int(self.may_share[rows].min())]
        for index in self.firsts[rows[1:]].tolist():
            if not len(shared):
                break
            shared = shared[: common(shared, self.examples[index].ids)]
        return len(shared)

    def _inside(self, rows: np.ndarray, least: int) -> list[np.ndarray]:
        """Sets of two and more of these rows that share their first `least` tokens, and may."""
        alike = groups(self.examples, least, self.firsts[rows].tolist())
        return [np.searchsorted(self.firsts, group) for group in alike]

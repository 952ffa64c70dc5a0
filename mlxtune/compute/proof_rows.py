"""The rows of the user's data that a proof of the fast ways is made on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from mlxtune.compute import prefix
from mlxtune.compute.loss import Way
from mlxtune.compute.proof import FEWEST_TOKENS, MAX_TOKENS
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Batch, collate, lengths_of
from mlxtune.data.dataset.beginnings import MIN_GROUP_TOKENS, common, groups
from mlxtune.data.dataset.measured import measured
from mlxtune.data.rows.sides import Side
from mlxtune.machine import backend

ROWS = 2  # that a proof is made on
LOGITS_SHARE = 0.06  # of the memory, for the plain way's logits
COPIES = 3  # of the float32 logits, about, that the plain way has alive at once


def rows_for(
    examples: Sequence[Example],
    way: Way,
    grouped: bool,
    tokens: int = MAX_TOKENS,
    batches: Iterable[list[int]] = (),
) -> Batch:
    """Two real rows: the longest ones, so that sliding windows are passed where the data passes them, as far as the
    plain way's logits fit the memory. Where rows are grouped, those that share the most: up to three of one
    conversation, or else of one of the run's own batches, which branch off a trunk at different depths.

    tokens: of a row, at most; batches: some micro-batches of the run, as numbers of examples.
    """
    batch = _rows_for(examples, way, grouped, tokens, batches)
    if not measured(examples).sides.any():
        return batch
    # Each as an answer of its own: whose side it is makes no difference to its sum.
    return replace(batch, sides=np.full(len(batch.rows), Side.GOOD, np.uint8))


def _rows_for(examples: Sequence[Example], way: Way, grouped: bool, tokens: int, batches: Iterable[list[int]]) -> Batch:
    """As `rows_for`, of supervised examples."""
    if way.split is not None:
        logits = ROWS * COPIES * 4 * max(1, way.split.vocabulary)  # bytes of one token of each row
        fit = int(LOGITS_SHARE * backend.memory_bytes() / logits)
        tokens = min(tokens, max(FEWEST_TOKENS, fit))
    order = np.argsort(-lengths_of(examples), kind="stable").tolist()
    conversation = _of_one_row(examples) if grouped else []
    if conversation and way.prefix is not None:
        return _branching(examples, conversation, tokens)
    if way.prefix is not None:
        for batch in batches:
            leaving = _of_several_depths(examples, batch, way.prefix)
            if not leaving:
                continue
            found = _branching(examples, leaving, tokens)
            passes = prefix.forest_of_batch(found, way.prefix).passes
            if len({each.start for each in passes if not each.is_trunk}) > 1:  # also as they were cut
                return found
    shared = way.prefix
    if grouped:
        pairs = [group[:2] for group in groups(examples, MIN_GROUP_TOKENS)]
        common_tokens = {tuple(pair): common(examples[pair[0]].ids, examples[pair[1]].ids) for pair in pairs}
        best = max(common_tokens, key=common_tokens.__getitem__, default=())
        order = [*best, *order]
        shared = common_tokens.get(best, shared)
    if shared:
        tokens = min(tokens, prefix.widest_that_gains(shared, ROWS))
    chosen = (order * ROWS)[:ROWS]  # a single example twice
    return collate([_cut(examples[index], tokens) for index in chosen], range(ROWS))


def _of_one_row(examples: Sequence[Example]) -> list[int]:
    """The last, the middle and the first example of the row with the longest one among those that have several; []:
    none has.
    """
    known = measured(examples)
    rows, firsts, counts = np.unique(known.row_of, return_index=True, return_counts=True)
    if not len(rows) or counts.max() < 2:
        return []
    longest = np.where(counts > 1, np.maximum.reduceat(known.lengths, firsts), 0)
    row = int(longest.argmax())
    first, last = int(firsts[row]), int(firsts[row] + counts[row]) - 1
    return sorted({first, (first + last) // 2, last}, reverse=True)


def _of_several_depths(examples: Sequence[Example], batch: list[int], of_run: int) -> list[int]:
    """Up to three examples of a micro-batch that leave one trunk at different depths, the deepest first; []: none do.
    of_run: as in `prefix.forest_of_batch`.
    """
    passes = prefix.forest_of_batch(collate(examples, batch), of_run).passes
    for number, trunk in enumerate(passes):
        if not trunk.is_trunk:
            continue
        branches = [each for each in passes if each.leaves == number and not each.is_trunk]
        at_depth = {each.start: batch[each.rows[0]] for each in branches}
        depths = sorted(at_depth, reverse=True)
        if len(depths) > 1:
            chosen = {depths[0], depths[len(depths) // 2], depths[-1]}
            return [at_depth[depth] for depth in sorted(chosen, reverse=True)]
    return []


def _branching(examples: Sequence[Example], conversation: list[int], tokens: int) -> Batch:
    """Some examples of one row, cut at different places so that they still part at different depths, and so many of
    them that no more is computed than of two rows.
    """
    parts = (1.0, 0.75, 0.5)  # of `tokens`
    rows = [_cut(examples[index], int(part * tokens)) for index, part in zip(conversation, parts, strict=False)]
    batch = collate(rows, range(len(rows)))
    if len(rows) > ROWS and prefix.forest_of_batch(batch, 0).computed > ROWS * tokens:
        return collate(rows[:ROWS], range(ROWS))
    return batch


def _cut(example: Example, tokens: int) -> Example:
    """The first tokens of a row; its last quarter is supervised when its own targets were cut off."""
    ids, mask = example.ids[:tokens], example.mask[:tokens]
    if not any(mask[1:]):
        last_quarter = len(ids) * 3 // 4
        mask = [int(place >= last_quarter) for place in range(len(ids))]
    return Example(ids, mask)

"""The settings to try one after the other until a run fits the memory."""

from __future__ import annotations

from collections.abc import Iterator

from mlxtune.compute import pieces
from mlxtune.compute.fast_ways import in_pieces
from mlxtune.config.schema import TrainSection
from mlxtune.data.dataset.batches import DEFAULT_ROWS


def smaller_settings(
    section: TrainSection, widest: int, checkpoints: bool = True, may_divide: bool = False
) -> Iterator[TrainSection]:
    """The section as it is, then with checkpointing if that may be, then with ever smaller micro-batches and more of
    them, down to one example of the widest. A step keeps its number of rows. Then, if blocks may be divided and the
    widest is more than a piece, in pieces, and nested.
    """
    yield section
    asked = section.checkpoint_layers
    if checkpoints and not in_pieces(section):
        section = section.model_copy(update={"checkpoint_layers": "all"})
        yield section
    smallest = section
    for smaller in _smaller_batches(section, widest):
        smallest = smaller
        yield smaller
    if may_divide and widest > pieces.TOKENS:
        for how in ("pieces", "nested"):
            if asked not in (how, "nested"):
                yield smallest.model_copy(update={"checkpoint_layers": how})


def _smaller_batches(section: TrainSection, widest: int) -> Iterator[TrainSection]:
    """Ever smaller micro-batches, and more of them."""
    accumulate = section.accumulate
    tokens = section.batch_tokens
    if tokens:
        while tokens >= 2 * widest:
            tokens, accumulate = tokens // 2, accumulate * 2
            yield section.model_copy(update={"batch_tokens": tokens, "accumulate": accumulate})
        return
    rows = section.batch_rows or DEFAULT_ROWS
    while rows > 1:
        parts = 2 if rows % 2 == 0 else rows  # an odd number of rows is cut into single ones
        rows, accumulate = rows // parts, accumulate * parts
        yield section.model_copy(update={"batch_rows": rows, "accumulate": accumulate})

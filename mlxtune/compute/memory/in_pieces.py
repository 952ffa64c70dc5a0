"""The memory of blocks that are computed in pieces of a row (`compute.pieces`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mlxtune.compute.memory.block_call import Cost
from mlxtune.compute.memory.step import FULL, Moment, RunOptions, StepSizes
from mlxtune.compute.pieces import spans_of


@dataclass(frozen=True)
class WholeRows:
    """Bytes of a block that is computed in pieces."""

    piece: Cost  # of the last one, which has all keys and values before it
    given: int  # the block's result, of all tokens
    keys: int  # its keys and values, of all tokens


def before_last_piece(shape: StepSizes, options: RunOptions) -> StepSizes:
    """The micro-batch as if all tokens before the last piece were a prefix: then the second pass is that piece."""
    first_of_last, _ = spans_of(options.tokens, shape.rows, shape.width)[-1]
    return replace(shape, prefix=max(1, first_of_last), forest=None)


def whole_rows(calls: list[list[Cost]], shape: StepSizes, options: RunOptions, width: int) -> list[WholeRows]:
    """Of each block. calls: its two calls, of the prefix and of the last piece; width: of the hidden states."""
    before = before_last_piece(shape, options).prefix
    whole = []
    for first, piece in calls:
        keys = round(first.recorded / before * shape.rows * shape.width)
        whole.append(WholeRows(piece, options.item * shape.tokens * width, keys))
    return whole


def moments(blocks: list[WholeRows], held: int, options: RunOptions, in_block: int) -> Iterator[Moment]:
    """Every block on its way forward and back. held: bytes of the embeddings; in_block: of dense copies in one block.

    Forward, the results of the pieces so far stay, and the keys and values. Back, the gradients of the block's result
    and of its input, the keys and values, and their gradients in float32.
    """
    group = max(1, options.nested)
    for place, block in enumerate(blocks):
        forward = block.given + block.keys + block.piece.forward
        yield Moment(activations=held + forward, dense_copies=in_block)
        again = place % group * block.given  # the group's inputs up to this one, computed again
        of_keys = block.keys + round(block.keys * FULL / options.item)
        back = 2 * block.given + of_keys + max(of_keys, block.piece.again)
        yield Moment(activations=held + again + back, dense_copies=in_block)
        if (place + 1) % group == 0:
            held += block.given

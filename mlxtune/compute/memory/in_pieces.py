"""The memory of blocks that are computed in pieces of a row (`compute.pieces`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mlxtune.compute.memory.block_call import Cost
from mlxtune.compute.memory.step import FULL, Moment, RunOptions, StepSizes
from mlxtune.compute.pieces import spans_of
from mlxtune.data.dataset.forest import Forest, Pass


@dataclass(frozen=True)
class WholePass:
    """Bytes of one block in one pass, which is computed in pieces."""

    piece: Cost  # of the last one, which has all keys and values before it
    given: int  # the block's result, of all tokens
    keys: int  # its keys and values, of all tokens and of those before the pass
    of_trunk: int  # of those the trunk's, which the pass leaves and gives gradients to

    def on_the_way_back(self, item: int) -> int:
        """The most at a time: the gradient of its input, the keys and values with their gradients in float32, and these
        once more while they are added up, or a piece that is computed again. item: bytes of a number.
        """
        with_gradients = self.keys + round(self.keys * FULL / item)
        return self.given + with_gradients + max(with_gradients, self.piece.again)


def before_last_piece(shape: StepSizes, each: Pass, options: RunOptions) -> StepSizes:
    """A pass as if all tokens before its last piece were a prefix: then the second pass is that piece."""
    first_of_last, _ = spans_of(options.tokens, len(each.rows), each.width)[-1]
    width = each.start + each.width
    return replace(shape, rows=len(each.rows), width=width, prefix=max(1, each.start + first_of_last), forest=None)


def whole_pass(calls: list[Cost], shape: StepSizes, each: Pass, options: RunOptions, width: int) -> WholePass:
    """Of a block. calls: its two calls, of what comes before the last piece and of that piece; shape: as they were
    made, by `before_last_piece`; width: of the hidden states.
    """
    before, piece = calls
    of_one_row = before.recorded / shape.prefix
    return WholePass(
        piece=piece,
        given=options.item * each.computed * width,
        keys=round(of_one_row * shape.rows * shape.width),
        of_trunk=round(of_one_row * each.start),
    )


def kept(blocks: list[list[WholePass]], passes: Forest, options: RunOptions) -> int:
    """Bytes that stay of the first blocks, all or some, until they go back: of each group of blocks the last one's
    results, which the next group begins with, and of trunks the keys and values.
    """
    group = max(1, options.nested)
    results = sum(each.given for block in blocks[group - 1 :: group] for each in block)
    trunks = [place for place, each in enumerate(passes.passes) if each.is_trunk]
    return results + sum(block[place].keys for block in blocks for place in trunks)


def moments(
    blocks: list[list[WholePass]], passes: Forest, held: int, options: RunOptions, in_block: int
) -> Iterator[Moment]:
    """Every block on its way forward and back, its passes one after the other. held: bytes of the embeddings; in_block:
    of dense copies in one block.

    Forward, the results of the pieces so far stay, and the keys and values. Back, all passes have the gradients of
    their results, and the one that is computed needs what `on_the_way_back` says.
    """
    group = max(1, options.nested)
    for place, block in enumerate(blocks):
        before = held + kept(blocks[:place], passes, options)
        given = sum(each.given for each in block)
        forward = given + max(each.keys + each.piece.forward for each in block)
        yield Moment(activations=before + forward, dense_copies=in_block)
        again = place % group * given  # the group's inputs up to this one, computed again
        to_trunks = sum(each.of_trunk for each in block)  # gradients, until they are added up
        back = given + to_trunks + max(each.on_the_way_back(options.item) for each in block)
        yield Moment(activations=before + again + back, dense_copies=in_block)

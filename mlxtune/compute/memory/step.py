"""What decides the memory of one step beside the model: the micro-batch, and the settings of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mlxtune.compute.memory.kernels import Device
from mlxtune.data.dataset.forest import Forest, behind_one_trunk

FULL = 4  # bytes of a float32


@dataclass(frozen=True)
class StepSizes:
    """The micro-batch that decides a model's memory."""

    rows: int  # B
    width: int  # T: tokens of each row that the model is given
    prefix: int  # how many of them all rows share, computed once
    targets: int  # N: supervised tokens
    forest: Forest | None = None  # its passes, where they are not those of one prefix that all rows share

    @property
    def passes(self) -> Forest:
        """As the micro-batch is computed."""
        return self.forest or behind_one_trunk(self.rows, self.width, self.prefix)

    @property
    def tokens(self) -> int:
        """That go through the blocks."""
        return self.passes.computed


@dataclass(frozen=True)
class RunOptions:
    """What of a run decides its memory, beside the model and the batches."""

    item: int  # bytes of one number of an activation
    chunk: int  # C: rows of a chunk of the head; 0: logits are computed for every token
    recompute: int  # every n-th block is checkpointed; 0: none
    dropout: float  # lora.dropout
    device: Device  # what computes
    head_trained: bool = False  # its chunks are computed again in the backward pass
    compiled: bool = False  # as one graph
    accumulated: bool = False  # gradients are summed over several micro-batches
    ram: int = 0  # bytes of the machine's memory, which bounds how many compiled graphs are kept
    updates: bool = True  # whether the optimizer's update follows
    tokens: int = 0  # of a piece in which every block is computed (`pieces`); 0: rows as a whole
    nested: int = 0  # blocks that keep one input together; 0: each keeps its own
    frozen: int = 0  # how many of the first blocks are left out, their states being at hand


class Moment(NamedTuple):
    """Bytes of what differs from moment to moment of a step; the largest sum is the peak."""

    activations: int = 0
    head_chunk: int = 0
    dense_copies: int = 0
    update: int = 0

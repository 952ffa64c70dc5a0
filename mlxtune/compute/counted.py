"""How much of an epoch's tokens goes through the model.

A planned epoch of 84 long conversations, each turn an example of its own:

    tokens of the examples            4,249,300
    computed                            284,900    0.07 of them: what begins alike is computed once

Padding is computed, and the last token of an example is not, for it predicts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlxtune.compute.prefix import forest_of_batch
from mlxtune.data.dataset.batches import Batch, Plan, collate

MOST_COUNTED = 2000  # micro-batches, some 1 ms each; of a longer epoch so many are counted, evenly spread


@dataclass(frozen=True)
class Epoch:
    """What the first epoch of a plan computes."""

    tokens: int  # of the examples that are taken
    computed: int  # positions that go through the model, padding included
    beside: int  # positions of what is computed beside each micro-batch, without gradients; 0: nothing is
    divided: int  # rows whose examples are computed in several micro-batches, each with the row's beginning
    exact: bool  # all micro-batches were counted, not only some


def first_epoch(plan: Plan, of_run: int | None, beside: Callable[[Batch], Batch] | None = None) -> Epoch:
    """of_run: tokens that all rows begin with, as `Way.prefix` has them; None: nothing shared is computed once.

    beside: of a micro-batch, another one that is computed with it, without gradients; None: there is none.
    """
    micro_batches = list(plan.micro_batches())
    every = -(-len(micro_batches) // MOST_COUNTED)  # rounded up
    tokens = computed = others = 0
    for examples in micro_batches[::every]:
        batch = collate(plan.examples, examples, plan.width(examples))
        tokens += batch.tokens
        computed += forest_of_batch(batch, of_run).computed
        if beside is not None:
            others += forest_of_batch(beside(batch), of_run).computed
    lengths = plan.examples.lengths
    whole = sum(int(lengths[examples].sum()) for examples in micro_batches)
    divided = 0 if of_run is None else plan.divided
    scale = whole / tokens
    return Epoch(whole, round(computed * scale), round(others * scale), divided, exact=every == 1)

"""Whether answers may be computed several at a time: proven on the user's own model and first prompts.

Two prompts are continued alone, the plain way, and then together: behind the shared beginning, one padded to the
other's length, given the very tokens that were found before. The logits must be the same but for rounding, in float32
whatever the model's type (`compute.precision`). A family whose caches cannot hold several rows, or hold them wrongly,
is answered one by one, and that is said.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxtune.compute.precision import in_float32
from mlxtune.evaluate.engines.beginning import Beginning
from mlxtune.evaluate.engines.decode import Counted, can_batch, own_caches, prefill
from mlxtune.machine import gpu_errors
from mlxtune.model.arrays import scalar

TOKENS = 3  # of an answer that are compared
TOLERANCE = 1e-3  # of the largest logit, in float32


def wrong_together(model: Counted, prompts: Sequence[Sequence[int]], begin: Sequence[int]) -> str:
    """Why prompts cannot be answered together, in words; "" where they can.

    prompts: two, as token ids; begin: what both begin with, and is computed once.
    """
    if not can_batch(own_caches(model)):
        return "this family keeps what it has read in a form that holds one row"
    try:
        with in_float32(model.model):
            return _difference(model, prompts, begin)
    except Exception as error:  # whatever a model's own code raises
        if gpu_errors.recognise(error):  # which is not the model's
            raise
        reason = (str(error).splitlines() or [""])[0]
        return f"this model fails with several rows ({type(error).__name__}: {reason})"


def _difference(model: Counted, prompts: Sequence[Sequence[int]], begin: Sequence[int]) -> str:
    """In words; "" where there is none but rounding."""
    alone: list[list[mx.array]] = []
    found: list[list[int]] = []  # of each prompt: the tokens it goes on with
    for prompt in prompts:
        caches = own_caches(model)
        if len(prompt) > 1:
            prefill(model, caches, [prompt[:-1]])
        logits: list[mx.array] = []
        tokens = [prompt[-1]]
        for _ in range(TOKENS):
            logits.append(model(mx.array([tokens[-1:]]), caches)[0, -1].astype(mx.float32))
            tokens.append(int(scalar(mx.argmax(logits[-1]))))
        alone.append(logits)
        found.append(tokens)
    caches = Beginning.of(model, begin).under(len(prompts))
    prefill(model, caches, [prompt[len(begin) : -1] for prompt in prompts])
    worst = 0.0
    for place in range(TOKENS):
        together = model(mx.array([[tokens[place]] for tokens in found]), caches)[:, -1].astype(mx.float32)
        for row, logits in enumerate(alone):
            worst = max(worst, _apart(together[row], logits[place]))
    if worst <= TOLERANCE:
        return ""
    return f"its logits for several rows are others ({worst:.1g} of the largest apart, {TOLERANCE:g} is allowed)"


def _apart(one: mx.array, other: mx.array) -> float:
    """The largest difference of two rows of logits [V], in units of the largest logit that is at least 1."""
    difference = mx.abs(mx.where(one == other, 0.0, one - other)).max()  # some families rule tokens out by infinity
    largest = mx.abs(mx.where(mx.isinf(other), 0.0, other)).max()
    apart = scalar(difference) / max(scalar(largest), 1.0)
    return apart if apart == apart else float("inf")  # not a number is no agreement

"""The loss and the numbers of held-out pairs, or of held-out rated answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlxtune.data.dataset.batches import Batch
from mlxtune.train.preference.goal import Forward, Goal, Preference
from mlxtune.train.ranks import Ranks


def score(
    preference: Preference, forward: Forward, batches: Sequence[Batch], ranks: Ranks, between: Callable[[], None]
) -> tuple[float, dict[str, float]]:
    """(The loss a pair or rated answer, the other fields of an `eval` event), of all held-out rows: the same on every
    process.

    forward: computes log-probabilities as the model is now; batches: this process's part; between: called now and then,
    may raise to break off.
    """
    goal = Goal.of(preference, preference.valid, batches, ranks)
    if goal.has_baseline:
        total = 0.0
        for batch in batches:
            between()
            total += goal.likelier(goal.mismatched(batch), forward)
        (total,) = ranks.sum_numbers(total)
        goal.set_baseline(total)
    loss = 0.0
    for batch in batches:
        between()
        loss += goal.loss_of(batch, forward(batch))
    (loss,) = ranks.sum_numbers(loss)
    return loss / goal.divisor, goal.fields(goal.tally(ranks))

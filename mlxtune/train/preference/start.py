"""The proof of a run on preferences: at step 1, before anything is learned, the model is its own reference.

So every answer's log-probability is the one that was computed before, every margin is 0, and the loss is known: log 2
for dpo, 1 / (4 beta ** 2) for ipo, 1 for apo, 1/2 for kto. A reference of other weights, an answer that got another's
value, or a mask that differs cannot pass. It costs nothing: the numbers are those of the first step.
"""

from __future__ import annotations

from mlxtune.config.preference import WITHOUT_REFERENCE
from mlxtune.errors import UserError
from mlxtune.train.preference.goal import Preference, loss_at_start
from mlxtune.train.preference.tally import Tally

FLOAT32 = 1e-2  # rounding below this is float32's; in 16 bits the loss is as far off as its answers are
HINT = "Nothing was trained. Please report it, with the model's name; `mlxtune selftest` may tell more."


def require_own_reference(preference: Preference, tally: Tally, loss: float) -> None:
    """Raise UserError where the first step's numbers are not those of a model that is its own reference.

    tally: of the whole step; loss: a pair or rated answer.
    """
    settings = preference.settings
    if settings.objective in WITHOUT_REFERENCE:
        return
    answers = int(tally.chosen + tally.rejected)
    if tally.apart:
        raise UserError(
            f"{int(tally.apart)} of the first step's {answers} answers are not as likely as in the reference, which "
            "is the same model",
            HINT,
        )
    expected = loss_at_start(settings, preference.of_pairs, tally)
    if preference.rounding < FLOAT32 and abs(loss - expected) > preference.rounding * max(1.0, expected):
        raise UserError(
            f"the first step's loss is {loss:.6g}, and that of a model which is its own reference {expected:.6g}", HINT
        )

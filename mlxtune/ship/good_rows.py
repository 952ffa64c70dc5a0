"""Of preferences, the rows that a proof is made on: what the model was shown as good."""

from __future__ import annotations

import numpy as np

from mlxtune.data.dataset.examples import Examples
from mlxtune.data.rows.sides import Side


def of_good_answers(examples: Examples) -> Examples:
    """The examples without rejected and bad answers; all of them where nothing else is there.

    Of an answer that the model was taught to avoid the loss rises, so that no share of a gain could be measured on it,
    and 4-bit codes would be chosen for texts that nobody wants.
    """
    good = ~np.isin(examples.sides, (Side.REJECTED, Side.BAD))
    return examples.only(good) if good.any() else examples

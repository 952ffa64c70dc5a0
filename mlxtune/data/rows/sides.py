"""Which answer of a preference a conversation holds."""

from __future__ import annotations

from enum import IntEnum


class Side(IntEnum):
    """What a person, or a judge, said of the answer of a conversation. The numbers are kept with tokenized rows."""

    NONE = 0  # nothing: an ordinary row, whose answers are all to be learnt
    CHOSEN = 1  # of a pair of answers to one prompt, the one that is preferred
    REJECTED = 2  # of a pair, the other one
    GOOD = 3  # rated: to be made likelier
    BAD = 4  # rated: to be made less likely

    @property
    def word(self) -> str:
        """For people: chosen, rejected, good, bad."""
        return self.name.lower()


OF_PAIRS = (Side.CHOSEN, Side.REJECTED)  # in the order of their records
OF_RATINGS = (Side.GOOD, Side.BAD)

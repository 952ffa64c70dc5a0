"""What a store remembers of a file's rows beside their examples: for people, and to know that it is whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxtune.data.chat.renderer import Row
from mlxtune.data.chat.turn_kinds import Kinds

LISTED = 10_000  # dropped and damaged rows that are remembered one by one


@dataclass
class Facts:
    """What is known of a file's rows. The fields are the keys of facts.json."""

    file: str  # its name when it was read
    rows: int = 0  # all of them
    counts: dict[str, int] = field(default_factory=dict)  # rows that gave no example, by reason
    dropped: dict[str, list[int]] = field(default_factory=dict)  # the first LISTED of these, by reason
    # Reason -> [turns, rows]: turns that were left out of rows that gave other examples.
    turns: dict[str, list[int]] = field(default_factory=dict)
    damaged: list[tuple[str, str]] = field(default_factory=list)  # (place, what is damaged) of the first LISTED rows
    lost: int = 0  # damaged rows of which no example is left
    kinds: dict[str, int] = field(default_factory=dict)  # turns of each kind, as `turn_kinds.Kinds` counts them
    kind_rows: dict[str, list[int]] = field(default_factory=dict)  # the first rows with a turn of each kind
    highest: int = 0  # token id
    digest: str = ""  # of all ids and masks, in the order in which they were written
    beside: str = ""  # `store.digest_beside`

    def add(self, parts: list[Row]) -> None:
        """Count what is not used, or not as it stands, of one row. parts: all that was made of it."""
        record = parts[0].record
        Kinds(self.kinds, self.kind_rows).add(parts, record.row)
        left_out: dict[str, int] = {}  # turns, by reason
        for part in parts:
            if part.dropped:
                left_out[part.dropped] = left_out.get(part.dropped, 0) + max(1, part.turns)
        nothing_left = all(part.dropped for part in parts)
        if nothing_left:
            self._count_dropped("; ".join(left_out), record.row)
        else:
            self._count_turns(left_out)
        texts = dict.fromkeys(damage.text for part in parts for damage in part.damage)
        if texts:
            self.lost += nothing_left
            if len(self.damaged) < LISTED:
                self.damaged.append((record.place, "; ".join(texts)))

    def _count_dropped(self, reason: str, row: int) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if sum(self.counts.values()) <= LISTED:
            self.dropped.setdefault(reason, []).append(row)

    def _count_turns(self, left_out: dict[str, int]) -> None:
        for reason, turns in left_out.items():
            known = self.turns.setdefault(reason, [0, 0])
            known[0] += turns
            known[1] += 1

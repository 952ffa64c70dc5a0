"""Which combinations of values are drawn for a template: each at most once, in an order by chance.

A template with the slots `concept` (3 values) and `audience` (2) has 6 combinations. Number 4 is concept 1 and audience
1: 4 = 1 * 3 + 1. So a combination is a whole number, and the product need not be written out, however large it is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from math import prod

from mlxtune.make.from_template.description import Template, Value

LISTED = 100_000  # combinations up to which all are shuffled; of more, numbers are drawn until one is new


def combinations(template: Template, values: Mapping[str, Sequence[Value]]) -> int:
    """How many there are."""
    return prod(len(values[name]) for name in template.slots)


def drawn(
    template: Template, values: Mapping[str, Sequence[Value]], key: str
) -> Iterator[tuple[int, dict[str, Value]]]:
    """(Number of a combination, its values) of all combinations, each once. key: decides the order."""
    count = combinations(template, values)
    chance = random.Random(key)
    for number in _numbers(count, chance):
        rest = number
        combination = {}
        for name in template.slots:
            rest, place = divmod(rest, len(values[name]))
            combination[name] = values[name][place]
        yield number, combination


def _numbers(count: int, chance: random.Random) -> Iterator[int]:
    if count <= LISTED:
        numbers = list(range(count))
        chance.shuffle(numbers)
        yield from numbers
        return
    seen: set[int] = set()
    while len(seen) < count:
        number = chance.randrange(count)
        if number not in seen:
            seen.add(number)
            yield number


def shares(limits: Sequence[int], count: int) -> list[int]:
    """How many of `count` rows each template gives: equal parts, but none more than its limit, whose rest the others
    give. Limits 10, 100 and 100 for 90 rows: 10, 40, 40. Their sum is less than `count` where the limits' is.
    """
    given = [0] * len(limits)
    left = min(count, sum(limits))
    while left:
        open_ones = [place for place, limit in enumerate(limits) if given[place] < limit]
        each = max(1, left // len(open_ones))
        for place in open_ones:
            more = min(each, limits[place] - given[place], left)
            given[place] += more
            left -= more
    return given

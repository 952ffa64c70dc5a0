"""What two texts have in common at their ends."""

from __future__ import annotations


def common_prefix(one: str, other: str) -> int:
    """Length of the longest common start."""
    if one.startswith(other) or other.startswith(one):
        return min(len(one), len(other))
    # Halving compares whole slices, which is many times faster than a loop over characters.
    low, high = 0, min(len(one), len(other))
    while low < high:  # one[:low] == other[:low] always holds
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def common_suffix(one: str, other: str) -> int:
    """Length of the longest common end."""
    return common_prefix(one[::-1], other[::-1])

"""How much two texts have in common: ROUGE-L by words, chrF by letters.

ROUGE-L (Lin 2004) is the F-measure of the longest common subsequence of words. Its length is counted for many texts at
once with the bits of whole numbers (Crochemore, Iliopoulos, Pinzon and Reid 2001; Hyyrö 2004): where the first text has
m words, one number of m bits is kept for each other text, and each of its words costs four operations. Exact, and some
300 times as fast as a table of m x n cells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mlxtune.evaluate.checks.words import words_of

CHARACTERS = 6  # chrF counts runs of 1 to so many letters
BETA = 2  # chrF: how many times as much what is missing counts as what is too much
WORD = 64  # bits of one machine word


def rouge_l(text: str, others: Sequence[str]) -> np.ndarray:
    """ROUGE-L of a text against each of N others: [N], from 0 to 1; 0 where one of the two has no words.

    Equal to that of the package rouge-score, without its stemmer, on ASCII texts; other languages keep their words.
    """
    first = words_of(text)
    lists = [words_of(other) for other in others]
    common = longest_common(first, lists)
    lengths = np.array([len(words) for words in lists])
    out = np.zeros(len(lists))
    some = common > 0
    precision, recall = common[some] / len(first), common[some] / lengths[some]
    out[some] = 2 * precision * recall / (precision + recall)
    return out


def longest_common(first: Sequence[str], others: Sequence[Sequence[str]]) -> np.ndarray:
    """The length of the longest common subsequence of a list and each of N others: [N].

    V holds a 1 for each place of `first` that does not yet end a longer subsequence, all of them at the start. A word
    of the other text that stands at the places M makes of it (V + (V & M)) | (V & ~M); the zeros of V are the length.
    A worked example, `first` a b c: V is 111 (the lowest bit is a). The word b, M = 010: V & M is 010, V + 010 is 1001,
    V & ~M is 101: V becomes 101 in three bits. The word c, M = 100: V & M is 100, V + 100 is 1001, V & ~M is 001: V
    becomes 001, of which two bits are zero: b c.
    """
    count = len(others)
    if not first or not count:
        return np.zeros(count, np.int64)
    numbers = numbered(first)
    ids = np.zeros((count, max(len(words) for words in others)), np.int64)
    for row, words in enumerate(others):
        ids[row, : len(words)] = [numbers.get(word, 0) for word in words]
    return longest_common_ids([numbers[word] for word in first], ids)


def longest_common_of_two(first: Sequence[str], second: Sequence[str]) -> int:
    """The same of two lists alone, of thousands of words each: the bits are those of one whole number of Python, so
    that a word costs four operations however long the lists are. 8,000 words and 8,000 take some 20 ms.
    """
    places: dict[str, int] = {}  # M of each word
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(first)) - 1
    value = every  # V
    for word in second:
        if word in places:
            taken = value & places[word]
            value = (value + taken | value - taken) & every
    return len(first) - value.bit_count()


def numbered(words: Sequence[str]) -> dict[str, int]:
    """A number for each word, from 1; 0 is for all the words that are not among them."""
    numbers: dict[str, int] = {}
    for word in words:
        numbers.setdefault(word, len(numbers) + 1)
    return numbers


def longest_common_ids(first: Sequence[int], ids: np.ndarray) -> np.ndarray:
    """The same of words that are numbers. first: m of them, not empty, from 1 to W without a gap; ids: [N, longest],
    each row filled up with 0, which also stands for every word that `first` does not have. Returns [N].
    """
    parts = -(-len(first) // WORD)
    places = np.zeros((max(first) + 1, parts), np.uint64)  # M of each word
    for place, number in enumerate(first):
        places[number, place // WORD] |= np.uint64(1) << np.uint64(place % WORD)
    packed, counts = _without_zeros(ids)
    order = np.argsort(-counts, kind="stable")  # the longest first: those before `going` have a word at this step
    packed, counts = packed[order], counts[order]
    values = np.full((len(ids), parts), ~np.uint64(0))  # V
    for step in range(packed.shape[1]):
        going = int(np.searchsorted(-counts, -step))
        carry = np.zeros(going, np.uint64)
        wanted = places[packed[:going, step]]  # [going, parts]
        for part in range(parts):
            value = values[:going, part]
            taken = value & wanted[:, part]
            total = value + taken  # wraps around at 64 bits
            over = total < value
            total += carry
            over |= total < carry
            carry = over.astype(np.uint64)
            values[:going, part] = total | (value & ~wanted[:, part])
    last = len(first) - WORD * (parts - 1)
    if last < WORD:
        values[:, -1] |= ~np.uint64(0) << np.uint64(last)  # bits beyond the text
    found = np.zeros(len(ids), np.int64)
    found[order] = np.bitwise_count(~values).sum(axis=1, dtype=np.int64)
    return found


def _without_zeros(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids [N, longest] with the zeros of each row behind its other numbers, cut after the longest of these; how many
    there are in each row [N]). A word that `first` does not have changes nothing: its M is 0.
    """
    rows, columns = np.nonzero(ids)
    counts = np.bincount(rows, minlength=len(ids))
    begins = np.cumsum(counts) - counts
    packed = np.zeros((len(ids), int(counts.max(initial=0))), np.int64)
    packed[rows, np.arange(len(rows)) - begins[rows]] = ids[rows, columns]
    return packed, counts


def chrf(text: str, reference: str) -> float:
    """chrF2 (Popović 2015) of a text against a reference, from 0 to 1, as sacrebleu computes it for one sentence:
    precision and recall of runs of 1 to 6 letters, without spaces, each averaged over the lengths that both texts have.
    """
    text, reference = "".join(text.split()), "".join(reference.split())
    precision = recall = 0.0
    lengths = 0
    for length in range(1, CHARACTERS + 1):
        ours, theirs = _runs(text, length), _runs(reference, length)
        if ours and theirs:
            common = (ours & theirs).total()
            precision += common / ours.total()
            recall += common / theirs.total()
            lengths += 1
    if precision + recall == 0:
        return 0.0
    precision, recall = precision / lengths, recall / lengths
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def _runs(text: str, length: int) -> Counter[str]:
    return Counter(text[place : place + length] for place in range(len(text) - length + 1))

"""The texts kept so far, and which of them a new one is nearest to.

By ROUGE-L, exact, against every one of them. The longest common subsequence of two texts is never longer than the
number of words that they share in any order, and these are counted for all texts at once with an index from words to
texts. So only texts whose bound reaches the best score found are compared in full.

    kept              0: "name a fruit that is red"    1: "tell me a joke"    2: "name a tree"
    new               "name a red fruit"
    shared words      0: 4      1: 1      2: 2
    bound on ROUGE-L  0: 0.80   1: 0.25   2: 0.57
    compared: 0, 3 words in their order ("name a fruit"), so 0.60. 2 could not reach that, 1 neither.

Of a long text its beginning and its end are compared: whole ones of 8,000 words would take seconds for each. Not its
beginning alone, for many requests may begin with the same long instructions and differ in what comes behind them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from mlxtune.evaluate.checks.overlap import longest_common_ids, numbered
from mlxtune.evaluate.checks.words import words_of

AT_ONCE = 256  # texts that are compared before the bounds are looked at again; twice as many each time after it
MOST = 300  # words of a text that are compared
FIRST_ROOM = 64  # numbers that a list has room for at first


def compared(text: str) -> list[str]:
    """The words of a text by which it is compared: all of them, or the first and the last MOST / 2."""
    words = words_of(text)
    return words if len(words) <= MOST else words[: MOST // 2] + words[-MOST // 2 :]


class Pool:
    """Texts, to which a new one is compared. They are numbered from 0, as they came."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.texts: list[str] = []
        self._words = _Numbers()  # of all texts, one after the other, as numbers
        self._begins = _Numbers()  # where each text's words begin among them
        self._lengths = _Numbers()  # of each text, in words
        self._numbers: dict[str, int] = {}  # of each word that some text has, from 0
        # (a word's number, k) -> the texts that have the word at least k + 1 times.
        self._having: dict[tuple[int, int], _Numbers] = {}
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, text: str) -> None:
        words = [self._numbers.setdefault(word, len(self._numbers)) for word in compared(text)]
        for word, count in Counter(words).items():
            for earlier in range(count):
                self._having.setdefault((word, earlier), _Numbers()).add(len(self))
        self.texts.append(text)
        self._begins.add(len(self._words.values()))
        self._lengths.add(len(words))
        for word in words:
            self._words.add(word)

    def nearest(self, text: str) -> tuple[float, int]:
        """(ROUGE-L to the text that is nearest, its number; the first of those that are equally near). (0.0, -1) where
        no text shares a word with this one.
        """
        words = compared(text)
        shared = self._shared(words)
        bounds = _f_measure(shared, len(words), self._lengths.values())
        order = np.argsort(-bounds, kind="stable")
        best, which = 0.0, -1
        begin, count = 0, AT_ONCE
        while begin < len(order):
            some = order[begin : begin + count]
            begin, count = begin + count, 2 * count
            some = some[(bounds[some] >= best) & (shared[some] > 0)]
            if not len(some):
                break
            scores = _f_measure(self._common(words, some), len(words), self._lengths.values()[some])
            high = float(scores.max())
            first = int(some[scores == high].min())
            if high > best or (high == best and first < which):
                best, which = high, first
        return (best, which) if best > 0 else (0.0, -1)

    def _shared(self, words: list[str]) -> np.ndarray:
        """How many words each text shares with these, in any order, each as often as both have it: [texts]."""
        texts = []
        for word, count in Counter(words).items():
            number = self._numbers.get(word, -1)
            for earlier in range(count):
                if (number, earlier) in self._having:
                    texts.append(self._having[number, earlier].values())
        if not texts:
            return np.zeros(len(self), np.int64)
        return np.bincount(np.concatenate(texts), minlength=len(self))

    def _common(self, words: list[str], some: np.ndarray) -> np.ndarray:
        """The longest common subsequence of these words and each of some texts: [len(some)]. Some word is shared."""
        own = numbered(words)
        meaning = np.zeros(len(self._numbers), np.int64)  # of each word of the pool: its number among these words
        for word, number in own.items():
            if word in self._numbers:
                meaning[self._numbers[word]] = number
        begins, lengths = self._begins.values()[some, None], self._lengths.values()[some, None]
        steps = np.arange(lengths.max())
        is_there = steps < lengths  # [some, steps]: a shorter text is filled up with 0
        ids = np.where(is_there, meaning[self._words.values()[np.where(is_there, begins + steps, 0)]], 0)
        return longest_common_ids([own[word] for word in words], ids)


def _f_measure(common: np.ndarray, length: int, lengths: np.ndarray) -> np.ndarray:
    """[N] ROUGE-L of texts that have `common` [N] words in common with one of `length` words; lengths: [N], theirs."""
    out = np.zeros(len(common))
    some = common > 0
    precision, recall = common[some] / length, common[some] / lengths[some]
    out[some] = 2 * precision * recall / (precision + recall)
    return out


class _Numbers:
    """A list of whole numbers that grows, kept as an array."""

    def __init__(self) -> None:
        self._room = np.zeros(FIRST_ROOM, np.int64)
        self._count = 0

    def add(self, number: int) -> None:
        if self._count == len(self._room):
            self._room = np.concatenate([self._room, np.zeros_like(self._room)])
        self._room[self._count] = number
        self._count += 1

    def values(self) -> np.ndarray:
        """[count], in the order in which they came."""
        return self._room[: self._count]

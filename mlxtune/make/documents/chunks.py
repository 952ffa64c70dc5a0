"""Documents cut into chunks that an engine reads one at a time.

A chunk ends at a heading where it has half its size by then, else between two paragraphs; a paragraph that is longer
than a chunk is cut between sentences. Behind a cut that is at no heading, the chunk begins with the last sentences of
the one before, so that what a sentence refers to is there. A size of 10, an overlap of 3, and the tokens of each block:

    # A [1]   a1 [6]   # B [1]   b1 [4]   b2 [6]
    chunk 1   # A  a1                the heading B comes when there are 7 of 10
    chunk 2   # B  b1                b2 would make 11
    chunk 3   # B  (end of b1)  b2

The headings that a chunk stands under are its first line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mlxtune.evaluate.checks.words import words_of
from mlxtune.make.documents.reading import Block, Document

SIZE = 600  # tokens of a chunk, about
OVERLAP = 50  # tokens that a chunk takes over from the one before, at most
A_WORD = 4 / 3  # tokens of an English word, where no tokenizer counts them
# Where a sentence ends: a mark and space behind it; or one of the scripts that put no space there.
SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])")
NEW_AT_HEADING = 0.5  # of the size, from which a heading begins a new chunk

Count = Callable[[str], int]  # a text -> its tokens


@dataclass(frozen=True)
class Chunk:
    """A part of a document."""

    # Of the document.
    document: str
    # In its document, from 1.
    number: int
    # The headings that it begins under, and its paragraphs.
    text: str

    @property
    def id(self) -> str:
        return f"{self.document}#{self.number}"


def estimated(text: str) -> int:
    """The tokens of a text, about, where no tokenizer is at hand."""
    return round(A_WORD * len(words_of(text)))


def chunks(document: Document, count: Count, size: int = SIZE, overlap: int = OVERLAP) -> list[Chunk]:
    """The chunks of a document, in its order. size, overlap: in tokens as `count` counts them."""
    found: list[Chunk] = []
    open_chunk = _Open(count)
    above: list[Block] = []  # the headings that the next paragraph stands under

    def close() -> None:
        if open_chunk.has_text:
            found.append(Chunk(document.name, len(found) + 1, open_chunk.text))

    for block in document.blocks:
        if block.level:
            above = [heading for heading in above if heading.level < block.level] + [block]
            if open_chunk.tokens >= NEW_AT_HEADING * size or not open_chunk.has_text:
                close()
                open_chunk = _Open(count, above)
            else:
                open_chunk.add(block.text)
            continue
        for part in _parts(block.text, count, size, size - overlap):
            if open_chunk.has_text and open_chunk.tokens + count(part) > size:
                close()
                before = open_chunk.last
                open_chunk = _Open(count, above)
                if tail := _tail(before, count, overlap):
                    open_chunk.add(tail)
            open_chunk.add_text(part)
    close()
    return found


class _Open:
    """A chunk to which paragraphs are added."""

    def __init__(self, count: Count, above: Sequence[Block] = ()) -> None:
        self._count = count
        self._parts: list[str] = []
        self.tokens = 0
        self.has_text = False  # a paragraph of its own, beside headings and what it took over
        self.last = ""  # that paragraph, the last one
        if above:
            self.add(" > ".join(heading.text for heading in above))

    @property
    def text(self) -> str:
        return "\n\n".join(self._parts)

    def add(self, part: str) -> None:
        """A heading, or what stood in the chunk before."""
        self._parts.append(part)
        self.tokens += self._count(part)

    def add_text(self, part: str) -> None:
        self.add(part)
        self.has_text, self.last = True, part


def _parts(text: str, count: Count, whole: int, size: int) -> Iterator[str]:
    """A paragraph of up to `whole` tokens, or what a longer one is cut into: parts of up to `size`, which leaves room
    for what they take over; sentences as long as they fit, of a longer sentence its words.
    """
    if count(text) <= whole:
        yield text
        return
    waiting = ""
    for piece in _pieces(text, count, size):
        if waiting and count(waiting) + count(piece) > size:
            yield waiting.strip()
            waiting = ""
        waiting += piece
    if waiting.strip():
        yield waiting.strip()


def _pieces(text: str, count: Count, size: int) -> Iterator[str]:
    """Its sentences, each with the space behind it; those that are longer than a chunk in halves."""
    for sentence in sentences(text):
        yield from _halves(sentence, count, size)


def _halves(text: str, count: Count, size: int) -> Iterator[str]:
    if count(text) <= size or len(text) < 2:
        yield text
        return
    middle = text.rfind(" ", 1, len(text) // 2 + 1) + 1 or len(text) // 2
    yield from _halves(text[:middle], count, size)
    yield from _halves(text[middle:], count, size)


def sentences(text: str) -> list[str]:
    """Its sentences, which put together are the text."""
    ends = [found.end() for found in SENTENCE.finditer(text)]
    return [part for start, end in zip([0, *ends], [*ends, len(text)], strict=True) if (part := text[start:end])]


def _tail(text: str, count: Count, most: int) -> str:
    """The last sentences of a text that have `most` tokens together; "" where the last one alone has more."""
    taken = ""
    for sentence in reversed(sentences(text)):
        if count(sentence + taken) > most:
            break
        taken = sentence + taken
    return taken.strip()

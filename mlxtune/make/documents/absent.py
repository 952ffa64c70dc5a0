"""Questions that a text does not answer, and what is to be said then.

They are other chunks' questions, so that nothing has to be made: a chunk on returns is shown with a question on opening
hours. The other chunk must be one that really does not answer it: it has neither the question's quote nor all that the
answer says.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mlxtune.evaluate.checks.languages import language_of
from mlxtune.make.documents.asking import Pair
from mlxtune.make.documents.chunks import Chunk
from mlxtune.make.documents.grounding import folded, unfounded

# What is answered, in the question's language.
NOT_THERE = {
    "en": "The text does not say.",
    "de": "Das steht nicht im Text.",
    "fr": "Le texte ne le dit pas.",
    "es": "El texto no lo dice.",
    "it": "Il testo non lo dice.",
    "pt": "O texto não diz isso.",
    "nl": "Dat staat niet in de tekst.",
    "pl": "Tekst o tym nie mówi.",
    "sv": "Det står inte i texten.",
    "tr": "Metinde bu yazmıyor.",
    "id": "Teks itu tidak menyebutkannya.",
    "ru": "В тексте об этом не сказано.",
    "uk": "У тексті про це не сказано.",
    "zh": "文中没有提到。",
    "ja": "本文には書かれていません。",
    "ko": "본문에 나와 있지 않습니다.",
}


@dataclass(frozen=True)
class Kept:
    """A pair that stays, and the chunk that it is from."""

    # The pair.
    pair: Pair
    # Where it is from.
    chunk: Chunk


def answer_for(question: str) -> str:
    """That the text does not say it; in English where the question's language is not known."""
    return NOT_THERE.get(language_of(question), NOT_THERE["en"])


def drawn(kept: Sequence[Kept], chunks: Sequence[Chunk], count: int, seed: int) -> list[tuple[Kept, Chunk]]:
    """(A pair, a chunk that does not answer it), `count` of them or as many as there are; the same for the same seed.
    No question comes twice.
    """
    chance = random.Random(f"unanswerable {seed}")
    found: list[tuple[Kept, Chunk]] = []
    for one in chance.sample(list(kept), len(kept)):
        if len(found) == count:
            break
        for chunk in chance.sample(list(chunks), len(chunks)):
            if does_not_answer(chunk, one):
                found.append((one, chunk))
                break
    return found


def does_not_answer(chunk: Chunk, one: Kept) -> bool:
    """Whether a chunk surely does not say what a pair's answer says."""
    if folded(one.pair.quote) in folded(chunk.text):  # its own, or one that overlaps with it
        return False
    return unfounded("", one.pair.answer, chunk.text) is not None

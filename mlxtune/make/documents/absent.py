"""Questions that a text does not answer, and what is to be said then.

They are other chunks' questions, so that nothing has to be made: a chunk on returns is shown with a question on opening
hours. The other chunk must be one that really does not answer it: it has neither the question's quote nor all that the
answer says.
"""

from __future__ import annotations

import random
import re
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
    "el": "Το κείμενο δεν το αναφέρει.",
    "he": "הטקסט לא אומר זאת.",
    "ar": "النص لا يذكر ذلك.",
    "fa": "در متن به آن اشاره نشده است.",
    "hi": "पाठ में यह नहीं बताया गया है।",
    "th": "ข้อความไม่ได้ระบุไว้",
    "cs": "Text to neuvádí.",
    "hu": "A szöveg ezt nem említi.",
    "da": "Det står ikke i teksten.",
    "vi": "Văn bản không nói điều đó.",
    "ko": "본문에 나와 있지 않습니다.",
}
# Letters that tell languages which `language_of` does not know, or takes for another of their script. Urdu has no
# sentence above; it stands before Persian, whose letters it has too.
_SIGNS = {
    "vi": re.compile("[ơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ]", re.IGNORECASE),
    "cs": re.compile("[řěů]", re.IGNORECASE),
    "hu": re.compile("[őű]", re.IGNORECASE),
    "da": re.compile("[æø]", re.IGNORECASE),  # Norwegian says the same
    "ur": re.compile("[ٹڈڑںےھہ]"),
    "fa": re.compile("[پچژگیک]"),
}


@dataclass(frozen=True)
class Kept:
    """A pair that stays, and the chunk that it is from."""

    # The pair.
    pair: Pair
    # Where it is from.
    chunk: Chunk


def answer_for(one: Kept) -> str:
    """That the text does not say it, in the language of the question; of a question that does not tell its own, in that
    of its chunk. "" where the language is not known, or has no sentence.
    """
    language = _language_of(one.pair.question) or _language_of(one.chunk.text)
    return NOT_THERE.get(language, "")


def _language_of(text: str) -> str:
    for code, sign in _SIGNS.items():
        if sign.search(text):
            return code
    return language_of(text)


def drawn(kept: Sequence[Kept], chunks: Sequence[Chunk], count: int, seed: int) -> list[tuple[Kept, Chunk]]:
    """(A pair, a chunk that does not answer it), `count` of them or as many as there are; the same for the same seed.
    No question comes twice, and none in a language in which nobody knows what to say.
    """
    chance = random.Random(f"unanswerable {seed}")
    found: list[tuple[Kept, Chunk]] = []
    answerable = [one for one in kept if answer_for(one)]
    for one in chance.sample(answerable, len(answerable)):
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

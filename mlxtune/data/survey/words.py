"""How many words a text has, in scripts that put no spaces between them too."""

from __future__ import annotations

import re

_LETTERS = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana, Han: each counts as a word
_SYLLABLES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
LETTERS, WORDS = 5, 2  # so many letters of either say about as much as so many words between spaces
OF_A_WORD = 4  # letters of these, about
UNSPACED = re.compile(f"[{_LETTERS}{_SYLLABLES}]")
_ONE_LETTER, _SYLLABLE = re.compile(f"[{_LETTERS}]"), re.compile(f"[{_SYLLABLES}]")


def word_count(text: str) -> int:
    """Words about: what stands between spaces; of Chinese and Japanese the letters, of Thai every four letters.

    "30 days" has 2, "东京 is it" 4.
    """
    if text.isascii() or not UNSPACED.search(text):
        return len(text.split())
    spaced = [part for part in UNSPACED.sub(" ", text).split() if any(map(str.isalnum, part))]
    return len(spaced) + len(_ONE_LETTER.findall(text)) + -(-len(_SYLLABLE.findall(text)) // OF_A_WORD)

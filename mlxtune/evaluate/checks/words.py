"""Texts brought to one form, and cut into words."""

from __future__ import annotations

import re
import unicodedata

# Scripts that put no spaces between words: each letter counts as a word. Thai, Lao, Burmese, Khmer; kana; Han.
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
# A letter of them with its marks, else a run of letters, digits and marks (Devanagari's vowels are marks).
_WORD = re.compile(rf"[{_NO_SPACES}][\u0300-\u036f]*|(?:(?![{_NO_SPACES}_])[\w\u0300-\u036f\u0900-\u0dff])+")


def plain(text: str) -> str:
    """Without what is not seen: one way to write each character (Unicode NFC), one space between words, none around."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def without_thought(text: str) -> str:
    """A written answer without the thought that it may begin with, as the answers of models are judged."""
    return _THOUGHT.sub("", text)


def words_of(text: str) -> list[str]:
    """The words of a text in small letters. In ASCII they are runs of letters and digits, as rouge-score takes
    them. Other languages keep theirs: "Ça va?" is ["ça", "va"], "你好" is ["你", "好"].
    """
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())

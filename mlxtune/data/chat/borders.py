"""Where turns begin and end among the tokens of a text.

A prompt must be tokenized as it is when a model is asked, by itself. In the text of an example the same characters may
become other tokens: Qwen's `<think>`, `\\n` in a prompt, and `<think>`, `\\n\\n` where the target begins with a
newline. Whether they do needs no second look at the whole prompt: special tokens cut a text, so that what stands before
the last one is not touched by what comes later. It is enough to tokenize the prompt from its last special token on, a
short piece that nearly all turns share.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np

from mlxtune.data.template.template import Template

REMEMBERED = 10_000  # short pieces of text whose tokens are kept
AT_ONCE = 1_000_000  # characters that are tokenized together
SENTINELS = ("\n", ";", "a", "0", "=")  # put before a target to see its tokens inside a text


class Tokens:
    """The tokens of one text. ids: [T]; starts and ends: [T] the characters of each, as the tokenizer says."""

    def __init__(self, text: str, encoded: Any, specials: frozenset[int]) -> None:
        self.text = text
        self.ids = np.array(encoded.ids, np.int32)
        offsets = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        self.starts, self.ends = offsets[:, 0], offsets[:, 1]
        self._special = np.flatnonzero(np.isin(self.ids, list(specials)))

    def special_from(self, start: int) -> int | None:
        """The special token that begins at a character; None when none does."""
        at = int(np.searchsorted(self.starts[self._special], start))
        found = at < len(self._special) and self.starts[self._special[at]] == start
        return int(self._special[at]) if found else None

    def before_special(self, end: int) -> int:
        """How many tokens stand before the last special token that ends within the first `end` characters."""
        at = int(np.searchsorted(self.ends[self._special], end, side="right"))
        return int(self._special[at - 1]) if at else 0

    def after(self, end: int) -> int:
        """The first token behind the characters up to `end`. A special token that ends there decides; a tokenizer may
        leave blanks out of the characters of the others.
        """
        if end >= len(self.text):
            return len(self.ids)
        at = int(np.searchsorted(self.ends[self._special], end))
        if at < len(self._special) and self.ends[self._special[at]] == end:
            return int(self._special[at]) + 1
        return int(np.searchsorted(np.maximum.accumulate(self.ends), end)) + 1


class Borders:
    """Tokenizes texts with one tokenizer, and finds turns in them."""

    def __init__(self, tokenizer: Any, template: Template) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._specials = frozenset(tokenizer.added_tokens_decoder)
        self._pieces: dict[str, list[int]] = {}

    def tokens(self, texts: list[str]) -> list[Tokens]:
        """Of each text by itself. The library's own objects take some 200 bytes a token, so they are few at a time."""
        out: list[Tokens] = []
        while len(out) < len(texts):
            some, characters = [], 0
            for text in texts[len(out) :]:
                some.append(text)
                characters += len(text)
                if characters > AT_ONCE:
                    break
            encoded = self.tokenizer(some, add_special_tokens=False, return_offsets_mapping=True).encodings
            out += [Tokens(text, one, self._specials) for text, one in zip(some, encoded, strict=True)]
        return out

    def ids(self, text: str) -> list[int]:
        """The tokens of a text by itself."""
        if not text:
            return []
        if text not in self._pieces:
            found = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(text) > 200:
                return found
            if len(self._pieces) > REMEMBERED:
                self._pieces.clear()
            self._pieces[text] = found
        return self._pieces[text]

    def cuts(self, text: str) -> list[int]:
        """Where special tokens begin in a text."""
        return [match.start() for match in self.template.special.finditer(text)]

    def place(self, found: Tokens, cuts: list[int], end: int) -> int | None:
        """How many of a text's tokens are the prompt that is its first `end` characters; None when the prompt by itself
        has other tokens.
        """
        before = bisect_right(cuts, end - 1) - 1
        start = cuts[before] if before >= 0 else 0
        first = found.special_from(start) if before >= 0 else 0
        if first is None:
            start, first = 0, 0
        alone = self.ids(found.text[start:end])
        if found.ids[first : first + len(alone)].tolist() != alone:
            return None
        return first + len(alone)

    def apart(self, target: str) -> list[int]:
        """The tokens of a target whose first token would otherwise straddle the end of its prompt. A tokenizer may put
        a blank before a text by itself, so the target is looked at behind another character.
        """
        special = self.template.special.search(target)
        beginning = target[: special.start()] if special else target  # a special token may be decoded with blanks
        if not beginning:
            return self.ids(target)
        for sentinel in SENTINELS:
            (found,) = self.tokens([sentinel + target])
            alone = self.ids(sentinel)
            if found.ids[: len(alone)].tolist() == alone and self._decoded(found.ids, alone).startswith(beginning):
                return found.ids[len(alone) :].tolist()
        return self.ids(target)

    def _decoded(self, ids: Any, before: list[int]) -> str:
        """The text that tokens add to those before them."""
        whole = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        start = self.tokenizer.decode(before, clean_up_tokenization_spaces=False)
        return str(whole).removeprefix(start)

"""Where turns begin and end among the tokens of a text.

A prompt must be tokenized as it is when a model is asked, by itself. In the text of an example the same characters may
become other tokens. For example (Qwen3, where the target begins with a newline):

    prompt by itself      ...  <|im_start|>  assistant  \\n  <think>  \\n
    in the example        ...  <|im_start|>  assistant  \\n  <think>  \\n\\n  </think>  ...

Whether they do needs no second look at the whole prompt: special tokens cut a text, so that what stands before the last
one is not touched by what comes later. It is enough to tokenize the prompt from its last special token on (here
`<think>`), a short piece that nearly all turns share.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np

from mlxtune.data.template.template import Template

REMEMBERED = 10_000  # short pieces of text whose tokens are kept
LONGEST_PIECE = 200  # characters of a piece that is kept
AT_ONCE = 1_000_000  # characters that are tokenized together
SENTINELS = ("\n", ";", "a", "0", "=")  # put before a target to see its tokens inside a text


class Tokens:
    """The T tokens of one text."""

    def __init__(self, text: str, encoded: Any, specials: frozenset[int]) -> None:
        """encoded: as the tokenizers library gives it; specials: ids of the tokens that cut a text."""
        self.text = text
        self.ids = np.array(encoded.ids, np.int32)  # [T]
        offsets = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        self.starts, self.ends = offsets[:, 0], offsets[:, 1]  # each [T]: the characters of a token
        self._special = np.flatnonzero(np.isin(self.ids, list(specials)))  # which tokens are special, in their order

    def special_from(self, start: int) -> int | None:
        """The special token that begins at a character; None when none does."""
        at = int(np.searchsorted(self.starts[self._special], start))
        if at < len(self._special) and self.starts[self._special[at]] == start:
            return int(self._special[at])
        return None

    def before_special(self, end: int) -> int:
        """How many tokens stand before the last special token that ends within the first `end` characters."""
        ended = int(np.searchsorted(self.ends[self._special], end, side="right"))  # special tokens up to there
        if ended == 0:
            return 0
        return int(self._special[ended - 1])

    def after(self, end: int) -> int:
        """The first token behind the characters up to `end`. A special token that ends there decides; a tokenizer may
        leave blanks out of the characters of the others.
        """
        if end >= len(self.text):
            return len(self.ids)
        at = int(np.searchsorted(self.ends[self._special], end))
        if at < len(self._special) and self.ends[self._special[at]] == end:
            return int(self._special[at]) + 1
        reached = np.maximum.accumulate(self.ends)  # [T] a token of blanks may end before the one before it
        return int(np.searchsorted(reached, end)) + 1


class Borders:
    """Tokenizes texts with one tokenizer, and finds turns in them."""

    def __init__(self, tokenizer: Any, template: Template) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._specials = frozenset(tokenizer.added_tokens_decoder)  # ids
        self._pieces: dict[str, list[int]] = {}  # a short text -> its tokens by itself

    def tokens(self, texts: list[str]) -> list[Tokens]:
        """Of each text by itself. The library's own objects take some 200 bytes a token, so they are few at a time."""
        out: list[Tokens] = []
        while len(out) < len(texts):
            batch, characters = [], 0
            for text in texts[len(out) :]:
                batch.append(text)
                characters += len(text)
                if characters > AT_ONCE:
                    break
            encodings = self.tokenizer(batch, add_special_tokens=False, return_offsets_mapping=True).encodings
            for text, encoded in zip(batch, encodings, strict=True):
                out.append(Tokens(text, encoded, self._specials))
        return out

    def ids(self, text: str) -> list[int]:
        """The tokens of a text by itself."""
        if not text:
            return []
        if text not in self._pieces:
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(text) > LONGEST_PIECE:
                return ids
            if len(self._pieces) > REMEMBERED:
                self._pieces.clear()
            self._pieces[text] = ids
        return self._pieces[text]

    def cuts(self, text: str) -> list[int]:
        """Where special tokens begin in a text."""
        return [match.start() for match in self.template.special.finditer(text)]

    def place(self, tokens: Tokens, cuts: list[int], end: int) -> int | None:
        """How many of a text's tokens are the prompt that is its first `end` characters; None when the prompt by itself
        has other tokens.

        cuts: where special tokens begin in the text.
        """
        start, first = 0, 0  # the characters that are compared, and their first token
        cuts_before = bisect_right(cuts, end - 1)
        if cuts_before:
            last_cut = cuts[cuts_before - 1]
            special = tokens.special_from(last_cut)
            if special is not None:  # else the tokenizer sees no special token there: the whole prompt is compared
                start, first = last_cut, special
        alone = self.ids(tokens.text[start:end])
        if tokens.ids[first : first + len(alone)].tolist() != alone:
            return None
        return first + len(alone)

    def target_by_itself(self, target: str) -> list[int]:
        """The tokens of a target whose first token would otherwise straddle the end of its prompt. A tokenizer may put
        a blank before a text by itself, so the target is looked at behind another character.
        """
        special = self.template.special.search(target)
        beginning = target[: special.start()] if special else target  # a special token may be decoded with blanks
        if not beginning:
            return self.ids(target)
        for sentinel in SENTINELS:
            (tokens,) = self.tokens([sentinel + target])
            alone = self.ids(sentinel)
            if tokens.ids[: len(alone)].tolist() == alone and self._decoded(tokens.ids, alone).startswith(beginning):
                return tokens.ids[len(alone) :].tolist()
        return self.ids(target)

    def _decoded(self, ids: Any, before: list[int]) -> str:
        """The text that tokens add to those before them."""
        whole = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        start = self.tokenizer.decode(before, clean_up_tokenization_spaces=False)
        return str(whole).removeprefix(start)

"""What a tokenizer's chat template makes of messages: special tokens inside of them, and keys that it does not read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.messages import IDLE, KNOWN

# A token that is markup, such as <|im_end|> or [INST]; thinking inside of an answer is text that templates look for.
LIKE_MARKUP = re.compile(r"(?!</?think(?:ing)?>)[<\[｜].*[>\]｜]", re.DOTALL)


class Markup:
    """The special tokens that a chat template writes, and the message keys that it names."""

    def __init__(self, tokenizer: Any) -> None:
        self.template = str(tokenizer.chat_template or "")
        self.start = str(tokenizer.bos_token or "")
        self.end = str(tokenizer.eos_token or "")
        tokens = sorted(self._written(tokenizer), key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def _written(self, tokenizer: Any) -> set[str]:
        """The special tokens that the template writes, by name or by a variable, and that are markup."""
        written = set()
        for token in tokenizer.added_tokens_decoder.values():
            if token.special and token.content in self.template:
                written.add(token.content)
        if "bos_token" in self.template:
            written.add(self.start)
        if "eos_token" in self.template:
            written.add(self.end)
        return {token for token in written if LIKE_MARKUP.fullmatch(token)}

    def codes(self, record: Record) -> Iterator[tuple[str, str]]:
        """(code of a finding, what was found) of one row."""
        if record.text is not None:
            inner = record.text.strip().removeprefix(self.start).removesuffix(self.end)
            tokens = self._found(inner)
            if tokens:
                yield "rendered", tokens
            return
        texts: list[str] = []
        keys: set[str] = set()
        for message in record.messages or []:
            texts += [str(message.get(key) or "") for key in ("content", "reasoning_content")]
            keys |= message.keys()
        tokens = self._found("\n".join(texts))
        if tokens:
            yield "special", tokens
        for key in sorted(keys - KNOWN - IDLE):
            if not re.search(rf"\b{re.escape(key)}\b", self.template):
                yield "unread", key

    def _found(self, text: str) -> str:
        return ", ".join(sorted(set(self._tokens.findall(text))))

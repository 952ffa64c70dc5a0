"""Answers to plain texts, as tasks of generation ask for them: no chat template, and texts that end an answer.

A base model that was shown five examples goes on with a sixth question after its answer. "Question:" ends the answer
then; it may span several tokens, so the text that was made so far is looked at, and cut before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxtune.data.template.answers import Plain
from mlxtune.evaluate import generate
from mlxtune.evaluate.benchmarks.texts import encoded
from mlxtune.evaluate.engines.local import Asked, Local
from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.model.load import Loaded


class Continuing(Local):
    """A loaded model, as it is, that goes on with texts: the one message of each request."""

    def __init__(self, loaded: Loaded, sampling: Sampling, until: Sequence[str], **others: Any) -> None:
        """until: texts that end an answer and do not belong to it; others: as `Local` takes them."""
        super().__init__(loaded, sampling, **others)
        self.until = [text for text in until if text]
        # A token has at least one byte, so a text of so many bytes lies within the last so many tokens.
        self._window = max((len(text.encode()) for text in self.until), default=0)

    def _as_asked(self, request: Request) -> Asked:
        ids = encoded(self.loaded.tokenizer, request.messages[0]["content"])
        self.loaded.check_ids([ids])
        return Asked(ids, Plain(frozenset()))

    def _is_over(self, made: Sequence[int]) -> bool:
        if not self.until:
            return False
        text = generate.decoded(self.loaded, list(made[-self._window :]))
        return any(end in text for end in self.until)

    def _read(self, request: Request, tokens: list[int]) -> Answer:
        ended = tokens[-1] in generate.end_ids(self.loaded)
        text = generate.decoded(self.loaded, tokens[:-1] if ended else tokens)
        cut = text
        for end in self.until:
            cut = cut.split(end)[0]
        finish = "stop" if ended or cut != text else "length"
        for token in self.loaded.tokenizer.all_special_tokens:
            cut = cut.replace(token, "")
        return Answer(request.id, request.sample, cut, "", finish, len(tokens))  # type: ignore[arg-type]

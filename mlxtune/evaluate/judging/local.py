"""A model in this process as a judge: the chances of its labels, read off its logits.

    ... <|im_start|>assistant\\n[[A]]
    ... <|im_start|>assistant\\n[[B]]
                               ^^ the same tokens so far; the logits behind them say how likely A is and how likely B

Every tokenizer cuts "[[A]]" in its own way. The rows for all labels are tokenized, and the first token in which they
differ is looked at. What all prompts begin with is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxtune.data.dataset.beginnings import common
from mlxtune.errors import UserError
from mlxtune.evaluate import generate
from mlxtune.evaluate.engines import beginning, proof
from mlxtune.evaluate.engines.beginning import Beginning
from mlxtune.evaluate.engines.decode import PREFILL, Counted, own_caches, prefill
from mlxtune.evaluate.engines.request import Messages
from mlxtune.evaluate.judging.judge import Probabilities
from mlxtune.model.corrections.extent import longest_alike
from mlxtune.model.load import Loaded

OPENING = "[["  # of a reply
CLOSING = "]]"
JOINER = "\u2060"  # put into texts that a tokenizer would take for one of its special tokens; it has no width
NO_THOUGHT = {"enable_thinking": False}  # for templates that would open a thought before the reply


class LocalJudge:
    """A loaded model as a judge."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.name = str(loaded.path)
        self.notes: list[str] = []
        self.model = Counted(loaded.model)
        self._special = [token for token in loaded.tokenizer.get_added_vocab() if len(token.strip()) > 1]

    def label_probabilities(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[Probabilities | None]:
        """As `Judge`. Every reply can be read. Raises UserError for labels that the tokenizer does not tell apart."""
        if not prompts:
            return []
        rows, choices = [], []
        for prompt in prompts:
            ids, choice = self._as_asked(prompt, labels)
            rows.append(ids)
            choices.append(choice)
        limit = longest_alike(self.loaded.model)
        may_part = limit is None or max(map(len, rows)) <= limit  # else a row's first part would be rotated as short
        shared = beginning.shared(rows) if may_part else []
        if shared:
            by_length = sorted(rows, key=len)
            why = proof.wrong_together(Counted(self.model.model), [by_length[0], by_length[-1]], shared)
            if why:
                self._say(f"the judge's prompts are computed whole: {why}")
                shared = []
        begin = Beginning.of(self.model, shared)
        replies: list[Probabilities | None] = []
        for ids, choice in zip(rows, choices, strict=True):
            replies.append(self._chances(ids, choice, begin))
        return replies

    def _as_asked(self, prompt: Messages, labels: Sequence[str]) -> tuple[list[int], list[int]]:
        """(Token ids up to where the labels differ, the token of each label there)."""
        text = self._text(prompt)
        ways = [
            list(self.loaded.tokenizer(f"{text}{OPENING}{label}{CLOSING}", add_special_tokens=False)["input_ids"])
            for label in labels
        ]
        same = min(common(ways[0], way) for way in ways[1:])
        if any(len(way) <= same for way in ways) or len({way[same] for way in ways}) < len(labels):
            raise UserError(
                f"{self.name}: its tokenizer does not tell the replies {', '.join(labels)} apart", "Take another judge."
            )
        self.loaded.check_ids([ways[0]])
        return ways[0][:same], [way[same] for way in ways]

    def _text(self, prompt: Messages) -> str:
        """The prompt as the chat template prints it. What the answers hold of the model's own special tokens is broken
        up: it would end the user's message in the middle.
        """
        messages = [{**message, "content": self._harmless(str(message["content"]))} for message in prompt]
        template = generate.template_for(self.loaded, NO_THOUGHT)
        if template is None:
            return "\n\n".join(message["content"] for message in messages) + "\n\n"
        return generate.prompt_text(template, messages)

    def _harmless(self, text: str) -> str:
        for token in self._special:
            if token in text:
                text = text.replace(token, token[0] + JOINER + token[1:])
        return text

    def _chances(self, ids: list[int], choice: list[int], begin: Beginning) -> Probabilities:
        """choice: the token of each label."""
        caches = begin.under(1) if begin.tokens else own_caches(self.model)
        unseen = ids[begin.tokens : -1]
        if unseen:
            prefill(self.model, caches, [unseen], max(PREFILL, len(unseen)))
        logits = self.model(mx.array([ids[-1:]]), caches)[0, -1].astype(mx.float32)
        chances: Probabilities = mx.softmax(logits[mx.array(choice)]).tolist()  # type: ignore[assignment]
        return chances

    def _say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

"""A loaded model as lm_eval asks one: it can be given to `lm_eval.simple_evaluate(model=...)` as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mlxtune.evaluate.benchmarks import texts
from mlxtune.evaluate.benchmarks.continuing import Continuing
from mlxtune.evaluate.benchmarks.likelihood import Likelihood, Scorer
from mlxtune.evaluate.benchmarks.parts import Pair
from mlxtune.evaluate.engines.request import Request
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.model.load import Loaded

MOST_TOKENS = 256  # of an answer, where a task says nothing: lm_eval's own


def longest_of(loaded: Loaded) -> int | None:
    """The longest row, in tokens, that the model was made for; None: its files say nothing."""
    config = {**loaded.config, **(loaded.config.get("text_config") or {})}
    found = config.get("max_position_embeddings") or config.get("n_positions") or config.get("n_ctx")
    return found if isinstance(found, int) else None


class Model(TemplateLM):
    """The model with its adapter on, or without one. Texts are given to it as they are, without a chat template."""

    def __init__(self, loaded: Loaded, rows_at_once: int | None = None) -> None:
        """rows_at_once: how many rows at most are computed together, None for as many as the memory takes."""
        super().__init__()
        self.loaded = loaded
        self.tokenizer = loaded.tokenizer
        self.scorer = Scorer(loaded, rows_at_once)
        self._most = rows_at_once

    @property
    def eot_token_id(self) -> int:
        end: int = self.tokenizer.eos_token_id
        return end

    @property
    def prefix_token_id(self) -> int:
        return texts.prefix_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return str(self.loaded.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return texts.encoded(self.tokenizer, string, add_special_tokens)

    def pairs_of(self, instance: Any) -> list[Pair]:
        """What is asked by a request of likelihood: one pair, or one for each window of a rolling text."""
        longest = longest_of(self.loaded)
        if instance.request_type == "loglikelihood":
            context, continuation = instance.args
            return [texts.pair(self.tokenizer, context, continuation, longest)]
        (text,) = instance.args
        ids = self.tok_encode(text)
        windows = get_rolling_token_windows(ids, self.prefix_token_id, longest or max(1, len(ids)), 1)
        found = []
        for window in windows:
            before, after = make_disjoint_window(window)
            found.append(Pair(tuple(before), tuple(after)))
        return found

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Likelihood]:
        return self._scored([pair for request in requests for pair in self.pairs_of(request)])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [self.pairs_of(request) for request in requests]
        found = iter(self._scored([pair for own in windows for pair in own]))
        return [sum(next(found)[0] for _ in own) for own in windows]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[Likelihood]:
        longest = longest_of(self.loaded)
        return self._scored([texts.cut(context, text, longest) for _, context, text in requests])

    def _scored(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        if not pairs:
            return []
        found: dict[int, Likelihood] = {}
        for part in self.scorer.plan(pairs, self.scorer.prepare(pairs)):
            found |= self.scorer.likelihoods(part, pairs)
        self.scorer.forget()
        return [found[place] for place in range(len(pairs))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        made: dict[int, str] = {}
        for settings, places in by_settings(requests).items():
            engine = self.continuing(settings)
            asked = [Request(str(place), [{"role": "user", "content": requests[place].args[0]}]) for place in places]
            for batch in engine.plan(asked):
                for answer in engine.answers([asked[index] for index in batch]):
                    made[int(answer.id)] = answer.text
        return [made[place] for place in range(len(requests))]

    def continuing(self, settings: tuple[Any, ...]) -> Continuing:
        """What answers requests of one kind. settings: as `by_settings` gives them."""
        until, most, temperature = settings
        return Continuing(self.loaded, Sampling(most, temperature), until, rows_at_once=self._most)


def by_settings(requests: Sequence[Any]) -> dict[tuple[Any, ...], list[int]]:
    """(What ends an answer, its longest length in tokens, the temperature) -> the places of the requests for it."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for place, request in enumerate(requests):
        settings = normalize_gen_kwargs(request.args[1], MOST_TOKENS)
        key = (tuple(settings["until"]), settings["max_gen_toks"], float(settings.get("temperature") or 0.0))
        found.setdefault(key, []).append(place)
    return found

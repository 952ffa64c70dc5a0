"""How likely a model finds given texts, several at once where that is proven, shared beginnings computed once.

The log-likelihood of a text is the sum of log p(token | all before it) over its tokens, in nats. Logits are computed
for the text's positions alone, by the head apart from the trunk where that is proven (`compute.head`).

Legend: B rows, T tokens, N positions that predict something wanted, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import mlx.core as mx
import numpy as np

from mlxtune.compute.head import Split
from mlxtune.compute.head_loss import chunks
from mlxtune.data.dataset.beginnings import common
from mlxtune.evaluate.benchmarks.parts import Pair, Part, Row, parts, rows_of
from mlxtune.evaluate.engines import proof, room
from mlxtune.evaluate.engines.beginning import Beginning
from mlxtune.evaluate.engines.decode import PREFILL, Caches, Counted, own_caches, prefill, repeated
from mlxtune.evaluate.score import SPLIT_TOKENS
from mlxtune.model.corrections.extent import longest_alike
from mlxtune.model.load import Loaded

Likelihood = tuple[float, bool]  # nats; whether each token of the text was the most likely one


class Scorer:
    """Scores pairs with a model as it is: its adapter on or off."""

    def __init__(self, loaded: Loaded, rows_at_once: int | None = None) -> None:
        """rows_at_once: how many rows at most are computed together, None for as many as the memory takes."""
        self.loaded = loaded
        self.notes: list[str] = []  # what a person must know of how it computes
        self.passes = 0
        self.tokens = 0  # that went through the trunk, padding included; proofs aside
        self._model = Counted(loaded.model)
        self._most = rows_at_once
        self._split: Split | None = None
        self._begun: list[Beginning] = []  # those of the part before, each of which continues the one before it
        self._begun_ids: tuple[int, ...] = ()  # the tokens of the last of them

    def prepare(self, pairs: Sequence[Pair]) -> int:
        """How many rows may be computed together: after proofs, what the memory takes. pairs: at least one.

        Raises UserError for a token that the model does not know.
        """
        self.loaded.check_ids([[*pair.context, *pair.text] for pair in pairs])
        by_length = sorted(rows_of(pairs), key=lambda row: len(row.ids))
        self._split = Split.of(self.loaded.model, mx.array([by_length[-1].ids[:SPLIT_TOKENS]]))
        return self._rows_at_once(by_length)

    def plan(self, pairs: Sequence[Pair], most: int) -> list[Part]:
        """Which pairs are computed together. most: rows at once, as `prepare` gives them."""
        return parts(rows_of(pairs), most, longest_alike(self.loaded.model))

    def forget(self) -> None:
        """Let go of the beginnings: they are another model's once its adapter is switched."""
        self._begun, self._begun_ids = [], ()

    def likelihoods(self, part: Part, pairs: Sequence[Pair]) -> dict[int, Likelihood]:
        """A pair's place -> its log-likelihood, for the pairs of one part. pairs: all that were planned."""
        done = part.shared[-1] if part.shared else 0
        caches = self._caches(part)
        needed = [range(row.first, len(row.ids)) for row in part.rows]
        outputs = self._outputs(part.rows, needed, done, caches)  # [N, D], without a split [N, V]
        starts = np.cumsum([0, *map(len, needed)])  # of each row, in N
        owners: list[tuple[int, int, int]] = []  # of each wanted token: its pair's place, its position in N, its id
        for row, start in zip(part.rows, starts, strict=False):
            for place in row.places:
                for offset, token in enumerate(pairs[place].text):
                    owners.append((place, int(start) + pairs[place].first - row.first + offset, token))
        sums = dict.fromkeys((place for row in part.rows for place in row.places), 0.0)
        greedy = dict.fromkeys(sums, True)
        for place, value, is_first in self._found(outputs, owners):
            sums[place] += value
            greedy[place] = greedy[place] and is_first
        return {place: (sums[place], greedy[place]) for place in sums}

    def _rows_at_once(self, by_length: Sequence[Row]) -> int:
        prompts = [list(row.ids) for row in by_length if len(row.ids) > 1]
        if len(prompts) < 2:
            return 1
        shortest, longest = prompts[0], prompts[-1]
        begin = (
            longest[: min(common(shortest, longest), len(shortest) - 2, len(longest) - 2)] if len(shortest) > 2 else []
        )
        why = proof.wrong_together(Counted(self.loaded.model), [shortest, longest], begin)
        if why:
            self.notes.append(f"texts are scored one by one: {why}")
            return 1
        return self._most or room.rows_at_once(Counted(self.loaded.model), longest, 1)

    def _caches(self, part: Part) -> Caches:
        """Those of a part's rows, which hold the beginning that they share."""
        if not part.shared:
            own = own_caches(self._model)
            return own if len(part.rows) == 1 else repeated(own, len(part.rows))
        ids = part.rows[0].ids
        while self._begun and not (
            self._begun[-1].tokens in part.shared and self._begun_ids == ids[: self._begun[-1].tokens]
        ):
            self._begun.pop()
            self._begun_ids = self._begun_ids[: self._begun[-1].tokens if self._begun else 0]
        for length in part.shared[len(self._begun) :]:
            start = len(self._begun_ids)
            caches = deepcopy(self._begun[-1].caches) if self._begun else own_caches(self._model)
            passes, tokens = self._model.passes, self._model.tokens
            prefill(self._model, caches, [ids[start:length]])
            self.passes += self._model.passes - passes
            self.tokens += self._model.tokens - tokens
            self._begun.append(Beginning(length, caches))
            self._begun_ids = ids[:length]
        return self._begun[-1].under(len(part.rows))

    def _outputs(self, rows: Sequence[Row], needed: Sequence[range], done: int, caches: Caches) -> mx.array:
        """[N, D] hidden states, without a split [N, V] logits, at the needed positions of each row, in their order."""
        lengths = [len(row.ids) - done for row in rows]
        width = max(lengths)
        missing = [width - length for length in lengths]
        if any(missing):
            for cache in caches:
                cache.prepare(lengths=lengths, right_padding=missing)
        ids = mx.array([[*row.ids[done:], *[0] * short] for row, short in zip(rows, missing, strict=True)])
        limit = longest_alike(self.loaded.model)
        at_once = width if limit is not None and width > limit else PREFILL
        pieces: list[list[mx.array]] = [[] for _ in rows]
        for start in range(0, width, at_once):
            piece = ids[:, start : start + at_once]
            self.passes += 1
            self.tokens += piece.size
            out = self._split.hidden(piece, caches) if self._split else self.loaded.model(piece, cache=caches)
            for row, positions in enumerate(needed):
                low = max(0, positions.start - done - start)
                high = max(low, min(positions.stop - done - start, piece.shape[1]))
                if high > low:
                    pieces[row].append(out[row, low:high])
            mx.eval([cache.state for cache in caches], pieces)
        return mx.concatenate([piece for own in pieces for piece in own])

    def _found(self, outputs: mx.array, owners: Sequence[tuple[int, int, int]]) -> list[tuple[int, float, bool]]:
        """(The pair's place, log p in nats, whether it was the most likely token) of each wanted token."""
        width = self._split.vocabulary if self._split else outputs.shape[-1]
        found: list[tuple[int, float, bool]] = []
        for chunk in chunks(outputs, width):
            rows = outputs[chunk]
            logits = (self._split.logits(rows) if self._split else rows).astype(mx.float32)
            inside = [owner for owner in owners if chunk.start <= owner[1] < chunk.stop]
            positions = mx.array([owner[1] - chunk.start for owner in inside])
            tokens = mx.array([owner[2] for owner in inside])
            values = logits[positions, tokens] - mx.logsumexp(logits, axis=-1)[positions]
            is_first = mx.argmax(logits, axis=-1)[positions] == tokens
            mx.eval(values, is_first)
            listed: tuple[Any, Any] = (values.tolist(), is_first.tolist())
            for owner, value, first in zip(inside, *listed, strict=True):
                found.append((owner[0], value, first))
        return found

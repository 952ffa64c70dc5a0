"""The way a run takes: the fastest one that is proven on the user's own model, with batches made to fit the memory.

Every way has a memory of its own, so each is fitted before it is proven: a run that falls back on a slower way, which
needs more, gets smaller batches or checkpointing, and those are part of what is then proven.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxtune import backend, gpu_errors
from mlxtune.config import Config
from mlxtune.data.batches import Plan, lengths_of
from mlxtune.errors import UserError
from mlxtune.train import fast, fit, proof
from mlxtune.train.loss import Path
from mlxtune.train.proof import Room, Verdict
from mlxtune.train.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Choice:
    """path: how the loss is computed; config, rows: the configuration and its plan of batches, made to fit; notes: what
    a person must know.
    """

    path: Path
    config: Config
    rows: Plan
    notes: list[str]


def choose(
    model: nn.Module,
    model_config: Mapping[str, Any],
    config: Config,
    rows: Plan,
    dtype: mx.Dtype,
    limit: int | None = None,
    ranks: Ranks = ALONE,
    narrower: str = "",
    proving: Callable[[], None] = lambda: None,
) -> Choice:
    """The way for a model whose adapter is attached. dtype: of the run's activations; limit: bytes of memory, None:
    any; ranks: all take the same way and the same batches; narrower: as `floats.narrower`; proving: called before each
    proof, which may last.

    Raises UserError when not even the plain way fits the memory.
    """
    wanted, notes = fast.wanted(model, rows.examples, config)
    search = _Search(model, model_config, config, rows, dtype, limit, wanted, narrower, proving)
    number = 0
    while True:
        number, found = search.first_from(number)
        slowest = ranks.highest(number)
        if ranks.lowest(number) == slowest:
            return replace(found, notes=[*found.notes, *notes, *search.refused])
        number = slowest


class _Search:
    """Goes through the ways to compute a run. refused: why the ways before were not taken."""

    def __init__(
        self,
        model: nn.Module,
        model_config: Mapping[str, Any],
        config: Config,
        rows: Plan,
        dtype: mx.Dtype,
        limit: int | None,
        wanted: Path,
        narrower: str,
        proving: Callable[[], None],
    ) -> None:
        self.model = model
        self.model_config = model_config
        self.config = config
        self.rows = rows
        self.dtype = dtype
        self.limit = limit
        self.narrower = narrower
        self.proving = proving
        self.ways = fast.in_order(wanted)
        self.refused: list[str] = []
        self._tried: set[Path] = set()

    def first_from(self, number: int) -> tuple[int, Choice]:
        """(number, choice) of the first way from `number` on that is proven; the last one is the plain way."""
        while True:
            way, checkpoints = self.ways[number]
            choice = self._fitted(way, checkpoints)
            if choice.path == Path():
                return number, choice
            if choice.path not in self._tried:
                self._tried.add(choice.path)
                verdict = self._verdict(choice)
                if not verdict.wrong:
                    return number, replace(choice, notes=[*choice.notes, *([verdict.note] if verdict.note else [])])
                self.refused.append(f"not used, for {verdict.wrong}: {fast.describe(choice.path)}")
                if verdict.hopeless:
                    number = len(self.ways) - 2
            number += 1

    def _fitted(self, way: Path, checkpoints: bool) -> Choice:
        try:
            config, rows, notes = fit.fitted(
                self.model,
                way,
                self.config,
                self.model_config,
                self.dtype,
                self.rows,
                self.limit,
                checkpoints,
                self.narrower,
            )
        except UserError as error:
            if not self.refused:
                raise
            raise UserError(f"{error.message}; what needs less was {self.refused[0]}", error.hint) from error
        recompute = fast.every_nth(config.train) if checkpoints else 0
        return Choice(replace(way, recompute=recompute), config, rows, notes)

    def _verdict(self, choice: Choice) -> Verdict:
        self.proving()
        room = fit.proof_room(
            self.model, choice.path, choice.config, self.model_config, self.dtype, choice.rows, self.limit
        )
        try:
            verdict = self._proof(choice, room)
        except Exception as error:  # whatever a model's own code raises
            if gpu_errors.recognise(error):  # which is not the model's
                raise
            reason = (str(error).splitlines() or [""])[0]
            return Verdict(f"this model fails with it ({type(error).__name__}: {reason})")
        finally:
            mx.clear_cache()  # the run has other shapes
        return verdict

    def _proof(self, choice: Choice, room: Room) -> Verdict:
        """With half the rows' tokens once more where the memory did not suffice: others use it too."""
        try:
            return self._proven(choice, room)
        except (RuntimeError, MemoryError) as error:
            failure = gpu_errors.recognise(error)
            if failure is None or not failure.of_memory:
                raise
        backend.recover()
        fewer = max(proof.FEWEST_TOKENS // 2, room.tokens // 2)
        return self._proven(choice, replace(room, tokens=fewer, checkpointed=True))

    def _proven(self, choice: Choice, room: Room) -> Verdict:
        grouped = self.config.data.group_by_prefix
        batch = proof.rows_for(self.rows.examples, choice.path, grouped, room.tokens)
        verdict = proof.of(self.model, choice.path, batch, self.dtype, room)
        window, width = fit.window_of(self.model_config), batch.ids.shape[1]
        if not verdict.wrong and width <= window < lengths_of(self.rows.examples).max():
            unseen = f"the proof's rows end after {width} tokens, for memory: a window of {window} is not proven"
            return replace(verdict, note="; ".join(filter(None, [verdict.note, unseen])))
        return verdict

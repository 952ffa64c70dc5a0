"""The way a run takes: the fastest one that is proven on the user's own model, with batches made to fit the memory.

Every way has a memory of its own, so each is fitted before it is proven: a run that falls back on a slower way, which
needs more, gets smaller batches or checkpointing, and those are part of what is then proven.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice

import mlx.core as mx

from mlxtune.compute import fast_ways, fit_memory, proof, proof_rows, trunk_choice
from mlxtune.compute.fast_ways import Blocks
from mlxtune.compute.fit_memory import Fitted, Given
from mlxtune.compute.loss import Way
from mlxtune.compute.proof import Room, Verdict
from mlxtune.config.resolve import Config
from mlxtune.data.dataset.batches import Plan, lengths_of
from mlxtune.errors import UserError
from mlxtune.machine import backend, gpu_errors
from mlxtune.train.events import Listener, nobody
from mlxtune.train.ranks import ALONE, Ranks

LOOKED_AT = 16  # micro-batches of a run, for rows that share at several depths
PROVING = "proving the fast ways on this model and rows"  # which may take most of a minute


def choose(given: Given, config: Config, rows: Plan, ranks: Ranks = ALONE, listener: Listener = nobody) -> Fitted:
    """The way to run a configuration with these batches, and both made to fit.

    ranks: all take the same way and the same batches; listener: told of each proof, which may last. Raises UserError
    when not even the plain way fits the memory.
    """
    wanted, notes = fast_ways.fastest_way(given.model, rows.examples, config, rows.shares)
    wanted, more = trunk_choice.with_kept_trunk(wanted, given.model, config, rows, ranks.size)
    notes += more
    search = _Search(given, config, rows, fast_ways.ways_to_try(wanted), listener)
    number = 0
    while True:
        number, run = search.first_from(number)
        slowest = ranks.highest(number)
        if ranks.lowest(number) == slowest:
            return replace(run, notes=[*run.notes, *notes, *search.refused])
        number = slowest  # what one rank found wrong, none may take: all look on from there


@dataclass
class _Search:
    """Goes through the ways to compute a run, the fastest first."""

    given: Given  # what the batches cannot change
    config: Config  # as the user wants it; each way is fitted from here
    rows: Plan  # the batches of `config`
    ways: list[tuple[Way, Blocks]]  # as `fast_ways.ways_to_try` gives them
    listener: Listener  # told of each proof
    refused: list[str] = field(default_factory=list)  # why the ways before were not taken
    tried: set[Way] = field(default_factory=set)  # ways that were proven or refused

    def first_from(self, number: int) -> tuple[int, Fitted]:
        """(number, choice) of the first way from `number` on that is proven; the last one is the plain way."""
        while True:
            run = self._fitted(*self.ways[number])
            if run is not None and run.way == Way():
                return number, run
            if run is None or run.way in self.tried:
                number += 1
                continue
            self.tried.add(run.way)
            verdict = self._verdict(run)
            if not verdict.wrong:
                notes = [verdict.note] if verdict.note else []
                return number, replace(run, notes=run.notes + notes)
            self.refused.append(f"not used, for {verdict.wrong}: {fast_ways.describe(run.way)}")
            number = len(self.ways) - 1 if verdict.hopeless else number + 1

    def _fitted(self, way: Way, blocks: Blocks) -> Fitted | None:
        """The run made to fit when it is computed so. None: it fits only in pieces, in which another way may do."""
        try:
            return fit_memory.fit(self.given, way, self.config, self.rows, blocks)
        except UserError as error:
            if blocks is Blocks.WHOLE:
                return None
            if not self.refused:
                raise
            raise UserError(f"{error.message}; what needs less was {self.refused[0]}", error.hint) from error

    def _verdict(self, run: Fitted) -> Verdict:
        """Whether this model gives the plain way's loss and gradients when it is computed so."""
        self.listener({"kind": "doing", "what": PROVING})
        room = fit_memory.proof_room(self.given, run)
        try:
            return self._proof(run, room)
        except Exception as error:  # whatever a model's own code raises
            if gpu_errors.recognise(error):  # which is not the model's
                raise
            reason = (str(error).splitlines() or [""])[0]
            return Verdict(f"this model fails with it ({type(error).__name__}: {reason})")
        finally:
            mx.clear_cache()  # the run has other shapes

    def _proof(self, run: Fitted, room: Room) -> Verdict:
        """Proven, with half the rows' tokens once more where the memory did not suffice: others use it too."""
        try:
            return self._proven(run, room)
        except (RuntimeError, MemoryError) as error:
            failure = gpu_errors.recognise(error)
            if failure is None or not failure.of_memory:
                raise
        backend.recover()
        fewer = max(proof.FEWEST_TOKENS // 2, room.tokens // 2)
        return self._proven(run, replace(room, tokens=fewer, checkpointed=True))

    def _proven(self, run: Fitted, room: Room) -> Verdict:
        """Proven on rows of the run that take no more than `room`."""
        examples = self.rows.examples
        batches = islice(run.rows.micro_batches(), LOOKED_AT)
        batch = proof_rows.rows_for(examples, run.way, self.rows.shares, room.tokens, batches)
        verdict = proof.prove(self.given.model, run.way, batch, self.given.dtype, room)
        if verdict.wrong:
            return verdict
        window = fit_memory.window_of(self.given.model_config)
        width = batch.ids.shape[1]
        if not width <= window < lengths_of(examples).max():
            return verdict
        unseen = f"the proof's rows end after {width} tokens, for memory: a window of {window} is not proven"
        return replace(verdict, note=f"{verdict.note}; {unseen}" if verdict.note else unseen)

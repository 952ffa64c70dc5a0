"""One side of a benchmark as an engine, so that its answers are kept as they come (`engines.journal`).

    request of lm_eval              id                  answer's text
    loglikelihood of a choice       mmlu/anatomy/7#2    [-3.25, false]      nats; whether it was the most likely text
    loglikelihood_rolling           wikitext/1#0        [-812.5, false]
    generate_until                  gsm8k/12#0          the text

Both sides of a model with its adapter are planned as one: in 16 bits a result depends on what is computed beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxtune_convert.files import json_text

from mlxtune.adapter.attach import switched_off
from mlxtune.evaluate.benchmarks.continuing import Continuing
from mlxtune.evaluate.benchmarks.model import Model, by_settings
from mlxtune.evaluate.benchmarks.parts import Pair, rows_of
from mlxtune.evaluate.benchmarks.parts import Part as Together
from mlxtune.evaluate.benchmarks.tasks import Part
from mlxtune.evaluate.engines import applied
from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.model.load import Loaded


def instances_of(parts: Sequence[Part]) -> dict[str, Any]:
    """The id of each request -> lm_eval's own, in the tasks' order."""
    found = {}
    for part in parts:
        for instance in part.task.instances:
            found[f"{part.id_of(instance.doc_id)}#{instance.idx}"] = instance
    return found


class Asking:
    """A loaded model as what answers the requests of tasks."""

    def __init__(
        self, loaded: Loaded, instances: dict[str, Any], adapter: Path | None = None, is_base: bool = False
    ) -> None:
        """instances: as `instances_of` gives them; adapter: the folder of the one that is on the model; is_base: it is
        switched off meanwhile.
        """
        self.model = Model(loaded)
        self.name = str(loaded.path) if adapter is None or is_base else f"{loaded.path} with {adapter}"
        self.beside: Asking | None = None  # the other side of the same model
        self._own_notes: list[str] = []
        self._adapter = None if is_base else adapter
        self._is_base = is_base
        self._place_of = {id: place for place, id in enumerate(instances)}
        self._instances = list(instances.values())
        of = {kind: self._of_kind(kind) for kind in ("loglikelihood", "generate_until", "loglikelihood_rolling")}
        self._scored, self._generated, self._rolled = of.values()  # places of the requests of each kind
        self._pair_of = {place: index for index, place in enumerate(self._scored)}
        self._pairs: list[Pair] = []  # of those that are scored, in their order
        self._rows_at_once = 0  # 0: not prepared
        self._continuing: dict[tuple[Any, ...], Continuing] = {}  # by settings
        self._plans: dict[tuple[Any, ...], list[list[int]]] = {}  # of those: places of requests
        self._parts: dict[tuple[int, ...], Together] = {}  # by the places of their requests

    @property
    def notes(self) -> list[str]:
        found = [*self._own_notes, *self.model.scorer.notes]
        for engine in self._continuing.values():
            found += [note for note in engine.notes if "no chat template" not in note]  # here there is never one
        return list(dict.fromkeys(found))

    def work(self) -> dict[str, int]:
        scorer, others = self.model.scorer, [engine.model for engine in self._continuing.values()]
        return {
            "passes": scorer.passes + sum(one.passes for one in others),
            "computed": scorer.tokens + sum(one.tokens for one in others),
        }

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """The one that suits both sides."""
        sides = [self] if self.beside is None else [self, self.beside]
        for side in sides:
            side.prepare(requests)
        batches = []
        if self._pairs:
            for part in self.model.scorer.plan(self._pairs, min(side._rows_at_once for side in sides)):
                places = [self._scored[place] for row in part.rows for place in row.places]
                self._parts[tuple(places)] = part
                batches.append(places)
        for settings in self._plans:
            plans = [side._plans[settings] for side in sides]
            finest: list[list[int]] = max(plans, key=len)
            batches += finest
        return [*batches, *([self._rolled] if self._rolled else [])]

    def prepare(self, requests: Sequence[Request]) -> None:
        """Encode the texts, prove what is to be proven, and see what the memory takes; once."""
        if self._rows_at_once:
            return
        with self._side():
            self._rows_at_once = 1
            self._pairs = [self.model.pairs_of(self._instances[place])[0] for place in self._scored]
            if self._adapter is not None:
                note = applied.note_on(self.model.loaded, self._adapter, self._first_ids())
                self._own_notes += [note] if note else []
            if self._pairs:
                self._rows_at_once = self.model.scorer.prepare(self._pairs)
            of_settings = by_settings([self._instances[place] for place in self._generated])
            for settings, own in of_settings.items():
                engine = self._continuing[settings] = self.model.continuing(settings)
                places = [self._generated[place] for place in own]
                planned = engine.plan([requests[place] for place in places])
                self._plans[settings] = [[places[index] for index in batch] for batch in planned]

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        if self.beside is not None:
            self.beside.model.scorer.forget()  # what the other side has read fills the memory
        places = [self._place_of[request.id] for request in requests]
        with self._side():
            kind = self._instances[places[0]].request_type
            if kind == "generate_until":
                (settings,) = by_settings([self._instances[place] for place in places])
                return self._continuing[settings].answers(requests)
            if kind == "loglikelihood":
                found: list[Any] = self._likelihoods(places)
            else:
                instances = [self._instances[place] for place in places]
                found = [(value, False) for value in self.model.loglikelihood_rolling(instances)]
        return [
            Answer(request.id, 0, json_text(list(result)), "", "stop", 0)
            for request, result in zip(requests, found, strict=True)
        ]

    def _likelihoods(self, places: Sequence[int]) -> list[Any]:
        inside = [self._pair_of[place] for place in places]
        part = self._parts.get(tuple(places))
        if part is None:  # of a plan that an earlier process made with another memory
            own = set(inside)
            part = Together(tuple(row for row in rows_of(self._pairs) if own.intersection(row.places)), ())
        found = self.model.scorer.likelihoods(part, self._pairs)
        return [found[place] for place in inside]

    def _first_ids(self) -> Sequence[int]:
        if self._pairs:
            return self._pairs[0].inputs
        return self.model.tok_encode(self._instances[0].args[0])

    def _of_kind(self, kind: str) -> list[int]:
        return [place for place, instance in enumerate(self._instances) if instance.request_type == kind]

    @contextlib.contextmanager
    def _side(self) -> Iterator[None]:
        with switched_off(self.model.loaded.model) if self._is_base else contextlib.nullcontext():
            yield


def both(loaded: Loaded, instances: dict[str, Any], adapter: Path) -> tuple[Asking, Asking]:
    """The base and what was tuned of it, from the same weights."""
    base, tuned = Asking(loaded, instances, adapter, is_base=True), Asking(loaded, instances, adapter)
    base.beside, tuned.beside = tuned, base
    return base, tuned

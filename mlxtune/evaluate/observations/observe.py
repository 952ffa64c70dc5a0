"""All observations of one evaluation, or of a run alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlxtune.evaluate.observations import of_answers, of_run, of_training
from mlxtune.evaluate.observations.seen import Observation, Seen


def observations(seen: Seen) -> list[dict[str, Any]]:
    """What went wrong, for the document; [] where nothing did, which says only that no threshold was reached."""
    return _as_json([*of_answers.observed(seen), *of_run.observed(seen.events), *of_training.observed(seen)])


def observations_of_run(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same of a run, without any evaluation. events: as `train.events` describes them."""
    return _as_json(of_run.observed(events))


def _as_json(found: Iterable[Observation]) -> list[dict[str, Any]]:
    return [one.as_json() for one in found]

"""All observations of one evaluation."""

from __future__ import annotations

from typing import Any

from mlxtune.evaluate.observations import of_answers, of_training
from mlxtune.evaluate.observations.seen import Seen


def observations(seen: Seen) -> list[dict[str, Any]]:
    """What went wrong, for the document; [] where nothing did, which says only that no threshold was reached."""
    return [one.as_json() for room in (of_answers, of_training) for one in room.observed(seen)]

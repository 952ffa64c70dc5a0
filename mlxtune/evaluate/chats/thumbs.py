"""How many answers got thumbs up, for each adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxtune.evaluate.chats.log import Said
from mlxtune.evaluate.statistics.proportions import wilson

NOTE = (
    "each was asked something else, and answers of one conversation are not independent: shares that differ say less "
    "than `mlxtune eval --suite`, where all answer the same prompts"
)
SHORT = 8  # letters of a digest that are shown


def shares(answers: Sequence[Said]) -> dict[str, Any]:
    """{"rated", "unrated", "adapters": [{"adapter", "model", "digest", "up", "rated", "unrated", "share", "interval"}],
    "notes"}: of each adapter the share of thumbs up among its rated answers, with Wilson's 95% interval; None where
    none is rated. The highest share first.
    """
    speakers: dict[tuple[str, str | None, str | None], list[Said]] = {}
    for said in answers:
        speakers.setdefault((said.model, said.adapter, said.digest), []).append(said)
    found = []
    for (model, adapter, digest), some in speakers.items():
        rated = [said.label for said in some if said.label is not None]
        entry: dict[str, Any] = {"adapter": adapter, "model": model, "digest": digest, "up": sum(rated)}
        entry |= {"rated": len(rated), "unrated": len(some) - len(rated), "share": None, "interval": None}
        if rated:
            entry |= {"share": sum(rated) / len(rated), "interval": list(wilson(sum(rated), len(rated)))}
        found.append(entry)
    found.sort(key=lambda entry: -1.0 if entry["share"] is None else entry["share"], reverse=True)
    rated_in_all = sum(entry["rated"] for entry in found)
    notes = [NOTE] if sum(entry["rated"] > 0 for entry in found) > 1 else []
    return {"rated": rated_in_all, "unrated": len(answers) - rated_in_all, "adapters": found, "notes": notes}


def name_of(entry: dict[str, Any]) -> str:
    """Of an entry of `shares`, for people."""
    if entry["adapter"] is None:
        return f"{entry['model']} (base)"
    return f"{entry['adapter']} ({str(entry['digest'])[:SHORT]})"

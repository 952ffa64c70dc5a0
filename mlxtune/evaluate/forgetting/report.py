"""What was forgotten: the part "forgetting" of an evaluation's document.

Three numbers, because each alone can mislead: how far the tuned model drifts from its base on the base's own answers,
how much worse it predicts general text, and how many basic questions it still answers.

Of the loss a rise counts by what it is a part of: of 2 nats a token 0.1 nats are 5%. What a model says itself it
predicts with a loss near 0, of which any change would be a large part; below 1 nat it is a part of 1 nat:

    base 2.00, tuned 2.12:  0.12 / 2.00 = 6%        base 0.20, tuned 0.23:  0.03 / 1.00 = 3%
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune.evaluate.forgetting.drift import Drift, drift
from mlxtune.evaluate.forgetting.texts import ANSWER_TOKENS, Text, own_answers, texts_of
from mlxtune.evaluate.kept import Kept
from mlxtune.evaluate.statistics.resampling import bootstrap
from mlxtune.model.load import Loaded

RISE = 0.05  # of the loss, from which it is said
WHOLE = 1.0  # nats a token: a rise is a part of the base's loss, or of this where that is less
FIX = (
    "mix general rows into the data (data.sources with weights), lower train.lr, fewer train.epochs, a smaller "
    "lora.rank"
)
OWN = "the base's own answers"


def measure(
    loaded: Loaded,
    template: tuple[dict[str, Any], str],
    adapter: Path,
    file: Path | None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """loaded: with the adapter on it; template: as `Local` takes it; file: of general texts, None: the base's own
    answers are the text; kept: the file where what was computed of this model and adapter is kept as it comes, None for
    nowhere. Raises UserError for a file that cannot be used.
    """
    done = Kept(kept)
    notes: list[str] = []
    general = None
    if file is not None:
        general, said = texts_of(file, loaded, template)
        notes += said
    answers, said = own_answers(loaded, template, adapter, done)
    notes += said
    drifts = _drifts(loaded, answers, done)
    of_loss = drifts if general is None else _drifts(loaded, general, done)
    found = {
        "prompts": len(drifts),
        "tokens": sum(one.tokens for one in drifts),
        "answer_tokens": ANSWER_TOKENS,
        "drift": _drift(drifts),
        "loss": {"of": OWN if file is None else str(file), **_loss(of_loss)},
    }
    return {**found, "notes": notes}


def _drifts(loaded: Loaded, texts: Sequence[Text], done: Kept) -> list[Drift]:
    found = []
    for text in texts:
        name = "drift " + hashlib.sha256(repr((text.first, text.ids)).encode()).hexdigest()
        if name not in done:
            done.keep({name: asdict(drift(loaded, text))})
        found.append(Drift(**done[name]))
    return found


def with_flags(measured: Mapping[str, Any], checks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Beside what was measured, what of it is to be worried about, and what to do. checks: of the basic questions."""
    flagged = []
    loss = measured["loss"]
    low, high = loss["interval"]
    if loss["rise"] >= RISE and low > 0:
        flagged.append(
            {
                "measure": f"the loss on {loss['of']} rose from {loss['base']:.3f} to {loss['tuned']:.3f} nats a token "
                f"(95% interval {low:+.3f} to {high:+.3f})",
                "value": loss["rise"],
                "threshold": RISE,
                "limit": f"{RISE:.0%} of the loss, or of {WHOLE:g} nat",
            }
        )
    for result in checks.values():
        if result.get("verdict") == "worse":
            flagged.append(
                {
                    "measure": f"basic questions: {result['base']:.0%} right before, {result['tuned']:.0%} after",
                    "value": -result["difference"],
                    "threshold": 0.0,
                    "limit": "shown to be worse",
                }
            )
    return {**measured, "flagged": flagged, "fix": FIX}


def _drift(drifts: Sequence[Drift]) -> dict[str, Any]:
    """A token's mean, with an interval over prompts drawn again."""
    sizes = _each(drifts, "tokens")
    found: dict[str, Any] = {}
    for name, field in (("kl", "kl"), ("agreement", "agreed")):
        sums = _each(drifts, field)
        found[name] = float(sums.sum() / sizes.sum())
        found[f"{name}_interval"] = list(bootstrap(sums, sizes))
    return found


def _loss(drifts: Sequence[Drift]) -> dict[str, Any]:
    """Paired: each text is compared with itself."""
    sizes, base, tuned = (_each(drifts, name) for name in ("tokens", "base", "tuned"))
    tokens = sizes.sum()
    before, difference = float(base.sum() / tokens), float((tuned - base).sum() / tokens)
    return {
        "texts": len(drifts),
        "tokens": int(tokens),
        "base": before,
        "tuned": before + difference,
        "difference": difference,
        "interval": list(bootstrap(tuned - base, sizes)),
        "rise": difference / max(before, WHOLE),
    }


def _each(drifts: Sequence[Drift], field: str) -> np.ndarray:
    """[texts]"""
    return np.array([float(getattr(one, field)) for one in drifts])

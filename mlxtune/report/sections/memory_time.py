"""The section of memory and time: where they went, and how much the fast ways left out."""

from __future__ import annotations

from collections.abc import Sequence

from mlxtune_convert.sizes import size

from mlxtune.compute.fast_ways import HEAD_ON_FEW
from mlxtune.durations import clock
from mlxtune.report.html import Child, Html, joined
from mlxtune.report.page import Section
from mlxtune.report.run_record import RunRecord, number_of
from mlxtune.report.tables import facts, table
from mlxtune.train.events import Event

# What an event's `seconds` were spent on.
PARTS = {
    "begin": "preparation: reading rows and model, proofs of the fast ways",
    "train": "optimizer steps",
    "eval": "evaluations",
    "checkpoint": "checkpoints",
}


MOST = 1e15  # seconds or tokens of one event: no run has more


def section(record: RunRecord) -> Section | None:
    parts = [_time(record), _tokens(record), _memory(record)]
    there = [part for part in parts if part is not None]
    return Section("memory-time", "Memory and time", joined(there)) if there else None


def _time(record: RunRecord) -> Html | None:
    """A table of what took how long; of steps that were done again the second time."""
    spent = {kind: sum_of(record.of_kind(kind), "seconds") for kind in PARTS}
    whole = sum(spent.values())
    if not whole:
        return None
    rows: list[list[Child]] = []
    for kind, what in PARTS.items():
        timed = [event for event in record.of_kind(kind) if number_of(event, "seconds") is not None]
        if timed:
            seconds = spent[kind]
            rows.append([what, f"{len(timed):,}", said(seconds), said(seconds / len(timed)), f"{seconds / whole:.0%}"])
    rows.append(["all of these", "", said(whole), "", "100%"])
    return table("Where the time went", ["part", "how many", "time", "each", "share"], rows, {1, 2, 3, 4})


def _tokens(record: RunRecord) -> Html | None:
    """How many tokens went through the model, against those of the rows."""
    tokens, computed = (sum_of(record.train, name) for name in ("tokens", "computed_tokens"))
    supervised, seconds = (sum_of(record.train, name) for name in ("supervised_tokens", "seconds"))
    if not tokens:
        return None
    way = str(record.begun.get("computed", "unknown"))
    values: dict[str, Child] = {
        "way": way,
        "tokens of the rows": f"{tokens:,.0f}",
        "trained on": f"{supervised:,.0f} of them ({supervised / tokens:.0%})",
    }
    if computed:  # older versions did not count them
        values["went through the blocks"] = f"{computed:,.0f}: {_saved(computed / tokens)}"
    if of_baseline := sum_of(record.train, "baseline_tokens"):
        values["of kto's baseline"] = f"{of_baseline:,.0f} beside these, without gradients"
    if HEAD_ON_FEW in way and computed:
        values["went through the head"] = f"{supervised:,.0f}: {1 - supervised / computed:.0%} of these was left out"
    if seconds > 0:
        values["speed"] = f"{tokens / seconds:,.0f} tokens of rows a second, over all steps"
    return facts("What was computed", values)


def _saved(share: float) -> str:
    """share: of the rows' tokens that went through the model, padding included."""
    if share < 1:
        return f"{share:.2f} of the rows' tokens; {1 - share:.0%} was left out, for rows share it"
    if share > 1:
        return f"{share:.2f} of the rows' tokens; what is more is padding"
    return "all of the rows' tokens, once"


def _memory(record: RunRecord) -> Html | None:
    peak = max((number_of(event, "peak_bytes") or 0.0 for event in record.train), default=0.0)
    predicted = number_of(record.begun, "predicted_bytes")
    values: dict[str, Child] = {}
    if peak:
        values["measured peak"] = size(peak)
    if predicted:
        values["predicted peak"] = size(predicted)
    if peak and predicted:
        values["difference"] = f"measured {peak / predicted - 1:+.0%} of the predicted"
    return facts("Memory", values) if values else None


def said(seconds: float) -> str:
    """A span of time with as many digits as mean something: 0.42 s, 12.3 s, 2:05."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return clock(seconds)


def sum_of(happened: Sequence[Event], name: str) -> float:
    """Of what events count or measure; numbers that are neither, out of a damaged file, are left out."""
    return sum(number for event in happened if 0 <= (number := number_of(event, name) or 0.0) <= MOST)

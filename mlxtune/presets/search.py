"""The fastest settings whose predicted peak fits: searched with the prediction of memory, not looked up.

What is given up for memory, last first:

    coverage      with data.max_tokens at the length that 99% of the rows have at most; where nothing fits, 95%
    rank          as the rules of thumb say; where nothing fits, the least
    speed         of all (rows of a micro-batch, blocks computed again) the one with the least work that fits
    bits          of equally fast ones 4, or 8 for a small model, which 4 bits hurt more

Work is counted, in tokens that go once through the blocks (`peaks`): computing every block again costs half as much
more (a forward pass beside a forward and a backward one), micro-batches of fewer rows pad less and cost something each.
So of 1,000 rows of 100 to 900 tokens, 8 rows at a time come first, then 4, 2, 1, then the same with every other block
computed again, then with all: what fits first is taken. An optimizer step has 16 rows whatever its micro-batches are.

A peak may take 80% of what the device holds at once (`fit_memory.SHARE`), which is what `train.memory_limit: auto`
allows: so a run takes these settings as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlxtune_convert.sizes import size

from mlxtune.compute import pieces
from mlxtune.compute.fit_memory import SHARE
from mlxtune.compute.memory.prediction import Memory, NotPredicted
from mlxtune.machine.backend import Machine
from mlxtune.presets import models, rules
from mlxtune.presets.peaks import PASSES, Peaks, Settings, passes
from mlxtune.presets.rules import Advice
from mlxtune.presets.wanted import Wanted

BATCH_ROWS = (8, 4, 2, 1)
COVERAGES = (0.99, 0.95)  # of the examples, kept whole
SMALL = 2e9  # parameters, below which 4 bits cost a model noticeably more than 8 do
BITS = (4, 8)
HEAVY = (  # keys that decide about memory
    *("lora.rank", "lora.ranks", "lora.layers", "lora.targets", "lora.variant", "lora.train_also", "data.max_tokens"),
    *("train.batch_rows", "train.batch_tokens", "train.checkpoint_layers", "train.memory_limit", "train.dtype"),
)
LONG = ("pieces", "nested")  # ways to checkpoint that are for rows of more than a piece


@dataclass(frozen=True)
class Preset:
    """Settings to begin with."""

    settings: dict[str, Any]  # section.key -> value, only what differs from the defaults
    bits: int | None  # that the model is to be quantized to first (`mlxtune convert --bits`); None: taken as it is
    peak_bytes: int | None  # predicted; None: the memory of this kind of model cannot be predicted
    budget_bytes: int  # that the peak may be
    tokens_covered: float  # share of the rows' tokens within data.max_tokens
    why: dict[str, str] = field(default_factory=dict)  # section.key -> a sentence
    warnings: list[str] = field(default_factory=list)  # what a person must know, a sentence each

    @property
    def reasons(self) -> list[str]:
        """A sentence each."""
        return [*self.why.values(), *self.warnings]


@dataclass(frozen=True)
class DoesNotFit:
    """No settings of the search fit."""

    needed: int  # bytes of those that need least
    budget: int  # bytes that they may take
    max_tokens: int  # with which that was
    largest: str  # the largest known model that fits the same machine and rows, and its bits; "": none does
    held: tuple[str, ...] = ()  # keys that were set by hand, and that decide about memory

    def __str__(self) -> str:
        if self.held:
            return (
                f"does not fit with {', '.join(self.held)} as set: it needs {size(self.needed)}, and "
                f"{size(self.budget)} may be used"
            )
        largest = self.largest or "no known model"
        return (
            f"does not fit: it needs {size(self.needed)} even with one row of {self.max_tokens:,} tokens at a time and "
            f"every block computed again, and {size(self.budget)} may be used; the largest that does: {largest}"
        )


def find(
    source: Path | Mapping[str, Any],
    machine: Machine,
    wanted: Wanted,
    bits: Sequence[int | None] | None = None,
    name: str = "the model",
    own: Mapping[str, Any] = MappingProxyType({}),
) -> Preset | DoesNotFit:
    """The preset for a model on a machine.

    source: the model's folder (no weight is read), or its config.json; bits: to choose from, None in it for the
    model as it is; by default a quantized model stays as it is, and another one is quantized. name: of the model, for
    messages; own: section.key -> value of what was set by hand: only the rest is searched.
    Raises UserError for a model that mlx-lm does not know.
    """
    peaks = Peaks(source, machine.kind, wanted, name, own)
    found = search(peaks, machine, bits or default_bits(peaks))
    if isinstance(found, DoesNotFit):
        return replace(found, largest="" if found.held else largest_that_fits(machine, wanted))
    return found


def default_bits(peaks: Peaks) -> Sequence[int | None]:
    """A quantized model as it is; another one in 4 or 8 bits."""
    return (None,) if peaks.quantized() else BITS


def search(peaks: Peaks, machine: Machine, bits: Sequence[int | None]) -> Preset | DoesNotFit:
    """As `find`, of a model whose peaks are known, and which says of no other model whether it fits."""
    parameters = peaks.parameters()
    wanted = peaks.wanted
    own = peaks.own
    advice = rules.advice(wanted, parameters, bool(own.get("lora.train_also")), own)
    limit = own.get("train.memory_limit")
    budget = limit if isinstance(limit, int) else int(SHARE * machine.working_set)
    needed = []
    for max_tokens in _limits_of_tokens(peaks):
        ranks = (advice.settings["lora.rank"], own.get("lora.rank", rules.LEAST_RANK))
        for rank in dict.fromkeys(ranks):
            chosen = None
            for one in _in_order(bits, parameters):
                if chosen is not None and peaks.weights(one) >= peaks.weights(chosen.bits):
                    continue  # heavier weights leave less room, so they cannot be faster
                found = _fastest(peaks, budget, one, rank, max_tokens, advice.step_rows)
                if isinstance(found, NotPredicted):
                    return _unpredicted(peaks, advice, budget, one, max_tokens, found)
                if isinstance(found, int):
                    needed.append(found)
                elif chosen is None or peaks.work(found) < peaks.work(chosen):
                    chosen = found
            if chosen is not None:
                return _preset(peaks, advice, budget, chosen)
    return DoesNotFit(min(needed), budget, max_tokens, "", tuple(key for key in HEAVY if key in own))


def _limits_of_tokens(peaks: Peaks) -> list[int]:
    """The values of data.max_tokens to try: no more than the model was made for."""
    if "data.max_tokens" in peaks.own:
        return [peaks.own["data.max_tokens"]]
    found = []
    for coverage in COVERAGES:
        found.append(min(peaks.wanted.covering(coverage), peaks.context() or math.inf))
    return [int(tokens) for tokens in dict.fromkeys(found)]


def _in_order(bits: Sequence[int | None], parameters: int) -> list[int | None]:
    """Of equally fast ones the better first: the model as it is, which needs no conversion; then 4 bits, or of a small
    model 8.
    """
    first = 8 if parameters < SMALL else 4
    return sorted(bits, key=lambda one: (one is not None, one != first, one))


def _fastest(
    peaks: Peaks, budget: int, bits: int | None, rank: int, max_tokens: int, step_rows: int
) -> Settings | NotPredicted | int:
    """The settings with the least work that fit; where none do, the bytes of those that need least."""
    candidates = []
    longest = min(max_tokens, max(peaks.wanted.lengths))
    own = peaks.own
    is_one_size = "train.batch_rows" in own or "train.batch_tokens" in own
    for checkpoint in [own["train.checkpoint_layers"]] if "train.checkpoint_layers" in own else PASSES:
        if checkpoint in LONG and longest <= pieces.TOKENS and "train.checkpoint_layers" not in own:
            continue
        for rows in (own.get("train.batch_rows", 1),) if is_one_size else BATCH_ROWS:
            # the last one is a single row, with as much computed again as there may be
            if "train.accumulate" in own:
                candidates.append(Settings(bits, rank, max_tokens, rows, rows * own["train.accumulate"], checkpoint))
            elif "train.batch_tokens" in own:
                candidates.append(Settings(bits, rank, max_tokens, rows, rows, checkpoint))
            elif rows <= step_rows:
                candidates.append(Settings(bits, rank, max_tokens, rows, step_rows, checkpoint))
    weights = peaks.weights(bits)
    if weights > budget:
        return weights
    least = peaks.memory(candidates[-1])  # one row, everything computed again: if that does not fit, nothing does
    if isinstance(least, NotPredicted):
        return least
    if least.total > budget:
        return least.total
    for settings in sorted(candidates, key=peaks.work):
        predicted = peaks.memory(settings)
        if isinstance(predicted, Memory) and predicted.total <= budget:
            return settings
    return least.total


def _preset(peaks: Peaks, advice: Advice, budget: int, chosen: Settings) -> Preset:
    memory = peaks.memory(chosen)
    assert isinstance(memory, Memory)
    settings = dict(advice.settings)
    settings["lora.rank"], settings["lora.alpha"] = chosen.rank, rules.SCALE * chosen.rank
    settings["data.max_tokens"] = chosen.max_tokens
    settings["train.batch_rows"], settings["train.accumulate"] = chosen.batch_rows, chosen.accumulate
    settings["train.checkpoint_layers"] = chosen.checkpoint
    why, warnings = dict(advice.why), list(advice.warnings)
    if chosen.rank < advice.settings["lora.rank"]:
        why["lora.rank"] = f"A rank of {advice.settings['lora.rank']} does not fit this memory."
    why["data.max_tokens"] = _about_tokens(peaks.wanted, chosen.max_tokens)
    why.setdefault("train.accumulate", f"{chosen.step_rows} rows in an optimizer step.")
    why["train.batch_rows"] = (
        f"The fastest that fits: {size(memory.total)} predicted at the peak, {size(budget)} may be used."
    )
    if chosen.checkpoint != "none":
        again = passes(chosen.checkpoint) / PASSES["none"] - 1
        why["train.checkpoint_layers"] = f"For want of memory: about {again:.0%} more work, the same numbers."
    whole = peaks.wanted.share_whole(chosen.max_tokens)
    if whole < COVERAGES[0]:
        warnings.append(
            f"{1 - whole:.0%} of the rows are longer than data.max_tokens {chosen.max_tokens:,} and keep their start: "
            "what they lose at their end is not learned."
        )
    return _made_of(peaks, settings, chosen.bits, memory.total, budget, why, warnings)


def _made_of(
    peaks: Peaks,
    settings: dict[str, Any],
    bits: int | None,
    peak: int | None,
    budget: int,
    why: dict[str, str],
    warnings: list[str],
) -> Preset:
    """A preset of all its settings, with words on those that it keeps."""
    kept = rules.differing(settings)
    if "train.accumulate" not in kept and "train.accumulate" in why:  # one micro-batch is the whole step
        of_batch = why.get("train.batch_rows", "")
        why["train.batch_rows"] = f"{of_batch} {why['train.accumulate']}".strip()
    share = peaks.wanted.share_of_tokens(settings["data.max_tokens"])
    return Preset(kept, bits, peak, budget, share, {key: why[key] for key in why if key in kept}, warnings)


def _about_tokens(wanted: Wanted, max_tokens: int) -> str:
    whole, longest = wanted.share_whole(max_tokens), max(wanted.lengths)
    if longest <= max_tokens:
        return f"The longest row has {longest:,} tokens."
    return f"{whole:.1%} of the rows are no longer; the longest has {longest:,} tokens and keeps its start."


def _unpredicted(
    peaks: Peaks, advice: Advice, budget: int, bits: int | None, max_tokens: int, reason: NotPredicted
) -> Preset:
    """What needs least, where nobody can say how much that is."""
    step_rows = advice.step_rows
    settings = {
        **advice.settings,
        "data.max_tokens": max_tokens,
        "train.batch_rows": 1,
        "train.accumulate": step_rows,
        "train.checkpoint_layers": "all",
    }
    warnings = [
        *advice.warnings,
        f"{reason.note[0].upper()}{reason.note[1:]}. These are the settings that need least: if the first steps go "
        "well, a larger train.batch_rows and train.checkpoint_layers: none are faster.",
    ]
    why = {**advice.why, "data.max_tokens": _about_tokens(peaks.wanted, max_tokens)}
    return _made_of(peaks, settings, bits, None, budget, why, warnings)


def largest_that_fits(machine: Machine, wanted: Wanted) -> str:
    """The name and bits of the largest known model that fits; "": none does."""
    for known in sorted(models.KNOWN, key=lambda one: one.parameters, reverse=True):
        if known.weights(min(BITS)) > SHARE * machine.working_set:
            continue
        found = search(Peaks(known.config, machine.kind, wanted, known.name), machine, BITS)
        if isinstance(found, Preset):
            return f"{known.name} in {found.bits} bits"
    return ""

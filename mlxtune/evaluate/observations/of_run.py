"""What a run's own events show, without any evaluation: causes in its rows first, then what its losses did.

Everything is read from events.jsonl (`train.events`): losses and rates of the steps, and what `begin` noted of the rows
(`train.data_facts`). So it can be said of a run whose rows are gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mlxtune.evaluate.observations import of_preferences
from mlxtune.evaluate.observations.preference_remedies import Remedies
from mlxtune.evaluate.observations.seen import OFTEN, TWICE, Observation

Events = Sequence[Mapping[str, Any]]

RATE = "learning rate too high"
LAST_STEPS = 10  # of training, whose mean loss stands for where it ended
FIRST_STEPS = 5  # of training, whose mean loss stands for where it began
WORSE = 1.1  # times the loss at the beginning, from which training made worse what it trained on
LEARNED = 0.9  # times the loss at the beginning: above it hardly anything was learned
# Times the loss at the beginning, that the mean of JUMP_STEPS reaches where steps are far too large. Of losses that
# scatter by 40% of their mean, means of five scatter by 18%: twice the mean is beyond five of those.
JUMPED = 2.0
JUMP_STEPS = 5
RISES = 3  # evaluations in a row, each with a higher loss than the one before
ROSE_BY = 1.1  # times the lowest validation loss, from which the last one is said to have risen
LEAST_ROWS = 50  # OpenAI's guide to fine-tuning sees clear improvements from 50 to 100 examples on
FEW_ROWS = 500  # of training, below which a model learns rows by heart easily
GAP = 0.5  # of the validation loss: a training loss below it is of rows that are known by heart
LOST = 0.01  # share of the steps, from which it is worth a word that they were left out for bad numbers
LEAKED = 0.05  # share of the held-out rows, from which their loss says little


@dataclass(frozen=True)
class _Losses:
    """The losses of a run, those that were no number left out."""

    train: list[tuple[int, float]]  # (step, loss), the steps in their order
    valid: list[tuple[int, float]]  # of the held-out rows: (after so many steps, loss)

    @staticmethod
    def of(events: Events) -> _Losses:
        return _Losses(of_kind(events, "train"), of_kind(events, "eval"))

    def trained_up_to(self, step: int) -> float | None:
        """The mean training loss of the last steps up to this one; None where there are none."""
        losses = [loss for number, loss in self.train if number <= step]
        return fmean(losses[-LAST_STEPS:]) if losses else None

    @property
    def first(self) -> float | None:
        """Before anything was learned: of the first step's rows, or of the held-out rows where that is higher, for a
        single step may have easy rows.
        """
        known = [losses[0][1] for losses in (self.train, self.valid) if losses]
        return max(known) if known and self.train else None


def of_kind(events: Events, kind: str) -> list[tuple[int, float]]:
    """(Step, loss) of each event of a kind; of those whose loss was no number, none."""
    found = []
    for event in events:
        if event["kind"] == kind and event.get("loss") is not None:
            found.append((int(event["step"]), float(event["loss"])))
    return found


def observed(events: Events) -> Iterator[Observation]:
    losses, facts = _Losses.of(events), data_of(events)
    yield from _template(facts)
    yield from _leaks(facts)
    yield from _cut(facts)
    yield from _repeated(facts)
    yield from _too_little(facts, losses)
    yield from _rate(events, losses)
    is_preference = of_preferences.is_preference(events)
    yield from _overfits(losses, Remedies.of_events(events) if is_preference else None)
    if is_preference:
        yield from of_preferences.observed(events)


def data_of(events: Events) -> Mapping[str, Any]:
    """What the run noted of its rows; empty where it is of a version that noted nothing."""
    for event in reversed(events):
        if event["kind"] == "begin" and isinstance(event.get("data"), dict):
            data: Mapping[str, Any] = event["data"]
            return data
    return {}


def _count(facts: Mapping[str, Any], split: str, name: str) -> int:
    """A number of rows; 0 where it was not noted."""
    own = facts.get(split)
    value = own.get(name) if isinstance(own, dict) else None
    return value if isinstance(value, int) else 0


def _template(facts: Mapping[str, Any]) -> Iterator[Observation]:
    of_template = facts.get("template")
    if not isinstance(of_template, dict):
        return
    if of_template.get("differs"):
        chosen = of_template.get("chosen")
        measure = f"data.template {chosen} prints turns otherwise than the chat template that the model was made with"
        fix = (
            "leave data.template unset, for the model knows its own chat template, and programs that run it may use "
            "that one; `mlxtune data show` prints a row as it is trained"
        )
        yield Observation("wrong template", measure, 1, 1, "turns are printed differently", fix)
    if of_template.get("ends") is False:
        measure = "the chat template ends answers with no token of its own, so the model does not learn where to stop"
        fix = "choose a template that ends answers: data.template (chatml, alpaca or a file)"
        yield Observation("wrong template", measure, 1, 1, "no token ends an answer", fix)


def _leaks(facts: Mapping[str, Any]) -> Iterator[Observation]:
    rows, trained = _count(facts, "valid", "rows"), _count(facts, "valid", "trained")
    if not rows or trained / rows < LEAKED:
        return
    measure = f"{trained} of {rows} held-out rows are training rows too: their loss is lower than that of new rows"
    fix = (
        "take them out of the validation file or out of the training file; without a validation file "
        "data.valid_fraction holds rows out, equal ones together (`mlxtune data check` names the rows)"
    )
    limit = f"{LEAKED:.0%} of the held-out rows"
    yield Observation("validation rows are trained on", measure, trained / rows, LEAKED, limit, fix)


def _cut(facts: Mapping[str, Any]) -> Iterator[Observation]:
    too_long = _count(facts, "train", "too_long")
    rows = _count(facts, "train", "rows") + too_long
    cut = _count(facts, "train", "shortened") + too_long
    if not rows or cut / rows < OFTEN:
        return
    limit = facts.get("max_tokens")
    measure = f"{cut} of {rows} training rows are longer than {limit} tokens: the ends of their answers are not learned"
    if too_long:
        measure += f", and of {too_long} of them nothing is"
    fix = (
        f"raise data.max_tokens (it is {limit}), or divide the rows (`mlxtune data check` says how long they are); "
        "where the memory does not suffice, train.checkpoint_layers: all"
    )
    yield Observation("answers are cut", measure, cut / rows, OFTEN, f"{OFTEN:.0%} of the rows", fix)


def _repeated(facts: Mapping[str, Any]) -> Iterator[Observation]:
    rows, repeated = _count(facts, "train", "rows"), _count(facts, "train", "repeated")
    if not rows or repeated / rows < OFTEN:
        return
    measure = f"{repeated} of {rows} training rows are equal to an earlier one: they count more than once"
    fix = "set data.dedup: exact, or near where rows are almost equal"
    yield Observation("repeated rows", measure, repeated / rows, OFTEN, f"{OFTEN:.0%} of the rows", fix)


def _too_little(facts: Mapping[str, Any], losses: _Losses) -> Iterator[Observation]:
    """Hardly any rows; or few, and they are known by heart while others are not."""
    rows = _count(facts, "train", "rows")
    if not rows or rows >= FEW_ROWS:
        return
    fix = (
        "add rows (data.path, or more of data.sources); until there are more, fewer train.epochs and a smaller "
        "lora.rank leave less to learn by heart"
    )
    if rows < LEAST_ROWS:
        measure = f"{rows} training rows are hardly enough to learn anything but themselves"
        yield Observation("too little data", measure, rows, LEAST_ROWS, f"fewer than {LEAST_ROWS} rows", fix)
        return
    if not losses.train or not losses.valid:
        return
    ended, valid = losses.trained_up_to(losses.train[-1][0]), losses.valid[-1][1]
    if ended is not None and ended < GAP * valid:
        measure = f"the {rows} training rows have a loss of {ended:.3f} at the end, rows that were held out {valid:.3f}"
        limit = f"fewer than {FEW_ROWS} rows, and a training loss below {GAP:.0%} of the validation loss"
        yield Observation("too little data", measure, ended / valid, GAP, limit, fix)


def _rate(events: Events, losses: _Losses) -> Iterator[Observation]:
    """Steps that are too large: numbers that are none, a loss that ends above its beginning, or jumps far above it."""
    rates = [event["lr"] for event in events if event["kind"] == "train" and isinstance(event.get("lr"), float)]
    rate = f" (train.lr {max(rates):g})" if rates else ""
    fix = "set a lower train.lr: a tenth of it, say; more train.warmup_steps help where the loss jumps at the beginning"
    lost = _lost(events, losses, rate, fix)
    if lost is not None:
        yield lost
        return
    first = losses.first
    if first is None or first <= 0 or len(losses.train) < 2:
        return
    values = [loss for _, loss in losses.train]
    ended = fmean(values[-min(LAST_STEPS, max(1, len(values) // 2)) :])
    valid = [loss for _, loss in losses.valid]
    learned_nothing = ended > WORSE * first or ended > LEARNED * fmean(values[:FIRST_STEPS])
    rose = len(valid) > 1 and valid[-1] > valid[0]
    # A rate that is far too low leaves both losses where they were, and by chance a little above.
    if rose and learned_nothing and (valid[-1] > WORSE * valid[0] or ended > WORSE * first):
        measure = (
            f"the validation loss rose from {valid[0]:.3f} to {valid[-1]:.3f}, and the training loss, "
            f"{values[0]:.3f} at the first step, ended at {ended:.3f}{rate}"
        )
        limit = f"either loss {WORSE:g} times that of the beginning, while the other one did not fall"
        yield Observation(RATE, measure, max(valid[-1] / valid[0], ended / first), WORSE, limit, fix)
        return
    means = [fmean(values[at : at + JUMP_STEPS]) for at in range(len(values) - JUMP_STEPS + 1)]
    if means and max(means) > JUMPED * first:
        step = losses.train[means.index(max(means))][0]
        measure = f"the training loss jumped from {first:.3f} to {max(means):.3f} after step {step}{rate}"
        limit = f"{JUMPED:g} times the loss at the beginning, in the mean of {JUMP_STEPS} steps"
        yield Observation(RATE, measure, max(means) / first, JUMPED, limit, fix)


def _lost(events: Events, losses: _Losses, rate: str, fix: str) -> Observation | None:
    """Numbers that were none: they ended the run, spoilt an evaluation, or steps were left out for them (now and then
    one is what train.on_nonfinite: skip is for). None where nothing was trained before, too.
    """
    if not losses.train:
        return None
    fix += "; train.dtype: float32 where numbers leave the range of float16"
    ended = any(event["kind"] == "end" and event.get("nonfinite") for event in events[-1:])
    spoilt = sum(event["kind"] == "eval" and event.get("loss") is None for event in events)
    if ended or spoilt:
        what = "a loss or gradient was no number, which ended the run" if ended else "the validation loss was no number"
        measure = f"{what}; the last good step was {losses.train[-1][0]}{rate}"
        return Observation(RATE, measure, spoilt + ended, 1, "once", fix)
    left_out = [event for event in events if event["kind"] == "note" and event.get("nonfinite")]
    steps = len(losses.train) + len(left_out)
    if len(left_out) < TWICE or len(left_out) / steps < LOST:
        return None
    first = left_out[0].get("step")  # earlier versions did not note it
    which = "" if first is None else f" (first: step {first})"
    measure = f"{len(left_out)} of {steps} steps were left out, for a loss or gradient that was no number{which}{rate}"
    limit = f"{LOST:.0%} of the steps, and {TWICE} of them"
    return Observation(RATE, measure, len(left_out) / steps, LOST, limit, fix)


def _overfits(losses: _Losses, remedies: Remedies | None) -> Iterator[Observation]:
    """The validation loss rises again: three times in a row, or far while the training loss goes on falling.

    remedies: of a run on preferences; None: it is none.
    """
    valid = losses.valid
    if len(valid) < 2:
        return
    fix = "set train.patience, fewer train.epochs, more rows; "
    if remedies is None:
        fix += "train.neftune_alpha makes it harder to learn by heart"
    else:
        fix += remedies.against_overfitting()
    ended = losses.trained_up_to(losses.train[-1][0]) if losses.train else None
    also = "" if ended is None else f"; the training loss ended at {ended:.3f}"
    rises, place = 0, len(valid) - 1
    while place > 0 and valid[place][1] > valid[place - 1][1]:
        rises, place = rises + 1, place - 1
    fell = ended is None or losses.first is None or ended < losses.first
    if rises >= RISES and fell:
        measure = (
            f"the validation loss rose at the last {rises} evaluations, from {valid[place][1]:.3f} to "
            f"{valid[-1][1]:.3f}{also}"
        )
        yield Observation("overfitting", measure, rises, RISES, f"{RISES} evaluations in a row", fix)
        return
    step, lowest = min(valid, key=lambda one: one[1])
    before = losses.trained_up_to(step)
    if before is None:
        before = losses.first
    rose = lowest > 0 and valid[-1][1] >= ROSE_BY * lowest
    if rose and before is not None and ended is not None and ended * ROSE_BY <= before:
        last = valid[-1][1]
        measure = f"the validation loss was lowest after step {step}, {lowest:.3f}, and ended at {last:.3f}{also}"
        limit = f"{ROSE_BY:g} times the lowest, while the training loss fell"
        yield Observation("overfitting", measure, last / lowest, ROSE_BY, limit, fix)

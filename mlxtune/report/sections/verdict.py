"""What a page says first: what was done, whether it is better, and what to know before believing the rest."""

from __future__ import annotations

from mlxtune.report.html import Html, joined, prose, tag
from mlxtune.report.run_record import RunRecord, number_of
from mlxtune.report.secrets import masked
from mlxtune.report.tables import Kind, callout
from mlxtune.train.run_folder import RunFolder

MOST_BACK = 3  # times that a run was taken back, which are told of
# What became of a run -> how it is said, behind what was done.
ENDS = {
    "running": "It goes on.",
    "finished": "",
    "interrupted": "It was interrupted{reason}{resumed}.",
    "failed": "It failed{reason}.",
    "killed": "It ended without a word: it was killed, or the machine stopped{resumed}.",
}


NOT_ASKED = (
    "No evaluation of its answers was found: a loss says how likely the answers of the data are, not how good the "
    "model's own are. `mlxtune eval --suite` asks base and tuned model the same questions."
)


def lead(record: RunRecord, is_evaluated: bool) -> Html:
    """The sentence that a person asks for, and the warnings. is_evaluated: an evaluation of answers is on the page."""
    kind, better = _outcome(record)
    what = [tag("p", tag("strong", done(record)), " ", prose(_end(record))), tag("p", better)]
    if not is_evaluated:
        what.append(tag("p", prose(NOT_ASKED)))
    lines = [callout(kind, what)]
    lines += [callout("warning", text) for text in record.warnings]
    lines += [callout("neutral", text) for text in _remarks(record)]
    return joined(lines)


def done(record: RunRecord) -> str:
    """What was done, in a sentence."""
    model = masked(record.model) or "an unknown model"
    processes = record.begun.get("processes")
    shared = f" in {processes} processes" if isinstance(processes, int) and processes > 1 else ""
    if not record.step:
        return f"No step was taken: {model} was to be tuned{shared}."
    steps = f"{record.step:,} steps"
    if record.steps and record.step < record.steps:
        steps = f"{record.step:,} of {record.steps:,} steps"
    return f"{model} was tuned for {steps}{shared}."


def _end(record: RunRecord) -> str:
    """What became of the run, and how to go on where it can go on."""
    reason = record.end.get("reason")
    can_go_on = RunFolder(record.folder).has_checkpoint()
    return ENDS.get(record.state, "How it ended is not known.").format(
        reason=f" ({masked(str(reason))})" if reason else "",
        resumed="; `mlxtune train --resume` goes on with it" if can_go_on else "; it left no checkpoint",
    )


def _outcome(record: RunRecord) -> tuple[Kind, str]:
    """Whether the held-out rows became likelier, and by how much."""
    base, best = record.base_loss, record.best
    if best is None:
        later = [event for event in record.evaluations if event["step"] > 0]
        if later:
            return "bad", "The validation loss is no number: the adapter is broken."
        return "warning", "Nothing was measured on held-out rows after a step: whether it is better is not known."
    loss, step = float(best["loss"]), best["step"]
    if base is None:
        return "neutral", f"The lowest validation loss is {loss:.4f} nats a token, at step {step:,}; before: unknown."
    before = "before the first step"
    told = f"On held-out rows the loss went from {base:.4f} {before} to {loss:.4f} nats a token at step {step:,}"
    if base <= 0:
        return "neutral", f"{told}."
    change = 1 - loss / base
    if loss < base:
        kind: Kind = "good" if change >= 0.01 else "neutral"
        return kind, f"{told}: {change:.0%} lower.{_after(record, loss)}"
    if loss > base:
        return "bad", f"{told}: {-change:.0%} higher. The adapter is worse than what it began with."
    return "neutral", f"{told}: no change."


def _after(record: RunRecord, best: float) -> str:
    """What became of the loss after its best."""
    last = number_of(record.evaluations[-1], "loss")
    if last is None:
        return " The last evaluation gave no number."
    if last > best:
        which = "of the best step" if record.setting("train.keep") == "best" else "of the last step"
        return f" It rose to {last:.4f} until the last evaluation; the adapter {which} is kept."
    return ""


def _remarks(record: RunRecord) -> list[str]:
    """What explains the curves."""
    out = []
    for back, reached in record.taken_back[-MOST_BACK:]:
        again = f"step {back + 1:,} was" if reached == back + 1 else f"steps {back + 1:,} to {reached:,} were"
        told = f"The run went on after step {back:,} though it had reached step {reached:,}"
        out.append(f"{told}: {again} done again, and the page shows the second time.")
    bad = sum(number_of(event, "loss") is None for event in record.train)
    if bad:
        out.append(f"{bad:,} of {len(record.train):,} steps have a loss that is no number.")
    bad = sum(number_of(event, "loss") is None for event in record.evaluations)
    if bad:
        out.append(f"{bad:,} of {len(record.evaluations):,} evaluations have a loss that is no number.")
    gaps = record.step - len({event["step"] for event in record.train})
    if gaps > 0:
        missing = "1 step is" if gaps == 1 else f"{gaps:,} steps are"
        out.append(f"{missing} missing among the {record.step:,}: left out for bad numbers, or not in events.jsonl.")
    return out

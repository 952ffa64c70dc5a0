"""What a page says first: what was done, whether it is better, and what to know before believing the rest."""

from __future__ import annotations

from mlxtune.report.html import Html, joined, prose, tag
from mlxtune.report.run_record import RunRecord, number_of
from mlxtune.report.secrets import masked
from mlxtune.report.tables import Kind, callout
from mlxtune.train.events import Event
from mlxtune.train.run_folder import RunFolder

CHANGED = 0.01  # share of the loss before, below which a change is told as none: one loss has no interval
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
NOT_RANKED = (
    "No evaluation of its answers was found: the loss says whether the tuned model tells given answers apart, not how "
    "good its own are. `mlxtune eval --suite` asks base and tuned model the same questions."
)


def lead(record: RunRecord, is_evaluated: bool) -> Html:
    """The sentence that a person asks for, and the warnings. is_evaluated: an evaluation of answers is on the page."""
    kind, better = _outcome(record)
    what = [tag("p", tag("strong", done(record)), " ", prose(_end(record))), tag("p", better)]
    if not is_evaluated:
        what.append(tag("p", prose(NOT_RANKED if record.is_preference else NOT_ASKED)))
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
    """Whether the held-out rows became likelier by the adapter that the run's folder holds, and by how much."""
    base, best = record.base_loss, record.best
    later = [event for event in record.evaluations if event["step"] > 0]
    is_last_kept = record.setting("train.keep") == "last"
    if later and (best is None or (is_last_kept and number_of(later[-1], "loss") is None)):
        return "bad", "The validation loss is no number: the adapter is broken."
    if best is None:
        return "warning", "Nothing was measured on held-out rows after a step: whether it is better is not known."
    kept = later[-1] if is_last_kept else best
    loss, step = float(kept["loss"]), kept["step"]
    after = _before_the_last(best, loss) if is_last_kept else _after(record, loss)
    if base is None:
        which = "last" if is_last_kept else "lowest"
        return (
            "neutral",
            f"The {which} validation loss is {loss:.4f} {record.loss_unit}, at step {step:,}; before: unknown.",
        )
    tokens = number_of(kept, "tokens")
    rows = f"On {tokens:,.0f} tokens of held-out rows" if tokens else "On held-out rows"
    told = (
        f"{rows} the loss went from {base:.4f} before the first step to {loss:.4f} {record.loss_unit} at step {step:,}"
    )
    after = f"{_preferred(kept)}{after}"
    if base <= 0:
        return "neutral", f"{told}."
    change = loss / base - 1
    if abs(change) < CHANGED:
        return "neutral", f"{told}: no change worth a word.{after}"
    if change > 0:
        return "bad", f"{told}: {change:.0%} higher. The adapter is worse than what it began with.{after}"
    last = number_of(later[-1], "loss")
    is_known = record.setting("train.keep") is not None or (last is not None and last <= loss)
    return "good" if is_known else "neutral", f"{told}: {-change:.0%} lower.{after}"


def _preferred(kept: Event) -> str:
    """How the adapter that is kept ranks the held-out pairs; "" where it learned from no preferences."""
    accuracy, margin = number_of(kept, "accuracy"), number_of(kept, "margin")
    if accuracy is None or margin is None:
        return ""
    chosen, rejected = number_of(kept, "reward_chosen"), number_of(kept, "reward_rejected")
    rewards = ""
    if chosen is not None and rejected is not None:
        rewards = f" (rewards: chosen {chosen:+.2f}, rejected {rejected:+.2f})"
    return f" The preferred answers are told from the others in {accuracy:.0%} of these rows{rewards}."


def _before_the_last(best: Event, kept: float) -> str:
    """Where the loss was lower than that of the last step, whose adapter is kept. kept: that loss."""
    lowest = float(best["loss"])
    if lowest >= kept:
        return ""
    return f" The adapter of the last step is kept (train.keep); at step {best['step']:,} the loss was {lowest:.4f}."


def _after(record: RunRecord, best: float) -> str:
    """What became of the loss after its best. Which adapter is kept is said where the settings are known."""
    last = number_of(record.evaluations[-1], "loss")
    if last is None:
        return " The last evaluation gave no number."
    if last <= best:
        return ""
    kept = "; the adapter of the best step is kept" if record.setting("train.keep") == "best" else ""
    return f" It rose to {last:.4f} until the last evaluation{kept}."


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

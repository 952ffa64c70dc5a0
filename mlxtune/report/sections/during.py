"""The section of what the model answered to train.sample_prompts while it was trained: at first, and at last."""

from __future__ import annotations

from typing import Any

from mlxtune.report.html import Child, Html, joined, tag
from mlxtune.report.page import Section
from mlxtune.report.run_record import RunRecord
from mlxtune.report.sections.words import cut

MOST = 20  # prompts that are shown


def section(record: RunRecord) -> Section | None:
    answered = [(event["step"], given) for event in record.evaluations if (given := _samples(event.get("samples")))]
    if not answered:
        return None
    (first, before), (last, after) = answered[0], answered[-1]
    prompts = list(after)
    shown = [_pair(prompt, first, before.get(prompt), last, after[prompt]) for prompt in prompts[:MOST]]
    more = len(prompts) - len(shown)
    said = f"Of {len(prompts)} prompts the first {MOST}; all are in events.jsonl. " if more > 0 else ""
    told = tag("p", f"{said}No check was asked here of what is right: an evaluation does that.", class_="dim")
    return Section("during", "Answers during the run", joined(told, shown))


def _samples(samples: Any) -> dict[str, str]:
    """prompt -> answer, as far as an event has any."""
    out: dict[str, str] = {}
    for sample in samples if isinstance(samples, list) else ():
        if isinstance(sample, dict) and isinstance(sample.get("prompt"), str) and isinstance(sample.get("answer"), str):
            out[sample["prompt"]] = sample["answer"]
    return out


def _pair(prompt: str, first: int, before: str | None, last: int, after: str) -> Html:
    """A prompt with its first and its last answer. before: None where it was not asked then."""
    texts: list[Child] = []
    if before is not None and first < last:
        texts.append(_answer(f"at step {first:,}", before))
    texts.append(_answer(f"at step {last:,}", after))
    return tag("div", tag("h3", cut(prompt)), tag("div", texts, class_="pair"))


def _answer(when: str, text: str) -> Html:
    return tag("div", tag("span", when, class_="dim"), tag("div", cut(text) or "(nothing)", class_="text"))

"""How a base and what was tuned of it rank answers that people or judges have ranked, and how far the second moved.

One pair, log-probabilities of the whole answers in nats (chosen, 10 tokens; rejected, 8 tokens):

                 chosen   rejected   margin
    base          -12.0      -10.0     -2.0   the base finds the rejected answer likelier: wrong
    tuned         -11.0      -14.0     +3.0   right
    moved          +1.0       -4.0     +5.0   times beta 0.1: rewards +0.1 and -0.4, reward margin +0.5

A reward is what direct preference optimization trains (Rafailov et al. 2023, arXiv:2305.18290, equation 5): beta times
how much likelier the tuned model finds an answer than its reference does. Here the base stands for the reference.

Long answers are less likely than short ones whatever they say, so the ranking is told per token as well.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxtune.config.resolve import Config
from mlxtune.data.dataset.batches import in_order
from mlxtune.data.dataset.beginnings import first_target
from mlxtune.data.dataset.examples import Examples
from mlxtune.data.dataset.measured import answer_numbers, first_examples
from mlxtune.data.rows.sides import Side
from mlxtune.data.survey.preferences import LONGER
from mlxtune.evaluate.comparison.scores import PromptScores
from mlxtune.evaluate.comparison.summary import check_results
from mlxtune.evaluate.observations.of_preferences import LESS_LIKELY
from mlxtune.evaluate.observations.preference_remedies import Remedies
from mlxtune.evaluate.score import losses_of_each, split_for
from mlxtune.evaluate.statistics.proportions import wilson
from mlxtune.model.load import Loaded

BETA = 0.1  # where no run says it: that of the papers' main experiments
CHANCE = 0.5  # of an answer's reward to be on its side, where nothing was learned
BINS = 12  # of the histogram of reward margins
UNKNOWN = Remedies()  # where no run says what tuned it

# What is compared -> what it says, for people.
MEANINGS = {
    "accuracy": "pairs whose chosen answer is the likelier one",
    "accuracy per token": "the same, by the mean log-probability of a token",
    "margin": "log-probability of the chosen answer minus that of the rejected, in nats",
    "reward accuracy": "pairs whose chosen answer gained more, as a whole, than the rejected; 50% is chance",
    "moved as rated": "good answers that became likelier, and bad ones that became less likely; 50% is chance",
}


@dataclass(frozen=True)
class Answers:
    """The A answers of some rows: of a pair two, the chosen one first; of a rated row one."""

    of_example: np.ndarray  # [N] the answer that each example is of
    sides: np.ndarray  # [A] of `Side`
    tokens: np.ndarray  # [A] supervised ones
    groups: list[str | None]  # [rows] rows of one prompt are one group; None: a row of a prompt of its own

    @staticmethod
    def of(examples: Examples) -> Answers:
        of_example = answer_numbers(examples, np.arange(len(examples)))
        tokens = np.bincount(of_example, examples.targets).astype(np.int64)
        return Answers(of_example, examples.sides[first_examples(of_example)], tokens, _groups(examples))

    def sums(self, of_examples: np.ndarray) -> np.ndarray:
        """[A] what is known of the examples, added up for each answer. of_examples: [N]."""
        return np.bincount(self.of_example, of_examples, len(self.sides))


def _groups(examples: Examples) -> list[str | None]:
    """By the tokens before the first answer: of rows that share them one does not tell as much as two prompts do."""
    prompts = []
    for first in examples.firsts:
        example = examples[int(first)]
        prompts.append(np.asarray(example.ids[: first_target(example)], np.int32).tobytes())
    counts = Counter(prompts)
    names = {prompt: str(number) for number, prompt in enumerate(counts)}
    return [names[prompt] if counts[prompt] > 1 else None for prompt in prompts]


def log_probabilities(loaded: Loaded, config: Config, examples: Examples, answers: Answers) -> np.ndarray:
    """[A] of each answer, in nats: the sum over its supervised tokens. Raises UserError for a token that the model has
    no embedding for.
    """
    loaded.check_ids([[examples.highest]])
    batches = in_order(examples)
    split = split_for(loaded, config, batches[-1])
    losses, _ = losses_of_each(loaded.model, split, batches, len(examples))
    return -answers.sums(losses)


def report(
    answers: Answers,
    base: np.ndarray,
    tuned: np.ndarray | None = None,
    beta: float = BETA,
    notes: tuple[str, ...] = (),
    remedies: Remedies = UNKNOWN,
) -> dict[str, Any]:
    """What `mlxtune eval --json` prints of pairs or rated rows.

    base, tuned: [A] log-probabilities of the answers, in nats; tuned None: the base alone was asked; beta: of the
    rewards; notes: what a person must know beside what is seen here; remedies: of the run that tuned it.
    """
    is_pairs = bool(np.isin(answers.sides, (Side.CHOSEN, Side.REJECTED)).all())
    told: dict[str, Any] = {"kind": "pairs" if is_pairs else "rated", "rows": len(answers.groups)}
    told["prompts"] = len({group for group in answers.groups if group}) + answers.groups.count(None)
    scores = _of_pairs(answers, base, tuned) if is_pairs else _of_rated(answers, base, tuned)
    told["checks"] = check_results(scores)
    told["sides"] = {}
    for side in _sides(answers):
        told["sides"][side.word] = _of_side(answers, side, base, tuned, beta)
    if tuned is not None:
        told["beta"] = beta
        told["rewards"] = _rewards(answers, base, tuned, beta, is_pairs)
    told["notes"] = [*notes, *_notes(answers, told, base, tuned, remedies)]
    return told


def _sides(answers: Answers) -> list[Side]:
    return [Side(number) for number in np.unique(answers.sides)]


def _of_side(answers: Answers, side: Side, base: np.ndarray, tuned: np.ndarray | None, beta: float) -> dict[str, Any]:
    """How likely the answers of one side are, per token, and how far they moved."""
    own = answers.sides == side
    tokens = int(answers.tokens[own].sum())
    facts: dict[str, Any] = {"answers": int(own.sum()), "tokens": tokens}
    facts["base"] = float(base[own].sum() / tokens)
    if tuned is not None:
        moved = tuned[own] - base[own]
        facts["tuned"] = float(tuned[own].sum() / tokens)
        facts["reward"] = float(beta * moved.mean())
        facts["drift"] = float(-moved.sum() / tokens)  # nats a token by which the answers became less likely
        facts["less_likely"] = float((moved < 0).mean())
    return facts


def _of_pairs(answers: Answers, base: np.ndarray, tuned: np.ndarray | None) -> list[PromptScores]:
    sides = [base] if tuned is None else [base, tuned]
    scores = {"accuracy": [_ahead(one[0::2] - one[1::2]) for one in sides]}
    each = [one / answers.tokens for one in sides]
    scores["accuracy per token"] = [_ahead(one[0::2] - one[1::2]) for one in each]
    scores["margin"] = [one[0::2] - one[1::2] for one in sides]
    if tuned is not None:
        moved = tuned - base
        right = _ahead(moved[0::2] - moved[1::2])
        scores["reward accuracy"] = [np.full(len(right), CHANCE), right]
    return _as_scores(scores, answers.groups)


def _of_rated(answers: Answers, base: np.ndarray, tuned: np.ndarray | None) -> list[PromptScores]:
    if tuned is None:
        return []
    wanted = np.where(answers.sides == Side.GOOD, 1.0, -1.0)
    right = _ahead(wanted * (tuned - base))
    return _as_scores({"moved as rated": [np.full(len(right), CHANCE), right]}, answers.groups)


def _ahead(difference: np.ndarray) -> np.ndarray:
    """1 where it is above 0, 0 below; a tie is half."""
    return (np.sign(difference) + 1) / 2


def _as_scores(found: dict[str, list[np.ndarray]], groups: list[str | None]) -> list[PromptScores]:
    """found: what is compared -> [rows] of the base and, where there is one, of the tuned model."""
    out = []
    for name, values in found.items():
        base, tuned = values[0], values[1] if len(values) > 1 else None
        for row, group in enumerate(groups):
            one = None if tuned is None else [float(tuned[row])]
            out.append(PromptScores(str(row), name, name == "margin", group, [float(base[row])], one))
    return out


def _rewards(answers: Answers, base: np.ndarray, tuned: np.ndarray, beta: float, is_pairs: bool) -> dict[str, Any]:
    """How far the answers are apart by their rewards, and in how many rows they are as they should be."""
    rewards = beta * (tuned - base)
    if not is_pairs:
        good, bad = rewards[answers.sides == Side.GOOD], rewards[answers.sides == Side.BAD]
        both = len(good) and len(bad)
        return {"margin": float(good.mean() - bad.mean()) if both else None}
    margins = rewards[0::2] - rewards[1::2]
    right = float(_ahead(margins).sum())
    low, high = wilson(right, len(margins))
    return {
        "margin": float(margins.mean()),
        "accuracy": right / len(margins),
        "interval": [low, high],
        "histogram": _histogram(margins),
    }


def _histogram(margins: np.ndarray) -> list[list[float]]:
    """[from, to, pairs] of equally wide bins."""
    counts, ends = np.histogram(margins, BINS)
    return [[float(low), float(high), int(n)] for low, high, n in zip(ends[:-1], ends[1:], counts, strict=True)]


def _notes(
    answers: Answers, told: dict[str, Any], base: np.ndarray, tuned: np.ndarray | None, remedies: Remedies
) -> list[str]:
    """What must be said beside the figures."""
    notes = []
    if tuned is not None and (tuned == base).all():
        notes.append("the tuned model finds every answer as likely as the base does: the adapter changes nothing here")
    chosen = told["sides"].get("chosen") or told["sides"].get("good")
    if tuned is not None and chosen is not None and chosen["reward"] < LESS_LIKELY:
        notes.append(
            f"the answers to be preferred became less likely themselves (mean reward {chosen['reward']:.2f}): "
            f"{remedies.against_falling()} keeps them likely"
        )
    if told["kind"] == "pairs":
        longer = answers.tokens[0::2] > answers.tokens[1::2]
        share = float(longer.mean())
        if share > LONGER:
            notes.append(
                f"the chosen answer is the longer one in {share:.0%} of the pairs: longer answers are less likely as a "
                "whole, so look at the accuracy per token too"
            )
    return notes


def lines_of(told: dict[str, Any] | Any) -> list[str]:
    """What the rewards say, for people. told: as `report` makes it; [] where the base alone was asked."""
    if "rewards" not in told:
        return []
    found = told["rewards"]
    if told["kind"] == "rated":
        if found["margin"] is None:
            return ["All answers have the same rating: rewards have nothing to be compared with."]
        return [
            f"The mean reward of good answers is {found['margin']:+.4f} above that of bad ones (beta {told['beta']:g})."
        ]
    low, high = found["interval"]
    return [
        f"By its rewards the tuned model prefers the chosen answer in {found['accuracy']:.1%} of the pairs (95% "
        f"interval {low:.1%} to {high:.1%}), by {found['margin']:+.4f} on average (beta {told['beta']:g})."
    ]

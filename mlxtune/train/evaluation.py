"""What a run does when it stops to look: the loss of held-out rows, and answers to train.sample_prompts.

Both take a while. `between` is called now and then, and may raise to break off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from mlxtune.compute.gradients import as_said
from mlxtune.compute.loss import Way
from mlxtune.config.preference import is_kept_by_check
from mlxtune.config.resolve import Config
from mlxtune.data.dataset.batches import DEFAULT_ROWS, Batch
from mlxtune.errors import UserError, did_you_mean
from mlxtune.evaluate import generate
from mlxtune.evaluate.checks.suite import Suite, read_suite
from mlxtune.evaluate.comparison.scores import by_check, score_answers
from mlxtune.evaluate.engines.local import Local
from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.evaluate.score import Score, score
from mlxtune.model.load import Loaded
from mlxtune.train.preference import held_out
from mlxtune.train.preference.goal import Preference
from mlxtune.train.preference.reference import forward_of
from mlxtune.train.ranks import ALONE, Ranks

SAMPLE_TOKENS = 128  # the most of an answer to train.sample_prompts


def suite_of(config: Config) -> Suite | None:
    """The suite that train.sample_prompts names; None where it lists prompts.

    Raises UserError for a file that is none, for checks that would run programs, and for a train.keep_by that it lacks.
    """
    section = config.train
    if isinstance(section.sample_prompts, list):
        return None
    try:
        suite = read_suite(Path(section.sample_prompts))
    except UserError as error:
        runs = "--run-code" in error.hint
        hint = "Checks that run programs are asked by `mlxtune eval --suite` alone." if runs else error.hint
        raise UserError(f"train.sample_prompts: {error.message}", hint) from error
    if is_kept_by_check(config) and section.keep_by not in suite.names:
        raise UserError(
            f"train.keep_by: {suite.path} has no check {section.keep_by}",
            did_you_mean(section.keep_by, ["loss", *suite.names]),
        )
    return suite


@dataclass(frozen=True)
class Scored:
    """What held-out rows say of the adapter."""

    loss: float  # nats a supervised token; of preferences, a pair or a rated answer
    tokens: int  # supervised ones
    more: dict[str, float] = field(default_factory=dict)  # of preferences: the other fields of an `eval` event


@dataclass(frozen=True)
class Samples:
    """What a model says to train.sample_prompts."""

    answers: list[dict[str, str]] = field(default_factory=list)  # {"prompt": ..., "answer": ...} of each
    checks: dict[str, float] = field(default_factory=dict)  # of a suite: the mean score of each check that applied
    cut: int = 0  # of a suite's answers: how many were cut after SAMPLE_TOKENS
    notes: list[str] = field(default_factory=list)  # what must be known of a suite and of how it is answered


@dataclass(frozen=True)
class Evaluation:
    """Looks at the adapter as it stands."""

    loaded: Loaded  # the model that is trained, with its tokenizer
    config: Config  # of the run
    way: Way  # how the loss is computed
    batches: Sequence[Batch]  # of the validation rows, this process's part
    ranks: Ranks = ALONE  # the processes that share the run
    suite: Suite | None = None  # that train.sample_prompts names
    preference: Preference | None = None  # the objective of pairs or rated answers

    def score(self, between: Callable[[], None]) -> Scored:
        """Of all validation rows, the same on every process."""
        model = self.loaded.model
        if self.preference is not None:
            forward = forward_of(model, self.way)
            loss, more = held_out.score(self.preference, forward, self.batches, self.ranks, between)
            (tokens,) = self.ranks.sum_numbers(sum(batch.targets for batch in self.batches))
            return Scored(loss, round(tokens), more)
        with as_said(model, replace(self.way, recompute=0)):
            own = score(model, self.way.split, self.batches, self.way.prefix, between)
        loss_sum, tokens, correct = self.ranks.sum_numbers(own.loss_sum, own.tokens, own.correct)
        summed = Score(loss_sum, round(tokens), round(correct))
        return Scored(summed.loss, summed.tokens)

    def samples(self, between: Callable[[], None]) -> Samples:
        """No answers on other processes than the first; the checks' scores on all of them."""
        if self.suite is not None:
            return self._asked(self.suite, between)
        sampling = Sampling(max_tokens=SAMPLE_TOKENS)
        data = self.config.data
        answers = []
        for prompt in self.config.train.sample_prompts:
            between()
            if self.ranks.first:
                question = [{"role": "user", "content": prompt}]
                answer = generate.answer(self.loaded, question, sampling, data.template_kwargs, data.date)
                answers.append({"prompt": prompt, "answer": answer})
            self.ranks.meet()
        return Samples(answers)

    def _asked(self, suite: Suite, between: Callable[[], None]) -> Samples:
        """The suite's prompts answered, and its checks on the answers."""
        data = self.config.data
        requests = [Request(row.id, row.messages, row.tools) for row in suite.rows]
        # As many at once as a training step has rows: they need less than that step does.
        rows = self.config.train.batch_rows or DEFAULT_ROWS
        engine = Local(
            self.loaded, Sampling(max_tokens=SAMPLE_TOKENS), (data.template_kwargs, data.date), rows_at_once=rows
        )
        plan = engine.plan(requests) if self.ranks.first else []
        found: dict[str, Answer] = {}
        for number in range(self.ranks.highest(len(plan))):
            between()
            if self.ranks.first:
                for answer in engine.answers([requests[place] for place in plan[number]]):
                    found[answer.id] = answer
            self.ranks.meet()
        # Of every check, so that all processes speak of the same ones: its mean, and 1 where it applied to an answer.
        means, applied = dict.fromkeys(suite.names, 0.0), dict.fromkeys(suite.names, 0.0)
        answers, cut = [], 0
        if self.ranks.first:
            scores = score_answers(suite.rows, {"base": found.values()})
            for name, some in by_check(scores).items():
                means[name], applied[name] = fmean(fmean(one.base) for one in some), 1.0
            cut = sum(answer.finish == "length" for answer in found.values())
            for row in suite.rows:
                answers.append({"prompt": str(row.messages[-1]["content"]), "answer": found[row.id].text})
        sums = self.ranks.sum_numbers(*means.values(), *applied.values())
        known = {name: sums[place] for place, name in enumerate(means) if sums[len(means) + place]}
        return Samples(answers, known, cut, [*suite.notes, *engine.notes])

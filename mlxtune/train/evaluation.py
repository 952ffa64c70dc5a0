"""What a run does when it stops to look: the validation loss, and answers to train.sample_prompts.

Both take a while. `between` is called now and then, and may raise to break off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mlxtune.compute.gradients import as_said
from mlxtune.compute.loss import Way
from mlxtune.config.resolve import Config
from mlxtune.data.dataset.batches import Batch
from mlxtune.evaluate import generate
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.evaluate.score import Score, score
from mlxtune.model.load import Loaded
from mlxtune.train.ranks import ALONE, Ranks

SAMPLE_TOKENS = 128  # the most of an answer to train.sample_prompts


@dataclass(frozen=True)
class Evaluation:
    """Looks at the adapter as it stands."""

    loaded: Loaded  # the model that is trained, with its tokenizer
    config: Config  # of the run
    way: Way  # how the loss is computed
    batches: Sequence[Batch]  # of the validation rows, this process's part
    ranks: Ranks = ALONE  # the processes that share the run

    def score(self, between: Callable[[], None]) -> Score:
        """Of all validation rows, the same on every process."""
        model = self.loaded.model
        with as_said(model, replace(self.way, recompute=0)):
            own = score(model, self.way.split, self.batches, self.way.prefix, between)
        loss_sum, tokens, correct = self.ranks.sum_numbers(own.loss_sum, own.tokens, own.correct)
        return Score(loss_sum, round(tokens), round(correct))

    def samples(self, between: Callable[[], None]) -> list[dict[str, str]]:
        """{"prompt": ..., "answer": ...} of each prompt; none on other processes than the first."""
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
        return answers

"""How much an answer owes to its question: instruction-following difficulty (IFD; Li et al. 2023, arXiv:2308.12032).

    IFD = loss(answer | question) / loss(answer)        nats a token, of the same tokens in both

    question                   answer               behind it   alone   IFD
    Capital of France?         It is Paris.               0.9     2.1   0.43   the question tells what comes
    How do I cook rice?        Rinse it, then ...         1.6     1.9   0.84   it helps a little
    Capital of France?         Rinse it, then ...         2.0     1.9   1.05   it does not: another row's answer

Which side is good? The paper keeps the largest values below 1: of rows that are all sound, those that a model finds
hard teach it most. Rows that are not sound have the largest values of all: where an answer belongs to another question,
is cut, or is noise, the question explains nothing of it. Who keeps the largest values below 1 of a mixed set keeps
these. And who keeps the smallest ones keeps the rows that are easiest, which teach least. So IFD only says which rows
are sound: those below a border that is measured (`strangers`). All of these are as good as each other: which of them
stay is up to kinds, diversity (`choosing`) and chance. What is below the border without being good, an answer that
repeats its question, is a fault of its own (`candidates.is_copied`).

"Alone" needs something before the first token, for nothing predicts the first one of a row. That is what the template
puts between any question and its answer ("<|im_end|>\\n<|im_start|>assistant\\n"), which says nothing of the question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mlxtune.config.resolve import Config
from mlxtune.data.chat.masking import Example
from mlxtune.data.chat.renderer import Renderer, by_record
from mlxtune.data.dataset.batches import in_order
from mlxtune.data.dataset.measured import ListedExamples
from mlxtune.data.rows.formats import Record
from mlxtune.errors import UserError
from mlxtune.evaluate.score import losses_of_each, split_for
from mlxtune.make.curation.losses import Losses
from mlxtune.model.load import Loaded

AT_ONCE = 64  # rows that are tokenized, computed and kept at once; sorted by length, so that little is padded
PROBES = ("x", "Why is the sky blue?")  # questions that have nothing in common


class Scorer:
    """Scores rows by one model."""

    def __init__(self, loaded: Loaded, config: Config) -> None:
        """config: its data section says how rows are rendered. Raises UserError for a model without a chat template, or
        with one that refuses a plain question and answer.
        """
        self.loaded = loaded
        self.config = config
        section = config.data.model_copy(update={"train_on": "last", "expand_turns": "auto"})
        self.renderer = Renderer(loaded.tokenizer, section)
        self.opening = self._opening()
        self.computed = 0  # tokens that went through the model

    def losses(
        self, records: Sequence[Record], done: Callable[[Sequence[Record], Sequence[Losses | None]], None]
    ) -> None:
        """Score rows, AT_ONCE at a time. done: called with each part and what was found; None: of a row of whose
        answer data.max_tokens leaves nothing, or that the template refuses.
        """
        for start in range(0, len(records), AT_ONCE):
            part = records[start : start + AT_ONCE]
            done(part, self._of_part(part))

    def _of_part(self, records: Sequence[Record]) -> list[Losses | None]:
        found: list[Losses | None] = [None] * len(records)
        examples: list[Example] = []  # two of each row: behind its question, and alone
        places: list[int] = []
        for place, rows in enumerate(by_record(self.renderer.stream(records))):
            example = rows[-1].example
            if example is not None:
                examples += [example, self._alone(example)]
                places.append(place)
        if not examples:
            return found
        self.loaded.check_ids([example.ids for example in examples])
        batches = in_order(ListedExamples(examples))
        split = split_for(self.loaded, self.config, batches[-1])
        sums, tokens = losses_of_each(self.loaded.model, split, batches, len(examples))
        self.computed += sum(batch.ids.size for batch in batches)
        for number, place in enumerate(places):
            behind, alone = 2 * number, 2 * number + 1
            assert tokens[behind] == tokens[alone]
            found[place] = Losses(
                behind=float(sums[behind] / tokens[behind]),
                alone=float(sums[alone] / tokens[alone]),
                tokens=int(tokens[behind]),
                row_tokens=len(examples[behind].ids),
            )
        return found

    def _alone(self, example: Example) -> Example:
        """The answer without its question: from the first token that is to be produced on."""
        first = int(np.flatnonzero(example.mask)[0])
        if first == 0:  # a row that begins with its answer: its first token is predicted by nothing in both
            return example
        ids = [*self.opening, *example.ids[first:]]
        mask = np.concatenate([np.zeros(len(self.opening), np.uint8), np.asarray(example.mask[first:], np.uint8)])
        return Example(ids, mask)

    def _opening(self) -> list[int]:
        """The tokens between any question and its answer: those that the prompts of two questions end with."""
        prompts = []
        for text in PROBES:
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
            (row,) = self.renderer.uncut().rows([Record("", 1, "messages", messages)])
            if row.example is None:
                raise UserError(
                    f"{self.loaded.path}: its chat template takes no plain question and answer ({row.dropped})",
                    "Take another model, or name a template: --set data.template=chatml.",
                )
            ids = list(row.example.ids)
            prompts.append(ids[: int(np.flatnonzero(row.example.mask)[0])])
        one, other = prompts
        same = 0
        while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
            same += 1
        # Some template may put nothing there: the last token of a prompt will do, whatever it is.
        return one[len(one) - max(same, 1) :]

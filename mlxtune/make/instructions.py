"""Self-Instruct (Wang et al. 2022, arXiv:2212.10560): from a few tasks that a person wrote to many, with examples.

A round asks an engine a few times for new tasks, each time after eight others: six seeds, and two that were made before
(in the first round all eight are seeds).

    8 tasks  ->  "1. Explain why ...  2. Which of ...  3. ..."       rules: length, first letter, blacklist
             ->  near to a seed, to one kept, to the suite?          ROUGE-L above 0.7
             ->  does it classify?                                   asked
             ->  no: input, then output; yes: label, then an input   else most inputs get the same label
             ->  examples that say nothing, or contradict            rules

What a round asks depends on what those before it kept, and on nothing else: not on how many are wanted, so that a
larger --count goes on where a smaller one ended.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.make import filters, parsing
from mlxtune.make.answer_filters import Made, wrong_with
from mlxtune.make.filters import Limits
from mlxtune.make.folder import Failed, Making, Rejected, Row, Spent, Yield
from mlxtune.make.guard import NEAR, Guard
from mlxtune.make.pool import Pool
from mlxtune.make.prompts import MOST_EXAMPLES, NEW, Prompts, more_tasks
from mlxtune.make.seeds import Example, Seed

SHOWN, SHOWN_MADE = 8, 2  # tasks that a prompt shows; of them made ones, at most
LAST_ROUNDS, LEAST_YIELD = 3, 0.05  # of the tasks of the last rounds this share must be kept, or it stops


@dataclass(frozen=True)
class Task:
    """A task that an engine made."""

    # Of the answer it stood in, and its number there.
    id: str
    # What is to be done.
    text: str
    # The ids of the tasks that the prompt showed.
    parents: tuple[str, ...]
    # ROUGE-L to the nearest seed or kept task.
    near: float


@dataclass
class SelfInstruct:
    """One making of tasks."""

    # Where answers come from and rows go to.
    making: Making
    # What a person wrote; at least one.
    seeds: Sequence[Seed]
    # What a task must keep to.
    limits: Limits
    # What must not be made again.
    guard: Guard
    # Prompts of a round.
    at_once: int
    # Of the random choices.
    seed: int
    # Kept so far.
    kept: list[Task] = field(default_factory=list)
    # Of each round: (tasks that were read, tasks that were kept).
    rounds: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.making.guard = self.guard
        self._pool = Pool(seed.text for seed in self.seeds)
        self._prompts = Prompts(self.seeds, self.seed)

    def run(self, count: int) -> dict[str, Any]:
        """Rounds until `count` tasks are kept, or there is a reason to stop. Returns what came of it."""
        stopped = ""
        self.making.counted = 0
        try:
            while len(self.kept) < count and not stopped:
                read, kept = self._round(count)
                self.rounds.append((read, kept))
                stopped = self._why_stop()
        except Spent as spent:
            stopped = str(spent)
        if len(self.kept) >= count:
            stopped = ""
        return self.making.finish(Yield("instructions", count), stopped)

    def asked_first(self) -> list[Request]:
        """The requests of the first round."""
        return [request for request, _ in self._requests()]

    def _round(self, count: int) -> tuple[int, int]:
        """(Tasks that were read, tasks that were kept) of one round."""
        asked = self._requests()
        answers = self.making.ask([request for request, _ in asked])
        read, fresh = 0, []
        for answer, (_, parents) in zip(answers, asked, strict=True):
            if isinstance(answer, Answer):
                texts = self._texts(answer, len(parents))
                read += len(texts)
                fresh += self._good(answer.id, texts, parents)
        before = len(self.kept)
        self._add_examples(fresh, count)
        return read, len(self.kept) - before

    def _requests(self) -> list[tuple[Request, tuple[str, ...]]]:
        """The prompts of the next round for more tasks, and the ids of the tasks that each shows."""
        number = len(self.rounds) + 1
        found = []
        for place in range(self.at_once):
            id = f"round {number} prompt {place + 1}"
            draw = random.Random(f"{self.seed} {id}")
            shown = [(task.id, task.text) for task in draw.sample(self.kept, min(SHOWN_MADE, len(self.kept)))]
            most = min(SHOWN - len(shown), len(self.seeds))
            shown += [(seed.id, seed.text) for seed in draw.sample(list(self.seeds), most)]
            draw.shuffle(shown)
            text = more_tasks([text for _, text in shown], self.making.engine.chats)
            found.append((_asked(id, text), tuple(name for name, _ in shown)))
        return found

    def _texts(self, answer: Answer, shown: int) -> list[str]:
        """The tasks of one answer. What is no list is rejected, and so is a last task that was cut. shown: how many
        tasks the prompt had, after which a base model's list goes on.
        """
        chats = self.making.engine.chats
        texts = parsing.listed(answer.text if chats else f"{shown + 1}.{answer.text}")
        if not texts:
            self._reject({"answer": answer.text, "made": self.making.made(id=answer.id)}, "unparseable")
        if answer.finish == "length" and texts:
            self._reject({"instruction": texts.pop()}, "cut")
        return texts[:NEW]

    def _good(self, id: str, texts: Sequence[str], parents: tuple[str, ...]) -> list[Task]:
        """The tasks of one answer that pass all filters; those after them are compared with them, too."""
        good = []
        for number, text in enumerate(texts, 1):
            row = {"instruction": text, "made": self.making.made(parents, f"{id} task {number}")}
            wrong = filters.wrong_with_instruction(text, self.limits)
            if wrong is not None:
                self._reject(row, *wrong)
                continue
            near, which = self._pool.nearest(text)
            too_near = self.guard.why(text)
            if near > NEAR:
                self._reject(row, "near duplicate", f"ROUGE-L {near:.2f} to: {self._pool.texts[which]}")
            elif too_near is not None:
                self._reject(row, "guarded", too_near)
            else:
                self._pool.add(text)
                good.append(Task(f"{id} task {number}", text, parents, near))
        return good

    def _add_examples(self, tasks: Sequence[Task], count: int) -> None:
        """Ask for examples of tasks, and keep those tasks that have some, until `count` are kept."""
        kinds = self._ask(tasks, "kind", self._prompts.kind)
        # A task whose kind is not known is taken for one that does not classify.
        classify = {id: isinstance(kind, Answer) and parsing.says_yes(kind.text) for id, kind in kinds.items()}
        chats = self.making.engine.chats
        texts = {task.text: self._prompts.examples(task.text, classify[task.id], chats) for task in tasks}
        answers = self._ask(tasks, "examples", lambda text: texts[text])
        for task in tasks:
            if len(self.kept) == count:
                return
            row = {"instruction": task.text, "made": self.making.made(task.parents, task.id)}
            answer = answers[task.id]
            if isinstance(answer, Failed):
                self._reject(row, "failed", answer.why)
            elif examples := self._examples(row, answer, classify[task.id]):
                self._keep(task, examples)
            else:
                self._reject(row, "no instance")

    def _ask(self, tasks: Sequence[Task], what: str, prompt: Callable[[str], str]) -> dict[str, Answer | Failed]:
        """One request for each task: the task's id -> its answer."""
        if not tasks:
            return {}
        requests = [_asked(f"{task.id} {what}", prompt(task.text)) for task in tasks]
        return dict(zip((task.id for task in tasks), self.making.ask(requests), strict=True))

    def _examples(self, row: dict[str, Any], answer: Answer, classifies: bool) -> list[Example]:
        """The examples of one task that are worth training on; the others are rejected. row: of the task; classifies:
        whether it does.
        """
        examples = parsing.examples_in(answer.text if self.making.engine.chats else f"Example 1\n{answer.text}")
        if not examples:
            self._reject({**row, "answer": answer.text}, "unparseable")
        if answer.finish == "length" and examples:
            cut = examples.pop()
            self._reject({**row, "input": cut.input, "output": cut.output}, "cut")
        kept, left = filters.sorted_out(examples[:MOST_EXAMPLES], classifies)
        for example, code in left:
            self._reject({**row, "input": example.input, "output": example.output}, code)
        good = []
        for example in kept:
            reason, detail = self._wrong_with(row["instruction"], example)
            if reason:
                self._reject({**row, "input": example.input, "output": example.output}, reason, detail)
            else:
                good.append(example)
        return good

    def _wrong_with(self, instruction: str, example: Example) -> tuple[str, str]:
        """(Reason, detail) why an example is no good as a row; ("", "") for a good one."""
        question, answer = _conversation(instruction, example)
        why = self.guard.why_any([question, answer])
        if why is not None:
            return "guarded", why
        said = Answer("", 0, example.output, "", "stop", 0)
        reason = wrong_with(Made([question], said))
        if reason == "language":  # an output may be in the language of the task, whatever that of its input is
            reason = wrong_with(Made([{"role": "user", "content": instruction}], said))
        return reason, ""

    def _keep(self, task: Task, examples: Sequence[Example]) -> None:
        self.kept.append(task)
        self.making.counted = len(self.kept)
        made = self.making.made(task.parents, task.id, nearest=task.near)
        for example in examples:
            self.making.keep(Row(_conversation(task.text, example), made))

    def _reject(self, row: dict[str, Any], reason: str, detail: str = "") -> None:
        self.making.reject(Rejected(row, reason, detail))

    def _why_stop(self) -> str:
        """Why it is no use to go on, from the last rounds; "" where it is."""
        last = self.rounds[-LAST_ROUNDS:]
        read, kept = sum(read for read, _ in last), sum(kept for _, kept in last)
        if len(last) < LAST_ROUNDS or kept >= max(1, LEAST_YIELD * read):
            return ""
        return (
            f"the engine repeats itself: of {read} instructions in {LAST_ROUNDS} rounds {kept} were kept; more seeds, "
            "a higher --temperature or another engine may help"
        )


def _asked(id: str, text: str) -> Request:
    return Request(id, [{"role": "user", "content": text}])


def _conversation(instruction: str, example: Example) -> list[dict[str, Any]]:
    """As an Alpaca row is read: the input after a blank line."""
    question = f"{instruction}\n\n{example.input}" if example.input else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": example.output}]

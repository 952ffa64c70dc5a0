"""What Self-Instruct asks: for more tasks, whether a task classifies, and for examples of it.

Each prompt begins with what all prompts of its kind begin with, which a model on this machine reads once. A base model,
without a chat template, goes on with a text instead: the list of tasks ends in the middle then, as in the paper.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from mlxtune.make.seeds import Example, Seed

NEW = 8  # tasks that one answer is asked for
MOST_EXAMPLES = 5  # of one task
SHORT, SHORT_TASK = 400, 200  # letters of a seed with its example, and of one without, that prompts show
TASK = "Task:"
# What ends an answer of a base model: one task too many, or another task.
ENDS = (f"\n{TASK}", f"\n{2 * NEW + 1}.")

MORE = f"""You write tasks for an assistant that answers with text alone: it sees no pictures, opens no files, visits \
no pages.

Write {NEW} new tasks. Each is about something else than the examples below and than the other new ones: other verbs, \
other subjects, other forms. Mix questions and commands, and tasks of many kinds: to explain, rewrite, compare, \
classify, compute, plan, invent. One or two sentences each, in the language of the examples. Answer with a numbered \
list of {NEW} tasks, and nothing else.

Examples:
"""
MORE_BASE = "Come up with a series of tasks:\n"
KIND = """A task is a classification task where each answer to it is one of a few labels that could be listed \
beforehand, such as yes and no, or positive, neutral and negative. Is the last of these tasks one? Answer yes or no.
"""
OPEN = f"""Do the last of these tasks, in the form of the others. Where a task needs an input to work on, write up \
to {MOST_EXAMPLES} examples, each with an input of its own and its output. Where it needs none, write one example, \
which has an output alone. Write in the language of the task.
"""
LABELLED = f"""Write examples of the last of these tasks, in the form of the others: up to {MOST_EXAMPLES}, and one \
for each label that may be an answer. First the label, then an input to which it is the right answer. Write in the \
language of the task.
"""
# Ours, beside or in place of those that the seeds give.
KINDS = (
    ("Does this sentence praise or criticise the product?", True),
    ("Describe how to sharpen a kitchen knife.", False),
    ("Say which of the four seasons the poem is about.", True),
    ("Give this paragraph a title.", False),
)
OWN_OPEN = (
    ("Put these words in alphabetical order.", Example("pear, fig, apple", "apple, fig, pear")),
    ("Name two ways to use vinegar in a household.", Example("", "It takes lime off taps, and it dresses a salad.")),
)
OWN_LABELLED = (
    (
        "Say whether the customer is content or annoyed.",
        (
            Example("It came a day early, and the colour is lovely.", "content"),
            Example("I have now called three times about my refund.", "annoyed"),
        ),
    ),
)


def more_tasks(examples: Sequence[str], chats: bool) -> str:
    """Asks for NEW tasks, given some. chats: whether the engine is asked, or goes on with a text."""
    lines = [f"{number}. {_one_line(text)}" for number, text in enumerate(examples, 1)]
    if chats:
        return MORE + "\n".join(lines)
    return MORE_BASE + "\n".join([*lines, f"{len(examples) + 1}."])


class Prompts:
    """The prompts about one task. The seeds that they show are drawn once, so that they all begin alike."""

    def __init__(self, seeds: Sequence[Seed], seed: int) -> None:
        """seed: of the draw."""
        draw = random.Random(f"{seed} examples")
        short = [one for one in seeds if len(one.text) + len(one.examples[0].input + one.examples[0].output) <= SHORT]
        known = [one for one in seeds if one.classifies is not None and len(one.text) <= SHORT_TASK]
        shown = [one for kind in (True, False) for one in _some(draw, [s for s in known if s.classifies is kind], 4)]
        self._kind = [KIND, *(_asked_kind(text, classifies) for text, classifies in KINDS)]
        self._kind += [_asked_kind(one.text, bool(one.classifies)) for one in shown]
        opened = [one for one in short if not one.classifies]
        with_input = [one for one in opened if one.examples[0].input]
        without = [one for one in opened if not one.examples[0].input]
        chosen = [(one.text, one.examples[0]) for one in [*_some(draw, with_input, 2), *_some(draw, without, 1)]]
        self._open = [OPEN]
        for text, example in [*chosen, *OWN_OPEN][: max(2, len(chosen))]:
            self._open.append(_done(text, [f"Input: {example.input}"] * bool(example.input), example.output))
        self._labelled = [LABELLED, *(_labelled(text, examples) for text, examples in OWN_LABELLED)]
        for one in _some(draw, [one for one in short if one.classifies and one.examples[0].input], 2):
            self._labelled.append(_labelled(one.text, one.examples))

    def kind(self, task: str) -> str:
        """Asks whether a task classifies."""
        return "\n".join([*self._kind, f"{TASK} {_one_line(task)}\nClassification:"])

    def examples(self, task: str, classifies: bool, chats: bool) -> str:
        """Asks for examples of a task."""
        shown = self._labelled if classifies else self._open
        return "\n".join([*shown, f"{TASK} {_one_line(task)}"]) + ("" if chats else "\nExample 1\n")


def _some(draw: random.Random, seeds: Sequence[Seed], count: int) -> list[Seed]:
    return draw.sample(list(seeds), min(count, len(seeds)))


def _asked_kind(task: str, classifies: bool) -> str:
    return f"{TASK} {_one_line(task)}\nClassification: {'yes' if classifies else 'no'}\n"


def _done(task: str, given: Sequence[str], output: str) -> str:
    return "\n".join([f"{TASK} {_one_line(task)}", "Example 1", *given, f"Output: {output}", ""])


def _labelled(task: str, examples: Sequence[Example]) -> str:
    lines = [f"{TASK} {_one_line(task)}"]
    for number, example in enumerate(examples[:MOST_EXAMPLES], 1):
        lines += [f"Example {number}", f"Label: {example.output}", f"Input: {example.input}"]
    return "\n".join([*lines, ""])


def _one_line(text: str) -> str:
    return " ".join(text.split())

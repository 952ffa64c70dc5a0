"""Every assistant turn behind the very prompt that asks for it.

At inference a model sees what the template prints for the messages before the turn, and then to ask for it. It must
produce the rest of what the template prints for the messages up to and with the turn. For example (Qwen3, whose
template prints an empty thought in the last turn):

    prompt  ...<|im_start|>assistant\\n
    whole   ...<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\nHello<|im_end|>\\n
    target                              <think>\\n\\n</think>\\n\\nHello<|im_end|>

`continuations` shows what is done where `whole` does not begin with the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mlxtune.data.chat import damage, turns
from mlxtune.data.chat.continuations import continuation
from mlxtune.data.chat.damage import Damage
from mlxtune.data.chat.turn_places import TurnPlaces
from mlxtune.data.rows.messages import THINKING_KEYS
from mlxtune.data.template.template import Messages, Template, TemplateError

# Remarks on how a turn is trained. The key is kept with the row; the words are for people.
KINDS = {
    "joined": "answers in a row that the template prints as one turn, trained as one",
    "joined, untrained": "answers joined into one turn, not trained because one of them has weight 0",
    "unasked": "a turn that no prompt asks for, trained as the whole conversation prints it",
    "no request": "a turn of a template that has no way to ask for it: its header stays prompt",
    "thought closed": "a turn without a thought behind a prompt that opens one, trained to close it",
    "thought kept": "a thought that the template drops behind a prompt that opens one, trained",
    "not read back": "a turn that the template does not read back as the row has it, trained all the same",
    "context differs": "a turn whose context the template prints differently once the turn is there, trained as asked",
    "stop added": "a turn ended with the stop token that the template prints behind no last turn",
    "apart": "a turn whose first token would straddle the end of its prompt, tokenized apart from it",
    "label": "an answer whose label may be a rating or a class, trained whatever it is: -c kto reads labels as ratings",
    "cut": "a turn that data.max_tokens cuts off, whole or its end",
}


@dataclass(frozen=True)
class AskedTurn:
    """A turn to train on."""

    index: int  # of its message in the row, counted from 0; of answers joined into one turn, the last
    prompt: str  # what the template prints to ask for it
    target: str  # what the model must produce from there, end-of-turn token included
    trailing: str = ""  # what the template prints behind it; context that is never trained
    kinds: tuple[str, ...] = ()  # remarks on it: keys of KINDS
    damage: tuple[Damage, ...] = ()  # what the template does not print of it, or of its context

    @property
    def text(self) -> str:
        """What an example must hold of the turn."""
        return self.prompt + self.target


def asked_turns(
    template: Template, messages: Messages, tools: Any, trained: set[int], only_last: bool = False
) -> tuple[list[AskedTurn], list[tuple[str, int]]]:
    """(the turns to train on in their order, kinds and indices of turns that are left out).

    messages: repaired; trained: indices of the answers to train on; only_last: of these, the row's last turn alone.
    Raises TemplateError when the template refuses the row, or when a turn's place in its rendering is not certain.
    """
    row = _Row(template, messages, tools)
    groups = list(row.groups())
    if only_last:
        groups = groups[-1:]
    asked: list[AskedTurn] = []
    left_out: list[tuple[str, int]] = []
    for first, last in groups:
        answers = set(range(first, last + 1))
        if answers <= trained:
            asked.append(row.turn(first, last))
        elif answers & trained:
            left_out.append(("joined, untrained", last))
    return asked, left_out


class _Row(TurnPlaces):
    """Makes the turns of one conversation. A turn's messages are `first` to `last`; the first is asked for."""

    def turn(self, first: int, last: int) -> AskedTurn:
        """Raises TemplateError when the template refuses the turn, or prints it so that its place is not certain."""
        try:
            prompt, whole = self.asked(first), self.whole(last + 1)
        except TemplateError:
            return self.unasked(first, last)
        marked = self.marked_tail(first, last)
        behind = continuation(self, prompt, whole, first, last, marked)
        if behind.prompt_shuts_thought:
            return self.without_thought(first, last)
        kinds = ["joined", *behind.kinds] if last > first else behind.kinds
        prompt_opens = self.template.thought.opened(behind.prompt)
        if prompt_opens and not self.thought_of(first) and "thought closed" not in kinds:
            kinds.append("thought closed")
        target = self.up_to_end(behind.rest, first, last, marked)
        trailing = behind.rest[len(target) :]
        has_calls = bool(self.messages[last].get("tool_calls"))
        stop = self.template.header_that_ends(calls=has_calls)
        if stop:
            target += stop
            trailing = ""
            kinds.append("stop added")
        lost = [
            *damage.of_context(self, first),
            *damage.of_turn(self, first, last, marked, target, behind.keeps_thought),
        ]
        return AskedTurn(last, behind.prompt, target, trailing, tuple(kinds), tuple(lost))

    def without_thought(self, first: int, last: int) -> AskedTurn:
        """The turn's text alone, where the prompt has closed the thought that the row has."""
        message = {key: value for key, value in self.messages[first].items() if key not in THINKING_KEYS}
        content = str(message.get("content") or "")
        message["content"] = content.rpartition(self.template.thought.close)[2]
        bare = _Row(self.template, [*self.messages[:first], message, *self.messages[first + 1 :]], self.tools)
        turn = bare.turn(first, last)
        lost = Damage("thinking", first, f"the prompt has closed the thought that message {first + 1} has")
        return replace(turn, damage=(*turn.damage, lost))

    def unasked(self, first: int, last: int) -> AskedTurn:
        """The turn as the whole row has it. Raises TemplateError when the template refuses that too."""
        located = turns.locate(self.template, self.messages, self.tools)
        spans = [(start, end) for index, start, end in located.spans if first <= index <= last]
        if not spans or len(spans) > last - first + 1:  # several spans of one message have context between them
            raise self.uncertain(first)
        start, end = spans[0][0], spans[-1][1]
        target = located.text[start:end]
        marked = self.marked_tail(first, last)
        lost_of_turn = list(damage.of_turn(self, first, last, marked, target, kept_thought=False))
        for message in self.messages[first : last + 1]:
            content = str(message.get("content") or "").strip()
            if not lost_of_turn and content not in target:
                raise self.uncertain(first)
        lost_before = [lost for lost in located.damage if lost.index < first]
        return AskedTurn(
            last,
            prompt=located.text[:start],
            target=target,
            trailing=located.text[end:],
            kinds=("unasked", "joined") if last > first else ("unasked",),
            damage=(*lost_before, *lost_of_turn),
        )

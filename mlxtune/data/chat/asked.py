"""Every assistant turn behind the very prompt that asks for it.

At inference a model sees `asked`: what the template prints for the messages before the turn, and then to ask for it.
It must produce the rest of `whole`: what the template prints for the messages up to and with the turn. For example
(Qwen3, whose template prints an empty thought in the last turn):

    asked   ...<|im_start|>assistant\\n
    whole   ...<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\nHello<|im_end|>\\n
    target                              <think>\\n\\n</think>\\n\\nHello<|im_end|>

Where `whole` does not begin with `asked`, the example is `asked` and then the turn's own text, found by place: in a
rendering in which the context is but marks, what follows the last mark is the turn's. For example (DeepSeek-R1, whose
prompt opens a thought that its template never prints; its tokens abbreviated):

    asked   <User>Hi<Assistant><think>\\n
    whole   <User>Hi<Assistant>Hello<end>
    target                            \\n</think>\\n\\nHello<end>

`opening` is the template text between the context's last mark and the turn's first: `<Assistant>` in `whole`, and
`<Assistant><think>\\n` in `asked`. What both begin with is the header; what `asked` has beyond it (here the opened
thought) is its `surplus`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from mlxtune.data.chat import turn_damage, turns
from mlxtune.data.chat.marks import THINKING
from mlxtune.data.chat.turn_places import Tail, TurnPlaces
from mlxtune.data.chat.turns import Damage
from mlxtune.data.template.template import THINKING_KEYS, USER, Messages, Template, TemplateError

# What is to be told of a turn. The key is kept with the row; the words are for people.
KINDS = {
    "joined": "answers in a row that the template prints as one turn, trained as one",
    "joined, untrained": "answers joined into one turn, not trained because one of them has weight 0",
    "unasked": "a turn that no prompt asks for, trained as the whole conversation prints it",
    "no request": "a turn of a template that has no way to ask for it: its header stays prompt",
    "thought closed": "a turn without a thought behind a prompt that opens one, trained to close it",
    "thought kept": "a thought that the template drops behind a prompt that opens one, trained",
    "not read back": "a turn that the template does not read back as the row has it, trained all the same",
    "context differs": "a turn before which the template prints another context once it is there, trained as asked",
    "stop added": "a turn ended with the stop token that the template prints behind no last turn",
    "apart": "a turn whose first token would straddle the end of its prompt, tokenized apart from it",
    "cut": "a turn that data.max_tokens cuts off, whole or its end",
}


@dataclass(frozen=True)
class AskedTurn:
    """A turn to train on."""

    index: int  # of its message in the row, counted from 0; of answers joined into one turn, the last
    prompt: str  # what the template prints to ask for it
    target: str  # what the model must produce from there, end-of-turn token included
    trailing: str = ""  # what the template prints behind it; context that is never trained
    kinds: tuple[str, ...] = ()  # what is to be told of it: keys of KINDS
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
    out: list[AskedTurn] = []
    left: list[tuple[str, int]] = []
    groups = list(row.groups())
    for first, last in groups[-1:] if only_last else groups:
        wanted = [index for index in range(first, last + 1) if index in trained]
        if len(wanted) == last - first + 1:
            out.append(row.turn(first, last))
        elif wanted:
            left.append(("joined, untrained", last))
    return out, left


@dataclass
class _Draft:
    """A turn on its way."""

    prompt: str
    rest: str = ""  # what must be produced behind the prompt, and what the template prints behind that
    kinds: list[str] = field(default_factory=list)
    kept: bool = False  # the target holds a thought that the template drops
    closed: bool = False  # the prompt has closed the thought that the message has


class _Row(TurnPlaces):
    """Makes the turns of one conversation. A turn's messages are `first` to `last`; the first is asked for."""

    def turn(self, first: int, last: int) -> AskedTurn:
        """Raises TemplateError when the template refuses the turn, or prints it so that its place is not certain."""
        try:
            draft, whole = _Draft(self.asked(first)), self.whole(last + 1)
        except TemplateError:
            return self.unasked(first, last)
        marked = self.marked_tail(first, last)
        if whole.startswith(draft.prompt):
            self.continue_prompt(draft, whole, first, last, marked)
        else:
            self.leave_prompt(draft, whole, first, last, marked)
        if draft.closed:
            return self.without_thought(first, last)
        if last > first:
            draft.kinds.insert(0, "joined")
        opened = self.template.thought.opened(draft.prompt)
        if opened and not self.thought_of(first) and "thought closed" not in draft.kinds:
            draft.kinds.append("thought closed")
        target = self.up_to_end(draft.rest, first, last, marked)
        trailing = draft.rest[len(target) :]
        stop = self.template.header_that_ends(calls=bool(self.messages[last].get("tool_calls")))
        if stop:
            target, trailing = target + stop, ""
            draft.kinds.append("stop added")
        damage = (
            *turn_damage.of_context(self, first),
            *turn_damage.of_turn(self, first, last, marked, target, draft.kept),
        )
        return AskedTurn(last, draft.prompt, target, trailing, tuple(draft.kinds), damage)

    def continue_prompt(self, draft: _Draft, whole: str, first: int, last: int, marked: Tail | None) -> None:
        """The usual case: what the template prints with the turn begins with the prompt."""
        draft.rest = whole[len(draft.prompt) :]
        self.prove(whole, draft.rest, first, last)
        header = self.template.unasked_header
        if header and draft.rest.startswith(header):  # the template has no way to ask
            draft.prompt, draft.rest = draft.prompt + header, draft.rest[len(header) :]
            draft.kinds.append("no request")
        form = self.template.thought
        opened = form.opened(draft.prompt)
        if opened and marked is not None and form.open not in marked.opening and not self.thought_of(first):
            # The template prints no tag here, so the one behind the header is the beginning of the row's text.
            draft.rest = form.closed(opened) + opened + draft.rest

    def leave_prompt(self, draft: _Draft, whole: str, first: int, last: int, marked: Tail | None) -> None:
        """The other case: behind the header that both have, the prompt goes on in its own way (its surplus)."""
        shown, asked = self.real_tail(whole, first, last), self.asked_tail(first, last)
        if marked is None or asked is None or not marked.after == asked.after == shown.after:
            raise self.uncertain(first)
        if not draft.prompt.endswith(asked.text):
            raise self.uncertain(first)
        # A content may make the template print another opening than it does for a mark (Nemotron looks for tags in it).
        as_marked = shown.text.startswith(marked.opening)
        form, thought = self.template.thought, self.thought_of(first)
        shows_thought = self.marks[first][THINKING] in marked.marks if as_marked else thought.strip() in shown.text
        shows_thought = shows_thought and bool(thought)
        header = self.template.shared_start(asked.text, marked.opening if as_marked else shown.text)
        prompt_opens = form.opened(asked.text)
        if not shows_thought and not (as_marked and form.empty):
            # A tag that the content begins with is not the one that the prompt opens.
            header = min(header, len(asked.text) - len(prompt_opens))
        surplus, draft.rest = asked.text[header:], shown.text[header:]
        if surplus:  # the whole text may print a header where the prompt has none
            draft.rest = draft.rest.removeprefix(self.template.request)
        own_tag = form.open in str(self.messages[first].get("content") or "") and not shows_thought
        both_open = prompt_opens and as_marked and marked.opening.endswith(prompt_opens) and not own_tag
        if both_open and surplus.endswith(prompt_opens):
            surplus, draft.rest = "", draft.rest.removeprefix(prompt_opens)
        if shows_thought and form.closes(surplus):
            draft.closed = True
            return
        opened = form.opened(surplus)
        if opened and thought and not shows_thought:
            draft.kept = True
            draft.kinds.append("thought kept")
            draft.rest = self.kept_thought(first, opened, draft.rest)
        elif not thought and (opened or (prompt_opens and not surplus.strip())):
            draft.kinds.append("thought closed")
            if opened and not draft.rest.lstrip().startswith(form.close):
                draft.rest = form.closed(opened) + draft.rest
        else:
            draft.kinds.append("context differs")
            return
        calls = self.messages[first].get("tool_calls")
        if not calls and not self.reads_back(first, last, prompt_opens, draft.rest, marked):
            draft.kinds.append("not read back")

    def kept_thought(self, index: int, opened: str, rest: str) -> str:
        """Thought, closing and text: as the row spells them where its content holds the tags."""
        form = self.template.thought
        content = str(self.messages[index].get("content") or "")
        if self.given_thought(index) or form.close not in content:
            return self.thought_of(index).strip("\n") + form.closing + rest
        spelled, _, text = content.rpartition(form.close)
        inner = spelled.partition(form.open)[2] if form.open in spelled else spelled
        inner = inner.removeprefix(opened.partition(form.open)[2])  # the blanks that the prompt has printed
        blanks = text[: len(text) - len(text.lstrip())]
        return inner + form.close + blanks + rest.lstrip()

    def reads_back(self, first: int, last: int, opened: str, rest: str, marked: Tail) -> bool:
        """Whether the template, given what the prompt opened and the generated text as content, prints a following
        question's context as it prints the row's. Blanks do not count.
        """
        if self.template.thought.close in self.thought_of(first):
            return False  # a reader takes the first closing tag for the end of the thought
        generated = self.up_to_end(rest, first, last, marked).removesuffix(self.ending(marked))
        said = {"role": "assistant", "content": opened + generated}
        follower = {"role": "user", "content": USER}
        row = self.template.attempt([*self.messages[: last + 1], follower], self.tools)
        read = self.template.attempt([*self.messages[:first], said, follower], self.tools)
        return bool(row) and "".join(row.split()) == "".join(read.split())

    def without_thought(self, first: int, last: int) -> AskedTurn:
        """The turn's text alone, where the prompt has closed the thought that the row has."""
        message = {key: value for key, value in self.messages[first].items() if key not in THINKING_KEYS}
        message["content"] = str(message.get("content") or "").rpartition(self.template.thought.close)[2]
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
        text, start, end = located.text, spans[0][0], spans[-1][1]
        marked, target = self.marked_tail(first, last), text[start:end]
        own = list(turn_damage.of_turn(self, first, last, marked, target, kept=False))
        contents = [str(message.get("content") or "").strip() for message in self.messages[first : last + 1]]
        if not own and any(content not in target for content in contents):
            raise self.uncertain(first)
        damage = (*(damage for damage in located.damage if damage.index < first), *own)
        kinds = ("unasked", "joined") if last > first else ("unasked",)
        return AskedTurn(last, text[:start], target, text[end:], kinds, damage)

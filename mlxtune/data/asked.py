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

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mlxtune.data import turns
from mlxtune.data.conversation import Conversation
from mlxtune.data.marks import CALLS, CONTENT, THINKING, thinking_parts
from mlxtune.data.template import MARKS, THINKING_KEYS, USER, Messages, Template, TemplateError
from mlxtune.data.turns import Damage, up_to_end_token

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


@dataclass(frozen=True)
class _Own:
    """A turn's part of a marked rendering: what follows the last mark of its context."""

    after: str  # that last mark; "" where the turn is the first text
    tail: str  # everything behind it
    opening: str  # of the tail, the template text before the turn's first mark
    closing: str  # of the tail, the template text behind the turn's last mark
    marks: frozenset[str]  # the turn's own marks that are printed


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
        if (only_last and wanted) or len(wanted) == last - first + 1:
            out.append(row.turn(first, last))
        elif wanted:
            left.append(("joined, untrained", last))
    return out, left


class _Row(Conversation):
    def groups(self) -> Iterator[tuple[int, int]]:
        """(first, last) message of each assistant turn: answers in a row that are printed as one turn are one."""
        index, count = 0, len(self.messages)
        while index < count:
            if self.messages[index]["role"] != "assistant":
                index += 1
                continue
            last = index
            while last + 1 < count and self.messages[last + 1]["role"] == "assistant" and self.joins(last):
                last += 1
            yield index, last
            index = last + 1

    def joins(self, index: int) -> bool:
        """Whether the template prints an answer and the one after it as one turn: no end token stands between them."""
        shown = self.marked_whole(index + 2)
        places = [shown.rfind(mark) for mark in self.marks[index]]
        following = [place for mark in self.marks[index + 1] if (place := shown.find(mark)) >= 0]
        if max(places) < 0 or not following or not self.template.stops:
            return False
        between = shown[max(places) + 1 : min(following)]
        return not self.template.special.search(between)

    def turn(self, first: int, last: int) -> AskedTurn:
        """The turn of the messages `first` to `last`, asked for before the first. Raises TemplateError."""
        try:
            prompt, whole = self.asked(first), self.whole(last + 1)
        except TemplateError:
            return self.unasked(first, last)
        own, asked = self.own(self.marked_whole(last + 1), first, last), self.own(self.marked_asked(first), first, last)
        kinds: list[str] = ["joined"] if last > first else []
        form = self.template.thought
        if whole.startswith(prompt):
            rest = whole[len(prompt) :]
            self.prove(whole, rest, first, last)
            prompt, rest = self.with_header(prompt, rest, kinds)
            opened = form.opened(prompt)
            if opened and not self.thought_of(first) and own is not None and form.open not in own.opening:
                rest = form.closed(opened) + opened + rest  # the tag behind the header is the content's own
            thought: str | None = None
        else:
            found = self.apart(prompt, whole, first, last, own, asked, kinds)
            if found is None:
                return self.without_thought(first, last)
            rest, thought = found
        target = self.up_to_end(rest, first, last, own)
        trailing = rest[len(target) :] if thought is None else ""
        header = self.template.header_that_ends(bool(self.messages[last].get("tool_calls")))
        if header:
            target, trailing = target + header, ""
            kinds.append("stop added")
        damage = (*self.lost_context(first), *self.lost_own(first, last, own, target, thought is not None))
        if form.opened(prompt) and not self.thought_of(first) and "thought closed" not in kinds:
            kinds.append("thought closed")
        return AskedTurn(last, prompt, target, trailing, tuple(kinds), damage)

    # Where a turn's text is.

    def own(self, marked: str, first: int, last: int) -> _Own | None:
        """A turn's part of a marked rendering; None where the template refuses marks."""
        if not marked:
            return None
        mine = set("".join(self.marks[first : last + 1]))
        # A real text may hold private-use characters too; they are none of this conversation's marks.
        found = [match for match in MARKS.finditer(marked) if match.group() in self.owner]
        others = [match for match in found if match.group() not in mine]
        start = others[-1].end() if others else 0
        own = [match for match in found if match.group() in mine and match.start() >= start]
        return _Own(
            others[-1].group() if others else "",
            marked[start:],
            marked[start : own[0].start()] if own else marked[start:],
            marked[own[-1].end() :] if own else "",
            frozenset(match.group() for match in own),
        )

    def prove(self, whole: str, rest: str, first: int, last: int) -> None:
        """Raise TemplateError unless no text of the context can be in the last `len(rest)` characters of `whole`."""
        asked, marked = self.marked_asked(first), self.marked_whole(last + 1)
        if asked and marked.startswith(asked) and self.fits(rest, marked[len(asked) :], first):
            return
        if len(self.tail(whole, first, last).tail) < len(rest):
            raise self.uncertain(first)

    def tail(self, whole: str, first: int, last: int) -> _Own:
        """The end of `whole` that no text of the context can be in, shown by a rendering in which the context is but
        marks and the turn is as it is. Raises TemplateError when that rendering does not end as `whole` does.
        """
        own = self.own(self.real_after(first, last + 1), first, last)
        if own is None or not whole.endswith(own.tail):
            raise self.uncertain(first)
        return own

    def fits(self, rest: str, marked: str, first: int) -> bool:
        """Whether `rest` is the marked text with the turn's own texts in place of their marks, nothing else."""
        literals, marks = MARKS.split(marked), MARKS.findall(marked)
        at = 0
        for place, mark in enumerate(marks):
            text = self.text_of(mark) if self.owner[mark][0] >= first else None
            if text is None or not rest.startswith(literals[place], at):
                return False
            at += len(literals[place])
            for shown in (text, text.strip(), text.lstrip(), text.rstrip()):
                if rest.startswith(shown, at) and rest.startswith(literals[place + 1], at + len(shown)):
                    at += len(shown)
                    break
            else:
                return False
        return rest[at:] == literals[-1]

    def with_header(self, prompt: str, rest: str, kinds: list[str]) -> tuple[str, str]:
        """(prompt, rest) where the template may have no way to ask: a header that it prints before a turn stays prompt,
        unless it is but blanks, which the model produces.
        """
        header = self.template.unasked_header
        if header and rest.startswith(header):
            kinds.append("no request")
            return prompt + header, rest[len(header) :]
        return prompt, rest

    def apart(
        self,
        prompt: str,
        whole: str,
        first: int,
        last: int,
        own: _Own | None,
        asked: _Own | None,
        kinds: list[str],
    ) -> tuple[str, str | None] | None:
        """(what the model must produce, template text behind it included; the thought that the template drops, if any)
        where `whole` does not begin with `prompt`. None: the prompt has closed the thought, and the row has one.
        """
        shown = self.tail(whole, first, last)
        if own is None or asked is None or not own.after == asked.after == shown.after:
            raise self.uncertain(first)
        if not prompt.endswith(asked.tail):
            raise self.uncertain(first)
        # A content may make the template print another opening than it does for a mark (Nemotron looks for tags in it).
        as_marked = shown.tail.startswith(own.opening)
        message, form = self.messages[first], self.template.thought
        thought = self.thought_of(first)
        header = self.template.shared_start(asked.tail, own.opening if as_marked else shown.tail)
        shows_thought = self.marks[first][THINKING] in own.marks if as_marked else thought.strip() in shown.tail
        if not (thought and shows_thought) and not (as_marked and form.empty):
            # A tag that the content begins with is not the one that the prompt opens.
            header = min(header, len(asked.tail) - len(form.opened(asked.tail)))
        surplus, rest = asked.tail[header:], shown.tail[header:]
        if surplus:  # the prompt ends otherwise than the whole text, which may print a header here
            rest = rest.removeprefix(self.template.request)
        if surplus and as_marked and own.opening.endswith(surplus) and rest.startswith(surplus):
            surplus, rest = "", rest[len(surplus) :]  # both open the thought, but for what stands before it
        if thought and shows_thought and form.closes(surplus):
            return None
        opened = form.opened(surplus)
        if opened and thought and not shows_thought:
            kinds.append("thought kept")
            rest = self.kept_thought(message, thought, opened, rest)
        elif opened and not thought:
            kinds.append("thought closed")
            if not rest.lstrip().startswith(form.close):
                rest = form.closed(opened) + rest
        elif not surplus.strip() and not thought and form.opened(asked.tail):
            kinds.append("thought closed")  # the template prints another blank behind the opening tag (Nemotron)
        else:
            kinds.append("context differs")
            return rest, None
        if not message.get("tool_calls") and not self.reads_back(first, last, form.opened(asked.tail), rest, own):
            kinds.append("not read back")
        return rest, thought if "thought kept" in kinds else None

    def kept_thought(self, message: dict[str, Any], thought: str, opened: str, rest: str) -> str:
        """Thought, closing and text: as the row spells them where its content holds the tags."""
        form = self.template.thought
        content = str(message.get("content") or "")
        if form.close not in content or any(str(message.get(key) or "").strip() for key in THINKING_KEYS):
            return thought.strip("\n") + form.closing + rest
        spelled, _, text = content.rpartition(form.close)
        inner = spelled.partition(form.open)[2] if form.open in spelled else spelled
        inner = inner.removeprefix(opened.partition(form.open)[2])  # the blanks that the prompt has printed
        blanks = text[: len(text) - len(text.lstrip())]
        return inner + form.close + blanks + rest.lstrip()

    def reads_back(self, first: int, last: int, opened: str, rest: str, own: _Own) -> bool:
        """Whether the template, given what the prompt opened and the generated text as content, prints a following
        question's context as it prints the row's. Blanks do not count.
        """
        if self.template.thought.close in self.thought_of(first):
            return False  # a reader takes the first closing tag for the end of the thought
        text = opened + self.up_to_end(rest, first, last, own).removesuffix(self.ending(own))
        said = {"role": "assistant", "content": text}
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
        start, end = spans[0][0], spans[-1][1]
        damage = tuple(damage for damage in located.damage if damage.index <= last)
        text = located.text
        return AskedTurn(last, text[:start], text[start:end], text[end:], ("unasked",), damage)

    # Where a turn ends.

    def ending(self, own: _Own) -> str:
        """The template text behind a turn's last text up to and with its end token."""
        return own.closing[: up_to_end_token(self.template, own.closing, own.closing)]

    def up_to_end(self, rest: str, first: int, last: int, own: _Own | None) -> str:
        """`rest` without what the template prints behind the end token."""
        for marked in (own, self.own(self.marked_after(first, last + 1), first, last)):
            if marked is None:
                continue
            closing = marked.closing
            if not marked.marks:  # nothing of the turn is printed: its end token may still be
                closing = rest if self.template.special.search(rest) else ""
            end = up_to_end_token(self.template, closing, closing)
            behind = closing[end:]
            target = rest.removesuffix(behind)
            if rest.endswith(behind) and target.endswith(_last_token(self.template, closing[:end])):
                return target
        raise self.uncertain(first)

    # What is lost.

    def lost_context(self, first: int) -> Iterator[Damage]:
        """Texts of system, user and tool messages, and tools, that the prompt does not show."""
        marked = self.marked_asked(first)
        shown = set(MARKS.findall(marked))
        for index, message in enumerate(self.messages[:first]):
            content = str(message.get("content") or "").strip()
            if message["role"] == "assistant" or not content:
                continue
            if self.marks[index][CONTENT] not in shown and (marked or content not in self.asked(first)):
                kind = "system" if message["role"] in ("system", "developer") else "content"
                yield Damage(kind, index, f"the template drops the text of message {index + 1} ({message['role']})")
        if self.tools and marked and marked == Conversation(self.template, self.messages).marked_asked(first):
            yield Damage("tools", 0, "the template does not print the tools")

    def lost_own(self, first: int, last: int, own: _Own | None, target: str, kept: bool) -> Iterator[Damage]:
        """What of the turn itself is not in its target."""
        for index in range(first, last + 1):
            message, name = self.messages[index], f"message {index + 1}"
            shown = {kind for kind, mark in enumerate(self.marks[index]) if own is None or mark in own.marks}
            content = str(message.get("content") or "").strip()
            if content and content not in target:
                parts = [(part, kind) for part, kind in thinking_parts(content) if kind is not None]
                missing = {kind for part, kind in parts if part not in target}
                if len(parts) == 1 and missing:
                    yield Damage("content", index, f"the template drops the text of {name} (assistant)")
                elif CONTENT in missing:
                    yield Damage("content", index, f"the template strips some text of {name}")
                elif THINKING in missing:
                    yield Damage("thinking", index, f"the template strips thinking of {name}")
            calls = len(message.get("tool_calls") or ())
            lost = calls - sum(kind >= CALLS for kind in shown)
            if lost:
                which = "the tool calls" if lost == calls else f"{lost} of {calls} tool calls"
                yield Damage("calls", index, f"the template drops {which} of {name}")
            thought = next((str(message[key]).strip() for key in THINKING_KEYS if message.get(key)), "")
            if thought and (thought not in target or (THINKING not in shown and not kept)):
                yield Damage("thinking", index, f"the template drops the thinking of {name}")

    def thought_of(self, index: int) -> str:
        """The thought of a message: under a key of its own, or between tags in its content; "" for none."""
        message = self.messages[index]
        given = next((str(message[key]) for key in THINKING_KEYS if message.get(key)), "")
        if given or self.template.thought.close != "</think>":
            return given
        parts = thinking_parts(str(message.get("content") or ""))
        return next((part for part, kind in parts if kind == THINKING), "")

    def uncertain(self, index: int) -> TemplateError:
        return TemplateError(f"the chat template prints message {index + 1} so that its place is not certain")


def _last_token(template: Template, text: str) -> str:
    """The special token that a text ends with; "" for none."""
    found = list(template.special.finditer(text))
    return found[-1].group() if found and found[-1].end() == len(text) else ""

"""What stands behind the prompt that asks for a turn: the beginning of its target.

`asked` is what the template prints for the messages before the turn and to ask for it, `whole` what it prints for the
messages up to and with the turn. Nearly always `whole` begins with `asked`, and its rest is the continuation (Qwen3,
whose template prints an empty thought in the last turn):

    asked   ...<|im_start|>assistant\\n
    whole   ...<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\nHello<|im_end|>\\n
    rest                              <think>\\n\\n</think>\\n\\nHello<|im_end|>\\n

Else the turn *departs* from its prompt. Then the turn's own text is found by place: in a rendering in which the context
is but marks, what follows the last mark is the turn's. For example (DeepSeek-R1, whose prompt opens a thought that its
template never prints; its tokens abbreviated):

    asked   <User>Hi<Assistant><think>\\n
    whole   <User>Hi<Assistant>Hello<end>
    rest                                \\n</think>\\n\\nHello<end>

The *opening* is the template text between the context's last mark and the turn's first: `<Assistant>` in `whole`, and
`<Assistant><think>\\n` in `asked`. What both begin with is the *header*; what `asked` has beyond it (here the opened
thought) is its *surplus*.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxtune.data.chat.marks import THINKING
from mlxtune.data.chat.turn_places import Tail, TurnPlaces
from mlxtune.data.template.probes import USER


@dataclass
class Continuation:
    """A turn behind its prompt."""

    prompt: str  # what the template prints to ask for the turn
    rest: str  # what must be produced behind the prompt, and what the template prints behind that
    kinds: list[str] = field(default_factory=list)  # remarks on the turn: keys of asked.KINDS
    keeps_thought: bool = False  # `rest` holds a thought that the template drops
    prompt_shuts_thought: bool = False  # the prompt has closed the thought that the message has: nothing fits behind it


def continuation(row: TurnPlaces, prompt: str, whole: str, first: int, last: int, marked: Tail | None) -> Continuation:
    """The turn of the messages `first` to `last` behind its prompt.

    whole: what the template prints up to and with them; marked: the turn where every text is a mark, None where the
    template refuses marks. Raises TemplateError when the turn's place is not certain.
    """
    if whole.startswith(prompt):
        return _continued(row, prompt, whole, first, last, marked)
    return _departed(row, prompt, whole, first, last, marked)


def _continued(row: TurnPlaces, prompt: str, whole: str, first: int, last: int, marked: Tail | None) -> Continuation:
    """The usual case: what the template prints with the turn begins with the prompt."""
    out = Continuation(prompt, whole[len(prompt) :])
    row.prove(whole, out.rest, first, last)
    header = row.template.unasked_header
    if header and out.rest.startswith(header):  # the template has no way to ask
        out.prompt += header
        out.rest = out.rest[len(header) :]
        out.kinds.append("no request")
    form = row.template.thought
    prompt_opens = form.opened(out.prompt)
    if prompt_opens and marked is not None and form.open not in marked.opening and not row.thought_of(first):
        # The template prints no tag here, so the one behind the header is the beginning of the row's text.
        out.rest = form.closed(prompt_opens) + prompt_opens + out.rest
    return out


@dataclass(frozen=True)
class _Parting:
    """Where a turn and its prompt part, behind the last text of their context."""

    shows_thought: bool  # the message has a thought, and the template prints it
    prompt_opens: str  # what the prompt's end has printed of a thought that it opens; "" for none
    surplus: str  # what the prompt has beyond the header that both begin with
    rest: str  # what the turn has beyond it


def _departed(row: TurnPlaces, prompt: str, whole: str, first: int, last: int, marked: Tail | None) -> Continuation:
    """The other case: behind the header that both have, the prompt goes on in its own way."""
    shown, asked = row.real_tail(whole, first, last), row.asked_tail(first, last)
    if marked is None or asked is None or not marked.after == asked.after == shown.after:
        raise row.uncertain(first)
    if not prompt.endswith(asked.text):
        raise row.uncertain(first)
    parting = _parting(row, first, asked, shown, marked)
    if parting.shows_thought and row.template.thought.closes(parting.surplus):
        return Continuation(prompt, parting.rest, prompt_shuts_thought=True)
    out = _behind_surplus(row, first, prompt, parting)
    if "context differs" in out.kinds:  # no thought was put in or closed: the template prints the row's own
        return out
    has_calls = row.messages[first].get("tool_calls")
    if not has_calls and not _reads_back(row, first, last, parting.prompt_opens, out.rest, marked):
        out.kinds.append("not read back")
    return out


def _behind_surplus(row: TurnPlaces, first: int, prompt: str, parting: _Parting) -> Continuation:
    """The turn behind what the prompt has beyond it: a thought that the prompt opens goes on, or is closed at once."""
    form, thought = row.template.thought, row.thought_of(first)
    surplus_opens = form.opened(parting.surplus)
    only_opens = bool(parting.prompt_opens) and not parting.surplus.strip()
    if surplus_opens and thought and not parting.shows_thought:
        rest = _kept_thought(row, first, surplus_opens, parting.rest)
        return Continuation(prompt, rest, ["thought kept"], keeps_thought=True)
    if not thought and (surplus_opens or only_opens):
        rest = parting.rest
        if surplus_opens and not rest.lstrip().startswith(form.close):
            rest = form.closed(surplus_opens) + rest
        return Continuation(prompt, rest, ["thought closed"])
    return Continuation(prompt, parting.rest, ["context differs"])


def _parting(row: TurnPlaces, first: int, asked: Tail, shown: Tail, marked: Tail) -> _Parting:
    """Compare what the prompt and the turn have behind the last text of the context.

    asked, shown: of the prompt, and of the turn as it is; marked: the turn where every text is a mark.
    """
    form, thought = row.template.thought, row.thought_of(first)
    # A content may make the template print another opening than it does for a mark (Nemotron looks for tags in it).
    as_marked = shown.text.startswith(marked.opening)
    if as_marked:
        prints_thought = row.marks[first][THINKING] in marked.marks
        beginning = marked.opening
    else:
        prints_thought = thought.strip() in shown.text
        beginning = shown.text
    shows_thought = prints_thought and bool(thought)
    header_end = row.template.shared_start(asked.text, beginning)
    prompt_opens = form.opened(asked.text)
    if not shows_thought and not (as_marked and form.empty):
        # A tag that the content begins with is not the one that the prompt opens.
        header_end = min(header_end, len(asked.text) - len(prompt_opens))
    surplus, rest = asked.text[header_end:], shown.text[header_end:]
    if surplus:  # the whole text may print a header where the prompt has none
        rest = rest.removeprefix(row.template.request)
    tag_is_content = form.open in str(row.messages[first].get("content") or "") and not shows_thought
    both_open = as_marked and marked.opening.endswith(prompt_opens) and not tag_is_content
    if prompt_opens and both_open and surplus.endswith(prompt_opens):
        surplus = ""
        rest = rest.removeprefix(prompt_opens)
    return _Parting(shows_thought, prompt_opens, surplus, rest)


def _kept_thought(row: TurnPlaces, index: int, opened: str, rest: str) -> str:
    """Thought, closing and text: as the row spells them where its content holds the tags.

    opened: what the prompt has printed of the thought; rest: the text.
    """
    form = row.template.thought
    content = str(row.messages[index].get("content") or "")
    if row.given_thought(index) or form.close not in content:
        return row.thought_of(index).strip("\n") + form.closing + rest
    before_closing, _, text = content.rpartition(form.close)
    thought = before_closing
    if form.open in before_closing:
        thought = before_closing.partition(form.open)[2]
    printed_blanks = opened.partition(form.open)[2]
    blanks_before_text = text[: len(text) - len(text.lstrip())]
    return thought.removeprefix(printed_blanks) + form.close + blanks_before_text + rest.lstrip()


def _reads_back(row: TurnPlaces, first: int, last: int, opened: str, rest: str, marked: Tail) -> bool:
    """Whether the template, given what the prompt opened and the generated text as content, prints a following
    question's context as it prints the row's. Blanks do not count.
    """
    if row.template.thought.close in row.thought_of(first):
        return False  # a reader takes the first closing tag for the end of the thought
    generated = row.up_to_end(rest, first, last, marked).removesuffix(row.ending(marked))
    answer = {"role": "assistant", "content": opened + generated}
    question = {"role": "user", "content": USER}
    of_row = row.attempt([*row.messages[: last + 1], question])
    of_answer = row.attempt([*row.messages[:first], answer, question])
    return bool(of_row) and "".join(of_row.split()) == "".join(of_answer.split())

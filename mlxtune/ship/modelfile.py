"""Ollama's Modelfile beside a GGUF export (docs.ollama.com/modelfile): base, adapter, template, system prompt, stops.

Ollama does not run chat templates of Hugging Face's kind; its own are Go templates. One is derived from what the
model's template really writes around each message, and kept only if it writes the very same text.
"""

from __future__ import annotations

import re
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

from mlxtune_convert.gguf.tokenizer_write import end_ids

from mlxtune.data.template.tokenizer_changes import tokenizer_of
from mlxtune.errors import UserError
from mlxtune.ship.request import Request

FILE = "Modelfile"
QUOTE = '"""'  # around a text of several lines; Ollama knows no way to write it inside of one
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Contents that no template changes and no text holds: private-use characters.
SYSTEM, USER, ANSWER, SECOND = "\ue000s\ue000", "\ue000u\ue000", "\ue000a\ue000", "\ue000v\ue000"

Messages = list[tuple[str, str]]  # (role, content)
CONVERSATION: Messages = [("user", USER), ("assistant", ANSWER), ("user", SECOND)]


class TurnText(NamedTuple):
    """The text that a chat template writes around messages."""

    system: tuple[str, str]  # (before, after) a system prompt
    user: tuple[str, str]  # (before, after) a user's message; what asks for an answer belongs to `after`
    assistant: tuple[str, str]  # (before, after) an answer
    default: str  # the system prompt that the template puts where none is given; "": none

    def around(self, role: str) -> tuple[str, str]:
        """(before, after) of a role."""
        return {"system": self.system, "user": self.user, "assistant": self.assistant}[role]

    def text(self, messages: Messages) -> str:
        """A conversation, as the template writes it."""
        out = ""
        for role, content in messages:
            before, after = self.around(role)
            out += before + content + after
        return out

    def go(self) -> str:
        """As a Go template over Ollama's .Messages."""
        branches = []
        for role in ("system", "user", "assistant"):
            # {{ begins an instruction in Go, so as text it is printed by one.
            before, after = (part.replace("{{", '{{ "{{" }}') for part in self.around(role))
            branches.append(f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ ')
        return "{{ range .Messages }}{{ " + "else ".join(branches) + "end }}{{ end }}"


def turns(tokenizer: Any) -> TurnText | None:
    """What a tokenizer's chat template writes around messages; None when no fixed text per role does.

    Two conversations of marks are rendered, and cut at the marks. ChatML with a system prompt of its own:

        user, assistant, user   <|im_start|>system\\nBe kind.<|im_end|>\\n<|im_start|>user\\nU<|im_end|>\\n
                                <|im_start|>assistant\\nA<|im_end|>\\n<|im_start|>user\\nV<|im_end|>\\n
                                <|im_start|>assistant\\n
        system, user            <|im_start|>system\\nS<|im_end|>\\n<|im_start|>user\\nU<|im_end|>\\n
                                <|im_start|>assistant\\n

    What stands before every user's message is the common end of what stands before U, V, and U after S:
    `<|im_start|>user\\n`, without the end token of the answer before it. What is left before the first U, if no system
    prompt was given, is the template's own one. The result is kept only if it writes both conversations itself.
    """
    plain = _rendered(tokenizer, CONVERSATION, (USER, ANSWER, SECOND))
    if plain is None:
        return None
    before_user, _, after_answer, end = plain
    with_system = _rendered(tokenizer, [("system", SYSTEM), ("user", USER)], (SYSTEM, USER))
    if with_system is None:  # templates refuse system prompts in their own ways
        before_system, after_system = "", before_user
    else:
        before_system, after_system, _ = with_system

    user = _common_end([before_user, after_answer, after_system])
    # An answer's end token belongs to the answer, though a user's turn always follows it.
    _, ending, rest = user.partition(tokenizer.eos_token or "\0")
    if ending:
        user = rest.lstrip()
    after_system = after_system.removesuffix(user)
    default = _own_system_prompt(before_user.removesuffix(user), before_system, after_system)
    found = TurnText((before_system, after_system), (user, end), ("", after_answer.removesuffix(user)), default)

    head: Messages = [("system", default)] if default else []
    for messages in (CONVERSATION, CONVERSATION[:1]):
        if found.text(head + messages) != _text(tokenizer, messages):
            return None
    return found


def _text(tokenizer: Any, messages: Messages) -> str | None:
    """A conversation that asks for an answer, as llama.cpp is to be given it; None when the template refuses it."""
    listed = [{"role": role, "content": content} for role, content in messages]
    try:
        text: str = tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=True)
        start = tokenizer.bos_token or ""
        added_by_itself = bool(start) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    except Exception:  # a template may raise anything for a conversation it does not like
        return None
    # llama.cpp puts the first token there itself.
    return text.removeprefix(start) if added_by_itself else text


def _rendered(tokenizer: Any, messages: Messages, marks: tuple[str, ...]) -> list[str] | None:
    """The text of a conversation, cut at `marks`: one piece more than there are marks. None when the template refuses
    it, or leaves one of them out.
    """
    text = _text(tokenizer, messages)
    if text is None:
        return None
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found:
            return None
        pieces.append(piece)
    return [*pieces, text]


def _common_end(texts: list[str]) -> str:
    """The longest text with which all of them end."""
    return commonprefix([text[::-1] for text in texts])[::-1]  # noqa: RUF071


def _own_system_prompt(start: str, before: str, after: str) -> str:
    """The system prompt that stands in `start`, what a conversation without one begins with; "" where none does.
    before, after: what the template writes around a system prompt.
    """
    if before and start.startswith(before) and start.endswith(after):
        return start[len(before) : len(start) - len(after)]
    return ""


def _quotable(text: str) -> bool:
    """Whether Ollama reads a text between two QUOTEs as it is: nothing of it ends the quotation, which would make the
    rest instructions. A quote sign at an end would be taken for a part of QUOTE.
    """
    return QUOTE not in text and not text.startswith('"') and not text.endswith('"') and not CONTROL.search(text)


def check_name(name: str) -> None:
    """Raise UserError for a file name that cannot stand in a Modelfile."""
    if "\n" in name or CONTROL.search(name) or name != name.strip():
        raise UserError(
            f"--ollama: {name!r} cannot stand in a Modelfile (line breaks, control characters or spaces at an end)",
            "Choose another name for --out.",
        )


def write(request: Request, work: Path, model: str, adapter: bool) -> list[str]:
    """Write the Modelfile; return lines a person must read. model: the GGUF's name in `work`; adapter: whether that is
    an adapter. Raises UserError for a name that cannot stand in it.
    """
    folder = request.base or request.model
    tokenizer = tokenizer_of(folder, request.adapter)
    name = request.out.name if request.out.suffix == Path(model).suffix else model
    check_name(name)
    lines = [f"FROM ./{name}"]
    notes: list[str] = []
    if adapter:
        lines = ["# The base as a GGUF file, or its name in Ollama.", "FROM ./base.gguf", f"ADAPTER ./{name}"]
        notes.append(
            "put the base's GGUF file after FROM in the Modelfile (mlxtune export --to gguf without --adapter)"
        )
    for part_lines, part_notes in (_template(tokenizer), _stops(tokenizer, folder)):
        lines += part_lines
        notes += part_notes
    (work / FILE).write_text("\n".join([*lines, ""]), encoding="utf-8")
    return notes


def _template(tokenizer: Any) -> tuple[list[str], list[str]]:
    """(Instructions for the template and the system prompt, notes on what cannot be written)."""
    around = turns(tokenizer) if tokenizer.chat_template else None
    if around is None:
        return [], ["this chat template is not fixed text around messages: Ollama will look for a template itself"]
    if not (_quotable(around.go()) and _quotable(around.default)):
        return [], [
            f"the chat template holds {QUOTE} or control characters, which a Modelfile cannot: TEMPLATE and SYSTEM "
            "are left out, and Ollama will look for a template itself"
        ]
    lines = [f"TEMPLATE {QUOTE}{around.go()}{QUOTE}"]
    if around.default:
        lines.append(f"SYSTEM {QUOTE}{around.default}{QUOTE}")
    return lines, []


def _stops(tokenizer: Any, folder: Path) -> tuple[list[str], list[str]]:
    """(Instructions for the tokens at which an answer ends, notes on those that cannot be written)."""
    ends = [tokenizer.eos_token_id, *end_ids(folder)]
    ids = dict.fromkeys(index for index in ends if index is not None)
    lines, notes = [], []
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        if '"' in token or "\n" in token or CONTROL.search(token):
            notes.append(f"the end token {token!r} cannot be written into a Modelfile: Ollama may not stop at it")
        else:
            lines.append(f'PARAMETER stop "{token}"')
    return lines, notes

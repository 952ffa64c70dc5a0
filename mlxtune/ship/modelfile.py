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
SYSTEM, USER, ANSWER, SECOND = "\ue000s\ue000", "\ue000u\ue000", "\ue000a\ue000", "\ue000v\ue000"


class Turns(NamedTuple):
    """The text around messages: (before, after) of each role; `default` is the system prompt that is put where none is
    given.
    """

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    default: str

    def text(self, messages: list[tuple[str, str]]) -> str:
        return "".join(getattr(self, role)[0] + content + getattr(self, role)[1] for role, content in messages)

    def go(self) -> str:
        """As a Go template over Ollama's .Messages."""
        branches = []
        for role in self._fields[:3]:
            before, after = (part.replace("{{", '{{ "{{" }}') for part in getattr(self, role))
            branches.append(f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ ')
        return "{{ range .Messages }}{{ " + "else ".join(branches) + "end }}{{ end }}"


def turns(tokenizer: Any) -> Turns | None:
    """What a tokenizer's chat template writes around messages; None when no fixed text per role does."""

    def render(*messages: tuple[str, str]) -> str:
        listed = [{"role": role, "content": content} for role, content in messages]
        out: str = tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=True)
        # llama.cpp puts the first token there itself.
        start = tokenizer.bos_token or ""
        added = bool(start) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        return out.removeprefix(start) if added else out

    def between(text: str, *marks: str) -> list[str]:
        parts = []
        for mark in marks:
            part, found, text = text.partition(mark)
            if not found:
                raise ValueError(mark)
            parts.append(part)
        return [*parts, text]

    long = (("user", USER), ("assistant", ANSWER), ("user", SECOND))
    try:
        first, _, after_answer, end = between(render(*long), USER, ANSWER, SECOND)
        try:
            before_system, after_system, _ = between(render(("system", SYSTEM), ("user", USER)), SYSTEM, USER)
        except Exception:  # templates refuse system prompts in their own ways
            before_system, after_system = "", first
        user = commonprefix([text[::-1] for text in (first, after_answer, after_system)])[::-1]  # noqa: RUF071
        # An answer's end token belongs to the answer, though a user's turn always follows it.
        ending = user.find(tokenizer.eos_token or "\0")
        if ending >= 0:
            user = user[ending + len(tokenizer.eos_token) :].lstrip()
        start, after_system = first.removesuffix(user), after_system.removesuffix(user)
        # The template's own system prompt: what it begins with when none is given.
        given = bool(before_system) and start.startswith(before_system) and start.endswith(after_system)
        default = start[len(before_system) : len(start) - len(after_system)] if given else ""
    except Exception:  # a template may raise anything for a conversation it does not like
        return None
    found = Turns(
        (before_system, after_system),
        (user, end),
        ("", after_answer.removesuffix(user)),
        default,
    )
    head = [("system", default)] if default else []
    for messages in (long, (("user", USER),)):
        if found.text([*head, *messages]) != render(*messages):
            return None
    return found


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
    """Write the Modelfile; return lines a person must read. model: the GGUF's name in `work`. Raises UserError for a
    name that cannot stand in it.
    """
    source = request.base or request.model
    tokenizer = tokenizer_of(source, request.adapter)
    name = request.out.name if request.out.suffix == Path(model).suffix else model
    check_name(name)
    notes = []
    lines = [f"FROM ./{name}"]
    if adapter:
        lines = ["# The base as a GGUF file, or its name in Ollama.", "FROM ./base.gguf", f"ADAPTER ./{name}"]
        notes.append(
            "put the base's GGUF file after FROM in the Modelfile (mlxtune export --to gguf without --adapter)"
        )
    around = turns(tokenizer) if tokenizer.chat_template else None
    if around is None:
        notes.append("this chat template is not fixed text around messages: Ollama will look for a template itself")
    elif not (_quotable(around.go()) and _quotable(around.default)):
        notes.append(
            f"the chat template holds {QUOTE} or control characters, which a Modelfile cannot: TEMPLATE and SYSTEM "
            "are left out, and Ollama will look for a template itself"
        )
    else:
        lines.append(f"TEMPLATE {QUOTE}{around.go()}{QUOTE}")
        if around.default:
            lines.append(f"SYSTEM {QUOTE}{around.default}{QUOTE}")
    ends = dict.fromkeys(i for i in (tokenizer.eos_token_id, *end_ids(source)) if i is not None)
    for token in tokenizer.convert_ids_to_tokens(list(ends)):
        if '"' in token or "\n" in token or CONTROL.search(token):
            notes.append(f"the end token {token!r} cannot be written into a Modelfile: Ollama may not stop at it")
        else:
            lines.append(f'PARAMETER stop "{token}"')
    (work / FILE).write_text("\n".join([*lines, ""]), encoding="utf-8")
    return notes

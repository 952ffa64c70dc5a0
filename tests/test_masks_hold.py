"""Properties of masks, for random conversations and random templates.

Each role writes with letters of its own, so that a supervised character tells whose it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from masks import FAMILIES, Messages, byte_tokenizer, family, piece_tokenizer, runs, with_template

from mlxtune.data.chat import masking, repairs

QUICK = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
    report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
LETTERS = {"system": "ςψ", "user": "жщ", "tool": "ñø", "assistant": "漢字"}  # of each role alone
SPECIAL = ["<s>", "</s>", "<h>", "</h>", "<end>"]


@dataclass(frozen=True)
class Parts:
    """What a random template is made of; roles and the text around them."""

    start: str
    header: str  # holds ROLE
    assistant: str  # what it calls the assistant
    content: str  # a Jinja expression
    end: str
    between: str  # follows the end token
    after_last: bool  # whether `between` also follows the last turn
    asks: bool  # whether it has a generation prompt
    system: str  # turn, first (folded into the first user turn), or drop

    def source(self) -> str:
        header = self.header.replace("ROLE", "' + (name if m.role == 'assistant' else m.role) + '")
        asked = self.header.replace("ROLE", self.assistant)
        between = f"'{self.between}'" if self.after_last else f"('' if loop.last else '{self.between}')"
        shown = f"(folded if m == asked else '') + ({self.content})" if self.system == "first" else f"({self.content})"
        return (
            f"{{% set name = '{self.assistant}' %}}{{% set asked = messages | selectattr('role', 'equalto', 'user') "
            "| first %}{% set folded = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
            f"{{{{ '{self.start}' }}}}{{% for m in messages if m.role != 'system' or {self.system == 'turn'} %}}"
            f"{{{{ '{header}' + {shown} + '{self.end}' + {between} }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt and {self.asks} %}}{{{{ '{asked}' }}}}{{% endif %}}"
        )

    def printed(self, content: str) -> str:
        return content.strip() if "trim" in self.content else content


parts = st.builds(
    Parts,
    start=st.sampled_from(["", "<s>", "<s>\\n"]),
    header=st.sampled_from(["<h>ROLE</h>", "<h>ROLE\\n", "<h>ROLE</h>\\n\\n", "[ROLE]: ", "\\n<h> ROLE </h> "]),
    assistant=st.sampled_from(["assistant", "model", "bot"]),
    content=st.sampled_from(["m.content", "m.content | trim"]),
    end=st.sampled_from(["<end>", "</s>", "\\n<end>", " </s>"]),
    between=st.sampled_from(["", "\\n", "\\n\\n", " "]),
    after_last=st.booleans(),
    asks=st.booleans(),
    system=st.sampled_from(["turn", "first", "drop"]),
)


def text_of(role: str, markers: list[str]) -> st.SearchStrategy[str]:
    """Any unicode but the other roles' letters, the templates' markers, edge whitespace, or nothing at all."""
    others = "".join(letters for other, letters in LETTERS.items() if other != role)
    anything = st.characters(blacklist_categories=("Cs", "Co"), blacklist_characters=others)
    piece = st.one_of(st.sampled_from([*LETTERS[role], *markers, " ", "\n", "\n\n"]), st.text(anything, max_size=6))
    return st.lists(piece, max_size=5).map("".join)


@st.composite
def conversations(draw: st.DrawFn, markers: list[str], system: bool = True) -> Messages:
    roles = [role for _ in range(draw(st.integers(1, 3))) for role in ("user", "assistant")]
    if system and draw(st.booleans()):
        roles.insert(0, "system")
    if draw(st.integers(0, 3)) == 0:
        roles.append("user")
    return [{"role": role, "content": draw(text_of(role, markers))} for role in roles]


KINDS = {
    "bytes": lambda special: byte_tokenizer(special),
    "merged": lambda special: byte_tokenizer(special, (("Ċ", "Ċ"), ("Ġ", "Ġ"), (":", "Ġ"), ("Ġ", "Ċ"))),
    "pieces": lambda special: piece_tokenizer(special, (("▁", "▁"),)),
}
MARKED = [*SPECIAL, "<h>assistant</h>", "<h>model\n", "[bot]: ", "<end>\n<h>user</h>", "</think>", "<think>"]


@cache
def inner(kind: str) -> Any:
    return KINDS[kind](SPECIAL)


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
THINKING = ("content", "reasoning_content", "thinking")


def render(tokenizer: Any, messages: Messages, tools: Any = None) -> tuple[masking.Example, str]:
    """The example, whose ids are the tokenizer's own whatever else holds, and the text rendered."""
    example = masking.render(tokenizer, messages, tools)
    repaired = repairs.repaired(masking.template_of(tokenizer, {}), messages)
    own = tokenizer.apply_chat_template(repaired, tools, tokenize=True, return_dict=False)
    assert list(example.ids) == list(own)
    assert len(example.mask) == len(own)
    return example, tokenizer.apply_chat_template(repaired, tools, tokenize=False)


def foreign(text: str) -> str:
    """The letters in a supervised text that belong to another role."""
    return "".join(sorted({letter for role in ("system", "user", "tool") for letter in LETTERS[role]} & set(text)))


@QUICK
@given(parts, conversations(MARKED), st.sampled_from(["bytes", "merged"]))
def test_random_templates_supervise_each_answer_and_its_end_and_nothing_else(
    made: Parts, messages: Messages, kind: str
) -> None:
    tokenizer = with_template(inner(kind), made.source(), "</s>")
    example, _ = render(tokenizer, messages)
    end = made.end.replace("\\n", "\n")
    expected = [made.printed(m["content"]) + end for m in messages if m["role"] == "assistant"]
    found = runs(tokenizer, example)
    assert len(found) == len(expected)
    for text, wanted in zip(found, expected, strict=True):
        if kind == "bytes":
            assert text == wanted
        else:  # a token may straddle the border between header and answer
            assert text.endswith(wanted)
            assert text.removesuffix(wanted).strip() in ("", ":")
    assert foreign("".join(found)) == ""


@QUICK
@given(parts, conversations(MARKED))
def test_random_templates_with_a_sentencepiece_tokenizer_supervise_no_other_roles_letter(
    made: Parts, messages: Messages
) -> None:
    tokenizer = with_template(inner("pieces"), made.source(), "</s>")
    found = runs(tokenizer, render(tokenizer, messages)[0])
    answers = [made.printed(m["content"]) for m in messages if m["role"] == "assistant"]
    assert foreign("".join(found)) == ""
    own = [LETTERS["assistant"][0], LETTERS["assistant"][1]]
    for letter in own:
        assert "".join(found).count(letter) == "".join(answers).count(letter)
    assert all(text.rstrip().endswith(made.end.replace("\\n", "\n").strip()) for text in found)
    assert len(found) == len(answers)


# Each run ends with one of these; glm's last turn and bare's have no end, and gemma's turns go on after a call.
ENDS = {
    "llama": ("<|eot_id|>",),
    "mistral": ("</s>",),
    "harmony": ("<|end|>", "<|return|>", "<|call|>"),
    "qwen": ("<|im_end|>",),
    "deepseek": ("<｜end▁of▁sentence｜>",),
    "phi": ("<|end|>",),
    "olmo": ("<|endoftext|>",),
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
}
NO_CALLS = ("phi", "olmo", "bare")  # their templates know no tools


@cache
def known(name: str) -> Any:
    return family(name)


@st.composite
def exchanges(draw: st.DrawFn, name: str) -> Messages:
    """One question with its answer: two answers, none, thinking, or a call with its result before the answer."""
    markers = [*FAMILIES[name][0].split(), "user", "assistant\n", "<think>", "{", '"', "\\"]

    def said(role: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": draw(text_of(role, markers)), **more}

    kinds = ["plain", "plain", "answer", "answers", "questions", "thinking", *["call"] * (name not in NO_CALLS)]
    kind = draw(st.sampled_from(kinds))
    if kind == "call":
        letters = st.text("漢字 \n\"{}'", max_size=4)
        value = st.one_of(letters, st.none(), st.integers(), st.lists(letters, max_size=2))
        arguments = draw(st.dictionaries(st.sampled_from(["x", "漢"]), value, max_size=2))
        call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        return [said("user"), calling, said("tool", tool_call_id="call00001", name="f"), said("assistant")]
    if kind == "thinking":
        key = "thinking" if name == "harmony" else "reasoning_content"
        return [said("user"), said("assistant", **{key: "字" + draw(text_of("assistant", markers))})]
    roles = {"plain": "ua", "answer": "a", "answers": "uaa", "questions": "uua"}[kind]
    return [said("user" if role == "u" else "assistant") for role in roles]


@QUICK
@given(st.data(), st.sampled_from(sorted(FAMILIES)))
def test_written_templates_supervise_every_letter_of_the_assistant_and_no_other_roles(
    data: st.DataObject, name: str
) -> None:
    """Answers, thinking and arguments that the template prints; whatever it does not print is reported."""
    system = data.draw(st.booleans())
    messages = [{"role": "system", "content": data.draw(text_of("system", MARKED))}] if system else []
    for _ in range(data.draw(st.integers(1, 3))):
        messages += data.draw(exchanges(name))
    tools = [TOOL] if any(message["role"] == "tool" for message in messages) else None
    tokenizer = known(name)
    example, printed = render(tokenizer, messages, tools)
    found = runs(tokenizer, example)
    text = "".join(found)
    assert foreign(text) == ""
    if name in ENDS:
        assert all(run.endswith(ENDS[name]) for run in found)
        turns = sum(message["role"] == "assistant" for message in messages)
        dropped = sum(damage.kind == "content" for damage in example.damage)  # texts that end in </think>, in Qwen's
        assert turns - dropped <= len(found) <= turns
    assert [text.count(letter) for letter in LETTERS["assistant"]] == [
        printed.count(letter) for letter in LETTERS["assistant"]
    ]
    said = "".join(str(message.get(key, "")) for message in messages for key in THINKING if message["role"] != "tool")
    if printed.count("字") < said.count("字"):
        assert example.damage

"""Random conversations with nasty contents, over all published templates, held against the oracle of `invariant`.

    python tests/random_conversations.py --count 20000 --seed 1

prints what was seen: conversations, turns, refusals by reason, exceptions, violations and tracebacks.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import published
from conversations import TOOL, call, result
from invariant import Options, violations

from mlxtune.config.schema import DataSection
from mlxtune.data.chat.renderer import Renderer, Row
from mlxtune.data.rows.formats import Record

Messages = list[dict[str, Any]]

PLAIN = [
    "Yes.",
    " and ",
    "\n",
    "The answer is 42.",
    "\n\n- one\n- two",
    "  ",
    "é",
    "中文",
    "😀",
    "{}",
    '{"a": [1, null]}',
]
MARKUP = [
    *("<", "<t", "<think", "<div>x</div>", "<answer>", "[INST] x [/INST]", "{{ x }}", "{% if %}", "/no_think", "\\n"),
    *("<tool_response>", "<tool_response>\nx\n</tool_response>", "<tool_call>", '<tool_call>\n{"name": "look"}\n'),
    *("assistant", "user\n", "None", "null", "```", '"', "'", "%s", "\r\n", "\t", "\u2028", "\u200b", "\ufeff"),
    *("\ue000", "\uf8ff", "\U000f0000", "|", "<|", "|>", "###", "e\u0301", "👩‍👩‍👧"),
]
TAGS = [
    *("<think>", "</think>", "<think>x</think>", "<think>\nx\n</think>\n\n", "</think>\n\n", "<think></think>"),
    *("\n</think>\n\n<think>\n", "<|channel>thought\nx\n<channel|>"),
]
KINDS = [("bpe", True), ("bpe", True), ("bpe", False), ("pieces", True)]  # of tokenizers, thinking tags as tokens


@dataclass
class Case:
    """One conversation and the tokenizer that it is for."""

    name: str
    kind: str
    thinks: bool
    messages: Messages
    tools: Any
    kwargs: dict[str, Any] = field(default_factory=dict)


class Draw:
    """Draws one conversation; each of its texts holds a word of its own, but for those left without."""

    def __init__(self, rnd: random.Random, name: str) -> None:
        self.rnd, self.name, self.messages = rnd, name, list[dict[str, Any]]()
        special = published.FAMILIES[published.family_of(name)][0].split()
        self.nasty = rnd.random() < 0.5
        self.pieces = [*PLAIN, *(MARKUP + special + [f"{rnd.choice(special)}{rnd.choice(special)}"]) * self.nasty]

    def chance(self, share: float) -> bool:
        return self.rnd.random() < share

    def text(self, letters: str, empty: float = 0.03, tags: float = 0.0) -> str:
        """Zero to three pieces around the word, or nothing at all."""
        if self.chance(empty):
            return ""
        if self.nasty and self.chance(0.05):
            return self.rnd.choice(["the same text", " ", "\n", "7"])
        parts = [self.rnd.choice(self.pieces) for _ in range(self.rnd.randrange(4))]
        parts.insert(self.rnd.randint(0, len(parts)), f"{letters}{len(self.messages)}")
        if self.chance(tags):
            parts.insert(self.rnd.randint(0, len(parts)), self.rnd.choice(TAGS))
        return "".join(parts)

    def say(self, role: str, letters: str, **more: Any) -> None:
        self.messages.append({"role": role, "content": self.text(letters), **more})

    def answer(self, thinking: float, calls: int = 0) -> None:
        content = self.text("ANS", 0.7 if calls else 0.04, 0.12 if self.nasty else 0.0)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self.chance(thinking):
            message["reasoning_content"] = self.text("THK")
        at = len(self.messages) * 10
        if calls:
            values: list[Any] = [self.text("ARG", 0.0), 3, None, ["ARG"], True, {"y": ""}]
            given = [{"x": values[0]}, *({"x": self.rnd.choice(values[1:])} for _ in range(calls - 1))]
            message["tool_calls"] = [call(at + number, **one) for number, one in enumerate(given)]
            if self.chance(0.3):
                for one in message["tool_calls"]:
                    one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
        if self.chance(0.06):
            message["weight"] = 0
        self.messages.append(message)
        for number in range(calls):
            self.messages.append(result(at + number, self.text("RES")))

    def conversation(self) -> Messages:
        thinking, tools = self.rnd.choice([0, 0, 0.4, 1]), self.rnd.choice([0, 0, 0.6])
        if self.chance(0.25):
            self.say("system", "SYS")
        if self.chance(0.02):
            self.answer(thinking)
        for _ in range(self.rnd.choice([1, 1, 2, 2, 3, 4])):
            for _ in range(1 + self.chance(0.04)):
                self.say("user", "USR")
            while self.chance(tools):
                self.answer(thinking, self.rnd.choice([1, 1, 2]))
            for _ in range(1 + self.chance(0.04)):
                self.answer(thinking)
        if self.chance(0.06):
            self.say("user", "USR")
        return self.messages


def options_of(name: str, kwargs: dict[str, Any], **more: Any) -> Options:
    """What the oracle is to know of a published template. GLM alone prints no token that ends its last turn."""
    stops = ("<|user|>", "<|observation|>") if name.startswith("glm") else ()
    return Options(published.ends_of(name), stops, kwargs, **more)


def rendered(tokenizer: Any, messages: Messages, tools: Any, kwargs: dict[str, Any], **section: Any) -> list[Row]:
    chosen = DataSection(max_tokens=1 << 20, template_kwargs=kwargs, **section)
    return Renderer(tokenizer, chosen).rows([Record("file.jsonl", 1, "messages", messages, tools, None, {})])


def draw(rnd: random.Random, names: list[str]) -> Case:
    name = rnd.choice(names)
    kind, thinks = rnd.choice(KINDS)
    messages = Draw(rnd, name).conversation()
    tools = [TOOL] if any(message["role"] == "tool" for message in messages) or rnd.random() < 0.05 else None
    switch = "enable_thinking" in published.source(name) and rnd.random() < 0.2
    return Case(name, kind, thinks, messages, tools, {"enable_thinking": rnd.random() < 0.3} if switch else {})


def tried(case: Case, counts: Counter[str]) -> list[str]:
    """What is wrong with a case; a traceback is wrong too."""
    tokenizer = published.tokenizer(case.name, case.kind, case.thinks)
    options = options_of(case.name, case.kwargs)
    counts["conversations"] += 1
    try:
        rows = rendered(tokenizer, case.messages, case.tools, case.kwargs)
        return violations(tokenizer, case.messages, case.tools, options, rows, counts)
    except Exception:
        counts["tracebacks"] += 1
        return [traceback.format_exc()]


def known(name: str) -> bool:
    """Whether the template takes texts at all; some want lists of parts."""
    return not name.startswith(("idefics", "llava", "smolvlm"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20000, help="how many conversations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="templates, comma-separated (default: all that take texts)")
    parser.add_argument("--show", type=int, default=20, help="how many violations to print")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else [name for name in published.names() if known(name)]
    rnd, counts, wrong = random.Random(args.seed), Counter[str](), 0
    began = time.monotonic()
    for _ in range(args.count):
        case = draw(rnd, names)
        found = tried(case, counts)
        if not found:
            continue
        wrong += 1
        counts[f"violations: {case.name}"] += 1
        if wrong <= args.show:
            print(case.name, case.kind, "thinking tags are tokens" if case.thinks else "", case.kwargs or "")
            print("   ", json.dumps(case.messages, ensure_ascii=False), "with tools" if case.tools else "")
            print(*(f"    {text}" for text in found), sep="\n")
    for name, count in sorted(counts.items()):
        print(f"{count:8} {name}")
    print(f"{wrong:8} conversations with violations, in {time.monotonic() - began:.0f} s")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())

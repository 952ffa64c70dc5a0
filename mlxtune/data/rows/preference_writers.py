"""Pairs and rated answers -> rows of another format.

A row of each, for the prompt "Hi" with the answers "Hello!" (better) and "What?":

    pairs           {"prompt": [Hi], "chosen": [Hello!], "rejected": [What?]}
    pairs-implicit  {"chosen": [Hi, Hello!], "rejected": [Hi, What?]}
    openai          {"input": {"messages": [Hi]}, "preferred_output": [Hello!], "non_preferred_output": [What?]}
    llama-factory   {"conversations": [Hi], "chosen": {"from": "gpt", ...}, "rejected": {"from": "gpt", ...}}
    kto             {"prompt": [Hi], "completion": [Hello!], "label": true}, and the same with What? and false

Each raises RowError for what its format cannot hold.
"""

from __future__ import annotations

import json
from typing import Any

from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.messages import WEIGHTS
from mlxtune.data.rows.sides import Side
from mlxtune.data.rows.two_sides import Messages, TwoSides, answer_of, prompt_of
from mlxtune.data.rows.values import RowError
from mlxtune.data.rows.writers import sharegpt_turns

NO_PAIR = "it has one answer, and a pair has two: a better and a worse one"
NO_RATING = "its answer is not rated"


def to_pairs(pair: TwoSides) -> list[dict[str, Any]]:
    """Prompt and both answers, each as messages."""
    row = {
        "prompt": _unweighted(pair.prompt),
        "chosen": _bare(pair.preferred),
        "rejected": _bare(pair.less_preferred),
    }
    return [{**row, **_tools(pair.chosen)}]


def to_implicit(pair: TwoSides) -> list[dict[str, Any]]:
    """Two whole conversations, whose prompt is what both begin with."""
    prompt = _unweighted(pair.prompt)
    if _alike(pair.preferred, pair.less_preferred):
        raise RowError("both answers begin with the same messages, which would be read as a part of the prompt")
    row = {"chosen": prompt + _bare(pair.preferred), "rejected": prompt + _bare(pair.less_preferred)}
    return [{**row, **_tools(pair.chosen)}]


def to_openai(pair: TwoSides) -> list[dict[str, Any]]:
    """What OpenAI's preference tuning takes: one message of the assistant on each side."""
    for answer in (pair.preferred, pair.less_preferred):
        _require_one(answer, "OpenAI's preference rows")
    outputs = {"preferred_output": _bare(pair.preferred), "non_preferred_output": _bare(pair.less_preferred)}
    return [{"input": {"messages": _unweighted(pair.prompt), **_tools(pair.chosen)}, **outputs}]


def to_llama_factory(pair: TwoSides) -> list[dict[str, Any]]:
    """ShareGPT turns for the prompt, one turn for each side."""
    row: dict[str, Any] = {"conversations": sharegpt_turns(_unweighted(pair.prompt))}
    for name, answer in (("chosen", pair.preferred), ("rejected", pair.less_preferred)):
        _require_one(answer, "LLaMA-Factory's pairs")
        turns = sharegpt_turns(_bare(answer))
        if len(turns) > 1:
            raise RowError("LLaMA-Factory's pairs have no place for an answer that has text and calls tools")
        row[name] = turns[0]
    if pair.chosen.tools:
        row["tools"] = json.dumps(pair.chosen.tools, ensure_ascii=False)
    return [row]


def to_kto(pair: TwoSides) -> list[dict[str, Any]]:
    """Two rated rows."""
    prompt, tools = _unweighted(pair.prompt), _tools(pair.chosen)
    return [
        {"prompt": prompt, "completion": _bare(pair.preferred), "label": True, **tools},
        {"prompt": prompt, "completion": _bare(pair.less_preferred), "label": False, **tools},
    ]


def rated_to_kto(record: Record) -> list[dict[str, Any]]:
    """A rated answer as it is."""
    if record.side not in (Side.GOOD, Side.BAD):
        raise RowError(NO_RATING)
    prompt, answer = _unweighted(prompt_of(record)), _bare(answer_of(record))
    row = {"prompt": prompt, "completion": answer, "label": record.side == Side.GOOD}
    return [{**row, **_tools(record)}]


def _alike(chosen: Messages, rejected: Messages) -> bool:
    """Whether two answers begin with messages that are read as the prompt's where both sides are whole conversations:
    what both begin with, but for answers at its end.
    """
    alike = 0
    while alike < min(len(chosen), len(rejected)) and chosen[alike] == rejected[alike]:
        alike += 1
    return any(message["role"] != "assistant" for message in chosen[:alike])


def _require_one(answer: Messages, where: str) -> None:
    if [message["role"] for message in answer] != ["assistant"]:
        raise RowError(f"{where} have one message of the assistant on each side, not {len(answer)}")


def _tools(record: Record) -> dict[str, Any]:
    return {"tools": record.tools} if record.tools else {}


def _unweighted(prompt: Messages) -> Messages:
    """A prompt as a file has it: that nothing of it is trained goes without saying."""
    out = []
    for message in _bare(prompt):
        out.append({key: value for key, value in message.items() if key not in WEIGHTS})
    return out


def _bare(messages: Messages) -> Messages:
    """Messages without what an Alpaca row's have beside the content that holds both."""
    out = []
    for message in messages:
        out.append({key: value for key, value in message.items() if key not in ("instruction", "input")})
    return out

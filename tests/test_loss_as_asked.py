"""The loss that `mlxtune eval` (and a run's evaluation) reports is the loss of each turn behind the prompt that asks.

The other side is computed by PyTorch, one turn at a time: the prompt as `apply_chat_template` tokenizes it, then the
turn's tokens, in one forward pass of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import published
import pytest
import tiny
from conversations import answer, call, result, user

from mlxtune.data.template.tokenizer import load_tokenizer

TOOLS = [{"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}]
ROWS: list[dict[str, Any]] = [
    {"messages": [user("How far is the sea?"), answer("An hour."), user("By train?"), answer("By bus.")]},
    {"messages": [user("Hi"), answer("Hello.", "They greet me."), user("Why?"), answer("Because.", "Think again.")]},
    {
        "messages": [
            user("Look."),
            answer("", "I must look.", call(1, x="x")),
            result(1, "five"),
            answer("It is 5.", "Five."),
        ]
    },
]
TEMPLATES = ("qwen3", "qwen3_5_think", "gptoss", "gemma4_v5", "deepseek_r1_distill")


def said(name: str, thought: str, text: str, calls: bool) -> str:
    """What a model must produce behind its prompt, written by hand from each family's template."""
    opened = {"qwen3": "<think>\n", "qwen3_5_think": "", "deepseek_r1_distill": ""}
    if name in opened:
        called = {
            "qwen3": '<tool_call>\n{"name": "look", "arguments": {"x": "x"}}\n</tool_call>',
            "qwen3_5_think": "<tool_call>\n<function=look>\n<parameter=x>\nx\n</parameter>\n</function>\n</tool_call>",
        }
        end = "<｜end▁of▁sentence｜>" if name == "deepseek_r1_distill" else "<|im_end|>"
        return opened[name] + thought + "\n</think>\n\n" + (called[name] if calls else text) + end
    if name == "gptoss":
        before = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
        if calls:
            return before + ' to=functions.look<|channel|>commentary json<|message|>{"x": "x"}<|call|>'
        return before + f"<|channel|>final<|message|>{text}<|return|>"
    before = f"<|channel>thought\n{thought}\n<channel|>" if thought else ""
    if calls:
        return before + '<|tool_call>call:look{x:<|"|>x<|"|>}<tool_call|><|tool_response>'
    return before + text + "<turn|>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_loss_as_asked_is_loss_as_trained(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny.make_model(tmp_path / "model", vocab_size=640, max_position_embeddings=1024)
    for file in folder.glob("*token*"):
        file.unlink()
    published.tokenizer(name).save_pretrained(str(folder))
    tokenizer = load_tokenizer(folder)
    rows = ROWS[:2] if name == "deepseek_r1_distill" else ROWS  # its template prints no calls as objects
    path = tiny.write_jsonl(
        tmp_path / "rows.jsonl", [{**row, "tools": TOOLS} if row is ROWS[2] else row for row in rows]
    )
    told = tiny.done("eval", "--model", folder, "--data", path, "--json")
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    loss_sum, count = 0.0, 0
    for row in rows:
        messages = row["messages"]
        tools = TOOLS if row is ROWS[2] else None
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = tokenizer.apply_chat_template(
                messages[:index], tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            calls = bool(message.get("tool_calls"))
            text = said(name, message.get("reasoning_content", ""), message["content"], calls)
            target = tokenizer(text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
            loss_sum += float(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum"))
            count += len(target)
    base = json.loads(told.stdout)["base"]
    assert base["tokens"] == count
    assert base["loss"] == pytest.approx(loss_sum / count, abs=1e-5)

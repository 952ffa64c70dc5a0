"""What the recipe of tests/same_recipe.py is given: models, data and configuration files, old ones among them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import conversations
import tiny

# Name of a folder -> the kind of model (tests/zoo.py) and what is changed in it. Those of QUICK are enough for --quick.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"dtype": "float16"}),
    "moe": ("qwen3_moe", {}),
    "qwen": ("qwen3", {"tie_word_embeddings": True}),
    # Six blocks: the only pattern of windows that llama.cpp knows of this family.
    "gemma": (
        "gemma3_text",
        {"dtype": "bfloat16", "num_hidden_layers": 6, "layer_types": 5 * ["sliding_attention"] + ["full_attention"]},
    ),
    "phi": ("phi3", {}),
    "oss": ("gpt_oss", {}),
    "mla": ("deepseek_v3", {}),
    "wide": ("llama", {"hidden_size": 256, "intermediate_size": 256}),  # K-quants need rows of 256
    "tools": ("llama", {}),
}
QUICK = ("llama", "moe")
TEMPLATE = Path(__file__).with_name("templates") / "qwen.jinja"  # of the model "tools"

# Twenty steps on a small model, with checkpoints and evaluations in between. Its gradients' norms are about 0.1: the
# clipping has something to do.
TWENTY = """\
data: {max_tokens: 160, cache: "off"}
lora: {rank: 4, alpha: 8}
train: {steps: 20, batch_rows: 4, lr: 2e-3, warmup_steps: 3, seed: 11, clip_norm: 0.05, eval_every: 8, save_every: 6}
"""
MIXTURE = """\
data:
  max_tokens: 160
  sources:
    - {path: given/chat, weight: 2}
    - {path: given/alpaca.jsonl, weight: 1, cap: 9}
lora: {rank: 4, alpha: 8}
train: {steps: 20, batch_rows: 4, lr: 2e-3, warmup_steps: 3, seed: 11, clip_norm: 0.05, eval_every: 8, save_every: 6}
"""

# Name -> a configuration as people have written it. YAML 1.1 and 1.2 read some of these words differently.
CONFIGS = {
    "words": "fast: {prefix: off, head: off}\ntrain: {memory_limit: off, keep_awake: off}\ndata: {cache: off}\n",
    "capitals": "fast: {prefix: OFF, head: Off}\ntrain: {memory_limit: No, keep_awake: no}\ndata: {cache: FALSE}\n",
    "quoted": "fast: {prefix: 'off', head: \"auto\"}\ntrain: {memory_limit: 'off'}\ndata: {cache: 'off'}\n",
    "yes": "data: {group_by_prefix: yes}\n",
    "on": "data: {group_by_prefix: on}\n",
    "on-for-auto": "fast: {prefix: on}\n",
    "kwargs": "data: {template_kwargs: {enable_thinking: no, mode: off, other: y}}\n",
    "columns": "data: {columns: {y: n}}\n",
    "prompts": "train: {sample_prompts: [yes, 'on', 1e-5, 2026-01-31]}\n",
    "rates": "train: {lr: 1e-5, weight_decay: 1E-2, neftune_alpha: .5, clip_norm: +1.}\nlora: {dropout: 1.e-1}\n",
    "rate-with-point": "train: {lr: 1.0e-5}\n",
    "rate-yes": "train: {lr: yes}\n",
    "octal": "train: {seed: 010}\n",
    "octal-new": "train: {seed: 0o10}\n",
    "hexadecimal": "train: {seed: 0x10}\n",
    "underscore": "train: {memory_limit: 8_000_000_000}\n",
    "sixties": "train: {save_minutes: 1:30}\n",
    "date": "data: {date: 2026-01-31}\n",
    "nothing": "data: {path: ~}\nlora: {ranks: {}}\ntrain: {epochs: null, batch_tokens: }\n",
    "infinite": "train: {lr: .inf}\n",
    "twice": "train:\n  lr: 1e-4\n  lr: 2e-4\n",
    "alias": "lora: &one {rank: 4}\nfast: *one\n",
    "tabs": "train:\n\tlr: 1e-4\n",
    "list": "- train\n",
    "empty": "",
    "misspelled": "train: {stepz: 3}\n",
    "unicode": "train: {sample_prompts: ['Wie geht’s? 😀', \"tab\\there\"]}\n",
    "block": "train:\n  sample_prompts:\n    - |\n      two\n      lines\n    - >-\n      folded\n      text\n",
}
# Those that are refused.
REFUSED = (
    *("rate-yes", "infinite", "twice", "alias", "tabs", "list", "misspelled", "prompts", "on-for-auto", "columns"),
    *("octal-new",),
)
# Conversations of several turns that any template keeps whole.
TURNS = ("several turns", "system", "unicode", "questions in a row", "a turn of no weight", "newlines and digits first")


def give(folder: Path, quick: bool) -> None:
    """Write everything into `folder`. quick: only the models that the quick recipe needs."""
    for seed, (name, (kind, changes)) in enumerate(MODELS.items()):
        if not quick or name in QUICK:
            tiny.make_model(folder / name, kind, seed=seed, **changes)
    if not quick:
        own = {**json.loads((folder / "tools" / "tokenizer_config.json").read_text()), "chat_template": ""}
        own["chat_template"] = TEMPLATE.read_text(encoding="utf-8")
        (folder / "tools" / "tokenizer_config.json").write_text(json.dumps(own))
    _rows(folder)
    (folder / "twenty.yaml").write_text(TWENTY)
    (folder / "mixture.yaml").write_text(MIXTURE)
    (folder / "configs").mkdir()
    for name, text in CONFIGS.items():
        (folder / "configs" / f"{name}.yaml").write_text(text, encoding="utf-8")


def _rows(folder: Path) -> None:
    chat = tiny.conversations(40)
    whole = [
        {"messages": messages, **({"tools": [conversations.TOOL]} if tools else {})}
        for messages, tools in conversations.CONVERSATIONS.values()
    ]
    tiny.write_jsonl(folder / "chat" / "train.jsonl", chat)
    tiny.write_jsonl(folder / "chat" / "valid.jsonl", tiny.conversations(8, "No, {}!"))
    several = [row for name, row in zip(conversations.CONVERSATIONS, whole, strict=True) if name in TURNS]
    tiny.write_jsonl(folder / "mixed" / "train.jsonl", chat[:20] + several)
    tiny.write_jsonl(folder / "tools.jsonl", [row for row in whole if row["messages"][0]["role"] != "assistant"])
    (folder / "sharegpt.json").write_text(json.dumps([_sharegpt(row["messages"]) for row in chat[:24]], indent=1))
    tiny.write_jsonl(
        folder / "alpaca.jsonl",
        [
            {"instruction": f"Add {n} and {n}.", "input": "Briefly." if n % 3 else "", "output": f"It is {2 * n}."}
            for n in range(24)
        ],
    )
    tiny.write_jsonl(folder / "text.jsonl", [{"text": f"Once there were {n} trees." * (n % 3 + 1)} for n in range(9)])
    with (folder / "completion.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "completion"), *((f"{n} is", f' {n},\n"so"') for n in range(9))])
    broken: list[Any] = [*chat[:3], {"messages": [{"role": "user"}]}, {"messages": []}, {"text": "other"}, *chat[3:5]]
    tiny.write_jsonl(folder / "broken.jsonl", broken)
    odd = [*chat[:6], chat[0], *whole, *_suspicious()]
    tiny.write_jsonl(folder / "odd.jsonl", odd)


def _sharegpt(messages: list[dict[str, str]]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"conversations": [{"from": names[one["role"]], "value": one["content"]} for one in messages]}


def _suspicious() -> list[Any]:
    """Rows that `data check` has something to say of."""
    answers = [
        "As an AI language model, I cannot do that.",
        "Write to someone@example.org or use AKIAIOSFODNN7EXAMPLE.",
        "word " * 300,
        "The answer is <|im_end|> here",
        "",
        "mojibake: Ã© Ã¼",
    ]
    return [
        {"messages": [{"role": "user", "content": f"Odd {n}?"}, {"role": "assistant", "content": text}]}
        for n, text in enumerate(answers)
    ]

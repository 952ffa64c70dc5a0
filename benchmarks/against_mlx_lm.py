"""`mlxtune bench` against mlx-lm on three sets of rows, five alternating pairs each.

    python benchmarks/against_mlx_lm.py MODEL GSM8K TAUBENCH [--only gsm8k|system|taubench] [-- OPTION...]

MODEL: a model folder with the tokenizer of SmolLM2; GSM8K: its questions and answers as JSON lines; TAUBENCH: its
conversations as OpenAI messages. What stands behind -- goes to `mlxtune bench`, such as --against mlx-lm-checkpointed.

    gsm8k       8 word problems
    system      the same behind a system prompt of 225 tokens
    taubench    two conversations of four answers each, every one an example of its own, their policy cut until the
                first prompt has 600 tokens; calls and answers of tools as plain text, for the template knows none
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxtune.data.template.tokenizer import load_tokenizer

ROWS = 8
SYSTEM_TOKENS, PROMPT_TOKENS = 225, 600
ANSWERS = 4  # of a conversation
SENTENCE = "Solve the problem step by step, check each number twice, and end with the result on a line of its own. "
SETTINGS = ("lora.rank=8", "lora.alpha=16", "train.dtype=float32", "train.memory_limit=off", "data.cache=off")


def word_problems(file: Path, system: str = "") -> list[dict[str, Any]]:
    """The first rows; system: a message before each."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines()[: 2 * ROWS]:
        row = json.loads(line)
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        rows.append({"messages": messages})
    return rows


def long_system(tokenizer: Any) -> str:
    """Text of SYSTEM_TOKENS tokens."""
    ids = tokenizer.encode(SENTENCE * SYSTEM_TOKENS, add_special_tokens=False)[:SYSTEM_TOKENS]
    return str(tokenizer.decode(ids))


def conversations(file: Path, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Those with enough answers, cut behind so many, and their policy where the first prompt would be too long."""
    for line in file.read_text(encoding="utf-8").splitlines():
        messages = [as_text(message) for message in json.loads(line)["messages"]]
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if len(answers) < ANSWERS:
            continue
        messages = messages[: answers[ANSWERS - 1] + 1]
        policy = tokenizer.encode(messages[0]["content"], add_special_tokens=False)
        first = tokenizer.apply_chat_template(messages[: answers[0]], add_generation_prompt=True, tokenize=False)
        beyond = max(0, len(tokenizer.encode(first, add_special_tokens=False)) - PROMPT_TOKENS)
        messages[0]["content"] = tokenizer.decode(policy[: len(policy) - beyond])
        yield {"messages": messages}


def as_text(message: dict[str, Any]) -> dict[str, str]:
    """A message with its calls as text; what a tool answers is told by the user."""
    role = "user" if message["role"] == "tool" else message["role"]
    content = message.get("content") or ""
    for call in message.get("tool_calls") or ():
        content += json.dumps(call["function"])
    return {"role": role, "content": content}


def write(folder: Path, rows: list[dict[str, Any]], count: int) -> None:
    """`count` rows to train on, and one held out."""
    folder.mkdir()
    for name, chosen in (("train", rows[:count]), ("valid", rows[count : count + 1])):
        text = "".join(json.dumps(row) + "\n" for row in chosen)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def bench(model: Path, data: Path, options: list[str]) -> dict[str, Any]:
    """What `mlxtune bench --json` prints."""
    command = [sys.executable, "-m", "mlxtune", "bench", "--model", str(model), "--data", str(data), "--json"]
    command += ["--rows", str(ROWS)]
    if "--against" not in options:
        command += ["--against", "mlx-lm"]
    for setting in SETTINGS:
        command += ["--set", setting]
    done = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    own, _, options = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("gsm8k", type=Path)
    parser.add_argument("taubench", type=Path)
    parser.add_argument("--only", choices=["gsm8k", "system", "taubench"])
    asked = parser.parse_args(own.split())
    tokenizer = load_tokenizer(asked.model)
    expanded = ["data.expand_turns=all", "train.batch_rows=2", "data.max_tokens=8192"]
    sets: dict[str, tuple[list[dict[str, Any]], int, list[str]]] = {  # rows, how many to train on, settings
        "gsm8k": (word_problems(asked.gsm8k), ROWS, []),
        "system": (word_problems(asked.gsm8k, long_system(tokenizer)), ROWS, []),
        "taubench": (list(conversations(asked.taubench, tokenizer)), 2, expanded),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, (rows, count, settings) in sets.items():
            if asked.only in (None, name):
                write(Path(folder) / name, rows, count)
                given = [word for setting in settings for word in ("--set", setting)]
                report(name, bench(asked.model, Path(folder) / name, [*options.split(), *given]))


def report(name: str, found: dict[str, Any]) -> None:
    """A line of the table in results.md."""
    ratio = found["ratio"]
    ours = next(one for one in found["measured"] if one["who"] == "mlxtune")
    print(
        f"| {name} | {ratio['time']:.3f} ({ratio['time_lowest']:.3f} to {ratio['time_highest']:.3f}) | "
        f"{ratio['peak']:.3f} | {ours['processed'] / ours['tokens']:.3f} | {ours['computed']} |",
        flush=True,
    )


if __name__ == "__main__":
    main()

"""Tiny real objects: models that transformers made, a byte tokenizer with ChatML, conversations. No mocks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import warm
import zoo
from safetensors.numpy import load_file, save_file

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
Change = Callable[[Path], Any]  # something done to a folder, to break it
Process = subprocess.Popen[str] | warm.Command  # a command in progress
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(folder: Path, chat: bool = True) -> None:
    """A byte-level tokenizer of 3 + 256 tokens, with ChatML unless `chat` is false."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    if chat:
        config["chat_template"] = CHATML
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_plain_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 1 + 256 tokens, as a base model's: an end token, no chat tokens, no template."""
    make_tokenizer(folder, chat=False)
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["added_tokens"] = whole["added_tokens"][:1]
    letters = [token for token in whole["model"]["vocab"] if token not in SPECIAL]
    whole["model"]["vocab"] = {token: index for index, token in enumerate([SPECIAL[0], *letters])}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_model(folder: Path, kind: str = "llama", seed: int = 0, dtype: str = "float32", **changes: Any) -> Path:
    """A two-layer model with random weights, saved by transformers as any Hugging Face model is. kind: of zoo.SHAPES;
    what follows its first word tells several models of one type apart.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(seed)
    shape = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **zoo.SHAPES.get(kind, {}),
        **changes,
    }
    auto = AutoModelForImageTextToText if "vision_config" in shape else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(kind.split()[0], **shape), dtype=getattr(torch, dtype))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # Trained norms are not all ones and biases not all zeros; a test must be able to see them.
            if tensor.ndim == 1 or name.endswith("bias"):
                tensor.add_(0.1 * torch.randn_like(tensor))
            elif "embed" in name:
                tensor.mul_(10)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def shard(model: Path, metadata: dict[str, Any] | None = None) -> None:
    """Put a model's tensors into two files with their index, in place of one. metadata: of the index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    table = {name: shards[place % 2] for place, name in enumerate(sorted(tensors))}
    for file in shards:
        save_file({n: array for n, array in tensors.items() if table[n] == file}, model / file, {"format": "pt"})
    index = {"metadata": metadata or {}, "weight_map": table}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def conversations(count: int, answer: str = "The answer is {}.") -> list[dict[str, Any]]:
    """Rows of different lengths, each with another question."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Question {'very ' * (index % 5)}number {index}?"},
                {"role": "assistant", "content": answer.format(index * 7)},
            ]
        }
        for index in range(count)
    ]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def mlxtune(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command, as a user does; where that makes no difference, without the time that it needs to
    start.
    """
    command = [str(Path(sys.executable).with_name("mlxtune")), *map(str, args)]
    whole = {**os.environ, "COLUMNS": "200", **environment}
    if warm.fits(whole):
        return warm.run(command, whole)
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, stdin=subprocess.DEVNULL, env=whole
    )


def done(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command; it must end well."""
    result = mlxtune(*args, **environment)
    assert result.returncode == 0, result.stderr
    return result


def trained(model: Path, data: Path, out: Path, *settings: str) -> Path:
    """A run by the installed command. settings: what follows --set."""
    done(
        "train", "--model", model, "--data", data, "--out", out, *(text for one in settings for text in ("--set", one))
    )
    return out


def started(*args: str | Path, code: str = "", streams: Sequence[int] = (), **environment: str) -> Process:
    """The installed command, running, with pipes to all its streams, or with these as input, output and error.

    code: Python that its process does first, for example to make a step slow.
    """
    command = [str(Path(sys.executable).with_name("mlxtune")), *map(str, args)]
    whole = {**os.environ, "COLUMNS": "200", **environment}
    if warm.fits(whole):
        return warm.start(command, whole, code, streams)
    if code:
        command[:1] = [sys.executable, "-c", f"{code}\nfrom mlxtune.cli import main\nmain()"]
    return popen(*command, streams=streams, **environment)


def popen(*command: str | Path, streams: Sequence[int] = (), **environment: str) -> subprocess.Popen[str]:
    """A command, running, with pipes to all its streams, or with these as input, output and error.

    It hears Ctrl-C even where the tests run in the background, which makes a shell ignore that signal for its children.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a handler, unlike "ignore", is not inherited
    try:
        return subprocess.Popen(
            [*map(str, command)],
            **dict(zip(("stdin", "stdout", "stderr"), streams or [subprocess.PIPE] * 3, strict=True)),
            text=True,
            env={**os.environ, "COLUMNS": "200", **environment},
        )
    finally:
        signal.signal(signal.SIGINT, before)


def one_clear_line(result: subprocess.CompletedProcess[str], *expected: str) -> str:
    """Assert what every refusal must be: exit status 2, one error line (and a hint), no traceback. Returns stderr."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = result.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert len(lines) - lines.index(errors[0]) <= 2, result.stderr
    for text in expected:
        assert text in result.stderr, (text, result.stderr)
    return result.stderr


def nothing_written(out: Path) -> None:
    """Neither the destination nor anything temporary beside it."""
    assert not out.exists()
    assert not [path.name for path in out.parent.glob(f".{out.name}.*")]


def refused(out: Path, *args: str | Path, expected: tuple[str, ...], **environment: str) -> str:
    """Run the command; it must refuse in one clear line and leave no trace of `out`."""
    said = one_clear_line(mlxtune(*args, **environment), *expected)
    nothing_written(out)
    return said


def remove(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def interrupt_after(patch: Any, step: int) -> None:
    """Send this process SIGINT when it has computed a training step, as Ctrl-C would."""
    from mlxtune.train.step import StepFunction

    real = StepFunction.__call__

    def call(self: Any, number: int) -> dict[str, Any]:
        event = real(self, number)
        if number == step:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)  # a thread of its own hears it
        return event

    patch.setattr(StepFunction, "__call__", call)

"""Tiny valid files of every kind that a stranger may hand over, and the commands that read them: what
mutated_files.py damages.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from mlxtune_convert import fence
from mlxtune_convert.adapters import save_adapter
from mlxtune_convert.gguf import adapter_file
from mlxtune_convert.gguf.architectures import by_model_type
from mlxtune_convert.peft.adapter_folder import Adapter, Update
from test_gguf_fuzz import model_bytes

RUN_SETTINGS = ("train.steps=4", "train.lr=1e-2", "train.eval_every=2", "train.save_every=2", "lora.rank=2")
PROMPT = ("--prompt", "Hi", "--max-tokens", "2")
MODELFILE_TEMPLATE = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}" + tiny.CHATML
)
CONFIG = """\
# A configuration as people write it.
model:
  path: {root}/mlx
data:
  path: {root}/data
  max_tokens: 200
  train_on: all
  template_kwargs: {{a: 1}}
lora:
  rank: 4
  alpha: 8.0
  targets: [q_proj, v_proj]
train:
  steps: 3
  lr: 1e-4
  loggers: []
"""


@dataclass(frozen=True)
class Command:
    """words: of the command line; {in} is the folder of the damaged copies, {out} a new path, {root} the folder of the
    undamaged ones. weights: whether it reads the weights among the kind's files; own: what else than {out} it may
    write; given: what a person types; refuses: it must not do it even with undamaged files.
    """

    words: str
    weights: bool = False
    own: str = ""
    given: str = ""
    refuses: bool = False

    def line(self, places: dict[str, str]) -> list[str]:
        """places: what stands for {in}, {out}, {root} and {file}."""
        return [word.format_map(places) for word in self.words.split()]


@dataclass(frozen=True)
class Kind:
    """files: one of them is damaged, by path in {in}; copied: what a case has of its own; readers: one of them is run.

    A file's format is told by its name.
    """

    files: tuple[str, ...]
    copied: tuple[str, ...]
    readers: tuple[Command, ...]


def _with_adapter(verb: str, rest: str = "", adapter: str = "{in}/run") -> str:
    return f"mlxtune {verb} --model {{root}}/mlx --adapter {adapter} {rest}".strip()


NEWEST = "NEWEST"  # stands for the name of the newest checkpoint
CHECKPOINT = f"run/checkpoints/{NEWEST}"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
EXPORT = "--no-verify --out {out}"


def _of_adapter(folder: str) -> tuple[Command, ...]:
    """Commands that read an MLX adapter."""
    place = f"{{in}}/{folder}"
    return (
        Command(_with_adapter("generate", " ".join(PROMPT), place), True),
        Command(_with_adapter("chat", "--max-tokens 2", place), True, given="Hi\n/system Be kind\n/quit\n"),
        Command(_with_adapter("eval", "--data {root}/data", place), True),
        Command(_with_adapter("fuse", EXPORT, place), True),
        Command(_with_adapter("fuse", f"{EXPORT} --bits 4", place), True),
        Command(_with_adapter("export", f"--to peft {EXPORT}", place), True),
        Command(_with_adapter("export", "--to peft --data {root}/data --out {out}", place), True),
        Command(_with_adapter("export", f"--to hf {EXPORT}", place), True),
        Command(_with_adapter("export", f"--to gguf --ollama {EXPORT}.gguf", place), True),
        Command(_with_adapter("export", f"--to gguf-lora --ollama {EXPORT}.gguf", place), True),
        Command(_with_adapter("verify {in}/export", "--data {root}/data", place), True, own="{in}/export"),
        Command(f"mlxtune-convert to-peft {place} {{out}} --base {{root}}/mlx", True),
        Command(f"mlxtune-convert check {{in}}/export {place} --base {{root}}/mlx", True),
    )


def _of_own() -> tuple[Command, ...]:
    """The same; that one is not what was exported, and GGUF cannot hold it."""
    unlike = ("verify", "check", "gguf-lora")
    return tuple(replace(one, refuses=any(word in one.words for word in unlike)) for one in _of_adapter("own"))


def _of_data(path: str) -> tuple[Command, ...]:
    return (
        Command(f"mlxtune data show --model {{root}}/mlx --data {path}"),
        Command(f"mlxtune data show --model {{root}}/mlx --data {path} --json"),
        Command(f"mlxtune data check --model {{root}}/mlx --data {path}"),
        Command(f"mlxtune data check --model {{root}}/mlx --data {path} --json --strict"),
        Command(f"mlxtune data convert {path} {{out}}.jsonl --drop"),
        Command(f"mlxtune train --model {{root}}/mlx --data {path} --dry-run --set data.valid_fraction=0.2"),
        Command(f"mlxtune eval --model {{root}}/mlx --data {path}"),
    )


_MODEL = (
    Command("mlxtune convert {in}/hf {out} --bits 16", True),
    Command("mlxtune convert {in}/hf {out} --group-size 32", True),
    Command("mlxtune train --model {in}/hf --data {root}/data --dry-run"),
    Command("mlxtune generate --model {in}/hf " + " ".join(PROMPT), True),
    Command("mlxtune eval --model {in}/hf --data {root}/data", True),
    Command("mlxtune data check --model {in}/hf --data {root}/data"),
    Command(f"mlxtune export --model {{in}}/hf --to gguf --ollama {EXPORT}.gguf", True),
    Command(f"mlxtune fuse --model {{root}}/mlx --adapter {{root}}/run --base {{in}}/hf {EXPORT}", True),
    Command("mlxtune-convert to-peft {root}/run {out} --base {in}/hf"),
)
_MLX = (
    Command("mlxtune-convert to-hf {in}/mlx {out}", True),
    Command("mlxtune convert {in}/mlx {out} --bits 8", True),
    Command(f"mlxtune export --model {{in}}/mlx --to hf {EXPORT}", True),
    Command(f"mlxtune export --model {{in}}/mlx --to gguf --type keep --ollama {EXPORT}.gguf", True),
    Command(f"mlxtune export --model {{in}}/mlx --adapter {{root}}/run --to peft {EXPORT}"),
    Command(f"mlxtune export --model {{in}}/mlx --adapter {{root}}/run --to hf {EXPORT}", True),
    Command("mlxtune generate --model {in}/mlx --adapter {root}/run " + " ".join(PROMPT), True),
    Command("mlxtune chat --model {in}/mlx --max-tokens 2", True, given="Hi\n"),
    Command("mlxtune data show --model {in}/mlx --data {root}/data --json"),
    Command("mlxtune train --model {in}/mlx --data {root}/data --dry-run"),
    Command("mlxtune verify {in}/fused --model {in}/mlx --data {root}/data", True, own="{in}/fused"),
)
KINDS = {
    "run": Kind(
        ("run/config.yaml", "run/config.yaml", "run/events.jsonl", "run/.lock", "run/adapter_config.json"),
        ("run", "export"),
        (
            Command("mlxtune runs {in}"),
            Command("mlxtune runs {in}/run --json"),
            Command("mlxtune train --resume --out {in}/run", own="{in}/run"),
            Command("mlxtune train --resume-anyway --out {in}/run --set train.steps=5", own="{in}/run"),
            Command("mlxtune train --model {root}/mlx --data {root}/data --out {in}/run", refuses=True),
            Command(_with_adapter("eval")),
            *_of_adapter("run"),
        ),
    ),
    "checkpoint": Kind(
        tuple(
            f"{CHECKPOINT}/{name}"
            for name in ("state.json", "state.json", "optimizer.safetensors", "adapters.safetensors")
        ),
        ("run",),
        (
            Command("mlxtune train --resume --out {in}/run", own="{in}/run"),
            Command("mlxtune train --resume-anyway --out {in}/run --set train.steps=5", own="{in}/run"),
        ),
    ),
    "adapter": Kind(
        (
            *("adapter/adapter_config.json", "adapter/adapters.safetensors", "adapter/mlxtune_tokenizer.json"),
            *("adapter/adapter_config.json", "adapter/adapters.safetensors"),
        ),
        ("adapter", "export"),
        _of_adapter("adapter"),
    ),
    "own adapter": Kind(("own/adapter_config.json", "own/mlxtune_adapters.safetensors"), ("own", "export"), _of_own()),
    "peft": Kind(
        (
            *("peft/adapter_config.json", "peft/adapter_model.safetensors", "peft/tokenizer.json"),
            *("peft/tokenizer_config.json", "peft/adapter_config.json", "peft/adapter_model.safetensors"),
        ),
        ("peft",),
        (
            Command("mlxtune convert {in}/peft {out} --base {root}/mlx", True),
            Command("mlxtune convert {in}/peft {out}", True),
            Command("mlxtune-convert to-mlx {in}/peft {out} --base {root}/mlx", True),
            Command("mlxtune-convert to-mlx {in}/peft {out}", True),
            Command("mlxtune-convert check {in}/peft {root}/adapter --base {root}/hf", True),
            Command(
                "mlxtune verify {in}/peft --model {root}/mlx --adapter {root}/run --data {root}/data",
                True,
                own="{in}/peft",
            ),
        ),
    ),
    "model": Kind(
        (
            *("hf/config.json", "hf/model.safetensors.index.json", "hf/model-00001-of-00002.safetensors"),
            *("hf/generation_config.json", "hf/model-00002-of-00002.safetensors"),
        ),
        ("hf",),
        _MODEL,
    ),
    "mlx model": Kind(
        ("mlx/config.json", "mlx/model.safetensors", "mlx/mlxtune_source.json", "mlx/mlxtune_source.json"),
        ("mlx", "fused"),
        _MLX,
    ),
    "tokenizer": Kind(
        (
            *(f"mlx/{name}" for name in TOKENIZER_FILES[:2]),
            *("mlx/special_tokens_map.json", "mlx/generation_config.json"),
        ),
        ("mlx", "fused"),
        _MLX,
    ),
    "template": Kind(("mlx/chat_template.jinja",), ("mlx",), _MLX[2:9]),
    "modelfile": Kind(
        tuple(f"spoken/{name}" for name in (*TOKENIZER_FILES, "generation_config.json")),
        ("spoken",),
        (
            Command(f"mlxtune export --model {{in}}/spoken --to gguf --ollama {EXPORT}.gguf", True),
            Command(
                f"mlxtune export --model {{in}}/spoken --adapter {{root}}/run --to gguf-lora --ollama {EXPORT}.gguf"
            ),
        ),
    ),
    "changes": Kind(
        ("adapter/mlxtune_tokenizer.json",),
        ("adapter", "export"),
        _of_adapter("adapter"),
    ),
    "configuration": Kind(
        ("c.yaml",),
        ("c.yaml",),
        (
            Command("mlxtune train -c {in}/c.yaml --dry-run"),
            Command("mlxtune train -c {in}/c.yaml --dry-run --set train.steps=2"),
            Command("mlxtune data check --model {root}/mlx -c {in}/c.yaml"),
        ),
    ),
    "jsonl": Kind(("rows/train.jsonl", "rows/valid.jsonl"), ("rows",), _of_data("{in}/rows")),
    "json": Kind(("rows.json",), ("rows.json",), _of_data("{in}/rows.json")),
    "csv": Kind(("rows.csv",), ("rows.csv",), _of_data("{in}/rows.csv")),
    "parquet": Kind(("rows.parquet", "nested.parquet"), ("rows.parquet", "nested.parquet"), _of_data("{in}/{file}")),
    "gguf": Kind(
        ("model.gguf",),
        ("model.gguf",),
        (
            Command("mlxtune convert {in}/model.gguf {out}", True),
            Command("mlxtune convert {in}/model.gguf {out} --bits 16", True),
            Command("mlxtune convert {in}/model.gguf {out} --bits 4 --group-size 32", True),
        ),
    ),
    "gguf adapter": Kind(
        ("adapter.gguf",),
        ("adapter.gguf",),
        (
            Command("mlxtune convert {in}/adapter.gguf {out} --base {root}/mlx", True),
            Command("mlxtune convert {in}/adapter.gguf {out}", True),
            Command("mlxtune-convert to-peft {in}/adapter.gguf {out} --base {root}/mlx", True),
            Command("mlxtune-convert check {root}/peft {in}/adapter.gguf --base {root}/mlx", True, refuses=True),
        ),
    ),
}


def make_models(root: Path) -> None:
    """hf, mlx, data and run, by the commands."""
    tiny.make_model(root / "hf")
    tiny.done("convert", root / "hf", root / "mlx", "--group-size", "32")
    rows = tiny.conversations(8)
    tiny.write_jsonl(root / "data/train.jsonl", rows[:6])
    tiny.write_jsonl(root / "data/valid.jsonl", rows[6:])
    tiny.trained(root / "mlx", root / "data", root / "run", *RUN_SETTINGS)


def make(root: Path) -> None:
    """What else the kinds name, of the four that are in `root` already."""
    tiny.shard(root / "hf")
    shutil.copytree(root / "mlx", root / "spoken")
    (root / "spoken/chat_template.jinja").write_text(MODELFILE_TEMPLATE)
    settings = json.loads((root / "mlx/tokenizer_config.json").read_text())
    (root / "mlx/special_tokens_map.json").write_text(json.dumps({"eos_token": settings["eos_token"]}))
    _make_adapters(root)
    shutil.copytree(root / "data", root / "rows")
    rows = [json.loads(line) for line in (root / "data/train.jsonl").read_text().splitlines()]
    (root / "rows.json").write_text(json.dumps(rows))
    pairs = [tuple(message["content"] for message in row["messages"]) for row in rows]
    lines = [f'"{prompt}",{answer}' for prompt, answer in pairs]
    (root / "rows.csv").write_text("\n".join(["prompt,completion", *lines, ""]))
    _make_parquet(root, rows, pairs)
    model_bytes(root / "model.gguf")
    (root / "c.yaml").write_text(CONFIG.format(root=root))


def _make_adapters(root: Path) -> None:
    """An adapter in each layout, and one that brings its own template and token."""
    adapter = root / "adapter"
    adapter.mkdir()
    for name in ("adapters.safetensors", "adapter_config.json"):
        shutil.copy(root / "run" / name, adapter / name)
    changes = {"chat_template": MODELFILE_TEMPLATE, "eos_token": "<|im_end|>", "tokens": {"<|im_start|>": 1}}
    (adapter / "mlxtune_tokenizer.json").write_text(json.dumps(changes))
    factors = np.random.default_rng(0).normal(size=(2, 64, 4)).astype(np.float32)
    updates: dict[str, Any] = {
        f"model.layers.{layer}.self_attn.q_proj": Update(factors[0, :, :rank], factors[1, :, :rank].T, 2.0)
        for layer, rank in ((0, 2), (1, 4))
    }
    (root / "own").mkdir()
    save_adapter(root / "own", Adapter(updates, {"model.norm.weight": np.ones(64, np.float32)}), 2)
    fence.to_peft(adapter, root / "peft", root / "mlx", "acme/tiny")
    shutil.copytree(root / "peft", root / "export")
    for name in TOKENIZER_FILES:
        shutil.copy(root / "mlx" / name, root / "peft" / name)
    fence.to_hf(root / "mlx", root / "fused", None, None)
    config = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    adapter_file.write_adapter(root / "adapter.gguf", by_model_type("llama"), config, updates, "acme/base")


def _make_parquet(root: Path, rows: list[Any], pairs: list[tuple[str, str]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "nested.parquet")
    flat = [dict(zip(("prompt", "completion"), pair, strict=True)) for pair in pairs]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), root / "rows.parquet", compression="gzip")

"""The commands that tests/same_artefacts.py runs with two revisions, and what they are given.

A line is what a person would type. `2` before it: it is refused with exit status 2; `~7` before a training run: it is
killed (SIGKILL) when it has told of step 7.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import same_given

QUICK = """
convert given/llama llama-4 --group-size 32
convert given/moe moe-4 --group-size 32
data show --model given/llama --data given/chat --json
data check --model given/llama --data given/chat --json
train -c given/twenty.yaml --model llama-4 --data given/chat --out runs/plain --dry-run
train -c given/twenty.yaml --model llama-4 --data given/chat --out runs/plain
~7 train -c given/twenty.yaml --model llama-4 --data given/mixed --out runs/killed \
    --set lora.dropout=0.1 --set train.neftune_alpha=3 --set train.checkpoint_layers=all
train --resume --out runs/killed
train -c given/twenty.yaml --model moe-4 --data given/chat --out runs/moe --set lora.variant=rslora
eval --model llama-4 --adapter runs/plain --json
generate --model llama-4 --adapter runs/plain --prompt Hello --max-tokens 12
fuse --model llama-4 --adapter runs/plain --out shipped/fused-4 --bits 4
export --model llama-4 --adapter runs/plain --to peft --out shipped/peft
export --model llama-4 --adapter runs/plain --to gguf --out shipped/q8.gguf --type q8_0 --ollama
export --model llama-4 --adapter runs/plain --to gguf-lora --out shipped/lora.gguf
export --model moe-4 --adapter runs/moe --to hf --out shipped/moe-hf
"""

MODELS = """
convert given/llama llama-8 --bits 8
convert given/llama llama-16 --bits 16
convert given/llama llama-mxfp4 --mode mxfp4
convert given/qwen qwen-4 --group-size 32
convert given/qwen qwen-bf16 --bits 16 --dtype bfloat16
convert given/gemma gemma-4 --group-size 32
convert given/phi phi-4 --group-size 32
convert given/oss oss-4 --group-size 32
convert given/mla mla-16 --bits 16
convert given/wide wide-4 --group-size 32
export --model llama-4 --to gguf --out gguf/llama-keep.gguf
export --model llama-16 --to gguf --out gguf/llama-f16.gguf --type f16
export --model qwen-4 --to gguf --out gguf/qwen-keep.gguf
export --model gemma-4 --to gguf --out gguf/gemma-keep.gguf
export --model moe-4 --to gguf --out gguf/moe-q8.gguf --type q8_0
export --model phi-4 --to gguf --out gguf/phi-keep.gguf
export --model wide-4 --to gguf --out gguf/wide-q4k.gguf --type q4_k_m
export --model llama-4 --to hf --out hf/llama --dtype float32
export --model mla-16 --to hf --out hf/mla
export --model oss-4 --to hf --out hf/oss --no-verify
convert gguf/llama-keep.gguf back/llama
convert gguf/llama-f16.gguf back/llama-16 --bits 16
convert gguf/llama-f16.gguf back/llama-4
convert gguf/qwen-keep.gguf back/qwen
convert gguf/gemma-keep.gguf back/gemma
convert gguf/moe-q8.gguf back/moe
convert llama-4 again/llama-8 --bits 8
2 convert given/absent absent
2 convert given/llama llama-4
mlxtune-convert to-hf llama-4 hf/by-convert
mlxtune-convert to-hf moe-4 hf/moe-by-convert
mlxtune-convert check hf/by-convert llama-4
"""

DATA = """
data show --model given/llama --data given/chat --limit 3
data show --model given/llama --data given/sharegpt.json --json
data show --model given/llama --data given/alpaca.jsonl --json
data show --model given/llama --data given/completion.csv --json
data show --model given/llama --data given/text.jsonl --json
data show --model given/tools --data given/tools.jsonl --json
data show --model given/tools --data given/tools.jsonl --limit 2
data show --model given/tools --data given/tools.jsonl --json --set data.expand_turns=none
data show --model given/llama --data given/chat --json --set data.template=alpaca --set data.train_on=last
data show --model given/llama --data given/broken.jsonl --json
data check --model given/llama --data given/chat
data check --model given/tools --data given/tools.jsonl --json
data check --model given/llama --data given/odd.jsonl --json
2 data check --model given/llama --data given/odd.jsonl --strict
data check --model given/llama -c given/mixture.yaml --json
data convert given/sharegpt.json rows/messages.jsonl
data convert given/chat rows/sharegpt.jsonl --to sharegpt --split valid
data convert given/chat rows/alpaca.jsonl --to alpaca
data convert given/completion.csv rows/completion.jsonl
2 data convert given/broken.jsonl rows/broken.jsonl
data convert given/broken.jsonl rows/good.jsonl --drop
"""

RUNS = """
train -c given/twenty.yaml --model llama-4 --data given/chat --out runs/checkpointed --set train.checkpoint_layers=1
train -c given/twenty.yaml --model llama-4 --data given/chat --out runs/dora --set lora.variant=dora
train -c given/twenty.yaml --model llama-8 --data given/chat --out runs/also --set lora.variant=rslora \
    --set 'lora.train_also=[norms, head]' --set lora.layers=1 --set 'lora.ranks={down_proj: 8}'
train -c given/twenty.yaml --model qwen-bf16 --data given/chat --out runs/embeddings --set train.dtype=bfloat16 \
    --set 'lora.train_also=[embeddings]' --set 'lora.targets=[q_proj, v_proj]' --set train.steps=8
train -c given/twenty.yaml --model llama-4 --data given/chat --out runs/noise --set lora.dropout=0.1 \
    --set train.neftune_alpha=5 --set train.accumulate=2
train -c given/twenty.yaml --model llama-4 --data given/chat --out runs/ways --set fast.head=off --set fast.prefix=off
train -c given/twenty.yaml --model llama-4 --data given/sharegpt.json --out runs/sharegpt --set train.batch_rows=null \
    --set train.batch_tokens=256 --set train.schedule=linear --set train.keep=last
train -c given/twenty.yaml --model llama-4 --data given/alpaca.jsonl --out runs/alpaca --set data.order=length \
    --set train.clip_norm=0 --set train.weight_decay=0.1 --set train.schedule=constant
train -c given/twenty.yaml --model tools-4 --data given/tools.jsonl --out runs/tools --set data.expand_turns=all
train -c given/mixture.yaml --model llama-4 --out runs/mixture
train -c given/twenty.yaml --model llama-4 --data given/chat --out runs/tokens --set data.template=chatml \
    --set 'train.sample_prompts=[Hello]' --set data.dedup=near --set data.group_by_prefix=true
train -c given/twenty.yaml --model llama-4 --data given/chat --out runs/started --set lora.start_from=runs/plain
train -c given/twenty.yaml --model llama-4 --data given/chat --out runs/started-dry --dry-run \
    --set lora.start_from=runs/plain
train -c given/twenty.yaml --model gemma-4 --data given/chat --out runs/gemma
train -c given/twenty.yaml --model phi-4 --data given/chat --out runs/phi
train -c given/twenty.yaml --model oss-4 --data given/chat --out runs/oss --set train.steps=6
train -c given/twenty.yaml --model mla-16 --data given/chat --out runs/mla --set train.steps=6
train -c given/twenty.yaml --model given/llama --data given/chat --out runs/full-size
train --resume --out runs/plain
train --resume-anyway --out runs/alpaca --set train.steps=24
train -c qlora --model llama-4 --data given/chat --out runs/recipe --set train.epochs=2
train -c quick --model moe-4 --data given/chat --out runs/dry --dry-run
train -c lora --model gemma-4 --data given/chat --out runs/dry --dry-run --set train.checkpoint_layers=all
2 train --model llama-4 --data given/chat --out runs/wrong --set train.stepz=3
runs runs
"""

SHIPPED = """
eval --model llama-4 --data given/chat --json
eval --model llama-8 --adapter runs/also --json
eval --model tools-4 --adapter runs/tools --data given/tools.jsonl
generate --model llama-4 --adapter runs/noise --prompt Hello --system Briefly --max-tokens 12 --temperature 1 --seed 3
generate --model gemma-4 --adapter runs/gemma --prompt Hello --max-tokens 12
fuse --model llama-4 --adapter runs/plain --out shipped/fused-16
fuse --model llama-4 --adapter runs/dora --out shipped/fused-8 --bits 8
fuse --model llama-4 --adapter runs/plain --out shipped/fused-base --base given/llama
fuse --model moe-4 --adapter runs/moe --out shipped/fused-moe --bits 4 --group-size 64
fuse --model gemma-4 --adapter runs/gemma --out shipped/fused-gemma --bits 4
verify shipped/fused-16 --model llama-4 --adapter runs/plain --json
verify shipped/peft --model llama-4 --adapter runs/plain
export --model llama-8 --adapter runs/also --to peft --out shipped/also-peft
export --model moe-4 --adapter runs/moe --to peft --out shipped/moe-peft
export --model llama-4 --adapter runs/dora --to peft --out shipped/dora-peft --base-name owner/name
export --model llama-4 --adapter runs/plain --to hf --out shipped/hf --dtype bfloat16
export --model llama-4 --adapter runs/plain --to hf --out shipped/hf-base --base given/llama
export --model gemma-4 --adapter runs/gemma --to hf --out shipped/gemma-hf
export --model llama-8 --adapter runs/also --to gguf --out shipped/also.gguf --type f16
export --model gemma-4 --adapter runs/gemma --to gguf --out shipped/gemma.gguf --type q8_0
export --model moe-4 --adapter runs/moe --to gguf --out shipped/moe.gguf --type bf16
export --model wide-4 --to gguf --out shipped/wide.gguf --type q6_k --no-verify
2 export --model llama-4 --adapter runs/dora --to gguf-lora --out shipped/dora-lora.gguf
export --model llama-4 --adapter runs/noise --to gguf-lora --out shipped/noise-lora.gguf --ollama
2 export --model llama-8 --adapter runs/also --to gguf-lora --out shipped/also-lora.gguf
convert shipped/peft back/peft --base llama-4
convert shipped/moe-peft back/moe-peft --base moe-4
convert shipped/lora.gguf back/lora --base llama-4
mlxtune-convert to-peft runs/plain shipped/by-convert --base llama-4
mlxtune-convert to-peft runs/moe shipped/moe-by-convert --base moe-4
mlxtune-convert to-mlx shipped/by-convert back/by-convert --base llama-4
mlxtune-convert check shipped/by-convert runs/plain --base llama-4
"""

# Begun by one revision, killed, and resumed by another: what a checkpoint must carry across.
ACROSS = {
    "plain": "--model llama-4 --data given/chat",
    "noise": "--model llama-4 --data given/mixed --set lora.dropout=0.1 --set train.neftune_alpha=3 "
    "--set train.checkpoint_layers=all --set train.accumulate=2",
    "dora": "--model llama-4 --data given/chat --set lora.variant=dora --set lora.layers=1",
    "experts": "--model moe-4 --data given/chat --set lora.variant=rslora",
    "also": "--model qwen-4 --data given/sharegpt.json --set 'lora.train_also=[norms, embeddings]'",
    "mixture": "--model llama-4",
}


@dataclass(frozen=True)
class Command:
    """One line of the recipe."""

    words: list[str]  # from the name of the command on
    status: int = 0  # how it is to end
    kill: tuple[str, int] | None = None  # (the run's folder, step at which it is killed)


def command(line: str) -> Command:
    words = shlex.split(line)
    status, step = 0, 0
    if words[0] == "2":
        status = int(words.pop(0))
    elif words[0].startswith("~"):
        status, step = -9, int(words.pop(0)[1:])
    if words[0] != "mlxtune-convert":
        words.insert(0, "mlxtune")
    return Command(words, status, (words[words.index("--out") + 1], step) if step else None)


def commands(quick: bool) -> list[Command]:
    """The recipe, in an order in which each finds what it needs."""
    if quick:
        text = QUICK
    else:
        configs = "\n".join(
            f"{2 if name in same_given.REFUSED else ''} train -c given/configs/{name}.yaml --model llama-4 "
            f"--data given/chat --out configured/{name} --set train.steps=1"
            for name in same_given.CONFIGS
        )
        tools = "convert given/tools tools-4 --group-size 32"
        text = "\n".join([QUICK, MODELS, tools, DATA, RUNS, SHIPPED, configs])
    joined = text.replace("\\\n", " ")
    return [command(line) for line in joined.splitlines() if line.strip()]


def across() -> tuple[list[Command], dict[str, str]]:
    """The models that runs to be resumed need, and name of such a run -> its line without --out."""
    made = {"llama": "llama-4", "moe": "moe-4", "qwen": "qwen-4"}
    models = [command(f"convert given/{source} {made[source]} --group-size 32") for source in made]
    runs = {}
    for name, line in ACROSS.items():
        config = "given/mixture.yaml" if name == "mixture" else "given/twenty.yaml"
        runs[name] = f"train -c {config} {line}"
    return models, runs

"""A DPO step against mlx-lm-lora's on the same pairs, five alternating measurements each.

    python benchmarks/against_mlx_lm_lora.py ENVIRONMENT [--rounds 5] [--only short|long]

ENVIRONMENT: a folder for mlx-lm-lora's own packages (a virtual environment), which is made where it is missing. Both
compute the same llama (6 blocks of width 256, a vocabulary of 16,384, float32, random weights) with the same LoRA of
rank 8 on all linear layers, and the same two pairs a step:

    short    prompts of about 128 tokens, answers of about 64
    long     prompts of about 400 tokens, answers of about 100

A step of mlx-lm-lora is what its trainer computes for a batch: both sides under the model and under a second model, the
reference, and the gradients. mlxtune's has the reference's pass in it as well (`first epoch`); it is computed once for
a pair, so steps of later epochs do without (`later`). Losses must be equal to 1e-5 nats: an answer's log-probability is
about -1,000 nats here, of which float32 tells 6e-5 apart, times beta. All of it takes some ten minutes on an idle
machine of two cores, the environment two more.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

THEIRS = "mlx-lm-lora==5.10.2"
SIZES = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 16384,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LENGTHS = {"short": (128, 64), "long": (400, 100)}  # tokens of a prompt and of an answer, about
PAIRS = 2
RANK, ALPHA, BETA = 8, 16.0, 0.1
STEPS = 3  # measured, after one that is not
SAME = 1e-5  # of the losses, nats
MOST_TIME, MOST_MEMORY = 0.4, 0.5


def model_of(folder: Path) -> Any:
    """The llama with the weights of a folder."""
    import mlx.core as mx
    from mlx_lm.models import llama

    model = llama.Model(llama.ModelArgs.from_dict(SIZES))
    model.load_weights(str(folder / "weights.safetensors"))
    mx.eval(model.parameters())
    return model


def in_model(factors: dict[str, Any]) -> Any:
    """A parameter tree. factors: by their names in the blocks."""
    from mlx.utils import tree_unflatten

    return tree_unflatten([(f"model.layers.{key}", array) for key, array in factors.items()])


def write_inputs(folder: Path) -> None:
    """Weights, the factors of the adapter, and the pairs, all from fixed seeds."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(SIZES))
    mx.save_safetensors(str(folder / "weights.safetensors"), dict(tree_flatten(model.parameters())))
    draw = np.random.default_rng(0)
    pairs: dict[str, Any] = {}
    for name, (prompt, answer) in LENGTHS.items():
        pairs[name] = []
        for _ in range(PAIRS):
            counts = (int(count * draw.uniform(0.6, 1.4)) for count in (prompt, answer, answer))
            pairs[name].append([draw.integers(3, SIZES["vocab_size"], count).tolist() for count in counts])
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    factors = {}
    linear = {name.removesuffix(".weight"): array for name, array in tree_flatten(model.layers) if "_proj" in name}
    for name, weight in sorted(linear.items()):
        outputs, inputs = weight.shape
        factors[f"{name}.lora_a"] = mx.array(0.05 * draw.normal(size=(inputs, RANK)).astype(np.float32))
        factors[f"{name}.lora_b"] = mx.array(0.05 * draw.normal(size=(RANK, outputs)).astype(np.float32))
    mx.save_safetensors(str(folder / "factors.safetensors"), factors)


def measured(step: Callable[[], float], **more: Callable[[], Any]) -> dict[str, Any]:
    """Seconds (a median) and peak bytes of a step that returns its loss. more: other work, whose seconds are wanted."""
    import mlx.core as mx

    mx.reset_peak_memory()
    loss = step()
    found: dict[str, Any] = {"loss": loss, "peak": mx.get_peak_memory()}
    for name, work in {"seconds": step, **more}.items():
        times = []
        for _ in range(STEPS):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        found[name] = statistics.median(times)
    return found


def their_step(folder: Path, name: str) -> dict[str, Any]:
    """As `mlx_lm_lora.trainer.dpo_trainer.train_dpo` computes a batch."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm_lora.trainer import dpo_trainer

    model, reference = model_of(folder), model_of(folder)
    model.freeze()
    reference.freeze()
    keys = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    settings = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, len(model.layers), settings)
    factors: Any = mx.load(str(folder / "factors.safetensors"))
    model.update(in_model(factors))
    mx.eval(model.parameters())
    rows = []
    for prompt, chosen, rejected in json.loads((folder / "pairs.json").read_text())[name]:
        lengths = {"chosen_prompt_length": len(prompt), "rejected_prompt_length": len(prompt)}
        rows.append({"chosen": prompt + chosen, "rejected": prompt + rejected, **lengths})
    batch = next(dpo_trainer.iterate_dpo_batches(rows, PAIRS, 4096))

    def loss_of(chosen: mx.array, rejected: mx.array, chosen_mask: mx.array, rejected_mask: mx.array) -> mx.array:
        sides = ((chosen, chosen_mask), (rejected, rejected_mask))
        policy = [dpo_trainer.get_token_scores(model, ids, mask).sum(-1) for ids, mask in sides]
        before = [dpo_trainer.get_token_scores(reference, ids, mask).sum(-1) for ids, mask in sides]
        scores = [*policy, *(mx.stop_gradient(one) for one in before)]
        found = dpo_trainer.dpo_loss(*scores, chosen_mask, rejected_mask, BETA, 50.0, "sigmoid")
        loss: mx.array = found[0]
        return loss

    value_and_grad = nn.value_and_grad(model, loss_of)

    def step() -> float:
        value, gradients = value_and_grad(*batch)
        mx.eval(value, gradients)
        return float(value.item())

    return measured(step)


def our_step(folder: Path, name: str) -> dict[str, Any]:
    """With the way that a run takes."""
    from mlxtune.machine import backend

    backend.before_mlx()
    import mlx.core as mx
    import numpy as np

    from mlxtune.adapter import attach
    from mlxtune.adapter.plan import AdapterPlan
    from mlxtune.compute.fast_ways import describe, fastest_way
    from mlxtune.compute.gradients import Gradients
    from mlxtune.compute.preference.batch_value import Value
    from mlxtune.compute.preference.objectives import Settings
    from mlxtune.config import resolve
    from mlxtune.config.schema import LoraSection
    from mlxtune.data.chat.masking import Example
    from mlxtune.data.dataset.batches import collate
    from mlxtune.data.dataset.measured import ListedExamples
    from mlxtune.data.rows.sides import Side

    model = model_of(folder)
    attach.attach(model, AdapterPlan.of(model, LoraSection(rank=RANK, alpha=ALPHA)), 0)
    factors: Any = mx.load(str(folder / "factors.safetensors"))
    trained, base = in_model(factors), in_model({key: mx.zeros_like(array) for key, array in factors.items()})
    rows, sides = [], []
    for prompt, *answers in json.loads((folder / "pairs.json").read_text())[name]:
        for answer, side in zip(answers, (Side.CHOSEN, Side.REJECTED), strict=True):
            rows.append(Example(prompt + answer, [0] * len(prompt) + [1] * len(answer)))
            sides.append(side)
    examples = ListedExamples(rows, sides)
    batch = collate(examples, range(len(rows)))
    way, _ = fastest_way(model, examples, resolve.load(None, ("data.path=pairs",)), shares=True)
    gradients = Gradients(model, way)
    model.update(base)  # the adapter as a run begins: the reference
    mx.eval(model.parameters())
    reference = np.array(gradients.answer_sums(batch))
    model.update(trained)
    mx.eval(model.parameters())
    value_of = Value.of(Settings("dpo", BETA), batch, reference)

    def step() -> float:
        value, _, tree = gradients.of_answers(batch, value_of)
        mx.eval(value, tree)
        return float(value.item()) / PAIRS

    found = measured(step, reference=lambda: gradients.answer_sums(batch))
    return {**found, "way": describe(way)}


def python_of(environment: Path) -> Path:
    """mlx-lm-lora's Python, in an environment with this one's MLX, which is made where it is missing."""
    from importlib.metadata import version

    python = environment / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
        mlx = "mlx" if platform.system() == "Darwin" else "mlx[cpu]"
        packages = [THEIRS, f"{mlx}=={version('mlx')}", f"mlx-lm=={version('mlx-lm')}"]
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def one(python: str | Path, who: str, folder: Path, name: str) -> dict[str, Any]:
    """Measured in a process of its own."""
    command = [str(python), __file__, "--measure", who, name, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(python: Path, folder: Path, name: str, rounds: int) -> bool:
    """Print a line of the table; whether it is within the limits."""
    first, later, peaks, apart = [], [], [], 0.0
    for _ in range(rounds):
        theirs, ours = one(python, "theirs", folder, name), one(sys.executable, "ours", folder, name)
        first.append((ours["seconds"] + ours["reference"]) / theirs["seconds"])
        later.append(ours["seconds"] / theirs["seconds"])
        peaks.append(ours["peak"] / theirs["peak"])
        apart = max(apart, abs(ours["loss"] - theirs["loss"]))
    print(f"{name}: {ours['way']}")
    print(f"  last: {theirs} {ours}")
    time_ratio, peak_ratio = statistics.median(first), statistics.median(peaks)
    print(
        f"| {name} | {time_ratio:.3f} ({min(first):.3f} to {max(first):.3f}) | {statistics.median(later):.3f} "
        f"| {peak_ratio:.3f} | {apart:.1e} |",
        flush=True,
    )
    return time_ratio <= MOST_TIME and peak_ratio <= MOST_MEMORY and apart <= SAME


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        who, name, given = sys.argv[2:]
        step = their_step if who == "theirs" else our_step
        print(json.dumps(step(Path(given), name)))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("environment", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=list(LENGTHS))
    asked = parser.parse_args()
    python = python_of(asked.environment)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_inputs(folder)
        print("| pairs | time, first epoch | later | peak | loss apart |\n| --- | --- | --- | --- | --- |")
        names = [asked.only] if asked.only else list(LENGTHS)
        within = [compare(python, folder, name, asked.rounds) for name in names]
    sys.exit(not all(within))


if __name__ == "__main__":
    main()

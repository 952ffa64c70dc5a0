"""An adapter travels: trained here, continued by PEFT in PyTorch, and continued here, as if it had never left.

Both ways by mlxtune and by `mlxtune-convert` where there is no MLX: the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import alone
import numpy as np
import pytest
import tiny
from alone import same
from click.testing import CliRunner
from training import losses, tune

from mlxtune.cli import cli
from mlxtune.data.dataset.batches import collate
from mlxtune.model.convert import Quantization, convert
from mlxtune.ship.artefacts import Peft
from mlxtune.ship.export import ship
from mlxtune.ship.request import Request
from mlxtune.train.run_data import read_data
from mlxtune.train.run_folder import RunFolder

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),  # they do match
    pytest.mark.filterwarnings("ignore:.*target_parameters.*:UserWarning"),
]
RATE, STEPS = 1e-3, 5
# Every step sees the same two rows, at one rate, so that PyTorch's loop can be as plain as it is.
PLAIN = (
    *(f"train.lr={RATE}", "train.schedule=constant", "train.warmup_steps=0", "train.clip_norm=0"),
    *("train.accumulate=1", "train.eval_every=0", "train.save_every=0", "train.keep=last"),
)


@dataclass(frozen=True)
class Case:
    """family: of `tiny.make_model`; bits: of the MLX model; lora: what is trained; changes: of the tiny model; alike:
    whether PEFT trains the same numbers. It adapts gate and up of the experts by one pair of factors, and then trains
    the blocks of it that are 0 in ours: the function that crosses is the same, the steps from there on are not."""

    family: str
    bits: int
    lora: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    alike: bool = True


TIED = {"tie_word_embeddings": True}
CASES = {
    "llama, 4 bits": Case("llama", 4, ("lora.targets=all-linear",)),
    "experts": Case("qwen3_moe", 16, ("lora.targets=[q_proj, down_proj, mlp.gate]",)),
    "experts, gate and up": Case("qwen3_moe", 16, ("lora.targets=all-linear",), alike=False),
    "tied embedding": Case("llama", 16, ("lora.targets=[q_proj]", "lora.train_also=[embeddings, norms]"), TIED),
}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alone.environment(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    conversations = tiny.conversations(3)
    tiny.write_jsonl(folder / "train.jsonl", conversations[:2])
    tiny.write_jsonl(folder / "valid.jsonl", conversations[2:])
    return folder


def crossed(python: Path, *arguments: str | Path) -> None:
    """`mlxtune-convert` where there is no MLX; it must end well."""
    result = alone.command(python, *arguments)
    assert result.returncode == 0, result.stderr


def continued(base: Path, adapter: Path, out: Path, run: Path) -> list[float]:
    """Plain PyTorch: five steps of AdamW on the rows of a run, saved by PEFT. Returns the loss before each, and
    after the last."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True).eval()  # eval: no dropout
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, eps=1e-8, weight_decay=0.0)
    examples = read_data(RunFolder(run).config())[0].train
    batch = collate(examples, [0, 1])
    ids, mask = torch.from_numpy(np.array(batch.ids)).long(), torch.from_numpy(np.array(batch.mask)).float()
    found = []
    for step in range(STEPS + 1):
        logits = model(ids).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (each * mask[:, 1:]).sum() / mask[:, 1:].sum()
        found.append(loss.item())
        if step < STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(str(out), save_embedding_layers=False)
    return found


def steps(run: Path) -> list[float]:
    return [loss for (kind, _), loss in sorted(losses(run).items()) if kind == "train"]


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_that_peft_continued_goes_on_here_as_if_it_had_never_left(
    case: str, python: Path, rows: Path, tmp_path: Path
) -> None:
    """Each stage begins with a fresh optimizer; its losses are those of the same stage without the journey."""
    what = CASES[case]
    hf, model = tiny.make_model(tmp_path / "hf", what.family, **what.changes), tmp_path / "model"
    convert(str(hf), model, Quantization.of(what.bits, 32 if what.bits == 4 else None, None))
    first, stayed, ended = (tmp_path / name for name in ("first", "stayed", "ended"))
    tune(model, rows, first, *PLAIN, "train.steps=10", *what.lora)
    go_on = (*PLAIN, f"train.steps={STEPS}")
    tune(model, rows, stayed, *go_on, f"lora.start_from={first}")
    tune(model, rows, ended, *go_on, f"lora.start_from={stayed}")

    ship(Request(model, first, tmp_path / "peft"), Peft())
    crossed(python, "to-peft", first, tmp_path / "peft-alone", "--base", model)
    same(tmp_path / "peft", tmp_path / "peft-alone")
    crossed(python, "to-hf", model, tmp_path / "dense", "--dtype", "float32")
    abroad = continued(tmp_path / "dense", tmp_path / "peft-alone", tmp_path / "theirs", first)
    count = STEPS if what.alike else 1
    assert abroad[:count] == pytest.approx(steps(stayed)[:count], abs=1e-4)
    assert steps(first)[0] - abroad[-1] > 0.02

    command = ["convert", tmp_path / "theirs", tmp_path / "back", "--base", model]
    CliRunner().invoke(cli, [*map(str, command)], catch_exceptions=False)
    crossed(python, "to-mlx", tmp_path / "theirs", tmp_path / "back-alone", "--base", model)
    same(tmp_path / "back", tmp_path / "back-alone")
    returned = tmp_path / "returned"
    tune(model, rows, returned, *go_on, f"lora.start_from={tmp_path / 'back-alone'}")
    assert steps(returned)[0] == pytest.approx(abroad[-1], abs=1e-4)
    if what.alike:
        assert steps(returned) == pytest.approx(steps(ended), abs=1e-4)

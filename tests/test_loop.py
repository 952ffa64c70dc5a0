"""The training loop against two references: a loop written here with mlx primitives, and PyTorch + PEFT."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
import torch
from mlx.utils import tree_flatten, tree_unflatten
from rich.console import Console
from training import scale_losses

from mlxtune import errors
from mlxtune.adapter import attach
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.cli.display import Display
from mlxtune.compute.loss import Way
from mlxtune.config import resolve
from mlxtune.data.dataset.batches import Plan, collate
from mlxtune.machine import backend
from mlxtune.model.load import load
from mlxtune.train import events, optim
from mlxtune.train.run import tune as train
from mlxtune.train.run_data import read_data
from mlxtune.train.step import Job, StepFunction

SETTINGS = (
    "train.steps=20",
    "train.lr=5e-3",
    "train.schedule=cosine",
    "train.warmup_steps=3",
    "train.weight_decay=0.1",
    "train.batch_rows=3",
    "train.accumulate=2",
    "train.clip_norm=0.5",
    "train.eval_every=0",
    "train.save_every=0",
    "train.seed=3",
    "lora.rank=4",
    "lora.alpha=12",
)


def tune(model: Path, data: Path, out: Path, *settings: str, resume: bool = False) -> list[dict]:
    """Train in this process; return the run's events."""
    resolved = resolve.load(None, (*SETTINGS, *settings), {"model.path": str(model), "data.path": str(data)})
    with Display(Console(quiet=True)) as display:
        train(resolved, out, display, resume)
    return events.read(out)


def losses(found: list[dict]) -> list[float]:
    return [event["loss"] for event in found if event["kind"] == "train"]


def plan_of(model: Path, data: Path, *settings: str) -> tuple[resolve.Config, Plan]:
    resolved = resolve.load(None, (*SETTINGS, *settings), {"model.path": str(model), "data.path": str(data)})
    return resolved, Plan(read_data(resolved)[0].train, resolved.train)


@pytest.fixture(scope="module")
def dense_model(hf_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dense") / "llama"
    assert tiny.mlxtune("convert", hf_model, out, "--bits", "16").returncode == 0
    return out


@pytest.mark.parametrize("kind", ["4-bit", "16-bit"])
def test_losses_equal_a_loop_of_mlx_primitives(
    kind: str, mlx_model: Path, dense_model: Path, data: Path, tmp_path: Path
) -> None:
    """The reference: full logits, log-softmax, masked sum / count, AdamW as in arXiv:1711.05101, written out below."""
    model = mlx_model if kind == "4-bit" else dense_model
    ours = losses(tune(model, data, tmp_path / "run"))
    resolved, plan = plan_of(model, data)
    section = resolved.train
    loaded = load(str(model))
    attach.attach(loaded.model, AdapterPlan.of(loaded.model, resolved.lora), section.seed)

    def mean_loss(parameters: dict, batches: list) -> mx.array:
        loaded.model.update(tree_unflatten(list(parameters.items())))
        total, count = mx.array(0.0), 0
        for batch in batches:
            ids = mx.array(batch.ids)
            logits = loaded.model(ids)[:, :-1]
            log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            picked = mx.take_along_axis(log_p, ids[:, 1:, None], axis=-1)[..., 0]
            mask = mx.array(batch.mask[:, 1:])
            total = total - (picked * mask).sum()
            count += int(mask.sum())
        return total / count

    parameters = dict(tree_flatten(loaded.model.trainable_parameters()))
    m = {name: mx.zeros_like(p) for name, p in parameters.items()}
    v = {name: mx.zeros_like(p) for name, p in parameters.items()}
    reference = []
    for step in range(1, 21):
        loss, gradients = mx.value_and_grad(mean_loss)(parameters, plan.step(step))
        reference.append(loss.item())
        norm = mx.sqrt(sum((g * g).sum() for g in gradients.values())).item()
        rate = optim.learning_rate(section, step, 20)
        for name, g in gradients.items():
            g = g * min(1.0, section.clip_norm / (norm + 1e-6))
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            m_hat, v_hat = m[name] / (1 - 0.9**step), v[name] / (1 - 0.999**step)
            update = m_hat / (mx.sqrt(v_hat) + 1e-8) + section.weight_decay * parameters[name]
            parameters[name] = parameters[name] - rate * update
        mx.eval(parameters, m, v)
    np.testing.assert_allclose(ours, reference, rtol=1e-5)
    assert ours[-1] < 0.95 * ours[0]


def test_losses_equal_pytorch_and_peft(hf_model: Path, dense_model: Path, data: Path, tmp_path: Path) -> None:
    """The same weights, adapter, batches and rates through transformers, PEFT and torch.optim.AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    ours = losses(tune(dense_model, data, tmp_path / "run"))
    resolved, plan = plan_of(dense_model, data)
    section = resolved.train
    loaded = load(str(dense_model))
    spec = AdapterPlan.of(loaded.model, resolved.lora)
    attach.attach(loaded.model, spec, section.seed)
    targets = sorted({key.rsplit(".", 1)[-1] for key in spec.modules})
    base = AutoModelForCausalLM.from_pretrained(hf_model, dtype=torch.float32)
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=12, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for path, layer in attach.adapted_layers(loaded.model).items():
            module = model.get_submodule(f"base_model.model.{path}")
            module.lora_A["default"].weight.copy_(torch.from_numpy(np.array(layer.lora_a)).T)
            module.lora_B["default"].weight.copy_(torch.from_numpy(np.array(layer.lora_b)).T)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, betas=(0.9, 0.999), eps=1e-8, weight_decay=section.weight_decay)
    reference = []
    for step in range(1, 21):
        batches = plan.step(step)
        count = sum(batch.targets for batch in batches)
        total = 0.0
        for batch in batches:
            logits = model(torch.from_numpy(batch.ids).long()).logits[:, :-1]
            wanted = torch.from_numpy(np.where(batch.mask == 1, batch.ids, -100)[:, 1:]).long()
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="sum")
            (loss / count).backward()
            total += loss.item()
        reference.append(total / count)
        torch.nn.utils.clip_grad_norm_(trainable, section.clip_norm)
        optimizer.param_groups[0]["lr"] = optim.learning_rate(section, step, 20)
        optimizer.step()
        optimizer.zero_grad()
    np.testing.assert_allclose(ours, reference, atol=1e-4)


@pytest.mark.parametrize("budget", [(), ("train.batch_rows=null", "train.batch_tokens=256")], ids=["rows", "tokens"])
@pytest.mark.parametrize("turns", [1, 4])
def test_accumulated_micro_batches_weigh_every_token_the_same(
    turns: int, budget: tuple[str, ...], dense_model: Path, data: Path, tmp_path: Path
) -> None:
    """Micro-batches with different token counts: the step's gradient is that of one batch of all examples. With several
    turns a row gives as many examples, and the step has more than two micro-batches.
    """
    if turns > 1:
        said = [row["messages"] for row in tiny.conversations(30)]
        rows = [{"messages": [m for turn in range(1 + row % turns) for m in said[row - turn]]} for row in range(30)]
        data = tiny.write_jsonl(tmp_path / "train.jsonl", rows)
    resolved, plan = plan_of(dense_model, data, "data.expand_turns=all", *budget)
    batches = plan.step(1)
    assert len({batch.targets for batch in batches}) > 1
    if not budget:
        assert (len(batches) > 2) == (turns > 1) and len(plan.rows_of_step(1)) == 6
    loaded = load(str(dense_model))
    dropout = attach.attach(loaded.model, AdapterPlan.of(loaded.model, resolved.lora), 0)
    whole = collate(plan.examples, [index for batch in batches for index in batch.rows.tolist()])
    function = StepFunction(_job(loaded, plan, dropout, resolved), optim.build(resolved.train, {}))
    losses_of_parts, summed = function._accumulate(1, batches)
    loss_of_whole, gradient = function._accumulate(1, [whole])
    assert sum(losses_of_parts).item() == pytest.approx(loss_of_whole[0].item(), rel=1e-6)
    for (name, a), (_, b) in zip(tree_flatten(summed), tree_flatten(gradient), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-5, err_msg=name)


def _job(loaded, plan, dropout, resolved):  # type: ignore[no-untyped-def]
    return Job(loaded.model, Way(), dropout, plan, resolved.train, Path(), None, str, None, None)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("dropout", ["0.0", "0.3"])
def test_a_resumed_run_ends_with_the_same_bits(dropout: str, mlx_model: Path, data: Path, tmp_path: Path) -> None:
    """Ten of twenty steps, then a resume from the checkpoint: adapter and losses equal the uninterrupted run's."""
    settings = (f"lora.dropout={dropout}", "train.save_every=5", "train.eval_every=5")
    whole = tune(mlx_model, data, tmp_path / "whole", *settings)
    tune(mlx_model, data, tmp_path / "cut", *settings)
    # What a crash after step 12 leaves: the checkpoint of step 10 and events up to there.
    for step in (15, 20):
        folder = tmp_path / "cut" / "checkpoints" / f"step-{step:07d}"
        if folder.exists():
            for file in folder.iterdir():
                file.write_bytes(b"torn")
    again = tune(mlx_model, data, tmp_path / "cut2", *settings, "train.keep_last=4")
    for step in (15, 20):
        (tmp_path / "cut2" / "checkpoints" / f"step-{step:07d}" / "optimizer.safetensors").write_bytes(b"torn")
    (tmp_path / "cut2" / "events.jsonl").write_text("")
    resumed = tune(mlx_model, data, tmp_path / "cut2", *settings, "train.keep_last=4", resume=True)
    assert [event["step"] for event in resumed if event["kind"] == "train"] == list(range(11, 21))
    assert losses(resumed) == losses(whole)[10:] == losses(again)[10:]
    assert sum("incomplete" in event.get("text", "") for event in resumed) == 2
    adapters = [(tmp_path / name / "adapters.safetensors").read_bytes() for name in ("whole", "cut2")]
    assert adapters[0] == adapters[1]


def test_the_kept_adapter_is_the_one_with_the_lowest_validation_loss(
    mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    """A rate so high that validation gets worse again: the adapter on disk scores what the best evaluation said."""
    found = tune(mlx_model, data, tmp_path / "run", "train.lr=3", "train.eval_every=2", "train.schedule=constant")
    evaluations = {event["step"]: event["loss"] for event in found if event["kind"] == "eval" and event["step"] > 0}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert best != max(evaluations), "the setting no longer overshoots; the test needs a higher rate"
    assert found[-1]["best_step"] == best
    scored = json.loads(tiny.mlxtune("eval", "--model", mlx_model, "--adapter", tmp_path / "run", "--json").stdout)
    assert scored["tuned"]["loss"] == pytest.approx(evaluations[best], rel=1e-5)


def test_a_non_finite_loss_stops_the_run_names_the_rows_and_keeps_the_last_good_adapter(
    mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN in the loss of step 7."""
    scale_losses(monkeypatch, lambda count: math.nan if count == 13 else 1.0)
    with pytest.raises(errors.UserError) as refused:
        tune(mlx_model, data, tmp_path / "run", "train.eval_every=5")
    assert "step 7" in str(refused.value)
    assert "line " in str(refused.value)
    kept = mx.load(str(tmp_path / "run" / "adapters.safetensors"))
    assert all(mx.isfinite(array).all().item() for array in kept.values())


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        # peak 1, warmup 2 of 6 steps: k/3 while warming up; then 1 - p or (1 + cos(pi p)) / 2 with p = 0, 1/4, 2/4, 3/4
        ("constant", 6, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", 6, [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", 6, [1 / 3, 2 / 3, 1, 0.8535533905932737, 0.5, 0.14644660940672627]),
    ],
)
def test_the_schedule_warms_up_from_above_zero_and_ends_above_it(
    schedule: str, steps: int, expected: list[float]
) -> None:
    section = resolve.load(None, ("train.lr=1.0", f"train.schedule={schedule}", "train.warmup_steps=2")).train
    assert [optim.learning_rate(section, k, steps) for k in range(1, steps + 1)] == pytest.approx(expected)


def test_what_comes_before_the_first_step_is_said_and_what_is_wired_is_let_go(
    mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wired: list[int] = []
    said: list[str] = []
    monkeypatch.setattr(backend, "wire", wired.append)
    monkeypatch.setattr(Display, "_show_doing", lambda display, what: said.append(what))
    tune(mlx_model, data, tmp_path / "run", "train.steps=1")
    assert said == ["reading the model", "proving the fast ways on this model and rows"]
    assert len(wired) == 2 and wired[0] > 0 and wired[1] == 0
    said.clear()
    tune(mlx_model, data, tmp_path / "plain", "train.steps=1", "fast.head=off", "fast.prefix=off")
    assert said == ["reading the model"]  # there is nothing to prove
    assert not {event["kind"] for event in events.read(tmp_path / "plain")} & {*events.SHOWN_ONLY}
    assert "computed: everything, no short cut" in [event.get("text") for event in events.read(tmp_path / "plain")]


def test_a_run_whose_last_evaluation_a_signal_ends_is_not_finished(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    """Whoever resumes it evaluates, and takes no step."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(errors.Interrupted) as stopped:
        tiny.interrupt_after(patch, 2)
        tune(mlx_model, data, tmp_path / "run", "train.steps=2", "train.eval_every=1")
    assert "stopped after step 2; to go on" in str(stopped.value)
    cut = events.read(tmp_path / "run")
    assert cut[-1]["state"] == "interrupted" and [event["step"] for event in cut if event["kind"] == "eval"] == [0, 1]
    whole = tune(mlx_model, data, tmp_path / "run", "train.steps=2", "train.eval_every=1", resume=True)
    assert [event["step"] for event in whole if event["kind"] == "eval"] == [0, 1, 2]
    assert [event["step"] for event in whole if event["kind"] == "train"] == [1, 2]
    assert whole[-1]["state"] == "finished"

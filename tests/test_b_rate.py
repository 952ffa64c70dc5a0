"""LoRA+: the factors B of an adapter learn at a rate of their own, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from training import losses, tune

from mlxtune.adapter import adapter_files, attach
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.config import resolve as configuration
from mlxtune.config.schema import LoraSection
from mlxtune.errors import UserError
from mlxtune.model.arrays import named, to_numpy
from mlxtune.model.load import load
from mlxtune.train import optim

FEW = ("train.steps=4", "train.batch_rows=2", "train.accumulate=1", "train.save_every=2", "train.eval_every=0")


@pytest.mark.parametrize("ratio", [1.0, 16.0, 0.25])
def test_b_learns_as_in_a_parameter_group_of_its_own_in_pytorch(ratio: float, mlx_model: Path) -> None:
    """DoRA with trained norms and embeddings, weight decay, five steps whose rates differ; clipping is shared."""
    import torch

    model = load(str(mlx_model), "float32").model
    section = LoraSection(rank=3, variant="dora", train_also=["norms", "embeddings"], layers=1)
    attach.attach(model, AdapterPlan.of(model, section), seed=1)
    train = configuration.load(None, ("train.weight_decay=0.1", "train.clip_norm=0.5", "data.path=x")).train
    theirs = {
        name: torch.nn.Parameter(torch.from_numpy(to_numpy(array).copy()))
        for name, array in named(model.trainable_parameters()).items()
    }
    of_b = [name for name in theirs if name.endswith("lora_b")]
    assert 0 < len(of_b) < len(theirs)
    groups = [{"params": [theirs[name] for name in theirs if (name in of_b) == is_b]} for is_b in (False, True)]
    reference = torch.optim.AdamW(groups, eps=1e-8, weight_decay=train.weight_decay)
    ours = optim.build(train, model.trainable_parameters(), ratio)
    update = optim.Update(ours, train.clip_norm)
    draw = np.random.default_rng(0)
    for step in range(1, 6):
        gradients = tree_map(
            lambda p: mx.array(draw.normal(size=p.shape).astype(np.float32)), model.trainable_parameters()
        )
        rate = 1e-2 / step
        parameters, ours.state, _ = update(gradients, model.trainable_parameters(), 7, rate)
        model.update(parameters)
        for name, gradient in named(gradients).items():
            theirs[name].grad = torch.from_numpy(to_numpy(gradient) / 7)
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), train.clip_norm)
        for group, of in zip(reference.param_groups, (1.0, ratio), strict=True):
            group["lr"] = rate * of
        reference.step()
    for name, array in named(model.trainable_parameters()).items():
        wanted = theirs[name].detach().numpy()
        np.testing.assert_allclose(to_numpy(array), wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_run_with_a_rate_of_b_is_resumed_with_the_same_bits_and_leaves_an_adapter_of_the_same_kind(
    mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    settings = (*FEW, "lora.b_rate=8")
    usual = tune(mlx_model, data, tmp_path / "usual", *FEW)
    faster = tune(mlx_model, data, tmp_path / "faster", *settings)
    taught = [[event for event in found if event["kind"] == "train"] for found in (usual, faster)]
    assert taught[0][0]["loss"] == taught[1][0]["loss"]  # nothing was learned yet
    assert taught[0][-1]["loss"] != taught[1][-1]["loss"]
    assert [event["lr"] for event in taught[0]] == [event["lr"] for event in taught[1]]
    said = [event["text"] for event in faster if event["kind"] == "note"]
    assert "B learns at 8 times the rate of all the rest (lora.b_rate)" in said
    configs = [(tmp_path / name / "adapter_config.json").read_bytes() for name in ("usual", "faster")]
    assert configs[0] == configs[1]
    whole, adapter = losses(tmp_path / "faster"), (tmp_path / "faster" / "adapters.safetensors").read_bytes()
    moments = tmp_path / "faster" / "checkpoints/step-0000004/optimizer.safetensors"
    assert mx.load(str(moments))["learning_rate"].item() == pytest.approx(taught[1][-1]["lr"])  # type: ignore[index]
    moments.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"lora.b_rate 8.0 -> 4.0"):
        tune(mlx_model, data, tmp_path / "faster", *FEW, "lora.b_rate=4", resume=True)
    tune(mlx_model, data, tmp_path / "faster", *settings, resume=True)
    assert losses(tmp_path / "faster") == whole
    assert (tmp_path / "faster" / "adapters.safetensors").read_bytes() == adapter


def test_a_rate_of_b_that_could_have_no_effect_is_refused(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    model = load(str(mlx_model), "float32").model
    in_full = AdapterPlan({}, trained=("model.norm",))
    attach.attach(model, in_full, 0)
    start = tmp_path / "norm"
    start.mkdir()
    adapter_files.save_config(start, in_full)
    adapter_files.save_tensors(model, start, in_full.file)
    with pytest.raises(UserError, match=r"lora.b_rate 2 has no effect: this adapter trains layers in full"):
        tune(mlx_model, data, tmp_path / "run", *FEW, f"lora.start_from={start}", "lora.b_rate=2")
    for wrong in ("0", "-1", "true"):
        with pytest.raises(UserError, match=r"lora\.b_rate"):
            configuration.load(None, (f"lora.b_rate={wrong}",))

"""NEFTune noise: of the paper's size, each row's own, nothing at evaluation, and the same bits after a resume."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny

from mlxtune.adapter.dropout import DropoutKeys, add_noise


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(16, 8)

    def __call__(self, ids: mx.array) -> mx.array:
        out: mx.array = self.embed_tokens(ids)
        return out


def noise(alpha: float, rows: list[int], lengths: list[int], width: int, step: int = 1) -> np.ndarray:
    """[B, T, D] what the model's embedding adds."""
    model, keys = Model(), DropoutKeys(0.0, alpha)
    ids = mx.zeros((len(rows), width), mx.int32)
    plain = model(ids)
    add_noise(model, keys)
    keys.set(0, step, rows, lengths, layers=3)
    noisy = model(ids)
    keys.clear()
    assert mx.array_equal(model(ids), plain)  # outside training
    assert mx.array_equal(model.embed_tokens.as_linear(plain), plain @ model.embed_tokens.weight.T)  # a tied head
    return np.array(noisy - plain)


def test_noise_is_uniform_up_to_alpha_over_the_root_of_length_times_width() -> None:
    found = noise(5.0, [0], [400], 400)
    largest = 5.0 / (400 * 8) ** 0.5
    assert 0.99 * largest < np.abs(found).max() <= largest * (1 + 1e-4)
    assert found.std() == pytest.approx(largest / 3**0.5, rel=0.03)
    assert abs(found.mean()) < 0.03 * largest


def test_a_rows_noise_depends_on_neither_its_batch_nor_its_padding() -> None:
    alone, beside = noise(5.0, [7], [4], 4), noise(5.0, [3, 7], [6, 4], 6)
    np.testing.assert_allclose(alone[0], beside[1, :4], rtol=1e-5, atol=1e-6)
    assert not beside[1, 4:].any()
    assert not np.allclose(noise(5.0, [7], [4], 4, step=2), alone)


@pytest.fixture(scope="module")
def runs(mlx_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    from mlxtune.train import events

    found = {}
    for alpha in ("0", "5"):
        out = tmp_path_factory.mktemp("neftune") / "run"
        settings = (f"train.neftune_alpha={alpha}", "train.steps=4", "train.eval_every=4", "train.warmup_steps=0")
        done = tiny.mlxtune(
            "train", "--model", mlx_model, "--data", data, "--out", out, *(x for s in settings for x in ("--set", s))
        )
        assert done.returncode == 0, done.stderr
        found[alpha] = events.read(out)
    return found


def test_noise_changes_training_but_not_the_evaluation_before_it(runs: dict[str, list[dict]]) -> None:
    before = [next(event["loss"] for event in run if event["kind"] == "eval") for run in runs.values()]
    losses = [[event["loss"] for event in run if event["kind"] == "train"] for run in runs.values()]
    assert before[0] == pytest.approx(before[1], rel=1e-6)  # without noise a shared prefix is computed once
    assert all(one != other for one, other in zip(*losses, strict=True))

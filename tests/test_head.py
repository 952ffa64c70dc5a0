"""The head run apart from the trunk, and the loss on supervised tokens alone, against the plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from rounding import as_a_gpu
from ways import make

from mlxtune.adapter import attach
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.compute import fast_ways, head_loss, loss, stages
from mlxtune.compute.head import Split
from mlxtune.compute.loss import LossInputs, Way
from mlxtune.config.schema import LoraSection
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import collate
from mlxtune.data.dataset.forest import Forest
from mlxtune.evaluate.score import score
from mlxtune.model.load import load

IDS = np.random.default_rng(0).integers(3, 250, (3, 14))


@pytest.fixture(scope="module", params=["llama", "llama tied", "qwen2", "gemma2", "granite", "mixtral", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    kind, _, tied = request.param.partition(" ")
    changes = {"tie_word_embeddings": True} if tied else {}
    folder = tiny.make_model(tmp_path_factory.mktemp("head") / kind, kind, **changes)
    return load(str(folder)).model


def batch() -> loss.Batch:
    draw = np.random.default_rng(1)
    return collate([Example(row.tolist(), draw.integers(0, 2, len(row)).tolist()) for row in IDS], [0, 1, 2])


def test_trunk_then_head_is_the_model(model: nn.Module) -> None:
    """Soft-caps (gemma2), logit scales (granite), tied embeddings: the model's own forward is the oracle."""
    ids = mx.array(IDS)
    split = Split.of(model, ids)
    assert split is not None
    hidden = split.hidden(ids)
    logits = split.logits(hidden.reshape(-1, hidden.shape[-1])[mx.array([3, 20, 41])])
    expected = np.array(model(ids)).reshape(42, -1)[[3, 20, 41]]
    np.testing.assert_allclose(np.array(logits), expected, atol=1e-5)


def test_a_trunk_that_returns_logits_is_not_split() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Embedding(300, 320)

        def __call__(self, ids: mx.array) -> mx.array:
            return self.model(ids) * 2

    class Honest(Whole):
        def __call__(self, ids: mx.array) -> mx.array:
            return self.model(ids)

    assert Split.of(Whole(), mx.array(IDS)) is not None  # doubling is a head like any other
    assert Split.of(nn.Sequential(nn.Embedding(300, 8)), mx.array(IDS)) is None
    assert Split.of(Honest(), mx.array(IDS)) is not None


def test_a_head_that_depends_on_more_than_the_hidden_state_is_not_split() -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Embedding(300, 16)
            self.head = nn.Linear(16, 320)

        def __call__(self, ids: mx.array) -> mx.array:
            return self.head(self.model(ids)) + ids[..., None].astype(mx.float32)

    assert Split.of(Peeks(), mx.array(IDS)) is None


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_a_split_of_a_16_bit_model_is_held_to_what_float32_shows(
    dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that is half a percent off, about the last digit of bfloat16; the right one sums in another order."""
    as_a_gpu(monkeypatch, 3e-6)
    model = make("llama", dtype)
    assert Split.of(model, mx.array(IDS)) is not None
    assert model(mx.array(IDS)).dtype == dtype
    real = Split.logits
    monkeypatch.setattr(Split, "logits", lambda self, rows: real(self, rows) * 1.005)
    assert Split.of(model, mx.array(IDS)) is None


def test_supervised_loss_and_gradients_equal_the_plain_ones(model: nn.Module) -> None:
    """B is perturbed first: at zero every gradient of A is zero, and half of the comparison could not fail."""
    split = Split.of(model, mx.array(IDS))
    assert split is not None
    if not attach.adapted_layers(model):
        attach.attach(model, AdapterPlan.of(model, LoraSection(rank=2)), seed=0)
        for index, layer in enumerate(attach.adapted_layers(model).values()):
            layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(index))
    value, gradient = nn.value_and_grad(model, lambda b: loss.of_batch(model, Way(split), b))(batch())
    plain, plain_gradient = nn.value_and_grad(model, lambda b: loss.plain(model, b))(batch())
    assert value.item() == pytest.approx(plain.item(), rel=1e-5)
    for (name, a), (_, b) in zip(tree_flatten(gradient), tree_flatten(plain_gradient), strict=True):
        scale = np.abs(np.array(b)).max()
        assert scale > 0, name
        np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-4 * scale, err_msg=name)


@pytest.mark.parametrize("path", ["split", "whole"])
def test_a_score_counts_every_supervised_token_once(model: nn.Module, path: str) -> None:
    """Against full logits and numpy: sum of the loss, tokens, and hits."""
    scored = score(model, Split.of(model, mx.array(IDS)) if path == "split" else None, [batch()])
    logits = np.array(model(mx.array(IDS)))[:, :-1].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    mask = batch().mask[:, 1:] == 1
    wanted = IDS[:, 1:]
    picked = np.take_along_axis(log_p, wanted[..., None], -1)[..., 0]
    assert scored.tokens == mask.sum()
    assert scored.loss_sum == pytest.approx(-picked[mask].sum(), rel=1e-5)
    assert scored.correct == (logits.argmax(-1) == wanted)[mask].sum()


@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        *[(tied, settings) for tied in (True, False) for settings in ({}, {"train_also": ["embeddings"]})],
        *[(tied, {"train_also": ["norms"]}) for tied in (True, False)],
        (False, {"train_also": ["head"]}),
        (False, {"targets": ["q_proj", "lm_head"]}),
    ],
    ids=str,
)
def test_what_trains_in_a_head_is_told_without_weights_as_its_gradients_tell(
    tied: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    """A plan counts on what the run finds out."""
    model = load(str(tiny.make_model(tmp_path / "m", "llama", tie_word_embeddings=tied))).model
    attach.attach(model, AdapterPlan.of(model, LoraSection(**{"rank": 2, **settings})), 0)
    ids = mx.array(IDS)
    split = Split.of(model, ids)
    assert split is not None
    assert fast_ways.head_trains(model) == split.head_is_trained(model, split.hidden(ids)[0, -1:])


class OneMatrix:
    """In the place of a Split: a head of one matrix."""

    def __init__(self, vocabulary: int, width: int) -> None:
        self.vocabulary = vocabulary
        self.matrix = mx.random.normal((width, vocabulary), key=mx.random.key(0))

    def logits(self, rows: mx.array) -> mx.array:
        return rows @ self.matrix


@pytest.mark.parametrize("saving", [False, True])
def test_a_chunks_logits_are_in_memory_three_times_at_most(saving: bool) -> None:
    """They themselves, less the largest of each row, and the gradient."""
    split: Any = OneMatrix(8_000, 1024)
    rows = mx.random.normal((700, 1024), key=mx.random.key(1))
    targets = mx.random.randint(0, split.vocabulary, (700,), key=mx.random.key(2))
    inputs = LossInputs([], mx.arange(700), targets, None, Forest(()))
    cut = list(head_loss.chunks(rows, split.vocabulary, saving))
    assert cut[0].stop == (128 if saving else 256)
    in_order: stages.Stages = []
    mx.eval(split.matrix, rows, targets)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    value, gradient = mx.value_and_grad(
        lambda rows: head_loss.through_frozen(split, rows, inputs, cut, in_order, kernel=False)
    )(rows)
    stages.compute(in_order, value, gradient)
    of_logits, of_rows = 4 * cut[0].stop * split.vocabulary, 4 * rows.size
    assert 2.5 * of_logits < mx.get_peak_memory() - before < 3.05 * of_logits + 2 * of_rows

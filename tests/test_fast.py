"""Every fast way against the plain one: losses, gradients, twenty steps; and the proof that guards them.

The oracle is `loss.plain`: all logits of the model's own forward, cross-entropy times mask. Gradients are compared in
float64 too, where rounding cannot hide a small mistake.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from ways import BATCH, MIXTURES, SHAPES, assert_close, batch, make, rows, steps, ways

from mlxtune.adapter import attach
from mlxtune.adapter.layers import LoRALinear
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.compute import head_loss, parts, prefix, proof, proof_rows
from mlxtune.compute.fit_memory import Given
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.config import resolve as configuration
from mlxtune.config.schema import LoraSection
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset import forest
from mlxtune.data.dataset.batches import Plan, collate
from mlxtune.model import linux_cpu
from mlxtune.model.arrays import named
from mlxtune.train.choice import choose


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows a chunk, so that every loss here goes through several, the last one shorter."""
    monkeypatch.setattr(head_loss, "MIN_CHUNK_ROWS", 5)
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 1)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("precision", ["float32", "float64", "4-bit"])
def test_losses_and_gradients_are_those_of_the_plain_way(kind: str, precision: str) -> None:
    if precision == "float64" and kind in MIXTURES:
        pytest.skip("MLX multiplies gathered experts in float32 only")
    model = make(kind, mx.float64 if precision == "float64" else mx.float32, 4 if precision == "4-bit" else 0)
    for label, way in ways(model, BATCH).items():
        if way.powers and precision == "float64":  # they are for float32 alone
            continue
        assert_close(model, way, BATCH, *((1e-12, 1e-6) if precision == "float64" else (1e-5, 3e-5)), label)


@pytest.mark.parametrize("lengths", [(12, 12), (12, 4), (3, 14), (2, 3), (20, 2)], ids=str)
@pytest.mark.parametrize("kind", ["llama windows", "gemma3_text", "gpt_oss"])
def test_windows_shorter_and_longer_than_prefix_and_suffix(
    kind: str, lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forest, "MIN_SAVED", 1e-9)
    common, own = lengths
    found = batch(common, [own, own, own])
    assert prefix.length_for_batch(found, common) == common
    for powers in (False, True):
        assert_close(make(kind), Way(prefix=common, recompute=1, powers=powers), found, 1e-5, 3e-5, kind)


@pytest.mark.parametrize("trained", ["head LoRA", "head", "tied embedding"])
def test_a_trained_head_gets_its_gradients(trained: str) -> None:
    model = make("llama tied" if trained == "tied embedding" else "llama")
    split = Split.of(model, mx.array(BATCH.ids))
    assert split is not None
    hidden = split.hidden(mx.array(BATCH.ids))[0, -1:]
    assert not split.head_is_trained(model, hidden)
    if trained == "head LoRA":
        head = LoRALinear(model.lm_head, 2, 2.0, mx.random.key(5), 99, model.dropout_keys)
        model.lm_head = head  # B is zero, as it is when a run begins
        head.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    else:
        (model.model.embed_tokens if trained == "tied embedding" else model.lm_head).unfreeze()
    assert split.head_is_trained(model, hidden)
    if trained == "head LoRA":
        model.lm_head.lora_b = 0.05 * mx.random.normal((2, 320), key=mx.random.key(6))
    assert_close(model, Way(split, True, 0, 1), BATCH, 1e-5, 3e-5, trained)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_checkpointed_blocks_draw_the_same_dropout_again(kind: str) -> None:
    """Another mask in the second run would leave the loss right and the gradients 80% wrong."""
    model = make(kind, dropout=0.1)
    split = Split.of(model, mx.array(BATCH.ids))
    whole = proof.sums_of(model, Way(), BATCH)[0]
    lengths = (BATCH.lengths - 1).tolist()
    model.dropout_keys.set(3, 1, BATCH.rows.tolist(), lengths, len(attach.adapted_layers(model)))
    assert proof.sums_of(model, Way(), BATCH)[0] != pytest.approx(whole, rel=1e-4)
    assert_close(model, Way(split, recompute=1), BATCH, 1e-5, 3e-5, kind)


@pytest.mark.parametrize(
    ("kind", "bits", "dropout"),
    [("llama tied", 0, 0.0), ("qwen3", 4, 0.1), ("gemma3_text", 4, 0.0), ("granite", 0, 0.1), ("mixtral", 0, 0.0)],
)
def test_twenty_steps_have_the_losses_of_the_plain_loop(kind: str, bits: int, dropout: float) -> None:
    plain = steps(kind, bits, dropout, Way())
    assert plain[-1] < 0.97 * plain[0]
    # Rounding grows in twenty steps, through the choice of experts most: 1.2e-5 with OpenBLAS's kernels for some
    # processors, below 1e-5 with those for others. Planted faults are off by 0.4 and more.
    np.testing.assert_allclose(steps(kind, bits, dropout, None), plain, rtol=5e-5 if kind == "mixtral" else 1e-5)


def choose_for(model: nn.Module, examples: list[Example], config: configuration.Config) -> tuple[Way, list[str]]:
    found = choose(Given(model, {}, mx.float32), config, Plan(examples, config.train))
    return found.way, found.notes


def chosen(model: nn.Module, *settings: str, examples: list[Example] | None = None) -> tuple[Way, str]:
    resolved = configuration.load(None, settings)
    way, notes = choose_for(model, examples or rows(17, [12, 9, 4, 15]), resolved)
    assert way.powers == (linux_cpu.worth_it() and (way.split is not None or way.prefix is not None))
    assert set(way.parts) <= set(parts.PARTS)
    return replace(way, powers=False, parts=()), "\n".join(notes)


def test_a_proof_leaves_every_bit_of_the_adapter_as_it_was() -> None:
    model = make("llama")
    before = {name: np.array(array) for name, array in named(model.trainable_parameters()).items()}
    way, notes = chosen(model, "train.checkpoint_layers=2")
    assert (way.split is not None, way.prefix, way.recompute, notes) == (True, 17, 2, "")
    for name, array in named(model.trainable_parameters()).items():
        assert np.array_equal(np.array(array), before[name])


def test_a_fast_way_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: windows forgotten in the masks over a prefix."""
    monkeypatch.setattr(prefix.PrefixCache, "make_mask", lambda *_, **__: "causal")
    way, notes = chosen(make("gemma3_text"))
    assert way.prefix is None
    assert way.split is not None
    assert "not used" in notes and "prefix of 17" in notes
    assert chosen(make("qwen2"))[0].prefix == 17  # which has no windows


def test_a_wrong_head_gradient_is_found_even_though_the_loss_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    real = head_loss.through_frozen
    monkeypatch.setattr(
        head_loss, "through_frozen", lambda *a: real(*a) + 0.01 * (a[1].sum() - mx.stop_gradient(a[1].sum()))
    )
    way, notes = chosen(make("llama"), "fast.prefix=off")
    assert way == Way()
    assert "the head on supervised tokens only" in notes


def test_a_grouped_run_whose_rows_share_nothing_is_proven_on_whole_rows() -> None:
    batch = proof_rows.rows_for(rows(0, [40, 30, 20, 10]), Way(prefix=0), grouped=True)
    assert batch.lengths.tolist() == [40, 30]


def test_a_fast_way_that_a_model_fails_with_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise AttributeError("no keys_and_values\nin this cache")

    monkeypatch.setattr(prefix.PrefixCache, "update_and_fetch", fails)
    way, notes = chosen(make("llama"))
    assert way.prefix is None and way.split is not None
    assert "fails with it" in notes and "(AttributeError: no keys_and_values)" in notes


def test_models_are_in_training_mode_in_a_step_and_as_before_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm loads models for generating; recurrent layers then take kernels that have no gradient."""
    model, seen = make("llama"), []
    model.eval()
    kind = type(model.layers[0].mlp)
    real = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, x: (seen.append(self.training), real(self, x))[1])
    proof.sums_of(model, Way(), BATCH)
    assert seen == [True, True] and not model.training and not model.layers[0].mlp.training


def test_a_wrong_power_of_two_is_found_and_the_rest_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux_cpu, "worth_it", lambda: True)
    monkeypatch.setattr(linux_cpu, "LOG2_E", 1.45)
    way, notes = choose_for(make("llama"), rows(17, [12, 9, 4, 15]), configuration.load(None, ()))
    assert (way.powers, way.prefix, way.split is not None) == (False, 17, True)
    assert "not used" in notes[0] and "exponentials as powers of two" in notes[0]


def test_the_prefix_is_off_where_it_cannot_be_exact_and_a_line_says_so() -> None:
    way, notes = chosen(make("llama", dropout=0.1), "lora.dropout=0.1")
    assert way.prefix is None and "lora.dropout" in notes
    module = importlib.import_module("mlx_lm.models.mamba")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "state_size": 8, "num_hidden_layers": 2, "conv_kernel": 4}
    sizes |= {"vocab_size": 320, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4}
    recurrent = module.Model(module.ModelArgs.from_dict({"model_type": "mamba", **sizes}))
    attach.attach(recurrent, AdapterPlan.of(recurrent, LoraSection(rank=2)), 0)
    way, notes = chosen(recurrent)
    assert way.prefix is None and "keep more than keys and values" in notes


def test_options_switch_the_fast_ways_off() -> None:
    assert chosen(make("llama"), "fast.head=off", "fast.prefix=off") == (Way(), "")
    assert chosen(make("llama"), "fast.head=off")[0] == Way(prefix=17)
    assert chosen(make("llama"), examples=rows(0, [12, 9, 7]))[0].prefix is None


def test_rows_supervised_from_the_start_share_nothing() -> None:
    example = Example([5, 6, 7, 8, 9, 10], [0, 1, 1, 1, 1, 1])
    assert prefix.shared_by_run([example, example]) == 0
    assert prefix.shared_by_batch(collate([example, example], [0, 1])) == 0
    whole = Example(list(range(5, 25)), [1] * 20)
    assert prefix.shared_by_batch(collate([whole, whole], [0, 1])) == 0
    same = Example(list(range(5, 25)), [0] * 19 + [1])  # equal rows: the predictor of the target stays
    assert prefix.shared_by_run([same, same]) == prefix.shared_by_batch(collate([same, same], [0, 1])) == 18

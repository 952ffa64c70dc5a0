"""One product for the A of layers with one input: losses, gradients, counts, memory, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import peaks
import pytest
import ways
import zoo
from ways import BATCH, COMMON, MIXTURES, SHAPES, assert_close, batch, make, rows

from mlxtune.adapter import attach
from mlxtune.adapter.layers import DoRALinear, LoRALinear
from mlxtune.compute import fast_ways, parts, proof, thin
from mlxtune.compute.fit_memory import Given
from mlxtune.compute.gradients import Gradients
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.compute.proof import Room
from mlxtune.config import resolve as configuration
from mlxtune.config.schema import LoraSection
from mlxtune.data.dataset.batches import Plan
from mlxtune.errors import UserError
from mlxtune.train.choice import choose

OTHER = batch(17, [11, 12, 5])  # of the shape of BATCH


def thin_way(model: nn.Module, **others: Any) -> Way:
    split = Split.of(model, mx.array(BATCH.ids))
    assert split is not None
    return Way(split, parts=("thin",), **others)


# Losses and gradients.


@pytest.mark.parametrize("kind", SHAPES)
def test_losses_and_gradients_are_those_of_the_plain_way(kind: str) -> None:
    model = make(kind)
    for shared, recompute in ((None, 0), (0, 1)):
        assert_close(model, thin_way(model, prefix=shared, recompute=recompute), BATCH, 1e-5, 3e-5, kind)
    if kind not in MIXTURES:  # MLX multiplies gathered experts in float32 only
        precise = make(kind, mx.float64)
        assert_close(precise, thin_way(precise), BATCH, 1e-12, 1e-6, kind)


@pytest.mark.parametrize(
    ("kind", "together"),
    [("qwen3_5", [2, 3, 2, 4]), ("deepseek_v3", [2, 2, 2, 2])],
)
def test_gated_delta_layers_and_latent_attention_too(
    kind: str, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"qwen3_5": {"text_config": {**COMMON, **zoo.SHAPES["qwen3_5_text"], "model_type": "qwen3_5_text"}}}
    monkeypatch.setitem(SHAPES, kind, shape.get(kind) or zoo.SHAPES[kind])
    model = make(kind)
    assert [len(group.layers) for group in thin._groups(model)] == together
    assert_close(model, thin_way(model), BATCH, 1e-5, 3e-5, kind)


def test_lengths_of_dora_and_ranks_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "LoraSection", partial(LoraSection, variant="dora"))
    model = make("llama")
    key: LoRALinear = model.layers[0].self_attn.k_proj
    assert type(key) is DoRALinear
    key.rank, key.lora_a, key.lora_b = 5, mx.random.normal((64, 5)), 0.05 * mx.random.normal((5, 32))
    assert_close(model, thin_way(model), BATCH, 1e-5, 3e-5, "dora")


def test_a_layer_that_is_given_something_else_gets_its_own_product() -> None:
    query, key, _ = thin._groups(make("llama"))[1].layers
    group = thin._Group([query, key])
    x, equal = mx.ones((1, 3, 64)), mx.ones((1, 3, 64))
    group.product(query, x)
    assert group._given is x
    mx.eval(group.product(key, equal))
    assert group._given is equal  # of another array, though its numbers are the same
    assert mx.allclose(group.product(key, 2 * x), 2 * x @ key.lora_a, rtol=1e-5)
    group.product(query, x)
    assert mx.array_equal(group.product(query, x), group.product(query, x))  # twice in a row


# What is computed, and what is kept.


@pytest.mark.parametrize(("recompute", "products"), [(0, 4), (1, 8)])
def test_seven_products_of_a_block_become_four_and_nothing_is_kept(
    recompute: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of query, key and value one, of gate and up one; output and down have their own."""
    model = make("llama")
    gradients = Gradients(model, thin_way(model, recompute=recompute))
    made: list[thin._Group] = []
    apart: list[LoRALinear] = []
    real, own = thin._Group._products_of, LoRALinear._narrowed
    monkeypatch.setattr(thin._Group, "_products_of", lambda group, x: made.append(group) or real(group, x))
    monkeypatch.setattr(LoRALinear, "_narrowed", lambda layer, x: apart.append(layer) or own(layer, x))
    mx.eval(gradients(BATCH))
    assert len(made) + len(apart) == 2 * products
    assert all(group._given is None and not group._products for group in made)
    assert all(type(layer) is LoRALinear for layer in attach.adapted_layers(model).values())


def test_the_second_step_uses_nothing_of_the_first() -> None:
    model = make("llama")
    gradients = Gradients(model, thin_way(model))
    mx.eval(gradients(BATCH))
    for layer in attach.adapted_layers(model).values():
        layer.lora_a = 1.5 * layer.lora_a
    value, found = gradients(OTHER)
    wanted = proof.plain_sums(model, OTHER)
    assert proof.difference(proof._read(value, found), wanted).within(1e-5, 3e-5)


def test_compiled_it_has_the_same_gradients() -> None:
    group = thin._groups(make("llama"))[1]
    model = nn.Module()
    model.attention = nn.Module()
    model.attention.q_proj, model.attention.k_proj, model.attention.v_proj = group.layers

    def summed(factors: list[mx.array], x: mx.array) -> mx.array:
        with thin.within(model):
            for layer, factor in zip(group.layers, factors, strict=True):
                layer.lora_a = factor
            return sum((layer(x).sum() for layer in group.layers), mx.array(0.0))

    before = [layer.lora_a for layer in group.layers]
    compiled = mx.compile(mx.grad(summed))
    for x in (mx.ones((1, 3, 64)), mx.arange(192).reshape(1, 3, 64) / 64):
        wanted = mx.grad(summed)(before, x)
        got = compiled(before, x)
        assert all(mx.allclose(one, other, rtol=1e-5) for one, other in zip(got, wanted, strict=True))


# Proofs.


def takes_the_factor_of_a_sister(patch: pytest.MonkeyPatch) -> None:
    real = thin._Group._products_of

    def exchanged(group: thin._Group, x: mx.array) -> dict[int, mx.array]:
        found = real(group, x)
        return dict(zip(found, reversed(list(found.values())), strict=True))

    patch.setattr(thin._Group, "_products_of", exchanged)


def keeps_what_it_made_first(patch: pytest.MonkeyPatch) -> None:
    kept: dict[tuple[int, ...], mx.array] = {}

    def product(group: thin._Group, layer: LoRALinear, x: mx.array) -> mx.array:
        for number, z in group._products_of(x).items():
            kept.setdefault((number, *x.shape), mx.stop_gradient(z))
        return kept[(id(layer), *x.shape)]

    patch.setattr(thin._Group, "product", product)


@pytest.mark.parametrize("bug", [takes_the_factor_of_a_sister, keeps_what_it_made_first])
def test_a_wrong_product_is_refused_and_said(
    bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama")
    config = configuration.load(None, ("train.batch_rows=3", "fast.thin=on"))
    examples = Plan(rows(17, [12, 9, 4]), config.train)
    found = choose(Given(model, {}, mx.float32), config, examples)
    assert "thin" in found.way.parts and not found.notes
    assert parts.PARTS["thin"].says in fast_ways.describe(found.way)
    bug(monkeypatch)
    assert "does not reproduce" in proof.prove(model, thin_way(model), BATCH, mx.float32, Room()).wrong
    found = choose(Given(model, {}, mx.float32), config, examples)
    assert "thin" not in found.way.parts and found.way.parts
    assert any("does not reproduce" in note and parts.PARTS["thin"].says in note for note in found.notes)


# Settings.


def test_it_is_off_unless_asked_for() -> None:
    assert "thin" not in parts.of_model(make("llama"), configuration.load(None, ()).fast, dropout=False)


@pytest.mark.parametrize(
    ("settings", "targets", "why"),
    [
        (("lora.dropout=0.1",), (), "with lora.dropout each layer has masks of its own"),
        ((), ("q_proj", "down_proj"), "this model and its adapter have nothing for it"),
        (("fast.head=off", "fast.prefix=off"), (), "so the plain way is taken"),
    ],
)
def test_asked_for_in_vain_it_is_an_error(
    settings: tuple[str, ...], targets: tuple[str, ...], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if targets:
        monkeypatch.setattr(ways, "LoraSection", partial(LoraSection, targets=list(targets)))
    config = configuration.load(None, ("fast.thin=on", *settings))
    with pytest.raises(UserError, match=f"fast.thin on has no effect: .*{why}"):
        fast_ways.fastest_way(make("llama"), rows(17, [12, 9]), config)


# Memory.


def test_the_memory_of_a_step_is_predicted_within_15_percent() -> None:
    sizes = {"model_type": "llama", **COMMON, "num_hidden_layers": 4, "intermediate_size": 512}
    examples = peaks.examples(3, vocabulary=250, longest=120)
    predicted, measured = peaks.of_step(sizes, ("train.batch_rows=1", "fast.thin=on"), examples)
    assert predicted.total == pytest.approx(measured, rel=0.15)

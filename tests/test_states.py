"""Gated delta layers hand the state at a trunk's end to its branches: loss, gradients, and what is planted is found."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peaks
import pytest
from test_branches import batch_of
from test_memory_blocks import sizes_of
from test_parts import DELTA, LINEAR
from ways import BATCH, COMMON, SHAPES, make, rows

from mlxtune.compute import fast_ways, prefix, proof
from mlxtune.compute.fit_memory import Given
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.compute.proof import Room, Verdict
from mlxtune.config import resolve as configuration
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset import forest
from mlxtune.data.dataset.batches import Batch, Plan
from mlxtune.model import gated_delta
from mlxtune.model.prefix_cache import LayerCache, StateCache
from mlxtune.train.choice import choose

ALL_PARTS = ("gated_delta", "activations", "last_block")


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are short: a pass more is worth few tokens. One family has two gated delta layers below its attention."""
    mx.random.seed(0)  # of what `make` leaves as the family draws it
    monkeypatch.setattr(forest, "A_PASS", 4)
    for kind, shape in DELTA.items():
        monkeypatch.setitem(SHAPES, kind, shape)
    two = {**LINEAR, "num_hidden_layers": 3, "full_attention_interval": 3}
    monkeypatch.setitem(SHAPES, "qwen3_5 two", {"text_config": two})


def conversation() -> Batch:
    """Three turns of one conversation, each behind its own prompt, the last of them twice: a trunk that is left after
    20, 23 and 40 tokens. Between the first two depths are as many tokens as the convolutions look back.
    """
    draw = np.random.default_rng(0)
    history = draw.integers(3, 250, 40).tolist()
    asked = (20, 23, 40, 40)
    own = (12, 18, 15, 13)
    found = [history[:depth] + draw.integers(3, 250, more).tolist() for depth, more in zip(asked, own, strict=True)]
    return batch_of(found, [depth + 2 for depth in asked], 1)


CONVERSATION = conversation()


def remembering(kind: str) -> nn.Module:
    """A model of `make` whose gated delta layers keep their state over many tokens, as trained ones do."""
    model = make(kind)
    for layer in model.layers:
        for attention in (layer.get("linear_attn"), layer.get("self_attn")):
            if attention is not None and "A_log" in attention:
                attention.A_log = mx.full(attention.A_log.shape, -3.0)
    return model


def assert_is(model: nn.Module, way: Way, batch: Batch, wanted: proof.Sums, label: str) -> None:
    found = proof.difference(proof.sums_of(model, way, batch), wanted)
    assert found.within(1e-5, 3e-5), (label, str(found))


def split_of(model: nn.Module) -> Split | None:
    return Split.of(model, mx.array(BATCH.ids))


def test_the_trunk_is_computed_in_three_pieces_whose_ends_are_left() -> None:
    found = prefix.as_computed(make("qwen3_5"), prefix.forest_of_batch(CONVERSATION, 0))
    trunks = [(each.start, each.width, each.leaves) for each in found.passes if each.is_trunk]
    assert trunks == [(0, 20, None), (20, 3, 0), (23, 17, 1)]
    leaving = [(each.rows, each.start, each.leaves) for each in found.passes if not each.is_trunk]
    assert leaving == [((0,), 20, 0), ((1,), 23, 1), ((3, 2), 40, 2)]
    llama = prefix.forest_of_batch(CONVERSATION, 0)
    assert prefix.as_computed(make("llama"), llama) is llama


@pytest.mark.parametrize("kind", DELTA)
def test_losses_and_gradients_are_those_of_the_plain_way(kind: str) -> None:
    model = remembering(kind)
    assert prefix.can_branch(model) and not prefix.keeps_keys_alone(model)
    wanted = proof.plain_sums(model, CONVERSATION)
    assert_is(model, Way(split_of(model), prefix=0, parts=ALL_PARTS), CONVERSATION, wanted, kind)
    assert_is(model, Way(prefix=0, parts=ALL_PARTS, recompute=1), CONVERSATION, wanted, kind)


def test_states_are_handed_on_where_layers_go_token_by_token() -> None:
    model = remembering("qwen3_5")
    assert_is(model, Way(prefix=0, recompute=2), BATCH, proof.plain_sums(model, BATCH), "token by token")


def test_states_go_through_mlxs_kernel_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU its function is a loop of MLX's own."""
    monkeypatch.setattr(gated_delta, "has_kernel", lambda q, v, a: a.ndim == 3)
    model = remembering("qwen3_5")
    way = Way(split_of(model), prefix=0, parts=("gated_delta", "kernels"))
    assert_is(model, way, CONVERSATION, proof.plain_sums(model, CONVERSATION), "kernel")


# Faults that are planted.

Patch = pytest.MonkeyPatch


def hands_on(patch: Patch, changed: Callable[[StateCache, list[mx.array]], list[mx.array]]) -> None:
    real = StateCache.before
    patch.setattr(StateCache, "before", lambda self, start: changed(self, real(self, start)))


def begins_with_zeros(patch: Patch) -> None:
    hands_on(patch, lambda _, arrays: [mx.zeros_like(array) for array in arrays])


def forgets_its_matrices(patch: Patch) -> None:
    hands_on(patch, lambda _, arrays: [*arrays[:-1], mx.zeros_like(arrays[-1])])


def forgets_what_its_convolutions_saw(patch: Patch) -> None:
    hands_on(patch, lambda _, arrays: [*map(mx.zeros_like, arrays[:-1]), arrays[-1]])


def sends_no_gradient_back(patch: Patch) -> None:
    hands_on(patch, lambda _, arrays: [mx.stop_gradient(array) for array in arrays])


def takes_the_state_of_the_trunks_very_end(patch: Patch) -> None:
    """At whatever depth a branch leaves."""
    patch.setattr(prefix, "as_computed", lambda _, passes: passes)


def takes_another_layers(patch: Patch) -> None:
    real = prefix._caches

    def caches(model: nn.Module, each: forest.Pass, trunk: list[LayerCache]) -> list[LayerCache]:
        layers = real(model, each, trunk)
        layers[0].state, layers[1].state = layers[1].state, layers[0].state
        return layers

    patch.setattr(prefix, "_caches", caches)


def takes_the_state_of_the_piece_before(patch: Patch) -> None:
    """Of a trunk that leaves one."""
    real = prefix._caches
    earlier: dict[int, list[LayerCache]] = {}

    def caches(model: nn.Module, each: forest.Pass, trunk: list[LayerCache]) -> list[LayerCache]:
        layers = real(model, each, trunk)
        if each.is_trunk and trunk:
            earlier[id(layers)] = trunk
        for layer, before in zip(layers, earlier.get(id(trunk), []), strict=False):
            if isinstance(layer, StateCache):
                layer.state = before.recorded
        return layers

    patch.setattr(prefix, "_caches", caches)


# Where every block is checkpointed, and where none is.
BUGS: list[tuple[Callable[[Patch], None], int]] = [
    (begins_with_zeros, 1),
    (forgets_its_matrices, 0),
    (forgets_what_its_convolutions_saw, 1),
    (sends_no_gradient_back, 0),
    (sends_no_gradient_back, 1),
    (takes_the_state_of_the_trunks_very_end, 0),
    (takes_another_layers, 1),
    (takes_the_state_of_the_piece_before, 0),
]
Known = tuple[nn.Module, proof.Sums]


@pytest.fixture(scope="module")
def known() -> list[Known]:
    """A model with two gated delta layers, once it was made, and its sums by the plain way."""
    return []


@pytest.mark.parametrize(("bug", "recompute"), BUGS, ids=lambda value: getattr(value, "__name__", value))
def test_a_state_that_is_carried_wrongly_is_seen_by_the_proof(
    bug: Callable[[Patch], None], recompute: int, known: list[Known], monkeypatch: Patch
) -> None:
    way = Way(prefix=0, recompute=recompute, parts=ALL_PARTS)
    if not known:
        model = remembering("qwen3_5 two")
        assert proof.prove(model, way, CONVERSATION, mx.float32, Room()) == Verdict()
        known.append((model, proof.plain_sums(model, CONVERSATION)))
    model, wanted = known[0]
    bug(monkeypatch)
    assert not proof.difference(proof.sums_of(model, way, CONVERSATION), wanted).within(*proof.ALLOWED)


# Runs.


def test_a_run_of_a_gated_delta_model_shares_its_prefix() -> None:
    config = configuration.load(None, ("train.batch_rows=2",))
    found = choose(Given(remembering("qwen3_5"), {}, mx.float32), config, Plan(rows(17, [30, 27]), config.train))
    assert found.way.prefix == 17
    assert found.way.parts == ALL_PARTS
    assert not any("prefix" in note for note in found.notes)


@pytest.mark.parametrize("family", ["lfm2", "mamba2"])
def test_models_with_states_of_other_kinds_compute_rows_whole(family: str) -> None:
    model = peaks.build(sizes_of(family))
    config = configuration.load(None, ())
    length, why = fast_ways.shared_prefix(model, rows(17, [12, 9]), config)
    assert length is None and why.endswith("some of this model's layers keep more than keys and values")


TOGETHER, IN_TURNS = (), ("train.checkpoint_layers=all",)


@pytest.mark.parametrize(
    ("kind", "settings", "examples"),
    [
        ("olmo_hybrid", TOGETHER, rows(40, [24, 20, 17, 25])),
        ("qwen3_next", IN_TURNS, rows(40, [24, 20, 17, 25])),
        ("kimi_linear", IN_TURNS, peaks.conversation(3, vocabulary=250)),
    ],
)
def test_the_memory_of_states_that_are_handed_on_is_predicted_within_15_percent(
    kind: str, settings: tuple[str, ...], examples: list[Example]
) -> None:
    sizes = {"model_type": kind, **COMMON, **DELTA[kind]}
    predicted, measured = peaks.of_step(sizes, ("train.batch_rows=8", *settings), examples)
    assert predicted.total == pytest.approx(measured, rel=0.15)

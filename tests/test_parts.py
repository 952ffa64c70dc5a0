"""The parts of a model that are computed otherwise, each against the plain way: losses, gradients, memory, proofs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peaks
import pytest
import zoo
from mlx_lm.models import switch_layers
from ways import BATCH, COMMON, MIXTURES, SHAPES, assert_close, batch, make, rows

from mlxtune.compute import head_loss, loss, parts, proof
from mlxtune.compute.fit_memory import Given
from mlxtune.compute.gradients import Gradients
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.compute.proof import Room
from mlxtune.config import resolve as configuration
from mlxtune.data.dataset.batches import Batch, Plan
from mlxtune.machine import backend
from mlxtune.model import gated_delta, gated_mlp
from mlxtune.train.choice import choose

LINEAR = {**COMMON, **zoo.SHAPES["qwen3_5_text"], "model_type": "qwen3_5_text"}
# Key heads are fewer than value heads but in OLMo's, which also takes beta up to 2; Kimi's gates are vectors.
DELTA: dict[str, dict[str, Any]] = {
    "qwen3_5": {"text_config": LINEAR},
    "qwen3_next": {**zoo.SHAPES["qwen3_next"], "partial_rotary_factor": 0.5},
    "olmo_hybrid": {**zoo.SHAPES["olmo_hybrid"], "linear_allow_neg_eigval": True},
    "kimi_linear": {
        **zoo.SHAPES["kimi_linear"],
        "linear_attn_config": {"kda_layers": [1], "num_heads": 2, "head_dim": 16, "short_conv_kernel_size": 4},
        "num_experts": 2,
        "model_max_length": 512,
    },
}
# SwiGLU by name, in mixtures, clamped; GeGLU written out.
GATED = ("llama", "granite", "olmo3", "mixtral", "gpt_oss", "gemma2", "gemma3_text", "olmo_hybrid")


@pytest.fixture(autouse=True)
def more_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    mx.random.seed(0)  # of what `make` leaves as the family draws it
    for kind, shape in DELTA.items():
        monkeypatch.setitem(SHAPES, kind, shape)


def way_with(model: nn.Module, *names: str, **others: Any) -> Way:
    split = Split.of(model, mx.array(BATCH.ids))
    assert split is not None
    return Way(split, parts=names, **others)


def assert_is_the_plain_way(kind: str, dtype: mx.Dtype, *names: str, **others: Any) -> None:
    model = make(kind, dtype)
    limits = (1e-6, 1e-6) if dtype == mx.float64 else (1e-5, 3e-5)
    assert_close(model, way_with(model, *names, **others), BATCH, *limits, f"{kind}, {names}")


@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind not in MIXTURES])
def test_in_float64_each_part_and_all_together_are_the_plain_way(kind: str) -> None:
    """MLX's CPU has no gathered products and no convolutions in float64; its cross-entropy gives float32."""
    every = ("activations", "last_block", "kernels")
    for names in (*((name,) for name in every), every):
        assert_is_the_plain_way(kind, mx.float64, *names)


# Gated delta layers.


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("kind", DELTA)
def test_gated_delta_layers_in_chunks_are_mlx_lms_loop_over_tokens(kind: str, recompute: int) -> None:
    assert_is_the_plain_way(kind, mx.float32, "gated_delta", recompute=recompute)


def given(tokens: int, vector: bool, dtype: mx.Dtype = mx.float32) -> list[mx.array]:
    """Arguments of mlx-lm's function: two rows, two key heads, four value heads; each third token repeats its key."""

    def draw(*shape: int) -> mx.array:
        draw.number += 1  # type: ignore[attr-defined]
        return mx.random.normal(shape, key=mx.random.key(draw.number)).astype(dtype)  # type: ignore[attr-defined]

    draw.number = 0  # type: ignore[attr-defined]
    q, k, v = draw(2, tokens, 2, 8), draw(2, tokens, 2, 8), draw(2, tokens, 4, 6)
    k = k / mx.linalg.norm(k.astype(mx.float32), axis=-1, keepdims=True).astype(dtype)
    k = mx.where((mx.arange(tokens) % 3 == 0)[None, :, None, None], k[:, :1], k)
    gates = (2, tokens, 4, 8) if vector else (2, tokens, 4)
    return [
        q,
        k,
        v,
        draw(*gates),
        draw(2, tokens, 4),
        draw(4, 1) if vector else draw(4),
        draw(4, 8) if vector else draw(4),
    ]


def summed(update: Callable[..., Any], **options: Any) -> Callable[..., mx.array]:
    """A number that all results of an update go into, each of them with a weight of its own."""

    def of(*arrays: mx.array) -> mx.array:
        total = mx.array(0.0)
        for index, out in enumerate(update(*arrays, **options)):
            weights = mx.random.normal(out.shape, key=mx.random.key(100 + index))
            total = total + (out.astype(mx.float32) * weights).sum()
        return total

    return of


@pytest.mark.parametrize("dtype", [mx.float32, mx.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("vector", [False, True])
def test_states_go_from_chunk_to_chunk_and_out(tokens: int, vector: bool, dtype: mx.Dtype) -> None:
    """In float64 too, which MLX's convolution, that stands before, cannot compute in."""
    state = 0.5 * mx.random.normal((2, 4, 6, 8), key=mx.random.key(50)).astype(dtype)
    arrays = [*given(tokens, vector, dtype), state]
    every = tuple(range(len(arrays)))
    expected, wanted = mx.value_and_grad(summed(gated_delta.mlx_lm_update, use_kernel=False), every)(*arrays)
    value, got = mx.value_and_grad(summed(gated_delta.in_chunks, use_kernel=False), every)(*arrays)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    of_gradient = 1e-6 if dtype == mx.float64 else 3e-5
    for one, other in zip(got, wanted, strict=True):
        assert np.linalg.norm(np.array(one - other)) <= of_gradient * np.linalg.norm(np.array(other)) + 1e-6


def test_strong_decays_neither_overflow_nor_divide_by_zero() -> None:
    for vector in (False, True):
        arrays = given(40, vector)
        arrays[3], arrays[5] = 30 * arrays[3], arrays[5] + 3  # exp(-1,000) and less
        value, gradients = mx.value_and_grad(summed(gated_delta.in_chunks), tuple(range(7)))(*arrays)
        expected = summed(gated_delta.mlx_lm_update, use_kernel=False)(*arrays)
        assert value.item() == pytest.approx(expected.item(), rel=1e-4)
        assert all(np.isfinite(np.array(gradient)).all() for gradient in gradients)


def test_rows_with_a_mask_are_left_to_mlx_lm() -> None:
    arrays = given(20, vector=False)
    mask = mx.arange(20)[None] < mx.array([[20], [11]])
    own, ours = (
        update(*arrays, None, mask, use_kernel=False) for update in (gated_delta.mlx_lm_update, gated_delta.in_chunks)
    )
    assert all(mx.array_equal(one, other) for one, other in zip(own, ours, strict=True))


@pytest.fixture
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's function in place of its kernel: on the CPU it is a loop of MLX's own."""
    monkeypatch.setattr(gated_delta, "has_kernel", lambda q, v, a: a.ndim == 3)


@pytest.mark.parametrize("names", [("kernels",), ("gated_delta", "kernels")], ids=str)
@pytest.mark.parametrize("kind", DELTA)
def test_gated_delta_layers_through_mlxs_function_are_mlx_lms_loop(
    kind: str, names: tuple[str, ...], kernels_everywhere: None
) -> None:
    assert_is_the_plain_way(kind, mx.float32, *names)


def test_gates_stay_float32_for_mlxs_kernel(kernels_everywhere: None) -> None:
    """In 16 bits MLX's function rounds g: of 0.998 is left 1.0 or 0.996."""
    arrays = given(200, False, mx.bfloat16)
    arrays[3], arrays[5] = arrays[3] - 6, mx.zeros(4)
    wanted, _ = gated_delta.mlx_lm_update(*arrays, use_kernel=False)
    got, _ = gated_delta._kernel_or(gated_delta.in_chunks)(*arrays)
    rounded, _ = mx.fast.gated_delta_update(
        *arrays[:3], mx.exp(gated_delta._gates(*arrays[3:])[0]), mx.sigmoid(arrays[4]), mx.zeros((2, 4, 6, 8))
    )

    def off(y: mx.array) -> float:
        difference = (y - wanted).astype(mx.float32)
        return float(mx.linalg.norm(difference) / mx.linalg.norm(wanted.astype(mx.float32)))

    assert got.dtype == mx.bfloat16
    assert off(got) < 4e-3 < off(rounded)


@pytest.mark.parametrize(
    ("kind", "heads", "width", "gates", "expected"),
    [
        ("metal", (16, 32), 128, 3, True),
        ("metal", (16, 32), 64, 3, False),
        ("metal", (8, 8), 128, 3, False),
        ("metal", (32, 32), 128, 4, False),  # a vector for each head
        ("cuda", (16, 32), 128, 3, False),
        ("cpu", (16, 32), 128, 3, False),
    ],
)
def test_mlx_has_kernels_for_some_shapes_on_metal(
    kind: str, heads: tuple[int, int], width: int, gates: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "kind", lambda: kind)
    q, v = mx.zeros((1, 2, heads[0], width)), mx.zeros((1, 2, heads[1], width))
    a = mx.zeros((1, 2, heads[1], width)[:gates])
    assert gated_delta.has_kernel(q, v, a) is expected


# Gated activations.


@pytest.mark.parametrize("kind", GATED)
def test_activations_that_are_computed_again_have_the_same_gradients(kind: str) -> None:
    model = make(kind)
    assert gated_mlp.is_in(model)
    assert_close(model, way_with(model, "activations"), BATCH, 1e-6, 1e-5, kind)


def test_every_gated_activation_of_mlx_lm_is_found() -> None:
    """A family of mlx-lm whose name for an activation was changed would keep everything again, in silence."""
    for module, name in gated_mlp.FUNCTIONS:
        peaks.importlib.import_module(f"mlx_lm.models.{module}")
        assert gated_mlp.function(module, name) is not None, (module, name)
    for module, name in gated_mlp.WRITTEN_OUT:
        assert hasattr(peaks.importlib.import_module(f"mlx_lm.models.{module}"), name), (module, name)


def test_a_function_of_a_familys_own_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("mixtral")
    own = switch_layers.swiglu
    with parts.within(model, ["activations"]):
        assert switch_layers.swiglu is not own
    assert switch_layers.swiglu is own
    monkeypatch.setattr(switch_layers, "swiglu", other := lambda gate, up: gate * up)
    with parts.within(model, ["activations"]):
        assert switch_layers.swiglu is other


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("kind", [*SHAPES, "qwen3_5"])
def test_the_last_block_ends_on_supervised_positions(kind: str, recompute: int) -> None:
    model = make(kind)
    for shared in (None, 0):
        way = way_with(model, "last_block", prefix=shared, recompute=recompute)
        assert_close(model, way, BATCH, 1e-5, 3e-5, kind)


# Cross-entropy.


@pytest.mark.parametrize("kind", ["llama", "llama tied", "gemma2", "granite", "gpt_oss"])
def test_mlxs_cross_entropy_behind_soft_caps_and_scales(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "MIN_CHUNK_ROWS", 5)
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 1)
    assert_is_the_plain_way(kind, mx.float32, "kernels")
    model = make(kind)
    trained = way_with(model, "kernels", head_trained=True)
    assert_close(model, trained, BATCH, 1e-5, 3e-5, kind)


def test_targets_that_only_fill_up_weigh_nothing_in_mlxs_cross_entropy() -> None:
    model = make("llama")
    way = way_with(model, "kernels")
    filled = loss.inputs_of(BATCH, None, count=BATCH.targets + 7)

    def of(inputs: loss.LossInputs) -> Any:
        return nn.value_and_grad(model, lambda: loss.of_inputs(model, way, inputs, []))()

    wanted = proof.plain_sums(model, BATCH)
    assert proof.difference(proof._read(*of(filled)), wanted).within(1e-5, 3e-5)
    assert filled.weights is not None
    counted = replace(filled, weights=mx.ones_like(filled.weights))
    assert not proof.difference(proof._read(*of(counted)), wanted).within(1e-2, 1e-2)


# Proofs.


def forgets_the_state_at_a_border(patch: pytest.MonkeyPatch) -> None:
    def each_alone(*given: Any) -> Any:
        *arrays, state = given
        cut = [[array[:, at : at + gated_delta.CHUNK] for array in arrays] for at in range(0, arrays[0].shape[1], 16)]
        return mx.concatenate([real(*piece, state)[0] for piece in cut], axis=1), state

    real = gated_delta.chunked
    patch.setattr(gated_delta, "chunked", each_alone)


def made_to_remember(kind: str) -> nn.Module:
    """A model of `make`, whose gated delta layers keep their state over many tokens, as trained ones do."""
    model = make(kind)
    if kind in DELTA:
        attention = model.layers[0].linear_attn
        attention.A_log = mx.full(attention.A_log.shape, -3.0)
    return model


def exchanges_gate_and_up(patch: pytest.MonkeyPatch) -> None:
    real = gated_mlp.keeping_inputs
    patch.setattr(gated_mlp, "keeping_inputs", lambda function: lambda gate, up: real(function)(up, gate))


def counts_the_target_twice(patch: pytest.MonkeyPatch) -> None:
    real = mx.fast.cross_entropy
    patch.setattr(mx.fast, "cross_entropy", lambda logits, targets: 2 * real(logits, targets))


@pytest.mark.parametrize(
    ("bug", "kind", "part"),
    [
        (forgets_the_state_at_a_border, "qwen3_5", "gated_delta"),
        (exchanges_gate_and_up, "llama", "activations"),
        (exchanges_gate_and_up, "gemma2", "activations"),
        (counts_the_target_twice, "llama", "kernels"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_wrong_part_is_refused(
    bug: Callable[[pytest.MonkeyPatch], None], kind: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where memory makes the proof compute its blocks again, which the run will not."""
    model = made_to_remember(kind)
    way = way_with(model, part)
    assert not proof.prove(model, way, BATCH, mx.float32, Room()).wrong
    bug(monkeypatch)
    for room in (Room(), Room(checkpointed=True)):
        assert "does not reproduce this model" in proof.prove(model, way, BATCH, mx.float32, room).wrong


def test_a_wrong_part_is_left_out_and_said_while_the_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    forgets_the_state_at_a_border(monkeypatch)
    config = configuration.load(None, ("train.batch_rows=2",))
    found = choose(Given(made_to_remember("qwen3_5"), {}, mx.float32), config, Plan(rows(17, [30, 27]), config.train))
    assert found.way.parts == ("activations", "last_block")
    assert any("does not reproduce" in note and "gated delta layers in chunks" in note for note in found.notes)


def test_a_part_that_is_switched_off_is_not_computed_otherwise() -> None:
    config = configuration.load(None, ("fast.gated_delta=off",))
    assert parts.of_model(make("qwen3_5"), config.fast, dropout=False) == ("activations", "last_block")
    assert parts.of_model(make("llama"), configuration.load(None, ()).fast, dropout=True) == ("activations",)


# Memory.


def deep(kind: str) -> dict[str, Any]:
    """A shape of `ways.make` whose peak is in the blocks, and in what a part changes there."""
    if kind == "qwen3_5":
        return {"text_config": {**LINEAR, "linear_key_head_dim": 64, "linear_value_head_dim": 64}}
    if kind == "kimi_linear":
        heads = {"kda_layers": [1], "num_heads": 4, "head_dim": 64, "short_conv_kernel_size": 4}
        return {**DELTA[kind], "linear_attn_config": heads}
    return {**SHAPES[kind], "num_hidden_layers": 4, "intermediate_size": 512}


def peak(model: nn.Module, way: Way, rows_: Batch) -> int:
    """Bytes of loss and gradients over what was there before: the highest of some goes, as in `peaks`."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(peaks.GOES):
        mx.eval(Gradients(model, way)(rows_))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(
    ("kind", "part", "share"),
    [
        ("qwen3_5", "gated_delta", 0.25),
        ("kimi_linear", "gated_delta", 0.65),
        ("llama", "activations", 0.92),
        ("gemma2", "activations", 0.9),
        ("mixtral", "activations", 0.92),
        ("llama", "last_block", 0.96),
    ],
)
def test_a_part_takes_less_memory(kind: str, part: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, f"{kind} deep", deep(kind))
    model = make(f"{kind} deep")
    few = batch(17, [180] if part == "gated_delta" else [80, 70, 40])
    with_part, without = peak(model, way_with(model, part), few), peak(model, way_with(model), few)
    assert with_part < share * without


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen3_5", ()),
        ("qwen3_5", ("train.checkpoint_layers=all",)),
        ("kimi_linear", ()),
        ("llama", ()),
        ("mixtral", ()),
    ],
    ids=str,
)
def test_the_memory_of_the_parts_is_predicted_within_15_percent(kind: str, settings: tuple[str, ...]) -> None:
    examples = peaks.examples(3, vocabulary=250, longest=120)
    sizes = {"model_type": kind, **COMMON, **deep(kind)}
    predicted, measured = peaks.of_step(sizes, ("train.batch_rows=1", *settings), examples)
    assert predicted.total == pytest.approx(measured, rel=0.15)

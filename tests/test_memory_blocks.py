"""What single kinds of blocks keep: predicted from their graphs, measured by MLX."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peaks
import pytest
import zoo
from mlx.utils import tree_flatten
from mlx_lm.models.gated_delta import gated_delta_ops

from mlxtune.adapter import attach
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.compute.memory import block_call, blocks, prediction
from mlxtune.compute.memory.graph import traced
from mlxtune.compute.memory.kernels import Device, tiled
from mlxtune.compute.memory.ledger import Ledger
from mlxtune.compute.memory.step import RunOptions, StepSizes
from mlxtune.compute.memory.strides import of_view, strides_as
from mlxtune.config.schema import LoraSection
from mlxtune.data.dataset.forest import whole
from mlxtune.machine import backend
from mlxtune.train.preparation import lasting_bytes

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "norm_eps": 1e-6,
    "layer_norm_epsilon": 1e-6,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "type": "default"},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "time_step_limit": [0.0, 100.0],
    "use_conv_bias": True,
    "use_bias": False,
    "conv_bias": False,
    "block_multiple_of": 32,
    "block_dim": 64,
    "block_ff_dim": 128,
    "conv_dim": 64,
    "full_attn_idxs": [1],
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
}
METAL, CPU = Device("metal", (0, 32, 4)), Device("cpu", (0, 32, 4))


def sizes_of(kind: str) -> dict[str, Any]:
    if kind == "qwen3_5":
        text = {**SIZES, **zoo.SHAPES["qwen3_5_text"], "model_type": "qwen3_5_text"}
        return {"model_type": kind, "text_config": text}
    return {**SIZES, **zoo.SHAPES[kind], "model_type": kind}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen3_5", ()),  # one gated delta block, token by token, and one of attention
        ("qwen3_5", ("train.checkpoint_layers=all",)),
        ("mamba2", ()),
        ("lfm2", ()),  # a short convolution
        ("mixtral", ()),
        ("llama", ("lora.layers=1",)),  # the block below keeps nothing
        ("gpt_oss", ("lora.layers=1", "train.checkpoint_layers=all")),
    ],
)
def test_every_kind_of_block_is_predicted_within_15_percent(kind: str, settings: tuple[str, ...]) -> None:
    """The largest of a few peaks: how far MLX's threads lag behind, and so what is alive at once, differs each time."""
    rows = peaks.examples(8, vocabulary=250, longest=120)
    several = [peaks.of_step(sizes_of(kind), ("train.batch_rows=2", *settings), rows) for _ in range(4)]
    measured = max(peak for _, peak in several)
    assert several[0][0].total == pytest.approx(measured, rel=0.15)


def test_blocks_below_the_first_adapter_keep_nothing() -> None:
    """Of four equal blocks the last one, the third by its path, or the embedding decide how many keep something."""
    sizes = {**SIZES, "model_type": "llama", "num_hidden_layers": 4}

    def kept(**section: Any) -> list[bool]:
        model = peaks.build(sizes)
        attach.attach(model, AdapterPlan.of(model, LoraSection(**section)), 0)
        reached = prediction._reached(model)
        costs, _ = blocks.costs(model, whole(1, 32), reached, CPU)
        return [cost.kept > cost.given for (cost,) in costs]

    assert kept() == [True] * 4
    assert kept(layers=1) == [False, False, False, True]
    assert kept(layers=1, train_also=["layers.2.mlp"]) == [False, False, True, True]
    assert kept(layers=1, train_also=["embeddings"]) == [True] * 4


def test_half_precision_is_not_predicted_too_low() -> None:
    rows = peaks.examples(4, vocabulary=250, longest=80)
    for dtype in (mx.bfloat16, mx.float16):
        predicted, measured = peaks.of_step(sizes_of("llama"), ("train.batch_rows=2",), rows, dtype=dtype)
        assert 0.8 < predicted.total / measured < 1.4


def gated_delta(tokens: int, heads: int, width: int) -> tuple[Any, list[mx.array]]:
    """(gradients of mlx-lm's loop over the tokens, what it is given)."""

    def summed(*arrays: mx.array) -> mx.array:
        return mx.square(gated_delta_ops(*arrays)[0]).sum()

    narrow = (1, tokens, heads // 2, width)
    shapes = [narrow, narrow, (1, tokens, heads, width), (1, tokens, heads), (1, tokens, heads)]
    given = [mx.full(shape, 0.1) for shape in shapes]
    mx.eval(given)
    return lambda *arrays: list(mx.grad(summed, argnums=(0, 1, 2, 3, 4))(*arrays)), given


@pytest.mark.parametrize(("tokens", "heads", "width"), [(64, 4, 32), (128, 4, 32), (64, 8, 32)])
def test_the_loop_over_tokens_is_predicted_within_15_percent(tokens: int, heads: int, width: int) -> None:
    """A state of [heads, width, width] a token, several times over, and whole gradients of single slices."""
    gradients, given = gated_delta(tokens, heads, width)
    graph = traced(gradients, given)
    predicted = Ledger(graph, graph.inputs, block_call.QUEUED).compute(graph.outputs)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(gradients(*given))
    assert predicted == pytest.approx(mx.get_peak_memory() - before, rel=0.15)
    assert predicted > 3 * tokens * heads * width * width * 4


QWEN35_4B = {
    "model_type": "qwen3_5",
    "text_config": {
        "model_type": "qwen3_5_text",
        "hidden_size": 2560,
        "num_hidden_layers": 32,
        "intermediate_size": 9216,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 248320,
        "rms_norm_eps": 1e-6,
        "linear_num_value_heads": 32,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "rope_theta": 1e7,
            "type": "default",
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
        },
        "hidden_act": "silu",
    },
}


def test_a_gated_delta_model_is_predicted_as_published() -> None:
    """Qwen3.5-4B in 4 bits, its last 4 blocks, all checkpointed, one row (mlx issue 3539, on an M4 Max): 10.9 GB
    at 512 tokens, out of memory above 32 GB at 1,024. No weight is made.
    """
    model = peaks.build(QWEN35_4B)
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, 64, 4)
    attach.attach(model, AdapterPlan.of(model, LoraSection(rank=8, layers=4)), 0)
    found = {}
    for width in (512, 1024):
        shape = StepSizes(1, width - 1, 0, width // 2)
        predicted = prediction.predict(model, QWEN35_4B, shape, RunOptions(2, 64, 1, 0.0, METAL))
        assert isinstance(predicted, prediction.Memory) and predicted.by_token
        found[width] = predicted.total / 1e9
    assert 7.3 < found[512] < 16.4
    assert found[1024] > 21
    assert "token by token" in predicted.lines()[0]


def test_a_longer_loop_is_extrapolated_from_short_rows() -> None:
    model = peaks.build(sizes_of("qwen3_5"))
    attach.attach(model, AdapterPlan.of(model, LoraSection()), 0)
    reached = [False, True]
    exact = blocks._traced(model, whole(1, 300), reached, CPU, last_whole=False, targets=0, frozen=0)
    found, by_token = blocks.costs(model, whole(1, 300), reached, CPU)
    assert by_token
    for (one,), (other,) in zip(found, exact, strict=True):
        assert one.again == pytest.approx(other.again, rel=0.15)
        assert one.slices == other.slices


@pytest.mark.parametrize(
    ("device", "width", "mask", "sinks", "expected"),
    [
        (METAL, 128, "causal", False, True),
        (METAL, 128, None, False, True),
        (METAL, 48, "causal", False, False),
        (METAL, 128, "causal", True, False),
        (METAL, 128, mx.ones((2, 2), mx.bool_), False, False),
        (Device("metal", (0, 32, 3)), 128, "causal", False, False),
        (Device("cuda", (0, 32, 4)), 128, "causal", False, False),
        (CPU, 128, "causal", False, False),
    ],
)
def test_attention_goes_back_tile_by_tile_where_mlx_has_kernels_for_it(
    device: Device, width: int, mask: Any, sinks: bool, expected: bool
) -> None:
    assert tiled(device, width, mask, sinks) is expected


def test_no_row_of_scores_is_counted_where_attention_is_tiled() -> None:
    """Twice the tokens: twice the bytes with kernels; without, four times those of scores [heads, tokens, tokens]."""
    model = peaks.build({**SIZES, "model_type": "llama", "head_dim": 64})
    attach.attach(model, AdapterPlan.of(model, LoraSection()), 0)

    def kept(device: Device, width: int) -> int:
        (_, (last,)), _ = blocks.costs(model, whole(1, width), [False, True], device)
        return last.kept

    assert kept(METAL, 512) == pytest.approx(2 * kept(METAL, 256), rel=0.02)
    older = Device("metal", (0, 32, 0))
    assert kept(older, 512) - kept(METAL, 512) == pytest.approx(4 * 512 * 512 * 4, rel=0.1)


def test_a_model_that_cannot_be_followed_is_said_and_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peaks.build(sizes_of("llama"))
    attach.attach(model, AdapterPlan.of(model, LoraSection()), 0)

    def fails(*arguments: Any) -> None:
        raise ValueError("no state for primitive New")

    monkeypatch.setattr(block_call, "traced", fails)
    monkeypatch.setattr(block_call, "_known", {})
    found = prediction.predict(model, sizes_of("llama"), StepSizes(1, 32, 0, 8), RunOptions(4, 64, 0, 0.0, CPU))
    assert isinstance(found, prediction.NotPredicted)
    assert "not predicted" in found.note and "primitive New" in found.note


def test_the_model_is_itself_again_after_a_prediction() -> None:
    model = peaks.build(sizes_of("mixtral"))
    attach.attach(model, AdapterPlan.of(model, LoraSection()), 0)
    kinds, attention = [type(module) for _, module in model.named_modules()], mx.fast.scaled_dot_product_attention
    ids = mx.array([[3, 4, 5]])
    before = model(ids)
    prediction.predict(model, sizes_of("mixtral"), StepSizes(1, 32, 0, 8), RunOptions(4, 64, 1, 0.0, METAL))
    assert [type(module) for _, module in model.named_modules()] == kinds
    assert mx.fast.scaled_dot_product_attention is attention
    assert mx.array_equal(model(ids), before)


def test_the_optimizer_update_is_the_peak_where_the_adapter_is_large() -> None:
    rows = peaks.examples(4, vocabulary=250, longest=61)
    settings = ("train.batch_rows=1", "train.checkpoint_layers=all", "lora.rank=512")
    predicted, measured = peaks.of_step(sizes_of("llama"), settings, rows)
    assert predicted.update > 0
    # Old and new state are both counted whole; where MLX may reuse the old one's buffers, it takes less.
    assert 0.65 * predicted.total < measured < 1.05 * predicted.total


@pytest.mark.parametrize(("blocks_", "gib", "expected"), [(36, 16, 9), (36, 128, 58), (80, 16, 4), (80, 8, 4)])
def test_compiled_signatures_are_kept_by_their_bytes(blocks_: int, gib: int, expected: int) -> None:
    assert prediction.kept_signatures(blocks_, gib << 30) == expected


def test_a_reshape_copies_what_does_not_lie_in_order() -> None:
    assert strides_as((2, 3, 4), (12, 4, 1), (6, 4)) == (4, 1)
    assert strides_as((2, 3, 4), (12, 1, 3), (2, 12)) is None  # the last two axes were swapped
    assert strides_as((2, 8), (16, 1), (2, 2, 4)) == (16, 4, 1)  # a half of the columns, divided into heads


def test_views_lie_in_memory_as_numpy_lays_them() -> None:
    """An array [3, 1, 4] that was transposed before, so that its strides are not those of its rows."""
    array = np.zeros((4, 1, 3), np.float32).transpose(2, 1, 0)
    views = [
        ("Transpose", [(2, 0, 1)], array.transpose(2, 0, 1)),
        ("Broadcast", [], np.broadcast_to(array, (2, 3, 5, 4))),
        ("ExpandDims", [(1,)], array[:, None]),
        ("Squeeze", [(1,)], array[:, 0]),
        ("Slice", [(0, 0, 0), (3, 1, 4), (2, 1, 3)], array[::2, :, ::3]),
    ]

    def strides_of(view: np.ndarray) -> list[int]:
        """In elements, of the axes that have more than one place: of the others they mean nothing."""
        pairs = zip(view.shape, view.strides, strict=True)
        return [stride // view.itemsize for length, stride in pairs if length > 1]

    own = tuple(stride // array.itemsize for stride in array.strides)
    for name, arguments, view in views:
        found = of_view(name, arguments, array.shape, own, view.shape)
        assert found is not None
        kept = [stride for length, stride in zip(view.shape, found, strict=True) if length > 1]
        assert kept == strides_of(view), name
    assert of_view("Contiguous", [], array.shape, own, array.shape) is None


def test_only_what_stays_is_wired_and_only_on_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    for name in ("wired", "memory", "cache"):
        monkeypatch.setattr(mx, f"set_{name}_limit", lambda size, name=name: calls.append((name, size)))
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 << 30})
    backend.wire(1000)
    assert calls == []
    monkeypatch.setattr(backend, "kind", lambda: "metal")
    backend._limit_memory(mx)
    assert [name for name, _ in calls] == ["memory", "cache"]
    calls.clear()
    backend.wire(1000)
    backend.wire(64 << 30)
    assert calls == [("wired", 1000), ("wired", 12 << 30)]


def test_what_stays_are_the_weights_the_adapter_and_two_moments() -> None:
    model = peaks.build(sizes_of("llama"))
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    attach.attach(model, AdapterPlan.of(model, LoraSection()), 0)
    adapter = sum(array.nbytes for array in attach.trained_tensors(model).values())
    assert lasting_bytes(model) == weights + 3 * adapter

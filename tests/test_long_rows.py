"""Long rows: attention that keeps no scores, blocks in pieces and nested; against the plain way, and their memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peaks
import pytest
from test_memory import SIZES
from training import tune
from ways import BATCH, COMMON, MIXTURES, SHAPES, assert_close, batch, make, rows

from mlxtune.compute import attention, fast_ways, fit_memory, pieces, proof
from mlxtune.compute.attention import Chunked, Masks, Reach
from mlxtune.compute.fit_memory import Given
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.compute.proof import Room, Verdict
from mlxtune.config import resolve as configuration
from mlxtune.data.dataset.batches import Plan
from mlxtune.model import linux_cpu
from mlxtune.model.corrections import extent

LATENT = {  # multi-head latent attention: the scores' positions come as a mask of numbers
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
WINDOWS = {"sliding_window_pattern": 2, "sliding_window": 64}
KINDS = (*SHAPES, "deepseek_v3")
OWN_SCORES = ("gemma2", "deepseek_v3")  # whose attention is not `mx.fast.scaled_dot_product_attention` with booleans
ROWS = batch(17, [30, 27])


@pytest.fixture(autouse=True)
def latent_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "deepseek_v3", LATENT)
    monkeypatch.setitem(SHAPES, "llama deep", {"num_hidden_layers": 8})


def counted(patch: pytest.MonkeyPatch, kind: type, name: str) -> list[int]:
    """Where each call of a method is noted."""
    calls: list[int] = []
    real = getattr(kind, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    patch.setattr(kind, name, call)
    return calls


def masks(queries: int, keys: int, made: Masks) -> dict[str, Any]:
    """Masks that are known by what they were made of, and others."""
    places = mx.arange(keys - queries, keys)[:, None] - mx.arange(keys)[None]
    some = mx.random.uniform(shape=(2, 1, queries, keys), key=mx.random.key(9)) < 0.7
    return {
        "none": None,
        "causal": "causal",
        "window": made.make(queries, keys - queries, window_size=5),
        "of rows": some & (places >= 0) | (places == 0),
        "a row of padding": (places >= 0) & (mx.arange(queries)[:, None] != 4),
    }


@pytest.mark.parametrize("queries", [3, 7])
@pytest.mark.parametrize(("heads", "groups", "own", "keys"), [(6, 2, 17, 17), (4, 1, 9, 21), (2, 2, 16, 30)])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_in_chunks_has_the_values_and_gradients_of_mlx(
    queries: int, heads: int, groups: int, own: int, keys: int, sinks: bool
) -> None:
    """Values narrower than keys, chunks that do not divide the queries, and chunks that a window has left behind."""
    shapes = [(2, heads, own, 16), (2, groups, keys, 16), (2, groups, keys, 12), (heads,), (2, heads, own, 12)]
    *given, w = (2 * mx.random.normal(shape, mx.float64, key=mx.random.key(i)) for i, shape in enumerate(shapes))
    given = given if sinks else given[:3]
    made = Masks()
    chunked = Chunked(queries, "cpu", made)
    for name, mask in masks(own, keys, made).items():

        def in_chunks(q: mx.array, k: mx.array, v: mx.array, s: Any = None, mask: Any = mask) -> mx.array:
            return (attention._with_gradients(chunked, q, k, v, 0.3, mask, s) * w).sum()

        def whole(q: mx.array, k: mx.array, v: mx.array, s: Any = None, mask: Any = mask) -> mx.array:
            return (linux_cpu.mlx_attention(q, k, v, scale=0.3, mask=mask, sinks=s) * w).sum()

        which = tuple(range(len(given)))
        value, got = mx.value_and_grad(in_chunks, argnums=which)(*given)
        expected, wanted = mx.value_and_grad(whole, argnums=which)(*given)
        assert value.item() == pytest.approx(expected.item(), rel=1e-6), name
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-6 * mx.abs(other).max().item())


def test_a_mask_that_mlx_lm_made_tells_which_keys_are_reached() -> None:
    """Every chunk's keys and biases against the array itself."""
    made = Masks()
    for queries, offset, window in [(11, 0, None), (11, 6, None), (11, 0, 4), (11, 6, 4), (5, 9, 20)]:
        mask = made.make(queries, offset, window_size=window)
        reach = made.reach(mask, queries, offset + queries)
        assert reach == Reach(offset, window)
        seen = np.array(mask)
        for first in range(0, queries, 3):
            end = min(queries, first + 3)
            begin, stop = reach.keys(first, end)
            part = seen[first:end]
            assert part[:, begin:stop].any(axis=0).all()  # no key that none of them sees
            assert not part[:, :begin].any() and not part[:, stop:].any()
            np.testing.assert_array_equal(np.array(reach.bias(first, end, mx.float32)) == 0, part[:, begin:stop])
    assert made.reach(mask[:4], 4, offset + queries) is None  # of another array nothing is known


def long_ways(split: Split) -> dict[str, Way]:
    """Of rows of 28 tokens, three in a batch: chunks and pieces of 7 and 5 tokens, which end within a window."""
    return {
        "chunks": Way(split, queries=5, powers=True),
        "chunks, prefix": Way(split, prefix=0, queries=5, recompute=1),
        "pieces": Way(split, queries=4, recompute=1, tokens=21, powers=True),
        "pieces, MLX's attention": Way(split, recompute=1, tokens=21),
        "nested": Way(split, queries=4, recompute=1, tokens=21, nested=2),
        "nested, prefix": Way(split, prefix=0, queries=3, recompute=1, tokens=15, nested=2),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_long_ways_have_the_loss_and_gradients_of_the_plain_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks, in_pieces = counted(monkeypatch, Chunked, "backward"), counted(monkeypatch, pieces._Pieces, "backward")
    precise = kind not in (*MIXTURES, "deepseek_v3")  # MLX multiplies gathered experts in float32 only
    for dtype in (mx.float32, mx.float64) if precise else (mx.float32,):
        model = make(kind, dtype)
        split = Split.of(model, mx.array(BATCH.ids))
        assert split is not None
        for label, way in long_ways(split).items():
            in_chunks.clear()
            in_pieces.clear()
            way = replace(way, powers=way.powers and dtype == mx.float32)
            limits = (1e-8, 1e-6) if dtype == mx.float64 else (1e-5, 3e-5)
            assert_close(model, way, BATCH, *limits, f"{kind}, {label}, {dtype}")
            passes = 2 if way.prefix is not None else 1
            assert len(in_pieces) == (2 * passes if way.tokens else 0), label
            assert bool(in_chunks) == (way.queries > 0 and kind not in OWN_SCORES), label


@pytest.mark.parametrize("kind", ["gemma3_text", "mixtral"])
def test_long_ways_of_quantized_models_are_the_plain_way_too(kind: str) -> None:
    model = make(kind, bits=4)
    split = Split.of(model, mx.array(BATCH.ids))
    assert split is not None
    assert_close(model, long_ways(split)["nested, prefix"], BATCH, 1e-5, 3e-5, kind)


def test_pieces_are_as_long_as_each_other() -> None:
    """A last one of a token or two would go to kernels that MLX has for generating."""
    for width in (1, 8, 512, 513, 1025, 32700):
        for count in (1, 3):
            spans = pieces.spans_of(512, count, width)
            lengths = [end - first for first, end in spans]
            assert [token for span in spans for token in range(*span)] == list(range(width))
            assert max(lengths) * count <= 512 and max(lengths) - min(lengths) <= 1


def reaches_one_key_too_few(patch: pytest.MonkeyPatch) -> None:
    """A window is one key shorter, but only for the first query of a chunk that is not the first."""
    real = Reach.bias

    def bias(self: Reach, first: int, end: int, dtype: mx.Dtype) -> mx.array:
        found = real(self, first, end, dtype)
        if self.window is not None and self.offset + first >= self.window:
            found[0, 0] = -mx.inf
        return found

    patch.setattr(Reach, "bias", bias)


def forgets_the_window(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Masks, "reach", lambda self, mask, queries, keys: Reach(keys - queries))


def counts_a_piece_from_one_too_many(patch: pytest.MonkeyPatch) -> None:
    class Moved(pieces._Piece):
        def __init__(self, before: list[mx.array], offset: int) -> None:
            super().__init__(before, offset + bool(before))

    patch.setattr(pieces, "_Piece", Moved)


def loses_the_gradient_of_keys_before(patch: pytest.MonkeyPatch) -> None:
    real = pieces.gradients_of

    def gradients(*known: Any) -> Any:
        parameters, tokens, of_known = real(*known)
        return parameters, tokens, [mx.zeros_like(array) for array in of_known]

    patch.setattr(pieces, "gradients_of", gradients)


def takes_the_wrong_block_again(patch: pytest.MonkeyPatch) -> None:
    """The input of a block further back, from which the group was to begin."""
    patch.setattr(pieces._Call, "input_again", lambda self, hidden, after: self.before.kept if self.before else hidden)


BUGS: list[tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = [
    (reaches_one_key_too_few, "gemma3_text", "chunks"),
    (reaches_one_key_too_few, "gpt_oss", "pieces"),
    (forgets_the_window, "gemma3_text", "chunks"),
    (counts_a_piece_from_one_too_many, "llama", "pieces"),
    (counts_a_piece_from_one_too_many, "gemma2", "nested"),
    (loses_the_gradient_of_keys_before, "deepseek_v3", "pieces"),
    (takes_the_wrong_block_again, "llama", "nested"),
]


@pytest.mark.parametrize(("bug", "kind", "name"), BUGS, ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_long_way_is_refused(
    bug: Callable[[pytest.MonkeyPatch], None], kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the chunks and pieces of a run, which would be longer than the proof's rows: the proof makes several."""
    model = make(kind)
    split = Split.of(model, mx.array(ROWS.ids))
    assert split is not None
    way = replace(long_ways(split)[name], queries=128)
    way = replace(way, tokens=512 if way.tokens else 0)
    assert proof.prove(model, way, ROWS, mx.float32, Room()) == Verdict()
    bug(monkeypatch)
    assert "does not reproduce this model" in proof.prove(model, way, ROWS, mx.float32, Room()).wrong


def peak_of(model: Any, way: Way, tokens: int) -> int:
    """Bytes that a step on one row takes beside the model."""
    examples = rows(0, [tokens])
    found = batch(0, [tokens])
    assert len(examples[0].ids) == tokens
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    proof.sums_of(model, way, found)
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma2"])
def test_memory_grows_with_a_rows_length_and_not_with_its_square(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four times the tokens: 16 times for scores [heads, T, T], or for a mask [T, T]; at most 4.5 is allowed."""
    model = make(kind)
    way = Way(Split(model, "model", 320), queries=32, recompute=1, tokens=64, nested=2, powers=True)
    short, long = peak_of(model, way, 256), peak_of(model, way, 1024)
    assert long < 4.5 * short
    if kind == "gemma3_text":
        assert peak_of(model, replace(way, queries=0, tokens=0, nested=0), 1024) > 4 * long


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_oss"])
def test_the_mask_of_a_window_is_never_computed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32,768 tokens it would be a gigabyte. Here its booleans are wrong, and the results right."""

    def make_mask(self: Masks, N: int, offset: int = 0, window_size: int | None = None) -> mx.array:
        mask = mx.zeros((N, offset + N), mx.bool_)
        self.note(mask, Reach(offset, window_size))
        return mask

    model = make(kind)
    split = Split.of(model, mx.array(ROWS.ids))
    assert split is not None
    monkeypatch.setattr(Masks, "make", make_mask)
    for way in (Way(split, queries=4), Way(split, queries=4, recompute=1, tokens=32)):
        assert_close(model, way, ROWS, 1e-5, 3e-5, kind)


@pytest.mark.parametrize(
    ("kind", "setting", "changes"),
    [
        ("llama", "train.checkpoint_layers=none", {"num_hidden_layers": 2}),
        ("llama", "fast.attention=off", {"num_hidden_layers": 2}),
        ("llama", "train.checkpoint_layers=nested", {}),
        (
            "gemma3_text",
            "train.checkpoint_layers=pieces",
            {"hidden_activation": "gelu", "num_hidden_layers": 2, **WINDOWS},
        ),
    ],
)
def test_the_peak_of_a_long_row_is_predicted_within_15_percent(
    kind: str, setting: str, changes: dict[str, Any]
) -> None:
    sizes = {"model_type": kind, **SIZES, **changes}
    settings = ("train.batch_rows=1", "train.memory_limit=off", setting)
    predicted, measured = peaks.of_step(sizes, settings, rows(0, [1100]))
    assert predicted.total == pytest.approx(measured, rel=0.15)


def test_the_peak_of_trunks_and_branches_in_pieces_is_predicted_within_15_percent() -> None:
    """Each pass in pieces of its own, not rows as if they shared nothing."""
    sizes = {"model_type": "llama", **SIZES, "num_hidden_layers": 1}
    settings = ("train.batch_rows=6", "train.memory_limit=off", "train.checkpoint_layers=pieces")
    predicted, measured = peaks.of_step(sizes, settings, peaks.conversation(6, times=3))
    assert predicted.total == pytest.approx(measured, rel=0.15)


def sizes_of(kind: str) -> dict[str, Any]:
    return {"model_type": kind, **COMMON, **SHAPES[kind]}


def test_a_run_is_made_to_fit_in_pieces_and_then_nested_when_one_row_is_still_too_much() -> None:
    kind = "llama deep"
    model = make(kind)
    examples = rows(0, [1500, 1400, 1300, 1200])
    found = {}
    for how in ("all", "pieces", "nested"):
        settings = ("train.batch_rows=1", "train.accumulate=4", f"train.checkpoint_layers={how}")
        config = configuration.load(None, settings)
        way = fast_ways.expected_way(model, examples, config)
        given = Given(model, sizes_of(kind), mx.float32)
        fitted = fit_memory.fit(given, way, config, Plan(examples, config.train))
        found[how] = fitted.memory.total
    assert found["all"] > found["pieces"] > found["nested"]
    config = configuration.load(None, ("train.batch_rows=4",))
    for how in ("pieces", "nested"):
        given = Given(model, sizes_of(kind), mx.float32, found[how])
        fitted = fit_memory.fit(
            given, fast_ways.expected_way(model, examples, config), config, Plan(examples, config.train)
        )
        section = fitted.config.train
        assert (section.checkpoint_layers, section.batch_rows, section.accumulate) == (how, 1, 4)
        assert (fitted.way.tokens, fitted.way.nested) == (512, 3 if how == "nested" else 0)
        assert f"train.checkpoint_layers={how}" in fitted.notes[0]


def test_rows_stay_whole_where_a_piece_of_one_would_be_computed_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", dropout=0.1)
    examples = rows(0, [600, 40])

    def noted(*settings: str) -> str:
        config = configuration.load(None, ("train.checkpoint_layers=pieces", *settings))
        way = fast_ways.expected_way(model, examples, config)
        given = Given(model, sizes_of("llama"), mx.float32)
        fitted = fit_memory.fit(given, way, config, Plan(examples, config.train))
        assert (fitted.way.recompute, fitted.way.tokens) == (1, 0 if fitted.notes else 512)
        return "\n".join(fitted.notes)

    assert noted() == ""
    assert "checkpointed with whole rows: with lora.dropout" in noted("lora.dropout=0.1")
    monkeypatch.setattr(extent, "longest_alike", lambda model: 599)
    assert "rows of more than 599 tokens are rotated otherwise" in noted()


def test_long_rows_keep_no_scores_from_a_length_on() -> None:
    model = make("llama")
    config = configuration.load(None, ())
    found = [fast_ways.expected_way(model, rows(0, [tokens, 9]), config).queries for tokens in (512, 513)]
    assert found == [0, 128]
    long = rows(0, [513, 9])
    for settings in (("fast.attention=off",), ("fast.head=off", "fast.prefix=off")):
        way = fast_ways.expected_way(model, long, configuration.load(None, settings))
        assert way.queries == 0, settings
    assert way == Way()  # both off: the plain way, however long the rows are


def test_a_run_in_pieces_has_the_losses_of_one_that_keeps_everything(
    mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its evaluations too."""
    monkeypatch.setattr(pieces, "TOKENS", 40)
    monkeypatch.setattr(attention, "LONG", 8)
    in_pieces = counted(monkeypatch, pieces._Pieces, "backward")

    def losses(name: str) -> list[float]:
        few = ("train.steps=4", "train.save_every=0", "train.eval_every=2", f"train.checkpoint_layers={name}")
        return [e["loss"] for e in tune(mlx_model, data, tmp_path / name, *few) if e["kind"] in ("train", "eval")]

    plain = losses("none")
    assert not in_pieces
    np.testing.assert_allclose(losses("nested"), plain, rtol=1e-5)
    assert in_pieces

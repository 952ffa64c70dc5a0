"""The proof of the fast ways: right ones pass under a GPU's rounding, wrong ones do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map
from mlx_lm.models.base import create_causal_mask
from rounding import as_a_gpu
from ways import BATCH, SHAPES, batch, make

from mlxtune.compute import checkpointing, head_loss, loss, prefix, proof
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.compute.proof import Room, Verdict
from mlxtune.model.prefix_cache import PrefixCache

OTHER_ORDER = 3e-6  # relative size of what another order of a float32 sum changes, at its worst
ROWS = batch(17, [30, 27])
MIXTURE = {
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}


@pytest.fixture(autouse=True)
def more_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "qwen3_moe 128 experts", MIXTURE)
    monkeypatch.setitem(SHAPES, "qwen3_moe 8 experts", {**MIXTURE, "num_experts": 8, "num_experts_per_tok": 2})
    monkeypatch.setitem(SHAPES, "qwen3_moe 128 experts deep", {**MIXTURE, "num_hidden_layers": 6})
    monkeypatch.setitem(SHAPES, "qwen3 28 blocks", {"num_hidden_layers": 28})
    # Every expert is chosen: in 16 bits no near-tie of the router can make two right ways choose differently.
    monkeypatch.setitem(SHAPES, "gpt_oss all experts", {**SHAPES["gpt_oss"], "num_experts_per_tok": 4})


def in_16_bits(kind: str, dtype: mx.Dtype, bits: int = 0) -> nn.Module:
    """A model as a run has it: the base in 16 bits, the adapter float32."""
    model = make(kind, dtype, bits)
    model.update(tree_map(lambda array: array.astype(mx.float32), model.trainable_parameters()))
    return model


def ways(model: nn.Module) -> dict[str, Way]:
    split = Split.of(model, mx.array(ROWS.ids))
    assert split is not None
    return {
        "head": Way(split),
        "prefix": Way(split, prefix=0),
        "prefix alone": Way(prefix=0),
        "checkpointed": Way(split, prefix=0, recompute=1),
    }


@pytest.mark.parametrize(
    ("kind", "dtype", "bits", "relative"),
    [
        ("llama", mx.bfloat16, 0, OTHER_ORDER),
        ("llama tied", mx.float16, 4, OTHER_ORDER),
        ("gemma3_text", mx.bfloat16, 0, OTHER_ORDER),
        ("qwen3_moe 128 experts", mx.bfloat16, 0, OTHER_ORDER),
        ("qwen3_moe 128 experts", mx.float16, 0, 3e-7),
        ("qwen3_moe 8 experts", mx.float16, 0, OTHER_ORDER),
        ("qwen3_moe 8 experts", mx.bfloat16, 0, 3e-7),
    ],
    ids=str,
)
def test_right_ways_are_proven_whatever_order_a_gpu_sums_in(
    kind: str, dtype: mx.Dtype, bits: int, relative: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_a_gpu(monkeypatch, relative)
    model = in_16_bits(kind, dtype, bits)
    for label, way in ways(model).items():
        assert proof.prove(model, way, ROWS, dtype, Room()) == Verdict(), label


def test_28_blocks_do_not_amplify_rounding_beyond_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 the plain way differs from itself by more than a wrong mask does; with float32 there is no doubt."""
    as_a_gpu(monkeypatch, OTHER_ORDER)
    model = in_16_bits("qwen3 28 blocks", mx.bfloat16)
    with proof.nudged(model):
        floor = proof.difference(proof.plain_sums_by_row(model, ROWS), proof.plain_sums(model, ROWS))
    assert floor.gradient > proof.CHAOS
    assert proof.prove(model, ways(model)["checkpointed"], ROWS, mx.bfloat16, Room()) == Verdict()


def test_in_16_bits_a_way_is_unproven_where_the_plain_one_differs_from_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefix has another number of rows, the head has the plain way's own."""
    as_a_gpu(monkeypatch, OTHER_ORDER)
    model = in_16_bits("qwen3_moe 128 experts deep", mx.bfloat16)
    room = Room(raised=False)
    verdict = proof.prove(model, ways(model)["prefix"], ROWS, mx.bfloat16, room)
    assert verdict.wrong.startswith("it is unproven: float32 does not fit the memory, and in bfloat16 even the plain")
    assert not verdict.hopeless
    assert proof.prove(model, ways(model)["head"], ROWS, mx.bfloat16, room) == Verdict()


def sees_the_next_token(patch: pytest.MonkeyPatch) -> None:
    def make_mask(self: PrefixCache, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        mask = create_causal_mask(N, self.offset, window_size=window_size)
        return mx.concatenate([mask[1:], mask[-1:]])

    patch.setattr(PrefixCache, "make_mask", make_mask)


def counts_positions_from_one_too_many(patch: pytest.MonkeyPatch) -> None:
    real = PrefixCache.make_mask

    class Moved(PrefixCache):
        def __init__(self, *known: Any) -> None:
            super().__init__(*known)

        @property
        def offset(self) -> int:
            return self.__dict__["at"] + bool(self.state)

        @offset.setter
        def offset(self, at: int) -> None:
            self.__dict__["at"] = at

        def make_mask(self, *args: Any, **kwargs: Any) -> Any:
            return real(PrefixCache(offset=self.__dict__["at"]), *args, **kwargs)

    patch.setattr(prefix, "PrefixCache", Moved)


def forgets_windows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefixCache, "make_mask", lambda *_, **__: "causal")


def forgets_the_soft_cap(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Split, "logits", lambda self, rows: self._holder.model.embed_tokens.as_linear(rows))


def takes_the_row_before(patch: pytest.MonkeyPatch) -> None:
    real = prefix.positions_of_targets
    patch.setattr(prefix, "positions_of_targets", lambda *known: real(*known) - 1)


def takes_a_token_too_many_into_the_prefix(patch: pytest.MonkeyPatch) -> None:
    real = prefix.length_for_batch
    patch.setattr(prefix, "length_for_batch", lambda *known: real(*known) + 2)


def loses_the_gradient_of_parameters(patch: pytest.MonkeyPatch) -> None:
    def closed_over(module: nn.Module, function: Callable[..., Any], turns: Any = None) -> Callable[..., Any]:
        return lambda *args: mx.checkpoint(function)(*args)

    patch.setattr(checkpointing, "checkpointed", closed_over)


BUGS: list[tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = [
    (sees_the_next_token, "llama", "prefix"),
    (sees_the_next_token, "qwen3_moe 8 experts", "checkpointed"),
    (counts_positions_from_one_too_many, "llama", "prefix"),
    (counts_positions_from_one_too_many, "gemma3_text", "checkpointed"),
    (forgets_windows, "gemma3_text", "prefix alone"),
    (forgets_windows, "gpt_oss all experts", "prefix"),
    (forgets_the_soft_cap, "gemma2", "head"),
    (takes_the_row_before, "llama", "prefix"),
    (takes_a_token_too_many_into_the_prefix, "llama", "prefix"),
    (loses_the_gradient_of_parameters, "llama", "checkpointed"),
]


@pytest.mark.parametrize("room", [Room(), Room(checkpointed=True), Room(raised=False)], ids=["", "again", "16 bits"])
@pytest.mark.parametrize(("bug", "kind", "name"), BUGS, ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_way_is_refused(
    bug: Callable[[pytest.MonkeyPatch], None], kind: str, name: str, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_a_gpu(monkeypatch, OTHER_ORDER)
    model = in_16_bits(kind, mx.bfloat16)
    way = ways(model)[name]
    before = proof.prove(model, way, ROWS, mx.bfloat16, room)
    assert before == Verdict()
    bug(monkeypatch)
    try:
        verdict = proof.prove(model, way, ROWS, mx.bfloat16, room)
    except ValueError as error:  # no gradient at all
        verdict = Verdict(str(error))
    assert "does not reproduce this model" in verdict.wrong and "off by" in verdict.wrong


@pytest.mark.parametrize("kind", SHAPES)
def test_the_plain_way_computed_again_is_the_plain_way(kind: str) -> None:
    model = make(kind)
    assert proof.difference(proof.plain_sums(model, BATCH, True), proof.plain_sums(model, BATCH)).within(1e-7, 1e-6)
    assert proof.plain_sums(model, BATCH)[0] == loss.plain(model, BATCH).item()


def test_blocks_that_hand_on_more_than_they_return_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients flow into what a block is given, not into what it finds elsewhere: both ways would lose the same."""
    model = make("llama")
    first, second = model.layers[0].mlp, model.layers[1].mlp
    kind, handed = type(first), []
    real = kind.__call__

    def call(self: Any, x: mx.array) -> mx.array:
        y = real(self, x)
        if self is first:
            handed[:] = [y]
        return y + handed[0] if self is second else y

    monkeypatch.setattr(kind, "__call__", call)
    assert proof.prove(model, Way(prefix=0), ROWS, mx.float32, Room()).wrong == ""
    wrong = proof.prove(model, Way(recompute=1), ROWS, mx.float32, Room(checkpointed=True)).wrong
    assert "its blocks computed again" in wrong and "gradient of model.layers.0.mlp" in wrong


def test_numbers_that_are_not_finite_in_float16_are_named_as_that() -> None:
    model = in_16_bits("llama", mx.float16)
    layer = model.layers[-1].mlp.down_proj.linear
    layer.weight = layer.weight * 2.0**8 * 2.0**8  # what comes out of it is no float16 number any more
    verdict = proof.prove(model, ways(model)["head"], ROWS, mx.float16, Room())
    assert not verdict.wrong
    assert verdict.note == "this model's loss is not finite in float16, in float32 it is: set train.dtype=float32"
    verdict = proof.prove(model, ways(model)["head"], ROWS, mx.float16, Room(raised=False))
    assert verdict.hopeless and "this model's own loss is not finite in float16" in verdict.wrong
    model.model.norm.weight = model.model.norm.weight * mx.inf
    verdict = proof.prove(model, Way(prefix=0), ROWS, mx.float32, Room())
    assert verdict.hopeless and "this model's own loss is not finite" in verdict.wrong


def test_a_way_that_alone_is_not_finite_in_16_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = head_loss.through_frozen

    def overflows(split: Split, rows: mx.array, *rest: Any) -> mx.array:
        return real(split, rows, *rest) + rows.sum() * (0 if rows.dtype == mx.float32 else mx.inf)

    monkeypatch.setattr(head_loss, "through_frozen", overflows)
    model = in_16_bits("llama", mx.float16)
    verdict = proof.prove(model, ways(model)["head"], ROWS, mx.float16, Room())
    assert verdict.wrong == "its loss is not finite in float16, the plain way's is"

"""Trunks and branches against the plain way: loss and gradients, over families, and what is planted is found."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import peaks
import pytest
import zoo
from mlx_lm.models.base import create_causal_mask
from test_forest import random_rows
from ways import MIXTURES, SHAPES, assert_close, make

from mlxtune.compute import prefix, proof, proof_rows
from mlxtune.compute.fit_memory import Given
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.compute.proof import Room, Verdict
from mlxtune.config import resolve as configuration
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset import forest
from mlxtune.data.dataset.batches import Batch, Plan, collate
from mlxtune.data.dataset.measured import ListedExamples
from mlxtune.model import linux_cpu
from mlxtune.model.prefix_cache import PrefixCache
from mlxtune.train.choice import choose


@pytest.fixture(autouse=True)
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows here are short: a pass more is worth few tokens."""
    monkeypatch.setattr(forest, "A_PASS", 4)


def batch_of(rows: list[list[int]], firsts: list[int], seed: int) -> Batch:
    """firsts: the first target of each row."""
    draw = np.random.default_rng(seed)
    examples = []
    for row, first in zip(rows, firsts, strict=True):
        targets = [1, *draw.integers(0, 2, len(row) - first - 1).tolist()]
        examples.append(Example(row, [0] * first + targets))
    return collate(examples, range(len(rows)))


def conversations() -> Batch:
    """Two of four turns behind one system prompt, each behind its own prompt, and a row that shares nothing.

    Of the second and third turn the prompts are equal, so they are one pass.
    """
    draw = np.random.default_rng(0)
    system = draw.integers(3, 250, 14).tolist()
    rows, firsts = [], []
    for _ in range(2):
        history = system + draw.integers(3, 250, 27).tolist()
        for asked in (22, 31, 31, 41):
            rows.append(history[:asked] + draw.integers(3, 250, 10).tolist())
            firsts.append(asked + 2)
    rows.append(draw.integers(3, 250, 33).tolist())
    return batch_of(rows, [*firsts, 20], 1)


CONVERSATIONS = conversations()
# More families of the zoo, for what is peculiar to them: keys and values that a block returns as well, latent keys,
# learned positions, ALiBi.
OTHERS = {
    "gemma4_text shared": {},
    "deepseek_v3": {},
    "cohere2": {"sliding_window_pattern": 2},
    "phi3": {},
    "starcoder2": {},
    "gpt2": {"n_ctx": 512, "layer_norm_epsilon": 1e-5},
}


def test_the_batch_has_trunks_that_leave_trunks_and_branches_at_several_depths() -> None:
    found = prefix.forest_of_batch(CONVERSATIONS, 0)
    assert [(each.start, each.width, each.leaves) for each in found.passes if each.is_trunk] == [
        (0, 31, None),
        (14, 17, 0),
    ]
    leaving = {(each.leaves, each.start, each.rows) for each in found.passes if not each.is_trunk}
    of_first = {(1, 22, (0,)), (1, 31, (1, 2)), (1, 31, (3,))}
    of_second = {(0, 22, (4,)), (0, 31, (5, 6)), (0, 31, (7,))}
    assert leaving == {*of_first, *of_second, (None, 0, (8,))}


@pytest.mark.parametrize("kind", OTHERS)
def test_families_with_peculiar_keys_and_positions_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, kind, {**zoo.SHAPES[kind], **OTHERS[kind]})
    assert_close(make(kind), Way(prefix=0, recompute=1), CONVERSATIONS, 1e-5, 3e-5, kind)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float64], ids=str)
def test_losses_and_gradients_are_those_of_the_plain_way(kind: str, dtype: mx.Dtype) -> None:
    if dtype == mx.float64 and kind in MIXTURES:
        pytest.skip("MLX multiplies gathered experts in float32 only")
    model = make(kind, dtype)
    split = Split.of(model, mx.array(CONVERSATIONS.ids))
    limits = (1e-12, 1e-6) if dtype == mx.float64 else (1e-5, 3e-5)
    assert_close(model, Way(split, prefix=0), CONVERSATIONS, *limits, kind)
    powers = dtype == mx.float32 and linux_cpu.worth_it()
    assert_close(model, Way(prefix=0, recompute=1, powers=powers), CONVERSATIONS, *limits, kind)


@pytest.mark.parametrize("kind", ["llama windows", "gemma3_text", "qwen3"])
@pytest.mark.parametrize(
    "way",
    [Way(prefix=0, queries=8), Way(prefix=0, recompute=1, tokens=8, nested=2, queries=8)],
    ids=["chunks", "pieces"],
)
def test_branches_may_be_computed_in_chunks_of_queries_and_pieces_of_tokens(kind: str, way: Way) -> None:
    assert_close(make(kind), way, CONVERSATIONS, 1e-5, 3e-5, kind)


def random_batch(seed: int) -> Batch:
    draw = np.random.default_rng(seed)
    rows, _ = random_rows(draw, int(draw.integers(3, 9)))
    return batch_of(rows, [int(draw.integers(1, len(row))) for row in rows], seed)


@pytest.mark.parametrize("seed", range(8))
def test_random_forests_give_the_plain_ways_gradients(seed: int) -> None:
    batch = random_batch(seed)
    model = make("llama windows", mx.float64)
    assert_close(model, Way(prefix=0, recompute=seed % 2), batch, 1e-12, 1e-6, str(prefix.forest_of_batch(batch, 0)))


def test_some_of_the_random_forests_have_several_trunks() -> None:
    passes = [prefix.forest_of_batch(random_batch(seed), 0).passes for seed in range(8)]
    trunks = [sum(each.is_trunk for each in found) for found in passes]
    assert sum(count > 1 for count in trunks) >= 3


class Rows(ListedExamples):
    """Examples of rows that give several."""

    row_of: np.ndarray = np.zeros(0)  # [N] the row of each


@pytest.mark.parametrize("tokens", [1024, 120])
def test_a_proof_has_branches_at_several_depths_where_a_row_gives_several_examples(tokens: int) -> None:
    """Cut to fewer tokens than the history has, too."""
    rows = Rows([*peaks.examples(3), *peaks.conversation(6), *peaks.conversation(2)])
    rows.row_of = np.array([0, 1, 2, *[3] * 6, *[4] * 2])
    batch = proof_rows.rows_for(rows, Way(prefix=0), True, tokens)
    passes = prefix.forest_of_batch(batch, 0)
    assert len(batch.rows) == 3 and batch.ids.shape[1] <= tokens
    trunk, *branches = passes.passes
    assert trunk.is_trunk and min(each.start for each in branches) < trunk.width == max(each.start for each in branches)
    assert batch.mask[:, 1:].any(axis=1).all()


def test_a_proof_has_branches_at_several_depths_where_a_batch_of_the_run_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of one example each, which nobody sorted by what they begin with."""
    found = peaks.conversation(6, vocabulary=300)

    def depths(batches: list[list[int]]) -> int:
        batch = proof_rows.rows_for(found, Way(prefix=0), False, batches=batches)
        return len({each.start for each in prefix.forest_of_batch(batch, 0).passes if not each.is_trunk})

    assert depths([]) == depths([[0], [5, 4]]) == 1  # two rows leave one trunk where they part
    assert depths([[0], [5, 0, 3, 1]]) > 1
    config = configuration.load(None, ("train.batch_rows=6", "data.group_by_prefix=false"))
    plan = Plan(found, config.train)
    seen = []
    monkeypatch.setattr(proof, "prove", lambda model, way, batch, *rest: (seen.append(batch), proof.Verdict())[1])
    chosen = choose(Given(make("llama"), {}, mx.float32), config, plan)
    assert chosen.way.prefix is not None
    assert len({each.start for each in prefix.forest_of_batch(seen[0], 0).passes if not each.is_trunk}) > 1
    whole = proof_rows.rows_for(found, Way(), False, batches=[[5, 0, 3, 1]])
    assert len(whole.rows) == proof_rows.ROWS  # a way that shares nothing is proven on whole rows


# Faults that are planted.


def sees_a_sister(patch: pytest.MonkeyPatch) -> None:
    """Each row of a pass attends to another one's tokens."""
    real = PrefixCache.update_and_fetch

    def fetch(self: PrefixCache, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.state:
            keys, values = mx.roll(keys, 1, axis=0), mx.roll(values, 1, axis=0)
        return real(self, keys, values)

    patch.setattr(PrefixCache, "update_and_fetch", fetch)


def sees_the_trunk_beyond_its_depth(patch: pytest.MonkeyPatch) -> None:
    """A branch attends to as many tokens of its trunk, but to later ones."""
    real = prefix._caches

    def caches(model: object, each: forest.Pass, trunk: list[PrefixCache]) -> list[PrefixCache]:
        layers = real(model, each, trunk)  # type: ignore[arg-type]
        for layer, recorded in zip(layers, trunk, strict=False):
            layer.state = [array[:, :, array.shape[2] - each.start :] for array in recorded.recorded]
        return layers

    patch.setattr(prefix, "_caches", caches)


def counts_positions_from_one_too_many(patch: pytest.MonkeyPatch) -> None:
    """Only of branches that leave before the trunk's end, and only the rotation: the mask is right."""
    real = PrefixCache.make_mask
    real_caches = prefix._caches

    def caches(model: object, each: forest.Pass, trunk: list[PrefixCache]) -> list[PrefixCache]:
        layers = real_caches(model, each, trunk)  # type: ignore[arg-type]
        for layer in layers:
            layer.offset += bool(trunk) and each.start < trunk[0].recorded[0].shape[2]
        return layers

    def make_mask(self: PrefixCache, *args: object, **kwargs: object) -> object:
        right = PrefixCache(offset=self.state[0].shape[2] if self.state else 0)
        return real(right, *args, **kwargs)  # type: ignore[arg-type]

    patch.setattr(prefix, "_caches", caches)
    patch.setattr(PrefixCache, "make_mask", make_mask)


def has_windows_that_end_at_the_trunk(patch: pytest.MonkeyPatch) -> None:
    """A window counts its own pass's tokens, and sees all of the trunk's."""

    def make_mask(self: PrefixCache, N: int, return_array: bool = False, window_size: int | None = None) -> object:
        own = create_causal_mask(N, 0, window_size=window_size)
        return mx.concatenate([mx.ones((N, self.offset), mx.bool_), own], axis=1)

    patch.setattr(PrefixCache, "make_mask", make_mask)


def takes_another_trunk(patch: pytest.MonkeyPatch) -> None:
    """The trunk of the other conversation stands for both."""
    real = prefix._caches
    seen: list[list[PrefixCache]] = []

    def caches(model: object, each: forest.Pass, trunk: list[PrefixCache]) -> list[PrefixCache]:
        if trunk and not each.is_trunk:
            seen.append(trunk)
            trunk = seen[0]
        return real(model, each, trunk)  # type: ignore[arg-type]

    patch.setattr(prefix, "_caches", caches)


BUGS: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (sees_a_sister, "llama"),
    (sees_the_trunk_beyond_its_depth, "llama"),
    (counts_positions_from_one_too_many, "qwen3"),
    (has_windows_that_end_at_the_trunk, "llama windows"),
    (takes_another_trunk, "llama"),
]


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize(("bug", "kind"), BUGS, ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_branch_is_refused(
    bug: Callable[[pytest.MonkeyPatch], None], kind: str, recompute: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(kind)
    way = Way(prefix=0, recompute=recompute)
    assert proof.prove(model, way, CONVERSATIONS, mx.float32, Room()) == Verdict()
    bug(monkeypatch)
    assert "does not reproduce this model" in proof.prove(model, way, CONVERSATIONS, mx.float32, Room()).wrong

"""Blocks below the lowest trained one, computed once for each row: the same loss and gradients, and what is kept.

The oracle is `loss.plain`, the model's own forward on the whole batch.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import zoo
from test_branches import CONVERSATIONS
from test_choice import chosen, long_rows, sizes
from test_proof import in_16_bits
from training import losses, tune
from ways import BATCH, MIXTURES, SHAPES, assert_close, batch, make

from mlxtune.compute import fit_memory, pieces, prefix, proof, trunk, trunk_choice, trunk_states
from mlxtune.compute.fit_memory import Given
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.compute.memory.prediction import Memory
from mlxtune.compute.proof import Room, Verdict
from mlxtune.compute.trunk_states import Budget, RowStates, Store
from mlxtune.config import resolve
from mlxtune.data.dataset import forest
from mlxtune.data.dataset.batches import Plan
from mlxtune.errors import UserError
from mlxtune.model.classes import as_classes, calling
from mlxtune.model.linux_cpu import as_powers_of_two

FROZEN = 2  # of four blocks
CUT = Way(frozen=FROZEN)
ROWS = batch(17, [30, 27])
GEMMA4 = "gemma4_text"  # its blocks give their keys and values beside the hidden states
KINDS = [*SHAPES, GEMMA4]


@pytest.fixture(autouse=True)
def four_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (GEMMA4, f"{GEMMA4} shared"):
        monkeypatch.setitem(SHAPES, kind, {"num_kv_shared_layers": 0, **zoo.SHAPES[kind]})
    for kind, shape in list(SHAPES.items()):
        types = {"layer_types": (2 * shape["layer_types"])[: 2 + FROZEN]} if "layer_types" in shape else {}
        monkeypatch.setitem(SHAPES, kind, {**shape, "num_hidden_layers": 2 + FROZEN, **types})


def ways(model: nn.Module) -> dict[str, Way]:
    split = Split.of(model, mx.array(BATCH.ids))
    assert split is not None
    _, beside = trunk.states_of(model, FROZEN, trunk_choice.ANY)
    alone = Way(frozen=FROZEN, beside=beside)
    return {
        "alone": alone,
        "head": replace(alone, split=split),
        "prefix, checkpointed": replace(alone, split=split, prefix=0, recompute=1),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_losses_and_gradients_are_those_of_the_plain_way(kind: str, precision: str) -> None:
    if precision == "float64" and kind in MIXTURES:
        pytest.skip("MLX multiplies gathered experts in float32 only")
    model = make(kind, mx.float64 if precision == "float64" else mx.float32, layers=2)
    assert trunk.frozen_blocks(model) == FROZEN
    for label, way in ways(model).items():
        assert_close(model, way, BATCH, *((1e-12, 1e-6) if precision == "float64" else (1e-6, 3e-5)), label)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_oss", GEMMA4])
def test_trunks_and_branches_are_fed_each_its_own_rows_and_positions(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trunks, of which one leaves the other, and branches at several depths."""
    monkeypatch.setattr(forest, "A_PASS", 4)
    assert len(prefix.forest_of_batch(CONVERSATIONS, 0).passes) == 9
    model = make(kind, layers=2)
    assert_close(model, ways(model)["prefix, checkpointed"], CONVERSATIONS, 1e-6, 3e-5, kind)


def test_dropout_above_the_cut_is_what_it_is_without() -> None:
    """Masks are keyed by seed, step, row and layer; frozen blocks have none."""
    model = make("llama", dropout=0.3, layers=2)
    plain, _ = proof.sums_of(model, Way(), BATCH)
    model.dropout_keys.set(7, 3, BATCH.rows.tolist(), (BATCH.lengths - 1).tolist(), 14)
    dropped, _ = proof.sums_of(model, Way(), BATCH)
    assert abs(dropped - plain) > 1e-3 * plain
    assert_close(model, Way(frozen=FROZEN), BATCH, 1e-6, 3e-5, "dropout")


def rows_change_places(patch: pytest.MonkeyPatch) -> None:
    """Each row is given the states of another."""
    real = RowStates.of
    patch.setattr(RowStates, "of", lambda self, batch: real(self, batch)[::-1])


def the_base_is_another_one(patch: pytest.MonkeyPatch) -> None:
    """The states are those of a model whose second block differs a little."""
    real = trunk_states.states_of

    def states_of(model: Any, frozen: int, ids: mx.array) -> tuple[mx.array, int]:
        norm = model.layers[1].post_attention_layernorm
        before, norm.weight = norm.weight, norm.weight * 1.01
        try:
            states = real(model, frozen, ids)
            mx.eval(states[0])
            return states
        finally:
            norm.weight = before

    patch.setattr(trunk_states, "states_of", states_of)


def one_block_is_missing(patch: pytest.MonkeyPatch) -> None:
    real = trunk_states.states_of
    patch.setattr(trunk_states, "states_of", lambda model, frozen, ids: real(model, frozen - 1, ids))


def positions_are_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """A pass behind a prefix is given the states from one position before."""
    real = trunk.Feed.take
    patch.setattr(trunk.Feed, "take", lambda self, rows, start, width: real(self, rows, max(0, start - 1), width))


BUGS = [
    (rows_change_places, "head"),
    (the_base_is_another_one, "alone"),
    (one_block_is_missing, "head"),
    (positions_are_off_by_one, "prefix, checkpointed"),
]


@pytest.mark.parametrize(("bug", "name"), BUGS, ids=lambda value: getattr(value, "__name__", ""))
def test_states_that_are_not_the_rows_own_are_refused(
    bug: Callable[[pytest.MonkeyPatch], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama", layers=2)
    way = ways(model)[name]
    assert proof.prove(model, way, ROWS, mx.float32, Room()) == Verdict()
    bug(monkeypatch)
    assert "does not reproduce this model" in proof.prove(model, way, ROWS, mx.float32, Room()).wrong


def test_a_model_in_16_bits_is_proven_in_float32_and_keeps_the_bits_of_its_own_type() -> None:
    model = in_16_bits("llama", mx.bfloat16)
    for block in model.layers[:FROZEN]:
        block.freeze()
    assert proof.prove(model, ways(model)["head"], ROWS, mx.bfloat16, Room()) == Verdict()
    stored = [RowStates(model, CUT, budget=budget) for budget in (Budget(1 << 20), Budget(disk=1 << 20), Budget())]
    wanted = stored[2].of(ROWS)
    assert wanted.dtype == mx.bfloat16
    for states in stored[:2]:
        for _ in range(2):
            found = states.of(ROWS)
            assert mx.array_equal(found.view(mx.uint16), wanted.view(mx.uint16)).item()
        assert states.computed == 2
        states.store.close()


def test_states_of_a_row_depend_on_nothing_that_it_is_batched_with() -> None:
    model = make("gemma3_text", layers=2)
    with as_powers_of_two(False):
        together = RowStates(model, CUT).of(BATCH)
    for row in range(3):
        length = int(BATCH.lengths[row]) - 1
        alone = RowStates(model, CUT).of(BATCH.part(slice(row, row + 1)))
        assert mx.array_equal(alone[0, :length], together[row, :length]).item()
        assert mx.array_equal(
            together[row, length:], mx.broadcast_to(together[row, length - 1], alone[0, length:].shape)
        )


def test_states_of_a_long_row_take_no_more_than_the_runs_own_attention() -> None:
    """The scores of 4 heads and 2,048 tokens are 67 MB for each block; of 128 queries at a time, 4 MB."""
    model = make("llama", layers=2)
    mx.eval(model.parameters())
    row = np.arange(2048, dtype=np.int32) % 250
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    states = RowStates(model, replace(CUT, queries=128))._of_row(row)
    assert mx.get_peak_memory() - before < 60e6
    assert mx.allclose(states, RowStates(model, CUT)._of_row(row), rtol=1e-4, atol=1e-5).item()


def test_memory_is_filled_before_the_disk_and_what_has_no_room_is_computed_again(tmp_path: Path) -> None:
    model = make("llama", layers=2)
    bytes_of = [4 * 64 * (int(length) - 1) for length in BATCH.lengths]  # float32, of width 64
    states = RowStates(model, CUT, budget=Budget(bytes_of[0], bytes_of[1]))
    wanted = RowStates(model, CUT).of(BATCH)
    for again in (3, 4, 5):  # the third row has no room
        assert mx.array_equal(states.of(BATCH), wanted).item()
        assert states.computed == again
    assert len(states.store._in_memory) == len(states.store._on_disk) == 1
    states.store.close()
    assert states.store.get(b"") is None


def test_a_full_disk_is_said_once_and_costs_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(Budget(disk=1 << 20))
    kept = mx.arange(12, dtype=mx.float32).reshape(3, 4)
    store.put(b"kept", kept)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        store.put(b"one", kept)
        store.put(b"two", kept)
    store.put(b"three", kept)
    assert [store.get(key) is None for key in (b"one", b"two", b"three")] == [True] * 3
    assert mx.array_equal(store.get(b"kept"), kept).item()
    assert len(store.notes) == 1 and "cannot be written (No space left on device) after 48 bytes" in store.notes[0]
    os.ftruncate(store._file.fileno(), 4)  # type: ignore[union-attr]
    assert store.get(b"kept") is None
    store.close()


EPOCHS = ("train.steps=null", "train.epochs=3", "lora.layers=1", "train.accumulate=1", "train.batch_rows=4")


@pytest.fixture(scope="module")
def usual(mlx_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the last block of two, without a cache."""
    out = tmp_path_factory.mktemp("usual") / "run"
    tune(mlx_model, data, out, *EPOCHS, "train.trunk_cache=off")
    return out


@pytest.mark.parametrize("size", ["auto", "60000"])
def test_a_run_has_the_losses_of_one_without_a_cache_and_is_resumed_with_the_same_bits(
    size: str, usual: Path, mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 24 rows in 3 epochs each passes the first block once; with 60,000 bytes there is room for some."""
    seen: list[RowStates] = []
    real = RowStates.__init__

    def init(self: RowStates, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        seen.append(self)

    monkeypatch.setattr(RowStates, "__init__", init)
    settings = (*EPOCHS, f"train.trunk_cache={size}")
    found = tune(mlx_model, data, tmp_path / "run", *settings)
    said = [event["text"] for event in found if event["kind"] == "note"]
    assert any("the first 1 blocks once for each row" in text for text in said if text.startswith("computed: "))
    assert any(text.startswith("what the first 1 blocks give is kept for later epochs: up to ") for text in said)
    computed = max(states.computed for states in seen)
    assert computed == 24 if size == "auto" else 24 < computed < 72
    kept = losses(tmp_path / "run")
    for key, loss in losses(usual).items():
        assert kept[key] == pytest.approx(loss, rel=1e-6), key
    adapter = (tmp_path / "run" / "adapters.safetensors").read_bytes()
    for step in (18, 16, 14):
        for file in (tmp_path / "run" / f"checkpoints/step-00000{step}").glob("*"):
            if step > 14:
                file.write_bytes(b"torn")
    seen.clear()
    tune(mlx_model, data, tmp_path / "run", *settings, resume=True)
    assert losses(tmp_path / "run") == kept
    assert (tmp_path / "run" / "adapters.safetensors").read_bytes() == adapter
    assert max(states.computed for states in seen) == 16  # of the four steps that were left


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("lora.layers=all",), "something trains in the first block"),
        (("lora.train_also=[embeddings]",), "something trains in the first block or before it"),
        (("train.epochs=1",), "no row comes twice"),
        (("train.neftune_alpha=5",), "each row has noise of its own in every epoch"),
        (("train.checkpoint_layers=pieces",), "with train.checkpoint_layers=pieces rows go through blocks in pieces"),
        (("train.epochs=1.1",), "it would save less than 10% of the work"),
    ],
)
def test_a_cache_that_could_have_no_use_is_refused_where_it_is_asked_for_and_else_left_out(
    settings: tuple[str, ...], reason: str, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"train\.trunk_cache 1000000 has no effect: ") as refused:
        tune(mlx_model, data, tmp_path / "run", *EPOCHS, *settings, "train.trunk_cache=1000000")
    assert reason in str(refused.value)


def test_a_model_that_cannot_be_cut_is_said_and_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that give two hidden states of each token; and blocks that attend to the keys of one that is left out."""
    model = make("llama", layers=2)
    settings = ("train.epochs=3", "fast.prefix=off")
    assert chosen(model, "llama", *settings).way.frozen == FROZEN
    second = model.layers[1]
    two_each = calling(type(second), lambda self, *args, **kwargs: mx.stack([args[0], args[0]]))
    with as_classes([(second, two_each)]):
        config = resolve.load(None, settings)
        way, notes = trunk_choice.with_kept_trunk(Way(), model, config, Plan(long_rows(), config.train))
    assert way == Way()
    expected = "the first 2 blocks are computed anew in each epoch: its blocks hand on more than one hidden state"
    assert [note.startswith(expected) for note in notes] == [True]
    found = chosen(make("gemma4_text shared", layers=2), "gemma4_text shared", *settings)
    assert found.way.frozen == 0 and found.way.split is not None
    assert any(note.startswith("not used, for") and "the first 2 blocks once" in note for note in found.notes)


@pytest.mark.parametrize("fault", ["last_block", "prefix"])
def test_one_wrong_part_does_not_cost_the_blocks_that_are_left_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(model: nn.Module, way: Way, *_: Any) -> Verdict:
        on = way.prefix is not None if fault == "prefix" else fault in way.parts
        return Verdict("it does not reproduce this model (planted)") if on else Verdict()

    monkeypatch.setattr(proof, "prove", of)
    way = chosen(make("llama", layers=2), "llama", "train.epochs=3").way
    assert way.frozen == FROZEN and way.split is not None
    assert (way.prefix is None, "last_block" in way.parts) == (fault == "prefix", fault == "prefix")


def test_gemma_4s_attention_that_gives_its_keys_beside_ends_on_supervised_positions() -> None:
    found = chosen(make(GEMMA4, layers=2), GEMMA4, "train.epochs=3")
    assert found.way.frozen == FROZEN and "last_block" in found.way.parts
    assert not any(note.startswith("not used") for note in found.notes)


def test_blocks_that_are_computed_anew_because_only_pieces_fit_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "TOKENS", 64)
    model = make("llama", layers=2)
    config = resolve.load(None, ("train.epochs=3", "train.batch_rows=1"))
    plan = Plan(long_rows(), config.train)

    def predicted(_: Given, way: Way, *__: Any) -> Memory:
        return Memory(1 if way.tokens else 3, *[0] * 6)

    monkeypatch.setattr(fit_memory, "predict_run", predicted)
    found = fit_memory.fit(Given(model, sizes("llama"), mx.float32, 2), CUT, config, plan)
    assert found.way.tokens == 64 and found.way.frozen == 0
    assert any(note.startswith("the first 2 blocks are computed anew in each epoch: rows go") for note in found.notes)


def test_noise_at_the_embedding_is_named_where_blocks_could_have_been_left_out() -> None:
    model = make("llama", layers=2)
    found = chosen(model, "llama", "train.epochs=3", "train.neftune_alpha=5")
    expected = (
        "the first 2 blocks are computed anew in each epoch: with train.neftune_alpha each row has noise of its own"
    )
    assert found.way.frozen == 0 and any(note.startswith(expected) for note in found.notes)


def test_what_rows_share_is_counted_before_they_are_computed_one_by_one() -> None:
    """8 rows of about 200 tokens, 40 of them shared: 2 batches compute 1,320 positions, each row alone 1,564. Three
    quarters of the passes through blocks are forward and back through the two trained ones.
    """
    model = make("llama", layers=2)
    found = {}
    for settings in (("fast.prefix=off",), ()):
        for epochs in ("1.5", "2"):
            found[settings, epochs] = chosen(model, "llama", f"train.epochs={epochs}", *settings).way.frozen
    assert list(found.values()) == [FROZEN, FROZEN, 0, FROZEN]


def test_rows_that_wander_between_processes_are_kept_where_that_still_pays() -> None:
    """With four processes a row of one and a half epochs was computed by 1.4 of them, on average."""
    model = make("llama", layers=2)
    for processes, epochs, frozen in ((1, 1.5, FROZEN), (4, 1.5, 0), (4, 6, FROZEN)):
        config = resolve.load(None, (f"train.epochs={epochs}", "train.batch_rows=4"))
        plan = Plan(long_rows(), config.train)
        way, _ = trunk_choice.with_kept_trunk(Way(), model, config, plan, processes)
        assert way.frozen == frozen, (processes, epochs)


def test_what_has_no_room_is_said_and_a_place_for_files_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 rows of 1,564 positions, width 64, float32: 400,384 bytes."""
    config = resolve.load(None, ("train.epochs=3", "train.batch_rows=4"))
    known = config, Plan(long_rows(), config.train), sizes("llama"), mx.float32

    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    for spare, memory in ((10**9, 400_384), (200_000, 100_000), (-5, 0)):
        budget, text = trunk_choice.budget_for(*known, spare)
        assert budget == Budget(memory, 0)
        assert ("all rows would take" in text) == (memory < 400_384)


def test_a_cache_without_room_for_enough_rows_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", layers=2)
    for free, frozen in ((1 << 30, FROZEN), (100_000, 0)):
        monkeypatch.setattr(trunk_choice, "SPARE_SHARE", 0.0)
        monkeypatch.setattr(trunk_choice, "_free_disk", lambda free=free: free)
        found = chosen(model, "llama", "train.epochs=3")
        assert found.way.frozen == frozen
        assert frozen or any("anew in each epoch: with room for 6% of the rows it would" in x for x in found.notes)

"""The way a run takes: the first proven one, its batches fitted to it; and what a proof may take of the memory."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import zoo
from mlx.utils import tree_map
from training import tune
from ways import COMMON, SHAPES, make, rows

from mlxtune.compute import fast_ways, fit_memory, proof
from mlxtune.compute.fast_ways import Blocks
from mlxtune.compute.fit_memory import Fitted, Given
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.compute.proof import Room, Verdict
from mlxtune.config import resolve as configuration
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Plan
from mlxtune.errors import UserError
from mlxtune.machine import gpu_errors
from mlxtune.train.choice import choose
from mlxtune.train.ranks import Ranks

SETTINGS = ("train.epochs=1", "train.batch_rows=4")


def sizes(kind: str) -> dict[str, Any]:
    """config.json of a model of ways.make."""
    return {"model_type": kind.split()[0], **COMMON, **SHAPES[kind]}


def long_rows(tokens: int = 200, count: int = 8) -> list[Example]:
    return rows(40, [tokens - 40 - index for index in range(count)])


def chosen(model: nn.Module, kind: str, *settings: str, limit: int | None = None, **others: Any) -> Fitted:
    config = configuration.load(None, (*SETTINGS, *settings))
    given = Given(model, sizes(kind), others.pop("dtype", mx.float32), limit)
    return choose(given, config, Plan(long_rows(), config.train), **others)


def needed(model: nn.Module, kind: str, way: Way) -> int:
    config = configuration.load(None, SETTINGS)
    return fit_memory.predict_run(
        Given(model, sizes(kind), mx.float32), way, config, Plan(long_rows(), config.train)
    ).total


@pytest.fixture
def without_split(monkeypatch: pytest.MonkeyPatch) -> list[Way]:
    """Every way with the head apart is refused. Returns the ways that are proven, as they are."""
    seen: list[Way] = []
    real = proof.prove

    def of(model: nn.Module, way: Way, *rest: Any) -> Verdict:
        seen.append(way)
        return Verdict("it does not reproduce this model (planted)") if way.split else real(model, way, *rest)

    monkeypatch.setattr(proof, "prove", of)
    return seen


@pytest.fixture(autouse=True)
def large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, changes in {
        "llama vocabulary": {"vocab_size": 8192},
        "qwen2 vocabulary": {"vocab_size": 8192, "num_hidden_layers": 4, "tie_word_embeddings": True},
        "llama wide": {"num_hidden_layers": 8, "intermediate_size": 512},
        "llama wide vocabulary": {"num_hidden_layers": 8, "intermediate_size": 512, "vocab_size": 4096},
        "gemma3_text wide": {**SHAPES["gemma3_text"], "sliding_window": 150},
    }.items():
        monkeypatch.setitem(SHAPES, kind, changes)


def test_a_slower_way_is_fitted_again_and_proven_as_it_will_run(without_split: list[Way]) -> None:
    kind = "llama wide vocabulary"
    model = make(kind)
    split = Split(model, "model", 4096)
    limit = (needed(model, kind, Way(split)) + needed(model, kind, Way())) // 2
    assert needed(model, kind, Way(split, prefix=40)) < limit < needed(model, kind, Way())
    found = chosen(model, kind, "fast.prefix=off", limit=limit)
    assert found.way == without_split[-1] == Way(recompute=1)
    assert [way.recompute for way in without_split[:-1]] == [0] * (len(without_split) - 1)
    assert found.config.train.checkpoint_layers == "all" and found.rows.section == found.config.train
    assert any("train.checkpoint_layers=all" in note for note in found.notes)
    assert any("does not reproduce" in note for note in found.notes)
    assert chosen(model, kind, "fast.prefix=off").way == Way()  # without a limit


def test_a_slower_way_that_fits_nothing_is_refused_with_the_reason(without_split: list[Way]) -> None:
    kind = "llama vocabulary"
    model = make(kind)
    least = configuration.load(None, ("train.epochs=1", "train.batch_rows=1"))
    plan = Plan(long_rows(), least.train)
    alone = fit_memory.predict_run(Given(model, sizes(kind), mx.float32), Way(recompute=1), least, plan).total
    with pytest.raises(UserError, match=r"even with one row at a time and checkpointing; .* does not reproduce"):
        chosen(model, kind, limit=alone - 1)


def test_a_run_that_computes_every_block_again_leaves_out_what_then_brings_nothing() -> None:
    model = make("llama")
    way = Way(parts=("activations", "last_block"))
    for layers, expected in (("none", way.parts), ("2", way.parts), ("all", ("last_block",)), ("nested", ())):
        section = configuration.load(None, (f"train.checkpoint_layers={layers}",)).train
        assert fast_ways.checkpointed(way, section, model, may_divide=True).parts == expected, layers


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gemma4_text shared", "its blocks are given more than hidden states, a mask and a cache"),
        ("gemma4_text experts", "its blocks hand on more than hidden states, keys and values"),
        ("llama", ""),
    ],
)
def test_a_plan_says_of_which_models_blocks_no_piece_can_be_computed(
    kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, kind, {"num_kv_shared_layers": 0, **zoo.SHAPES.get(kind, {})})
    model = make(kind)
    examples = rows(0, [600, 40])
    config = configuration.load(None, ("train.checkpoint_layers=nested",))
    given = Given(model, sizes(kind), mx.float32)
    way = fast_ways.expected_way(model, examples, config)
    fitted = fit_memory.fit(given, way, config, Plan(examples, config.train))
    assert (fitted.way.recompute, fitted.way.tokens > 0) == (1, not reason)
    assert fitted.notes == ([f"blocks are checkpointed with whole rows: {reason}"] if reason else [])


def test_checkpointing_that_cannot_be_proven_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = proof.prove
    wrong = Verdict("it does not reproduce this model (planted)")
    monkeypatch.setattr(proof, "prove", lambda model, way, *rest: wrong if way.recompute else real(model, way, *rest))
    found = chosen(make("llama"), "llama", "train.checkpoint_layers=all")
    assert found.way.split is not None and found.way.recompute == 0


@pytest.mark.parametrize("split_too", [False, True], ids=["pieces", "pieces, and the head apart"])
def test_blocks_that_cannot_be_proven_in_pieces_are_computed_whole(
    split_too: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else is left out. Where whole blocks do not fit the memory, a slower way in pieces is looked for."""
    real = proof.prove
    wrong = Verdict("it does not reproduce this model (planted)")

    def of(model: nn.Module, way: Way, *rest: Any) -> Verdict:
        bad = way.tokens and (way.split or not split_too)
        return wrong if bad else real(model, way, *rest)

    monkeypatch.setattr(proof, "prove", of)
    model, pieces = make("llama"), "train.checkpoint_layers=pieces"
    if not split_too:
        found = chosen(model, "llama", pieces)
        assert found.way.split is not None and found.way.prefix is not None
        assert (found.way.recompute, found.way.tokens) == (1, 0)
        assert found.notes[0] == "blocks are checkpointed with whole rows: in pieces they are not proven"
        assert "in pieces of up to 512 tokens" in found.notes[1]
        return
    real_fit = fit_memory.fit

    def fit(given: Given, way: Way, config: Any, rows: Plan, blocks: Blocks = Blocks.IN_PIECES) -> Fitted:
        if blocks is not Blocks.IN_PIECES:
            raise UserError("too much", "")
        return real_fit(given, way, config, rows, blocks)

    monkeypatch.setattr(fit_memory, "fit", fit)
    found = chosen(model, "llama", pieces)
    assert found.way.split is None and found.way.tokens == 512


def raising(monkeypatch: pytest.MonkeyPatch, text: str, times: int) -> list[int]:
    """The fast way raises so often. Returns the widths of the rows it is given."""
    real, widths = proof.sums_of, list[int]()

    def gradients(model: nn.Module, way: Way, batch: Any) -> Any:
        widths.append(batch.ids.shape[1])
        if len(widths) <= times:
            raise RuntimeError(text)
        return real(model, way, batch)

    monkeypatch.setattr(proof, "sums_of", gradients)
    return widths


FAILED = "[METAL] Command buffer execution failed: "
MEMORY = f"{FAILED}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
WATCHDOG = f"{FAILED}Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"


def test_an_error_of_the_gpu_is_not_the_models_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    widths = raising(monkeypatch, MEMORY, 1)
    found = chosen(model, "llama")
    assert found.way.split is not None and found.way.prefix is not None and not found.notes
    assert widths == [200, 100]
    for text, tries in ((MEMORY, 2), (WATCHDOG, 1)):
        widths = raising(monkeypatch, text, 9)
        with pytest.raises(RuntimeError, match="Command buffer") as caught:
            chosen(model, "llama")
        assert gpu_errors.recognise(caught.value) and len(widths) == tries


def test_all_ranks_take_the_way_that_each_has_proven() -> None:
    last = len(fast_ways.ways_to_try(Way())) - 6  # the head alone; then the plain way, and both with less checkpointing

    class Two(Ranks):
        """The other rank comes to that way."""

        def highest(self, number: int) -> int:
            return max(number, last)

        def lowest(self, number: int) -> int:
            return min(number, last)

    found = chosen(make("llama"), "llama", ranks=Two())
    assert found.way.split is not None and found.way.prefix is None


def test_a_window_that_the_memory_does_not_let_the_proof_pass_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "gemma3_text wide"
    model = make(kind)
    assert chosen(model, kind).notes == []
    monkeypatch.setattr(fit_memory, "proof_room", lambda *_: Room(tokens=100))
    notes = chosen(model, kind, "fast.prefix=off").notes
    assert "the proof's rows end after 100 tokens, for memory: a window of 150 is not proven" in notes


def test_rows_of_a_proof_pass_a_window_wider_than_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_memory, "MAX_TOKENS", 120)
    model = make("gemma3_text wide")
    config = configuration.load(None, SETTINGS)
    plan = Plan(long_rows(), config.train)

    def tokens(model_config: dict[str, Any]) -> int:
        given = Given(model, model_config, mx.float32)
        return fit_memory.proof_room(
            given, Fitted(Way(), config, plan, fit_memory.predict_run(given, Way(), config, plan), [])
        ).tokens

    assert tokens(sizes("gemma3_text wide")) == 200
    for never_passed in ({}, {"sliding_window": 5000}, {"sliding_window": 150, "use_sliding_window": False}):
        assert tokens(sizes("llama") | never_passed) == 120


@pytest.mark.parametrize(
    ("kind", "bits", "dtype", "settings"),
    [
        ("qwen2 vocabulary", 0, mx.float32, ("train.checkpoint_layers=all",)),
        ("qwen2 vocabulary", 0, mx.float32, ()),
        ("llama vocabulary", 0, mx.float32, ("train.checkpoint_layers=all", "train.batch_rows=1")),
        ("llama wide", 0, mx.float32, ("train.batch_rows=2", "fast.head=off")),
        ("llama wide", 0, mx.bfloat16, ("train.checkpoint_layers=all",)),
        ("llama wide", 4, mx.bfloat16, ("train.checkpoint_layers=2",)),
    ],
    ids=str,
)
def test_the_proof_takes_no_more_memory_than_the_run_is_predicted_to(
    kind: str, bits: int, dtype: mx.Dtype, settings: tuple[str, ...]
) -> None:
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    model = make(kind, dtype, bits)
    model.update(tree_map(lambda array: array.astype(mx.float32), model.trainable_parameters()))
    mx.eval(model.parameters())
    mx.reset_peak_memory()
    found = chosen(model, kind, *settings, dtype=dtype)
    peak = mx.get_peak_memory() - before
    assert found.way.prefix == 40 and not found.notes
    assert peak <= found.memory.total


def test_a_proof_computes_blocks_again_before_its_rows_are_cut() -> None:
    kind = "llama wide"
    model = make(kind)
    config = configuration.load(None, (*SETTINGS, "train.checkpoint_layers=all"))
    split = Split(model, "model", 320)

    def room(way: Way, count: int, dtype: mx.Dtype = mx.float32, limit: int | None = None) -> Room:
        plan = Plan(long_rows(count=count), config.train)
        given = Given(model, sizes(kind), dtype, limit)
        return fit_memory.proof_room(
            given, Fitted(way, config, plan, fit_memory.predict_run(given, way, config, plan), [])
        )

    assert room(Way(split), 4) == Room(200, checkpointed=False)
    assert room(Way(split, recompute=1), 4) == Room(200, checkpointed=True)
    tight = room(Way(split, recompute=1), 1)
    assert tight.checkpointed and tight.raised and proof.FEWEST_TOKENS <= tight.tokens < 200


def test_a_proof_is_in_16_bits_only_where_float32_does_not_fit_the_limit() -> None:
    kind = "llama wide"
    model = make(kind, mx.bfloat16)
    model.update(tree_map(lambda array: array.astype(mx.float32), model.trainable_parameters()))
    config = configuration.load(None, (*SETTINGS, "train.batch_rows=1", "train.checkpoint_layers=all"))
    plan = Plan(rows(0, [66]), config.train)
    way = Way(Split(model, "model", 320), recompute=1)
    given = Given(model, sizes(kind), mx.bfloat16)
    run = Fitted(way, config, plan, fit_memory.predict_run(given, way, config, plan), [])
    limits = (None, 10 * run.memory.total, run.memory.total)
    rooms = [fit_memory.proof_room(replace(given, limit=limit), run) for limit in limits]
    assert [room.raised for room in rooms] == [True, True, False]
    assert all(room.checkpointed and room.tokens == proof.FEWEST_TOKENS for room in rooms)


def test_a_run_in_16_bits_takes_the_fast_ways_and_its_peak_counts_the_proof(
    hf_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, held = proof.prove, 300 << 20

    def of(*known: Any) -> Verdict:
        mx.eval(mx.zeros(held // 4))
        return real(*known)

    monkeypatch.setattr(proof, "prove", of)
    few = ("train.steps=1", "train.dtype=bfloat16", "train.eval_every=0", "train.save_every=0")
    found = tune(hf_model, data, tmp_path / "run", *few)
    notes = [event["text"] for event in found if event["kind"] == "note"]
    assert any(note.startswith("computed: the head on supervised tokens only, the shared prefix of") for note in notes)
    assert not any("not used" in note or "not finite" in note for note in notes)
    assert held < min(event["peak_bytes"] for event in found if event["kind"] == "train") < 2 * held

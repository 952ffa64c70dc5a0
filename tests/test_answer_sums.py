"""The loss of each answer by itself, in every way to compute it: the plain way's numbers, and no answer for another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
import zoo
from preferences import examples, of_pairs, of_rated, of_several_examples
from rounding import as_a_gpu
from test_extent import LIMIT, LONGROPE
from test_proof import in_16_bits
from ways import COMMON, SHAPES, assert_close, make

from mlxtune.compute import fast_ways, head_loss, loss, prefix, proof, trunk, trunk_choice
from mlxtune.compute.division import Division, units
from mlxtune.compute.gradients import Gradients
from mlxtune.compute.head import Split
from mlxtune.compute.loss import LossInputs, Way
from mlxtune.compute.proof import Room, Verdict
from mlxtune.config.schema import TrainSection
from mlxtune.data.dataset import forest
from mlxtune.data.dataset.batches import Batch, collate
from mlxtune.model.arrays import named
from mlxtune.model.corrections import extent
from mlxtune.model.load import load
from mlxtune.train.preference.reference import forward_of

PAIRS = of_pairs(examples([(34, 12, 9), (20, 5, 17)]))
ONE_PAIR = of_pairs(examples([(34, 12, 9)]))
# Of the first pair the chosen answer takes two examples, of the second the rejected one.
SEVERAL = of_several_examples(of_pairs(examples([(34, 12, 9), (20, 5, 17), (20, 6, 8)])), [0, 0, 1, 2, 3, 3])
RATED = of_rated(examples([(34, 12, 9), (20, 5, 17)]), [True, False, False, True])


@pytest.fixture(autouse=True)
def small_chunks_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that answers end within a chunk of the head, and a pair is a trunk and two branches."""
    monkeypatch.setattr(head_loss, "MIN_CHUNK_ROWS", 5)
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", 1)
    monkeypatch.setattr(forest, "A_PASS", 4)


def split_of(model: nn.Module, batch: Batch = PAIRS) -> Split:
    split = Split.of(model, mx.array(batch.ids))
    assert split is not None
    return split


def ways(split: Split) -> dict[str, Way]:
    return {
        "prefix": Way(prefix=0),
        "head": Way(split),
        "head, prefix": Way(split, prefix=0),
        "head, prefix, checkpointed": Way(split, prefix=0, recompute=1),
        "every second block": Way(split, prefix=0, recompute=2, powers=True),
        "chunks of queries": Way(split, prefix=0, queries=5, recompute=1),
        "pieces": Way(split, queries=4, recompute=1, tokens=21),
        "nested pieces, prefix": Way(split, prefix=0, queries=3, recompute=1, tokens=15, nested=2),
        "parts": Way(split, prefix=0, parts=("thin", "kernels", "last_block")),
    }


@pytest.mark.parametrize("batch", [PAIRS, ONE_PAIR, SEVERAL, RATED], ids=["pairs", "one pair", "several", "rated"])
def test_every_way_gives_the_plain_ways_sums_and_gradients(batch: Batch) -> None:
    """Each answer weighs otherwise (`proof.sums_of`), so one that is taken for another is seen."""
    model = make("llama")
    for label, way in ways(split_of(model)).items():
        assert_close(model, way, batch, 1e-5, 3e-5, label)


@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind != "llama"])
def test_other_families_too(kind: str) -> None:
    model = make(kind)
    found = ways(split_of(model))
    for label in ("head, prefix, checkpointed", "parts"):
        assert_close(model, found[label], SEVERAL, 1e-5, 3e-5, label)


def test_gated_delta_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"qwen3_5": {"text_config": {**COMMON, **zoo.SHAPES["qwen3_5_text"], "model_type": "qwen3_5_text"}}}
    monkeypatch.setitem(SHAPES, "qwen3_5", shape["qwen3_5"])
    model = make("qwen3_5")
    assert_close(model, Way(split_of(model), prefix=0, recompute=1), PAIRS, 1e-5, 3e-5, "gated delta")


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_states_of_frozen_blocks_are_fed_to_each_answer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, kind, {**SHAPES[kind], "num_hidden_layers": 4})
    model = make(kind, layers=2)
    _, beside = trunk.states_of(model, 2, trunk_choice.ANY)
    way = Way(split_of(model), prefix=0, recompute=1, frozen=2, beside=beside)
    assert_close(model, way, SEVERAL, 1e-6, 3e-5, kind)


def test_a_trained_head_gets_its_gradients_from_every_answer() -> None:
    model = make("llama")
    model.lm_head.unfreeze()
    assert_close(model, Way(split_of(model), head_trained=True, prefix=0, recompute=1), SEVERAL, 1e-5, 3e-5, "head")


def test_an_answer_sums_to_what_it_sums_to_alone() -> None:
    """So does one of several examples; and all together to the loss of supervised training."""
    model = make("llama")
    way = Way(split_of(model), prefix=0)
    sums = np.array(Gradients(model, way).answer_sums(SEVERAL))
    wanted = np.zeros(4)
    for row, number in enumerate(SEVERAL.answer_of):
        wanted[number] += loss.plain(model, SEVERAL.part(slice(row, row + 1))).item()
    np.testing.assert_allclose(sums, wanted, rtol=1e-5)
    assert sums.sum() == pytest.approx(loss.plain(model, SEVERAL).item(), rel=1e-5)


@pytest.mark.parametrize("label", ["plain", *ways(None)])  # type: ignore[arg-type]
def test_sums_have_the_same_bits_with_and_without_a_gradient(label: str) -> None:
    """The reference is computed without one: with the model at step 0 every margin is then exactly 0."""
    model = make("llama")
    gradients = Gradients(model, Way() if label == "plain" else ways(split_of(model))[label])
    _, sums, _ = gradients.of_answers(SEVERAL, lambda sums: (sums * sums).sum())
    np.testing.assert_array_equal(np.array(gradients.answer_sums(SEVERAL)), np.array(sums))


@pytest.mark.parametrize("every", ["none", "all", 2, "pieces"])
def test_a_reference_is_cut_into_the_chunks_of_its_run(every: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that checkpoints every block has smaller ones, and another grouping of a sum has other bits."""
    monkeypatch.setattr(head_loss, "chunk_rows", lambda _, __, small=False: 3 if small else 8)
    model = make("llama")
    way = fast_ways.checkpointed(Way(split_of(model)), TrainSection(checkpoint_layers=every), model, may_divide=True)
    assert way.small_chunks == (every in ("all", "pieces"))
    _, sums, _ = Gradients(model, way).of_answers(SEVERAL, lambda sums: sums.sum())
    np.testing.assert_array_equal(forward_of(model, way)(SEVERAL), -np.array(sums))


def test_chunks_of_a_trained_head_stay_as_they_are() -> None:
    model = make("llama")
    way = Way(split_of(model), head_trained=True)
    checkpointed = fast_ways.checkpointed(way, TrainSection(checkpoint_layers="all"), model, may_divide=False)
    assert checkpointed.recompute == 1 and not checkpointed.small_chunks
    assert not fast_ways.divided(way).small_chunks


def test_the_value_may_be_any_function_of_all_sums() -> None:
    """Its gradient goes through the head as the chain rule says: against the plain way's own derivative."""
    model = make("llama")

    def value_of(sums: mx.array) -> mx.array:
        return mx.logsumexp(0.05 * sums[0] * sums - 0.1 * sums[::-1] * sums)

    value, _, gradients = Gradients(model, Way(split_of(model), prefix=0)).of_answers(PAIRS, value_of)
    plain = nn.value_and_grad(model, lambda: value_of(loss.plain_answer_sums(model, PAIRS)))
    wanted, of_plain = plain()
    assert proof.difference(proof._read(value, gradients), proof._read(wanted, of_plain)).within(1e-5, 1e-4)


def test_a_pair_is_computed_as_its_prompt_and_two_answers() -> None:
    """Of the prompt all but what predicts the first target; a row's last token predicts nothing."""
    passes = prefix.forest_of_batch(ONE_PAIR, 0)
    assert [(len(each.rows), each.start, each.width) for each in passes.passes] == [(1, 0, 32), (2, 32, 13)]
    longer = of_pairs(examples([(200, 64, 64)]))
    assert prefix.forest_of_batch(longer, 0).computed <= 200 + 64 + 64 + prefix.GRAIN < 2 * 200


# Rows that are rotated by how long they are.


@pytest.mark.parametrize("recompute", [0, 1])
def test_sides_that_are_rotated_otherwise_are_one_pair_all_the_same(recompute: int, tmp_path: Any) -> None:
    """The chosen answer within the limit, the rejected one beyond it; each as it is alone, without padding."""
    rows = examples([(LIMIT - 20, 10, 40), (30, 8, 6)])
    batch = of_pairs(rows)
    model = load(str(tiny.make_model(tmp_path / "model", "phi3", **LONGROPE)), "float32").model
    model.freeze()
    model.layers[0].self_attn.unfreeze()
    assert extent.longest_alike(model) == LIMIT
    assert len(extent.alike(batch, LIMIT)) == 2
    wanted = proof.plain_sums(model, collate(rows, [0]))
    for row in range(1, len(rows)):  # with the weights of `proof.sums_of`
        value, gradients = proof.plain_sums(model, collate(rows, [row]))
        summed = {name: array + (1 + row) * gradients[name] for name, array in wanted[1].items()}
        wanted = wanted[0] + (1 + row) * value, summed
    for way in (Way(), Way(split_of(model), recompute=recompute, parts=("last_block",))):
        assert proof.difference(proof.sums_of(model, way, batch), wanted).within(1e-5, 3e-5)
    together = proof.difference(proof.plain_sums(model, batch), wanted)
    assert not together.within(1e-4, 1e-3)  # what the parts are for


# Steps that are divided.


@pytest.mark.parametrize(
    ("batch", "halved", "parts"),
    [
        (of_pairs(examples([(20, 5, 6)] * 3)), 1, [4, 2]),
        (of_pairs(examples([(20, 5, 6)] * 4)), 2, [2, 2, 2, 2]),
        (ONE_PAIR, 3, [2]),
        (SEVERAL, 1, [3, 3]),
        (RATED, 2, [1, 1, 1, 1]),
    ],
)
def test_a_pair_is_never_divided(batch: Batch, halved: int, parts: list[int]) -> None:
    cut = Division(halved).parts(batch)
    assert [len(part.rows) for part in cut] == parts
    np.testing.assert_array_equal(np.concatenate([part.ids for part in cut]), batch.ids)
    if batch is not RATED:
        for part in cut:
            assert part.answer_sides.tolist() == [1, 2] * part.pairs and part.answer_of[0] == 0


def test_a_pair_that_does_not_fit_alone_is_checkpointed_then_computed_in_pieces() -> None:
    assert units(ONE_PAIR) == units(SEVERAL) - 1 == 1
    way = Way(prefix=0)
    assert Division().smaller(units(SEVERAL), way) == Division(halved=1)
    checkpointed = Division().smaller(units(ONE_PAIR), way)
    assert checkpointed == Division(checkpointed=True)
    assert checkpointed.smaller(1, way) is None
    assert checkpointed.smaller(1, way, may_divide=True) == Division(checkpointed=True, in_pieces=True)


# The proof.


def answers_change_places(model: Any, way: Way, inputs: LossInputs, *given: Any) -> Any:
    mirrored = None if inputs.answer_of is None else inputs.answers - 1 - inputs.answer_of
    return OF_INPUTS(model, way, replace(inputs, answer_of=mirrored), *given)


def the_first_target_counts_for_the_answer_before(model: Any, way: Way, inputs: LossInputs, *given: Any) -> Any:
    assert inputs.answer_of is not None
    moved = mx.concatenate([inputs.answer_of[:1], inputs.answer_of[:-1]])
    return OF_INPUTS(model, way, replace(inputs, answer_of=moved), *given)


def every_answer_gets_the_same_cotangent(model: Any, way: Way, inputs: LossInputs, *given: Any) -> Any:
    """The sums stay right, their gradients do not."""
    sums = OF_INPUTS(model, way, inputs, *given)
    kept = mx.stop_gradient(sums)
    return kept + (sums - kept).mean()


OF_INPUTS = loss.of_inputs
WRONG: list[Callable[..., Any]] = [
    answers_change_places,
    the_first_target_counts_for_the_answer_before,
    every_answer_gets_the_same_cotangent,
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_an_answer_taken_for_another_is_refused(wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    way = Way(split_of(model), prefix=0)
    assert proof.prove(model, way, PAIRS, mx.float32, Room()) == Verdict()
    monkeypatch.setattr(loss, "of_inputs", wrong)
    verdict = proof.prove(model, way, PAIRS, mx.float32, Room())
    assert "does not reproduce this model" in verdict.wrong


@pytest.mark.parametrize("raised", [True, False])
def test_pairs_of_a_16_bit_model_are_proven_whatever_order_a_gpu_sums_in(
    raised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_a_gpu(monkeypatch, 3e-6)
    model = in_16_bits("llama", mx.bfloat16)
    way = Way(split_of(model, ONE_PAIR), prefix=0, recompute=1)
    assert proof.prove(model, way, ONE_PAIR, mx.bfloat16, Room(raised=raised)) == Verdict()
    gradients = proof.sums_of(model, way, ONE_PAIR)[1]
    assert gradients.keys() == named(model.trainable_parameters()).keys()

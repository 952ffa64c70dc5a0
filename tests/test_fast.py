"""Every fast way against the plain one: losses, gradients, twenty steps; and the proof that guards them.

The oracle is `loss.plain`: all logits of the model's own forward, cross-entropy times mask. Gradients are compared in
float64 too, where rounding cannot hide a small mistake.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map, tree_unflatten

from mlxtune import backend
from mlxtune import config as configuration
from mlxtune.data.batches import Batch, Plan, collate
from mlxtune.data.chat import Example
from mlxtune.errors import UserError
from mlxtune.model import exponentials, lora, prefix
from mlxtune.model.arrays import named
from mlxtune.model.head import Split
from mlxtune.model.quantize import on_cpu
from mlxtune.sections import LoraSection
from mlxtune.train import fast, gradients, loss, optim
from mlxtune.train.gradients import Gradients, filled
from mlxtune.train.loss import Path
from mlxtune.train.step import Job, StepFunction

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
WINDOW = 6
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama windows": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW},
    "granite": {
        "logits_scaling": 3.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": WINDOW,
        "rope_theta": 10000,
    },
}
MIXTURES = ("mixtral", "gpt_oss")


def make(kind: str, dtype: mx.Dtype = mx.float32, bits: int = 0, dropout: float = 0.0) -> nn.Module:
    """A two-layer model of mlx-lm with keyed random weights and an adapter that is not zero."""
    name = kind.split()[0]
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict({"model_type": name, **COMMON, **SHAPES[kind]}))
    weights = {}
    for index, (path, array) in enumerate(named(model.parameters()).items()):
        noise = mx.random.normal(array.shape, key=mx.random.key(index))
        weights[path] = array + 0.1 * noise if array.ndim == 1 else noise * (1.0 if "embed" in path else 0.12)
    model.update(tree_unflatten(list(weights.items())))
    if bits:
        nn.quantize(model, 32, bits)
        on_cpu(model)
    keys = lora.attach(model, lora.Spec.of(model, LoraSection(rank=2, dropout=dropout)), 0)
    for index, layer in enumerate(lora.adapters(model).values()):
        layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(1000 + index))
    model.update(tree_map(lambda a: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters()))
    model.dropout_keys = keys
    return model


def rows(shared: int, suffixes: list[int], seed: int = 0) -> list[Example]:
    """Rows with a common beginning; the first target comes right after it, as late as a prefix allows."""
    draw = np.random.default_rng(seed)
    start = draw.integers(3, 250, shared).tolist()
    out = []
    for index, length in enumerate(suffixes):
        own = [260 + index, *draw.integers(3, 250, length - 1).tolist()]  # rows differ from their own first token on
        out.append(Example(start + own, [0] * (shared + 1) + [1] + draw.integers(0, 2, length - 2).tolist()))
    return out


def batch(shared: int, suffixes: list[int]) -> Batch:
    return collate(rows(shared, suffixes), list(range(len(suffixes))))


BATCH = batch(17, [12, 9, 4])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows a chunk, so that every loss here goes through several, the last one shorter."""
    monkeypatch.setattr(loss, "MIN_CHUNK_ROWS", 5)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1)


def ways(model: nn.Module, batch: Batch) -> dict[str, Path]:
    split = Split.of(model, mx.array(batch.ids))
    assert split is not None
    assert prefix.usable(batch, 0) == 16  # of 17 shared tokens, in steps of GRAIN
    found = {}
    for head, shared, every in product([True, False], [0, None], [0, 1, 2]):
        path = Path(split if head else None, prefix=shared, recompute=every)
        found[f"head {head}, prefix {shared}, recompute {every}"] = path
        if head and shared == 0:
            found[f"recompute {every}, powers of two"] = replace(path, powers=True)
    return found


def assert_close(model: nn.Module, path: Path, batch: Batch, of_loss: float, of_gradient: float, label: str) -> None:
    expected, wanted = fast.gradients(model, Path(), batch)
    value, got = fast.gradients(model, path, batch)
    assert value == pytest.approx(expected, rel=of_loss), label
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        norm = np.linalg.norm(gradient)
        assert norm > 0, name
        assert np.linalg.norm(got[name] - gradient) <= of_gradient * norm, (label, name)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("precision", ["float32", "float64", "4-bit"])
def test_losses_and_gradients_are_those_of_the_plain_way(kind: str, precision: str) -> None:
    if precision == "float64" and kind in MIXTURES:
        pytest.skip("MLX multiplies gathered experts in float32 only")
    model = make(kind, mx.float64 if precision == "float64" else mx.float32, 4 if precision == "4-bit" else 0)
    for label, path in ways(model, BATCH).items():
        assert_close(model, path, BATCH, *((1e-12, 1e-6) if precision == "float64" else (1e-5, 3e-5)), label)


@pytest.mark.parametrize("lengths", [(12, 12), (12, 4), (3, 14), (2, 3), (20, 2)], ids=str)
@pytest.mark.parametrize("kind", ["llama windows", "gemma3_text", "gpt_oss"])
def test_windows_shorter_and_longer_than_prefix_and_suffix(
    kind: str, lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "MIN_SAVED", 1e-9)
    common, own = lengths
    found = batch(common, [own, own, own])
    assert prefix.usable(found, common) == common
    for powers in (False, True):
        assert_close(make(kind), Path(prefix=common, recompute=1, powers=powers), found, 1e-5, 3e-5, kind)


@pytest.mark.parametrize("trained", ["head LoRA", "head", "tied embedding"])
def test_a_trained_head_gets_its_gradients(trained: str) -> None:
    model = make("llama tied" if trained == "tied embedding" else "llama")
    split = Split.of(model, mx.array(BATCH.ids))
    assert split is not None
    hidden = split.hidden(mx.array(BATCH.ids))[0, -1:]
    assert not split.head_is_trained(model, hidden)
    if trained == "head LoRA":
        head = lora.LoRALinear(model.lm_head, 2, 2.0, mx.random.key(5), 99, model.dropout_keys)
        model.lm_head = head  # B is zero, as it is when a run begins
        head.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    else:
        (model.model.embed_tokens if trained == "tied embedding" else model.lm_head).unfreeze()
    assert split.head_is_trained(model, hidden)
    if trained == "head LoRA":
        model.lm_head.lora_b = 0.05 * mx.random.normal((2, 320), key=mx.random.key(6))
    assert_close(model, Path(split, True, 0, 1), BATCH, 1e-5, 3e-5, trained)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_checkpointed_blocks_draw_the_same_dropout_again(kind: str) -> None:
    """Another mask in the second run would leave the loss right and the gradients 80% wrong."""
    model = make(kind, dropout=0.1)
    split = Split.of(model, mx.array(BATCH.ids))
    whole = fast.gradients(model, Path(), BATCH)[0]
    lengths = (BATCH.lengths - 1).tolist()
    model.dropout_keys.set(3, 1, BATCH.rows.tolist(), lengths, len(lora.adapters(model)))
    assert fast.gradients(model, Path(), BATCH)[0] != pytest.approx(whole, rel=1e-4)
    assert_close(model, Path(split, recompute=1), BATCH, 1e-5, 3e-5, kind)


def steps(kind: str, bits: int, dropout: float, path: Path | None, compiled: bool = False) -> list[float]:
    """Twenty optimizer steps of two micro-batches; path None: the fastest one. Returns the losses."""
    model = make(kind, bits=bits, dropout=dropout)
    settings = ("train.steps=20", "train.lr=3e-3", "train.batch_rows=3", "train.accumulate=2", "data.path=x")
    section = configuration.load(None, settings).train
    examples = rows(17, [12, 9, 4, 15, 7, 11, 5, 8])
    if path is None:
        shared = None if dropout else prefix.of_run(examples)
        path = Path(Split.of(model, mx.array([examples[0].ids])), prefix=shared, recompute=1)
        path = replace(path, powers=not compiled, compiled=compiled)
    plan = Plan(examples, section)
    job = Job(model, path, model.dropout_keys, plan, section, None, None, str, None, None)  # type: ignore[arg-type]
    step = StepFunction(job, optim.build(section, model.trainable_parameters()))
    return [step(number)["loss"] for number in range(1, 21)]


@pytest.mark.parametrize(
    ("kind", "bits", "dropout"),
    [("llama tied", 0, 0.0), ("qwen3", 4, 0.1), ("gemma3_text", 4, 0.0), ("granite", 0, 0.1), ("mixtral", 0, 0.0)],
)
def test_twenty_steps_have_the_losses_of_the_plain_loop(kind: str, bits: int, dropout: float) -> None:
    plain = steps(kind, bits, dropout, Path())
    assert plain[-1] < 0.97 * plain[0]
    np.testing.assert_allclose(steps(kind, bits, dropout, None), plain, rtol=1e-5)


def chosen(model: nn.Module, *settings: str, examples: list[Example] | None = None) -> tuple[Path, str]:
    resolved = configuration.load(None, settings)
    path, notes = fast.choose(model, examples or rows(17, [12, 9, 4, 15]), resolved, mx.float32)
    assert path.powers == (exponentials.worth_it() and (path.split is not None or path.prefix is not None))
    return replace(path, powers=False), "\n".join(notes)


def test_a_proof_leaves_every_bit_of_the_adapter_as_it_was() -> None:
    model = make("llama")
    before = {name: np.array(array) for name, array in named(model.trainable_parameters()).items()}
    path, notes = chosen(model, "train.checkpoint_layers=2")
    assert (path.split is not None, path.prefix, path.recompute, notes) == (True, 17, 2, "")
    for name, array in named(model.trainable_parameters()).items():
        assert np.array_equal(np.array(array), before[name])


def test_a_fast_way_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: windows forgotten in the masks over a prefix."""
    monkeypatch.setattr(prefix.PrefixCache, "make_mask", lambda *_, **__: "causal")
    path, notes = chosen(make("gemma3_text"))
    assert path.prefix is None
    assert path.split is not None
    assert "not used" in notes and "prefix of 17" in notes
    assert chosen(make("qwen2"))[0].prefix == 17  # which has no windows


def test_a_wrong_head_gradient_is_found_even_though_the_loss_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    real = loss._frozen
    monkeypatch.setattr(loss, "_frozen", lambda *a: real(*a) + 0.01 * (a[1].sum() - mx.stop_gradient(a[1].sum())))
    path, notes = chosen(make("llama"), "fast.prefix=off")
    assert path == Path()
    assert "the head on supervised tokens only" in notes


def test_a_wrong_power_of_two_is_found_and_the_rest_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exponentials, "worth_it", lambda: True)
    monkeypatch.setattr(exponentials, "LOG2_E", 1.45)
    path, notes = fast.choose(make("llama"), rows(17, [12, 9, 4, 15]), configuration.load(None, ()), mx.float32)
    assert (path.powers, path.prefix, path.split is not None) == (False, 17, True)
    assert "not used" in notes[0] and "exponentials as powers of two" in notes[0]


def test_the_prefix_is_off_where_it_cannot_be_exact_and_a_line_says_so() -> None:
    path, notes = chosen(make("llama", dropout=0.1), "lora.dropout=0.1")
    assert path.prefix is None and "lora.dropout" in notes
    module = importlib.import_module("mlx_lm.models.mamba")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "state_size": 8, "num_hidden_layers": 2, "conv_kernel": 4}
    sizes |= {"vocab_size": 320, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4}
    recurrent = module.Model(module.ModelArgs.from_dict({"model_type": "mamba", **sizes}))
    lora.attach(recurrent, lora.Spec.of(recurrent, LoraSection(rank=2)), 0)
    path, notes = chosen(recurrent)
    assert path.prefix is None and "keep more than keys and values" in notes


def test_options_switch_the_fast_ways_off() -> None:
    assert chosen(make("llama"), "fast.head=off", "fast.prefix=off") == (Path(), "")
    assert chosen(make("llama"), "fast.head=off")[0] == Path(prefix=17)
    assert chosen(make("llama"), examples=rows(0, [12, 9, 7]))[0].prefix is None


def test_rows_supervised_from_the_start_share_nothing() -> None:
    example = Example([5, 6, 7, 8, 9, 10], [0, 1, 1, 1, 1, 1])
    assert prefix.of_run([example, example]) == 0
    assert prefix.shared(collate([example, example], [0, 1])) == 0
    whole = Example(list(range(5, 25)), [1] * 20)
    assert prefix.shared(collate([whole, whole], [0, 1])) == 0
    same = Example(list(range(5, 25)), [0] * 19 + [1])  # equal rows: the predictor of the target stays
    assert prefix.of_run([same, same]) == prefix.shared(collate([same, same], [0, 1])) == 18


@pytest.mark.parametrize("setting", ["lora.dropout=0.1", "fast.prefix=off"])
def test_grouping_rows_for_a_prefix_that_is_off_is_refused(setting: str) -> None:
    with pytest.raises(UserError, match=r"data\.group_by_prefix has no effect"):
        fast.refuse_idle(configuration.load(None, ("data.group_by_prefix=true", setting)))


NEEDS_COMPILER = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="needs a C++ compiler")


@pytest.fixture
def compilation() -> Iterator[None]:
    """As on a GPU."""
    mx.enable_compile()
    yield
    mx.disable_compile()


@NEEDS_COMPILER
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_every_way_computes_the_same_inside_one_compiled_function(kind: str, compilation: None) -> None:
    model = make(kind)
    expected, wanted = fast.gradients(model, Path(), BATCH)
    for label, path in {"plain": Path(), **ways(model, BATCH)}.items():
        if path.powers:  # of the CPU alone, where nothing is compiled
            continue
        value, got = fast.gradients(model, replace(path, compiled=path.split is not None), BATCH)
        assert value == pytest.approx(expected, rel=1e-6), label
        for name, gradient in wanted.items():
            assert np.linalg.norm(got[name] - gradient) <= 3e-5 * np.linalg.norm(gradient), (label, name)


@NEEDS_COMPILER
def test_twenty_compiled_steps_have_the_losses_of_the_plain_loop_and_few_signatures(
    compilation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Gradients] = []
    real = Gradients.__init__

    def kept(self: Gradients, model: nn.Module, path: Path) -> None:
        real(self, model, path)
        made.append(self)

    monkeypatch.setattr(Gradients, "__init__", kept)
    plain = steps("llama", 0, 0.0, Path())
    np.testing.assert_allclose(steps("llama", 0, 0.0, None, compiled=True), plain, rtol=1e-5)
    assert 1 < len(made[-1].signatures) < 12
    monkeypatch.setattr(gradients, "MAX_SIGNATURES", 1)
    np.testing.assert_allclose(steps("llama", 0, 0.0, None, compiled=True), plain, rtol=1e-5)
    assert len(made[-1].signatures) == 1


@pytest.mark.parametrize("count", [1, 16, 17, 100, 129, 1000, 5000])
def test_targets_are_filled_up_by_less_than_a_quarter_and_to_few_numbers(count: int) -> None:
    assert count <= filled(count) < max(1.25 * count, count + 16)
    assert len({filled(n) for n in range(1, 5001)}) < 32


def test_on_a_gpu_the_step_is_compiled_unless_something_random_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "kind", lambda: "metal")
    wanted = lambda *settings: fast._wanted(make("llama"), rows(17, [12, 9]), configuration.load(None, settings))[0]  # noqa: E731
    assert wanted().compiled and not wanted().powers
    for setting in ("lora.dropout=0.1", "train.neftune_alpha=5", "fast.head=off"):
        assert not wanted(setting).compiled, setting

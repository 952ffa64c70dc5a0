"""Two-layer models of many families, rows with a common beginning, and every way to compute their loss."""

from __future__ import annotations

import importlib
from dataclasses import replace
from itertools import product
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map, tree_unflatten

from mlxtune.adapter import attach
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.compute import prefix, proof
from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.config import resolve as configuration
from mlxtune.config.schema import LoraSection
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Batch, Plan, collate
from mlxtune.model.arrays import named
from mlxtune.model.linux_cpu import multiply_densely
from mlxtune.train import optim
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


def make(
    kind: str, dtype: mx.Dtype = mx.float32, bits: int = 0, dropout: float = 0.0, layers: Any = "all"
) -> nn.Module:
    """A two-layer model of mlx-lm with keyed random weights and an adapter that is not zero. layers: lora.layers."""
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
        multiply_densely(model)
    keys = attach.attach(model, AdapterPlan.of(model, LoraSection(rank=2, dropout=dropout, layers=layers)), 0)
    for index, layer in enumerate(attach.adapted_layers(model).values()):
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


def ways(model: nn.Module, batch: Batch) -> dict[str, Way]:
    split = Split.of(model, mx.array(batch.ids))
    assert split is not None
    assert prefix.length_for_batch(batch, 0) == 16  # of 17 shared tokens, in steps of GRAIN
    found = {}
    for head, shared, every in product([True, False], [0, None], [0, 1, 2]):
        way = Way(split if head else None, prefix=shared, recompute=every)
        found[f"head {head}, prefix {shared}, recompute {every}"] = way
        if head and shared == 0:
            found[f"recompute {every}, powers of two"] = replace(way, powers=True)
    return found


def assert_close(model: nn.Module, way: Way, batch: Batch, of_loss: float, of_gradient: float, label: str) -> None:
    expected, wanted = proof.sums_of(model, Way(), batch)
    value, got = proof.sums_of(model, way, batch)
    assert value == pytest.approx(expected, rel=of_loss), label
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        norm = np.linalg.norm(gradient)
        assert norm > 0, name
        assert np.linalg.norm(got[name] - gradient) <= of_gradient * norm, (label, name)


def steps(kind: str, bits: int, dropout: float, way: Way | None, compiled: bool = False) -> list[float]:
    """Twenty optimizer steps of two micro-batches; way None: the fastest one. Returns the losses."""
    model = make(kind, bits=bits, dropout=dropout)
    settings = ("train.steps=20", "train.lr=3e-3", "train.batch_rows=3", "train.accumulate=2", "data.path=x")
    section = configuration.load(None, settings).train
    examples = rows(17, [12, 9, 4, 15, 7, 11, 5, 8])
    if way is None:
        shared = None if dropout else prefix.shared_by_run(examples)
        way = Way(Split.of(model, mx.array([examples[0].ids])), prefix=shared, recompute=1)
        way = replace(way, powers=not compiled, compiled=compiled)
    plan = Plan(examples, section)
    job = Job(model, way, model.dropout_keys, plan, section, None, None, str, None, None)  # type: ignore[arg-type]
    step = StepFunction(job, optim.build(section, model.trainable_parameters()))
    return [step(number)["loss"] for number in range(1, 21)]

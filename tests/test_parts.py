"""The parts of a model that are computed otherwise, each against the plain way: losses, gradients, memory."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import zoo
from ways import BATCH, COMMON, SHAPES, assert_close, make

from mlxtune.compute.head import Split
from mlxtune.compute.loss import Way
from mlxtune.model import gated_delta

# Query and key heads are fewer than value heads but in the last two; Kimi's gates are vectors.
DELTA = {
    "qwen3_5": {"text_config": {"model_type": "qwen3_5_text", **COMMON, **zoo.SHAPES["qwen3_5_text"]}},
    "qwen3_next": {**zoo.SHAPES["qwen3_next"], "partial_rotary_factor": 0.5},
    "olmo_hybrid": {**zoo.SHAPES["olmo_hybrid"], "linear_allow_neg_eigval": True},
    "kimi_linear": {
        **zoo.SHAPES["kimi_linear"],
        "linear_attn_config": {"kda_layers": [1], "num_heads": 2, "head_dim": 16, "short_conv_kernel_size": 4},
        "num_experts": 2,
        "model_max_length": 512,
        "mla_use_nope": True,
    },
}
ACTIVATIONS = ("llama", "gemma2", "gemma3_text", "granite", "mixtral", "gpt_oss")


@pytest.fixture(autouse=True)
def more_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, shape in DELTA.items():
        monkeypatch.setitem(SHAPES, kind, shape)


def with_parts(model: nn.Module, *names: str, **others: Any) -> Way:
    split = Split.of(model, mx.array(BATCH.ids))
    assert split is not None
    return Way(split, parts=names, **others)


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("kind", DELTA)
def test_gated_delta_layers_in_chunks_are_mlx_lms_loop_over_tokens(kind: str, recompute: int) -> None:
    model = make(kind)
    assert gated_delta.is_in(model)
    assert_close(model, with_parts(model, "gated_delta", recompute=recompute), BATCH, 1e-5, 3e-5, kind)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind: str) -> None:
    model = make(kind)
    assert_close(model, with_parts(model, "activations"), BATCH, 1e-6, 1e-6, kind)

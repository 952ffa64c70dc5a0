"""Every setting of every family against transformers, by hand: `python tests/sweep.py [FAMILY ...]`.

A tiny random model of each family is made with one setting of its config.json changed, opened here, and its logits
are compared with transformers' own. Each case ends in one of three ways: the same logits; refused, or named by a note;
or another model in silence, of which there must be none.

Last run over the 52 families of tests/zoo.py, mlx-lm 0.32.2 and transformers 5.24: 755 cases, of which transformers
itself cannot have 65; 539 the same, 60 refused, 91 named, 0 silent. Rotary settings are varied by tests/test_rotary.py:
45 families, 428 settings.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conformance
import mlx.core as mx
import numpy as np
import tiny
import zoo
from mlxtune_convert.hf import families

from mlxtune.errors import UserError
from mlxtune.machine import backend
from mlxtune.model.load import load

SAME = 1e-4  # largest difference of logits around 1
ROWS = (conformance.IDS, np.random.default_rng(1).integers(3, 250, (1, 300)))
# Of no effect on logits, or sizes that every model must agree on to hold its weights.
_LEFT_OUT = (
    "architectures bos_token_id dtype eos_token_id initializer_range model_type pad_token_id transformers_version "
    "use_cache vocab_size rope_parameters output_router_logits router_aux_loss_coef pretraining_tp tie_word_embeddings "
    "residual_in_fp32 rescale_prenorm_residual time_step_min time_step_max time_step_floor time_step_init_scheme "
    "use_mamba_kernels mamba_chunk_size chunk_size num_hidden_layers n_layer hidden_size n_embd num_attention_heads "
    "n_head max_position_embeddings n_positions scale_attention_softmax_in_fp32 attention_softmax_in_fp32 n_ctx "
    "output_attentions _name_or_path is_decoder add_cross_attention mtp_num_hidden_layers"
)
LEFT_OUT = frozenset(_LEFT_OUT.split())
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
OTHERS: dict[str, tuple[Any, ...]] = {  # what a key may be changed to, where a rule for its type would not do
    "sliding_window": (8, None),
    "num_key_value_heads": (1, 2, 4),
    "num_experts_per_tok": (1, 3),
    "moe_k": (1, 3),
    "attn_logit_softcapping": (0.5, None),
    "final_logit_softcapping": (0.5, None),
    "query_pre_attn_scalar": (64,),
    "clip_qkv": (0.05,),
    "no_rope_layers": ([1, 0], [0, 1], [0, 1, 0, 1]),
    "no_rope_layer_interval": (2,),
    "decoder_sparse_step": (2,),
    "mlp_only_layers": ([0],),
    "first_k_dense_replace": (0, 2),
    "layer_types": (
        ["full_attention", "sliding_attention"],
        ["sliding_attention", "sliding_attention"],
        ["full_attention", "full_attention"],
        ["full_attention", "linear_attention"],
        ["full_attention", "conv"],
    ),
    "max_window_layers": (0, 1),
    "head_dim": (8, 32),
    "n_groups": (2,),
    "topk_group": (2,),
    "num_kv_shared_layers": (1,),
}


def settings(family: str, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, changes of the family's shape): every key of a config.json, changed in one way and another."""
    for key, value in sorted(config.items()):
        if key in LEFT_OUT or "dropout" in key:
            continue
        for other in _others(key, value):
            if other != value:
                yield f"{key}={other}", {key: other}
    if "use_sliding_window" in config:
        yield "windows", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    for tied in (True, False):
        yield f"tie_word_embeddings={tied}", {"tie_word_embeddings": tied}


def _others(key: str, value: Any) -> tuple[Any, ...]:
    if key in OTHERS:
        return OTHERS[key]
    if isinstance(value, bool):
        return (not value,)
    if value in ACTIVATIONS:
        return ACTIVATIONS
    if isinstance(value, float):
        return (1e-2,) if 0 < value < 1e-3 else (value * 1.7 + 0.1,)
    return ()


def outcome(folder: Path, family: str, changes: dict[str, Any]) -> tuple[str, str]:
    """(same, refused, named, SILENT or not made; what was seen)."""
    try:
        tiny.make_model(folder, family, **changes)
        reference = conformance.reference(folder)
        wanted = [_logits(reference, ids) for ids in ROWS]
    except Exception as error:  # transformers cannot have such a model, or not run it
        return "not made", str(error)
    try:
        loaded = load(str(folder), "float32")
        apart = max(
            conformance.apart(np.array(loaded.model(mx.array(ids))), logits)
            for ids, logits in zip(ROWS, wanted, strict=True)
        )
    except UserError as error:
        return "refused", error.message
    except Exception as error:
        return "SILENT", f"a traceback: {type(error).__name__}: {error}"
    if apart < SAME:
        return "same", ""
    return ("named" if families.differs(loaded.config) else "SILENT"), f"{apart:.0e}"


def _logits(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        found: np.ndarray = model(torch.from_numpy(ids)).logits.numpy()
    return found


def main() -> None:
    import json

    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    backend.prepare()
    total: Counter[str] = Counter()
    for family in sys.argv[1:] or list(zoo.SHAPES):
        with tempfile.TemporaryDirectory() as root:
            folder = tiny.make_model(Path(root) / "model", family)
            config = json.loads((folder / "config.json").read_text())
            counts: Counter[str] = Counter()
            for number, (name, changes) in enumerate(settings(family, config)):
                kind, seen = outcome(Path(root) / str(number), family, changes)
                counts[kind] += 1
                if kind in ("SILENT", "refused", "named"):
                    print(f"  {family} {name}: {kind} {' '.join(seen.split())[:150]}", flush=True)
            print(f"{family}: {dict(counts)}", flush=True)
            total += counts
    print(f"all: {dict(total)}")


if __name__ == "__main__":
    main()

"""The tiny model that the checks work on: its weights, tokenizer and rows are made here, from fixed seeds, offline.

Its heads are 64 wide, two queries to a key, so that a GPU takes the kernels that real models take.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map, tree_unflatten
from mlxtune_convert.files import write_json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlxtune.adapter import attach
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.config.schema import LoraSection
from mlxtune.data.chat.masking import Example
from mlxtune.data.dataset.batches import Batch, collate
from mlxtune.machine import backend
from mlxtune.model.arrays import named, save_arrays
from mlxtune.model.linux_cpu import multiply_densely
from mlxtune.model.load import cast

BITS, GROUP_SIZE = 4, 32
RANK = 4
SHARED = 30  # tokens that the rows of `batch` begin with
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 320,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Other kinds of models by mlx-lm's module: attention that looks back a window, experts that a router chooses.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "gemma3_text": {"query_pre_attn_scalar": 64, "sliding_window": 24, "sliding_window_pattern": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
SYSTEM = "Answer with a price."
ROWS = 24  # for training; as many again divided by four are held out


def built(kind: str = "llama", **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """(a float32 model of mlx-lm with random weights, its config.json)."""
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    config = {"model_type": kind, **SHAPE, **KINDS[kind], **changes}
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    weights = {}
    for index, (path, array) in enumerate(named(model.parameters()).items()):
        noise = np.random.default_rng(index).normal(size=array.shape).astype(np.float32)
        if array.ndim == 1:  # norms and such
            weights[path] = array + mx.array(0.1 * noise)
        else:
            weights[path] = mx.array(noise * (1.0 if "embed" in path else 0.1))
    model.update(tree_unflatten(list(weights.items())))
    return model, config


def with_adapter(kind: str, base: mx.Dtype, dtype: mx.Dtype, train_also: tuple[str, ...] = ()) -> nn.Module:
    """A quantized model of this kind with an adapter that changes what it computes, for today's device.

    base: the type of its scales, dtype: that of the activations. Codes and factors are made on the CPU, whatever the
    device: they are the same in any two calls.
    """
    here = backend.kind()
    with computing_on_cpu():
        model, _ = built(kind)
        cast(model, base)
        nn.quantize(model, GROUP_SIZE, BITS)
        cast(model, dtype)
        attach.attach(model, AdapterPlan.of(model, LoraSection(rank=RANK, train_also=list(train_also))))
        for index, layer in enumerate(attach.adapted_layers(model).values()):
            noise = np.random.default_rng(1000 + index).normal(size=layer.lora_b.shape)  # zero in a fresh adapter
            layer.lora_b = mx.array(0.05 * noise.astype(np.float32))
        mx.eval(model.parameters())
    if here == "cpu":
        multiply_densely(model)
    return model


def batch() -> Batch:
    """Three rows of different lengths with a common beginning, padded; what follows it is all supervised: more tokens
    than go through the head at once.
    """
    draw = np.random.default_rng(0)
    start = draw.integers(3, 250, SHARED).tolist()
    rows = []
    for index, length in enumerate((44, 32, 21)):
        own = [260 + index, *draw.integers(3, 250, length - 1).tolist()]  # rows differ from their own first token on
        rows.append(Example(start + own, [0] * (SHARED + 1) + [1] * (length - 1)))
    return collate(rows, range(len(rows)))


@contextmanager
def computing_on_cpu() -> Iterator[None]:
    """Inside, MLX computes on the CPU, nothing is compiled, and whatever asks for the device is told so."""
    mx.disable_compile()
    try:
        with mx.stream(mx.cpu):
            yield
    finally:
        if backend.policy().compiled:
            mx.enable_compile()


def save(folder: Path, dtype: mx.Dtype, **changes: Any) -> None:
    """Write the llama as its folder on the hub would be, in `dtype`, with the tokenizer. changes: of its config."""
    model, config = built(**changes)
    folder.mkdir(parents=True)
    parameters: Any = tree_map(lambda array: array.astype(dtype), model.parameters())
    save_arrays(folder / "model.safetensors", named(parameters))
    write_json(folder / "config.json", config)
    save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges, and ChatML."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[0],
            "eos_token": SPECIAL[2],
            "chat_template": CHATML,
        },
    )


def save_data(folder: Path) -> None:
    """Conversations of different lengths that begin with one system prompt."""
    folder.mkdir(parents=True)
    for name, numbers in (("train", range(ROWS)), ("valid", range(ROWS, ROWS + ROWS // 4))):
        lines = [json.dumps({"messages": _conversation(number)}) for number in numbers]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _conversation(number: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"What {'really ' * (number % 4)}do {number} cost?"},
        {"role": "assistant", "content": f"They cost {number * 7}."},
    ]

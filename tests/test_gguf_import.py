"""GGUF -> MLX: code for code, against the gguf package, llama.cpp and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
import tiny
from gguf.quants import dequantize, quantize
from mlx.utils import tree_flatten
from mlxtune_convert.gguf import container, ggml
from mlxtune_convert.gguf.container import Field, Writer
from test_gguf_families import exported

from mlxtune.data.template.tokenizer import load_tokenizer
from mlxtune.model import convert
from mlxtune.model.dense import dense_weight
from mlxtune.model.load import open_model
from mlxtune.ship import llama_cpp

README = Path(__file__).resolve().parent.parent / "README.md"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k, as its converter writes it."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def test_every_tensor_of_smollm2_equals_the_ggufs_own_values(smollm2: Path, smollm2_gguf: Path) -> None:
    """Scales and biases cast to float32; q and k in llama.cpp's row order. 211 quantized tensors and 61 norms."""
    model, config = open_model(smollm2)
    arrays = dict(tree_flatten(model.parameters()))
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
        "attn_output": "self_attn.o_proj",
        **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    }
    compared = {"quantized": 0, "plain": 0}
    for tensor in gguf.GGUFReader(smollm2_gguf).tensors:
        expected = dequantize(tensor.data, tensor.tensor_type)
        *block, stem, _ = tensor.name.split(".")
        path = (f"model.layers.{block[1]}." if block else "") + names[stem]
        if f"{path}.scales" in arrays:
            table = {**config["quantization"], **config["quantization"].get(path, {})}
            scales, biases = (arrays[f"{path}.{name}"].astype(mx.float32) for name in ("scales", "biases"))
            weight = mx.dequantize(
                arrays[f"{path}.weight"], scales, biases, group_size=table["group_size"], bits=table["bits"]
            )
            compared["quantized"] += 1
        else:
            weight = arrays[f"{path}.weight"].astype(mx.float32)
            compared["plain"] += 1
        ours = np.array(weight)
        heads = {"attn_q": 9, "attn_k": 3}.get(stem)
        ours = interleaved(ours, heads) if heads else ours
        np.testing.assert_array_equal(ours, expected, err_msg=tensor.name)
    assert compared == {"quantized": 211, "plain": 61}


def test_smollm2_answers_paris(smollm2: Path) -> None:
    result = tiny.done("generate", "--model", smollm2, "--prompt", "What is the capital of France?")
    assert result.stdout == "The capital of France is Paris.\n"


def test_mlx_lm_loads_the_converted_folder(smollm2: Path) -> None:
    """mlx_lm's own loader and template; one step of its forward pass (its half precision is slow on a CPU)."""
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(smollm2))
    model.set_dtype(mx.float32)
    ids = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "The capital of"},
        ],
        continue_final_message=True,
        add_generation_prompt=False,
    )
    assert tokenizer.decode([mx.argmax(model(mx.array([ids]))[0, -1]).item()]) == " France"
    assert tokenizer.eos_token_ids == {2}


def test_logits_equal_transformers_reading_the_same_gguf(smollm2: Path, smollm2_gguf: Path) -> None:
    """An independent reader of weights and configuration: float32, 40 tokens. (Its tokenizer is not used: it ignores
    the pre-tokenizer's name.)"""
    import torch
    from transformers import AutoModelForCausalLM

    from mlxtune.model.load import load

    ids = np.random.default_rng(0).integers(20, 49000, (1, 40))
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    ours = np.array(load(str(smollm2)).model(mx.array(ids)))
    assert np.abs(ours - expected).max() < 1e-3


def test_the_rebuilt_tokenizer_equals_llama_cpps(smollm2: Path, smollm2_gguf: Path) -> None:
    """The README's own text, whole and by line, and what breaks naive rebuilds: digits after spaces, markers, emoji."""
    tokenizer = load_tokenizer(smollm2)
    readme = README.read_text(encoding="utf-8")
    hard = [
        "a  12 345",
        "   7\n\n\n 8",
        "<|im_start|>user\nhi<|im_end|>\n",
        "naïve 👩‍👩‍👧‍👦 日本語 I'll we'd",
        "\t\tx = 1_000",
    ]
    texts = [readme, *readme.splitlines(), *hard]
    with llama_cpp.runner(smollm2_gguf) as run:
        differing = [text for text in texts if list(tokenizer(text)["input_ids"]) != run.tokenize(text)]
    assert not differing
    assert len(texts) > 100


def test_the_chat_template_comes_along(smollm2: Path, smollm2_gguf: Path) -> None:
    """Both as a file and inside tokenizer_config.json, equal to the GGUF's."""
    field = gguf.GGUFReader(smollm2_gguf).fields["tokenizer.chat_template"].contents()
    assert (smollm2 / "chat_template.jinja").read_text() == field
    assert json.loads((smollm2 / "tokenizer_config.json").read_text())["chat_template"] == field
    assert load_tokenizer(smollm2).chat_template == field


def write_gguf(path: Path, kind: str, **metadata: str) -> Path:
    """A tiny GGUF model whose matrices have the type `kind`, by the gguf package's quantizer or ggml's."""
    hf = tiny.make_model(path.with_suffix(".hf"), hidden_size=256, num_attention_heads=4, intermediate_size=256)
    plain = path.with_suffix(".f32.gguf")
    exported(hf, plain)
    file = container.read(plain)
    fields = file.fields | {f"tokenizer.ggml.{key}": Field.of(value) for key, value in metadata.items()}
    with Writer(path, fields, {name: tensor.shape for name, tensor in file.tensors.items()}) as writer:
        for name, tensor in file.tensors.items():
            rows = file.rows(name)
            if len(tensor.shape) == 1:
                writer.add(name, tensor.kind, rows)
            elif kind in ("Q8_0", "TQ1_0", "MXFP4"):
                writer.add(name, kind, quantize(rows, gguf.GGMLQuantizationType[kind]))
            else:
                writer.add(name, kind, ggml.quantize(rows, kind))
    return path


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pre": "poro-chat"}, "pre-tokenizer poro-chat"),
        ({"model": "t5"}, "t5"),
        ({"model": "llama"}, "the GGUF's tokenizer has no scores"),
    ],
)
def test_what_cannot_be_mapped_exactly_is_refused_by_name(changes: dict, expected: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", "Q8_0", **changes)
    tiny.one_clear_line(tiny.mlxtune("convert", file, tmp_path / "mlx"), expected)
    assert not (tmp_path / "mlx").exists()


def test_an_imported_model_can_be_requantized_on_request_with_a_warning(smollm2_gguf: Path, tmp_path: Path) -> None:
    result = tiny.done("convert", smollm2_gguf, tmp_path / "m", "--bits", "8", "--group-size", "64")
    assert "lossy" in result.stderr
    _, config = open_model(tmp_path / "m")
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (8, 64)


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K", "Q2_K", "IQ4_XS", "TQ1_0", "MXFP4"])
def test_any_quantized_type_can_be_read(kind: str, tmp_path: Path) -> None:
    """Its values by the gguf package: exact where MLX has the codes, else rounded to 16 bits, which is said."""
    file = write_gguf(tmp_path / "m.gguf", kind)
    done = convert.convert(str(file), tmp_path / "mlx", convert.Quantization.of(None, None, None))
    assert bool(done.notes) == (kind != "MXFP4")
    model, _ = open_model(tmp_path / "mlx")
    layer = model.layers[0].mlp.up_proj
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_up.weight")
    expected = dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_allclose(np.array(dense_weight(layer)), expected, atol=0 if kind == "MXFP4" else 5e-5)

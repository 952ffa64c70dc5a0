"""GGUF -> MLX: code for code, against the gguf package, llama.cpp and transformers."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
import tiny
from gguf.quants import dequantize, quantize
from mlx.utils import tree_flatten
from mlxtune_convert import ggml
from mlxtune_convert.gguf_families import interleave, uninterleave
from mlxtune_convert.quant import BLOCKS, from_blocks, pack

from mlxtune.data.tokenizer import load_tokenizer
from mlxtune.model import convert
from mlxtune.model.load import open_model
from mlxtune.model.quantize import dense_weight

README = Path(__file__).resolve().parent.parent / "README.md"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k, as its converter writes it."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_block_type_keeps_its_values_bit_for_bit(kind: str) -> None:
    """The gguf package quantizes and dequantizes; MLX must dequantize our codes to the same float32 bits."""
    weight = np.random.default_rng(0).normal(0, 0.05, (48, 256)).astype(np.float32)
    weight[5] = 0.0  # a constant row
    data = quantize(weight, gguf.GGMLQuantizationType[kind])
    affine = from_blocks(data, kind)
    parts = [mx.array(part) for part in (affine.weight, affine.scales, affine.biases)]
    ours = mx.dequantize(
        parts[0], parts[1].astype(mx.float32), parts[2].astype(mx.float32), group_size=32, bits=affine.bits
    )
    expected = dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.array(ours).tobytes() == expected.tobytes() or np.array_equal(np.array(ours), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_codes_are_mlxs_own(bits: int) -> None:
    """mx.quantize packs integers 0..2^bits-1 of a group exactly; the packing must be the same words."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, (8, 64)).astype(np.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, 2**bits - 1
    scales, biases = mx.ones((8, 2)), mx.zeros((8, 2))
    ours = mx.dequantize(mx.array(pack(codes, bits)), scales, biases, group_size=32, bits=bits)
    np.testing.assert_array_equal(np.array(ours), codes)


def test_uninterleave_undoes_llama_cpps_row_order() -> None:
    weight = np.arange(4 * 16 * 3).reshape(64, 3)
    np.testing.assert_array_equal(interleave(weight, 4), interleaved(weight, 4))
    np.testing.assert_array_equal(uninterleave(interleaved(weight, 4), 4), weight)
    assert not np.array_equal(uninterleave(weight, 4), weight)


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
    result = tiny.mlxtune("generate", "--model", smollm2, "--prompt", "What is the capital of France?")
    assert result.returncode == 0, result.stderr
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


@pytest.fixture(scope="module")
def llama_cpp(smollm2_gguf: Path) -> Iterator[Any]:
    """llama.cpp's tokenizer of the GGUF, through its in-process server."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(smollm2_gguf)
    parameters.n_ctx = 256
    parameters.warmup = False
    parameters.cpuparams.n_threads = 2
    server = xllamacpp.Server(parameters)

    def tokenize(text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]

    yield tokenize


def test_the_rebuilt_tokenizer_equals_llama_cpps(smollm2: Path, llama_cpp: Any) -> None:
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
    differing = [text for text in texts if list(tokenizer(text)["input_ids"]) != llama_cpp(text)]
    assert not differing
    assert len(texts) > 100


def test_the_chat_template_comes_along(smollm2: Path, smollm2_gguf: Path) -> None:
    """Both as a file and inside tokenizer_config.json, equal to the GGUF's."""
    field = gguf.GGUFReader(smollm2_gguf).fields["tokenizer.chat_template"].contents()
    assert (smollm2 / "chat_template.jinja").read_text() == field
    assert json.loads((smollm2 / "tokenizer_config.json").read_text())["chat_template"] == field
    assert load_tokenizer(smollm2).chat_template == field


def write_gguf(path: Path, hf: Path, kind: str, **metadata: Any) -> Path:
    """A GGUF of a tiny HF model, written with the gguf package and llama.cpp's naming; `kind` for its matrices."""
    from safetensors.numpy import load_file

    config = json.loads((hf / "config.json").read_text())
    arch = config["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    tokens = [*(f"<{index}>" for index in range(config["vocab_size"] - 3)), "a", "b", "ab"]
    writer.add_tokenizer_model(metadata.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(metadata.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    for name, array in load_file(hf / "model.safetensors").items():
        if arch == "llama" and "q_proj" in name:
            array = interleaved(array, config["num_attention_heads"])
        if arch == "llama" and "k_proj" in name:
            array = interleaved(array, config["num_key_value_heads"])
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if array.ndim == 2 and kind != "F32":
            to_type = gguf.GGMLQuantizationType[kind]
            data = metadata.get("quantizer", quantize)(array, to_type)
            writer.add_tensor(to, data, raw_dtype=to_type)
        else:
            writer.add_tensor(to, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_float_gguf_has_the_hf_models_logits(arch: str, tmp_path: Path) -> None:
    """Names, row order, biases, rotary base and epsilon, all at once: transformers on the original is the oracle."""
    import torch
    from transformers import AutoModelForCausalLM

    hf = tiny.make_model(tmp_path / "hf", arch, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    file = write_gguf(tmp_path / "m.gguf", hf, "F32")
    assert tiny.mlxtune("convert", file, tmp_path / "mlx", "--bits", "16", "--dtype", "float32").returncode == 0
    model, _ = open_model(tmp_path / "mlx")
    ids = np.random.default_rng(0).integers(3, 250, (1, 30))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(hf)(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(np.array(model(mx.array(ids))) - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pre": "poro-chat"}, "pre-tokenizer poro-chat"),
        ({"tokenizer": "t5"}, "t5"),
        ({"tokenizer": "llama"}, "the GGUF's tokenizer has no scores"),
    ],
)
def test_what_cannot_be_mapped_exactly_is_refused_by_name(changes: dict, expected: str, tmp_path: Path) -> None:
    hf = tiny.make_model(tmp_path / "hf", hidden_size=256, num_attention_heads=4, intermediate_size=256)
    file = write_gguf(tmp_path / "m.gguf", hf, **{"kind": "Q8_0", **changes})
    tiny.one_clear_line(tiny.mlxtune("convert", file, tmp_path / "mlx"), expected)
    assert not (tmp_path / "mlx").exists()


def test_an_imported_model_can_be_requantized_on_request_with_a_warning(smollm2_gguf: Path, tmp_path: Path) -> None:
    result = tiny.mlxtune("convert", smollm2_gguf, tmp_path / "m", "--bits", "8", "--group-size", "64")
    assert result.returncode == 0, result.stderr
    assert "lossy" in result.stderr
    _, config = open_model(tmp_path / "m")
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (8, 64)


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_K", "Q2_K", "IQ4_XS", "TQ1_0", "MXFP4"])
def test_any_quantized_type_can_be_read(kind: str, tmp_path: Path) -> None:
    """Its values by the gguf package: exact where MLX has the codes, else rounded to 16 bits, which is said."""
    hf = tiny.make_model(tmp_path / "hf", hidden_size=256, num_attention_heads=4, intermediate_size=256)
    if kind in ("TQ1_0", "MXFP4"):
        file = write_gguf(tmp_path / "m.gguf", hf, kind)
    else:
        file = write_gguf(tmp_path / "m.gguf", hf, kind, quantizer=lambda w, k: ggml.quantize(w, k.name))
    done = convert.convert(str(file), tmp_path / "mlx", convert.Target.of(None, None, None))
    assert bool(done.notes) == (kind != "MXFP4")
    model, _ = open_model(tmp_path / "mlx")
    layer = model.layers[0].mlp.up_proj
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_up.weight")
    expected = dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_allclose(np.array(dense_weight(layer)), expected, atol=0 if kind == "MXFP4" else 5e-5)

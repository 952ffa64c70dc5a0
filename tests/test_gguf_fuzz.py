"""Damaged files end in one clear line: mutated GGUF models and adapters, mutated safetensors folders."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlxtune_convert.adapters import save_adapter
from mlxtune_convert.errors import UserError
from mlxtune_convert.gguf import adapter_file, container, model_read
from mlxtune_convert.gguf.architectures import by_model_type
from mlxtune_convert.gguf.container import Field, Writer
from mlxtune_convert.gguf.quant_blocks import BLOCKS
from mlxtune_convert.peft.adapter_folder import Adapter, Update
from mlxtune_convert.tensors import read_header, weight_files
from safetensors.numpy import save_file

KEYS = {
    "context_length": 64,
    "embedding_length": 32,
    "block_count": 1,
    "feed_forward_length": 32,
    "attention.head_count": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
EXAMPLES = settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)


def model_bytes(path: Path) -> bytes:
    """A whole llama of one block, in several types, of some 20 KB."""
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "general.type": "model",
        **{f"llama.{key}": value for key, value in KEYS.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "é"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.chat_template": "{{ messages }}",
    }
    fields = {key: Field.of(value) for key, value in values.items()}
    family = by_model_type("llama")
    names = ["token_embd", "output_norm", *(f"blk.0.{stem}" for stem in family.names)]
    shapes = {f"{name}.weight": (32,) if "norm" in name else (32, 32) for name in names}
    shapes["token_embd.weight"] = (4, 32)
    with Writer(path, fields, shapes) as writer:
        for (name, shape), kind in zip(shapes.items(), ["F16", "F32", *BLOCKS, *["F16"] * 9], strict=False):
            wide = len(shape) == 2 and kind in BLOCKS
            size = container.stored_bytes(kind, shape) if wide else 0
            array = np.zeros(size, np.uint8) if wide else np.ones(shape, np.float32)
            writer.add(name, kind if wide else "F32", array)
    return path.read_bytes()


def adapter_bytes(path: Path) -> bytes:
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(2, 32, 2)).astype(np.float32)
    names = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qv"]
    updates = {name: Update(factors[0], factors[1].T, 2.0) for name in names}
    config = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    adapter_file.write_adapter(path, by_model_type("llama"), config, updates, "acme/base")
    return path.read_bytes()


def use_gguf(path: Path, folder: Path) -> None:
    file = container.read(path)
    if adapter_file.is_adapter(file):
        save_adapter(folder, Adapter(adapter_file.read_adapter(file, None)[0]), None)
    else:
        model_read.convert(model_read.open_gguf(path), folder)


HUGE = [0, 1, 2, 0x7F, 0xFF, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("byte"), st.integers(0, 1 << 16), st.integers(0, 255)),
        st.tuples(st.just("count"), st.integers(0, 1 << 16), st.sampled_from(HUGE)),
        st.tuples(st.just("type"), st.integers(0, 1 << 16), st.integers(0, 42)),
        st.tuples(st.just("cut"), st.integers(0, 1 << 16), st.just(0)),
        st.tuples(st.just("insert"), st.integers(0, 1 << 16), st.integers(0, 40)),
        st.tuples(st.just("drop"), st.integers(0, 1 << 16), st.integers(1, 40)),
    ),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, changes: list[tuple[str, int, int]], header: int) -> bytes:
    """Most places are in the header, where counts, types and offsets are."""
    out = bytearray(data)
    for what, at, value in changes:
        at %= max(1, min(header, len(out)))
        if what == "byte":
            out[at : at + 1] = bytes([value])
        elif what == "count":
            out[at : at + 8] = struct.pack("<Q", value)
        elif what == "type":
            out[at : at + 4] = struct.pack("<I", value)
        elif what == "cut":
            del out[at:]
        elif what == "insert":
            out[at:at] = bytes(value)
        else:
            del out[at : at + value]
    return bytes(out)


def ends_well(use: Callable[[Path, Path], None], path: Path, data: bytes) -> bool:
    """True when the file was accepted; only a UserError of one line may refuse it, without much memory."""
    path.write_bytes(data)
    folder = path.parent / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        use(path, folder)
        return True
    except UserError as error:
        assert "\n" not in error.message and len(error.message) < 600
        return False


@pytest.mark.parametrize("make", [model_bytes, adapter_bytes])
def test_the_untouched_files_are_accepted(make: Callable[[Path], bytes], tmp_path: Path) -> None:
    assert ends_well(use_gguf, tmp_path / "x.gguf", make(tmp_path / "x.gguf"))


@pytest.mark.parametrize("make", [model_bytes, adapter_bytes])
def test_no_damage_to_a_gguf_file_gets_through(make: Callable[[Path], bytes], tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    data = make(path)
    header = container.read(path).header_bytes
    outcomes = {True: 0, False: 0}

    @EXAMPLES
    @given(CHANGES)
    def run(changes: list[tuple[str, int, int]]) -> None:
        outcomes[ends_well(use_gguf, path, mutated(data, changes, header))] += 1

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    assert outcomes[False] > 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB on Linux


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d[:20], "too short"),
        (lambda d: b"GGML" + d[4:], "does not begin with GGUF"),
        (lambda d: d[:4] + struct.pack(">I", 3) + d[8:], "big-endian"),
        (lambda d: d[:4] + struct.pack("<I", 1) + d[8:], "version 1"),
        (lambda d: d[:8] + struct.pack("<Q", 1 << 60) + d[16:], "tensors"),
        (lambda d: d[:-40], "ends at byte"),
        (lambda d: d.replace(b"general.type", b"general.\xff\xfee", 1), "invalid UTF-8"),
        (lambda d: d.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight", 1), "occurs twice"),
        (lambda d: d.replace(b"llama.block_count", b"llama.block_countX"[:17].upper(), 1), "llama.block_count"),
        (lambda d: d.replace(b"blk.0.ffn_up.weight", b"../../etc/passwd.we", 1), "is not one of the llama"),
    ],
)
def test_each_kind_of_damage_is_named(change: Callable[[bytes], bytes], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(change(model_bytes(path)))
    with pytest.raises(UserError) as refused:
        use_gguf(path, tmp_path)
    assert expected in str(refused.value), refused.value


def test_overlapping_and_misaligned_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    model_bytes(path)
    file = container.read(path)
    tensors = list(file.tensors.values())
    for offset in (tensors[0].offset, tensors[1].offset + 4):
        tensors[1] = container.Tensor(tensors[1].name, tensors[1].kind, tensors[1].shape, offset)
        path.write_bytes(container.header(file.fields, tensors, file.header_bytes) + bytes(1 << 16))
        with pytest.raises(UserError, match="overlaps another, or is not aligned"):
            container.read(path)


def test_no_damage_to_a_safetensors_file_gets_through(tmp_path: Path) -> None:
    """The header is checked before any library reads the file; names of shards cannot leave the folder."""
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((4, 4), np.float32), "b": np.ones(3, np.float16)}, path)
    data = path.read_bytes()

    @EXAMPLES
    @given(CHANGES)
    def run(changes: list[tuple[str, int, int]]) -> None:
        ends_well(lambda file, _: read_header(file), path, mutated(data, changes, 160))

    run()
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(data)
    path.unlink()  # where it is there, no index is read
    for name in ("../model.safetensors", "/model.safetensors", "sub/../../model.safetensors"):
        index = {"weight_map": {"a": name}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="outside"):
            weight_files(tmp_path)

"""GGUF out of the installed command: the same bytes, the same model, the same answers, by llama.cpp's account."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Sequence
from pathlib import Path

import gguf as gguf_package
import mlx.core as mx
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from gguf.quants import dequantize, quantize
from mlxtune_convert.adapters import AdapterConfig
from mlxtune_convert.gguf import adapter_file, container, ggml
from mlxtune_convert.gguf.architectures import by_model_type
from mlxtune_convert.gguf.tensor_types import Choice
from mlxtune_convert.peft.adapter_folder import Update
from test_variants import adapted

from mlxtune.adapter import adapter_files
from mlxtune.cli import cli
from mlxtune.data.chat.masking import Example
from mlxtune.data.template.tokenizer import load_tokenizer
from mlxtune.errors import UserError
from mlxtune.model import convert
from mlxtune.model.load import load, open_model
from mlxtune.ship import gguf, llama_cpp, modelfile
from mlxtune.ship.export import ship
from mlxtune.ship.gguf import Gguf, GgufAdapter
from mlxtune.ship.request import MergedModel, Request

IDS = np.random.default_rng(7).integers(3, 250, 50)


def export(model: Path, out: Path, *options: str | Path, to: str = "gguf") -> str:
    result = tiny.done("export", "--model", model, "--to", to, "--out", out, *options)
    return result.stdout + result.stderr


def trained_logits(model: Path, run: Path | None) -> np.ndarray:
    loaded = load(str(model), "float32")
    if run is not None:
        adapter_files.load_adapter(loaded.model, run)
    return np.array(loaded.model(mx.array(IDS)[None]))[0]


def llama_logits(file: Path, adapter: Path | None = None) -> np.ndarray:
    with llama_cpp.runner(file, adapter) as run:
        return run.logits(IDS)


def test_smollm2_comes_back_byte_for_byte(smollm2: Path, smollm2_gguf: Path, tmp_path: Path) -> None:
    """Every tensor and every metadata key with its type, read by the gguf package."""
    export(smollm2, tmp_path / "again.gguf", "--no-verify")
    theirs, ours = gguf_package.GGUFReader(smollm2_gguf), gguf_package.GGUFReader(tmp_path / "again.gguf")
    found = {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in ours.tensors}
    assert found == {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in theirs.tensors}
    assert len(found) == 272
    assert [(key, field.types, field.contents()) for key, field in ours.fields.items()] == [
        (key, field.types, field.contents()) for key, field in theirs.fields.items()
    ]


def test_a_four_bit_model_becomes_q4_1_bit_for_bit(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2 in 16 bits, quantized by MLX to 4 bits in groups of 64: gguf's values are mx.dequantize's."""
    tiny.done("convert", smollm2, tmp_path / "m", "--bits", "4", "--group-size", "64")
    said = export(tmp_path / "m", tmp_path / "m.gguf", "--no-verify")
    assert "no exact GGUF form" not in said
    model, config = open_model(tmp_path / "m")
    family, compared = by_model_type("llama"), 0
    kinds = {tensor.name: tensor for tensor in gguf_package.GGUFReader(tmp_path / "m.gguf").tensors}
    for path, module in model.named_modules():
        if "scales" not in module:
            continue
        name = family.gguf_name(f"{path}.weight")
        assert kinds[name].tensor_type.name == "Q4_1"
        wide = [module.scales.astype(mx.float32), module.biases.astype(mx.float32)]
        expected = np.array(mx.dequantize(module.weight, *wide, group_size=64, bits=4))
        heads = family.heads(name, config)
        if heads:
            expected = expected.reshape(heads, 2, -1, expected.shape[-1]).swapaxes(1, 2).reshape(expected.shape)
        theirs = dequantize(kinds[name].data, kinds[name].tensor_type)
        np.testing.assert_array_equal(theirs, expected, err_msg=name)
        compared += 1
    assert compared == 211


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("f32", 1e-4),
        ("f16", 5e-2),
        ("bf16", 0.2),
        ("q8_0", 0.5),
        ("q5_1", 1),
        ("q4_0", 4),
        ("q6_k", 0.5),
        ("q4_k_m", 2),
    ],
)
def test_a_merged_export_is_the_trained_model(
    kind: str, limit: float, mlx_model: Path, run: Path, held_out: Sequence[Example], tmp_path: Path
) -> None:
    """The largest logit is some 20; on other tokens than the proof used."""
    done = ship(Request(mlx_model, run, tmp_path / "m.gguf", examples=held_out), Gguf(kind))
    assert done.proof is not None and "run by llama.cpp" in done.proof.line()
    theirs, ours = llama_logits(tmp_path / "m.gguf"), trained_logits(mlx_model, run)
    assert np.abs(theirs - ours).max() < limit
    report = json.loads((tmp_path / "m.verification.json").read_text())
    assert report["verdict"] == ("passed" if kind in ("f32", "f16", "bf16", "q8_0") else "measured")


def test_kept_codes_are_proven_and_refuse_an_adapter(mlx_model: Path, run: Path, data: Path, tmp_path: Path) -> None:
    assert "passed" in export(mlx_model, tmp_path / "folder", "--data", data)
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names == ["model.gguf", "verification.json", "verification.md"]
    out = tmp_path / "m.gguf"
    command = ("export", "--model", mlx_model, "--adapter", run, "--to", "gguf", "--type", "keep", "--out", out)
    tiny.refused(out, *command, expected=("--type keep cannot take an adapter", "gguf-lora"))


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_floats_are_kept_in_the_type_that_holds_them_there_and_back(dtype: str, kind: str, tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "hf", dtype=dtype)
    ship(Request(model, None, tmp_path / "one.gguf"), Gguf("keep"))
    convert.convert(str(tmp_path / "one.gguf"), tmp_path / "mlx", convert.Quantization.of(16, None, None))
    ship(Request(tmp_path / "mlx", None, tmp_path / "two.gguf"), Gguf("keep"))
    one, two = (container.read(tmp_path / name) for name in ("one.gguf", "two.gguf"))
    assert one.tensors["blk.0.ffn_up.weight"].kind == kind
    assert {name: tensor.kind for name, tensor in one.tensors.items()} == {n: t.kind for n, t in two.tensors.items()}
    assert all(one.rows(name).tobytes() == two.rows(name).tobytes() for name in one.tensors)


@pytest.mark.parametrize("arch", ["llama", "mixtral", "phi3"])
def test_an_adapter_beside_its_base_is_the_tuned_model(arch: str, held_out: Sequence[Example], tmp_path: Path) -> None:
    """Permuted rows, stacked experts, fused matrices: by llama.cpp's own application of the factors."""
    model = tiny.make_model(tmp_path / "hf", arch, **({"sliding_window": None} if arch == "phi3" else {}))
    adapted(model, run := tmp_path / "run", rank=4, alpha=12)
    ship(Request(model, None, tmp_path / "base.gguf"), Gguf("f32"))
    done = ship(Request(model, run, tmp_path / "lora.gguf", examples=held_out), GgufAdapter())
    assert done.proof is not None and done.proof.verdict == "passed"
    ours = trained_logits(model, run)
    assert np.abs(llama_logits(tmp_path / "base.gguf", tmp_path / "lora.gguf") - ours).max() < 1e-4
    assert np.abs(llama_logits(tmp_path / "base.gguf") - ours).max() > 0.05
    # and back: the very same factors
    convert.convert(str(tmp_path / "lora.gguf"), tmp_path / "back", convert.Quantization.of(None, None, None))
    before, after = (mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("run", "back"))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]).item() for name in before)
    np.testing.assert_array_equal(trained_logits(model, tmp_path / "back"), ours)


def test_ranks_and_scales_that_differ_are_folded(tmp_path: Path) -> None:
    """B A alpha / rank, written out, is the update of each module; so it is after the way back."""
    rng = np.random.default_rng(0)
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    shapes = {
        "model.layers.1.self_attn.q_proj": (64, 4, 64, 2.0),
        "model.layers.2.mlp.up_proj": (64, 2, 128, 0.7),
        "model.layers.2.mlp.down_proj": (128, 4, 64, 2.0),
    }
    updates = {
        path: Update(rng.normal(size=(i, r)).astype(np.float32), rng.normal(size=(r, o)).astype(np.float32), scale)
        for path, (i, r, o, scale) in shapes.items()
    }
    family, file = by_model_type("qwen2"), tmp_path / "lora.gguf"
    adapter_file.write_adapter(file, family, config, updates, "acme/base")
    opened = container.read(file)
    alpha = opened.get("adapter.lora.alpha")
    assert alpha == 8.0
    done = convert.convert(str(file), tmp_path / "back", convert.Quantization.of(None, None, None))
    spec = AdapterConfig.read(tmp_path / "back")
    assert done.notes == [] and {path: rank for path, (rank, _) in spec.modules.items()} == {
        path: update.rank for path, update in updates.items()
    }
    tensors = mx.load(str(tmp_path / "back" / spec.file))
    for path, update in updates.items():
        name = family.gguf_name(f"{path}.weight")
        expected = update.scale * (update.a @ update.b)
        ours = (opened.rows(f"{name}.lora_b") @ opened.rows(f"{name}.lora_a")).T * (alpha / update.rank)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
        again = np.array(tensors[f"{path}.lora_a"]) @ np.array(tensors[f"{path}.lora_b"])
        np.testing.assert_allclose(again * spec.modules[path][1], expected, rtol=1e-5, atol=1e-5)


def test_an_embedding_adapter_is_refused_because_llama_cpp_aborts(tmp_path: Path) -> None:
    updates = {"model.embed_tokens": Update(np.zeros((4, 2)), np.zeros((2, 4)), 1.0)}
    with pytest.raises(UserError, match="embedding"):
        adapter_file.write_adapter(tmp_path / "a.gguf", by_model_type("llama"), {}, updates, "")
    assert not (tmp_path / "a.gguf").exists()


def test_block_types_are_llama_cpps_own_bytes() -> None:
    """ggml's quantizer against the gguf package's, where both can."""
    weight = np.random.default_rng(0).normal(0, 0.05, (16, 512)).astype(np.float32)
    for kind in ("Q8_0", "Q4_1"):
        theirs = quantize(weight, gguf_package.GGMLQuantizationType[kind])
        assert ggml.quantize(weight, kind).tobytes() == theirs.tobytes()
    error = [
        np.linalg.norm(dequantize(ggml.quantize(weight, kind), gguf_package.GGMLQuantizationType[kind]) - weight)
        for kind in ("Q6_K", "Q5_K", "Q4_K", "Q3_K")
    ]
    assert error == sorted(error) and error[-1] < 0.2 * np.linalg.norm(weight)


def test_a_mixture_gives_more_bits_where_llama_quantize_does() -> None:
    """Its rules for 32 blocks: the first and last eighth, and every third between; the head in Q6_K."""
    choice = Choice("q4_k_m", 32, tied=False)
    value = np.zeros((8, 256), dtype=np.float32)
    more = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    for layer in range(32):
        kind, _ = choice.store(f"blk.{layer}.ffn_down.weight", value, None, value.shape)
        assert kind == ("Q6_K" if layer in more else "Q4_K")
        assert choice.store(f"blk.{layer}.attn_q.weight", value, None, value.shape)[0] == "Q4_K"
    assert choice.store("output.weight", value, None, value.shape)[0] == "Q6_K"
    assert choice.store("token_embd.weight", value, None, value.shape)[0] == "Q4_K"
    assert choice.store("blk.0.attn_q.weight", value[:, :96], None, (8, 96))[0] == "Q5_0"
    assert choice.store("blk.0.attn_norm.weight", value[0], None, (256,))[0] == "F32"
    assert choice.file_type == 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M


def test_without_llama_cpp_k_quants_are_refused_and_the_rest_is_read_back(
    mlx_model: Path, run: Path, held_out: Sequence[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggml, "library_file", lambda: None)
    ggml.library.cache_clear()
    request = Request(mlx_model, run, tmp_path / "m.gguf", examples=held_out)
    with pytest.raises(UserError, match="K-quants") as refused:
        ship(request, Gguf("q4_k_m"))
    assert "pip install xllamacpp" in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    done = ship(request, Gguf("q8_0"))
    assert done.proof is not None and "read back" in done.proof.line()
    done = ship(Request(mlx_model, run, tmp_path / "a.gguf", examples=held_out), GgufAdapter())
    assert done.proof is not None and "read back: 28 tensors" in done.proof.line()
    model = MergedModel(request)
    planned = gguf.plan_of(model, "q8_0")
    with (tmp_path / "m.gguf").open("r+b") as file:  # a bit that flips on the disk
        file.seek(-100, 2)
        file.write(b"\xff")
    with pytest.raises(UserError, match="does not hold what was written"):
        container.read_back(tmp_path / "m.gguf", planned.tensors(gguf.merged_tensors(model.to_read(mx.float32))))
    ggml.library.cache_clear()


def go(template: str, messages: list[tuple[str, str]]) -> str:
    """Go's text/template, as far as a Modelfile uses it: a range over messages with one branch per role."""
    body = re.fullmatch(r"\{\{ range \.Messages \}\}\{\{ (.*)\{\{ end \}\}\{\{ end \}\}", template, re.DOTALL)
    assert body
    found = re.split(r'(?:\{\{ else )?if eq \.Role "(\w+)" \}\}', body[1])[1:]
    branches = dict(zip(found[::2], found[1::2], strict=True))
    return "".join(branches[role].replace("{{ .Content }}", content) for role, content in messages)


def test_the_modelfile_writes_the_chat_templates_own_text(
    smollm2: Path, run: Path, mlx_model: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(smollm2)
    turns = modelfile.turns(tokenizer)
    assert turns is not None and turns.default.startswith("You are a helpful AI assistant")
    messages = [("system", "Be brief."), ("user", "One?"), ("assistant", "1."), ("user", "Two?")]
    for chosen in (messages, messages[:2]):
        listed = [{"role": role, "content": content} for role, content in chosen]
        expected = tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=True)
        assert go(turns.go(), chosen) == expected
    export(mlx_model, tmp_path / "lora.gguf", "--adapter", run, "--no-verify", "--ollama", to="gguf-lora")
    text = (tmp_path / "lora.Modelfile").read_text()
    assert "FROM ./base.gguf\nADAPTER ./lora.gguf\nTEMPLATE" in text
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--to", "gguf", "--type", "q4_k"), "Did you mean q4_k_s?"),
        (("--to", "hf", "--type", "f16"), "--type has no effect with --to hf"),
        (("--to", "peft", "--ollama"), "--ollama has no effect with --to peft"),
        (("--to", "gguf", "--dtype", "float16"), "--dtype has no effect with --to gguf"),
        (("--to", "gguf", "--push", "me/tiny"), "--push has no effect with --to gguf"),
        (("--to", "gguf-lora"), "--adapter RUN"),
    ],
)
def test_an_option_without_effect_is_an_error(
    options: tuple[str, ...], expected: str, mlx_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.gguf"
    done = CliRunner().invoke(cli, ["export", "--model", str(mlx_model), "--out", str(out), "--no-verify", *options])
    assert isinstance(done.exception, UserError) and expected in str(done.exception)
    tiny.nothing_written(out)


def test_what_llama_cpp_takes_for_granted_is_refused_by_name(tmp_path: Path) -> None:
    """An activation it does not have; a family it does not know."""
    model = tiny.make_model(tmp_path / "hf", hidden_act="gelu")
    out = tmp_path / "m.gguf"
    with pytest.raises(UserError, match=r"cannot express hidden_act 'gelu' \(only 'silu'\)"):
        ship(Request(model, None, out), Gguf("f32"))
    helium = tiny.make_model(tmp_path / "helium", "helium", num_key_value_heads=2, head_dim=16)
    with pytest.raises(UserError, match="models of type helium"):
        ship(Request(helium, None, out), Gguf("f32"))
    tiny.nothing_written(out)


@pytest.mark.parametrize("setting", ["lora.variant=dora", "lora.train_also=[norms]"])
def test_what_a_gguf_adapter_cannot_hold_is_refused(setting: str, mlx_model: Path, data: Path, tmp_path: Path) -> None:
    run = tiny.trained(mlx_model, data, tmp_path / "run", "train.steps=1", "train.eval_every=0", "lora.rank=2", setting)
    out = tmp_path / "a.gguf"
    command = ("export", "--model", mlx_model, "--adapter", run, "--to", "gguf-lora", "--out", out)
    tiny.refused(out, *command, expected=("neither DoRA nor layers trained in full", "--to gguf --type f16"))


def test_a_template_that_the_run_chose_goes_into_the_file(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    settings = ("train.steps=1", "train.eval_every=0", "lora.rank=2", "data.template=alpaca")
    run = tiny.trained(mlx_model, data, tmp_path / "run", *settings)
    out = tmp_path / "m.gguf"
    export(mlx_model, out, "--adapter", run, "--no-verify")
    template = gguf_package.GGUFReader(out).get_field("tokenizer.chat_template").contents()
    assert "### Response:" in template


def test_fields_of_llama_cpps_parameters_that_moved_are_noticed() -> None:
    """Whatever 4 bytes a later version puts before the last field that is set: its defaults are not where they were."""
    library = ggml.library()
    library.llama_context_default_params.restype = llama_cpp._Parameters
    library.llama_model_default_params.restype = llama_cpp._Parameters
    for made, words in (
        (library.llama_context_default_params(), llama_cpp.CONTEXT),
        (library.llama_model_default_params(), llama_cpp.MODEL),
    ):
        made.check(words)
        raw = bytes(made)
        for place in range(0, max(words), 4):
            for new in (0, 1, -1, 512):
                moved = raw[:place] + new.to_bytes(4, "little", signed=True) + raw[place:-4]
                with pytest.raises(RuntimeError, match="another interface; one that works: pip install xllamacpp=="):
                    llama_cpp._Parameters.from_buffer_copy(moved).check(words)


def test_the_version_that_works_is_the_one_that_is_tested() -> None:
    assert importlib.metadata.version("xllamacpp") == ggml.TRIED
    assert f'"xllamacpp=={ggml.TRIED}"' in (Path(__file__).parent.parent / "pyproject.toml").read_text()

"""A proof that fails says what differs, and where: faults planted in files, in settings and in the programs that run
them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
import torch
from mlxtune_convert.gguf import metadata as gguf_config
from safetensors.numpy import load_file, save_file

from mlxtune.adapter.layers import LoRALinear
from mlxtune.data.chat.masking import Example, tokenized_texts
from mlxtune.data.template.template import Template
from mlxtune.data.template.tokenizer import load_tokenizer
from mlxtune.errors import UserError
from mlxtune.model.arrays import to_numpy
from mlxtune.model.load import load
from mlxtune.ship import differences, runners, states, verify
from mlxtune.ship.artefacts import FusedMlx, HuggingFace, Peft
from mlxtune.ship.export import check, ship
from mlxtune.ship.gguf import Gguf
from mlxtune.ship.request import Request
from mlxtune.ship.runners import TorchRunner

WINDOW = 16
pytestmark = pytest.mark.filterwarnings("ignore:.*tied weights mapping:UserWarning")


def rows(model: Path) -> list[Example]:
    """Two texts of 60 tokens, in a byte tokenizer."""
    texts = ["The quick brown fox jumps over the lazy dog while it rains.!", "0123456789" * 6]
    return tokenized_texts(Template(load_tokenizer(model)), texts)


def seeing(folder: Path) -> Path:
    """The model with queries so long that its attention depends on where the tokens are, as a trained one's does."""
    for number in range(2):
        scaled(f"model.layers.{number}.self_attn.q_proj.weight", 50.0)(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing(tiny.make_model(tmp_path_factory.mktemp("parts") / "llama"))


@pytest.fixture(scope="module")
def exported(llama: Path) -> Path:
    """The same, taken out in float32."""
    out = llama.with_name("llama-hf")
    ship(Request(llama, None, out), HuggingFace())
    return out


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3, of whose two blocks the first looks at 16 tokens alone."""
    return seeing(tiny.make_model(tmp_path_factory.mktemp("parts") / "gemma", "gemma3_text"))


def scaled(name: str, factor: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors[name] * np.float32(factor)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def configured(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return write


def why(folder: Path, model: Path, adapter: Path | None, examples: Sequence[Example]) -> str:
    """What `verify` says of a folder; it must have failed."""
    report, differs = check(folder, model, adapter, examples)
    assert report.verdict == "failed", report.line()
    return differs


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            scaled("model.layers.1.mlp.up_proj.weight", 1.3),
            (
                "1 of its 21 tensors is not the merged one, first model.layers.1.mlp.up_proj.weight (off by 0.3 of",
                "first differ at block 1's MLP",
                "all before it agrees",
            ),
        ),
        (
            scaled("lm_head.weight", 2.0),
            (
                "first lm_head.weight (off by 1 of",
                "first differ at the head (1 of its largest value), by a factor of 2",
            ),
        ),
        (
            scaled("model.embed_tokens.weight", 0.5),
            (
                "first model.embed_tokens.weight",
                "first differ at the embeddings (0.5 of its largest value), by a factor",
            ),
        ),
        (
            configured(lambda config: config["rope_parameters"].update(rope_theta=500.0)),
            (
                "Its config.json has rope_parameters.rope_theta 500.0 in place of 10000.0",
                "block 0's attention",
                "from token 2 on (the rotary embedding",
            ),
        ),
        (
            configured(lambda config: config.update(rms_norm_eps=0.5)),
            ("Its config.json has rms_norm_eps 0.5 in place of 1e-06", "block 0's input_layernorm"),
        ),
    ],
    ids=["a matrix", "the head", "the embedding", "rotary base", "norm"],
)
def test_what_was_changed_in_an_export_is_named_with_its_place(
    change: Callable[[Path], None], expected: tuple[str, ...], llama: Path, exported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(exported, folder)
    change(folder)
    said = why(folder, llama, None, rows(llama))
    for text in expected:
        assert text in said, said
    assert "bug" not in said and "type" not in said


def test_a_window_that_is_wider_is_told_from_a_rotary_embedding_by_its_first_token(
    windowed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "wide"
    ship(Request(windowed, None, folder), HuggingFace())
    configured(lambda config: config.update(sliding_window=64))(folder)
    said = why(folder, windowed, None, rows(windowed))
    assert "Its config.json has sliding_window 64 in place of 16" in said
    assert "block 0's attention (0" in said and f"from token {WINDOW + 1} on (a window" in said


def broken(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """transformers' own model is changed after loading, as where it computes something that mlx-lm does not."""
    for name in ("transformers_runner", "peft_runner"):
        real = getattr(runners, name)

        def run(*given: Any, _real: Any = real) -> TorchRunner:
            runner: TorchRunner = _real(*given)
            change(runner.model)
            return runner

        monkeypatch.setattr(runners, name, run)


def slower(model: Any) -> None:
    """Rotary angles at half their speed."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.mul_(0.5)


def louder(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, given, out: 3 * out)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (slower, "block 0's attention ("),
        (louder, "the head (2 of its largest value), by a factor of 3; all before it agrees"),
    ],
)
def test_a_program_that_computes_another_model_from_the_same_files_is_named(
    change: Callable[[Any], Any], place: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, change)
    with pytest.raises(UserError, match="not the model that was trained") as raised:
        ship(Request(llama, None, tmp_path / "hf", examples=rows(llama)), HuggingFace())
    said = raised.value.hint
    assert said.startswith(f"mlx-lm and transformers {runners.transformers_version()} compute other models from these")
    assert f"they first differ at {place}" in said and "--no-verify" in said
    assert ("from token 2 on (the rotary embedding" in said) == (change is slower)
    assert "bug" not in said and "type" not in said
    assert not list(tmp_path.iterdir())


def test_a_program_that_computes_another_base_is_told_from_one_that_applies_an_adapter_otherwise(
    mlx_model: Path, run: Path, held_out: Sequence[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def applied_twice(model: Any) -> None:
        for _, module in model.named_modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling.update({name: 2 * value for name, value in module.scaling.items()})

    request = Request(mlx_model, run, tmp_path / "peft", examples=held_out)
    with monkeypatch.context() as patch:
        broken(patch, slower)
        with pytest.raises(UserError) as raised:
            ship(request, Peft())
    assert "compute other models from the base's weights alone: they first differ at block 0's att" in raised.value.hint
    with monkeypatch.context() as patch:
        broken(patch, applied_twice)
        with pytest.raises(UserError) as raised:
            ship(request, Peft())
    said = raised.value.hint
    assert (
        "The base is the same in both; PEFT does something else with the adapter: they first differ at block 0" in said
    )
    assert differences.BUG in said
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_not_the_runs_is_named(
    mlx_model: Path, run: Path, held_out: Sequence[Example], tmp_path: Path
) -> None:
    folder = tmp_path / "peft"
    ship(Request(mlx_model, run, folder), Peft())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    said = why(folder, mlx_model, run, held_out)
    assert said.startswith("Its tensors are not the run's (model.layers.0.mlp.down_proj.scale: "), said


def test_numbers_that_a_type_cannot_hold_are_counted_and_named(llama: Path, tmp_path: Path) -> None:
    """Two matrices with numbers beyond float16's 65,504, made small again by what follows them."""
    large = tmp_path / "large"
    shutil.copytree(llama, large)
    for number in range(2):
        scaled(f"model.layers.{number}.mlp.up_proj.weight", 2e8)(large)
        scaled(f"model.layers.{number}.mlp.down_proj.weight", 1e-8)(large)
    with pytest.raises(UserError) as raised:
        ship(Request(large, None, tmp_path / "hf", examples=rows(large)), HuggingFace("float16"))
    said = raised.value.hint
    assert "Float16 ends at 65,504, and 2 tensors hold larger numbers, first model.layers.0.mlp.up_proj" in said
    assert "--dtype bfloat16 or float32 holds them. --no-verify" in said
    for kind, expected in (("f16", "numbers above 65504"), ("q8_0", "numbers too large for Q8_0's scales")):
        with pytest.raises(
            UserError, match=f"blk.0.ffn_up.weight holds {expected}|blk.1.ffn_up.weight holds {expected}"
        ):
            ship(Request(large, None, tmp_path / "large.gguf"), Gguf(kind))
    assert {path.name for path in tmp_path.iterdir()} == {"large"}


def test_rounding_is_the_reason_only_where_nothing_else_is(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under limits that no 16-bit export of this model passes."""
    monkeypatch.setitem(verify.LIMITS, "bfloat16", verify.Limits(mean_kl=1e-9))
    request = Request(llama, None, tmp_path / "hf", examples=rows(llama))
    with pytest.raises(UserError) as raised:
        ship(request, HuggingFace("bfloat16"))
    assert raised.value.hint.startswith(
        "Rounding the merged weights to bfloat16 does this, and nothing else. --dtype f"
    )
    broken(monkeypatch, louder)
    monkeypatch.setitem(verify.LIMITS, "bfloat16", verify.Limits(mean_kl=1e-2))
    with pytest.raises(UserError) as raised:
        ship(request, HuggingFace("bfloat16"))
    assert "compute other models" in raised.value.hint and "ounding" not in raised.value.hint


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", [HuggingFace, FusedMlx])
def test_a_merge_that_is_none_is_our_bug(
    form: type[HuggingFace] | type[FusedMlx],
    dtype: str,
    mlx_model: Path,
    run: Path,
    held_out: Sequence[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the files' own numbers are wrong, and they are those that were merged: no other reason is left."""
    monkeypatch.setattr(LoRALinear, "delta", lambda self: self.lora_b.T @ self.lora_a.T)
    with pytest.raises(UserError) as raised:
        ship(Request(mlx_model, run, tmp_path / "out", examples=held_out), form(dtype=dtype))
    said = raised.value.hint
    assert said.startswith("Merged, the adapter does something else than in the trained model: they first differ at bl")
    assert differences.BUG in said


def test_codes_that_lose_the_tune_are_told_from_torn_ones(
    mlx_model: Path, run: Path, held_out: Sequence[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "fused"
    ship(Request(mlx_model, run, folder), FusedMlx(4))
    monkeypatch.setitem(verify.LIMITS, "4 bits", verify.Limits(gain_kept=9.0, lossy=True))
    report, said = check(folder, mlx_model, run, held_out)
    assert report.verdict == "lossy" and "fuse --bits 8 or 16" in said
    scaled("model.layers.1.mlp.up_proj.scales", np.inf)(folder)
    assert why(folder, mlx_model, run, held_out).startswith(
        "1 tensor holds numbers that are infinite or none, first model.layers.1.mlp.up_proj.scales."
    )


def test_llama_cpp_that_computes_another_model_is_told_from_a_type_that_rounds(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rotary base that was written wrong; limits that eight bits cannot pass."""
    real = gguf_config.metadata

    def metadata(*given: Any) -> dict[str, Any]:
        fields = real(*given)
        key = next(key for key in fields if key.endswith("rope.freq_base"))
        return {**fields, key: fields[key]._replace(value=500.0)}

    monkeypatch.setitem(verify.LIMITS, "q8_0", verify.Limits(mean_kl=1e-9))
    request = Request(llama, None, tmp_path / "model.gguf", examples=rows(llama))
    with pytest.raises(UserError) as raised:
        ship(request, Gguf("q8_0"))
    assert "The file holds exactly what --type q8_0 makes of the weights: either its rounding" in raised.value.hint
    monkeypatch.setattr(gguf_config, "metadata", metadata)
    with pytest.raises(UserError) as raised:
        ship(request, Gguf("f32"))
    said = raised.value.hint
    assert "The file holds the weights bit for bit: llama.cpp computes another model from them" in said
    assert "its logits differ, from token 2 on (the rotary embedding, or the scale of the scores)" in said


def test_looking_changes_nothing_and_sees_the_same_in_both_programs(windowed: Path) -> None:
    """Gemma 3 calls one module twice: once for its windowed blocks, once for the others."""
    ids = np.arange(3, 43)
    model, theirs = load(str(windowed), "float32").model, runners.transformers_runner(windowed).model
    seen, also = states.of_mlx(model, ids), states.of_torch(theirs, ids, 2)
    with torch.no_grad():
        plain = theirs(torch.from_numpy(ids[None])).logits[0].numpy()
    assert (also[states.LOGITS] == plain).all()
    assert (seen[states.LOGITS] == to_numpy(model(mx.array(ids[None]))[0])).all()
    assert states.parting(seen, also, 1e-5) is None
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp", "post_feedforward_layernorm")
    expected = {f"blocks.{number}.{part}" for number in range(2) for part in parts}
    assert expected | {"embeddings", "blocks.0", "blocks.1", "beside.norm", "logits"} <= seen.keys() & also.keys()


def test_what_goes_wrong_while_looking_does_not_hide_that_the_proof_failed() -> None:
    def fails() -> str:
        raise RuntimeError("no memory")

    assert differences.found_out(fails) == "What differs could not be found out (RuntimeError: no memory)."


def test_a_difference_that_grows_slowly_has_no_place_and_noise_is_none() -> None:
    """Each part ten times less apart than would be a new difference; one that jumps is found after all of it."""
    draw = np.random.default_rng(0)
    one = {f"blocks.{number}": draw.normal(size=(9, 8)).astype(np.float32) for number in range(6)}
    off = {key: value * (1 + 1e-5 * 5**number) for number, (key, value) in enumerate(one.items())}
    assert states.parting(one, off, 1e-4) is None
    off["blocks.4"] = one["blocks.4"].copy()
    off["blocks.4"][6:] += 1.0
    found = states.parting(one, off, 1e-4)
    assert found and (found.key, found.token, found.factor, found.agreed) == ("blocks.4", 6, None, True)
    assert "from token 7 on" in str(found)
    off["blocks.0"] = one["blocks.0"][:, :4]  # another shape: nothing to compare
    assert states.parting(one, {"blocks.9": one["blocks.0"], "blocks.0": off["blocks.0"]}, 1e-4) is None

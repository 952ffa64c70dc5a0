"""`mlxtune-convert` where there is no MLX: adapters and models across the fence, the same bits as mlxtune's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import alone
import numpy as np
import pytest
import tiny
import zoo
from alone import same
from click.testing import CliRunner
from mlxtune_convert import adapters, fence
from mlxtune_convert.adapters import AdapterConfig
from mlxtune_convert.cli import cli
from mlxtune_convert.errors import UserError
from mlxtune_convert.gguf import adapter_file, architectures
from mlxtune_convert.hf import families
from mlxtune_convert.hf.configs import normalise
from mlxtune_convert.peft.base_model import Base
from mlxtune_convert.tokenizer_changes import Changes
from safetensors.numpy import load_file, save_file
from test_peft import IDS, hf, logits
from test_variants import KINDS, adapted

from mlxtune.adapter import peft
from mlxtune.adapter.layers import LINEAR, SWITCH
from mlxtune.model.convert import Quantization, convert
from mlxtune.model.load import load
from mlxtune.ship.artefacts import Peft
from mlxtune.ship.export import ship
from mlxtune.ship.request import Request

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),  # they do match
    pytest.mark.filterwarnings("ignore:.*target_parameters.*:UserWarning"),
]
DENSE = Quantization.of(16, None, None)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"llama {kind}": ("llama", section) for kind, section in KINDS.items()},
    "tied": ("tied", {"targets": ["q_proj"], "train_also": ["embeddings", "norms"]}),
    **{name: (name, {"targets": "all-linear"}) for name in ("mixtral", "qwen3_moe", "phimoe", "granitemoe", "gpt_oss")},
    "gpt2": ("gpt2", {"targets": "all-linear", "train_also": ["embeddings"]}),
    "qwen3_5_text": ("qwen3_5_text", {"targets": ["q_proj", "in_proj_qkv", "up_proj"], "ranks": {"up_proj": 4}}),
}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of an environment with mlxtune-convert's wheel and what it asks for."""
    return alone.environment(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """MLX folders, each made once: 16 bits, or 4 where the family's experts or prefixes are to be dequantized."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for name in dict.fromkeys(name for name, _ in CASES.values()):
        changes = {"tie_word_embeddings": True} if name == "tied" else {}
        hf = tiny.make_model(root / f"{name}-hf", "llama" if name == "tied" else name, **changes)
        made[name] = root / name
        convert(
            str(hf), made[name], Quantization.of(4, 32, "affine") if name in ("qwen3_moe", "qwen3_5_text") else DENSE
        )
    return made


def test_there_is_no_mlx_no_pytorch_and_no_mlxtune_where_the_script_runs(python: Path) -> None:
    names = ("mlx", "mlx_lm", "torch", "transformers", "mlxtune", "peft", "mlxtune_convert", "gguf")
    script = f"import importlib.util\nprint([name for name in {names} if importlib.util.find_spec(name)])"
    assert alone.done(python, "-c", script, cwd=python.parent) == "['mlxtune_convert', 'gguf']"
    said = alone.command(python, "--help").stdout
    assert all(verb in said for verb in ("to-peft", "to-mlx", "to-hf", "check"))
    assert alone.done(python, "-m", "mlxtune_convert", "--help", cwd=python.parent) == said.strip()


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_crosses_both_ways_with_the_bits_that_mlxtune_gives(
    case: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """In this process; with names from the MLX model's weights, and from config.json alone."""
    name, section = CASES[case]
    folder = models[name]
    adapted(folder, tmp_path / "run", **section)
    ship(Request(folder, tmp_path / "run", tmp_path / "theirs", base_name="acme/tiny"), Peft())
    fence.to_peft(tmp_path / "run", tmp_path / "ours", folder, "acme/tiny")
    same(tmp_path / "ours", tmp_path / "theirs")
    peft.import_adapter(tmp_path / "ours", tmp_path / "back", str(folder), False)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(fence.source_of(folder)["config"]))
    for number, base in enumerate((folder, config)):
        fence.to_mlx(tmp_path / "ours", tmp_path / f"back-{number}", base)
        same(tmp_path / "back", tmp_path / f"back-{number}")
    file = AdapterConfig.read(tmp_path / "run").file
    assert {key: array.tobytes() for key, array in load_file(tmp_path / "run" / file).items()} == {
        key: array.tobytes() for key, array in load_file(tmp_path / "back-0" / file).items()
    }
    assert fence.check(tmp_path / "ours", tmp_path / "run", folder).said.endswith("equal bit for bit")


def test_the_script_carries_an_adapter_there_and_back_and_says_what_it_did(
    python: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    """Where there is no MLX; the chat template that was trained with goes along, into the tokenizer's files."""
    folder = models["qwen3_moe"]
    adapted(folder, tmp_path / "run", targets="all-linear")
    Changes("{{ messages }}", "<|im_start|>").save(tmp_path / "run")
    ship(Request(folder, tmp_path / "run", tmp_path / "theirs"), Peft())
    result = alone.command(python, "to-peft", tmp_path / "run", tmp_path / "ours", "--base", folder)
    assert (result.returncode, result.stdout) == (
        0,
        f"{tmp_path / 'ours'}: a PEFT adapter of 16 layers; 32 tensors read back\n",
    )
    assert "--base-name" in result.stderr
    same(tmp_path / "ours", tmp_path / "theirs")
    assert (tmp_path / "ours" / "chat_template.jinja").read_text() == "{{ messages }}"
    result = alone.command(python, "to-mlx", tmp_path / "ours", tmp_path / "back", "--base", folder)
    assert result.stdout == f"{tmp_path / 'back'}: an MLX adapter of 16 layers (lora); 32 tensors read back\n"
    peft.import_adapter(tmp_path / "theirs", tmp_path / "their-back", str(folder), False)
    same(tmp_path / "back", tmp_path / "their-back")
    assert Changes.read(tmp_path / "back").chat_template == "{{ messages }}"


def test_an_adapter_of_mlx_lm_computes_the_same_in_peft(models: dict[str, Path], tmp_path: Path) -> None:
    """Made and saved by mlx-lm's own code; logits by mlx-lm here and PEFT there."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    folder = models["mixtral"]
    model = load(str(folder), "float32", as_mlx_lm=True).model
    settings = {"rank": 3, "scale": 1.7, "dropout": 0.0, "keys": None}
    model.freeze()
    linear_to_lora_layers(model, 1, settings)
    model.load_weights(
        [
            (name, array + 0.05 * mx.random.normal(array.shape, key=mx.random.key(index)))
            for index, (name, array) in enumerate(tree_flatten(model.trainable_parameters()))
        ],
        strict=False,
    )
    run = tmp_path / "run"
    run.mkdir()
    mx.save_safetensors(str(run / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    (run / "adapter_config.json").write_text(json.dumps({"num_layers": 1, "lora_parameters": settings}))
    fence.to_peft(run, tmp_path / "peft", folder)
    fence.to_hf(folder, tmp_path / "hf")
    ours = np.array(model(mx.array(IDS)))
    np.testing.assert_allclose(logits(hf(tmp_path / "hf", tmp_path / "peft")), ours, atol=2e-5)
    assert np.abs(logits(hf(tmp_path / "hf")) - ours).max() > 0.01


@pytest.mark.parametrize(("family", "target"), [("gpt2", "c_attn"), ("mamba", "in_proj"), ("gemma4_text", "q_proj")])
def test_a_tied_embedding_that_was_trained_stays_the_head_in_peft_whatever_its_name(
    family: str, target: str, tmp_path: Path
) -> None:
    """wte, backbone.embeddings; and Gemma 4's further linear layer outside of the blocks, which is no head."""
    import mlx.core as mx

    folder = tiny.make_model(tmp_path / "model", family, tie_word_embeddings=True)
    model = adapted(folder, tmp_path / "run", targets=[target], train_also=["embeddings"])
    ship(Request(folder, tmp_path / "run", tmp_path / "peft"), Peft())
    ours = np.array(model(mx.array(IDS)))
    np.testing.assert_allclose(logits(hf(folder, tmp_path / "peft")), ours, atol=1e-4)
    assert np.abs(logits(hf(folder)) - ours).max() > 0.05


def test_a_gguf_adapter_becomes_the_same_peft_adapter_as_its_mlx_original(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """q and k, whose rows GGUF interleaves, among its layers."""
    folder = models["llama"]
    adapted(folder, tmp_path / "run", targets="all-linear")
    config = fence.source_of(folder)["config"]
    adapter, _ = adapters.read_adapter(tmp_path / "run")
    file = tmp_path / "adapter.gguf"
    adapter_file.write_adapter(file, architectures.by_model_type("llama"), config, adapter.updates, "")
    fence.to_peft(file, tmp_path / "ours", folder)
    fence.to_peft(tmp_path / "run", tmp_path / "theirs", folder)
    same(tmp_path / "ours", tmp_path / "theirs")
    assert "equal bit for bit" in fence.check(tmp_path / "ours", file, folder).said


def test_a_changed_number_is_found_by_its_name_across_the_fence(
    python: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    """A factor, a scale, a tensor too many, one too few."""
    folder, ours = models["llama"], tmp_path / "peft"
    adapted(folder, tmp_path / "run", targets=["q_proj"])
    fence.to_peft(tmp_path / "run", ours, folder)
    check = ("check", ours, tmp_path / "run", "--base", folder)
    assert alone.command(python, *check).stdout == f"{ours}: 4 tensors equal bit for bit\n"
    kept = {path.name: path.read_bytes() for path in ours.iterdir()}
    tensors = load_file(ours / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors[name] = tensors[name] + np.float32(0.5)
    save_file(tensors, ours / "adapter_model.safetensors")
    said = tiny.one_clear_line(alone.command(python, *check), "1 of 4", "layers.1.self_attn.q_proj.a", "by up to 0.5")
    assert "trained since" in said
    (ours / "adapter_model.safetensors").write_bytes(kept["adapter_model.safetensors"])
    config = json.loads(kept["adapter_config.json"])
    (ours / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 7}))
    with pytest.raises(UserError, match=r"2 of 6 .*q_proj.scale"):
        fence.check(ours, tmp_path / "run", folder)
    (ours / "adapter_config.json").write_bytes(kept["adapter_config.json"])
    fewer = {name: array for name, array in tensors.items() if "layers.1." in name}
    save_file(fewer, ours / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"4 of 5 .* first model.layers.0.self_attn.q_proj.a"):
        fence.check(ours, tmp_path / "run", folder)
    (ours / "adapter_model.safetensors").write_bytes(kept["adapter_model.safetensors"])
    run = load_file(tmp_path / "run" / "adapters.safetensors")
    save_file({n: a for n, a in run.items() if "layers.1." in n}, tmp_path / "run" / "adapters.safetensors")
    with pytest.raises(UserError, match=r"3 of 5 .* first model.layers.0.self_attn.q_proj.a"):
        fence.check(ours, tmp_path / "run", folder)


def test_what_cannot_be_carried_is_refused_in_one_line_and_nothing_is_left(
    python: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    folder, out = models["llama"], tmp_path / "out"
    adapted(folder, tmp_path / "run", targets=["q_proj"])
    adapted(models["qwen3_moe"], tmp_path / "experts", targets="all-linear")
    adapted(models["tied"], tmp_path / "tied", targets=["q_proj"], train_also=["embeddings"])
    fence.to_peft(tmp_path / "run", tmp_path / "peft", folder)
    fence.to_peft(tmp_path / "experts", tmp_path / "peft-experts", models["qwen3_moe"])
    config = tmp_path / "config.json"
    config.write_text(json.dumps(fence.source_of(models["tied"])["config"]))
    unknown = tmp_path / "unknown.json"
    unknown.write_text('{"model_type": "nonesuch"}')
    cases: dict[tuple[Any, ...], tuple[str, ...]] = {
        ("to-peft", tmp_path / "run", out): ("Missing option '--base'", "to-peft --help"),
        ("to-peft", tmp_path / "run", out, "--base", unknown): ("nonesuch",),
        ("to-peft", tmp_path / "run", out, "--base", models["gpt2"]): ("model.layers.0.self_attn.q_proj", "not there"),
        ("to-peft", tmp_path / "peft", out, "--base", folder): ("is a PEFT adapter", "to-mlx"),
        ("to-peft", tmp_path / "tied", out, "--base", config): ("embedding", "--base DIR"),
        ("to-mlx", tmp_path / "run", out): ("peft_type",),
        ("to-mlx", tmp_path / "peft-experts", out): ("experts", "--base DIR"),
        ("to-mlx", tmp_path / "peft-experts", out, "--base", folder): ("has no layer",),
        ("to-mlx", tmp_path / "peft", tmp_path / "run"): ("already exists", "--force"),
        ("to-mlx", tmp_path / "nowhere", out): ("nowhere",),
        ("check", tmp_path / "peft", tmp_path / "run"): ("family", "--base DIR"),
        ("check", tmp_path / "peft", tmp_path / "run", "--base", folder, "--adapter", folder): ("--adapter has no",),
        ("to-hf", models["tied"].with_name("tied-hf"), out): ("no MLX model folder",),
        ("to-hf", folder, out, "--base", folder): ("--base has no effect",),
        ("to-hf", tmp_path / "run", out): ("config.json",),
    }
    for arguments, expected in cases.items():
        alone.refused(python, out, *arguments, expected=expected)
    assert alone.command(python, "to-mlx", tmp_path / "peft", tmp_path / "run", "--force").returncode == 0


def test_rows_for_other_tokens_are_refused_with_what_helps_unless_the_tokenizer_is_there(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """A trained embedding of fewer rows, of more, and of more with the tokenizer that has their tokens."""
    model, run, peft_folder = models["tied"], tmp_path / "run", tmp_path / "peft"
    adapted(model, run, targets=["q_proj"], train_also=["embeddings"])
    fence.to_peft(run, peft_folder, model)
    whole = load_file(peft_folder / "adapter_model.safetensors")
    for rows, said in ((300, "resize_token_embeddings(300)"), (330, "10 tokens were added")):
        other = {name: np.resize(array, (rows, 64)) if len(array) == 320 else array for name, array in whole.items()}
        save_file(other, peft_folder / "adapter_model.safetensors")
        with pytest.raises(UserError, match=rf"is \({rows}, 64\), the model needs \(320, 64\)") as refused:
            fence.to_mlx(peft_folder, tmp_path / "back", model)
        assert said in refused.value.hint
    tiny.make_tokenizer(peft_folder)
    fence.to_mlx(peft_folder, tmp_path / "back", model)
    with pytest.raises(UserError, match=r"is not there|has no layer"):
        fence.to_mlx(peft_folder, tmp_path / "none", models["gpt2"])
    notes = fence.to_peft(tmp_path / "back", tmp_path / "again", model).notes
    assert any("resize_token_embeddings(330)" in note for note in notes)


def test_a_damaged_adapter_folder_is_refused_by_what_is_wrong_with_it(models: dict[str, Path], tmp_path: Path) -> None:
    """A tensor that nothing names, a lost partner, another rank, more blocks than the configuration says."""
    run = tmp_path / "run"
    adapted(models["llama"], run, targets=["q_proj"])
    whole = load_file(run / "adapters.safetensors")
    config = json.loads((run / "adapter_config.json").read_text())
    first = "model.layers.0.self_attn.q_proj.lora_"
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"model.norm.weight": np.ones(64, np.float32)}, {}, "does not say what the tensor model.norm.weight is"),
        ({f"{first}b": None}, {}, "has lora_a, not lora_a, lora_b"),
        ({f"{first}b": np.ones((2, 64), np.float32)}, {}, "rank 3"),
        ({}, {"num_layers": 1}, "adapts 2 blocks"),
        ({}, {"fine_tune_type": "full"}, "'full'"),
        (dict.fromkeys(whole), {}, "any layer is missing"),
    ]
    for tensors, settings, said in cases:
        save_file({name: a for name, a in {**whole, **tensors}.items() if a is not None}, run / "adapters.safetensors")
        (run / "adapter_config.json").write_text(json.dumps({**config, **settings}))
        with pytest.raises(UserError, match=said):
            adapters.read_adapter(run)


def test_the_tokenizer_beside_an_adapter_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """Template file or settings, end token as text or object, older files that win, added tokens of both kinds."""
    from transformers import AutoTokenizer

    for number in range(4):
        folder = tmp_path / str(number)
        tiny.make_tokenizer(folder, chat=number != 1)
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        if number == 1:
            (folder / "chat_template.jinja").write_text("{{ messages }}")
        if number == 2:
            settings["eos_token"] = {"__type": "AddedToken", "content": "<|im_start|>"}
        if number == 3:
            (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_start|>"}')
        file.write_text(json.dumps(settings))
        theirs = AutoTokenizer.from_pretrained(folder)
        found = Changes.of_files(folder)
        assert (found.chat_template, found.eos_token) == (theirs.chat_template or "", theirs.eos_token)
        special = {t.content: index for index, t in theirs.added_tokens_decoder.items() if t.special}
        assert found.tokens == special and len(special) == 3


@pytest.mark.parametrize("family", sorted(set(zoo.SHAPES) & set(families.LAYOUTS)))
def test_a_name_is_found_again_from_the_tables_alone(family: str) -> None:
    """Of every linear layer of every family, without the model's weights; and how many blocks it has."""
    from mlx_lm.utils import _get_classes
    from transformers import AutoConfig

    shape = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    original = AutoConfig.for_model(family, **{**shape, "num_attention_heads": 4, **zoo.SHAPES[family]}).to_dict()
    config = normalise(original)
    kind, arguments = _get_classes(config)
    model = kind(arguments.from_dict(config))
    base = Base(Path(), original, None)
    assert base.blocks == len(model.layers)
    paths = [path for path, module in model.named_modules() if isinstance(module, LINEAR + SWITCH)]
    layout = families.of(original)
    targets = layout.peft_targets(paths)
    assert len(targets) > len(paths) / 3
    assert {target: layout.mlx_path(target) for target in targets} == targets


@pytest.mark.parametrize("verb", list(cli.commands))
def test_help_of_each_verb_begins_with_one_line_and_shows_how_to_call_it(verb: str) -> None:
    said = CliRunner().invoke(cli, [verb, "--help"], prog_name="mlxtune-convert").output
    assert (cli.commands[verb].help or "").split("\n\n")[0].strip().endswith(".")
    assert sum(line.strip().startswith(f"mlxtune-convert {verb} ") for line in said.splitlines()) >= 2

"""`mlxtune-convert` where there is no MLX: adapters and models across the fence, the same bits as mlxtune's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import alone
import pytest
import tiny
from mlxtune_convert import fence
from safetensors.numpy import load_file
from test_variants import KINDS, adapted

from mlxtune.model import lora, peft
from mlxtune.model.convert import Target, convert
from mlxtune.ship import export

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"llama {kind}": ("llama", section) for kind, section in KINDS.items()},
    "tied": ("tied", {"targets": ["q_proj"], "train_also": ["embeddings", "norms"]}),
    **{name: (name, {"targets": "all-linear"}) for name in ("mixtral", "qwen3_moe", "phimoe", "granitemoe")},
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
        convert(str(hf), made[name], Target.of(4, 32, "affine") if name in ("qwen3_moe", "qwen3_5_text") else DENSE)
    return made


DENSE = Target.of(16, None, None)


def same(one: Path, other: Path) -> None:
    """Two folders hold the same tensors and configurations."""
    files = [path.name for path in one.iterdir() if path.suffix in (".safetensors", ".json")]
    assert any(name.endswith(".safetensors") for name in files)
    for name in files:
        if name.endswith(".json"):
            assert json.loads((one / name).read_text()) == json.loads((other / name).read_text()), name
            continue
        left, right = load_file(one / name), load_file(other / name)
        assert left.keys() == right.keys(), name
        for key, array in left.items():
            assert (array.dtype, array.shape) == (right[key].dtype, right[key].shape), key
            assert array.tobytes() == right[key].tobytes(), key


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
    export.to_peft(export.Request(folder, tmp_path / "run", tmp_path / "theirs", base_name="acme/tiny"))
    fence.to_peft(tmp_path / "run", tmp_path / "ours", folder, "acme/tiny")
    same(tmp_path / "ours", tmp_path / "theirs")
    peft.import_adapter(tmp_path / "ours", tmp_path / "back", str(folder), False)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(fence.source_of(folder)["config"]))
    for number, base in enumerate((folder, config)):
        fence.to_mlx(tmp_path / "ours", tmp_path / f"back-{number}", base)
        same(tmp_path / "back", tmp_path / f"back-{number}")
    file = lora.read_spec(tmp_path / "run").file
    assert {key: array.tobytes() for key, array in load_file(tmp_path / "run" / file).items()} == {
        key: array.tobytes() for key, array in load_file(tmp_path / "back-0" / file).items()
    }
    assert fence.check(tmp_path / "ours", tmp_path / "run", folder).said.endswith("equal bit for bit")

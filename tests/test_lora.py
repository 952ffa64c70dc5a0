"""Adapters: mlx-lm reads what we write, dropout is keyed, targets are found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from mlxtune_convert.adapters import AdapterConfig

from mlxtune.adapter import adapter_files, attach
from mlxtune.adapter.dropout import DropoutKeys
from mlxtune.adapter.plan import AdapterPlan
from mlxtune.config.schema import LoraSection
from mlxtune.errors import UserError
from mlxtune.model.load import load, open_model


def with_random_b(model: mx.array) -> None:
    """B starts at zero; give it values, so that the adapter does something."""
    for index, layer in enumerate(attach.adapted_layers(model).values()):
        layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(index))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    source = tiny.make_model(folder / "hf", "mixtral")
    assert tiny.mlxtune("convert", source, folder / "mlx", "--group-size", "32").returncode == 0
    return folder / "mlx"


@pytest.mark.parametrize("layers", ["all", 1])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_mlx_lm_computes_the_same_logits_from_our_adapter_folder(
    kind: str, layers: str | int, mlx_model: Path, mixtral: Path, tmp_path: Path
) -> None:
    """Linear and expert layers, all blocks and the last one: mlx_lm.load(adapter_path=...) is the oracle."""
    import mlx_lm
    from mlx_lm.utils import load_adapters, load_model

    folder = mlx_model if kind == "llama" else mixtral
    loaded = load(str(folder))
    spec = AdapterPlan.of(loaded.model, LoraSection(rank=3, alpha=5, layers=layers))
    attach.attach(loaded.model, spec, seed=1)
    with_random_b(loaded.model)
    adapter_files.save_config(tmp_path, spec)
    adapter_files.save_tensors(loaded.model, tmp_path)
    theirs, _ = load_model(folder)
    theirs = load_adapters(theirs, str(tmp_path))
    ids = mx.array([[5, 9, 77, 120, 33, 8, 250, 91, 17, 60, 61, 62]])
    ours_logits, their_logits = np.array(loaded.model(ids)), np.array(theirs(ids))
    np.testing.assert_allclose(ours_logits, their_logits, atol=2e-5)
    assert mlx_lm.__version__.startswith("0.32")
    with attach.switched_off(loaded.model):
        assert np.abs(np.array(loaded.model(ids)) - ours_logits).max() > 0.05


def test_mlx_lm_generate_runs_a_run_folder(mlx_model: Path, run: Path) -> None:
    """The command that the README names, as a user of mlx-lm types it."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "mlx_lm", "generate", "--model", mlx_model, "--adapter-path", run),
            *("--prompt", "Question number 3?", "--max-tokens", "8"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Generation: 8 tokens" in result.stdout


def test_saving_and_loading_an_adapter_keeps_its_bits(mlx_model: Path, tmp_path: Path) -> None:
    loaded = load(str(mlx_model))
    spec = AdapterPlan.of(loaded.model, LoraSection(rank=2, alpha=3, dropout=0.25, targets=["q_proj", "mlp.down_proj"]))
    assert spec.last_blocks is not None
    assert spec.last_blocks.keys == ("mlp.down_proj", "self_attn.q_proj")
    attach.attach(loaded.model, spec, seed=1)
    with_random_b(loaded.model)
    adapter_files.save_config(tmp_path, spec)
    adapter_files.save_tensors(loaded.model, tmp_path)
    again = load(str(mlx_model))
    assert adapter_files.load_adapter(again.model, tmp_path) == spec
    for name, array in attach.trained_tensors(loaded.model).items():
        assert mx.array_equal(array, attach.trained_tensors(again.model)[name]).item(), name


def test_only_the_adapter_is_trainable(mlx_model: Path) -> None:
    loaded = load(str(mlx_model))
    attach.attach(loaded.model, AdapterPlan.of(loaded.model, LoraSection(rank=2, layers=1)))
    names = [name for name, _ in tree_flatten(loaded.model.trainable_parameters())]
    assert len(names) == 14
    assert all(name.startswith("model.layers.1.") and name.endswith(("lora_a", "lora_b")) for name in names)


def test_a_target_without_a_layer_names_what_there_is(mlx_model: Path) -> None:
    loaded = load(str(mlx_model))
    with pytest.raises(UserError, match=r"'qproj'.*") as refused:
        AdapterPlan.of(loaded.model, LoraSection(targets=["qproj"]))
    assert "q_proj" in refused.value.hint
    with pytest.raises(UserError, match="the model has 2 blocks"):
        AdapterPlan.of(loaded.model, LoraSection(layers=3))


class TestDropout:
    """Masks are a function of (seed, step, row, layer)."""

    def mask(
        self, seed: int = 0, step: int = 1, rows: tuple[int, ...] = (4, 9), layer: int = 0, width: int = 50
    ) -> np.ndarray:
        keys = DropoutKeys(0.4)
        keys.set(seed, step, rows, lengths=[50] * len(rows), layers=3)
        return np.array(keys.apply(mx.ones((len(rows), width, 40)), layer)[:, :50])

    def test_the_same_row_gets_the_same_mask_whatever_shares_its_batch(self) -> None:
        """Also when a longer row pads it."""
        np.testing.assert_array_equal(self.mask(rows=(4, 9))[1], self.mask(rows=(9, 7))[0])
        np.testing.assert_array_equal(self.mask(), self.mask(width=77))

    @pytest.mark.parametrize("change", [{"seed": 1}, {"step": 2}, {"layer": 1}, {"rows": (5, 10)}])
    def test_seed_step_layer_and_row_each_change_the_mask(self, change: dict) -> None:
        """Independent masks agree on 0.4^2 + 0.6^2 = 52% of their entries."""
        agreement = (self.mask() == self.mask(**change)).mean()
        assert 0.47 < agreement < 0.57

    def test_it_keeps_the_mean(self) -> None:
        values = self.mask()
        assert set(np.unique(values)) == {0.0, np.float32(1 / 0.6)}
        assert values.mean() == pytest.approx(1.0, abs=0.05)

    def test_a_model_that_flattens_its_rows_is_served_by_one_key(self) -> None:
        """OLMoE passes [B * T, in] to its router and experts."""
        keys = DropoutKeys(0.5)
        keys.set(0, 1, [3, 4], lengths=[10, 10], layers=1)
        values = np.array(keys.apply(mx.ones((20, 8)), 0))
        assert set(np.unique(values)) == {0.0, 2.0}

    @pytest.mark.parametrize("kind", ["llama", "mixtral"])
    def test_gradients_match_finite_differences_under_it(self, kind: str, mlx_model: Path, mixtral: Path) -> None:
        """Forward and backward see one mask: the directional derivative equals a central difference."""
        loaded = load(str(mlx_model if kind == "llama" else mixtral), "float32")
        spec = AdapterPlan.of(loaded.model, LoraSection(rank=2, dropout=0.5, targets=["down_proj", "w2"][:1]))
        keys = attach.attach(loaded.model, spec, seed=1)
        with_random_b(loaded.model)
        keys.set(0, 1, [0, 1], [12, 12], layers=4)
        ids = mx.array(np.random.default_rng(0).integers(3, 250, (2, 12)))
        layer = next(iter(attach.adapted_layers(loaded.model).values()))
        start = layer.lora_b

        def losses(b: mx.array) -> mx.array:
            layer.lora_b = b
            return mx.logsumexp(loaded.model(ids), axis=-1)

        def exactly(b: mx.array) -> float:  # a float32 sum would round to the size of the difference
            return float(np.array(losses(b)).astype(np.float64).sum())

        direction = mx.random.normal(start.shape, key=mx.random.key(7))
        slope = (mx.grad(lambda b: losses(b).sum())(start) * direction).sum().item()
        h = 2e-2
        difference = (exactly(start + h * direction) - exactly(start - h * direction)) / (2 * h)
        assert slope == pytest.approx(difference, rel=2e-2)


def test_the_adapter_config_is_mlx_lms(run: Path) -> None:
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 2
    assert config["lora_parameters"]["rank"] == 4
    assert config["lora_parameters"]["scale"] == 8.0
    assert "self_attn.q_proj" in config["lora_parameters"]["keys"]


def test_an_adapter_that_mlx_lm_trained_without_keys_is_understood(mlx_model: Path, run: Path, tmp_path: Path) -> None:
    """mlx-lm writes no `keys` when it adapts every layer; the tensors' names tell them."""
    config = json.loads((run / "adapter_config.json").read_text())
    keys = config["lora_parameters"].pop("keys")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapters.safetensors").write_bytes((run / "adapters.safetensors").read_bytes())
    loaded = load(str(mlx_model))
    assert sorted(adapter_files.load_adapter(loaded.model, tmp_path).config.keys) == sorted(keys)
    assert len(attach.adapted_layers(loaded.model)) == 14


INSIDE = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{one}_proj" for one in "koqv"))
EXPERTS = tuple(f"block_sparse_moe.switch_mlp.{part}_proj" for part in ("down", "gate", "up"))
ROUTED = ("block_sparse_moe.gate", *EXPERTS, *INSIDE[3:])


def uniform(keys: tuple[str, ...] = INSIDE, num_layers: int = 2, scale: float = 2.0) -> dict[str, Any]:
    """mlx-lm's form of an adapter of rank 16."""
    parameters = {"rank": 16, "scale": scale, "dropout": 0.0, "keys": list(keys)}
    return {"num_layers": num_layers, "lora_parameters": parameters}


def own(modules: dict[str, Any], trained: list[str]) -> dict[str, Any]:
    return {"fine_tune_type": "mlxtune", "dropout": 0.0, "modules": modules, "trained": trained, "own_head": False}


LORA, BY_LORA = {"fine_tune_type": "lora"}, {"variant": "lora"}
RANKS = {
    f"model.layers.{block}.{path}": {"rank": 4, "scale": 8.0} if path == "mlp.down_proj" else {"rank": 16, "scale": 2.0}
    for block in range(2)
    for path in ("mlp.down_proj", "self_attn.q_proj")  # the order of MLX's walk
}
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # lora.* -> adapter_config.json, its keys in order
    "uniform": ({}, LORA | uniform() | BY_LORA),
    "the last block": ({"layers": 1}, LORA | uniform(num_layers=1) | BY_LORA),
    "outside the blocks": (
        {"targets": ["q_proj", "lm_head"]},
        LORA | uniform(("lm_head", "self_attn.q_proj")) | BY_LORA,
    ),
    "rslora": ({"variant": "rslora"}, LORA | uniform(scale=8.0) | {"variant": "rslora"}),
    "dora": ({"variant": "dora"}, {"fine_tune_type": "dora"} | uniform() | {"variant": "dora"}),
    "ranks": ({"targets": ["q_proj", "down_proj"], "ranks": {"down_proj": 4}}, own(RANKS, []) | BY_LORA),
    "embeddings": ({"train_also": ["embeddings"]}, own({}, ["model.embed_tokens"]) | uniform() | BY_LORA),
    "experts": ({}, LORA | uniform(ROUTED) | BY_LORA),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_an_adapter_config_has_this_text_and_says_the_plan_again(
    case: str, mlx_model: Path, mixtral: Path, tmp_path: Path
) -> None:
    """Byte for byte what every earlier version of mlxtune wrote."""
    section, expected = CONFIGS[case]
    model, _ = open_model(mixtral if case == "experts" else mlx_model)
    plan = AdapterPlan.of(model, LoraSection(**section))
    adapter_files.save_config(tmp_path, plan)
    assert (tmp_path / "adapter_config.json").read_text() == json.dumps(expected, indent=2) + "\n"
    assert AdapterPlan.read(tmp_path, model) == plan


def test_an_adapter_of_a_variant_from_elsewhere_is_refused(tmp_path: Path) -> None:
    """Nobody knows what such a layer computes: run as plain LoRA it would be another model in silence."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({**LORA, **uniform(), "variant": "vera"}))
    with pytest.raises(UserError, match="adapters of the variant 'vera' cannot be used yet"):
        AdapterConfig.read(tmp_path)

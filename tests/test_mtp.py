"""Blocks that predict further tokens: an export holds them and counts them, or says that it has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from mlxtune_convert.hf import mtp
from safetensors.numpy import load_file, save_file
from test_companions import DENSE, adapter_of

from mlxtune.model import convert
from mlxtune.ship import runners
from mlxtune.ship.artefacts import HuggingFace
from mlxtune.ship.export import ship
from mlxtune.ship.request import Request

# (a tensor of such a block as its family names it, which block of them, or -1 where all share it)
NAMES = [
    ("model.layers.2.eh_proj.weight", 2),  # GLM-4.5, DeepSeek-V3: two ordinary blocks come first
    ("model.language_model.layers.3.enorm.weight", 3),
    ("mtp.layers.0.self_attn.q_proj.weight", 0),  # Qwen3-Next, Qwen3.5, Exaone, Nemotron-H
    ("mtp.fc.weight", -1),
    ("model.mtp_layers.1.input_proj.weight", 1),  # MiMo
    ("model.mtp_block.0.mlp.up_proj.weight", 0),  # ERNIE 4.5
    ("model.mtp_linear_proj.0.weight", 0),
    ("model.mtp.layers.0.eh_proj.weight", 0),  # LongCat
    ("mtp.0.attn.wq_a.weight", 0),  # DeepSeek-V4
]
OTHERS = ["model.layers.1.mlp.up_proj.weight", "vision_tower.encoder.layers.26.mlp.fc1.weight", "lm_head.weight"]


def test_the_blocks_are_known_by_the_names_of_every_family() -> None:
    config = {"num_hidden_layers": 2}
    for name, block in NAMES:
        assert mtp.belongs(name, config), name
        assert mtp.count([name], config) == 1
        assert mtp.belongs(name, {"text_config": config})
        assert mtp.count([name, "mtp.layers.7.x.weight"], config) == (2 if block >= 0 else 1)
    assert not any(mtp.belongs(name, config) for name in OTHERS)
    assert mtp.count(OTHERS, config) == 0


def test_every_spelling_of_the_count_is_set_and_none_added() -> None:
    config = {"num_nextn_predict_layers": 1, "use_mtp": True, "text_config": {"mtp_num_hidden_layers": 2, "a": 1}}
    assert mtp.counted(config, 0) == {
        "num_nextn_predict_layers": 0,
        "use_mtp": False,
        "text_config": {"mtp_num_hidden_layers": 0, "a": 1},
    }
    assert mtp.counted({"num_mtp_modules": 3}, 3) == {"num_mtp_modules": 3}
    assert mtp.counted({"hidden_size": 8}, 2) == {"hidden_size": 8}


def with_blocks(folder: Path, kind: str) -> tuple[Path, dict[str, np.ndarray], str]:
    """A tiny model as its maker ships it, one such block among its tensors; they, and the key that counts them."""
    key = "mtp_num_hidden_layers" if kind == "qwen3_5_text" else "num_nextn_predict_layers"
    tiny.make_model(folder, kind)
    own = load_file(folder / "model.safetensors")
    block = {name: array for name, array in own.items() if ".layers.1." in name and "experts" not in name}
    place = ("mtp.layers.0." if kind.startswith("qwen") else "model.layers.2.", "model.layers.1.")
    extra = {name.replace(place[1], place[0]): array + 0.5 for name, array in block.items()}
    extra[f"{'mtp.fc' if kind.startswith('qwen') else 'model.layers.2.eh_proj'}.weight"] = np.ones(
        (64, 128), np.float32
    )
    save_file({**own, **extra}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: 1}))
    return folder, extra, key


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3", "qwen3_next", "qwen3_5_text"])
def test_an_export_has_the_blocks_of_its_base_or_counts_none(kind: str, tmp_path: Path) -> None:
    base, extra, key = with_blocks(tmp_path / "base", kind)
    convert.convert(str(base), tmp_path / "mlx", DENSE)
    adapter = adapter_of(tmp_path / "mlx", tmp_path / "run")
    for name, given, blocks in (("without", None, 0), ("with", base, 1)):
        ship(Request(tmp_path / "mlx", adapter, tmp_path / name, base=given), HuggingFace())
        config: dict[str, Any] = json.loads((tmp_path / name / "config.json").read_text())
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert config[key] == blocks
        assert mtp.count(tensors, config) == blocks
        assert {n for n in tensors if mtp.belongs(n, config)} == (set(extra) if given else set())
    for tensor, array in extra.items():
        np.testing.assert_array_equal(tensors[tensor], array)
    runners.transformers_runner(tmp_path / "with")  # transformers leaves the blocks out, which is no fault

"""config.json and index with absurd values: one line that names the key, the value and what is allowed; soon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mutated_models
import pytest

from mlxtune.errors import UserError
from mlxtune.model.load import open_model

SAMPLE = 150


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], Any]]:
    folder = tmp_path_factory.mktemp("models")
    return folder, mutated_models.make(folder)


def test_every_damaged_model_ends_in_one_line_or_a_model(models: tuple[Path, dict[tuple[str, str], Any]]) -> None:
    """A sample; `python tests/mutated_models.py 5000` runs many."""
    folder, originals = models
    ended = list(mutated_models.run(list(mutated_models.cases(SAMPLE, originals, seed=15)), folder))
    assert len(ended) == SAMPLE
    assert not [one for one in ended if one.fault]
    assert {one.status for one in ended} == {0, 2}


def test_what_is_left_behind_or_said_twice_is_a_fault(tmp_path: Path) -> None:
    """The judge itself."""
    out = tmp_path / "out" / "model"
    assert "exit status 1" in mutated_models._fault(1, "Traceback", out)
    assert "2 error lines" in mutated_models._fault(2, "error: a\nerror: b", out)
    assert mutated_models._fault(2, "note: x\nerror: a\n  hint", out) == ""
    assert "no model" in mutated_models._fault(0, "", out)
    (out.parent / ".model.partial-1").mkdir(parents=True)
    assert "left" in mutated_models._fault(2, "error: a", out)


ABSURD: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"vocab_size": 10**12}, "vocab_size is 1000000000000, allowed is a whole number from 1 to 2,147,483,647"),
    (
        "llama",
        {"num_hidden_layers": 10**8},
        "num_hidden_layers is 100000000, allowed is a whole number from 1 to 10,0",
    ),
    ("llama", {"num_hidden_layers": 3}, "num_hidden_layers is 3, the weight files hold 2 blocks"),
    ("glm4_moe", {"num_hidden_layers": 1}, "num_hidden_layers is 1, the weight files hold 2 blocks"),
    ("llama", {"hidden_size": "64"}, "hidden_size is '64', allowed is a whole number"),
    ("llama", {"hidden_size": 66, "head_dim": None}, "hidden_size is 66, which 4 heads"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads is 3, allowed is what divides num_attention_heads, 4"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, allowed is a finite number"),
    ("llama", {"rms_norm_eps": 5.0}, "rms_norm_eps is 5.0, allowed is a number from 0 to below 1"),
    ("llama", {"rope_theta": -1.0}, "rope_theta is -1.0, allowed is a number above 0"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters is [1], allowed is an object"),
    ("llama", {"quantization": {"bits": 0, "group_size": 64}}, "quantization.bits is 0, allowed is a whole number"),
    ("llama", {"model_type": ["llama"]}, "model_type is ['llama'], allowed is the name of a family"),
    ("llama", {"model_type": "../llama"}, "mlx-lm has no model of type '../llama'"),
    ("llama", {"model_type": "cache"}, "mlx-lm has no model of type 'cache'"),
    ("llama", {"model_file": "own.py"}, "wants the model's own program 'own.py' (model_file)"),
    ("gemma3", {"text_config": 7}, "text_config is 7, allowed is an object"),
    ("qwen3_moe", {"num_experts": 10**7}, "num_experts is 10000000, allowed is a whole number from 0 to 65,536"),
    ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes', allowed is true or false"),
]


@pytest.mark.parametrize(("kind", "changes", "expected"), ABSURD, ids=[f"{k} {c}" for k, c, _ in ABSURD])
def test_an_absurd_value_is_named_with_its_key_and_what_is_allowed(
    kind: str, changes: dict[str, Any], expected: str, models: tuple[Path, dict[tuple[str, str], Any]]
) -> None:
    folder, originals = models
    file = folder / kind / "config.json"
    own = originals[kind, "config.json"]
    try:
        file.write_text(json.dumps({**own, **changes}))
        with pytest.raises(UserError) as refused:
            open_model(folder / kind)
    finally:
        file.write_text(json.dumps(own))
    assert expected in refused.value.message
    assert str(folder / kind) in refused.value.message


def test_a_key_that_a_family_needs_is_named(models: tuple[Path, dict[tuple[str, str], Any]]) -> None:
    folder, originals = models
    file, own = folder / "llama" / "config.json", originals["llama", "config.json"]
    try:  # of a type that transformers has no defaults for
        other = {key: value for key, value in own.items() if key != "rms_norm_eps"} | {"model_type": "internlm2"}
        file.write_text(json.dumps(other))
        with pytest.raises(UserError, match="lacks rms_norm_eps, which mlx-lm needs for models of type internlm2"):
            open_model(folder / "llama")
    finally:
        file.write_text(json.dumps(own))

"""Code that comes with a model is never run, and nobody is asked whether it may."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parent.parent
# Calls that cannot run a stranger's code: a model class of transformers' own with its configuration handed over, and
# PEFT, which knows no such option.
WITHOUT = {"model_class(built).from_pretrained", "PeftModel.from_pretrained"}


def test_every_call_that_could_run_a_strangers_code_forbids_it() -> None:
    found = 0
    for file in sorted((ROOT / "mlxtune").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if not isinstance(node, ast.Call) or not name.endswith((".from_pretrained", ".from_config")):
                continue
            found += 1
            forbidden = {key.arg: ast.unparse(key.value) for key in node.keywords}.get("trust_remote_code") == "False"
            assert forbidden or name in WITHOUT, f"{file.name} line {node.lineno}: {name}"
    assert found >= 4


@pytest.mark.parametrize("command", ["convert", "data", "generate", "train"])
@pytest.mark.parametrize("place", ["folder", "another repository"])
def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(
    command: str, place: str, hf_model: Path, tmp_path: Path
) -> None:
    if place != "folder" and command != "convert":
        pytest.skip("the same reader")
    model = tmp_path / "model"
    model.mkdir()
    for file in hf_model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    marker = tmp_path / "it ran"
    (model / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass X: pass\n")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    code = "own.X" if place == "folder" else "evil/repository--own.X"
    own = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": [code, code]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings | own))
    rows = tiny.write_jsonl(tmp_path / "d.jsonl", [{"text": "a"}] * 4)
    words: dict[str, tuple[str | Path, ...]] = {
        "convert": ("convert", model, tmp_path / "out"),
        "data": ("data", "show", "--model", model, "--data", rows),
        "generate": ("generate", "--model", model, "--prompt", "a"),
        "train": ("train", "--model", model, "--data", rows, "--out", tmp_path / "run"),
    }
    process = tiny.started(*words[command])
    out, err = process.communicate("y\ny\n", timeout=300)
    done = subprocess.CompletedProcess([], process.wait(), out, err)
    tiny.one_clear_line(done, "needs code of its own (auto_map), and code from others is never run")
    assert "[y/N]" not in done.stdout + done.stderr
    assert not marker.exists() and not (tmp_path / "out").exists() and not (tmp_path / "run").exists()

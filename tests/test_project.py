"""mlxtune.yaml: what commands take from it in its folder, what is stronger, and what is wrong with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import pytest
import tiny

from mlxtune.api.exporting import FORMS
from mlxtune.config import resolve
from mlxtune.config.schema import ExportSection
from mlxtune.errors import UserError
from mlxtune.project.file import Project, found

YAML = """
project:
  out: my run
  suite: suite.jsonl
  export:
    - to: peft
      out: exports/peft
    - to: gguf-lora
      out: exports/lora.gguf
model:
  path: {model}
data:
  path: data
train:
  steps: 2
  eval_every: 0
lora:
  rank: 2
"""
FEW = ("--max-tokens", "3")


@pytest.fixture
def project(mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with mlxtune.yaml, its data and its suite; the one where commands run."""
    (tmp_path / "mlxtune.yaml").write_text(YAML.format(model=mlx_model))
    shutil.copytree(data, tmp_path / "data")
    tiny.write_jsonl(tmp_path / "suite.jsonl", [{**row, "checks": ["ended"]} for row in tiny.conversations(3)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def taken(stderr: str) -> list[str]:
    """What commands said that they took from the project's file."""
    lines = [line for line in stderr.splitlines() if line.endswith(", from mlxtune.yaml")]
    return [line.removeprefix("note: ").removesuffix(", from mlxtune.yaml") for line in lines]


def test_each_command_takes_what_it_is_not_told_and_says_so_in_one_line(project: Path) -> None:
    assert taken(tiny.done("train").stderr) == ["the settings, --out my run"]
    assert "rank: 2" in (project / "my run" / "config.yaml").read_text()
    asked = tiny.done("eval", *FEW)
    assert taken(asked.stderr) == ["--adapter my run, --suite suite.jsonl"] and "ended" in asked.stdout
    assert taken(tiny.done("generate", "Hi", *FEW).stderr) == ["--adapter my run"]
    listed = tiny.done("runs")
    assert "my run" in listed.stdout and taken(listed.stderr) == ["FOLDER ."]
    (project / "my run" / "report.html").unlink()
    assert taken(tiny.done("report").stderr) == ["RUN my run"]
    assert (project / "my run" / "report.html").is_file()
    made = "--to peft --out exports/peft, --to gguf-lora --out exports/lora.gguf"
    assert taken(tiny.done("export", "--no-verify").stderr) == ["--adapter my run", made]
    assert (project / "exports" / "peft" / "adapter_config.json").is_file() and Path("exports/lora.gguf").is_file()
    shutil.rmtree("exports/peft")
    refused = tiny.mlxtune("export", "--no-verify")  # before any is made again
    tiny.one_clear_line(refused, "exports/lora.gguf already exists")
    assert not Path("exports/peft").exists()
    assert taken(tiny.done("fuse", "--out", "fused", "--no-verify").stderr) == ["--adapter my run"]
    model = resolve.load("mlxtune.yaml").model.path
    assert taken(tiny.done("data", "check").stderr) == [f"the settings, --model {model}"]
    assert "number 0?" in tiny.done("data", "show", "--limit", "1").stdout


def test_flags_are_stronger_and_c_takes_its_place(project: Path, run: Path, mlx_model: Path) -> None:
    told = tiny.done("train", "--steps", "1", "--set", "lora.rank=3", "--out", "other")
    assert taken(told.stderr) == ["the settings"]
    config = (project / "other" / "config.yaml").read_text()
    assert "rank: 3" in config and "steps: 1\n" in config and not Path("my run").exists()
    tiny.one_clear_line(tiny.mlxtune("train", "-c", "quick"), "no model given")
    assert taken(tiny.done("eval", "--adapter", "other", *FEW).stderr) == ["--suite suite.jsonl"]
    rows = tiny.done("eval", "--adapter", "other", "--split", "valid")
    assert taken(rows.stderr) == [] and "validation" not in rows.stderr and "loss" in rows.stdout
    assert taken(tiny.done("generate", "--model", mlx_model, "Hi", *FEW).stderr) == []
    assert taken(tiny.done("report", "other").stderr) == []
    whole = ("data", "check", "--model", mlx_model, "--data", "data")
    assert taken(tiny.done(*whole).stderr) == []


def test_it_is_looked_for_in_the_folder_of_the_command_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project / "data")
    for words in (("train",), ("eval",), ("chat",), ("data", "check"), ("data", "show")):
        tiny.one_clear_line(tiny.mlxtune(*words), "no model given")
    tiny.one_clear_line(tiny.mlxtune("report"), "Missing argument 'RUN'")
    assert found(project) == Project(
        project / "mlxtune.yaml",
        project / "my run",
        project / "suite.jsonl",
        [
            ExportSection(to="peft", out=str(project / "exports/peft")),
            ExportSection(to="gguf-lora", out=str(project / "exports/lora.gguf")),
        ],
    )
    assert found(project / "data") is None


def test_a_second_run_goes_where_it_is_told_or_replaces_the_first(project: Path) -> None:
    tiny.done("train")
    refused = tiny.mlxtune("train", "--set", "lora.rank=4")
    tiny.one_clear_line(refused, "my run already exists", "Choose another --out", "replace it with --force")
    assert "rank: 2" in (project / "my run" / "config.yaml").read_text()
    planned = tiny.done("train", "--dry-run", "--set", "lora.rank=4")
    assert "my run already exists" in planned.stderr and "optimizer steps: 2" in planned.stdout
    (project / "my run" / "thesis").write_text("theirs")
    stranger = "my run holds thesis, which mlxtune did not write"
    for words in (("--force",), ("--force", "--dry-run")):
        tiny.one_clear_line(tiny.mlxtune("train", *words, "--set", "lora.rank=4"), stranger)
    (project / "my run" / "thesis").unlink()
    start = ("--set", "lora.start_from=my run")
    tiny.one_clear_line(tiny.mlxtune("train", "--force", *start), "my run holds the source")
    tiny.done("train", "--force", "--set", "lora.rank=4")
    assert "rank: 4" in (project / "my run" / "config.yaml").read_text()
    more = tiny.done("train", "--resume-anyway", "--steps", "3")
    assert taken(more.stderr) == ["--out my run"] and "rank: 4" in (project / "my run" / "config.yaml").read_text()
    tiny.one_clear_line(tiny.mlxtune("train", "--resume", "--force"), "--force begins a run anew")


def test_force_needs_a_run_to_replace(mlx_model: Path, data: Path) -> None:
    refused = tiny.mlxtune("train", "--model", mlx_model, "--data", data, "--force")
    tiny.one_clear_line(refused, "--force has no effect without --out")


def test_what_is_missing_and_what_counts_for_nothing_is_said(project: Path, mlx_model: Path) -> None:
    tiny.one_clear_line(tiny.mlxtune("eval"), "no folder my run", "mlxtune train makes one")
    tiny.one_clear_line(tiny.mlxtune("report"), "no folder my run", "mlxtune train makes it")
    file = project / "mlxtune.yaml"
    file.write_text(file.read_text().replace(str(mlx_model), "model"))
    for words in (("train",), ("data", "check"), ("data", "show")):
        refused = tiny.mlxtune(*words)
        tiny.one_clear_line(
            refused, "no folder model, which is the model of mlxtune.yaml", "mlxtune convert MODEL model"
        )
    named = tiny.done("train", "-c", "mlxtune.yaml", "--model", mlx_model, "--dry-run")
    assert "its section `project` is for commands without -c" in named.stderr and taken(named.stderr) == []


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("  ot: run", "mlxtune.yaml line 2: unknown key project.ot"),
        ("  out: ''", "mlxtune.yaml line 2: project.out"),
        ("  export: peft", "mlxtune.yaml line 2: project.export"),
        ("  export: [{to: peft}]", "project.export: export 1 has no out"),
        ("  export: [{to: peft, out: a}, {to: hg, out: b}]", "project.export: should be 'peft', 'hf'"),
        ("  export: [{to: peft, out: a, tpye: f16}]", "unknown key tpye in export 1"),
        ("  export: [{to: hf, out: a, type: f16}]", "type has no effect with to: hf"),
        (
            "  export: [{to: hf, out: a}, {to: peft, out: ./b/../a/}]",
            "line 2: project.export: export 2 has the same out",
        ),
    ],
)
def test_what_is_wrong_with_it_is_told_with_its_line(section: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mlxtune.yaml").write_text(f"project:\n{section}\n")
    with pytest.raises(UserError) as refused:
        found(tmp_path)
    assert said in refused.value.message


def test_without_its_section_the_run_has_its_usual_name(tmp_path: Path) -> None:
    (tmp_path / "mlxtune.yaml").write_text("train:\n  lr: 1e-3\n")
    assert found(tmp_path) == Project(tmp_path / "mlxtune.yaml", tmp_path / "run", None, [])
    assert resolve.load(tmp_path / "mlxtune.yaml").train.lr == 1e-3


def test_the_kinds_of_export_are_those_of_the_command() -> None:
    assert get_args(ExportSection.model_fields["to"].annotation) == FORMS

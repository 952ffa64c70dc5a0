"""What one types every day: fewer flags, what was meant without them, and what comes next."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import terminal
import tiny

from mlxtune.config import resolve
from mlxtune.config.described import all_keys

FLAGS = {
    "--epochs": ("train.epochs", "2"),
    "--lr": ("train.lr", "0.003"),
    "--rank": ("lora.rank", "3"),
    "--batch-rows": ("train.batch_rows", "2"),
    "--max-tokens": ("data.max_tokens", "64"),
}


@pytest.mark.parametrize("recipe", ["", *resolve.recipe_names()])
def test_the_configuration_that_is_printed_is_one_that_says_the_same(recipe: str, tmp_path: Path) -> None:
    given = ("-c", recipe) if recipe else ()
    file = tmp_path / "mine.yaml"
    file.write_text(tiny.done("config", *given).stdout)
    assert resolve.load(file) == resolve.load(recipe or None)
    lines = file.read_text().splitlines()
    for key in all_keys():
        assert sum(line.startswith(f"  {key.name}:") for line in lines) >= 1, key


def test_one_key_or_a_section_is_explained_with_what_it_may_be() -> None:
    said = tiny.done("config", "lr", "--set", "train.lr=1e-4").stdout
    assert said == "train:\n  # peak learning rate [number > 0] (default: 0.0002)\n  lr: 0.0001\n"
    keys = json.loads(tiny.done("config", "lora", "--json").stdout)
    assert [key["key"] for key in keys][:2] == ["lora.rank", "lora.alpha"]
    assert {key["key"].partition(".")[0] for key in keys} == {"lora"}
    tiny.one_clear_line(tiny.mlxtune("config", "rnk"), "no key rnk", "rank")


def test_a_configuration_of_strangers_commands_no_terminal(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text('data:\n  path: "\\e]0;title\\a\\u202eevil"\n')
    assert terminal.obeyed(terminal.shows("config", "-c", tmp_path / "c.yaml")) == []


def test_everyday_flags_set_their_keys(mlx_model: Path, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(12))
    words = ("train", "--model", mlx_model, "--data", data)
    flags = [word for flag, (_, value) in FLAGS.items() for word in (flag, value)]
    sets = [word for key, value in FLAGS.values() for word in ("--set", f"{key}={value}")]
    tiny.done(*words, *flags, "--out", tmp_path / "one")
    tiny.done(*words, *sets, "--out", tmp_path / "other")
    one, other = ((tmp_path / name / "config.yaml").read_text() for name in ("one", "other"))
    assert one == other and "rank: 3" in one
    tiny.done(*words, "--steps", "1", "--out", tmp_path / "third")
    assert "steps: 1\n" in (tmp_path / "third" / "config.yaml").read_text()
    for flag, (key, value) in FLAGS.items():
        refused = tiny.mlxtune(*words, flag, value, "--set", f"{key}={value}", "--out", tmp_path / "never")
        tiny.one_clear_line(refused, f"{flag} and --set {key} set the same key")
    assert not (tmp_path / "never").exists()


def test_a_run_says_which_model_it_belongs_to(mlx_model: Path, run: Path, tmp_path: Path) -> None:
    asked = ("generate", "--adapter", run, "--max-tokens", "4", "Hi")
    got = tiny.done(*asked)
    assert f"--model {mlx_model}, from {run / 'config.yaml'}" in got.stderr
    assert got.stdout == tiny.done(*asked, "--model", mlx_model).stdout
    scored = tiny.done("eval", "--adapter", run, "--json").stdout
    assert json.loads(scored) == json.loads(tiny.done("eval", "--model", mlx_model, "--adapter", run, "--json").stdout)
    for command in ("fuse", "export"):
        to = ("--to", "peft") if command == "export" else ()
        out = tmp_path / command
        tiny.done(command, "--adapter", run, *to, "--out", out, "--no-verify")
        assert out.is_dir()
    tiny.done("verify", tmp_path / "fuse", "--adapter", run)


def test_a_model_that_a_run_cannot_name_must_be_named(run: Path, tmp_path: Path) -> None:
    tiny.one_clear_line(tiny.mlxtune("chat"), "no model given", "--model DIR", "--adapter RUN")
    tiny.one_clear_line(tiny.mlxtune("eval", "--adapter", tmp_path / "none"), f"no folder {tmp_path / 'none'}")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapters.safetensors", "adapter_config.json"):
        shutil.copy(run / name, alone)
    tiny.one_clear_line(tiny.mlxtune("eval", "--adapter", alone), "does not say which model it belongs to")
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    config = (moved / "config.yaml").read_text()
    for gone, why in (("owner/name", "is not in the local cache"), ("/nowhere/model", "is no folder here")):
        lines = [f"  path: {gone}" if line.startswith("  path:") else line for line in config.splitlines()]
        (moved / "config.yaml").write_text("\n".join(lines) + "\n")
        refused = tiny.mlxtune("eval", "--adapter", moved)
        tiny.one_clear_line(refused, gone, why, "--model")


def test_a_prompt_is_a_word_an_option_or_standard_input(mlx_model: Path) -> None:
    asked = ("generate", "--model", mlx_model, "--max-tokens", "4")
    said = tiny.done(*asked, "--prompt", "Hi there").stdout
    assert tiny.done(*asked, "Hi there").stdout == said
    piped = tiny.started(*asked, "-")
    assert piped.communicate("Hi there\n")[0] == said
    tiny.one_clear_line(tiny.mlxtune(*asked, "a", "--prompt", "b"), "two prompts: a and --prompt b")
    tiny.one_clear_line(tiny.mlxtune(*asked), "no prompt given")


@pytest.mark.parametrize("words", [(), ("data",)])
def test_a_command_without_its_verb_shows_its_help(words: tuple[str, ...]) -> None:
    assert tiny.done(*words).stdout == tiny.done(*words, "--help").stdout


def test_the_version_names_what_computes() -> None:
    assert tiny.done("--version").stdout.startswith("mlxtune 0") and "mlx-lm 0." in tiny.done("--version").stdout


def test_a_terminal_is_told_what_comes_next_and_a_pipe_is_not(hf_model: Path, tmp_path: Path) -> None:
    name = "a model"
    assert f"next: mlxtune generate --model '{tmp_path / name}' Hello" in terminal.shows(
        "convert", hf_model, tmp_path / name
    )
    assert "next:" not in tiny.done("convert", hf_model, tmp_path / "other").stderr


def test_what_is_no_model_is_called_what_it_is(run: Path, tmp_path: Path) -> None:
    tiny.one_clear_line(tiny.mlxtune("eval", "--model", run, "--data", "x"), "is an adapter, no model", "--adapter")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "a b.gguf").write_text("")
    for command in (("generate", "Hi", "--model"), ("convert",)):
        refused = tiny.mlxtune(*command, tmp_path / "g", *((tmp_path / "out",) if command == ("convert",) else ()))
        tiny.one_clear_line(refused, "no config.json, but a b.gguf", f"mlxtune convert '{tmp_path}/g/a b.gguf' DST")


def test_rows_to_score_are_named_not_found_by_chance(
    mlx_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_jsonl(tmp_path / "train.jsonl", tiny.conversations(4))
    monkeypatch.chdir(tmp_path)
    tiny.one_clear_line(tiny.mlxtune("eval", "--model", mlx_model), "no rows to score", "--data PATH", "--adapter RUN")


def test_a_typing_error_in_a_source_names_its_nearest_key(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data:\n  sources:\n    - path: a\n    - path: b\n      wieght: 2\n")
    refused = tiny.mlxtune("train", "-c", file, "--model", "x")
    tiny.one_clear_line(refused, "unknown key wieght in source 2", "Did you mean weight?")


def test_data_that_replaces_sources_is_said(mlx_model: Path, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(12))
    (tmp_path / "c.yaml").write_text(f"data:\n  sources:\n    - path: {data}\n")
    words = ("train", "-c", tmp_path / "c.yaml", "--model", mlx_model, "--dry-run")
    said = f"--data {data} takes the place of data.sources in {tmp_path / 'c.yaml'}"
    assert said in tiny.done(*words, "--data", data).stderr and said not in tiny.done(*words).stderr


def test_a_finished_run_that_is_resumed_says_how_it_trains_longer(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a run"
    shutil.copytree(run, copy)
    said = tiny.done("train", "--resume", "--out", copy).stderr
    assert "this run is finished: nothing is left to train" in said
    assert f"mlxtune train --resume-anyway --out '{copy}' with --steps or --epochs" in said


def test_a_gguf_file_is_no_folder_to_verify_and_its_type_is_known_in_any_case(mlx_model: Path, tmp_path: Path) -> None:
    export = ("export", "--model", mlx_model, "--to", "gguf", "--no-verify", "--out")
    tiny.done(*export, tmp_path / "base.gguf", "--type", "F16")
    tiny.one_clear_line(tiny.mlxtune("verify", tmp_path / "base.gguf", "--model", mlx_model), "verify compares folders")
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


@pytest.mark.parametrize("words", [(), ("data",), ("make",)])
def test_no_command_is_listed_with_half_a_sentence(words: tuple[str, ...]) -> None:
    assert [line for line in tiny.done(*words).stdout.splitlines()[1:] if line.endswith("...")] == []


def test_without_colours_what_is_trained_on_stands_between_marks(mlx_model: Path, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(1))
    words = ("data", "show", "--model", mlx_model, "--data", data)
    assert "⟦The answer is 0." in terminal.shows(*words, NO_COLOR="1")
    assert "⟦" not in terminal.shows(*words)


def test_a_rank_without_its_alpha_is_said_to_change_the_scale(mlx_model: Path, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(12))
    (tmp_path / "own.yaml").write_text("lora:\n  rank: 8\n  alpha: 16\n")
    words = ("train", "-c", tmp_path / "own.yaml", "--model", mlx_model, "--data", data, "--dry-run")
    said = "lora.alpha stays 16: updates are scaled by 0.5, not by 2 (--set lora.alpha=64 keeps that)"
    for rank in (("--rank", "32"), ("--set", "lora.rank=32")):
        assert said in tiny.done(*words, *rank).stderr
        assert "stays" not in tiny.done(*words, *rank, "--set", "lora.alpha=64").stderr
    assert "stays" not in tiny.done(*words).stderr + tiny.done(*words, "--rank", "8").stderr

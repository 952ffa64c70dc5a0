"""mlxtune init: a project out of rows in any format, whose commands run as they stand; the whole dialogue; nothing of
anybody's is touched.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, get_args

import hostile
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import terminal
import tiny

from mlxtune.cli.init import GOALS
from mlxtune.config import resolve
from mlxtune.config.schema import SourceSection
from mlxtune.data.rows import formats
from mlxtune.data.rows.formats import Record
from mlxtune.data.rows.sides import Side
from mlxtune.demo.story import data_folder
from mlxtune.errors import UserError
from mlxtune.presets.wanted import Goal
from mlxtune.project import rows, suite
from mlxtune.project.file import found
from mlxtune.project.folder import NAMES
from mlxtune.project.models import local_models

FEW = ("--set", "train.steps=2", "--set", "train.checkpoint_layers=none", "--set", "lora.rank=2")
QUESTIONS = ("shall the model learn", "Where are the rows", "Which model", "Write this to")


def given(folder: Path, kind: str) -> Path:
    """24 conversations in one of the formats that people bring."""
    pairs = [(f"Question number {number}?", f"The answer is {number * 7}.") for number in range(24)]
    if kind == "demo":
        return data_folder()
    if kind == "alpaca":
        (folder / "alpaca.json").write_text(json.dumps([{"instruction": ask, "output": say} for ask, say in pairs]))
        return folder / "alpaca.json"
    if kind == "sharegpt":
        turns = [[{"from": "human", "value": ask}, {"from": "gpt", "value": say}] for ask, say in pairs]
        return tiny.write_jsonl(folder / "chats.jsonl", [{"conversations": one} for one in turns])
    table = pyarrow.table({"prompt": [ask for ask, _ in pairs], "completion": [say for _, say in pairs]})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    return folder / "rows.parquet"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["demo", "alpaca", "sharegpt", "parquet"])
def test_the_commands_of_a_new_project_run_as_they_stand(
    kind: str, mlx_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = given(tmp_path, kind)
    before = file.read_bytes() if file.is_file() else b""
    made = tmp_path / "project"
    said = tiny.done("init", made, "--data", file, "--model", mlx_model, "--goal", "format", "--yes", *FEW)
    assert (file.read_bytes() if file.is_file() else b"") == before
    splits = {split: lines(made / "data" / f"{split}.jsonl") for split in ("train", "valid", "test")}
    counts = {split: len(own) for split, own in splits.items()}
    made_of = {"demo": (174, 24, 24)}.get(kind, (20, 2, 2))
    assert tuple(counts.values()) == made_of
    assert f"{counts['train']} train, {counts['valid']} valid, {counts['test']} test rows" in said.stdout
    assert len(lines(made / "suite.jsonl")) == counts["test"]
    asked = {split: {row["messages"][-2]["content"] for row in own} for split, own in splits.items()}
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["valid"]
    monkeypatch.chdir(made)
    for words in (("train",), ("eval", "--max-tokens", "2", "--out", "evals/first"), ("report",), ("export",)):
        tiny.done(*words)
    assert Path("run/adapters.safetensors").is_file() and Path("exports/peft/adapter_config.json").is_file()
    assert "first" in Path("run/report.html").read_text()
    readme = Path("README.md").read_text()
    for command in ("mlxtune data check", "mlxtune train", "mlxtune eval", "mlxtune report", "mlxtune export"):
        assert command in readme


def dialogue(folder: Path, mlx_model: Path, *until: str) -> terminal.Typed:
    """What a person types who answers all questions; until: the last one answered with Ctrl-C."""
    answers = ("1\n", f"{folder / 'alpaca.json'}\n", f"{mlx_model}\n", "\n")
    typed: terminal.Typed = []
    for question, answer in zip(QUESTIONS, answers, strict=True):
        if question in until:
            return [*typed, (question, "\x03")]
        typed.append((question, answer))
    return typed


@pytest.mark.parametrize("looks", [{}, {"TERM": "dumb", "COLUMNS": "40"}])
def test_a_terminal_is_asked_for_all_that_no_option_says(
    looks: dict[str, str], mlx_model: Path, tmp_path: Path
) -> None:
    given(tmp_path, "alpaca")
    out = tmp_path / "project"
    said = terminal.shows("init", out, *FEW, typed=dialogue(tmp_path, mlx_model), **looks)
    assert terminal.obeyed(said) == []
    places = [said.index(question) for question in QUESTIONS[:3]]
    assert places == sorted(places) and "mlxtune train" in said
    config = resolve.load(out / "mlxtune.yaml")
    assert (config.model.path, config.data.path) == (str(mlx_model), "data")
    assert "for format" in (out / "mlxtune.yaml").read_text()


@pytest.mark.parametrize("question", QUESTIONS)
def test_ctrl_c_at_any_question_leaves_nothing(question: str, mlx_model: Path, tmp_path: Path) -> None:
    given(tmp_path, "alpaca")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "thesis").write_text("theirs")
    said = terminal.shows("init", tmp_path / "here", status=130, typed=dialogue(tmp_path, mlx_model, question))
    assert "stopped" in said and question in said
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["thesis"]


def test_an_answer_that_will_not_do_is_asked_for_again(mlx_model: Path, tmp_path: Path) -> None:
    given(tmp_path, "alpaca")
    goal, data, model, write = dialogue(tmp_path, mlx_model)
    wrong = [(QUESTIONS[0], "poems\n"), ("is none of them", goal[1])]
    wrong += [(data[0], "nowhere.jsonl\n"), ("no data file", data[1])]
    wrong += [(model[0], "nothing\n"), ("no file or folder nothing", model[1])]
    wrong += [(write[0], "perhaps\n"), ("neither yes nor no", "no\n")]
    terminal.shows("init", tmp_path / "out", *FEW, status=130, typed=wrong)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_that_is_said_before_any_question(mlx_model: Path, tmp_path: Path) -> None:
    file = given(tmp_path, "alpaca")
    words = ("init", tmp_path / "out", "--data", file, "--model", mlx_model, "--yes", *FEW)
    tiny.done(*words)
    tiny.one_clear_line(tiny.mlxtune(*words), "mlxtune.yaml is already here", "mlxtune init DIR")
    assert "?" not in terminal.shows("init", tmp_path / "out", status=2)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("theirs")
    refused = tiny.mlxtune("init", tmp_path / "own", "--data", file, "--model", mlx_model, "--yes", *FEW)
    tiny.one_clear_line(refused, "already holds README.md, and nothing is overwritten")
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["README.md"]
    tiny.one_clear_line(tiny.mlxtune("init", file, "--yes"), "alpaca.json is a file")


def test_without_a_terminal_what_is_not_given_is_chosen_and_told(
    mlx_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = tiny.mlxtune("init", "out", "--model", mlx_model)
    tiny.one_clear_line(refused, "no rows given, and no file of rows is here", "mlxtune make instructions")
    given(tmp_path, "alpaca")
    said = tiny.done(
        "init", "--model", mlx_model, "--memory", "16", *FEW
    ).stderr  # into this very folder, beside what is there
    assert {path.name for path in tmp_path.iterdir()} == {"alpaca.json", *NAMES}
    assert (tmp_path / "alpaca.json").is_file() and found() is not None
    assert "--memory 16, in GiB: a Mac: 17.18 GB of memory" in said and said.count("very few") == 1
    assert "fewer than 500" not in said  # the same, said by the survey
    assert "--goal chat: not given, so chosen" in said and "--data alpaca.json: not given, so chosen" in said
    given(tmp_path, "sharegpt")
    tiny.one_clear_line(tiny.mlxtune("init", "other", "--model", mlx_model), "there are several", "alpaca.json")
    tiny.one_clear_line(tiny.mlxtune("init", "--show-presets", "--goal", "chat"), "--goal has no effect")


def test_what_is_set_by_hand_is_stronger_than_what_was_found(mlx_model: Path, tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "qa.jsonl", [{"q": f"Ask {number}", "a": "Yes."} for number in range(9)])
    columns = ("--set", "data.columns={q: prompt, a: completion}")
    words = ("init", tmp_path / "out", "--data", file, "--model", mlx_model, "--yes", "--to", "gguf-lora", "--to", "hf")
    words = (*words, "--to", "gguf-lora")
    tiny.done(*words, *columns, *FEW, "--set", "train.lr=1e-3", "--set", "data.template_kwargs.a=b")
    config = resolve.load(tmp_path / "out" / "mlxtune.yaml")
    assert (config.train.steps, config.train.epochs, config.train.lr, config.lora.rank) == (2, None, 1e-3, 2)
    assert config.data.columns == {} and config.data.template_kwargs == {"a": "b"}
    project = found(tmp_path / "out")
    assert project is not None
    assert [(one.to, Path(one.out).name) for one in project.exports] == [("gguf-lora", "gguf-lora.gguf"), ("hf", "hf")]
    refused = tiny.mlxtune(*words[:1], tmp_path / "never", *words[2:], *columns, "--set", "model.path=x")
    tiny.one_clear_line(refused, "--set names a model or data")
    assert not (tmp_path / "never").exists()


def test_names_of_strangers_are_what_they_were_and_begin_no_line(mlx_model: Path, tmp_path: Path) -> None:
    model = tmp_path / f"model{hostile.name(1)}"
    model.symlink_to(mlx_model)
    file = tiny.write_jsonl(tmp_path / f"`a` {hostile.name(2)}.jsonl", tiny.conversations(9))
    said = tiny.done("init", tmp_path / "out", "--data", file, "--model", model, "--yes", *FEW)
    written = [(tmp_path / "out" / name).read_text() for name in ("README.md", "mlxtune.yaml")]
    for text in (said.stdout, said.stderr, *written):
        assert not [line for line in text.splitlines() if line.startswith(hostile.LINE)]
        assert not any(sign in text for sign in "\x07\x1b\u202e")
    assert resolve.load(tmp_path / "out" / "mlxtune.yaml").model.path == str(model.resolve())
    assert (tmp_path / "out" / "README.md").read_text().count("`") % 2 == 0


def test_rows_that_ask_the_same_are_on_one_side_and_own_splits_are_kept(tmp_path: Path) -> None:
    asked = [f"Question  {'NUMBER' if number % 2 else 'number'} {number // 3}" for number in range(300)]
    made = [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": f"Answer {number}"}]}
        for number, ask in enumerate(asked)
    ]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", made)
    look = rows.look(SourceSection(path=str(file)))
    sides = rows.divided(look, seed=0)
    assert [int((sides == place).sum()) for place in range(3)] == [243, 27, 30]  # 100 prompts: 81, 9 and 10
    by_prompt: dict[str, set[int]] = {}
    for ask, side in zip(asked, sides, strict=True):
        by_prompt.setdefault(" ".join(ask.casefold().split()), set()).add(int(side))
    assert len(by_prompt) == 100 and all(len(found) == 1 for found in by_prompt.values())
    assert (rows.divided(look, seed=1) != sides).any() and (rows.divided(look, seed=0) == sides).all()
    own = tmp_path / "own"
    tiny.write_jsonl(own / "train.jsonl", made[:200])
    tiny.write_jsonl(own / "dev.jsonl", made[100:200])
    tiny.write_jsonl(own / "notes.jsonl", made[:1])
    look = rows.look(SourceSection(path=str(own)))
    told = " ".join(look.notes)
    assert "notes.jsonl" in told and "100 of 100 valid rows ask what train rows ask too" in told
    sides = rows.divided(look, seed=0)
    counts = rows.write(look, sides, tmp_path / "data")
    assert counts["valid"] == 100 and counts["test"] > 0 and counts["train"] + counts["test"] == 200
    assert (tmp_path / "data" / "valid.jsonl").read_text() == (own / "dev.jsonl").read_text()
    shared = np.isin(look.asked["train"][sides == 2], look.asked["valid"])
    assert not shared.any()


def test_too_few_prompts_and_rows_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    two = tiny.write_jsonl(tmp_path / "two.jsonl", [*tiny.conversations(2), *tiny.conversations(2)])
    with pytest.raises(UserError, match="2 different prompts, too few"):
        rows.divided(rows.look(SourceSection(path=str(two))), 0)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(two.read_text() + "{oops\n")
    with pytest.raises(UserError, match="line 5: not valid JSON"):
        rows.look(SourceSection(path=str(bad)))
    pairs = [{"prompt": f"Ask {number}", "chosen": "Yes.", "rejected": "No."} for number in range(9)]
    with pytest.raises(UserError, match="its rows are pairs of answers") as caught:
        rows.look(SourceSection(path=str(tiny.write_jsonl(tmp_path / "pairs.jsonl", pairs))))
    assert f"mlxtune train -c dpo --model MODEL --data {tmp_path / 'pairs.jsonl'}" in caught.value.hint


@pytest.mark.parametrize("setting", ["preference.loss=kto", " preference.loss=dpo"])
def test_a_project_of_preferences_is_refused_with_what_comes_first(setting: str, tmp_path: Path) -> None:
    rated = [{"prompt": f"Ask {n}", "completion": f"Say {n}.", "label": n % 2 == 0} for n in range(10)]
    file = tiny.write_jsonl(tmp_path / "rated.jsonl", rated)
    done = tiny.mlxtune("init", tmp_path / "out", "--data", file, "--set", setting, "--yes")
    tiny.one_clear_line(done, "preference.loss", "supervised tuning", "-c kto", "lora.start_from=RUN")
    assert not (tmp_path / "out").exists()


def test_thumbs_that_a_project_was_given_stay_thumbs(tmp_path: Path) -> None:
    rated = [{"prompt": f"Ask {n}", "completion": f"Say {n}.", "label": n % 2 == 0} for n in range(10)]
    look = rows.look(SourceSection(path=str(tiny.write_jsonl(tmp_path / "rated.jsonl", rated))))
    rows.write(look, np.zeros(10, int), tmp_path / "data")
    sides = [row.side for row in formats.read(tmp_path / "data" / "train.jsonl", {}, True) if isinstance(row, Record)]
    assert sides == [Side.GOOD, Side.BAD] * 5


def test_an_answer_that_was_rated_as_bad_is_no_reference(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rated = [{"prompt": f"Ask {n}", "completion": f"Say {n}.", "label": n % 2 == 0} for n in range(10)]
        file = tiny.write_jsonl(tmp_path / "rated.jsonl", rated)
        look = rows.look(SourceSection(path=str(file)))
        counts = rows.write(look, np.full(10, rows.SPLITS.index(split)), tmp_path / split)
        assert counts[split] == 10
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / split / f"{split}.jsonl").rename(tmp_path / "data" / f"{split}.jsonl")
    prompts, _ = suite.write(tmp_path, 0)
    assert prompts == 5
    assert {row["messages"][-1]["content"] for row in lines(tmp_path / "suite.jsonl")} == {
        f"Say {number}." for number in range(0, 10, 2)
    }


def test_text_makes_a_project_without_a_suite(mlx_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny.write_jsonl(tmp_path / "texts.jsonl", [{"text": f"Text number {number}."} for number in range(12)])
    tiny.done("init", tmp_path / "out", "--data", file, "--model", mlx_model, "--yes", *FEW)
    assert not (tmp_path / "out" / "suite.jsonl").exists()
    monkeypatch.chdir(tmp_path / "out")
    project = found()
    assert project is not None and project.suite is None
    tiny.done("train")
    assert "loss" in tiny.done("eval").stdout


def test_models_of_this_machine_are_found_where_programs_keep_them(
    mlx_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    studio = tmp_path / ".lmstudio" / "models" / "me"
    studio.mkdir(parents=True)
    (studio / "mine").symlink_to(mlx_model)
    (studio / "other").mkdir()
    (studio / "other" / "other.gguf").write_bytes(b"GGUF")
    cached = tmp_path / "hub" / "models--you--yours"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").symlink_to(mlx_model)
    ollama = tmp_path / ".ollama" / "models"
    manifest = ollama / "manifests" / "registry.ollama.ai" / "library" / "small" / "latest"
    manifest.parent.mkdir(parents=True)
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:12"}, {"mediaType": "x"}, 3]
    manifest.write_text(json.dumps({"layers": layers}))
    (ollama / "blobs").mkdir()
    (ollama / "blobs" / "sha256-12").write_bytes(b"GGUF..")
    (manifest.parent / "torn").write_text("{")
    told = {(model.named, model.of, model.kind) for model in local_models()}
    assert told == {
        ("you/yours", "the hub's cache", "MLX, 4 bits"),
        (str(studio / "mine"), "LM Studio", "MLX, 4 bits"),
        (str(studio / "other" / "other.gguf"), "LM Studio", "GGUF"),
        (str(ollama / "blobs" / "sha256-12"), "Ollama", "GGUF"),
    }


def test_a_model_that_does_not_fit_is_refused_with_the_largest_that_does(tmp_path: Path) -> None:
    file = given(tmp_path, "alpaca")
    words = ("init", tmp_path / "out", "--data", file, "--memory", "8", "--yes", "--model")
    refused = tiny.mlxtune(*words, "mlx-community/Llama-3.3-70B-Instruct-4bit")
    tiny.one_clear_line(refused, "does not fit", "the largest that does")
    assert not (tmp_path / "out").exists()


def test_a_person_is_asked_for_another_model_where_one_does_not_fit(mlx_model: Path, tmp_path: Path) -> None:
    words = ("init", tmp_path / "out", "--goal", "chat", "--data", given(tmp_path, "alpaca"), "--memory", "8", *FEW)
    large = "mlx-community/Llama-3.3-70B-Instruct-4bit\n"
    typed = [(QUESTIONS[2], large), ("Another model", f"{mlx_model}\n"), (QUESTIONS[3], "yes\n")]
    assert "does not fit" in terminal.shows(*words, typed=typed)
    assert resolve.load(tmp_path / "out" / "mlxtune.yaml").model.path == str(mlx_model)


def test_a_model_that_is_to_be_converted_comes_first_among_the_commands(
    hf_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = given(tmp_path, "alpaca")
    tiny.done("init", tmp_path / "out", "--data", file, "--model", hf_model, "--yes", *FEW)
    monkeypatch.chdir(tmp_path / "out")
    tiny.one_clear_line(tiny.mlxtune("train"), "no folder model, which is the model of mlxtune.yaml")
    (command,) = [line for line in Path("README.md").read_text().splitlines() if "mlxtune convert" in line]
    assert f"# Made by: {command}"[:60] in Path("mlxtune.yaml").read_text()
    assert shlex.split(command)[1:4] == ["convert", str(hf_model), "model"] and "--bits" in command
    tiny.done(*shlex.split(command)[1:])
    assert "optimizer steps: 2" in tiny.done("train", "--dry-run").stdout


def test_the_goals_are_those_that_presets_know() -> None:
    assert get_args(Goal) == GOALS

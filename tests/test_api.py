"""The Python API: the functions do what the commands do, their examples run, and importing the package is light."""

from __future__ import annotations

import doctest
import inspect
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import client
import pytest
import tiny

import mlxtune
from mlxtune.api import arguments, evaluating, exporting, rendering, tuning
from mlxtune.cli import cli

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "tune": tuning.tune,
    "evaluate": evaluating.evaluate,
    "export": exporting.export,
    "render": rendering.render,
}


@pytest.fixture(scope="module")
def place(mlx_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples name: a model, and data."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "model").symlink_to(mlx_model)
    (folder / "data").mkdir()
    tiny.write_jsonl(folder / "data" / "train.jsonl", tiny.conversations(12))
    return folder


def test_the_example_of_every_function_runs_as_it_stands(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader types them: the run of the first is there for the others."""
    monkeypatch.chdir(place)
    names: dict[str, Any] = {"mlxtune": mlxtune}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for name, function in FUNCTIONS.items():
        (example,) = doctest.DocTestFinder(recurse=False).find(function, name)
        assert example.examples, name
        example.globs = names
        runner.run(example, clear_globs=False)
    assert runner.summarize(verbose=False).failed == 0
    run = mlxtune.Run.open("run")
    assert (run.step, run.model, run.best_loss) == (2, str((place / "model").resolve()), names["run"].best_loss)
    assert (place / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_from_python_is_the_commands_to_the_bit_and_so_are_its_scores(place: Path, tmp_path: Path) -> None:
    words = ("--model", place / "model", "--data", place / "data")
    tiny.done("train", "-c", "quick", *words, "--steps", "1", "--out", tmp_path / "command")
    run = client.tuned(place / "model", place / "data", tmp_path / "python")
    one, other = ((tmp_path / name / "adapters.safetensors").read_bytes() for name in ("command", "python"))
    assert one == other
    told = json.loads(tiny.done("eval", "--adapter", run.folder, "--json").stdout)
    assert told["tuned"]["loss"] == pytest.approx(client.loss_of(run), rel=1e-6)
    assert client.exported(run, tmp_path / "peft") == "peft"
    shown = tiny.done("data", "show", *words, "--json").stdout.splitlines()
    assert client.learned(place / "model", place / "data") == [sum(json.loads(line)["mask"]) for line in shown]
    for named in (str(run.folder), run.folder, run):
        assert evaluating.model_and_adapter(named, None) == (run.model, run.folder)
        rendered = list(mlxtune.render(named, place / "data"))
        assert [sum(row.mask) for row in rendered] == client.learned(place / "model", place / "data")
    assert all(row.dropped for row in mlxtune.render(run, place / "data", settings={"data.max_tokens": 8}))
    with pytest.raises(mlxtune.UserError, match="In Python: out= for --out; force=True for --force"):
        client.tuned(place / "model", place / "data", run.folder)
    again = {"model.path": place / "model", "data.path": place / "data", "train.steps": 2}
    assert mlxtune.tune("quick", again, out=run.folder, force=True).step == 2


def test_a_configuration_may_be_a_mapping_a_file_or_a_config_and_settings_beat_it(tmp_path: Path) -> None:
    from mlxtune.config import resolve

    file = tmp_path / "c.yaml"
    file.write_text("train: {lr: 0.5}\nmodel: {path: m}\n")
    as_mapping = {"train": {"lr": 0.5}, "model": {"path": "m"}}
    for given in (file, str(file), as_mapping, resolve.load(file)):
        found = tuning._resolved(given, {"train.steps": 3, "model.path": "n"})
        assert (found.train.lr, found.train.steps, found.model.path) == (0.5, 3, "n")


def test_sides_are_told_apart_and_settings_say_how_rows_are_read(place: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"Ask {n}", "chosen": "Yes.", "rejected": "No."} for n in range(2)]
    thumbs = [
        {"prompt": f"Ask {n}", "completion": "Yes.", "label": label} for n, label in enumerate((True, False, None))
    ]
    paired = tiny.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    rated = tiny.write_jsonl(tmp_path / "rated.jsonl", thumbs)
    model = place / "model"
    assert [row.side for row in mlxtune.render(model, paired)] == ["chosen", "rejected"] * 2
    assert client.sides_of(model, rated) == ["good", "bad", ""]
    learned = list(mlxtune.render(model, rated))
    assert [(row.side, bool(row.dropped)) for row in learned] == [("", False), ("", True), ("", True)]
    told = mlxtune.evaluate_preferences(model, data=rated, settings={"preference.loss": "kto"})
    assert (told["kind"], told["rows"]) == ("rated", 2)
    with pytest.raises(mlxtune.UserError, match="none is preferred") as caught:
        mlxtune.evaluate_preferences(model, data=rated)
    assert 'settings={"preference.loss": "kto"}' in caught.value.hint
    whole = mlxtune.evaluate(model, data=rated).base.tokens
    assert 0 < client.scored(model, rated) <= whole
    with pytest.raises(mlxtune.UserError, match="unknown key"):
        mlxtune.evaluate(model, data=rated, settings={"data.max_tokenz": 3})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mlxtune.tune({}), "no model given"),
        (lambda: mlxtune.tune({"model": {"path": "m"}}, resume=True), "resume needs the run"),
        (lambda: mlxtune.tune({"train": 3}), "expected a section"),  # type: ignore[dict-item]
        (lambda: mlxtune.tune({"train": {"stepz": 3}}), "unknown key train.stepz"),
        (lambda: mlxtune.evaluate("nowhere"), "no rows to score"),
        (lambda: mlxtune.export("m", to="onnx", out="x"), "no form of export"),  # type: ignore[arg-type]
        (lambda: mlxtune.export("m", to="peft", out="x", ollama=True), "ollama has no effect"),
        (lambda: mlxtune.export("m", to="hf", out="x", dtype="float99"), "dtype='float99' is not known"),
        (lambda: mlxtune.export(None, to="hf", out="x"), "model: expected a run"),  # type: ignore[arg-type]
        (lambda: mlxtune.tune(None), "config: expected a file"),  # type: ignore[arg-type]
        (lambda: mlxtune.tune({}, [1]), "settings: expected dotted keys"),  # type: ignore[arg-type]
        (lambda: mlxtune.tune({"model": {"path": "m"}}, force=True), "force has no effect without out"),
        (lambda: mlxtune.tune({"model": {"path": "m"}}, out="r", force=True, resume=True), "Leave out one"),
        (lambda: mlxtune.evaluate(3), "model: expected a run"),  # type: ignore[arg-type]
        (lambda: mlxtune.evaluate("nowhere"), "In Python: data= for --data; adapter= for --adapter"),
        (lambda: list(mlxtune.render(None, "rows.jsonl")), "model: expected a run"),  # type: ignore[arg-type]
        (lambda: mlxtune.Run.open("nowhere"), "is no run"),
        (lambda: list(mlxtune.render("m", "nowhere.jsonl")), "nowhere.jsonl"),
    ],
)
def test_what_a_command_refuses_the_function_refuses(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(mlxtune.UserError, match=words):
        call()


@pytest.mark.parametrize("split", ["tst", "", "training"])
def test_a_split_that_is_none_is_refused_and_those_there_are_are_named(place: Path, split: str) -> None:
    with pytest.raises(mlxtune.UserError, match=f"no split '{split}'") as refused:
        next(mlxtune.render(place / "model", place / "data", split=split))
    assert "train, valid" in refused.value.hint


def test_every_option_that_has_a_name_in_python_is_one_of_a_command_and_of_the_function() -> None:
    """A name like "out=" is an argument of the function, its option one of the command that does the same."""
    tables = {
        ("train", tuning.tune): arguments.TUNING,
        ("eval", evaluating.evaluate): arguments.SCORING,
        ("export", exporting.export): arguments.EXPORTING,
    }
    for (command, function), table in tables.items():
        options = {word for param in cli.commands[command].params for word in param.opts}
        assert table.keys() <= options, command
        for here in table.values():
            name, equals, _ = here.partition("=")
            assert name in inspect.signature(function).parameters or not equals, here


def test_paths_are_taken_wherever_a_setting_is_a_text() -> None:
    tree = {"data": {"sources": [{"path": Path("a")}, {"path": "b"}]}, "model": {"path": Path("m")}}
    found = tuning._resolved(tree, {"lora.start_from": Path("adapter")})
    assert [source.path for source in found.data.sources or ()] == ["a", "b"]
    assert (found.model.path, found.lora.start_from) == ("m", "adapter")


def test_importing_the_package_loads_nothing_and_every_name_is_found_once_it_is_asked_for() -> None:
    script = (
        "import sys, mlxtune\n"
        "heavy = {'mlx', 'transformers', 'numpy', 'pydantic', 'rich', 'click', 'mlx_lm', 'datasets'}\n"
        "assert not heavy & {name.partition('.')[0] for name in sys.modules}, heavy & set(sys.modules)\n"
        "assert callable(mlxtune.evaluate) and not hasattr(mlxtune, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert all(getattr(mlxtune, name) is not None for name in mlxtune.__all__)
    assert set(mlxtune.PLACES) | {"__version__", "evaluate"} == set(mlxtune.__all__)


def test_the_types_are_in_the_package_and_a_users_script_is_checked_strictly() -> None:
    assert (ROOT / "mlxtune" / "py.typed").is_file()
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert "tests/client.py" in options["files"] and options["warn_unused_ignores"]
    (strict,) = (one for one in options["overrides"] if "tests.client" in one["module"])
    assert strict["disallow_any_expr"] and strict["warn_return_any"]
    lines = [line for line in inspect.getsource(client).splitlines() if "# type: ignore[" in line]
    assert len(lines) == 6


def test_the_page_on_python_names_every_function_and_field() -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    for name in mlxtune.__all__:
        assert name in text or name == "__version__", name
    for kind in (mlxtune.Run, mlxtune.Evaluation, mlxtune.Rendered):
        for field in kind.__dataclass_fields__:
            assert f"`{field}`" in text or f".{field}" in text, (kind, field)

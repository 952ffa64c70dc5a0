"""What all commands have in common: narrow and dumb terminals, no colour, --quiet, --json, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import terminal
import tiny
from test_layers import COMMANDS, HELP

from mlxtune.cli import TELLING

LEAVES = {path: command for path, command in COMMANDS.items() if not isinstance(command, click.Group)}
# Commands without --json, with the reason.
NO_JSON = {
    "demo": "a story for people",
    "generate": "standard output is the answer",
    "chat": "a conversation",
    "completion": "a script for a shell",
}
# Commands that say nothing beside their result, or are nothing but what they say.
NOT_TELLING = {
    "demo": "its story is what it is for",
    "init": "a dialogue",
    "chat": "a conversation",
    "rate": "a conversation",
    "compare": "prints its result alone",
    "config": "prints its result alone",
    "runs": "prints its result alone",
    "report": "prints the page's place alone; a warning is about the page",
    "completion": "prints its result alone",
}
# Where each command is stopped by Ctrl-C in a test, but for those of STOPPED below.
CTRL_C = {
    "demo": "test_survive (its training)",
    "doctor": "test_selftest",
    "bench": "test_survive (children)",
    "train": "test_signals, test_survive, test_broken_input, test_use",
    "eval": "test_eval_suite, test_journal",
    "report": "test_live (--live), and below",
    "make": "test_make_command, test_make_folder, test_make_answers",
    "chat": "test_talk",
    "generate": "test_talk",
    "init": "test_init",
}
STOP = """
import os, signal
from mlxtune_convert import files
def stopped(*given):
    os.kill(os.getpid(), signal.SIGINT)
files.flush = stopped
from mlxtune.model import arrays
arrays.flush = stopped
"""


@pytest.fixture(scope="module")
def narrow_help() -> dict[tuple[str, ...], str]:
    """What every command answers to --help on a dumb terminal of 40 columns."""
    environment = {**os.environ, "COLUMNS": "40", "TERM": "dumb", "NO_COLOR": "1", "FORCE_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HELP, json.dumps(list(COMMANDS))],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return {path: answer["text"] for path, answer in zip(COMMANDS, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "mlxtune")
def test_help_on_40_columns_of_a_dumb_terminal_is_whole(
    path: tuple[str, ...], narrow_help: dict[tuple[str, ...], str]
) -> None:
    text = narrow_help[path]
    assert "\x1b" not in text
    said = "".join(text.split())
    for option in COMMANDS[path].params:
        if isinstance(option, click.Option):
            assert all(name in text for name in option.opts), option.opts
            assert "".join((option.help or "").split()) in said, option.help
    # What stands as it is (examples) may be longer, and so may a word; the rest is wrapped.
    examples = {line.strip() for line in (COMMANDS[path].help or "").splitlines()}
    too_long = [line for line in text.splitlines() if len(line) > 40 and line.strip() not in examples]
    # The names of an option and of its choices are one line, however long.
    assert [line for line in too_long if " " in line.strip() and not line.startswith("  -")] == []


def test_every_text_of_help_says_something() -> None:
    """No option is without words, and none begins as if its name were the first of them ("--temperature: Of ...")."""
    terse = []
    for path, command in LEAVES.items():
        for option in command.params:
            if isinstance(option, click.Option):
                words = re.sub(r"\[.*?\]", "", option.help or "").split()
                if len(words) < 3 or words[0] in ("Of", "That", "With", "In", "By"):
                    terse.append(f"{' '.join(path)} {option.opts[0]}: {option.help}")
    assert terse == []


def test_every_command_has_json_and_quiet_or_a_reason_why_not() -> None:
    telling = {id(command) for command in TELLING}
    for path, command in LEAVES.items():
        name = " ".join(path)
        has = {opt for option in command.params for opt in option.opts}
        assert ("--json" in has) != (name in NO_JSON), name
        assert ("--quiet" in has) != (name in NOT_TELLING), name
        assert ("--quiet" in has) == (id(command) in telling), name


@pytest.fixture(scope="module")
def lines(
    mlx_model: Path, hf_model: Path, data: Path, run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, list[str | Path]]]:
    """A command line of each kind; OUT stands for a new place."""
    folder = tmp_path_factory.mktemp("sources")
    theirs = folder / "theirs.yaml"
    theirs.write_text("model: m\niters: 10\n")
    on = ["--model", mlx_model, "--adapter", run]
    yield {
        "convert": ["convert", hf_model, "OUT", "--group-size", "32"],
        "data convert": ["data", "convert", data / "train.jsonl", "OUT.jsonl", "--to", "sharegpt"],
        "data curate": [
            "data",
            "curate",
            data / "train.jsonl",
            "--keep",
            "5",
            "--model",
            mlx_model,
            "--out",
            "OUT.jsonl",
        ],
        "data check": ["data", "check", "--model", mlx_model, "--data", data, "--html", "OUT.html"],
        "import-config": ["import-config", theirs, "--out", "OUT.yaml"],
        "report": ["report", run, "--out", "OUT.html"],
        "fuse": ["fuse", *on, "--out", "OUT", "--no-verify"],
        "export": ["export", *on, "--to", "gguf-lora", "--out", "OUT.gguf", "--no-verify"],
        "train": ["train", "--model", mlx_model, "--data", data, "--out", "OUT", "--steps", "1"],
    }


def placed(words: list[str | Path], folder: Path) -> tuple[list[str | Path], Path]:
    """(The words with a place in a folder for OUT, that place)."""
    (out,) = (folder / str(word) for word in words if str(word).startswith("OUT"))
    return [out if str(word).startswith("OUT") else word for word in words], out


STOPPED = ("convert", "data convert", "data curate", "data check", "import-config", "report", "fuse", "export")


@pytest.mark.parametrize("name", STOPPED)
def test_ctrl_c_when_the_output_is_about_to_get_its_name_leaves_nothing(
    name: str, lines: dict[str, list[str | Path]], tmp_path: Path
) -> None:
    words, out = placed(lines[name], tmp_path)
    process = tiny.started(*words, code=STOP)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and said.strip().splitlines()[-1] == "stopped" and "Traceback" not in said, said
    assert not out.exists() and not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_every_command_that_takes_a_while_is_stopped_in_some_test() -> None:
    instant = {"config", "completion", "runs", "compare", "rate", "verify", "data show"}
    for path in LEAVES:
        name = " ".join(path)
        assert name in STOPPED or name in CTRL_C or path[0] in CTRL_C or name in instant, name
    here = Path(__file__).parent
    for places in CTRL_C.values():
        for name in re.findall(r"test_\w+", places):
            assert re.search(r"SIGINT|KeyboardInterrupt|\\x03", (here / f"{name}.py").read_text()), name


@pytest.mark.parametrize("name", ["convert", "data convert", "train", "fuse"])
def test_json_is_one_document_and_quiet_leaves_nothing_beside_it(
    name: str, lines: dict[str, list[str | Path]], tmp_path: Path
) -> None:
    words, out = placed(lines[name], tmp_path)
    done = tiny.done(*words, "--json", "--quiet")
    told = json.loads(done.stdout)
    assert done.stderr == "" and str(out) in told.values()


def test_quiet_leaves_the_result_alone(lines: dict[str, list[str | Path]], tmp_path: Path) -> None:
    words, out = placed(lines["import-config"], tmp_path)
    quiet = tiny.done(*words, "--quiet")
    assert quiet.stderr == "" and str(out) in quiet.stdout
    words[-1] = out.with_name("OUT2.yaml")
    assert "note: " in tiny.done(*words).stderr


@pytest.mark.parametrize("name", ["data check", "runs", "doctor", "config"])
def test_what_is_said_on_40_columns_without_colour_has_no_colour_and_no_line_too_long(
    name: str, mlx_model: Path, data: Path, run: Path
) -> None:
    words: dict[str, list[str | Path]] = {
        "data check": ["data", "check", "--model", mlx_model, "--data", data],
        "runs": ["runs", run.parent],
        "doctor": ["doctor"],
        "config": ["config", "train"],
    }
    said = terminal.shows(*words[name], COLUMNS="40", TERM="dumb")
    assert not re.search(r"\x1b\[[0-9;]*m", said)
    assert terminal.obeyed(said) == []
    if name != "config":  # which is a file: its lines are whole
        too_long = [line for line in terminal.lines(said) if len(line) > 40]
        assert [line for line in too_long if len(max(line.split(), key=len)) < 25] == []  # a path has no place to break
        assert "\u2026" not in said  # nothing is cut

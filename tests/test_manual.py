"""What the pages of docs/ say of commands, keys and messages is so."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import commands
import pytest
from commands import BLOCK, DOCS, NEEDS, ROOT, Line
from mlxtune_convert.cli import cli as converting

from mlxtune.cli import cli
from mlxtune.config.resolve import KEYS

PAGES = sorted(DOCS.glob("*.md"))
MANUAL = [DOCS / f"{name}.md" for name in commands.MANUAL]


def named(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=path.stem) for path in paths]


def refusal(words: list[str], command: click.Command = cli) -> str:
    """What the real command line has against the words behind `mlxtune`; "" for none. Files need not be there."""
    if isinstance(command, click.Group) and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return f"no command {words[0]}"
        return refusal(words[1:], command.commands[words[0]])
    has_model = any("--model" in parameter.opts for parameter in command.params)
    if has_model and "--model" not in words:
        words = ["--model", "model", *words]  # else the run, or the project, is asked for its own, and is not there
    try:
        command.make_context(str(command.name), list(words))
    except click.exceptions.Exit:  # --help, --version
        return ""
    except click.UsageError as error:
        said = error.format_message()
        return "" if "does not exist" in said else said
    return ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train -c qlora --model m --data d", ""),
        ("--version", ""),
        ("trian", "no command trian"),
        ("data shew", "no command shew"),
        ("train --modle m", "No such option"),
        ("train --steps many", "is not a valid integer"),
        ("export --to onnx --out o", "is not one of"),
        ("convert m", "Missing argument"),
        ("report a b", "Got unexpected extra argument"),
    ],
)
def test_the_command_line_itself_says_what_is_wrong_with_a_line(words: str, said: str) -> None:
    found = refusal(words.split())
    assert found.startswith(said) or said in found if said else not found, found


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("mlxtune runs --json | head", ["runs --json"]),
        ("mlxtune config > mine.yaml", ["config"]),
        ("mlx.launch --hostfile m.json -- $(which mlxtune) train -c quick", ["train -c quick"]),
        ("echo hello | mlxtune generate --adapter run -", ["generate --adapter run -"]),
        ("cat data/train.jsonl", []),
    ],
)
def test_a_pipeline_is_taken_apart(line: str, words: list[str]) -> None:
    assert [" ".join(call) for call in commands.of_mlxtune(line)] == words


def calls(page: Path) -> Iterator[str]:
    """Every line of a page's blocks, whatever their language, that calls mlxtune."""
    for _, _, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in commands.lines_of(block.replace("\\\n", " ")):
            if re.search(r"(?:^|\| |-- |&& )mlxtune |\$\(which mlxtune\) ", line.command):
                yield line.command


@pytest.mark.parametrize("page", named([commands.README, *PAGES]))
def test_every_command_on_a_page_is_one_that_the_command_line_takes(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in calls(page):
        if line.startswith("mlxtune init "):  # what follows is typed in a project's folder
            (tmp_path / "mlxtune.yaml").write_text("project:\n  out: run\n  suite: suite.jsonl\n", encoding="utf-8")
        found = commands.of_mlxtune(line)
        assert found, line
        for words in found:
            assert not refusal(words), (line, refusal(words))


@pytest.mark.parametrize("page", named(MANUAL))
def test_what_a_page_says_of_commands_inside_its_sentences_has_their_names_and_options(page: Path) -> None:
    for span in commands.spans(page):
        words = span.split()[1:]
        command: click.Command = cli
        while isinstance(command, click.Group) and words and words[0] in command.commands:
            command, words = command.commands[words[0]], words[1:]
        assert command is not cli or words[0].startswith("-") or words[0].isupper(), span
        known = {name for parameter in command.params for name in parameter.opts} | {"--help", "-h"}
        assert {word for word in words if word.startswith("-") and word != "-"} <= known, span


@pytest.mark.parametrize("page", named(MANUAL))
def test_lines_of_the_other_program_of_the_house_are_taken_too(page: Path) -> None:
    for step in commands.steps(page):
        if isinstance(step, Line) and step.command.startswith("mlxtune-convert "):
            assert not refusal(step.command.split()[1:], converting), step


@pytest.mark.parametrize("page", named(MANUAL))
def test_a_line_for_a_terminal_is_one_of_ours_or_says_what_it_needs(page: Path) -> None:
    for step in commands.steps(page):
        if isinstance(step, Line):
            assert step.needs in ("", *NEEDS), step
            assert step.needs or step.command.startswith(("mlxtune ", "mlxtune-convert ", "cd ")), step


@pytest.mark.parametrize("page", named([commands.README, *MANUAL]))
def test_the_keys_that_a_page_names_are_keys_of_the_configuration(page: Path) -> None:
    sections = "|".join(sorted({key.partition(".")[0] for key in KEYS}))
    text = page.read_text(encoding="utf-8")
    for key in re.findall(rf"[`\s\"']((?:{sections})\.[a-z]\w+)(?=[`=:\s])", text):
        is_file = key in ("train.jsonl", "data.jsonl", "model.gguf") or key.endswith((".jsonl", ".gguf", ".yaml"))
        assert key in KEYS or is_file, key


@pytest.mark.parametrize("page", named([page for page in MANUAL if page.stem not in ("index", "troubles")]))
def test_a_page_begins_with_what_its_reader_can_do_afterwards(page: Path) -> None:
    heading, first = page.read_text(encoding="utf-8").split("\n\n")[:2]
    assert heading.startswith("# ") and first.startswith("After this page "), page.name


@cache
def texts() -> list[str]:
    """Every text in the code of the product, with … for what is put into it."""
    found = []
    for folder in (ROOT / "mlxtune", ROOT / "convert" / "mlxtune_convert"):
        for file in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def messages() -> list[str]:
    return re.findall(r"^### `(.*)`$", (DOCS / "troubles.md").read_text(encoding="utf-8"), re.MULTILINE)


def is_said(message: str) -> bool:
    """Whether some text of the code is, or holds, this message."""
    return any(message in text for text in texts())


@pytest.mark.parametrize("message", messages())
def test_a_message_that_the_page_of_troubles_explains_is_one_of_the_program(message: str) -> None:
    assert is_said(message)


def test_a_message_that_the_program_does_not_have_would_be_noticed() -> None:
    assert len(messages()) > 30 and len(set(messages())) == len(messages())
    assert is_said("… is gated") and not is_said("… is locked")


def test_the_keys_that_mlx_lm_is_said_to_have_are_its_own() -> None:
    from mlx_lm.lora import CONFIG_DEFAULTS

    text = (DOCS / "coming-from.md").read_text(encoding="utf-8")
    part = text.partition("## mlx-lm\n")[2].partition("\n## ")[0]
    named_keys = re.findall(r"^\| `([^`]+)`", part, re.MULTILINE)
    assert len(named_keys) > 20
    for key in named_keys:
        name, _, inside = key.partition(":")[0].partition(".")
        assert name in CONFIG_DEFAULTS or name in ("mlx_lm",), key
        assert not inside or name == "mlx_lm" or inside in CONFIG_DEFAULTS[name], key
    assert CONFIG_DEFAULTS["lora_parameters"] == {"rank": 8, "dropout": 0.0, "scale": 20.0}  # as the page says
    assert (CONFIG_DEFAULTS["num_layers"], CONFIG_DEFAULTS["learning_rate"]) == (16, 1e-5)


@pytest.mark.parametrize(("heading", "modules"), [("mlx-lm", "mlx_lm*.py"), ("Axolotl", "axolotl*.py")])
def test_what_the_tables_say_of_others_keys_import_config_does(heading: str, modules: str) -> None:
    """Each key of theirs with a counterpart, and the counterpart, are in what `mlxtune import-config` reads with."""
    text = (DOCS / "coming-from.md").read_text(encoding="utf-8")
    part = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    code = "".join(file.read_text("utf-8") for file in (ROOT / "mlxtune" / "config" / "imported").glob(modules))
    rows = [re.split(r"\s*\|\s*", row) for row in re.findall(r"^\| (`.*)$", part, re.MULTILINE)]
    counted = 0
    for theirs, ours, *_ in rows:
        keys = [key for key in re.findall(r"`([a-z]+\.\w+)", ours) if key in KEYS]
        for key in keys:
            assert f'"{key}"' in code, key
            counted += 1
        if keys:
            for name in re.findall(r"`(\w+)[`:.]", theirs):
                assert name in code or re.sub("^(eval|save)_", "{verb}_", name) in code, name
    assert counted > 20

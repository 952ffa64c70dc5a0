"""Write the pages of docs/ that say what the code says: of its configuration, its commands and its modules.

`make docs` runs it. A test writes both again and fails when they differ from the files, so that neither goes stale.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from pydantic.fields import FieldInfo

from mlxtune.cli import SECTIONS, cli
from mlxtune.config.described import allowed_in_words
from mlxtune.config.resolve import Config, recipe_names
from mlxtune.config.schema import ExportSection, ProjectSection, Section, SourceSection
from mlxtune.evaluate.checks.kinds import KINDS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WIDTH = 100  # columns of a help text
INTRODUCTION = """# Configuration

<!-- Written by docs/generate.py out of mlxtune/config/schema.py: change that, then run `make docs`. -->

Every key of a run. A YAML file (`train -c FILE`) holds sections with keys below them; `--set section.key=value` sets
one key; flags such as `--model` are stronger than both. A key that is not listed is an error that names the nearest
one. The resolved configuration, with every key written out, is kept as `config.yaml` in the run folder.

YAML is read as version 1.2: `on`, `off`, `yes` and `no` are words; true and false are written `true` and `false`."""
OF_PROJECTS = """A section of `mlxtune.yaml` alone, which `mlxtune init` writes: what commands do in its folder. Where
they run in that very folder they take from the file what they are not told, and say so in one line: `train` all of it,
`eval` the run and the suite, `report`, `export`, `fuse`, `verify`, `chat` and `generate` the run, `data check` and
`data show` the model and the data, `runs` the folder. Flags and `--set` are stronger; `-c FILE` takes the file's place;
paths are relative to it. No run has this section, and with `-c` it counts for nothing."""
EXIT_STATUS = """# Commands

<!-- Written by docs/generate.py out of the commands' own help: change that, then run `make docs`. -->

What `mlxtune COMMAND --help` prints. Exit status: 0 done; 2 something that you can mend, told in one line; 1 a fault of
mlxtune; 129, 130 and 143: stopped by a signal, after saving."""


def default_in_words(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or value == "" or value == {} or value == []:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def rows_of(prefix: str, section: type[Section]) -> Iterator[str]:
    """One line of a Markdown table for each key of a section."""
    for name, field in section.model_fields.items():
        kind = allowed_in_words(field)
        default = "" if field.is_required() else default_in_words(field)
        cells = [f"`{prefix}{name}`", kind, default, field.description or ""]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def configuration() -> str:
    """docs/configuration.md: every key with its type, limits, default and meaning."""
    recipes = ", ".join(f"`{name}`" for name in recipe_names())
    lines = [INTRODUCTION, "", f"Shipped recipes, to be named instead of a file: {recipes}."]
    table = ["", "| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in Config.model_fields.items():
        section = type(field.default)
        lines += ["", f"## {name}", *table, *rows_of(f"{name}.", section)]
        if name == "data":
            lines += ["", "A source, in the list `data.sources`:", *table, *rows_of("", SourceSection)]
    lines += ["", "## project", "", OF_PROJECTS, *table, *rows_of("project.", ProjectSection)]
    lines += ["", "An export, in the list `project.export`:", *table, *rows_of("", ExportSection)]
    return "\n".join(lines) + "\n"


def help_of(path: tuple[str, ...]) -> str:
    """The help text of a command, as a terminal of WIDTH columns prints it."""
    command: click.Command = cli
    context = click.Context(cli, info_name="mlxtune", max_content_width=WIDTH, terminal_width=WIDTH)
    context.help_option_names = cli.context_settings["help_option_names"]
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
        context = click.Context(command, info_name=name, parent=context)
    return command.get_help(context).rstrip()


def paths_below(path: tuple[str, ...], command: click.Command) -> Iterator[tuple[str, ...]]:
    """A command and, of a group, those inside it."""
    yield path
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from paths_below((*path, name), child)


def commands() -> str:
    """docs/commands.md: what `--help` prints, for every command."""
    lines = [EXIT_STATUS, "", "```", help_of(()), "```"]
    for heading, listed in SECTIONS.items():
        lines += ["", f"## {heading}"]
        for command in listed:
            for path in paths_below((str(command.name),), command):
                lines += ["", f"### mlxtune {' '.join(path)}", "", "```", help_of(path), "```"]
    return "\n".join(lines) + "\n"


FILES = """# Files

<!-- Written by docs/generate.py out of the modules' docstrings: change those, then run `make docs`. -->

Every module with the first sentence of its docstring. How they work together: [architecture.md](architecture.md)."""
PACKAGES = (ROOT / "mlxtune", ROOT / "convert" / "mlxtune_convert")


def first_sentence(path: Path) -> str:
    """Of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    words = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[.:]) (?=[A-Z])", words)[0]


def files() -> str:
    """docs/files.md: the rooms in the order of their names, and the modules in them."""
    lines = [FILES]
    for package in PACKAGES:
        for init in sorted(package.rglob("__init__.py")):
            room = init.parent
            modules = sorted(path for path in room.glob("*.py") if not path.stem.startswith("__"))
            lines += ["", f"## {room.relative_to(package.parent).as_posix()}/", "", first_sentence(init)]
            if modules:
                lines += ["", "| module | what it is about |", "| --- | --- |"]
            for path in modules:
                lines.append(f"| `{path.name}` | {first_sentence(path).replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


CHECKS = """# Suites and checks

<!-- Written by docs/generate.py out of mlxtune/evaluate/checks: change that, then run `make docs`. -->

A suite is a file of prompts with what is right about the answers to them (`mlxtune eval --suite FILE`). Any row that
training reads is one: the conversation up to its last answer, and that answer as the reference. More keys of a row, all
optional: `id`, `reference`, `checks`, `tags`, `group`. For example

```json
{"prompt": "I want my money back for order 12.", "reference": "...", "id": "r12", "tags": ["refunds"],
 "checks": [{"schema": "reply.json"}, {"contains": ["refund", "credit"], "any": true}, {"length": {"max_words": 60}}]}
```

What holds for all rows stands beside it, in a file of the same name that ends in `.yaml`, or in `suite.yaml`:

```yaml
system: You answer for a shop.       # of rows that have no system prompt
checks: [json, no_repeat]            # before each row's own
rubric: Prefer short answers.        # for a judge
columns: {question: prompt, answer: completion}   # the file's name of a column: the name meant
```

HumanEval's own file, MT-Bench's `question.jsonl` and BFCL's rows are read as suites, too. `eval --turns replay`
asks every turn of such a conversation, or of a recorded one, behind the model's own answers: each is a prompt of its
own (`81`, `81#2`), all of one group. A row's own checks are asked of the answer that they were written for, those of
the suite's settings of every answer. Two suites come with mlxtune:
`basics`, a hundred closed questions, and `safety`, pairs of requests to refuse and harmless ones to answer.

A check is `{KIND: main argument, other: argument, ...}`, or the name alone where it needs none. Its name in results is
its kind; the second one of a row is `KIND-2`. Files that a check names lie beside the suite. Thoughts and special
tokens are not part of an answer.
"""


def checks() -> str:
    """docs/checks.md: every kind of check with its arguments and when an answer passes."""
    lines = [CHECKS, "| check | other arguments | what it asks of an answer |", "| --- | --- | --- |"]
    for name, kind in KINDS.items():
        meaning = " ".join((kind.build.__doc__ or "").split()).replace("|", "\\|")
        options = ", ".join(f"`{option}`" for option in kind.options)
        lines.append(f"| `{name}` | {options} | {meaning} |")
    return "\n".join(lines) + "\n"


PAGES = {"configuration.md": configuration, "commands.md": commands, "files.md": files, "checks.md": checks}

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if sys.argv[1:] else HERE  # a test writes them elsewhere
    for name, text_of in PAGES.items():
        (folder / name).write_text(text_of(), encoding="utf-8")

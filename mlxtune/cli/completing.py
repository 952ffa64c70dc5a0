"""What a shell is told when it asks how a command line may go on.

The script of `mlxtune completion SHELL` runs `mlxtune` with the words so far in its environment; click finds out which
command and option they belong to, and asks the option's type. The types below answer for texts that click knows nothing
of: files, recipes, keys of a configuration.

    mlxtune train -c q           recipes and files           quick qlora
    mlxtune train --set lora.v   keys                        lora.variant=
    mlxtune train --set lora.variant=r    values of a key    lora.variant=rslora
"""

from __future__ import annotations

import re
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
)

from mlxtune.cli.completion import VARIABLE

# What options and arguments call their value where it is certain to be no file. Every other text may name one: a model,
# an engine and a judge are names as well as folders, and a file that is offered in vain does no harm.
NO_FILES = ("CHECK=X", "NAME", "NAME[,NAME]", "OWNER/NAME", "TEXT", "[TEXT]", "TYPE", "USER/REPO")
Item = CompletionItem[str]


class FileText(click.types.StringParamType):
    """A text that may name a file or folder: the shell lists them."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
        return [CompletionItem(incomplete, type="file")]


class RecipeText(click.types.StringParamType):
    """A shipped recipe, or a file."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
        from mlxtune.config.resolve import recipe_names

        found = [CompletionItem(name) for name in recipe_names() if name.startswith(incomplete)]
        # A shell that is told of files and words at once shows the files alone.
        return found or [CompletionItem(incomplete, type="file")]


class SettingText(click.types.StringParamType):
    """SECTION.KEY=VALUE: first the key, then what it may be, where that is a choice."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
        from mlxtune.config.described import all_keys

        name, equals, value = incomplete.partition("=")
        if not equals:
            keys = [key for key in all_keys() if key.full.startswith(name)]
            return [CompletionItem(f"{key.full}=", help=key.meaning) for key in keys]
        allowed = next((key.allowed for key in all_keys() if key.full == name), "")
        choices = re.findall("`([^`]+)`", allowed)
        if allowed == "true or false":
            choices = ["true", "false"]
        if allowed.startswith("list"):
            choices = [f"[{choice}]" for choice in choices]
        return [CompletionItem(f"{name}={choice}") for choice in choices if choice.startswith(value)]


class KeyText(click.types.StringParamType):
    """A key of a configuration, by itself or with its section; or a section."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
        from mlxtune.config.described import all_keys

        keys = list(all_keys())
        names = dict.fromkeys([*(key.section for key in keys), *(key.full for key in keys)])
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class Bash(BashComplete):
    """bash breaks words at `=`, and puts a space behind what it completed."""

    source_template = BashComplete.source_template.replace(
        "    return 0\n",
        "    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace\n\n    return 0\n",
        1,
    )
    _given = 0  # letters of `key=`, which bash holds for a word of its own

    def get_completion_args(self) -> tuple[list[str], str]:
        args, incomplete = super().get_completion_args()
        if incomplete == "=" and args[-2:-1] == ["--set"]:  # --set lora.variant=
            args, incomplete = args[:-1], f"{args[-1]}="
        elif args[-1:] == ["="] and args[-3:-2] == ["--set"]:  # --set lora.variant=r
            args, incomplete = args[:-2], f"{args[-2]}={incomplete}"
        self._given = incomplete.find("=") + 1
        return args, incomplete

    def format_completion(self, item: CompletionItem[Any]) -> str:
        return f"{item.type},{item.value[self._given :]}"


class Zsh(ZshComplete):
    """zsh puts a space behind what it completed, unless it is told not to."""

    source_template = (
        ZshComplete.source_template.replace(
            "completions_with_descriptions+=(",
            'if [[ "$key" == *= ]]; then unfinished+=("$key"); continue; fi\n'
            "                completions_with_descriptions+=(",
            1,
        )
        .replace("    local -a completions\n", "    local -a completions unfinished\n", 1)
        .replace(
            '    if [ -n "$completions" ]',
            '    if [ -n "$unfinished" ]; then\n'
            "        compadd -U -S '' -V unsorted -a unfinished\n"
            '    fi\n\n    if [ -n "$completions" ]',
            1,
        )
    )


SHELLS: dict[str, type[ShellComplete]] = {"bash": Bash, "zsh": Zsh, "fish": FishComplete}


def script(shell: str) -> str:
    """What `source` in a shell needs. shell: a key of SHELLS."""
    from mlxtune.cli import cli

    made = SHELLS[shell](cli, {}, "mlxtune", VARIABLE)
    return made.source_template % made.source_vars()


def prepare(command: click.Command) -> None:
    """Let a command and those below it answer for all of their options. Changes nothing but completion."""
    for shell in (Bash, Zsh):
        add_completion_class(shell)
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            prepare(inner)
    for param in command.params:
        if not isinstance(param.type, click.types.StringParamType):
            continue
        if "--set" in param.opts:
            param.type = SettingText()
        elif "--config" in param.opts:
            param.type = RecipeText()
        elif param.name == "key":
            param.type = KeyText()
        elif (param.metavar or param.human_readable_name.upper()) not in NO_FILES:
            param.type = FileText()

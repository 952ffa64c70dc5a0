"""Options that refuse themselves where they would do nothing: silence is the worst fault.

    @click.command(cls=Command)
    @click.option("--push", metavar="USER/REPO")
    @click.option("--public", is_flag=True, cls=OptionFor, needs=Need("push", why="nothing is uploaded"))

and `mlxtune export --public` without --push ends with

    error: --public has no effect without --push: nothing is uploaded
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

from mlxtune.errors import UserError

WHOLE = 1000  # letters of a command's first sentence, where commands are listed: none is cut short


class Group(click.Group):
    """Lists its commands with their whole first sentences."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        commands = [(name, command.get_short_help_str(WHOLE)) for name, command in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl(commands)


# What is said of the options by which an answer is chosen, wherever a command has them.
TEMPERATURE = "How far chance chooses the tokens; 0: always the likeliest one."
TOP_P = "Choose among the likeliest tokens that have this probability together."
SEED = "Starts the random choices: the same seed, the same answers."
MAX_TOKENS = "Where an answer is cut."


@dataclass(frozen=True)
class Need:
    """Beside which values of another option an option means something."""

    other: str  # the other option's parameter ("target")
    values: tuple[Any, ...] = ()  # its values that will do; (): any but none, False and 0
    why: str = ""  # what is so elsewhere: "nothing is quantized"
    hint: str = ""  # what to do instead; "": the values that will do are named
    also: tuple[str, ...] = ()  # further options any value of which will do as well

    def met_by(self, value: Any) -> bool:
        """Whether this value of the other option will do."""
        return value in self.values if self.values else bool(value)


def is_given(name: str, context: click.Context | None = None) -> bool:
    """Whether the command line names an option. name: of its parameter; context: None for that of the command."""
    context = context or click.get_current_context()
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def is_changed(name: str, context: click.Context | None = None) -> bool:
    """Whether it gives the option another value than its default: that, said aloud, is no claim to anything."""
    context = context or click.get_current_context()
    (option,) = (one for one in context.command.params if one.name == name)
    return is_given(name, context) and context.params[name] != option.get_default(context)


class OptionFor(click.Option):
    """An option that means something only beside another. Its command must be a `Command`."""

    def __init__(self, *args: Any, needs: Need, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.needs = needs

    def refuse_if_idle(self, context: click.Context) -> None:
        """Raise UserError when it was given and would do nothing. Its default, said aloud, is no claim to anything."""
        assert self.name is not None
        if not is_changed(self.name, context):
            return
        value = context.params[self.needs.other]
        if self.needs.met_by(value) or any(context.params[name] for name in self.needs.also):
            return
        (other,) = (option.opts[0] for option in context.command.params if option.name == self.needs.other)
        why = f": {self.needs.why}" if self.needs.why else ""
        hint = self.needs.hint
        if not hint and self.needs.values:
            hint = f"It is for: {', '.join(str(fitting) for fitting in self.needs.values)}."
        raise UserError(f"{self.opts[0]} has no effect {_beside(other, value)}{why}", hint)


def _beside(other: str, value: Any) -> str:
    """In words: without --push, with --no-verify, with --to hf, at --temperature 0."""
    if value is None or value is False:
        return f"without {other}"
    if value is True:
        return f"with {other}"
    if isinstance(value, int | float):
        return f"at {other} {value:g}"
    return f"with {other} {value}"


class Command(click.Command):
    """A command that asks its options, once all are known, whether they mean something."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        left = super().parse_args(context, args)
        for option in self.params:
            if isinstance(option, OptionFor):
                option.refuse_if_idle(context)
        return left


def with_options(command: Callable[..., Any], options: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """The command with some of click's options, in the order in which its help lists them."""
    for option in reversed(options):  # click lists the one that was put on last first
        command = option(command)
    return command

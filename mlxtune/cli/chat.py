"""mlxtune generate, chat."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.shown import brief, shown_name

from mlxtune.api import tuned
from mlxtune.cli import common, thumbs
from mlxtune.cli.options import MAX_TOKENS, SEED, TEMPERATURE, TOP_P, Command, Need, OptionFor
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from mlxtune.cli.talk import Talk


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How the next token is chosen: the fields of `Sampling`."""
    with_chance = Need("temperature", hint="Add, say, --temperature 0.7.")
    above_0 = click.FloatRange(0.0, 1.0, min_open=True)
    penalty = click.FloatRange(min=1.0)
    for option in (
        click.option(
            "--seed",
            type=int,
            default=0,
            show_default=True,
            help=SEED,
        ),
        click.option(
            "--repetition-penalty",
            type=penalty,
            default=1.0,
            show_default=True,
            help="Makes tokens that were said lately less likely; 1: not at all.",
        ),
        click.option(
            "--top-p",
            type=above_0,
            default=1.0,
            show_default=True,
            cls=OptionFor,
            needs=with_chance,
            help=TOP_P,
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0.0),
            default=0.0,
            show_default=True,
            help=TEMPERATURE,
        ),
        click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help=MAX_TOKENS),
    ):
        command = option(command)
    return command


@click.command(cls=Command)
@common.model_of_run_option()
@common.adapter_option()
@click.argument("text", required=False, metavar="[TEXT]")
@click.option("--prompt", metavar="TEXT", help="The user's message, in place of TEXT.")
@click.option("--system", metavar="TEXT", help="A system prompt.")
@click.option("--raw", is_flag=True, help="Into a file or pipe: control characters as the model says them.")
@sampling_options
def generate(
    model: str,
    adapter: Path | None,
    text: str | None,
    prompt: str | None,
    system: str | None,
    raw: bool,
    **sampling: Any,
) -> None:
    """Answer one prompt; standard output is the answer alone.

    TEXT is the user's message; - reads it from standard input.

    A model that thinks first does so on standard error: its thought is what its chat template, or <think>, marks as
    one. Control characters, which a terminal would obey, are shown by their numbers: \\x1b.

    \b
    mlxtune generate --model model --adapter run --prompt "Where is my order?"
    mlxtune generate --adapter run "Where is my order?"
    mlxtune generate --adapter run - < question.txt
    """
    from mlxtune.cli.talk import Talk
    from mlxtune.evaluate.engines.sampling import Sampling
    from mlxtune.evaluate.generate import Refused

    if raw and sys.stdout.isatty():
        raise UserError("--raw would let the model command this terminal", "Send the answer into a file: > answer.txt")
    asked = _prompt(text, prompt)
    talk = Talk(tuned.load_model(model, adapter), adapter, Sampling(**sampling), raw)
    talk.system = system
    try:
        if not talk.ask(asked):
            raise KeyboardInterrupt
    except Refused as error:
        raise UserError(error.message, "Leave out --system, or say it in --prompt." if error.system else "") from error


def _prompt(text: str | None, prompt: str | None) -> str:
    """The user's message. Raises UserError unless it is given, and once."""
    if text is not None and prompt is not None:
        raise UserError(f"two prompts: {brief(text)} and --prompt {brief(prompt)}", "Leave out one of them.")
    asked = prompt if text is None else text
    if asked == "-":
        asked = sys.stdin.read().rstrip("\n")
        if not asked:
            raise UserError("standard input holds no prompt", "echo TEXT | mlxtune generate --model DIR -")
    if asked is None:
        raise UserError("no prompt given", "mlxtune generate --model DIR TEXT, or - to read standard input.")
    return asked


HELP = "/system TEXT  set the system prompt    /reset  forget the conversation    /quit  leave"
THUMBS = "/up  the last answer was good    /down  it was not"


@click.command(cls=Command)
@common.model_of_run_option()
@common.adapter_option()
@click.option("--system", metavar="TEXT", help="A system prompt.")
@click.option(
    "--log",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="Keep the answers, with the thumbs that /up and /down give them: for rate, compare and data.",
)
@sampling_options
def chat(model: str, adapter: Path | None, system: str | None, log: Path | None, **sampling: Any) -> None:
    """Talk with a model. Ctrl-C stops an answer, not the program; Ctrl-D leaves.

    A model that thinks first does so in dim letters, on standard error. The conversation keeps thought and answer
    apart, as the chat template wants them.

    \b
    mlxtune chat --model model --adapter run --temperature 0.7
    mlxtune chat --model model --adapter run --log chats.jsonl
    """
    from mlxtune.cli.talk import Talk
    from mlxtune.evaluate.engines.sampling import Sampling
    from mlxtune.evaluate.generate import Refused
    from mlxtune.machine import backend
    from mlxtune.machine.gpu_errors import recognise

    console = common.console()
    kept = None if log is None else thumbs.opened(log, model, adapter)  # a wrong file is said before the model is read
    if kept is not None:
        click.get_current_context().call_on_close(kept.close)
    with console.status(f"loading {model}"):
        talk = Talk(tuned.load_model(model, adapter), adapter, Sampling(**sampling))
    try:
        talk.instruct(system)
    except Refused as error:
        raise UserError(error.message, "Leave out --system, or say it in a message." if error.system else "") from error
    talk.log = kept
    console.print(_help(talk), style="dim")
    while (line := _read_line()) is not None:
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return
        try:
            if command.startswith("/"):
                console.print(_obeyed(talk, command, rest.strip()), style="dim")
            elif line.strip():
                talk.ask(line)
        except UserError as error:
            what = "it stays as it was" if command == "/system" else "this message is not kept"
            click.echo(f"error: {shown_name(error.message)} ({what})", err=True)
        except (RuntimeError, MemoryError) as error:
            failure = recognise(error)
            if failure is None or failure.final:
                raise
            click.echo(f"error: {failure} (this message is not kept)\n  {failure.hint('chat')}", err=True)
            backend.recover()


def _obeyed(talk: Talk, command: str, rest: str) -> str:
    """Do what a command says, and return what to print. rest: what follows it. Raises UserError for a system prompt
    that the template refuses.
    """
    if command == "/reset":
        talk.instruct(talk.system)
        return "the conversation is forgotten"
    if command == "/system":
        talk.instruct(rest or None)
        return f"system prompt: {talk.system or 'none'}; the conversation is forgotten"
    if command in ("/up", "/down"):
        return _rated(talk, command == "/up")
    return _help(talk)


def _help(talk: Talk) -> str:
    return HELP if talk.log is None else f"{HELP}\n{THUMBS}"


def _rated(talk: Talk, is_good: bool) -> str:
    """Give the last answer a thumb, and return what to print."""
    if talk.log is None:
        return "nothing is kept: begin with mlxtune chat --log FILE.jsonl"
    if not talk.log.rate(is_good):
        return "there is no answer yet"
    return f"thumbs {'up' if is_good else 'down'}, kept in {shown_name(str(talk.log.path))}"


def _read_line() -> str | None:
    """A line from the user; None at the end of input. Ctrl-C on an empty prompt gives a fresh one."""
    import readline  # noqa: F401  # gives input() editing and history

    try:
        return input("> ")
    except KeyboardInterrupt:
        click.echo()
        return ""
    except EOFError:
        click.echo()
        return None

"""mlxtune eval, generate, chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import common

if TYPE_CHECKING:
    from mlxtune.evaluate.generate import Sampling
    from mlxtune.evaluate.loss import Score


@click.command("eval")
@common.model_option()
@common.adapter_option
@click.option("--data", metavar="PATH", help="Folder or file.  [default: the run's own data]")
@common.split_option("Of a folder.  [default: valid; a file: all rows]")
@common.json_option
@common.settings_option
def eval_command(
    model: str, adapter: Path | None, data: str | None, split: str | None, as_json: bool, settings: tuple[str, ...]
) -> None:
    """Score the base, and with --adapter the tuned model, on held-out rows.

    Loss, perplexity and token accuracy over the tokens that training supervises.

    \b
    mlxtune eval --model model --adapter run
    mlxtune eval --model model --data data --split test --json
    """
    from mlxtune import session
    from mlxtune.model.lora import switched_off

    config = common.run_settings(adapter, data, settings)
    loaded = common.load_model(model, adapter)
    examples = session.held_out(loaded.tokenizer, loaded.path, config, split, own=data is None)
    label = split or ("all" if data is not None and Path(data).expanduser().is_file() else "valid")
    for note in examples.notes(label, config.data.max_tokens):
        common.note(note)
    console = common.console()
    with console.status("scoring"), switched_off(loaded.model):
        scores = {"base": session.evaluate(loaded, config, examples)}
    if adapter is not None:
        with console.status("scoring"):
            scores["tuned"] = session.evaluate(loaded, config, examples)
    if as_json:
        known = ("loss", "perplexity", "accuracy", "tokens")
        found = {name: {key: getattr(score, key) for key in known} for name, score in scores.items()}
        click.echo(json.dumps({"split": label, "rows": len(examples), **found}))
    else:
        common.stdout().print(score_table(scores, f"{len(examples)} rows, {scores['base'].tokens:,} tokens"))


def score_table(scores: dict[str, Score], title: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table("", "loss", "perplexity", "token accuracy", title=title, box=box.SIMPLE, title_justify="left")
    for name, score in scores.items():
        table.add_row(name, f"{score.loss:.4f}", f"{score.perplexity:,.2f}", f"{score.accuracy:.1%}")
    return table


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--seed", type=int, default=0, show_default=True, help="Of the random choices."),
        click.option(
            "--repetition-penalty", type=click.FloatRange(min=1.0), default=1.0, show_default=True, help="1: none."
        ),
        click.option(
            "--top-p", type=click.FloatRange(0.0, 1.0, min_open=True), default=1.0, show_default=True, help="Nucleus."
        ),
        click.option(
            "--temperature", type=click.FloatRange(min=0.0), default=0.0, show_default=True, help="0: no chance."
        ),
        click.option("--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Of an answer."),
    ):
        command = option(command)
    return command


def _sampling(options: dict[str, Any]) -> Sampling:
    from mlxtune.errors import UserError

    if options["top_p"] < 1 and options["temperature"] == 0:
        raise UserError("--top-p has no effect at --temperature 0", "Add, say, --temperature 0.7.")
    from mlxtune.evaluate.generate import Sampling

    return Sampling(**options)


def _template_kwargs(adapter: Path | None) -> dict[str, Any]:
    return dict(common.run_settings(adapter, None).data.template_kwargs)


@click.command()
@common.model_option()
@common.adapter_option
@click.option("--prompt", required=True, metavar="TEXT", help="The user's message.")
@click.option("--system", metavar="TEXT", help="A system prompt.")
@sampling_options
def generate(model: str, adapter: Path | None, prompt: str, system: str | None, **options: Any) -> None:
    """Answer one prompt; standard output is the answer alone.

    \b
    mlxtune generate --model model --adapter run --prompt "Where is my order?"
    """
    sampling = _sampling(options)
    from mlxtune.evaluate.generate import prompt_ids, stream

    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    loaded = common.load_model(model, adapter)
    for piece in stream(loaded, prompt_ids(loaded, messages, _template_kwargs(adapter)), sampling):
        click.echo(piece, nl=False)
    click.echo()


HELP = "/system TEXT  set the system prompt    /reset  forget the conversation    /quit  leave"


@click.command()
@common.model_option()
@common.adapter_option
@click.option("--system", metavar="TEXT", help="A system prompt.")
@sampling_options
def chat(model: str, adapter: Path | None, system: str | None, **options: Any) -> None:
    """Talk with a model. Ctrl-C stops an answer, not the program; Ctrl-D leaves.

    \b
    mlxtune chat --model model --adapter run --temperature 0.7
    """
    sampling = _sampling(options)
    from mlxtune.evaluate.generate import prompt_ids, stream

    console = common.console()
    with console.status(f"loading {model}"):
        loaded = common.load_model(model, adapter)
    kwargs = _template_kwargs(adapter)
    history: list[dict[str, Any]] = []
    console.print(HELP, style="dim")
    while (line := _read_line()) is not None:
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/reset":
            history = []
            console.print("the conversation is forgotten", style="dim")
        elif command == "/system":
            system = rest.strip() or None
            history = []
            console.print(f"system prompt: {system or 'none'}; the conversation is forgotten", style="dim")
        elif command.startswith("/"):
            console.print(HELP, style="dim")
        elif line.strip():
            head = [{"role": "system", "content": system}] if system else []
            history.append({"role": "user", "content": line})
            answer = ""
            try:
                for piece in stream(loaded, prompt_ids(loaded, head + history, kwargs), sampling):
                    answer += piece
                    click.echo(piece, nl=False)
            except KeyboardInterrupt:
                click.echo(" [stopped]", nl=False, err=True)
            click.echo()
            history.append({"role": "assistant", "content": answer})


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

"""mlxtune eval, generate, chat."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.shown import shown, shown_name

from mlxtune.cli import common

if TYPE_CHECKING:
    from mlxtune.data.template.answers import Plain, Reader, Said
    from mlxtune.evaluate.generate import Sampling
    from mlxtune.evaluate.score import Score
    from mlxtune.model.load import Loaded


@click.command("eval")
@common.model_option()
@common.adapter_option
@click.option(
    "--data",
    metavar="PATH",
    help="Folder, file or hub dataset id.  [default: the run's own, never fetched from the hub]",
)
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
    from mlxtune.adapter.attach import switched_off
    from mlxtune.data.dataset import holdout
    from mlxtune.evaluate.score import score_examples

    common.run_settings(adapter, data, settings)  # a typing error is said before the model is read
    loaded = common.load_model(model, adapter)
    examples, config = common.held_out(loaded.tokenizer, loaded.path, adapter, data, settings, split)
    is_whole = data is not None and holdout.is_whole_file(data, split)
    label = split or ("all" if is_whole else "valid")
    for note in examples.notes(label, config.data.max_tokens):
        common.note(note)
    console = common.console()
    with console.status("scoring"), switched_off(loaded.model):
        scores = {"base": score_examples(loaded, config, examples)}
    if adapter is not None:
        with console.status("scoring"):
            scores["tuned"] = score_examples(loaded, config, examples)
    if as_json:
        known = ("loss", "perplexity", "accuracy", "tokens")
        found = {name: {key: getattr(score, key) for key in known} for name, score in scores.items()}
        click.echo(json.dumps({"split": label, "rows": examples.rows, "examples": len(examples), **found}))
    else:
        common.stdout().print(
            score_table(scores, f"{examples.rows} rows{examples.also}, {scores['base'].tokens:,} tokens")
        )


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


class Voice:
    """Says an answer as it comes: the answer on standard output, the thought before it dim on standard error."""

    def __init__(self, reader: Reader | Plain, raw: bool = False) -> None:
        """raw: control characters that the model says are not made visible."""
        self.reader = reader
        self.spelled: Callable[[str], str] = str if raw else shown
        self.text = ""
        self.thought = self.content = 0  # characters said

    def hear(self, piece: str) -> None:
        self.text += piece
        self._say(self.reader.so_far(self.text))

    def end(self, remark: str) -> None:
        """Say what was held back, and end the line, with a remark that is no part of the answer."""
        self._say(self.reader.said(self.text))
        click.echo(remark, nl=False, err=True)
        if self.thought and not self.content:
            click.echo(err=True)
        click.echo()

    def _say(self, said: Said) -> None:
        if not self.content and len(said.thought) > self.thought:
            click.secho(shown(said.thought[self.thought :]), nl=False, err=True, dim=True)
            self.thought = len(said.thought)
        if said.content and not self.content and self.thought:
            click.echo("\n", err=True)
        click.echo(self.spelled(said.content[self.content :]), nl=False)
        self.content = max(self.content, len(said.content))


class Talk:
    """A conversation with a model, by the chat template, and the variables and day, that it was tuned with."""

    def __init__(self, loaded: Loaded, adapter: Path | None, sampling: Sampling, raw: bool = False) -> None:
        from mlxtune_convert.hf.chat_templates import unread

        for note in unread(loaded.path):
            common.note(note)
        data = common.run_settings(adapter, None).data
        self.loaded, self.sampling, self.raw = loaded, sampling, raw
        self.settings = dict(data.template_kwargs), data.date
        self.system: str | None = None
        self.history: list[dict[str, Any]] = []

    def instruct(self, system: str | None) -> None:
        """Begin anew with a system prompt. Raises UserError, and changes nothing, when the template refuses it."""
        from mlxtune.evaluate.generate import prompt_ids

        if system:
            said = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
            prompt_ids(self.loaded, said, *self.settings)
        self.system, self.history = system, []

    def ask(self, text: str) -> bool:
        """Have a message answered; False when Ctrl-C ended the answer: what was said so far is kept.

        Raises UserError when the template refuses the message, and whatever MLX raises; the message is not kept then.
        """
        from mlxtune.evaluate.generate import prompt_ids, reader_for, stream

        question = {"role": "user", "content": text}
        head = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*head, *self.history, question]
        ids = prompt_ids(self.loaded, messages, *self.settings)
        voice = Voice(reader_for(self.loaded, messages, *self.settings), self.raw)
        stopped = False
        try:
            for piece in stream(self.loaded, ids, self.sampling):
                voice.hear(piece)
        except KeyboardInterrupt:
            stopped = True
        except (RuntimeError, MemoryError):
            if voice.text:
                voice.end("")  # the error is said on a line of its own
            raise
        voice.end(" [stopped]" if stopped else "")
        if voice.thought and not voice.content and not stopped:
            limit = "" if voice.reader.ended(voice.text) else f" within --max-tokens {self.sampling.max_tokens}"
            common.note(f"the model thought, and gave no answer{limit}")
        message = voice.reader.message(voice.text)
        if voice.reader.takes(message):
            self.history += [question, message]
        else:
            common.note("the chat template does not take this answer back: question and answer are not kept")
        return not stopped


@click.command()
@common.model_option()
@common.adapter_option
@click.option("--prompt", required=True, metavar="TEXT", help="The user's message.")
@click.option("--system", metavar="TEXT", help="A system prompt.")
@click.option("--raw", is_flag=True, help="Into a file or pipe: control characters as the model says them.")
@sampling_options
def generate(model: str, adapter: Path | None, prompt: str, system: str | None, raw: bool, **options: Any) -> None:
    """Answer one prompt; standard output is the answer alone.

    A model that thinks first does so on standard error: its thought is what its chat template, or <think>, marks as
    one. Control characters, which a terminal would obey, are shown by their numbers: \\x1b.

    \b
    mlxtune generate --model model --adapter run --prompt "Where is my order?"
    """
    sampling = _sampling(options)
    from mlxtune.errors import UserError
    from mlxtune.evaluate.generate import Refused

    if raw and sys.stdout.isatty():
        raise UserError("--raw would let the model command this terminal", "Send the answer into a file: > answer.txt")
    talk = Talk(common.load_model(model, adapter), adapter, sampling, raw)
    talk.system = system
    try:
        if not talk.ask(prompt):
            raise KeyboardInterrupt
    except Refused as error:
        raise UserError(error.message, "Leave out --system, or say it in --prompt." if error.system else "") from error


HELP = "/system TEXT  set the system prompt    /reset  forget the conversation    /quit  leave"


@click.command()
@common.model_option()
@common.adapter_option
@click.option("--system", metavar="TEXT", help="A system prompt.")
@sampling_options
def chat(model: str, adapter: Path | None, system: str | None, **options: Any) -> None:
    """Talk with a model. Ctrl-C stops an answer, not the program; Ctrl-D leaves.

    A model that thinks first does so in dim letters, on standard error. The conversation keeps thought and answer
    apart, as the chat template wants them.

    \b
    mlxtune chat --model model --adapter run --temperature 0.7
    """
    sampling = _sampling(options)
    from mlxtune.errors import UserError
    from mlxtune.evaluate.generate import Refused
    from mlxtune.machine import backend
    from mlxtune.machine.gpu_errors import recognise

    console = common.console()
    with console.status(f"loading {model}"):
        talk = Talk(common.load_model(model, adapter), adapter, sampling)
    try:
        talk.instruct(system)
    except Refused as error:
        raise UserError(error.message, "Leave out --system, or say it in a message." if error.system else "") from error
    console.print(HELP, style="dim")
    while (line := _read_line()) is not None:
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return
        try:
            if command == "/reset":
                talk.instruct(talk.system)
                console.print("the conversation is forgotten", style="dim")
            elif command == "/system":
                talk.instruct(rest.strip() or None)
                console.print(f"system prompt: {talk.system or 'none'}; the conversation is forgotten", style="dim")
            elif command.startswith("/"):
                console.print(HELP, style="dim")
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

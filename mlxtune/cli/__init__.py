"""The `mlxtune` command. Each verb family has its file; MLX and friends are imported inside the commands."""

from __future__ import annotations

import os
import sys
from typing import NoReturn, TextIO, cast

import click
from click.exceptions import NoArgsIsHelpError
from mlxtune_convert.cli import say_error, status_of
from mlxtune_convert.shown import shown_name

import mlxtune
from mlxtune.cli import (
    bench,
    chat,
    common,
    compare,
    completion,
    config,
    convert,
    curate,
    data,
    demo,
    doctor,
    evaluate,
    help_text,
    import_config,
    init,
    make,
    make_answers,
    make_from_documents,
    make_from_template,
    make_instructions,
    make_pairs,
    make_refusals,
    make_turns,
    rate,
    report,
    runs,
    ship,
    train,
)
from mlxtune.cli.options import WHOLE
from mlxtune.cli.streams import Surviving
from mlxtune.errors import Interrupted
from mlxtune.machine import gpu_errors
from mlxtune.train import signals

SECTIONS: dict[str, list[click.Command]] = {
    "Begin": [init.init, demo.demo, doctor.doctor, bench.bench, completion.completion],
    "Prepare": [convert.convert, data.data, make.make],
    "Tune": [
        config.config,
        import_config.import_config,
        train.train,
        runs.runs,
        report.report,
        evaluate.eval_command,
        compare.compare,
        rate.rate,
    ],
    "Use": [chat.generate, chat.chat],
    "Ship": [ship.fuse, ship.export, ship.verify],
}
MAKERS: list[click.Command] = [  # the commands of `make`
    make_instructions.instructions,
    make_pairs.pairs,
    make_answers.answers,
    make_turns.turns,
    make_refusals.refusals,
    make_from_documents.from_documents,
    make_from_template.from_template,
]


class Sectioned(click.Group):
    """Lists the commands under headings, in the order of a project's life."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, commands in SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl([(str(command.name), command.get_short_help_str(WHOLE)) for command in commands])


def _say_version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    """Ours, and that of what computes: a report of a fault needs all of them."""
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        found = []
        for name in ("mlx", "mlx-lm"):
            try:
                found.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                found.append(f"{name} is missing")
        click.echo(f"mlxtune {mlxtune.__version__} ({', '.join(found)})")
        context.exit()


@click.group(cls=Sectioned, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_say_version, help="Print versions."
)
def cli() -> None:
    """Tune language models on Apple silicon, and ship exactly what was tuned.

    \b
    mlxtune convert OWNER/NAME model                    # pull, quantize to 4 bits
    mlxtune train -c qlora --model model --data data    # LoRA on the assistant's tokens
    mlxtune chat --model model --adapter runs/...       # try it
    mlxtune export --model model --adapter runs/... --to peft --out adapter
    """


# Those that tell of their progress, or note something beside their result.
TELLING: list[click.Command] = [
    *(doctor.doctor, bench.bench, convert.convert, data.show, data.check, data.convert, curate.curate),
    *(import_config.import_config, train.train, evaluate.eval_command, chat.generate),
    *(ship.fuse, ship.export, ship.verify),
    *MAKERS,
]
for _telling in TELLING:
    common.may_be_quiet(_telling)
for _commands in SECTIONS.values():
    for _command in _commands:
        cli.add_command(_command)
for _maker in MAKERS:
    make.make.add_command(_maker)
help_text.lay_out(cli)


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line. Exit: 0 done, 2 the user can fix it, 1 our bug, 129, 130 and 143 stopped by a signal."""
    signals.unwind_on_signals()
    stderr = cast(TextIO, Surviving(sys.stderr))
    sys.stderr = stderr
    if completion.VARIABLE in os.environ:  # a shell asks how a line may go on
        from mlxtune.cli import completing

        completing.prepare(cli)
    try:
        code = cli.main(args, prog_name="mlxtune", standalone_mode=False)
    except SystemExit as stop:
        sys.stderr = stderr
        if stop.code in signals.EXIT_CODES.values():
            click.echo("stopped", err=True)
        raise
    except NoArgsIsHelpError as asked_nothing:
        click.echo(asked_nothing.format_message())
        code = 0
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except (Exception, KeyboardInterrupt) as error:
        sys.stderr = stderr  # a display that a signal met in its own ending has left its own stream there
        code = _status_of(error, sys.argv[1:] if args is None else args)
        if code is None:
            raise
    sys.exit(code if isinstance(code, int) else 0)


def _status_of(error: BaseException, words: list[str]) -> int | None:
    """As `status_of`, and what only these commands meet. words: of the command line."""
    if isinstance(error, Interrupted):
        click.echo(shown_name(error.message), err=True)
        return error.exit_code
    status = status_of(error)
    failure = gpu_errors.recognise(error) if status is None else None
    if failure is None:
        return status
    command = next((word for word in words if not word.startswith("-")), "")
    say_error(str(failure), failure.hint(command, words))
    return 2

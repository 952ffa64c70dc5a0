"""The `mlxtune` command. Each verb family has its file; MLX and friends are imported inside the commands."""

from __future__ import annotations

import sys
from typing import NoReturn, TextIO, cast

import click
from mlxtune_convert.cli import say_error
from mlxtune_convert.files import REFUSALS
from mlxtune_convert.shown import shown_name

import mlxtune
from mlxtune import gpu_errors
from mlxtune.cli import bench, common, convert, data, demo, doctor, runs, ship, train, use
from mlxtune.errors import Interrupted, UserError
from mlxtune.train import signals

SECTIONS: dict[str, list[click.Command]] = {
    "Begin": [demo.demo, doctor.doctor, bench.bench],
    "Prepare": [convert.convert, data.data],
    "Tune": [train.train, runs.runs, use.eval_command],
    "Use": [use.generate, use.chat],
    "Ship": [ship.fuse, ship.export, ship.verify],
}


class Sectioned(click.Group):
    """Lists the commands under headings, in the order of a project's life."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, commands in SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl([(str(command.name), command.get_short_help_str(limit=80)) for command in commands])


@click.group(cls=Sectioned, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(mlxtune.__version__, prog_name="mlxtune")
def cli() -> None:
    """Tune language models on Apple silicon, and ship exactly what was tuned.

    \b
    mlxtune convert OWNER/NAME model                    # pull, quantize to 4 bits
    mlxtune train -c qlora --model model --data data    # LoRA on the assistant's tokens
    mlxtune chat --model model --adapter runs/...       # try it
    mlxtune export --model model --adapter runs/... --to peft --out adapter
    """


for _commands in SECTIONS.values():
    for _command in _commands:
        cli.add_command(_command)


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line. Exit: 0 done, 2 the user can fix it, 1 our bug, 129, 130 and 143 stopped by a signal."""
    signals.unwind_on_signals()
    sys.stderr = cast(TextIO, common.Surviving(sys.stderr))
    try:
        code = cli.main(args, prog_name="mlxtune", standalone_mode=False)
    except UserError as error:
        say_error(error.message, error.hint)
        code = 2
    except click.UsageError as error:
        say_error(error.format_message(), f"See: {error.ctx.command_path} --help" if error.ctx else "")
        code = 2
    except click.ClickException as error:
        say_error(error.format_message(), "")
        code = 2
    except Interrupted as error:
        click.echo(shown_name(error.message), err=True)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        code = 130
    except SystemExit as stop:
        if stop.code in signals.EXIT_CODES.values():
            click.echo("stopped", err=True)
        raise
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        say_error(f"{error.filename or 'the file system'}: {REFUSALS[error.errno][0]}", "")
        code = 2
    except (RuntimeError, MemoryError) as error:
        failure = gpu_errors.recognise(error)
        if failure is None:
            raise
        words = sys.argv[1:] if args is None else args
        command = next((word for word in words if not word.startswith("-")), "")
        say_error(str(failure), failure.hint(command, words))
        code = 2
    sys.exit(code if isinstance(code, int) else 0)

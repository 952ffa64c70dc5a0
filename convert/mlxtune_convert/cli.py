"""The `mlxtune-convert` command, for machines without MLX. What it does is in `fence`, imported inside the commands."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

import mlxtune_convert
from mlxtune_convert.errors import UserError
from mlxtune_convert.files import REFUSALS
from mlxtune_convert.shown import brief, shown, shown_name

if TYPE_CHECKING:
    from mlxtune_convert.fence import Result

force_option = click.option("--force", is_flag=True, help="Replace the destination.")


def source(name: str = "src") -> Callable[..., Any]:
    return click.argument(name, type=click.Path(path_type=Path, exists=True))


def base_option(text: str, required: bool = False) -> Callable[..., Any]:
    kind = click.Path(path_type=Path, exists=True)
    return click.option("--base", type=kind, metavar="DIR", required=required, help=text)


destination = click.argument("dst", type=click.Path(path_type=Path))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(mlxtune_convert.__version__, prog_name="mlxtune-convert")
def cli() -> None:
    """Carry adapters and models between MLX and PyTorch, on any machine: no MLX, no PyTorch, no GPU is needed.

    \b
    mlxtune-convert to-peft mlx-adapter peft-adapter --base model   # trained on a Mac, used by PEFT
    mlxtune-convert to-mlx peft-adapter mlx-adapter --base model    # and back
    mlxtune-convert to-hf mlx-model hf-model                        # 4 bits in MLX, 16 bits for transformers
    mlxtune-convert check peft-adapter mlx-adapter --base model     # the same numbers?
    """


@cli.command("to-peft")
@source()
@destination
@base_option("The model that it was trained on, its original, or the config.json of one.", required=True)
@click.option("--base-name", default="", metavar="OWNER/NAME", help="The original model on the hub, written into it.")
@force_option
def to_peft(src: Path, dst: Path, base: Path, base_name: str, force: bool) -> None:
    """Make a PEFT adapter of an MLX adapter folder (mlxtune's or mlx-lm's), or of a GGUF adapter file.

    The numbers are moved, not computed. How PEFT names the layers follows from the base's config.json; where the
    embedding was trained, the MLX model's weights are needed as well.

    \b
    mlxtune-convert to-peft runs/first peft-adapter --base mlx-model
    mlxtune-convert to-peft adapter.gguf peft-adapter --base hf-model/config.json --base-name OWNER/NAME
    """
    from mlxtune_convert import fence

    _say(dst, fence.to_peft(src, dst, base, base_name, force))


@cli.command("to-mlx")
@source()
@destination
@base_option("The MLX model that it is for, its original, or the config.json of one.")
@force_option
def to_mlx(src: Path, dst: Path, base: Path | None, force: bool) -> None:
    """Make an MLX adapter folder, as mlxtune and mlx-lm read it, of a PEFT adapter folder.

    Without --base the layers are taken to have the same names in MLX, which is so for Llama, Mistral, Qwen, Gemma and
    other plain families, not for experts. With the MLX model's folder, the shapes are compared too.

    \b
    mlxtune-convert to-mlx peft-adapter mlx-adapter --base mlx-model
    mlxtune-convert to-mlx peft-adapter mlx-adapter --base hf-model/config.json
    """
    from mlxtune_convert import fence

    _say(dst, fence.to_mlx(src, dst, base, force))


@cli.command("to-hf")
@source()
@destination
@base_option("The original model, for the parts that MLX does not have: vision towers, blocks that predict ahead.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="How weights are stored.  [default: the model's]",
)
@force_option
def to_hf(src: Path, dst: Path, base: Path | None, dtype: str | None, force: bool) -> None:
    """Make a model folder for transformers of an MLX model folder, quantized (any mode and bits) or not.

    Codes become the numbers they stand for, computed in float32 and rounded once to the type of the rest.

    \b
    mlxtune-convert to-hf mlx-4bit hf-16bit
    mlxtune-convert to-hf mlx-4bit hf-16bit --base original-vision-model --dtype bfloat16
    """
    from mlxtune_convert import fence

    _say(dst, fence.to_hf(src, dst, base, dtype, force))


@cli.command()
@source("export")
@source("origin")
@base_option("Of a PEFT adapter: the model it was trained on, its original, or the config.json of one.")
@click.option(
    "--adapter",
    type=click.Path(path_type=Path, exists=True),
    metavar="DIR",
    help="Of a Hugging Face folder: the MLX adapter that was merged into it.",
)
def check(export: Path, origin: Path, base: Path | None, adapter: Path | None) -> None:
    """Compare a PEFT adapter or a Hugging Face folder with the MLX folder it came from, tensor by tensor.

    Everything must be equal bit for bit; a merged matrix, which is a sum, within the rounding of its type. Exits with 2
    where something differs. A model that was exported with `--base` was made of that base: it is not MLX's here.

    \b
    mlxtune-convert check peft-adapter mlx-adapter --base mlx-model
    mlxtune-convert check hf-16bit mlx-4bit
    mlxtune-convert check merged mlx-4bit --adapter mlx-adapter
    """
    from mlxtune_convert import fence

    _say(export, fence.check(export, origin, base, adapter))


def _say(path: Path, result: Result) -> None:
    for note in result.notes:
        click.echo(f"note: {brief(shown_name(note))}", err=True)
    click.echo(f"{shown_name(path)}: {shown(result.said)}")


def say_error(message: str, hint: str) -> None:
    """One line, and one on what to do next."""
    # Text of a library's error may be part of the message; it must not break the line.
    click.echo(f"error: {brief(shown_name(' '.join(message.splitlines())))}", err=True)
    if hint:
        click.echo(f"  {brief(shown_name(hint))}", err=True)


def status_of(error: BaseException) -> int | None:
    """Say what ended a command, and return its exit status: 2 the user can fix it, 130 stopped by Ctrl-C. None for any
    other error, of which nothing is said.
    """
    if isinstance(error, UserError):
        say_error(error.message, error.hint)
    elif isinstance(error, click.UsageError):
        say_error(error.format_message(), f"See: {error.ctx.command_path} --help" if error.ctx else "")
    elif isinstance(error, click.ClickException):
        say_error(error.format_message(), "")
    elif isinstance(error, click.Abort | KeyboardInterrupt):
        click.echo("stopped", err=True)
        return 130
    elif isinstance(error, OSError) and error.errno in REFUSALS:
        say_error(f"{error.filename or 'the file system'}: {REFUSALS[error.errno][0]}", "")
    else:
        return None
    return 2


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line. Exit: 0 done, 2 the user can fix it, 1 our bug, 130 and 143 stopped by a signal."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing half-written is left
    code: Any = 0
    try:
        code = cli.main(args, prog_name="mlxtune-convert", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        code = status_of(error)
        if code is None:
            raise
    sys.exit(code if isinstance(code, int) else 0)

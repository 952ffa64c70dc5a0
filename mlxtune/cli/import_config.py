"""mlxtune import-config."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mlxtune.cli import common
from mlxtune.cli.options import Command, Need, OptionFor


@click.command("import-config", cls=Command)
@click.argument("source", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--from",
    "program",
    type=click.Choice(["mlx-lm", "axolotl"]),
    help="Whose configuration it is.  [default: its keys show it]",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write it there.  [default: standard output]"
)
@click.option(
    "--force",
    is_flag=True,
    cls=OptionFor,
    needs=Need("out", why="nothing is written", hint="Name the file: --out FILE."),
    help="Replace the file.",
)
@common.json_option
def import_config(source: Path, program: str | None, out: Path | None, force: bool, as_json: bool) -> None:
    """Make a run's configuration of one of mlx-lm or Axolotl, and say what it does not carry over.

    FILE is mlx-lm's YAML (or the adapter_config.json that its runs leave), or Axolotl's. What its program takes for a
    key that it leaves out is written too. Comments at the top say what means something else here and what has no
    counterpart, each with the reason; those below say what each setting was made of.

    \b
    mlxtune import-config lora_config.yaml > mine.yaml
    mlxtune import-config qlora.yml --out mine.yaml
    mlxtune train -c mine.yaml --model model --data data --dry-run
    """
    from mlxtune_convert.files import json_text, new_file

    from mlxtune.config.imported import reading
    from mlxtune.errors import UserError

    if as_json and out is not None:
        raise UserError("--json and --out: the document goes to standard output", "Leave out one of them.")
    made = reading.read(source, program)
    if as_json:
        click.echo(json_text(made.to_json()))
        return
    text = made.to_yaml()
    if out is None and sys.stdout.isatty():
        for line in text.split("\n"):
            common.stdout().print(line, soft_wrap=True)
    elif out is None:
        click.echo(text, nl=False)
    else:
        with new_file(out, force, [source]) as file:
            file.write(text)
        common.stdout().print(f"{out}: {len(made.settings)} settings")
    common.note(
        f"{len(made.changed)} settings of {made.program} mean something else here and {len(made.without)} have no "
        "counterpart: the first lines say which, and why"
    )

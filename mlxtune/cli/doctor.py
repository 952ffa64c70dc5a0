"""mlxtune doctor."""

from __future__ import annotations

import json

import click

from mlxtune.cli import common


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def doctor(as_json: bool) -> None:
    """Say what this machine has, what mlxtune will use, and what is missing.

    \b
    mlxtune doctor
    """
    from rich.table import Table

    from mlxtune import diagnosis

    facts, advice = diagnosis.examine()
    if as_json:
        click.echo(json.dumps({"facts": facts, "advice": advice}))
        return
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(name, str(value))
    out = common.stdout()
    out.print(table)
    for line in advice:
        out.print(f"! {line}", style="yellow")
    if not advice:
        out.print("nothing is missing", style="green")

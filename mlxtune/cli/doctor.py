"""mlxtune doctor."""

from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.shown import shown_name

from mlxtune.cli import common

if TYPE_CHECKING:
    from rich.console import Console

    from mlxtune.selftest.outcome import Result


@click.command()
@click.option(
    "--test", is_flag=True, help="Also try what mlxtune computes on this device (in about a minute, offline)."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def doctor(test: bool, as_json: bool) -> None:
    """Say what this machine has, what mlxtune will use, and what is missing.

    --test makes a tiny model and checks with it, against the CPU, what a run would rest on here: MLX's kernels, every
    fast way in every type, training steps, a resume, each kind of export; and it times a step's parts. Where a check
    fails the exit status is 2; a bug report needs what --test --json prints.

    \b
    mlxtune doctor
    mlxtune doctor --test
    mlxtune doctor --test --json > report.json
    """
    from mlxtune.machine import diagnosis

    facts, advice = diagnosis.examine()
    document: dict[str, Any] = {"facts": facts, "advice": advice}
    out = common.stdout()
    if not as_json:
        _print_facts(out, facts, advice)
    results = []
    if test:
        results = _tested(None if as_json else out)
        document["checks"] = [result.to_json() for result in results]
    if as_json:
        click.echo(json.dumps(document))
    if test:
        _judge(out, results, quiet=as_json)


def _print_facts(out: Console, facts: dict[str, str], advice: list[str]) -> None:
    from rich.table import Table

    if out.soft_wrap:  # another program reads it: a fact is one line, however long
        for name, value in facts.items():
            out.print(f"{name:<24}{value}")
    else:
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(overflow="fold")  # a path is told whole, however narrow the terminal
        for name, value in facts.items():
            table.add_row(name, shown_name(value))
        out.print(table)
    for line in advice:
        out.print(f"! {line}", style="yellow")
    if not advice:
        out.print("nothing is missing", style="green")


def _tested(out: Console | None) -> list[Result]:
    """The results of all checks, each printed when it is there."""
    from mlxtune.selftest import examination

    found: list[Result] = []
    progress = out if out is not None and out.is_terminal else common.console()
    with (
        progress.status("starting") as status,
        closing(examination.results(lambda name: status.update(f"{name} ..."))) as results,
    ):
        for result in results:
            if out is not None:
                if not found or found[-1].group != result.group:
                    out.print()
                    out.print(result.group, style="bold")
                _print_result(out, result)
            found.append(result)
    return found


STYLES = {"ok": "green", "FAILED": "bold red", "not here": "dim", "measured": "cyan"}


def _print_result(out: Console, result: Result) -> None:
    from rich.padding import Padding
    from rich.text import Text

    line = Text(f"{result.status:<9}", style=STYLES[result.status]).append(f"{result.name:<41}", style="default")
    numbers = f"{result.shown():>9} {result.allowed():>8} {result.seconds:5.1f} s"
    out.print(line.append(result.said if result.status == "not here" else numbers, style="default"))
    if result.status == "FAILED" and result.said:
        if out.soft_wrap:  # where nothing is wrapped, rich cuts what is padded
            out.print(f"{'':9}{result.said}")
        else:
            out.print(Padding(Text(result.said), (0, 0, 0, 9), expand=False))


def _judge(out: Console, results: list[Result], quiet: bool) -> None:
    """Say how many passed. Raises UserError when one failed."""
    from mlxtune.errors import UserError
    from mlxtune.selftest.outcome import FAILED, NOT_HERE, OK, advice

    failed = [result for result in results if result.status == FAILED]
    counts = {status: sum(result.status == status for result in results) for status in (OK, NOT_HERE)}
    if failed:
        names = "; ".join(result.name for result in failed[:3]) + (" ..." if len(failed) > 3 else "")
        raise UserError(f"{len(failed)} of {counts[OK] + len(failed)} checks failed: {names}", advice(failed))
    if not quiet:
        total = sum(result.seconds for result in results)
        out.print()
        out.print(
            f"{counts[OK]} checks passed in {total:.0f} s, {counts[NOT_HERE]} have no place on this device",
            style="green",
        )

"""mlxtune make pairs."""

from __future__ import annotations

from pathlib import Path

import click
from mlxtune_convert.files import json_text, new_file, refuse_existing
from mlxtune_convert.shown import shown_name

from mlxtune.cli import common
from mlxtune.cli.options import Command, Need, OptionFor
from mlxtune.errors import UserError


@click.command("pairs", cls=Command)
@click.argument("evaluations", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="EVALUATION ...")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE.jsonl", help="The file of pairs.")
@click.option(
    "--by",
    type=click.Choice(["people", "judge", "checks"]),
    default="people",
    show_default=True,
    help="Who decided which answer is better.",
)
@click.option(
    "--rater",
    default="me",
    show_default=True,
    metavar="NAME",
    cls=OptionFor,
    needs=Need("by", ("people",), why="no person decides"),
    help="Whose ratings, of people.",
)
@common.force_option
@common.json_option
def pairs(evaluations: tuple[Path, ...], out: Path, by: str, rater: str, force: bool, as_json: bool) -> None:
    """Pairs for preference tuning, out of answers that were compared already.

    By people: what `mlxtune rate` was told of these evaluations; the best answer against the worst. By a judge: what it
    prefers in both orders. By checks: an answer that passes all of them against one that does not. Prompts of which
    nothing was decided give no pair. No model is loaded, and nobody is asked.

    \b
    mlxtune make pairs evals/first --out pairs.jsonl
    mlxtune make pairs evals/first evals/second --rater anna --out pairs.jsonl
    mlxtune make pairs evals/first --by judge --out pairs.jsonl
    """
    from mlxtune.evaluate.comparison.folder import Evaluation
    from mlxtune.make.pairs import made_of

    if out.suffix != ".jsonl":
        raise UserError(f"{out}: JSON Lines are written", "Give it a name that ends with .jsonl.")
    refuse_existing(out, force)
    found = made_of([Evaluation.read(path) for path in evaluations], by, rater)
    if not found.rows:
        reasons = ", ".join(f"{count:,} {why}" for why, count in found.left_out.most_common())
        raise UserError(f"no pair: {reasons}", "Rate more of them, or name who else decided: --by.")
    with new_file(out, force) as file:
        for row in found.rows:
            file.write(json_text(row) + "\n")
    if as_json:
        click.echo(json_text({"out": str(out), **found.as_json()}))
        return
    common.stdout().print(shown_name(f"{out}: {len(found.rows):,} pairs"), markup=False)
    for why, count in found.left_out.most_common():
        common.note(f"{count:,} prompts give no pair: {why}")
    common.note("the prompts of this suite are training data now: evaluate with another one")

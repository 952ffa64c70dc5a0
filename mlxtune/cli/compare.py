"""mlxtune compare."""

from __future__ import annotations

from pathlib import Path

import click
from mlxtune_convert.files import json_text

from mlxtune.cli import common, thumbs
from mlxtune.errors import UserError


@click.command()
@click.argument("evaluations", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="A B [C ...]")
@common.json_option
def compare(evaluations: tuple[Path, ...], as_json: bool) -> None:
    """Compare saved evaluations of one suite, prompt by prompt; no model is loaded.

    A, B, C: folders that `mlxtune eval --suite SUITE --out FOLDER` wrote. What was tuned is compared, or the base where
    nothing else was asked. Of two: the difference is B minus A. Of more: a ranking, with the share of wins to expect;
    by a judge's verdicts too, where one judge compared all of them with the same base.

    Of logs of chats (`mlxtune chat --log`): the share of thumbs up of each adapter.

    \b
    mlxtune compare evals/first evals/second
    mlxtune compare evals/first evals/second evals/third --json
    mlxtune compare chats.jsonl
    """
    from mlxtune.cli import comparison_table
    from mlxtune.evaluate.comparison import between
    from mlxtune.evaluate.comparison.folder import Evaluation

    places = [path.resolve() for path in evaluations]
    twice = [path for number, path in enumerate(evaluations) if places[number] in places[:number]]
    if twice:
        raise UserError(f"{twice[0]} is named twice", "Name each evaluation once.")
    if thumbs.are_logs(evaluations):
        thumbs.compare(evaluations, as_json)
        return
    if len(evaluations) < 2:
        raise UserError("one evaluation has nothing to be compared with", "Name two or more: mlxtune compare A B")
    result = between.compare([Evaluation.read(path) for path in evaluations])
    if as_json:
        click.echo(json_text(result))
    elif "ranking" in result:
        comparison_table.draw_ranking(common.stdout(), result)
    else:
        first, second = evaluations
        names = (first.name, second.name)
        if not all(names) or first.name == second.name:  # as of "." and of a/e1 beside b/e1
            names = (str(first), str(second))
        comparison_table.draw(common.stdout(), result, names)

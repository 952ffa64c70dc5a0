"""mlxtune eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxtune.cli import common, tuned

if TYPE_CHECKING:
    from rich.table import Table

    from mlxtune.evaluate.score import Score

REPORTED = ("loss", "perplexity", "accuracy", "tokens")  # fields of a score in --json


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

    tuned.run_settings(adapter, data, settings)  # a typing error is said before the model is read
    loaded = tuned.load_model(model, adapter)
    examples, config = tuned.held_out(loaded.tokenizer, loaded.path, adapter, data, settings, split)
    is_whole = data is not None and holdout.is_whole_file(data, split)
    label = split or ("all" if is_whole else "valid")
    for note in examples.notes(label, config.data.max_tokens):
        common.note(note)
    status = common.console().status("scoring")
    with status, switched_off(loaded.model):
        scores = {"base": score_examples(loaded, config, examples)}
    if adapter is not None:
        with status:
            scores["tuned"] = score_examples(loaded, config, examples)
    if as_json:
        document: dict[str, Any] = {"split": label, "rows": examples.rows, "examples": len(examples)}
        for name, score in scores.items():
            document[name] = {field: getattr(score, field) for field in REPORTED}
        click.echo(json.dumps(document))
    else:
        title = f"{examples.rows} rows{examples.also}, {scores['base'].tokens:,} tokens"
        common.stdout().print(score_table(scores, title))


def score_table(scores: dict[str, Score], title: str) -> Table:
    """A line for the base and, with an adapter, one for the tuned model."""
    from rich import box
    from rich.table import Table

    table = Table("", "loss", "perplexity", "token accuracy", title=title, box=box.SIMPLE, title_justify="left")
    for name, score in scores.items():
        table.add_row(name, f"{score.loss:.4f}", f"{score.perplexity:,.2f}", f"{score.accuracy:.1%}")
    return table

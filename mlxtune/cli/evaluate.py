"""mlxtune eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.files import json_text

from mlxtune.api import evaluating
from mlxtune.cli import benchmarks, common, pages, preferences, suites
from mlxtune.cli.benchmarks import benchmark_options
from mlxtune.cli.judging import judge_options
from mlxtune.cli.options import Command
from mlxtune.cli.suite_options import suite_options
from mlxtune.errors import UserError
from mlxtune.evaluate.engines.opening import kind_of

if TYPE_CHECKING:
    from rich.table import Table

    from mlxtune.config.resolve import Config
    from mlxtune.evaluate.score import Score

REPORTED = ("loss", "perplexity", "accuracy", "tokens")  # fields of a score in --json


@click.command("eval", cls=Command)
@common.model_of_run_option(
    "MLX folder, 16-bit HF folder, or hub id; with --suite also a server of this machine, as in "
    "http://127.0.0.1:8080/v1#model, or recorded answers: replay:FILE (replay:FILE#tuned of an evaluation's)."
)
@common.adapter_option()
@click.option(
    "--data",
    metavar="PATH",
    help="Folder, file or hub dataset id.  [default: the run's own, never fetched from the hub]",
)
@common.split_option("Which split of a folder.  [default: valid; a file: all rows]")
@suite_options
@judge_options
@benchmark_options
@common.json_option
@common.settings_option
def eval_command(
    model: str,
    adapter: Path | None,
    data: str | None,
    split: str | None,
    suite: Path | None,
    forgetting: str | None,
    safety: bool,
    as_json: bool,
    settings: tuple[str, ...],
    benchmark: str | None,
    benchmark_data: Path | None,
    limit: int | None,
    shots: int | None,
    fetch: bool,
    **of_suite: Any,
) -> None:
    """Score the base, and with --adapter the tuned model, on held-out rows; or, with --suite, by their answers.

    Without a suite: loss, perplexity and token accuracy over the tokens that training supervises.

    Of pairs (a chosen and a rejected answer to one prompt) it is how often each model finds the chosen answer likelier,
    how far the tuned one moved from the base (of a run that began with an adapter: from that one), and what of that
    chance would not do; of rated answers the like. --html writes it as a page.

    With a suite, both answer its prompts (a base and its adapter in the same batches), and its checks say what is
    right. Each difference comes with its interval, and is called better or worse only where chance is unlikely to give
    as much (p < 0.05 over all checks together). Exit status 3: a --min-better or --max-worse is not met.

    Beside the differences stands what went wrong, where something did: measured, with its threshold and the setting
    that is likely to mend it.

    A judge is examined first, on references against worse texts; one that fails gives no verdicts. It is asked about
    each pair in both orders. Gates may name it: --min-better judge=0.1 (wins minus losses), or a criterion of likert.

    With benchmarks, lm_eval's tasks are asked of both, with rows from a folder of this machine. Its package is an
    extra: pip install "mlxtune[harness]". What differs from a task as it is written, such as --shots, is said.

    \b
    mlxtune eval --model model --adapter run
    mlxtune eval --model model --data data --split test --json
    mlxtune eval --model model --adapter run --data pairs.jsonl --html page.html
    mlxtune eval --model model --adapter run --suite data/test.jsonl --out evals/first
    mlxtune eval --model model --adapter run --suite data/test.jsonl --out evals/second --html page.html
    mlxtune eval --model model --adapter run --suite data/test.jsonl --min-better json=0.1
    mlxtune eval --model tuned --against http://127.0.0.1:1234/v1#base --suite data/test.jsonl
    mlxtune eval --model model --adapter run --suite data/test.jsonl --judge judge-model --rate likert
    mlxtune eval --model model --adapter run --benchmark mmlu,gsm8k --benchmark-data bench --limit 500 --shots 5
    mlxtune eval --model model --adapter run --forgetting
    mlxtune eval --model model --adapter run --safety --judge judge-model
    """
    if benchmark is not None:
        for option, other in (("--forgetting", forgetting), ("--safety", safety)):
            if other:
                raise UserError(f"{option} and --benchmark are two evaluations", "Ask one, then the other.")
        names, folder = benchmarks.names_of(benchmark, benchmark_data)
        own_suite = benchmarks.suite_of(names, folder)
        if own_suite is None or suite is not None:
            context = click.get_current_context()
            benchmarks.refuse_idle(context, data, split, settings)
            common_options = ("against", "against_adapter", "out", "min_better", "max_worse", "seed", "html")
            wanted = {name: of_suite[name] for name in common_options}
            benchmarks.ask(
                benchmarks.WantedBenchmarks(
                    names, folder, limit, shots, fetch=fetch, model=model, adapter=adapter, **wanted
                ),
                as_json,
            )
            return
        suite = own_suite
        for option, value in (("--limit", limit), ("--shots", shots), ("--fetch", fetch)):
            if value:
                raise UserError(f"{option} has no effect with --benchmark {names[0]}: its own file is asked whole")
    asked = suites.chosen(suite, forgetting, safety, adapter)
    if asked is not None:
        name, suite = asked
        for option, given in (("--data", data), ("--split", split), ("--set", settings)):
            if given:
                raise UserError(
                    f"{option} has no effect with {name}: no loss is computed", "Leave it out, or run eval twice."
                )
        suites.ask(suites.Wanted(model=model, adapter=adapter, suite=suite, forgetting=forgetting, **of_suite), as_json)
        return
    if kind_of(model) != "model":
        raise UserError(
            f"--model {model} gives answers, no loss", "Name the prompts that it shall answer: --suite FILE."
        )
    html: Path | None = of_suite["html"]

    def before_model(config: Config) -> None:
        if html is not None:
            preferences.require_sides(config)
            pages.require_place(html)

    opened = evaluating.opened(model, adapter, data, split, settings, common.note, before_model)
    status = common.console().status("scoring")
    if opened.examples.kind != "supervised":
        with status:
            told = evaluating.preferences_of(opened)
        if html is not None:
            preferences.write_page(html, f"{adapter or model}", told)
        if as_json:
            click.echo(json_text(told))
        else:
            preferences.draw(common.stdout(), told)
        return
    if html is not None:
        raise preferences.no_page()
    with status:
        found = evaluating.scores_of(opened)
    scores = {"base": found.base}
    if found.tuned is not None:
        scores["tuned"] = found.tuned
    if as_json:
        document: dict[str, Any] = {"split": found.split, "rows": found.rows, "examples": found.examples}
        for name, score in scores.items():
            document[name] = {field: getattr(score, field) for field in REPORTED}
        click.echo(json.dumps(document))
    else:
        title = f"{found.rows} rows{found.also}, {scores['base'].tokens:,} tokens"
        common.stdout().print(score_table(scores, title))


def score_table(scores: dict[str, Score], title: str) -> Table:
    """A line for the base and, with an adapter, one for the tuned model."""
    from rich import box
    from rich.table import Table

    table = Table("", "loss", "perplexity", "token accuracy", title=title, box=box.SIMPLE, title_justify="left")
    for name, score in scores.items():
        table.add_row(name, f"{score.loss:.4f}", f"{score.perplexity:,.2f}", f"{score.accuracy:.1%}")
    return table

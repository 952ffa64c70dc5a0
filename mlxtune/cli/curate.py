"""mlxtune data curate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.files import json_text, refuse_existing
from mlxtune_convert.shown import shown_name

from mlxtune.cli import common
from mlxtune.cli.options import Command, Need, OptionFor
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from mlxtune.config.resolve import Config
    from mlxtune.make.curation.curate import Curation

WITH_JUDGE = Need("judge", why="nobody judges", hint="Name a judge: --judge MODEL.")
HEEDED = ("data.columns", "data.max_tokens", "data.template", "data.template_kwargs", "data.date")


@click.command(cls=Command)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--keep", type=click.IntRange(min=1), metavar="N", help="Rows to keep.  [default with --review: all]")
@common.model_option(required=False)
@click.option("--judge", metavar="JUDGE", help="A model or server that rates the answers, after an exam.")
@click.option(
    "--rubric",
    type=click.Path(path_type=Path),
    metavar="FILE",
    cls=OptionFor,
    needs=WITH_JUDGE,
    help="A text: what the judge is told to be good.",
)
@click.option("--anyway", is_flag=True, cls=OptionFor, needs=WITH_JUDGE, help="Ratings even of a judge that fails.")
@click.option("--allow-remote", is_flag=True, cls=OptionFor, needs=WITH_JUDGE, help="Rows may go to another machine.")
@click.option(
    "--most-alike",
    type=click.FloatRange(0, 1),
    default=0.7,
    show_default=True,
    help="Where two questions have more in common (ROUGE-L), one of them stays.",
)
@click.option("--of-one-file", type=click.IntRange(min=1), metavar="N", help="Rows of one FILE at most.")
@click.option("--review", is_flag=True, help="A person keeps, drops or edits each row in the terminal.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="OUT.jsonl", help="The rows kept.")
@click.option("--left-out", type=click.Path(path_type=Path), metavar="FILE.jsonl", help="The others, with the reason.")
@common.force_option
@common.json_option
@common.settings_option
def curate(
    files: tuple[Path, ...],
    keep: int | None,
    model: str | None,
    judge: str | None,
    rubric: Path | None,
    anyway: bool,
    allow_remote: bool,
    most_alike: float,
    of_one_file: int | None,
    review: bool,
    out: Path,
    left_out: Path | None,
    force: bool,
    as_json: bool,
    settings: tuple[str, ...],
) -> None:
    """Choose few good rows out of many.

    Each row is scored: by a judge, or by whether --model finds the answer likelier after its own question than after
    another row's (IFD). Kinds of instruction have equal shares, rows that ask the same stay once, and broken ones go.
    Scores are kept beside OUT.jsonl, so that another --keep computes none again.

    \b
    mlxtune data curate train.jsonl --keep 1000 --model model --out curated.jsonl
    mlxtune data curate a.jsonl b.jsonl --keep 500 --of-one-file 300 --model model --out curated.jsonl
    mlxtune data curate curated.jsonl --review --out reviewed.jsonl
    """
    from mlxtune.config import resolve
    from mlxtune.make.curation.choosing import Wanted
    from mlxtune.make.curation.curate import Curation

    common.refuse_idle(settings, "", but=HEEDED)
    if model is None and judge is None and not review:
        raise UserError(
            "nothing scores the rows", "Name a --model (its loss scores them), a --judge, or --review them yourself."
        )
    if keep is None and not review:
        raise UserError("--keep is missing", "Say how many rows are to stay: --keep 1000.")
    if review and as_json:
        raise UserError("--json has no effect with --review: a person is asked", "Leave out one of the two.")
    for place in (out, left_out):
        if place is not None:
            _require_new(place, force, files)
    if left_out == out:
        raise UserError("--left-out and --out are the same file", "Name two.")
    config = resolve.load(None, settings, {})
    curation = Curation.of(files, config.data.columns)
    wanted = Wanted(keep or len(curation.candidates), most_alike, of_one_file)
    _require_enough(curation, wanted, given=keep is not None)
    if model is not None:
        _score(curation, model, config, out)
    if judge is not None:
        _rate(curation, judge, rubric, anyway, allow_remote, out)
    if review:
        from mlxtune.cli import reviewing

        chosen = reviewing.chosen(common.stdout(), curation, wanted, _beside(out, "review"))
        if chosen is None:
            return
    else:
        chosen = curation.chosen(wanted, lambda candidate: candidate)
    report = curation.report(chosen, wanted)
    if not as_json:
        _draw(common.stdout(), report)
    curation.write(chosen, out, left_out, force)
    if as_json:
        click.echo(json_text(report))
    if not chosen.kept:
        where = "--left-out FILE names the rows" if left_out is None else f"{left_out} has the rows"
        raise UserError("no row is kept", f"Why is said above; {where}.")
    if not as_json:
        common.stdout().print(f"{shown_name(str(out))}: {len(chosen.kept):,} rows", soft_wrap=True)


def _require_new(place: Path, force: bool, files: Sequence[Path]) -> None:
    """Before anything is computed."""
    if place.suffix != ".jsonl":
        raise UserError(f"{place}: JSON Lines are written", "Give it a name that ends with .jsonl.")
    refuse_existing(place, force, files)


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.stem}.{what}.jsonl")


def _require_enough(curation: Curation, wanted: Any, given: bool) -> None:
    """Raise UserError for a number of rows that the files cannot give. given: whether it was named."""
    rows = len(curation.candidates)
    if wanted.keep > rows:
        raise UserError(f"--keep {wanted.keep}: there are {rows:,} different rows with an answer", "Keep fewer.")
    if wanted.of_one_file is None:
        return
    counts: dict[str, int] = {}
    for candidate in curation.candidates:
        counts[candidate.source] = counts.get(candidate.source, 0) + 1
    possible = sum(min(count, wanted.of_one_file) for count in counts.values())
    if given and possible < wanted.keep:
        raise UserError(
            f"--of-one-file {wanted.of_one_file} leaves {possible:,} rows of {len(counts)} files, --keep wants "
            f"{wanted.keep:,}",
            "Raise --of-one-file, or keep fewer.",
        )


def _score(curation: Curation, model: str, config: Config, out: Path) -> None:

    from mlxtune.data.template.choice import set_template
    from mlxtune.make.curation.ifd import Scorer
    from mlxtune.make.curation.scores_file import ScoresFile
    from mlxtune.model import load
    from mlxtune.train.identity import of_answering

    loaded = load.load(model)
    set_template(loaded.tokenizer, loaded.path, config.data.template)
    scorer = Scorer(loaded, config)
    of = {
        "model": of_answering(loaded.path),
        "template": str(loaded.tokenizer.chat_template),
        "template_kwargs": config.data.template_kwargs,
        "date": config.data.date,
        "max_tokens": config.data.max_tokens,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = ScoresFile(_beside(out, "scores"), of)
    with common.console().status("scoring") as status:

        def told(done: int, every: int) -> None:
            status.update(f"scoring: {done:,} of {every:,} rows")

        curation.score(scorer, kept, told)


def _rate(curation: Curation, judge: str, rubric: Path | None, anyway: bool, allow_remote: bool, out: Path) -> None:
    from mlxtune.cli.judging import judging
    from mlxtune.evaluate.engines.room import give_back
    from mlxtune.evaluate.judging.remembered import Remembered
    from mlxtune.make.curation import rating

    wanted = judging(judge, "likert", rubric, anyway, allow_remote, "", ())
    assert wanted is not None
    give_back()  # of the model that scored
    with common.console().status("the judge rates"):
        replies = Remembered(wanted.open(), _beside(out, "judge"), wanted.identity)
        curation.notes.append(rating.require_passed(replies, wanted.rubric, anyway))
        values = rating.ratings(replies, curation.candidates, wanted.rubric)
    curation.ratings = {one.key: value for one, value in zip(curation.candidates, values, strict=True)}
    curation.notes += replies.notes


def _draw(out: Console, report: Mapping[str, Any]) -> None:
    """Print what `Curation.report` says."""
    from rich.table import Table

    from mlxtune.make.curation.choosing import REASONS

    before, after = report["before"], report["after"]
    table = Table("", box=None, padding=(0, 2, 0, 0))
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for label, name in (
        ("rows", "rows"),
        ("words", "words"),
        ("tokens an epoch", "tokens"),
        ("of answers", "answer_tokens"),
    ):
        if name in before:
            table.add_row(label, f"{before[name]:,}", f"{after.get(name, 0):,}")
    if "ifd" in before:
        table.add_row("IFD: 10%, half, 90% below", *(_quantiles(one) for one in (before, after)))
    if report["border"] is not None:
        table.add_row("IFD: border of sound rows", f"{report['border']:.2f}", "")
    table.add_row("nearest other question", *(_likeness(one) for one in (before, after)))
    for part in ("kinds", "files"):
        for name, count in before[part].items():
            left = after.get(part, {}).get(name, 0)
            shares = (f"{_share(count, before['rows'])}", f"{_share(left, after['rows'])}")
            table.add_row(shown_name(f"  {name}"), *shares)
    out.print(table)
    for reason, count in report["left_out"].items():
        common.say(out, f"left out: {count:,} rows {REASONS[reason]}")
    for note in report["notes"]:
        common.note(note)


def _quantiles(figures: Mapping[str, Any]) -> str:
    return "  ".join(f"{value:.2f}" for value in figures.get("ifd", ()))


def _likeness(figures: Mapping[str, Any]) -> str:
    value = figures.get("likeness")
    return "" if value is None else f"ROUGE-L {value:.2f}"


def _share(count: int, rows: int) -> str:
    return f"{count:,} ({count / rows:.0%})" if rows else "0"

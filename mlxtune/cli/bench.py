"""mlxtune bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from mlxtune_convert.shown import brief
from mlxtune_convert.sizes import size

from mlxtune.cli import common
from mlxtune.cli.options import Command, Need, OptionFor
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from mlxtune.bench.figures import Measured
    from mlxtune.bench.parts import Thrown

DEMO = ("lora.rank=8", "lora.alpha=16")


@click.command(cls=Command)
@common.model_option(required=False)
@click.option("--data", metavar="PATH", help="Folder, file or hub dataset id.  [default: the demo's]")
@click.option(
    "--rows", type=click.IntRange(min=8), default=32, show_default=True, help="Training rows to measure with."
)
@click.option(
    "--against",
    type=click.Choice(["mlx-lm", "mlx-lm-checkpointed"]),
    help="Its trainer too, in turns: as it is by default, or with its checkpointing.",
)
@click.option(
    "--pairs",
    type=click.IntRange(min=5),
    cls=OptionFor,
    needs=Need("against", hint="Add --against mlx-lm."),
    help="Measurements of each.  [default: 5]",
)
@click.option("--parts", is_flag=True, help="Also with each part of the fast way switched: what it brings here.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@common.settings_option
def bench(
    model: str | None,
    data: str | None,
    rows: int,
    against: str | None,
    pairs: int | None,
    parts: bool,
    as_json: bool,
    settings: tuple[str, ...],
) -> None:
    """Measure speed and memory of training on this machine.

    Without --model and --data: the demo's model and rows. Supervised tuning is measured, no preferences. Memory is the
    peak over the model's own.

    mlx-lm runs as its users have it: its batches and padding, MLX's own limits of memory and cache, TF32 where MLX uses
    it (float32 on newer GPUs; mlxtune switches it off). The same for both: rows, rank, targets, activation type, and
    the macOS watchdog variable. On a GPU steps are timed when nothing is compiled any more; the first time through
    the same rows, as a run begins, is told in a line of its own.

    \b
    mlxtune bench
    mlxtune bench --model model --data data --parts
    mlxtune bench --model model --data data --against mlx-lm --set train.checkpoint_layers=all
    """
    import tempfile
    from dataclasses import asdict

    from mlxtune.bench import children
    from mlxtune.bench import parts as switched
    from mlxtune.bench.figures import OURS
    from mlxtune.config import resolve as configuration
    from mlxtune.demo import story
    from mlxtune.demo.model import fetch
    from mlxtune.model import convert

    console = common.console()
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            model = str(Path(folder) / "model")
            convert.convert(str(fetch()), Path(model), convert.Quantization.of(None, None, None))
        flags = {"model.path": model, "data.path": data or str(story.data_folder()), "train.epochs": 1.0}
        resolved = configuration.load(None, (*DEMO, *settings), flags)
        if isinstance(resolved.train.trunk_cache, int):
            raise UserError(
                f"train.trunk_cache {resolved.train.trunk_cache} has no effect: mlxtune bench trains one epoch, in "
                "which no row comes twice",
                "Leave it out here; mlxtune train takes it, with train.epochs of more than 1.",
            )
        if resolved.preference.loss:
            raise UserError(
                f"preference.loss {resolved.preference.loss} has no effect: mlxtune bench measures supervised tuning",
                "Leave it out here. How fast preferences are trained on, mlxtune train says in each step.",
            )
        ratio = None
        thrown: list[Thrown] = []
        if parts:
            thrown = switched.measure(resolved, rows, lambda line: console.print(line))
        if against is not None:
            found, ratio = children.compare(resolved, rows, pairs or 5, lambda line: console.print(line), against)
        elif thrown and thrown[0].measured:
            found = [thrown[0].measured]
        else:
            found = [children.measure(resolved, rows, OURS)]
    if as_json:
        measured = [asdict(one) for one in found]
        click.echo(json.dumps({"measured": measured, "ratio": ratio, "parts": [asdict(one) for one in thrown]}))
        return
    out = common.stdout()
    for who in dict.fromkeys(one.who for one in found):
        own = sorted((one for one in found if one.who == who), key=lambda one: one.seconds)
        _print(own[len(own) // 2])
    if thrown:
        _print_parts(thrown)
    if ratio is not None:
        out.print(
            f"time {ratio['time']:.2f} of {against}'s (single pairs {ratio['time_lowest']:.2f} to "
            f"{ratio['time_highest']:.2f}, {ratio['pairs']} pairs), peak memory {ratio['peak']:.2f} of its"
        )


def _print_parts(thrown: list[Thrown]) -> None:
    """A line for each switch: time for each token of the rows and peak memory, as multiples of those of the run as
    configured, and the share of the rows' tokens that is computed.
    """
    from rich.table import Table
    from rich.text import Text

    usual = [one.measured for one in thrown if one.measured and not one.setting]
    seconds = sum(one.seconds_per_token for one in usual) / len(usual)
    peak = max(one.peak_bytes for one in usual)
    table = Table.grid(padding=(0, 3))
    table.add_column(no_wrap=True)
    table.add_row("", "time", "peak memory", "computed")
    for one in thrown:
        name = Text(one.setting or "as configured")
        if one.measured is None:
            table.add_row(name, Text(brief(one.refused)))
            continue
        time = f"x {one.measured.seconds_per_token / seconds:.2f}"
        computed = f"{one.measured.processed / one.measured.tokens:.2f}"
        table.add_row(name, time, f"x {one.measured.peak_bytes / peak:.2f}", computed)
    common.stdout().print(table)


def _print(one: Measured) -> None:
    out = common.stdout()
    done = f"{one.rows} {one.unit}s in {one.steps} steps"
    out.print(f"{one.who} on {one.device}: {done}, {one.seconds_per_row:.3f} s per {one.unit}")
    out.print(
        f"  {one.steps / one.seconds:.3f} steps/s, {one.supervised / one.seconds:,.0f} supervised and "
        f"{one.processed / one.seconds:,.0f} processed tokens/s, padding {one.padding:.1%}"
    )
    out.print(
        f"  {one.tokens:,} tokens in the {one.unit}s, {one.processed:,} computed ({one.processed / one.tokens:.2f}), "
        f"{one.through_head:,} through the head ({one.through_head / one.tokens:.2f})"
    )
    out.print(f"  peak memory {size(one.peak_bytes)} over the model's {size(one.base_bytes)}")
    if one.first_seconds:
        what = f" ({one.traced} graphs compiled)" if one.traced else ""
        times = one.first_seconds / one.seconds
        out.print(f"  the first time through these rows took {times:.2f} times as long{what}")
    said = [f"{one.update:.1%} of the time in the optimizer's update"] if one.update else []
    if one.queued:  # else each part of a step is waited for by design
        said.append(f"a micro-batch waits for the device {one.waits:.1f} times")
    if said:
        out.print(f"  {', '.join(said)}")
    if one.computed:
        out.print(f"  {one.computed}")
        out.print(
            f"  work left out: {one.head_saved:.0%} by the head, {one.prefix_saved:.0%} by what begins alike; "
            f"{one.utilisation:.0%} of this machine's matrix product speed"
        )

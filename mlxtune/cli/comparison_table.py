"""How the result of an evaluation looks on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlxtune_convert.shown import shown_name

from mlxtune.cli import common

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COLOURS = {"better": "green", "worse": "red"}


def draw(out: Console, result: Mapping[str, Any], names: tuple[str, str] = ("base", "tuned")) -> None:
    """Print a document as `comparison.summary.document` makes it. names: of the two sides."""
    from mlxtune.evaluate.comparison.summary import UNCORRECTED, what_can_be_shown

    out.print(table_of(result["checks"], names, result["n"]))
    if any("verdict" in check for check in result["checks"].values()):
        common.say(out, what_can_be_shown(result))
        if len(result["checks"]) > 1:
            common.say(out, f"{UNCORRECTED}.")
    _say(result["notes"])


def table_of(checks: Mapping[str, Mapping[str, Any]], names: tuple[str, str], n: int = 0, of: str = "prompts") -> Table:
    """checks: as `comparison.summary.check_results` gives them; names: of the two sides; n: prompts of the suite, where
    a sentence says what these can show: what a check of fewer can show stands in a column; of: what is counted.
    """
    from mlxtune.evaluate.comparison.figures import interval, p_value, points, share, shows_from

    compared = any("verdict" in check for check in checks.values())
    table = _empty("check", of, names[0], *((names[1], "difference") if compared else ()), "95% interval")
    if compared:
        table.add_column("p", justify="right")
        table.add_column("verdict")
    has_fewer = any("verdict" in check and check["n"] < n for check in checks.values())
    if has_fewer:
        table.add_column("shows from", justify="right")
    for name, check in checks.items():
        cells = [shown_name(name), str(check["n"]), share(check, check["base"])]
        if "verdict" in check:
            cells += [share(check, check["tuned"]), points(check, check["difference"]), interval(check)]
            cells += [p_value(check["p"]), _coloured(check["verdict"])]
            if has_fewer:
                cells.append(shows_from(check))
        else:
            cells += [*[""] * (2 * compared), interval(check)]
        table.add_row(*cells)
    return table


def draw_ranking(out: Console, result: Mapping[str, Any]) -> None:
    """Print what `comparison.between.compare` says of more than two evaluations."""
    checks = list(result["ranking"][0]["checks"])
    table = _empty("evaluation", "wins to expect", "95% interval", "wins", *(shown_name(name) for name in checks))
    for entry in result["ranking"]:
        low, high = entry["interval"]
        means = [f"{entry['checks'][name]:.3f}" for name in checks]
        wins = f"{entry['wins']:g}"
        table.add_row(
            shown_name(entry["evaluation"]), f"{entry['share']:.1%}", f"{low:.1%} to {high:.1%}", wins, *means
        )
    out.print(table)
    common.say(
        out,
        f"Each pair on {result['n']} prompts: who scores higher on more checks wins; a tie is half a win for both. "
        "Shares by Bradley and Terry, intervals over prompts drawn again.",
    )
    if result["by_judge"]:
        out.print("By the judge, each compared with the base:")
        judged = _empty("evaluation", "wins to expect", "95% interval", "wins")
        for entry in result["by_judge"]:
            low, high = entry["interval"]
            interval = f"{low:.1%} to {high:.1%}"
            judged.add_row(shown_name(entry["evaluation"]), f"{entry['share']:.1%}", interval, f"{entry['wins']:g}")
        out.print(judged)
    _say(result["notes"])


def _empty(first: str, *numbers: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(first)
    for name in numbers:
        table.add_column(shown_name(name), justify="right")
    return table


def _say(notes: Sequence[str]) -> None:
    for note in notes:
        common.note(str(note))


def _coloured(verdict: str) -> Any:
    from rich.text import Text

    return Text(verdict, style=COLOURS.get(verdict, ""))

"""How `mlxtune data check` looks on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlxtune_convert.shown import shown_name

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
BAR = 40  # width of the longest bar
NAMED = 8  # rows and reasons that a finding names


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str], Callable[[int], None]]]:
    """Yields a function: the name of a file -> what takes the number of its rows read so far."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,.0f} rows"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:

        def begin(name: str) -> Callable[[int], None]:
            task = bars.add_task(shown_name(name), total=None)
            return lambda rows: bars.update(task, completed=rows)

        yield begin


def draw(out: Console, told: dict[str, Any]) -> None:
    from rich.text import Text

    for name, facts in told["splits"].items():
        _draw_split(out, name, facts)
    if not told["findings"]:
        out.print(Text("No findings.", style="green"))
    for finding in told["findings"]:
        more = ", ..." if finding["count"] > NAMED and finding["rows"] else ""
        rows = ", ".join(map(shown_name, finding["rows"][:NAMED])) + more
        line = Text(f"{finding['severity']}: ", style=COLOURS[finding["severity"]])
        what = finding["what"].replace("rows", "row", 1) if finding["count"] == 1 else finding["what"]
        line.append(shown_name(f"{finding['split']}: {finding['count']:,} {what}"), style="default")
        kind = "" if finding["code"] == "unused" else "rows "  # of files
        out.print(line + Text(f" ({kind}{rows})" if rows else "", style="dim"))
        for reason, count in list(finding.get("reasons", {}).items())[:NAMED]:
            out.print(Text(f"    {count:,} x {shown_name(reason)}", style="dim"))
        out.print(Text(f"    -> {shown_name(finding['fix'])}", style="green"))


def _draw_split(out: Console, name: str, facts: dict[str, Any]) -> None:
    from rich.text import Text

    from mlxtune.data.chat.turn_kinds import Expansion, kind_lines

    lengths = facts["lengths"]
    out.print(Text(shown_name(f"{name}: {facts['file']}"), style="bold"))
    share = facts["supervised_tokens"] / facts["tokens"] if facts["tokens"] else 0.0
    lines = {
        "rows": f"{facts['rows']:,} ({_counts(facts['formats'])})",
        "outcome": _counts(facts["outcomes"]),
        "tokens": f"{facts['tokens']:,} per epoch, {share:.0%} of them trained on; {facts['steps_per_epoch']:,} steps",
        "as asked": Expansion(**facts["conversations"]).line(),
        "roles": _counts(facts["roles"]),
        "answers per row": _counts(facts["answers_per_row"]),
        "system prompts": f"{facts['system_prompts']['distinct']:,} distinct, "
        f"{facts['system_prompts']['rows_without']:,} rows without",
        "asks to": _counts(facts["tasks"]),
        "hardly asks to": ", ".join(facts["tasks_missing"]),
        "scripts": _counts(facts["scripts"]),
        "shared prefix": f"{facts['shared_prefix_tokens']:,} tokens begin every example; running them once saves "
        f"{facts['shared_prefix_saves']:.0%} of the tokens",
    }
    for label, value in lines.items():
        if value:
            out.print(Text(f"  {label:16}", style="dim") + Text(shown_name(value)))
    for line in kind_lines(*({kind: told[key] for kind, told in facts["turns"].items()} for key in ("count", "rows"))):
        out.print(Text(f"    {shown_name(line)}", style="yellow"))
    cut = f"{lengths['cut_share']:.1%} of the examples are longer than data.max_tokens {lengths['max_tokens']:,}"
    longest = f"; data.max_tokens={lengths['longest']} would cut none" if lengths["cut_share"] else ""
    out.print(Text("  length in tokens", style="dim") + Text(f" {cut}{longest}"))
    most = max((count for _, _, count in lengths["histogram"]), default=1)
    for low, high, count in lengths["histogram"]:
        bar = "█" * round(BAR * count / most) or ("▏" if count else "")
        style = "red" if low >= lengths["max_tokens"] else "green"
        out.print(Text(f"  {low:>8,}-{high:<8,} ", style="dim") + Text(f"{bar} {count:,}", style=style))
    out.print()


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())

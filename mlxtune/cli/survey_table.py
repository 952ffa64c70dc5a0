"""How `mlxtune data check` looks on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlxtune_convert.shown import shown_name

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
BAR = 40  # width of the longest bar, where the terminal has room for it
BESIDE_BARS = 20 + 10 + 14  # columns for what stands beside a bar: the bin, the number, the name of the limit
NARROWEST = 8  # width of the longest bar at least
NAMED = 8  # rows and reasons that a finding names


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int], None]]:
    """Yields a function that takes the name of a file and the number of its rows read so far; each has a bar."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,.0f} rows"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def show(name: str, rows: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(shown_name(name), total=None)
            bars.update(tasks[name], completed=rows)

        yield show


def draw(out: Console, report: dict[str, Any]) -> None:
    """Print a report as `data.survey.report` makes it."""
    from rich.text import Text

    for name, facts in report["splits"].items():
        out.print(Text(shown_name(f"{name}: {facts['file']}"), style="bold"))
        _draw_counts(out, facts)
        draw_lengths(out, facts["lengths"])
        out.print()
    if not report["findings"]:
        out.print(Text("No findings.", style="green"))
    for finding in report["findings"]:
        _draw_finding(out, finding)


def _draw_finding(out: Console, finding: dict[str, Any]) -> None:
    from rich.text import Text

    from mlxtune.data.survey.lint import counted

    severity, count = finding["severity"], finding["count"]
    line = Text(f"{severity}: ", style=COLOURS[severity])
    line.append(shown_name(f"{finding['split']}: {counted(count, finding['what'])}"), style="default")
    if finding["rows"]:
        named = ", ".join(map(shown_name, finding["rows"][:NAMED]))
        if count > NAMED:
            named += ", ..."
        kind = "" if finding["code"] == "unused" else "rows "  # of files
        line += Text(f" ({kind}{named})", style="dim")
    out.print(line)
    for reason, times in list(finding.get("reasons", {}).items())[:NAMED]:
        out.print(Text(f"    {times:,} x {shown_name(reason)}", style="dim"))
    out.print(Text(f"    -> {shown_name(finding['fix'])}", style="green"))


def _draw_counts(out: Console, facts: dict[str, Any]) -> None:
    """A line for each thing that is counted in a split, but for those of which there is nothing."""
    from rich.text import Text

    from mlxtune.data.chat.turn_kinds import Expansion, kind_lines
    from mlxtune.data.survey.preferences import preference_lines

    share = facts["supervised_tokens"] / facts["tokens"] if facts["tokens"] else 0.0
    systems = facts["system_prompts"]
    held_out = f" ({facts['held_out']:,} rows are held out)" if facts["held_out"] else ""
    lines = {
        "rows": f"{facts['rows']:,} ({_counts(facts['formats'])})",
        "outcome": _counts(facts["outcomes"]),
        "tokens": f"{facts['tokens']:,} per epoch, {share:.0%} of them trained on; "
        f"{facts['steps_per_epoch']:,} steps{held_out}",
        "as asked": Expansion(**facts["conversations"]).line(),
        "roles": _counts(facts["roles"]),
        "answers per row": _counts(facts["answers_per_row"]),
        "system prompts": f"{systems['distinct']:,} distinct, {systems['rows_without']:,} rows without",
        "asks to": _counts(facts["tasks"]),
        "hardly asks to": ", ".join(facts["tasks_missing"]),
        "kinds": _counts(facts["kinds"]),
        "style": style_line(facts["style"]),
        "made": made_line(facts["made"], facts["rows"]),
        **preference_lines(facts["preferences"]),
        "scripts": _counts(facts["scripts"]),
        "shared prefix": f"{facts['shared_prefix_tokens']:,} tokens begin every example; running them once saves "
        f"{facts['shared_prefix_saves']:.0%} of the tokens",
    }
    for label, value in lines.items():
        if value:
            out.print(Text(f"  {label:16}", style="dim") + Text(shown_name(value)))
    counts = {kind: turns["count"] for kind, turns in facts["turns"].items()}
    rows = {kind: turns["rows"] for kind, turns in facts["turns"].items()}
    for line in kind_lines(counts, rows):
        out.print(Text(f"    {shown_name(line)}", style="yellow"))


def draw_lengths(out: Console, lengths: dict[str, Any]) -> None:
    """How long the examples are. Bars of examples that are cut are red, and thinner; the bin of the limit is named."""
    from rich.text import Text

    limit = lengths["max_tokens"]
    line = f" {lengths['cut_share']:.1%} of the examples are longer than data.max_tokens {limit:,}"
    if lengths["cut_share"]:
        line += f"; data.max_tokens={lengths['longest']} would cut none"
    out.print(Text("  length in tokens", style="dim") + Text(line))
    most = max((count for _, _, count in lengths["histogram"]), default=1)
    widest = min(BAR, max(NARROWEST, out.width - BESIDE_BARS)) if out.is_terminal else BAR
    whole, cut, few = ("#", "%", "|") if out.options.ascii_only else ("█", "▒", "▏")
    for low, high, count in lengths["histogram"]:
        is_cut = low > limit
        bar = (cut if is_cut else whole) * round(widest * count / most)
        if count and not bar:
            bar = few
        named = " <- max_tokens" if low <= limit <= high else ""
        bin_ = Text(f"  {low:>8,}-{high:<8,} ", style="dim")
        out.print(bin_ + Text(f"{bar} {count:,}", style="red" if is_cut else "green") + Text(named, style="dim"))


def style_line(style: dict[str, Any]) -> str:
    """How conversations are written, for people; "" where there are none."""
    if not style:
        return ""
    words = style["answer_words"]
    return (
        f"{style['questions']:.0%} begin with a question, {style['markdown']:.0%} of the answers have Markdown, "
        f"half of them {words['25']:,} to {words['75']:,} words"
    )


def made_line(made: dict[str, int], rows: int) -> str:
    """How many rows were made, and how; "" for none."""
    if not made:
        return ""
    return f"{sum(made.values()):,} of {rows:,} rows ({_counts(made)})"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())

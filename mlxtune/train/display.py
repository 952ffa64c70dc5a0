"""Events drawn on a terminal, or printed as plain lines where there is none. Everything goes to standard error."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import fmean
from types import TracebackType

from mlxtune_convert.shown import shown_name
from mlxtune_convert.sizes import size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from mlxtune.train.events import Event

PLAIN_SECONDS = 5.0  # between two plain lines


def duration(seconds: float) -> str:
    """2:05:09 or 5:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Meter:
    """The numbers of a run in progress, from its events. `clock` gives seconds; eval_every: 0: only at the end."""

    def __init__(self, steps: int, eval_every: int = 0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last = clock()
        self._seconds: dict[str, list[float]] = {"train": [], "eval": [], "checkpoint": []}
        self.steps, self.eval_every, self.step = steps, eval_every, 0
        self.loss: float | None = None
        self.valid: list[float] = []
        self.lr = 0.0
        self.tokens_per_second = 0.0
        self.peak_bytes = 0

    def update(self, event: Event) -> None:
        now = self._clock()
        if event["kind"] in self._seconds:
            self._seconds[event["kind"]].append(now - self._last)
            self._last = now
        if event["kind"] == "train":
            self.step, self.lr, self.peak_bytes = event["step"], event["lr"], event["peak_bytes"]
            # A running mean: single steps differ by their rows more than by what was learned.
            self.loss = event["loss"] if self.loss is None else 0.8 * self.loss + 0.2 * event["loss"]
            rate = event["tokens"] / max(event["seconds"], 1e-9)
            self.tokens_per_second = rate if not self.tokens_per_second else 0.8 * self.tokens_per_second + 0.2 * rate
        elif event["kind"] == "eval" and event["loss"] is not None:
            self.valid.append(event["loss"])

    def eta_seconds(self) -> float | None:
        """Time left: of steps, evaluations and checkpoints as many as are still to come, each as long as it took on
        average so far. The first step does not count once there are others: it compiles, and fills caches.
        """
        took, left = self._seconds["train"], self.steps - self.step
        if not took:
            return None
        a_step = fmean(took[1:] or took) + sum(self._seconds["checkpoint"]) / len(took)
        evaluations = 1
        if self.eval_every:
            evaluations = -(-self.steps // self.eval_every) - self.step // self.eval_every
        an_evaluation = fmean(self._seconds["eval"]) if self._seconds["eval"] else 0.0
        return left * a_step + (evaluations * an_evaluation if left else 0.0)

    def clock_now(self) -> float:
        return self._clock()

    def fields(self) -> list[tuple[str, str]]:
        eta = self.eta_seconds()
        out = [("step", f"{self.step}/{self.steps}")]
        if self.loss is not None:
            out.append(("loss", f"{self.loss:.4f}"))
        if self.valid:
            first = f" (was {self.valid[0]:.4f})" if len(self.valid) > 1 else ""
            out.append(("valid loss", f"{self.valid[-1]:.4f}{first}"))
        if self.tokens_per_second:
            out += [
                ("tokens/s", f"{self.tokens_per_second:,.0f}"),
                ("lr", f"{self.lr:.2e}"),
                ("peak memory", size(self.peak_bytes)),
            ]
        if eta is not None:
            out.append(("left", duration(eta)))
        return out


class Display:
    """A listener for a run's events. Use as a context manager around the run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.meter: Meter | None = None
        self._live: Live | None = None
        self._status: Status | None = None
        self._doing = ""
        self._progress = Progress(
            TextColumn("training"), BarColumn(bar_width=None), TextColumn("{task.percentage:>3.0f}%")
        )
        self._task: TaskID | None = None
        self._last_line = 0.0

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
        if self._live is not None:
            self._live.stop()
            self._live = None

    def reading(self, source: str, rows: int) -> None:
        """Rows of a data file that were tokenized so far."""
        now = time.perf_counter()
        if now - self._last_line >= PLAIN_SECONDS:
            if self._last_line:
                self.console.print(f"{source}: {rows:,} rows read", soft_wrap=True)
            self._last_line = now

    def doing(self, what: str) -> None:
        """What goes on before the first step and may last: on a terminal shown until the run begins, else a line."""
        if what == self._doing:
            return
        self._doing = what
        if not self.console.is_terminal:
            self.console.print(what, soft_wrap=True)
        elif self._status is None:
            self._status = self.console.status(what)
            self._status.start()
        else:
            self._status.update(what)

    def begin(self, steps: int, eval_every: int) -> None:
        self._stop()
        self.meter = Meter(steps, eval_every)
        if self.console.is_terminal:
            self._task = self._progress.add_task("", total=steps)
            self._live = Live(self._draw(), console=self.console, refresh_per_second=4)
            self._live.start()

    def __call__(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "note":
            self.console.print(Text(f"note: {shown_name(event['text'])}", style="yellow"), soft_wrap=True)
        elif kind == "end":
            self._stop()
        if self.meter is None:
            return
        self.meter.update(event)
        for sample in event.get("samples", ()):
            self.console.print(Text(f"  {sample['prompt']!r}: {sample['answer']!r}", style="dim"), soft_wrap=True)
        if self._live is not None and self._task is not None:
            self._progress.update(self._task, completed=self.meter.step)
            self._live.update(self._draw())
        elif kind == "eval" and event["loss"] is not None:
            self.console.print(
                f"step {event['step']}: validation loss {event['loss']:.4f} ({event['tokens']:,} tokens)"
            )
        elif kind == "train":
            self._print_sometimes()

    def _print_sometimes(self) -> None:
        assert self.meter is not None
        now = self.meter.clock_now()
        if now - self._last_line >= PLAIN_SECONDS or self.meter.step == self.meter.steps:
            self._last_line = now
            self.console.print("  ".join(f"{name} {value}" for name, value in self.meter.fields()), soft_wrap=True)

    def _draw(self) -> RenderableType:
        assert self.meter is not None
        table = Table.grid(padding=(0, 3))
        fields = self.meter.fields()
        table.add_row(*(Text(name, style="dim") for name, _ in fields))
        table.add_row(*(Text(value, style="bold") for _, value in fields))
        return Group(self._progress, table)

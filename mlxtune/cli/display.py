"""Events drawn on a terminal, or printed as plain lines where there is none. Everything goes to standard error."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import fmean
from types import TracebackType

from mlxtune_convert.shown import brief
from mlxtune_convert.sizes import size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from mlxtune.cli.common import say
from mlxtune.cli.sparkline import Sparkline
from mlxtune.durations import clock
from mlxtune.train.events import Event

PLAIN_SECONDS = 5.0  # between two plain lines
MUCH_COMPUTED = 0.95  # of the rows' tokens: a run that computes more saves nothing that is worth a word
SHOWN_ROWS = 3  # of a suite, after an evaluation
CURVE_NAME = "loss of the steps  "
CURVE, LEAST_CURVE = 60, 8  # columns of the curve of losses: at most, and at least
OLD = 0.8  # of a running mean: the share of what it was before


class Meter:
    """The numbers of a run in progress, from its events."""

    def __init__(self, steps: int, eval_every: int = 0, clock: Callable[[], float] = time.perf_counter) -> None:
        """steps: of the plan; eval_every: steps from one evaluation to the next, 0: only at the end; clock: gives
        seconds.
        """
        self._clock = clock
        self._last = clock()  # when the last step, evaluation or checkpoint ended
        # How many seconds each of them took, in their order.
        self._seconds: dict[str, list[float]] = {"train": [], "eval": [], "checkpoint": []}
        self.steps, self.eval_every, self.step = steps, eval_every, 0
        self.loss: float | None = None  # a running mean; None: no step was taken
        self.losses = Sparkline()  # of all steps
        self.valid: list[float] = []  # validation losses that are finite
        self.told_apart: list[float] = []  # of preferences: the accuracy on held-out rows
        self.margin: float | None = None  # of preferences: a running mean; None: no step was taken, or it is none
        self.accuracy: float | None = None  # the same
        self.lr = 0.0
        self.tokens_per_second = 0.0  # of the rows; a running mean; 0: no step was taken
        self.tokens = self.computed_tokens = 0  # of the rows, and those that went through the model, of all steps
        self.baseline_tokens = 0  # that went through it beside these, for kto's baseline
        self.peak_bytes = 0

    def update(self, event: Event) -> None:
        """Take in an event, of any kind."""
        kind = event["kind"]
        now = self._clock()
        if kind in self._seconds:
            self._seconds[kind].append(now - self._last)
            self._last = now
        if kind == "train":
            self._add_step(event)
        elif kind == "eval" and event["loss"] is not None:
            self.valid.append(event["loss"])
            if event.get("accuracy") is not None:
                self.told_apart.append(event["accuracy"])

    def _add_step(self, event: Event) -> None:
        self.step, self.lr, self.peak_bytes = event["step"], event["lr"], event["peak_bytes"]
        self.losses.add(event["loss"])
        self.margin = _running(self.margin, event.get("margin"))
        self.accuracy = _running(self.accuracy, event.get("accuracy"))
        rate = event["tokens"] / max(event["seconds"], 1e-9)
        self.tokens += event["tokens"]
        self.computed_tokens += event["computed_tokens"]
        self.baseline_tokens += event.get("baseline_tokens", 0)
        if self.loss is None:
            self.loss, self.tokens_per_second = event["loss"], rate
            return
        # Running means: single steps differ by their rows more than by what was learned.
        self.loss = OLD * self.loss + (1 - OLD) * event["loss"]
        self.tokens_per_second = OLD * self.tokens_per_second + (1 - OLD) * rate

    @property
    def saved(self) -> str:
        """How much was computed of the rows' tokens, for people; "": nearly all, or more."""
        if self.computed_tokens >= MUCH_COMPUTED * self.tokens:
            return ""
        said = f"{self.computed_tokens / self.tokens:.2f} of the tokens"
        if self.baseline_tokens:
            said += f" and {self.baseline_tokens / self.tokens:.2f} for the baseline"
        return said

    def eta_seconds(self) -> float | None:
        """Time left: of steps, evaluations and checkpoints as many as are still to come, each as long as it took on
        average so far. The first step does not count once there are others: it compiles, and fills caches.
        """
        took = self._seconds["train"]
        left = self.steps - self.step
        if not took:
            return None
        if not left:
            return 0.0
        a_step = fmean(took[1:] or took) + sum(self._seconds["checkpoint"]) / len(took)
        evaluations = 1
        if self.eval_every:
            all_of_them = -(-self.steps // self.eval_every)  # rounded up: there is one after the last step
            evaluations = all_of_them - self.step // self.eval_every
        an_evaluation = fmean(self._seconds["eval"]) if self._seconds["eval"] else 0.0
        return left * a_step + evaluations * an_evaluation

    def clock_now(self) -> float:
        """Seconds, by the meter's own clock."""
        return self._clock()

    def fields(self) -> list[tuple[str, str]]:
        """(name, value) of each number that is known, for people."""
        eta = self.eta_seconds()
        out = [("step", f"{self.step}/{self.steps}")]
        if self.loss is not None:
            out.append(("loss", f"{self.loss:.4f}"))
        if self.margin is not None:
            out.append(("margin", f"{self.margin:.3f}"))
        if self.accuracy is not None:
            out.append(("accuracy", f"{self.accuracy:.0%}"))
        if self.valid:
            first = f" (was {self.valid[0]:.4f})" if len(self.valid) > 1 else ""
            out.append(("valid loss", f"{self.valid[-1]:.4f}{first}"))
        if self.told_apart:
            out.append(("valid accuracy", f"{self.told_apart[-1]:.0%}"))
        if self.tokens_per_second:
            out += [
                ("tokens/s", f"{self.tokens_per_second:,.0f}"),
                *([("computed", self.saved)] if self.saved else []),
                ("lr", f"{self.lr:.2e}"),
                ("peak memory", size(self.peak_bytes)),
            ]
        if eta is not None:
            out.append(("left", clock(eta)))
        return out


class Display:
    """A listener for a run's events. Use as a context manager around the run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.meter: Meter | None = None  # None: the first step does not follow yet
        self._live: Live | None = None  # the numbers, drawn anew in one place; None: this is no terminal
        self._status: Status | None = None  # what goes on before the first step, on a terminal
        self._doing = ""  # the same as a line
        self._progress = Progress(
            TextColumn("training"), BarColumn(bar_width=None), TextColumn("{task.percentage:>3.0f}%")
        )
        self._task: TaskID | None = None
        self._last_line = 0.0  # when the last plain line was printed, in seconds of the clock; 0: never

    @property
    def saved(self) -> str:
        """What was computed of the rows' tokens, for people; "": all of them, or no step was taken."""
        if self.meter is None or not self.meter.saved:
            return ""
        return f"computed {self.meter.saved}"

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def __call__(self, event: Event) -> None:
        """Show an event, of any kind."""
        kind = event["kind"]
        if kind == "reading":
            self._show_reading(event["source"], event["rows"])
        elif kind == "doing":
            self._show_doing(event["what"])
        elif kind == "start":
            self._start(event["steps"], event["eval_every"])
        elif kind == "note":
            say(self.console, f"note: {brief(event['text'])}", style="yellow")
        elif kind == "end":
            self._stop()
        if self.meter is not None:
            self._show_numbers(self.meter, event)

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show_reading(self, source: str, rows: int) -> None:
        """How far a long file is read; of a short one nothing."""
        now = time.perf_counter()
        if now - self._last_line < PLAIN_SECONDS:
            return
        if self._last_line:
            say(self.console, f"{source}: {rows:,} rows read")
        self._last_line = now

    def _show_doing(self, what: str) -> None:
        """On a terminal until the run begins, else as a line."""
        if what == self._doing:
            return
        self._doing = what
        if not self.console.is_terminal:
            say(self.console, what)
        elif self._status is None:
            self._status = self.console.status(what)
            self._status.start()
        else:
            self._status.update(what)

    def _start(self, steps: int, eval_every: int) -> None:
        self._stop()
        self.meter = Meter(steps, eval_every)
        if self.console.is_terminal:
            self._task = self._progress.add_task("", total=steps)
            self._live = Live(self._draw(), console=self.console, refresh_per_second=4)
            self._live.start()

    def _show_numbers(self, meter: Meter, event: Event) -> None:
        meter.update(event)
        samples = event.get("samples", ())
        # Prompts that the configuration lists were chosen to be looked at; a suite may have hundreds.
        shown = samples[:SHOWN_ROWS] if "checks" in event else samples
        if shown:
            self.console.print(Text(f"  answers after step {event['step']}:", style="dim"))
        for sample in shown:
            say(self.console, f"  {sample['prompt']!r}: {sample['answer']!r}", style="dim")
        if len(samples) > len(shown):
            self.console.print(Text(f"  and {len(samples) - len(shown)} more in events.jsonl", style="dim"))
        if event.get("cut"):
            self.console.print(Text(f"  {event['cut']} of {len(samples)} answers were cut"))
        if checks := event.get("checks"):
            said = ", ".join(f"{name} {value:.1%}" for name, value in checks.items())
            say(self.console, f"  {said}")
        if self._live is not None and self._task is not None:
            self._progress.update(self._task, completed=meter.step)
            self._live.update(self._draw())
        elif event["kind"] == "eval" and event["loss"] is not None:
            text = f"step {event['step']}: validation loss {event['loss']:.4f} ({event['tokens']:,} tokens)"
            if event.get("accuracy") is not None:
                text += f", accuracy {event['accuracy']:.1%}"
            self.console.print(text)
        elif event["kind"] == "train":
            self._print_sometimes()

    def _print_sometimes(self) -> None:
        assert self.meter is not None
        now = self.meter.clock_now()
        if now - self._last_line >= PLAIN_SECONDS or self.meter.step == self.meter.steps:
            self._last_line = now
            say(self.console, "  ".join(f"{name} {value}" for name, value in self.meter.fields()))

    def _draw(self) -> RenderableType:
        assert self.meter is not None
        parts: list[RenderableType] = [self._progress, _numbers(self.meter.fields(), self.console.width)]
        curve = self._curve()
        return Group(*parts, curve) if curve is not None else Group(*parts)

    def _curve(self) -> Text | None:
        """The losses of all steps so far as a small curve; None before there are two, and where there is no room, or
        the terminal has no letters for it.
        """
        assert self.meter is not None
        if self.console.options.ascii_only:
            return None
        room = min(CURVE, self.console.width - len(CURVE_NAME))
        bars = self.meter.losses.text(room) if room >= LEAST_CURVE else ""
        return Text(CURVE_NAME, style="dim") + Text(bars, style="bold") if bars else None


def _running(mean: float | None, value: float | None) -> float | None:
    """The running mean with one more value. None: there is no value yet, or none this time."""
    if value is None:
        return mean
    return value if mean is None else OLD * mean + (1 - OLD) * value


def _numbers(fields: list[tuple[str, str]], width: int) -> Table:
    """Names above their values; on a terminal that is too narrow for it each value beside its name."""
    gap = 3
    table = Table.grid(padding=(0, gap))
    needed = sum(max(len(name), len(value)) + gap for name, value in fields)
    if needed <= width:
        table.add_row(*(Text(name, style="dim") for name, _ in fields))
        table.add_row(*(Text(value, style="bold") for _, value in fields))
        return table
    for name, value in fields:
        table.add_row(Text(name, style="dim"), Text(value, style="bold"))
    return table

"""What people see of a run: plain lines where there is no terminal, a time left that is right."""

from __future__ import annotations

import io
import math
import random
import re
import sys
from typing import Any

import click
import numpy as np
import pytest
from rich.console import Console

from mlxtune import cli
from mlxtune.cli.display import Display, Meter
from mlxtune.cli.sparkline import BARS, Sparkline
from mlxtune.durations import clock


def step(number: int, **fields: float) -> dict:
    return {
        "kind": "train",
        "step": number,
        "loss": 2.0,
        "lr": 1e-4,
        "tokens": 100,
        "computed_tokens": 98,
        "seconds": 0.5,
        "peak_bytes": 1 << 30,
        **fields,
    }


@pytest.mark.parametrize("first", [1, 51])
def test_the_time_left_is_right_from_the_first_steps_on(first: int) -> None:
    """A fake clock: every step takes 3 seconds, evaluation included; also when a run is resumed in the middle."""
    now = [0.0]
    meter = Meter(steps=100, clock=lambda: now[0])
    assert meter.eta_seconds() is None
    for number in range(first, first + 10):
        now[0] += 3.0
        meter.update(step(number))
    assert meter.eta_seconds() == pytest.approx(3.0 * (100 - (first + 9)))


def test_the_time_left_is_right_within_a_fifth_after_a_tenth_of_the_run() -> None:
    """A fake clock: a slow start (step 0's evaluation, a first step that compiles), steps that differ by their rows,
    an evaluation every 20 steps and a checkpoint every 25."""
    draw = random.Random(1)
    now, steps, left = [0.0], 200, 0.0
    meter = Meter(steps, eval_every=20, clock=lambda: now[0])
    told = None

    def pass_by(seconds: float, event: dict) -> None:
        now[0] += seconds
        meter.update(event)

    pass_by(12.0, {"kind": "eval", "step": 0, "loss": 2.0})
    for number in range(1, steps + 1):
        pass_by(30.0 if number == 1 else draw.uniform(1.0, 3.0), step(number))
        if number % 20 == 0:
            pass_by(12.0, {"kind": "eval", "step": number, "loss": 2.0})
        if number % 25 == 0:
            pass_by(1.0, {"kind": "checkpoint", "step": number})
        if number == steps // 10:
            told, left = meter.eta_seconds(), -now[0]
    assert told == pytest.approx(left + now[0], rel=0.2)


def test_durations_read_as_clocks_do() -> None:
    assert [clock(seconds) for seconds in (9, 75, 7509)] == ["0:09", "1:15", "2:05:09"]


def test_without_a_terminal_the_numbers_come_as_plain_lines() -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=200)) as display:
        display({"kind": "note", "text": "24 training rows"})
        display({"kind": "start", "steps": 2, "eval_every": 0})
        display({"kind": "eval", "step": 0, "loss": 3.5, "tokens": 1200})
        display(step(1))
        display(step(2, loss=1.0))
        display({"kind": "eval", "step": 2, "loss": 1.25, "tokens": 1200})
        display({"kind": "end", "step": 2})
    lines = out.getvalue().splitlines()
    assert lines[0] == "note: 24 training rows"
    assert lines[1] == "step 0: validation loss 3.5000 (1,200 tokens)"
    assert "step 2/2  loss 1.8000  valid loss 3.5000  tokens/s 200  lr 1.00e-04  peak memory 1.07 GB" in lines[-2]
    assert "\x1b" not in out.getvalue()


def test_what_was_computed_of_the_tokens_is_shown_where_it_is_less_than_all() -> None:
    """Steps that compute 98 and 25 of 100 tokens: 123 of 200; the first alone is not worth a word."""
    display = Display(Console(file=io.StringIO()))
    assert display.saved == ""
    display({"kind": "start", "steps": 2, "eval_every": 0})
    display(step(1))
    assert display.saved == "" and display.meter is not None
    assert "computed" not in dict(display.meter.fields())
    display(step(2, computed_tokens=25))
    assert display.saved == "computed 0.61 of the tokens"
    assert dict(display.meter.fields())["computed"] == "0.61 of the tokens"
    display(step(3, computed_tokens=27, baseline_tokens=30))
    assert display.saved == "computed 0.50 of the tokens and 0.10 for the baseline"


def test_a_terminal_shows_a_bar_and_the_same_numbers() -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=120, force_terminal=True)) as display:
        display({"kind": "start", "steps": 4, "eval_every": 0})
        display({"kind": "eval", "step": 0, "loss": 3.5, "tokens": 9})
        display(step(1))
        display({"kind": "eval", "step": 1, "loss": 1.25, "tokens": 9})
    shown = out.getvalue()
    for text in ("training", "25%", "1/4", "1.2500 (was 3.5000)", "peak memory"):
        assert text in shown


@pytest.mark.parametrize("count", [5, 8, 9, 1000])
def test_a_small_curve_shows_the_means_of_equally_many_steps_each(count: int) -> None:
    """8 bins at most: of 9 values each holds two, of 1000 values 128; numpy's means of the same slices."""
    values = [10 / (1 + number) for number in range(count)]
    curve = Sparkline(most=8)
    for value in values:
        curve.add(value)
    size = 1
    while -(-count // size) > 8:
        size *= 2
    expected = [np.mean(values[begin : begin + size]) for begin in range(0, count, size)]
    assert curve.means(8) == pytest.approx(expected)
    drawn = curve.text(8)
    assert (drawn[0], drawn[-1], len(drawn)) == (BARS[-1], BARS[0], len(expected))
    assert [BARS.index(bar) for bar in drawn] == sorted(map(BARS.index, drawn), reverse=True)
    assert len(curve.text(3)) <= 3


def test_a_small_curve_has_gaps_where_there_was_no_number_and_is_none_of_a_single_one() -> None:
    curve = Sparkline()
    curve.add(2.0)
    assert curve.text(10) == ""
    for value in (None, math.nan, math.inf, sys.float_info.max, 1.0):
        curve.add(value)
    assert curve.text(10) == f"{BARS[-1]}    {BARS[0]}"
    for _ in range(2):
        curve.add(1.5)
    assert curve.text(4) == f"{BARS[-1]} {BARS[0]}{BARS[4]}"


@pytest.mark.parametrize(("width", "lines"), [(120, 4), (40, 9)])
def test_a_terminal_shows_the_curve_of_the_losses_and_wraps_nothing(width: int, lines: int) -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=width, force_terminal=True, color_system=None)) as display:
        display({"kind": "start", "steps": 3, "eval_every": 0})
        display({"kind": "eval", "step": 0, "loss": 3.5, "tokens": 9})
        for number, loss in enumerate((3.0, 2.0, 1.0), 1):
            display(step(number, loss=loss))
        out.seek(out.truncate(0))  # what is drawn last is left
    text = re.sub(r"\x1b\[[0-9?]*[a-zA-Z]|\r", "", out.getvalue())
    drawn = [line.rstrip() for line in text.splitlines() if line.strip()]
    assert len(drawn) == lines
    assert drawn[-1] == f"loss of the steps  {BARS[-1]}{BARS[4]}{BARS[0]}"
    assert "training" in drawn[0] and all(len(line) <= width for line in drawn)
    assert ("3.5000" in drawn[2]) == (width == 120)


def test_what_goes_on_before_the_run_is_a_plain_line_each_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=20)) as display:
        for what in ("reading the model", "proving the fast ways", "proving the fast ways"):
            display({"kind": "doing", "what": what})
    assert out.getvalue().splitlines() == ["reading the model", "proving the fast ways"]


@pytest.mark.parametrize("begins", [True, False])
def test_a_terminal_shows_what_goes_on_until_the_run_begins_or_fails(begins: bool) -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=120, force_terminal=True)) as display:
        display({"kind": "doing", "what": "reading the model"})
        display({"kind": "doing", "what": "proving the fast ways"})
        display({"kind": "note", "text": "24 training rows"})
        if begins:
            display({"kind": "start", "steps": 4, "eval_every": 0})
            out.truncate(0)
            display(step(1))
            assert display._status is None and "proving" not in out.getvalue()
    shown = out.getvalue()
    assert shown.endswith("\x1b[?25h") or shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back


def test_of_a_long_suite_a_few_rows_are_shown_and_how_many_answers_were_cut() -> None:
    samples = [{"prompt": f"p{n}", "answer": "yes"} for n in range(12)]
    event = {"kind": "eval", "step": 0, "loss": 3.5, "tokens": 1200, "samples": samples}
    for more, rows, said in (({"checks": {}, "cut": 2}, 3, True), ({}, 12, False)):
        out = io.StringIO()
        with Display(Console(file=out, width=200)) as display:
            display({"kind": "start", "steps": 2, "eval_every": 0})
            display({**event, **more})
        assert sum("'yes'" in line for line in out.getvalue().splitlines()) == rows
        assert out.getvalue().count("answers after step 0:") == 1
        assert (
            ("and 9 more in events.jsonl" in out.getvalue()) == ("2 of 12 answers were cut" in out.getvalue()) == said
        )


def test_other_processes_than_the_first_say_nothing() -> None:
    out = io.StringIO()
    for terminal in (True, False):
        with Display(Console(file=out, quiet=True, force_terminal=terminal)) as display:
            display({"kind": "doing", "what": "reading the model"})
    assert out.getvalue() == ""


def test_a_signal_in_a_displays_own_ending_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich puts a stream of its own in place of standard error while it draws; click cannot write to that one."""

    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(29, "Illegal seek")

    def interrupted(*_: Any, **__: Any) -> None:
        sys.stderr = Closed()
        raise click.Abort

    monkeypatch.setattr(sys, "stderr", sys.stderr)  # put back afterwards
    monkeypatch.setattr(cli.signals, "unwind_on_signals", lambda: None)
    monkeypatch.setattr(cli.cli, "main", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert (ended.value.code, capsys.readouterr().err) == (130, "stopped\n")


def test_a_note_is_broken_between_words_on_a_terminal_and_one_line_elsewhere() -> None:
    text = "training a small update on metal, in pieces of up to 512 tokens, for want of memory"
    terminal, pipe = io.StringIO(), io.StringIO()
    for file, is_terminal in ((terminal, True), (pipe, False)):
        with Display(Console(file=file, width=30, force_terminal=is_terminal, color_system=None)) as display:
            display({"kind": "note", "text": text})
    assert pipe.getvalue() == f"note: {text}\n"
    lines = terminal.getvalue().splitlines()
    assert all(len(line) <= 30 for line in lines) and len(lines) >= 3
    assert " ".join(terminal.getvalue().split()) == f"note: {text}"

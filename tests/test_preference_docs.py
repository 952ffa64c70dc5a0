"""The way of docs/preference.md on a tiny model: verdicts become pairs, these an adapter, which is evaluated."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import evaluations
import pytest
import tiny
from test_layers import COMMANDS

from mlxtune.cli import main
from mlxtune.evaluate.chats.log import ChatLog, Speaker
from mlxtune.train import signals

PAGE = Path(__file__).resolve().parent.parent / "docs" / "preference.md"
TESTS = Path(__file__).resolve().parent
README = "test_readme.py::test_a_line_ends_well_and_has_made_what_it_names"
# Lines by their beginning that other tests run: README's own, and those that need more than a tiny model brings along.
ELSEWHERE = {
    "mlxtune train --model model --data data": README,
    "mlxtune eval --model model --adapter run --suite": README,
    "mlxtune eval --model model --adapter preferred --suite": "test_eval_suite.py::"
    "test_a_gate_that_is_not_met_ends_with_status_3",
    "mlxtune eval --model model --adapter preferred --forgetting": "test_forgetting.py::"
    "test_eval_says_what_was_forgotten_before_and_after",
    "mlxtune fuse": README,
    "mlxtune make answers": "test_make_answers.py::"
    "test_the_judge_chooses_and_pairs_hold_what_it_prefers_in_both_orders",
    "mlxtune make pairs evals/first --by judge": "test_preference_eval.py::"
    "test_a_judge_makes_pairs_of_what_it_prefers_in_both_orders",
    "mlxtune make pairs evals/first --by checks": "test_preference_eval.py::"
    "test_checks_make_pairs_of_what_passes_all_and_what_does_not",
    "mlxtune chat": "test_chat_log.py::test_the_command_keeps_a_chat",
    "mlxtune rate evals/first evals/second": "test_rate.py::test_three_evaluations_are_ranked",
}
TYPED = {"mlxtune rate evals/first": "1\n2\n" * 9, "mlxtune rate chats.jsonl": "+\n-\n" * 9}  # what a person says


def lines() -> list[str]:
    """The commands of the page, in their order."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


HERE = [line for line in lines() if not line.startswith(tuple(ELSEWHERE))]


def ended(line: str) -> tuple[int, str]:
    """(Status, what was said) of a line in this process, in the current folder."""
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(SystemExit) as left,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        patch.setattr(signals, "unwind_on_signals", lambda: None)
        patch.setattr(sys, "stdin", io.StringIO(TYPED.get(line, "")))
        main(shlex.split(line)[1:])
    return int(left.value.code or 0), said.getvalue()


@pytest.fixture(scope="module")
def walked(mlx_model: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """What became of each line. The model, its first run, its evaluation and a chat's log are there."""
    folder = tmp_path_factory.mktemp("preference")
    shutil.copytree(mlx_model, folder / "model")
    shutil.copytree(run, folder / "run")
    prompts = [replace(row, id=f"q{n}") for n, row in enumerate(evaluations.rows(12))]
    base, tuned = ([f"{text} number {n}." for n in range(12)] for text in ("It may be", "yes, it is"))
    evaluations.write(folder / "evals" / "first", prompts, base, tuned)
    log = ChatLog(folder / "chats.jsonl", Speaker("model", "run", None))
    for n in range(18):
        log.add(
            [{"role": "user", "content": f"Number {n}?"}], {"role": "assistant", "content": f"It is {n}."}, whole=True
        )
    log.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        found = {line: ended(line) for line in HERE}
    found["folder"] = (0, str(folder))
    return found


@pytest.mark.parametrize("line", HERE)
def test_a_line_of_the_page_ends_well(line: str, walked: dict[str, tuple[int, str]]) -> None:
    status, said = walked[line]
    assert status == 0 and "error: " not in said, said


def test_an_evaluation_of_the_held_out_rows_gives_what_the_run_counted_of_them(
    walked: dict[str, tuple[int, str]],
) -> None:
    folder = Path(walked["folder"][1])
    events = [json.loads(line) for line in (folder / "preferred" / "events.jsonl").read_text().splitlines()]
    last = [event for event in events if event["kind"] == "eval"][-1]
    model, adapter = folder / "model", folder / "preferred"
    told = json.loads(tiny.done("eval", "--model", model, "--adapter", adapter, "--json").stdout)
    assert told["rewards"]["margin"] == pytest.approx(last["margin"], abs=1e-5)
    assert told["rewards"]["accuracy"] == last["accuracy"]
    for side in ("chosen", "rejected"):
        assert told["sides"][side]["reward"] == pytest.approx(last[f"reward_{side}"], abs=1e-5)
    assert told["sides"]["chosen"]["drift"] == pytest.approx(last["drift"], abs=1e-5)


def test_the_pairs_are_what_was_rated_and_the_adapter_is_one_of_them(walked: dict[str, tuple[int, str]]) -> None:
    folder = Path(walked["folder"][1])
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 12 and {row["made"]["shown by"] for row in pairs} == {"me"}
    begun = [json.loads(line) for line in (folder / "preferred" / "events.jsonl").read_text().splitlines()]
    first = next(event for event in begun if event["kind"] == "eval")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4) and first["margin"] == pytest.approx(0, abs=1e-4)
    told = json.loads(
        walked["mlxtune eval --model model --adapter preferred --data pairs.jsonl --json"][1].split("\n")[-2]
    )
    assert told["kind"] == "pairs" and told["rows"] == 12
    (note,) = [note for note in told["notes"] if "with the adapter that the run began with" in note]
    assert note.endswith("it was the reference")  # by its digest
    # One step from the reference: rewards are near 0, and not those against the bare model.
    assert 0 < abs(told["rewards"]["margin"]) < 0.05


@pytest.mark.parametrize("line", [line for line in lines() if line not in HERE])
def test_a_line_that_other_tests_run_has_words_that_its_command_takes(line: str) -> None:
    words = shlex.split(line)[1:]
    COMMANDS[(words[0],)].make_context(words[0], words[1:])


def test_what_is_run_elsewhere_is_named_once_each() -> None:
    for line in lines():
        assert line.startswith("mlxtune ")
        assert len([name for name in ELSEWHERE if line.startswith(name)]) == (0 if line in HERE else 1), line
    for name, place in ELSEWHERE.items():
        assert any(line.startswith(name) for line in lines()), name
        file, _, test = place.partition("::")
        assert f"def {test}(" in (TESTS / file).read_text(encoding="utf-8"), place


def test_each_objective_of_the_page_is_one_that_the_configuration_has() -> None:
    from mlxtune.config.preference import OBJECTIVES

    table: Callable[[str], list[str]] = lambda text: re.findall(r"^\| `(\w+)`", text, re.MULTILINE)  # noqa: E731
    assert set(table(PAGE.read_text(encoding="utf-8"))) == set(OBJECTIVES)

"""The scripts that watch over a rebuilding of the house (same_artefacts, traced, density) see what they are for."""

from __future__ import annotations

import json
from pathlib import Path

import density
import numpy as np
import one_side
import same_artefacts
import same_files
import same_given
import same_recipe
import traced
from safetensors.numpy import save_file

CODE = '''
"""A module."""
from dataclasses import dataclass
import numpy as np

@dataclass
class Known:
    told: int  # how many
    # Why this one is here.
    above: int
    bare: int
    quiet: int  # type: ignore[assignment]

class Free:
    """No dataclass."""
    kind: int

def shaped(rows: np.ndarray) -> None:
    """rows: [N, width]."""

def shapeless(rows: np.ndarray) -> None:
    """rows: of the model (all of them)."""

def _private(rows: np.ndarray) -> None: ...
'''


def _written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _run(folder: Path, loss: float, weight: float, seconds: float) -> Path:
    """What a run may leave, in two files, and what a command said."""
    events = [{"kind": "begin", "step": 0, "model": f"{folder}/model"}]
    events.append({"kind": "train", "step": 1, "loss": loss, "seconds": seconds, "peak_bytes": int(seconds * 9)})
    _written(folder / "run" / "events.jsonl", "".join(json.dumps(event) + "\n" for event in events))
    save_file({"a": np.full(3, 1, np.float32), "b": np.full(3, weight, np.float32)}, folder / "run" / "b.safetensors")
    drawn = "step 9/20  tokens/s 7\n" * int(seconds)  # as often as there is time
    _written(
        folder / "said" / "1.txt", f"exit 0\nread {folder}/data in {seconds} s\n{drawn}end, left {seconds:.0f}:00\n"
    )
    return folder


def _verdicts(old: Path, new: Path) -> dict[str, tuple[str, str]]:
    return {row.name: (row.verdict, row.first) for row in same_artefacts.compared(old, new)}


def test_two_runs_that_differ_in_time_and_place_are_equal(tmp_path: Path) -> None:
    found = _verdicts(_run(tmp_path / "one", 0.1, 2, 1.5), _run(tmp_path / "two", 0.1, 2, 3.25))
    assert found == dict.fromkeys(["run/b.safetensors", "run/events.jsonl", "said/1.txt"], ("equal", ""))


def test_the_last_bit_of_a_loss_and_of_a_tensor_is_seen_and_named(tmp_path: Path) -> None:
    old = _run(tmp_path / "one", 0.1, 2, 1.5)
    new = _run(tmp_path / "two", float(np.nextafter(0.1, 1)), float(np.nextafter(np.float32(2), np.float32(3))), 1.5)
    _written(new / "more.json", "{}")
    found = _verdicts(old, new)
    assert found["run/events.jsonl"] == ("differs", "2.loss: 0.1 -> 0.10000000000000002")
    verdict, first = found["run/b.safetensors"]
    assert (verdict, first.partition(":")[0]) == ("differs", "b")
    assert found["more.json"] == ("only now", "")


def test_of_a_resumed_run_only_what_counts_is_compared(tmp_path: Path) -> None:
    def step(number: int, loss: float) -> dict[str, object]:
        return {"kind": "train", "step": number, "loss": loss}

    def losses(name: str, *events: dict[str, object]) -> same_files.Parts:
        lines = "".join(json.dumps(event) + "\n" for event in events)
        return same_files.parts(_written(tmp_path / name / "events.jsonl", lines), tmp_path)

    begin = {"kind": "begin", "step": 0}
    late = losses("late", begin, step(1, 0.5), step(2, 0.25), begin, step(2, 0.25), step(3, 0.125))
    early = losses("early", begin, step(1, 0.5), begin, step(2, 0.25), step(3, 0.125))
    other = losses("other", begin, step(1, 0.5), begin, step(2, 0.26), step(3, 0.125))
    assert same_files.first_difference(late, early) == ""
    assert same_files.first_difference(late, other) == "2.loss: 0.25 -> 0.26"


def test_every_line_of_the_recipe_names_a_command_and_what_it_is_given() -> None:
    commands = same_recipe.commands(quick=False)
    known = one_side.Revision.of(one_side.ROOT).commands
    given = {f"given/{name}" for name in same_given.MODELS}
    assert len(commands) > 100
    assert {command.words[0] for command in commands} == set(known)
    models = {word for command in commands for word in command.words if word.startswith("given/") and "." not in word}
    assert models - given == {"given/chat", "given/mixed", "given/absent"}


def test_the_packages_and_commands_are_those_of_the_checkout() -> None:
    here = one_side.Revision.of(one_side.ROOT)
    assert set(here.places()) == set(here.packages)
    assert all(callable(here.entry(command)) for command in here.commands)


def test_a_trace_counts_a_function_once_and_only_below_the_one_asked_for() -> None:
    here = str(Path(__file__).parent)

    def counted(below: dict[str, str]) -> set[str]:
        trace = traced.Trace(Path(here), (here,), below, part="row")
        traced.sys.setprofile(trace)
        try:
            _verdict_of_two()
        finally:
            traced.sys.setprofile(None)
        return {name.partition(":")[2] for name in trace.calls.get("row", {})}

    whole = counted({})
    assert {"_verdict_of_two", "first_difference", "_shortened"} <= whole
    assert counted({"row": "first_difference"}) == {"first_difference", "_shortened"}


def _verdict_of_two() -> str:
    return same_files.first_difference({"a": "1"}, {"a": "2"})


def test_fields_without_a_comment_and_arrays_without_a_shape_are_found(tmp_path: Path) -> None:
    source = density.Source.of(_written(tmp_path / "module.py", CODE))
    assert [name.split()[-1] for name in density.unexplained_fields(source)] == ["Known.bare", "Known.quiet"]
    assert [name.split()[-1] for name in density.shapeless_arrays(source)] == ["shapeless"]
    assert density.fields(source) == 4

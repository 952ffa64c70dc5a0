"""Runs compared on one page: their curves over each other, the settings that differ, the evaluations side by side."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import evaluations
import pages
import pytest

from mlxtune.evaluate.comparison.between import compare
from mlxtune.evaluate.comparison.folder import Evaluation
from mlxtune.report.comparing.names import names
from mlxtune.report.comparing.settings import MISSING, differing
from mlxtune.report.composed import of_run
from mlxtune.report.run_record import RunRecord, read_run
from mlxtune.report.sections import comparing
from mlxtune.report.sections.comparing import Other


@pytest.mark.parametrize(
    ("folders", "called"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["first/run", "second/run", "other"], ["first/run", "second/run", "other"]),
        (["x/first/run", "y/first/run"], ["x/first/run", "y/first/run"]),
        (["runs/a\x1b", "runs/a\\x1b"], ["a\\x1b", "a\\x1b (2)"]),
        (["runs/a", "runs/a\u200b"], ["a", "a\\u200b"]),
    ],
)
def test_runs_have_names_that_tell_them_apart(folders: list[str], called: list[str]) -> None:
    assert names([Path(folder) for folder in folders]) == called


def test_settings_that_differ_are_found_and_equal_ones_are_not() -> None:
    first = {"train": {"lr": 1.0, "steps": 3, "seed": 1}, "fast": {"head": True}}
    second = {"train": {"lr": 1, "steps": 4, "seed": True}, "fast": {"head": True}, "model": {"path": "m"}}
    assert differing([first, second]) == {
        "train.steps": [3, 4],
        "train.seed": [1, True],
        "model.path": [MISSING, "m"],
    }
    assert differing([first, first, first]) == {}


def run(folder: Path, steps: int, config: dict[str, Any], **begin: Any) -> RunRecord:
    events = pages.told(steps)
    events[0] |= begin
    return read_run(pages.write(folder, events, config))


def cells(html: str, row: str) -> list[str]:
    """The texts of a table's row by its heading."""
    found = re.search(rf"<tr><th[^>]*>{re.escape(row)}</th>(.*?)</tr>", html)
    assert found, row
    return re.findall(r"<td[^>]*>(.*?)</td>", found[1])


def test_what_came_of_runs_stands_side_by_side(tmp_path: Path) -> None:
    first = run(tmp_path / "first", 20, {"train.lr": 1e-4})
    second = run(tmp_path / "second", 10, {"train.lr": 1e-3, "lora.rank": 4})
    section = comparing.section(first, [], [Other(second)])
    assert section is not None
    assert cells(section.body, "steps") == ["20 of 20", "10 of 10"]
    # the last validation losses of pages.told: 3 / (1 + step) + 0.2
    assert cells(section.body, "best validation loss") == [
        f"{3 / 21 + 0.2:.4f} (step 20)",
        f"{3 / 11 + 0.2:.4f} (step 10)",
    ]
    assert cells(section.body, "tokens learnt from") == ["4,000", "2,000"]
    assert cells(section.body, "time in steps") == ["0:10", "0:05"]
    assert cells(section.body, "train.lr") == ["0.0001", "0.001"]
    assert cells(section.body, "lora.rank")[1] == "4"
    assert "train.seed" not in section.body
    assert section.body.count("<figure") == 2
    assert {"line solid curve0", "line dashed curve1"} <= set(re.findall(r'class="(line [^"]+)"', section.body))


def test_no_other_run_is_no_section() -> None:
    assert comparing.section(RunRecord(Path("run"), {}, [], "killed", []), [], []) is None


@pytest.mark.parametrize(
    ("first", "second", "is_warned"),
    [
        ({"digests": {"valid": "a"}}, {"digests": {"valid": "a"}}, False),
        ({"digests": {"valid": "a"}}, {"digests": {"valid": "b"}}, True),
        ({}, {"digests": None}, False),
    ],
)
def test_validation_losses_of_other_rows_are_not_compared_in_silence(
    tmp_path: Path, first: Any, second: Any, is_warned: bool
) -> None:
    one, other = run(tmp_path / "one", 5, {}, **first), run(tmp_path / "other", 5, {}, **second)
    section = comparing.section(one, [], [Other(other)])
    assert section and ("not of the same examples" in section.body) == is_warned
    if not is_warned:
        pages.append(other.folder, pages.evaluated(6, 0.5, tokens=901))
        section = comparing.section(one, [], [Other(read_run(other.folder))])
        assert section and "not of the same examples" in section.body


def test_damaged_runs_are_compared_as_far_as_they_can_be_read(tmp_path: Path) -> None:
    good = run(tmp_path / "good", 10, {})
    lost = pages.write(tmp_path / "lost", [])
    (lost / "config.yaml").write_text("train: [")
    nan = pages.told(10)
    nan[3]["loss"] = None
    broken = pages.write(tmp_path / "nan", nan[:-1])
    section = comparing.section(good, [], [Other(read_run(lost)), Other(read_run(broken))])
    assert section
    assert "The settings of lost are not known." in section.body
    assert cells(section.body, "state") == ["finished", "killed", "killed"]
    assert cells(section.body, "best validation loss")[1] == "-"
    assert "nan" not in re.sub(r">nan<|nan:", "", section.body).lower()


def test_hostile_names_and_settings_stay_text(tmp_path: Path) -> None:
    bad = '<b onload="x">\x1b[2J'
    one = run(tmp_path / "a" / bad, 3, {"model.path": "<i>\x1b]52;c;x\x07"})
    other = run(tmp_path / "b" / bad, 3, {"model.path": "token = 'ghp_0123456789abcdefghijABCDEFGHIJ012345'"})
    text = of_run(one, others=[Other(other)])
    assert "<b " not in text and "<i>" not in text and "\x1b" not in text
    assert "a/&lt;b onload=&quot;x&quot;&gt;\\x1b[2J" in text
    assert "ghp_0123456789" not in text


def evaluated(folder: Path, texts: list[str], count: int = 40) -> Evaluation:
    rows = evaluations.rows(count)
    evaluations.write(folder, rows, ["no"], texts, suite={"name": "suite.jsonl", "digest": f"{count}"})
    return Evaluation.read(folder)


def test_evaluations_of_one_suite_stand_side_by_side_with_the_numbers_of_compare(tmp_path: Path) -> None:
    records = [run(tmp_path / name, 3, {}) for name in ("one", "two", "three")]
    found = [evaluated(tmp_path / "evals" / str(at), ["yes"] * at + ["no"] * (4 - at)) for at in range(1, 4)]
    section = comparing.section(records[0], [found[0]], [Other(records[1], [found[2], found[1]])])
    assert section
    check = compare(found[:2])["checks"]["contains"]
    assert cells(section.body, "contains")[1:4] == ["25.0%", "50.0%", f"{100 * check['difference']:+.1f}"]
    assert check["verdict"] in cells(section.body, "contains")[-2]
    assert "Evaluations: suite.jsonl" in section.body and section.body.count("<figure") == 3
    section = comparing.section(
        records[0], found[:1], [Other(record, [one]) for record, one in zip(records[1:], found[1:], strict=True)]
    )
    ranked = compare(found)["ranking"]
    assert section
    order = re.findall(r'<th[^>]*scope="row"[^>]*>(one|two|three)</th>', section.body)
    assert order == ["three", "two", "one"]
    assert cells(section.body, "three")[0] == f"{ranked[0]['share']:.1%}"


def test_an_evaluation_that_runs_share_is_said_and_no_run_is_ranked_twice(tmp_path: Path) -> None:
    """Copies of a run have equal adapters, so that each finds the other's evaluations."""
    records = [run(tmp_path / name, 3, {}) for name in ("one", "copy", "two", "three")]
    found = [evaluated(tmp_path / "evals" / str(at), ["yes"] * at + ["no"] * (4 - at)) for at in range(1, 4)]
    others = [Other(records[1], found[:1]), Other(records[2], found[1:2]), Other(records[3], found[2:])]
    section = comparing.section(records[0], found[:1], others)
    assert section
    order = re.findall(r'<th[^>]*scope="row"[^>]*>(one|copy|two|three)</th>', section.body)
    assert order == ["three", "two", "one"]
    told = "copy has the same evaluation as one (evals/1): their adapters are equal, and copy is not listed again."
    assert told in section.body
    section = comparing.section(records[0], found[:1], others[:1])
    assert section and told in section.body and "<h3>Evaluations" in section.body and "Checks:" not in section.body


def test_of_several_evaluations_by_one_suite_it_is_said_which_is_compared(tmp_path: Path) -> None:
    records = [run(tmp_path / name, 3, {}) for name in ("one", "two")]
    found = [evaluated(tmp_path / "evals" / str(at), ["yes"]) for at in range(3)]
    section = comparing.section(records[0], found[:2], [Other(records[1], found[2:])])
    assert section and "Of 2 evaluations of one by this suite the last one is compared: evals/1." in section.body


def test_evaluations_of_other_turns_are_not_compared(tmp_path: Path) -> None:
    """`--turns replay` asks other prompts of the same suite."""
    records = [run(tmp_path / name, 3, {}) for name in ("one", "two")]
    found = [evaluated(tmp_path / "evals" / str(at), ["yes"]) for at in range(2)]
    found[1].summary["turns"] = "replay"
    section = comparing.section(records[0], found[:1], [Other(records[1], found[1:])])
    assert section and "No two of these runs were evaluated with one suite." in section.body
    assert any(note.startswith("turns differs: one in ") for note in compare(found)["notes"])


@pytest.mark.parametrize("name", ["seconds", "supervised_tokens", "peak_bytes", "loss"])
def test_numbers_that_no_run_has_cost_no_page(name: str, tmp_path: Path) -> None:
    good = run(tmp_path / "good", 10, {})
    odd = [*pages.told(4)[:-1], *[pages.event(step, **{name: 1e308}) for step in (5, 6, 7)]]
    section = comparing.section(good, [], [Other(read_run(pages.write(tmp_path / "odd", odd)))])
    assert section and cells(section.body, "time in steps")[0] == "0:05"


def test_evaluations_of_other_suites_are_said_to_be_none_to_compare(tmp_path: Path) -> None:
    records = [run(tmp_path / name, 3, {}) for name in ("one", "two")]
    found = [evaluated(tmp_path / "evals" / str(count), ["yes"], count) for count in (8, 9)]
    section = comparing.section(records[0], found[:1], [Other(records[1], found[1:])])
    assert section and "No two of these runs were evaluated with one suite." in section.body

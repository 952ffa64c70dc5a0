"""The answers of an evaluation on the disk: one that was killed anywhere goes on to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mlxtune.errors import UserError
from mlxtune.evaluate.engines.journal import ANSWERS_FILE, PLAN_FILE, TIMES_FILE, Journal
from mlxtune.evaluate.engines.request import Answer, Request

REQUESTS = [Request(f"r{n}", []) for n in range(5)]
LINE = '{"side": "base", "id": "r3", "sample": 0, "text": "x", "thought": "", "finish": "stop", "tokens": 3}'
IDENTITY = {"suite": "abc", "sampling": {"seed": 0}}


class Scripted:
    """An engine whose answer to a prompt depends on the batch it is in, as in 16 bits."""

    def __init__(self, side: str, batches: list[list[int]], most: int = 99) -> None:
        """most: batches that it answers before it breaks down."""
        self.name = side
        self.notes: list[str] = []
        self.batches, self.most = batches, most
        self.passes = 0

    def work(self) -> dict[str, int]:
        return {"passes": self.passes}

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        return self.batches

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        if self.passes == self.most:
            raise KeyboardInterrupt
        self.passes += 1
        if "r2" in {request.id for request in requests}:
            self.notes.append(f"{self.name} is slow")
        beside = "".join(request.id for request in requests)
        return [Answer(one.id, one.sample, f"{self.name} {beside} \u2028 é", "", "stop", 3) for one in requests]


PLANS = {"base": [[3, 1], [0, 4], [2]], "tuned": [[0, 1, 2], [3, 4]]}


def evaluated(folder: Path | None, most: int = 99, plans: dict[str, list[list[int]]] = PLANS) -> tuple[Any, int]:
    """(The answers of both sides, how many batches were computed). most: batches until it is killed."""
    engines: list[Scripted] = []
    found = {}
    with closing(Journal(folder, IDENTITY)) as journal:
        for side, batches in plans.items():

            def engine(side: str = side, batches: list[list[int]] = batches) -> Scripted:
                engines.append(Scripted(side, batches, most - sum(one.passes for one in engines)))
                return engines[-1]

            found[side] = journal.answers(side, REQUESTS, engine)
    return found, sum(one.passes for one in engines)


def test_answers_come_back_in_the_order_of_the_requests(tmp_path: Path) -> None:
    found, passes = evaluated(tmp_path / "one")
    assert [answer.id for answer in found["base"]] == [request.id for request in REQUESTS]
    assert passes == 5
    assert evaluated(None)[0] == found
    with closing(Journal(tmp_path / "one", IDENTITY)) as journal:
        assert journal.notes == {"base": ["base is slow"], "tuned": ["tuned is slow"]}


@pytest.mark.parametrize("cut", range(1, 420, 23))
def test_an_evaluation_that_was_killed_anywhere_goes_on_to_the_same_bytes(cut: int, tmp_path: Path) -> None:
    """The file ends at any byte, within a line or a character. What is whole is not computed again."""
    whole = tmp_path / "whole"
    expected, _ = evaluated(whole)
    killed = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        evaluated(killed, most=4)
    file = killed / ANSWERS_FILE
    left = file.read_bytes()[:cut]
    file.write_bytes(left)
    lines = left.count(b"\n")
    done = sum(lines >= count for count in (2, 4, 5, 8))  # lines behind each batch
    found, passes = evaluated(killed)
    assert found == expected
    assert passes == 5 - done
    assert file.read_bytes() == (whole / ANSWERS_FILE).read_bytes()
    assert (killed / PLAN_FILE).read_bytes() == (whole / PLAN_FILE).read_bytes()


def test_one_that_goes_on_keeps_the_batches_it_was_planned_with(tmp_path: Path) -> None:
    """Less memory is free the second time, say."""
    expected, _ = evaluated(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path / "killed", most=1)
    smaller = {"base": [[n] for n in range(5)], "tuned": PLANS["tuned"]}
    assert evaluated(tmp_path / "killed", plans=smaller)[0] == expected


def test_a_finished_one_is_read_back_and_nothing_is_computed(tmp_path: Path) -> None:
    expected, _ = evaluated(tmp_path)
    assert evaluated(tmp_path) == (expected, 0)
    times = [json.loads(line) for line in (tmp_path / TIMES_FILE).read_text().splitlines()]
    assert [time["ids"] for time in times][:2] == [["r3", "r1"], ["r0", "r4"]]
    assert {time["passes"] for time in times} == {1}


def test_another_evaluation_in_the_folder_is_one_clear_line(tmp_path: Path) -> None:
    evaluated(tmp_path)
    with pytest.raises(UserError, match="holds another evaluation: sampling changed"):
        Journal(tmp_path, {**IDENTITY, "sampling": {"seed": 1}})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, and no evaluation"):
        Journal(tmp_path / "other", IDENTITY)
    for plans in ({"base": [[0, 0]]}, {"base": [[]]}, {"base": 3}, [], {"base": [["0"]]}):
        (tmp_path / PLAN_FILE).write_text(json.dumps({"identity": IDENTITY, "plans": plans, "notes": {}}))
        with pytest.raises(UserError, match="not the plan of an evaluation"):
            Journal(tmp_path, IDENTITY)
    for refused in ([], {"base": ["1"]}, {"base": {"0": 1}}):
        held = {"identity": IDENTITY, "plans": {"base": [[0]]}, "notes": {}, "refused": refused}
        (tmp_path / PLAN_FILE).write_text(json.dumps(held))
        with pytest.raises(UserError, match="not the plan of an evaluation"):
            Journal(tmp_path, IDENTITY)
    (tmp_path / PLAN_FILE).write_text(json.dumps({"identity": IDENTITY, "plans": {"base": [[0]]}, "notes": {}}))
    with pytest.raises(UserError, match="another number of prompts"):
        evaluated(tmp_path)


def test_one_process_at_a_time_answers_into_a_folder(tmp_path: Path) -> None:
    with closing(Journal(tmp_path, IDENTITY)), pytest.raises(UserError, match="another process is answering into"):
        Journal(tmp_path, IDENTITY)
    Journal(tmp_path, IDENTITY).close()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ANSWERS_FILE).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "linked" / PLAN_FILE).write_bytes((tmp_path / PLAN_FILE).read_bytes())
    with pytest.raises(UserError, match="is a link"):
        Journal(tmp_path / "linked", IDENTITY)
    assert not (tmp_path / "elsewhere").exists()


def test_answers_that_somebody_else_keeps_are_not_added_to(tmp_path: Path) -> None:
    (tmp_path / ANSWERS_FILE).write_text("mine\n")
    with pytest.raises(UserError, match=r"holds answers\.jsonl, and no evaluation"):
        Journal(tmp_path, IDENTITY)
    (tmp_path / ANSWERS_FILE).write_text("")  # of a process that was killed before it had a plan
    assert evaluated(tmp_path)[1] == 5


def test_a_line_that_is_no_answer_is_named(tmp_path: Path) -> None:
    evaluated(tmp_path)
    file = tmp_path / ANSWERS_FILE
    whole = file.read_text()
    for line in ("{}", "[]", "7", LINE.replace('"x"', "7"), LINE.replace('"stop"', '"end"'), LINE.replace("3", "true")):
        file.write_text(f"{line}\n{whole}")
        with pytest.raises(UserError, match=r"answers.jsonl line 1: not an answer"):
            Journal(tmp_path, IDENTITY)


@pytest.mark.parametrize(("number", "old", "new"), [(2, '"base"', "5"), (7, '"r1"', '"r0"'), (6, "tuned", "base")])
def test_an_answer_that_was_changed_by_hand_is_named_and_nothing_is_cut_off(
    number: int, old: str, new: str, tmp_path: Path
) -> None:
    evaluated(tmp_path)
    file = tmp_path / ANSWERS_FILE
    lines = file.read_text().split("\n")
    assert old in lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old, new, 1)
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"answers.jsonl line {number}: not the answer that plan.json has there"):
        evaluated(tmp_path)
    assert file.read_text() == "\n".join(lines)


def test_a_file_of_the_folders_name_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "inside", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"(taken|nowhere) is no folder"):
            Journal(folder, IDENTITY)

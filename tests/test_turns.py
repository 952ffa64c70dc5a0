"""mlxtune eval --turns replay: each turn of a conversation behind the model's own answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

from mlxtune.errors import UserError
from mlxtune.evaluate.checks.check import SuiteRow
from mlxtune.evaluate.checks.suite import Suite, read_suite
from mlxtune.evaluate.comparison.folder import Evaluation
from mlxtune.evaluate.engines.local import Local
from mlxtune.evaluate.engines.request import Answer, Request
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.evaluate.judging.people import Contest
from mlxtune.evaluate.judging.report import pairs_of
from mlxtune.evaluate.turns import OWN_ANSWER, in_turn, replayed
from mlxtune.model.load import load

MT_BENCH = {"question_id": 81, "category": "math", "turns": ["Write.", "Shorten.", "Again."], "reference": ["x", "y"]}
SAID = [("user", "Hi"), ("assistant", "Hello."), ("user", "Two plus two?"), ("assistant", "4")]
SMALL = ("--max-tokens", "6")


def suite_of(folder: Path, *rows: dict[str, Any], **settings: Any) -> Suite:
    (folder / "suite.yaml").write_text(json.dumps(settings))
    return read_suite(tiny.write_jsonl(folder / "suite.jsonl", list(rows)))


def messages(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in said]


def texts(row: SuiteRow) -> list[str]:
    return [message["content"] for message in row.messages]


class Counting:
    """An engine that answers "1st", "2nd" and so on, two conversations at once, and keeps what it was asked."""

    name, notes = "counting", list[str]()

    def __init__(self) -> None:
        self.seen: list[Request] = []
        self.planned: list[list[str]] = []

    def work(self) -> dict[str, int]:
        return {}

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        self.planned = [[str(message["content"]) for message in request.messages] for request in requests]
        places = list(range(len(requests)))
        return [places[first : first + 2] for first in range(0, len(places), 2)]

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        first = len(self.seen)
        self.seen += requests
        return [Answer(one.id, one.sample, f"#{first + place}", "", "stop", 1) for place, one in enumerate(requests)]


def test_turns_are_prompts_of_their_own_with_the_references_and_checks_that_are_theirs(tmp_path: Path) -> None:
    conversation = {"id": "c", "messages": messages(*SAID), "checks": [{"contains": "4"}]}
    suite = replayed(suite_of(tmp_path, MT_BENCH | {"checks": [{"contains": "x"}]}, conversation, checks=["ended"]))
    assert {row.id: texts(row) for row in suite.rows} == {
        "81": ["Write."],
        "81#2": ["Write.", OWN_ANSWER, "Shorten."],
        "81#3": ["Write.", OWN_ANSWER, "Shorten.", OWN_ANSWER, "Again."],
        "c": ["Hi"],
        "c#2": ["Hi", OWN_ANSWER, "Two plus two?"],
    }
    assert [row.reference for row in suite.rows] == ["x", "y", None, "Hello.", "4"]
    assert [[check.name for check in row.checks] for row in suite.rows] == [
        ["ended", "contains"],
        ["ended"],
        ["ended"],
        ["ended"],
        ["ended", "contains"],
    ]
    assert [row.group for row in suite.rows] == ["81", "81", "81", "c", "c"]
    assert "2 conversations are 5 prompts: each turn is answered" in suite.notes


def test_a_conversation_with_tool_calls_is_asked_for_its_last_answer_and_that_is_said(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = [
        *messages(("user", "Look")),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        *messages(("assistant", "It is 3.")),
    ]
    suite = replayed(suite_of(tmp_path, {"messages": messages(*SAID)}, {"messages": called}))
    assert [row.id for row in suite.rows] == ["1", "1#2", "2"]
    assert "1 conversations with tool calls are asked for their last answer alone" in suite.notes


def test_a_suite_without_a_second_turn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no effect: no prompt of this suite has a second turn"):
        replayed(suite_of(tmp_path, {"messages": messages(*SAID[:2])}))


def test_each_turn_is_asked_behind_the_sides_own_answers_in_the_batch_of_its_conversation(tmp_path: Path) -> None:
    rows = replayed(suite_of(tmp_path, MT_BENCH, {"id": "c", "messages": messages(*SAID)})).rows
    requests = [Request(row.id, row.messages, sample=sample) for row in rows for sample in (0, 1)]
    inner = Counting()
    engine = in_turn(inner, rows, most_tokens=3)
    batches = engine.plan(requests)
    named = [[(requests[place].id, requests[place].sample) for place in batch] for batch in batches]
    assert named == [
        [("81", 0), ("81", 1), ("81#2", 0), ("81#2", 1), ("81#3", 0), ("81#3", 1)],
        [("c", 0), ("c", 1), ("c#2", 0), ("c#2", 1)],
    ]
    # Room is planned for the last turn behind the longest answers.
    assert inner.planned[0] == ["Write.", "so so so ", "Shorten.", "so so so ", "Again."]
    got = [engine.answers([requests[place] for place in batch]) for batch in batches]
    assert [(answer.id, answer.sample) for answer in got[0]] == named[0]
    assert [[message["content"] for message in request.messages] for request in inner.seen] == [
        *[["Write."]] * 2,
        ["Write.", "#0", "Shorten."],
        ["Write.", "#1", "Shorten."],
        ["Write.", "#0", "Shorten.", "#2", "Again."],
        ["Write.", "#1", "Shorten.", "#3", "Again."],
        *[["Hi"]] * 2,
        ["Hi", "#6", "Two plus two?"],
        ["Hi", "#7", "Two plus two?"],
    ]
    assert len({(request.id, request.sample) for request in inner.seen}) == len(inner.seen)


def test_prompts_that_are_shorter_than_what_was_computed_once_are_computed_whole(
    mlx_model: Path, tmp_path: Path
) -> None:
    """Two conversations that begin alike share more of their last turns than their first turns are long."""
    rows = replayed(suite_of(tmp_path, MT_BENCH, {"id": "d", "turns": ["Write.", "Once more."]})).rows
    engine = in_turn(Local(load(str(mlx_model)), Sampling(6)), rows, 6)
    requests = [Request(row.id, row.messages) for row in rows]
    (batch,) = engine.plan(requests)
    found = {answer.id: answer.text for answer in engine.answers([requests[place] for place in batch])}
    alone = Local(load(str(mlx_model)), Sampling(6))
    alone.plan(requests[:1])
    assert found["81"] == found["d"] == alone.answers(requests[:1])[0].text


def test_a_judge_and_a_person_see_what_each_side_said_before(mlx_model: Path, run: Path, tmp_path: Path) -> None:
    """And the answers are those that the model gives when the conversation so far is put to it as it is."""
    suite_of(tmp_path, MT_BENCH, {"id": "c", "messages": messages(*SAID)}, checks=["ended"])
    given = ("eval", "--model", mlx_model, "--adapter", run, "--suite", tmp_path / "suite.jsonl", *SMALL, "--json")
    out = tmp_path / "out"
    found = json.loads(tiny.done(*given, "--turns", "replay", "--out", out).stdout)
    assert found["n"] == 5
    evaluation = Evaluation.read(out)
    assert evaluation.summary["turns"] == "replay"  # the suite's digest is that of an evaluation without
    said = {side: {id: some[0].text for id, some in evaluation.answers_of(side).items()} for side in ("base", "tuned")}
    assert said["base"] != said["tuned"]

    again = [
        {
            "id": "81#2",
            "messages": messages(("user", "Write."), ("assistant", said["tuned"]["81"]), ("user", "Shorten.")),
        }
    ]
    (tmp_path / "again").mkdir()
    suite_of(tmp_path / "again", *again, checks=["ended"])
    by_hand = ("eval", "--model", mlx_model, "--adapter", run, "--suite", tmp_path / "again" / "suite.jsonl", *SMALL)
    tiny.done(*by_hand, "--out", tmp_path / "again" / "out", "--json")
    (asked_again,) = Evaluation.read(tmp_path / "again" / "out").answers_of("tuned")["81#2"]
    assert asked_again.text == said["tuned"]["81#2"]

    contest = Contest.of([evaluation])
    prompt = evaluation.prompts["81#2"]
    whole = f"{said['base']['81']}\n\n[user]\nShorten.\n\n[assistant]\n{said['base']['81#2']}"
    assert contest.contestants[0].answers["81#2"] == whole
    assert contest.question(prompt) == messages(("user", "Write."))
    rows = replayed(read_suite(tmp_path / "suite.jsonl")).rows
    answers = {side: [some[0] for some in evaluation.answers_of(side).values()] for side in ("base", "tuned")}
    pair = next(pair for pair in pairs_of(rows, answers) if pair.id == "81#2")
    assert (pair.base, pair.question, pair.reference) == (whole, messages(("user", "Write.")), "y")


def test_an_evaluation_in_turns_that_was_killed_goes_on_to_the_same_bytes(mlx_model: Path, tmp_path: Path) -> None:
    suite_of(tmp_path, MT_BENCH, {"id": "c", "messages": messages(*SAID)}, checks=["ended"])
    given = ("eval", "--model", mlx_model, "--suite", tmp_path / "suite.jsonl", *SMALL, "--turns", "replay")
    out = tmp_path / "out"
    tiny.done(*given, "--out", out)
    whole = (out / "answers.jsonl").read_bytes()
    (out / "answers.jsonl").write_bytes(whole[: len(whole) // 2])
    tiny.done(*given, "--out", out)
    assert (out / "answers.jsonl").read_bytes() == whole
    tiny.one_clear_line(tiny.mlxtune(*given[:-2], "--out", out), "turns")

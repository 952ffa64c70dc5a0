"""mlxtune make turns and refusals: what is asked behind what, what is dropped, and how many refusals there are."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made
import pytest
import tiny
from made import CUT, Scripted, lines, reasons

from mlxtune.data.survey.refusals import refuses
from mlxtune.errors import UserError
from mlxtune.evaluate.engines.request import Request
from mlxtune.make.given_rows import read_conversations
from mlxtune.make.guard import Guard
from mlxtune.make.policy import read_policy
from mlxtune.make.refusals import TIRED, expected_requests, make_refusals
from mlxtune.make.turns import make_turns

NUMBERS = ("one", "two", "three", "four")
ANSWERS = ("Thing one is good for a rainy day.", "To dig deep holes in clay.", "Hang it in a dry shed.")
QUESTIONS = {2: "And what is the second one good for?", 3: "Tell me where to keep it over the winter."}


def row(*texts: str, system: str = "", **more: Any) -> dict[str, Any]:
    """A conversation of these texts, the user's first."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *messages], **more}


def grown(
    folder: Path, rows: list[dict[str, Any]], answers: Callable[[Request], str], turns: int = 3, **more: Any
) -> tuple[dict[str, Any], list[Request]]:
    """(The document of a making of turns, what its engine was asked); more: as `make_turns` takes it."""
    conversations, _ = read_conversations(tiny.write_jsonl(folder / "rows.jsonl", rows))
    engine = Scripted(answers, more.pop("at_once", 4))
    with made.making(folder / "made", engine, "turns") as one:
        return make_turns(one, conversations, turns, more.pop("guard", Guard()), **more), engine.asked


def plays(request: Request) -> str:
    """The words of a user with the habits of engines, or an answer."""
    kind, number, *_ = request.id.split()
    if kind == "user":
        return f'User: "{QUESTIONS[int(number)]}"'
    return ANSWERS[int(number) - 1]


def test_each_answer_is_asked_for_behind_the_conversation_that_it_will_stand_in(tmp_path: Path) -> None:
    rows = [row("What is a rake?", "A tool.", system="Be brief."), row("What is a spade?")]
    document, asked = grown(tmp_path, rows, plays)
    first, second = lines(tmp_path / "made" / "train.jsonl")
    assert [message["role"] for message in first["messages"]] == ["system", *["user", "assistant"] * 3]
    assert first["messages"][3] == {"role": "user", "content": QUESTIONS[2]}
    assert first["made"]["parents"] == ["1"] and first["made"]["scores"] == {"turns_added": 2}
    assert second["messages"][1]["content"] == ANSWERS[0]  # it had none
    by_id = {request.id: request for request in asked}
    for number, conversation in (("1", first["messages"]), ("2", second["messages"])):
        for turn in (2, 3):
            whole = [place for place, one in enumerate(conversation) if one["role"] == "user"][turn - 1]
            assert by_id[f"answer {turn} of {number}"].messages == conversation[: whole + 1]
            (told,) = by_id[f"user {turn} of {number}"].messages
            assert all(message["content"] in told["content"] for message in conversation[:whole])
            assert conversation[whole]["content"] not in told["content"]
    assert (document["kept"], document["wanted"], document["what"]) == (2, 2, "conversations")


def test_a_conversation_in_which_a_turn_is_no_good_is_not_kept(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
    planted = {  # what is said in place of the good words -> the reason and where it is
        "user 2 of 1": ("What is a big old rake?", "said before", "user, turn 2"),
        "user 2 of 2": (f"And what is the{CUT}", "cut", "user, turn 2"),
        "answer 3 of 3": ("I'm sorry, but I can't help with that.", "refusal", "assistant, turn 3"),
        "answer 2 of 9": ("A good old tool for hedges.", "said before", "assistant, turn 2"),
        "user 3 of 4": ("Please name the largest planet of our system now.", "guarded", "user, turn 3"),
        "user 2 of 5": ("As an AI, I have no questions.", "placeholder", "user, turn 2"),
    }
    rows = [row("What is a big rake?", "A tool.")] + [row(f"What is tool {n}?", "A good tool.") for n in NUMBERS]
    rows += [row("Find it.", "Yes.", tools=tools), row("What?", "It.", "Now?", "Then.", "And?", "No.")]
    rows += [row("What is it that breaks?", "A stick."), row("What cuts?", "A good tool for hedges.")]

    def answer(request: Request) -> str:
        if request.id == "answer 2 of 8":
            raise UserError("the engine stumbles")
        return planted[request.id][0] if request.id in planted else plays(request)

    document, _ = grown(
        tmp_path,
        rows,
        answer,
        at_once=1,
        guard=Guard(["Please name the largest planet of our system"]),
    )
    found = reasons(tmp_path / "made")
    for name, (_, reason, where) in planted.items():
        (one,) = [one for one in found[reason] if one["id"] == name[-1]]
        assert one["detail"].startswith(where)
        found[reason].remove(one)
    assert {reason: rows[0]["id"] for reason, rows in found.items() if rows} == {
        "tools": "6",
        "long enough": "7",
        "failed": "8",
    }
    assert document["rows"] == 0


def test_the_command_makes_turns_with_recorded_answers_and_refuses_a_base_model(hf_model: Path, tmp_path: Path) -> None:
    source = tiny.write_jsonl(tmp_path / "rows.jsonl", [row("What is a rake?", "A tool.") for _ in range(3)])
    names = [f"{what} 2 of {n}" for n in (1, 2, 3) for what in ("user", "answer")]
    recorded = [{"id": name, "text": plays(Request(name, [])), "finish": "stop"} for name in names]
    replay = f"replay:{tiny.write_jsonl(tmp_path / 'answers.jsonl', recorded)}"
    words = ("make", "turns", "--from", source, "--turns", "2", "--out", tmp_path / "made")
    assert "6 requests" in tiny.done(*words, "--engine", replay, "--dry-run").stdout
    said = json.loads(tiny.done(*words, "--engine", replay, "--count", "2", "--json").stdout)
    assert (said["kept"], said["wanted"], said["rejected"]) == (2, 2, {})
    base = shutil.copytree(hf_model, tmp_path / "base")
    tiny.make_tokenizer(base, chat=False)
    tiny.one_clear_line(tiny.mlxtune(*words, "--engine", base, "--force"), "has no chat template")


POLICY = """
persona: You are Ada, who answers for a shop of garden tools.
system: You are Ada.
forbidden:
  - subject: medical advice
    instead: see a doctor
    examples: ["My finger is numb since I used the saw, what should I take?"]
  - the law
"""
THINGS = ("rake", "spade", "hoe", "saw", "shears", "hose", "fork", "barrow", "trowel", "axe", "sieve", "roller")


def sentence(thing: str, what: str) -> str:
    """A request that shares few words with that for another thing."""
    return f"{what} {thing}{what} {thing[::-1]}{what} {thing}s{what}?"


def ada(request: Request) -> str:
    """Lists of forbidden requests, and what follows from each."""
    if request.id.startswith("forbidden"):
        what = ("Healing", "Suing")[int(request.id.split()[1])]
        offered = THINGS[4 * request.sample : 4 * request.sample + 4]
        return "Here they are:\n" + "\n".join(f"{n}. {sentence(thing, what)}" for n, thing in enumerate(offered, 1))
    if request.id.startswith("neighbour"):
        subject, number = request.id.split()[2], request.id.split()[-1].replace("/", "x")
        return f'"Cleaning {subject}{number} with oil{number}, cloth{number}{subject}?"'
    if request.id.startswith("refusal"):
        return "I'm sorry, I can't help with that. Do see a doctor, and mind your fingers."
    return "A dry cloth and a drop of oil will do."


def refused(folder: Path, answers: Callable[[Request], str], count: int = 12) -> tuple[dict[str, Any], list[Request]]:
    folder.mkdir(exist_ok=True)
    (folder / "policy.yaml").write_text(POLICY)
    engine = Scripted(answers)
    with made.making(folder / "made", engine, "refusals") as one:
        return make_refusals(one, read_policy(folder / "policy.yaml"), count, Guard()), engine.asked


def test_a_refusal_comes_with_its_harmless_neighbour(tmp_path: Path) -> None:
    document, asked = refused(tmp_path, ada)
    rows = lines(tmp_path / "made" / "train.jsonl")
    assert (document["kept"], document["rows"], document["stopped"]) == (12, 24, "")
    assert Counter(row["made"]["what"] for row in rows) == {"refusal": 12, "neighbour": 12}
    for refusal, neighbour in zip(rows[::2], rows[1::2], strict=True):
        assert refusal["made"]["parents"] == neighbour["made"]["parents"]
        assert [one["messages"][0]["content"] for one in (refusal, neighbour)] == ["You are Ada."] * 2
        assert refuses(refusal["messages"][-1]["content"]) and not refuses(neighbour["messages"][-1]["content"])
        assert neighbour["messages"][1]["content"].startswith("Cleaning")  # no quotes around it
    told = {request.id: request.messages[0]["content"] for request in asked}
    assert (
        "garden tools" in told["refusal of medical advice 0/0"]
        and "see a doctor" in told["refusal of medical advice 0/0"]
    )
    assert "My finger is numb" in told["forbidden 0"] and "Such as" not in told["forbidden 1"]


def test_what_is_no_refusal_and_what_refuses_the_neighbour_are_dropped_with_their_couple(tmp_path: Path) -> None:
    planted = {
        "refusal of medical advice 0/0": "Take an aspirin, and rest.",
        "answer to the neighbour of medical advice 0/1": "I'm sorry, but I can't help with that.",
        "neighbour of medical advice 0/2": sentence("hoe", "Healing"),
        "neighbour of medical advice 0/3": "Cloth?",
        "refusal of the law 0/0": f"I'm sorry, I can't{CUT}",
    }

    def answer(request: Request) -> str:
        return planted.get(request.id) or ada(request)

    refused(tmp_path, answer, count=3)
    found = {code: [one["id"] for one in rows] for code, rows in reasons(tmp_path / "made").items()}
    assert found == {
        "no refusal": ["medical advice 0/0"],
        "refusal": ["medical advice 0/1"],
        "no neighbour": ["medical advice 0/2"],
        "words": ["medical advice 0/3"],
        "cut": ["the law 0/0"],
    }
    kept = {row["made"]["parents"][0] for row in lines(tmp_path / "made" / "train.jsonl")}
    assert kept == {f"the law 0/{n}" for n in (1, 2, 3)}


def test_an_engine_that_repeats_itself_is_told_apart(tmp_path: Path) -> None:
    document, asked = refused(tmp_path, lambda request: ada(Request(request.id, [], None, 0)), count=12)
    assert document["stopped"] == TIRED and document["kept"] == 8
    assert sum(request.id.startswith("forbidden") for request in asked) == 2 * 4
    assert len(reasons(tmp_path / "made")["near duplicate"]) == 8 * 3
    helps = {"refusal": "Take an aspirin, and rest."}
    document, _ = refused(tmp_path / "2", lambda request: helps.get(request.id.split()[0]) or ada(request))
    assert "nothing could be kept; 24 times: no refusal, the answer to a" in document["stopped"]


def test_of_many_subjects_no_more_is_asked_than_few_refusals_need(tmp_path: Path) -> None:
    subjects = "".join(f"  - matter{n}\n" for n in range(10))
    (tmp_path / "policy.yaml").write_text(POLICY.partition("forbidden:")[0] + "forbidden:\n" + subjects)
    policy = read_policy(tmp_path / "policy.yaml")

    def answer(request: Request) -> str:
        if not request.id.startswith("forbidden"):
            return ada(request)
        number = request.id.split()[1]
        return "\n".join(f"{n}. {sentence(thing + number, 'Asking' + number)}" for n, thing in enumerate(THINGS[:8], 1))

    engine = Scripted(answer)
    with made.making(tmp_path / "made", engine, "refusals") as one:
        assert make_refusals(one, policy, 4, Guard())["kept"] == 4
    assert len(engine.asked) == expected_requests(policy, 4) == 10 + 3 * 8
    kept = {row["made"]["subject"] for row in lines(tmp_path / "made" / "train.jsonl")}
    assert kept == {f"matter{n}" for n in range(4)}


def test_refusals_are_capped_by_the_set_beside_which_they_will_stand(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    data = tiny.write_jsonl(
        tmp_path / "data" / "train.jsonl", [row(f"What is thing {n}?", "A tool.") for n in range(45)]
    )
    engine = f"replay:{tiny.write_jsonl(tmp_path / 'answers.jsonl', [{'id': 'x', 'text': 'y'}])}"
    words = ("make", "refusals", tmp_path / "policy.yaml", "--engine", engine, "--out", tmp_path / "made", "--dry-run")
    expected = [
        (("--beside", data.parent), 2 + 3 * 8, ""),  # two lists, and what follows of eight couples
        (("--beside", data, "--count", "9"), 2 + 3 * 8, "--count 9 is capped at 2: 5% of the 45 rows"),
        (("--beside", data, "--count", "9", "--share", "0.5"), 4 + 3 * 16, ""),
        (("--count", "9"), 4 + 3 * 16, "not capped"),
    ]
    for options, requests, note in expected:
        result = tiny.done(*words, *options)
        assert f"about {requests} requests" in result.stdout and note in result.stderr, options
    for options, said in (
        ((), "how many refusals?"),
        (("--beside", data, "--share", "0.01"), "is not one refusal"),
        (("--count", "2", "--share", "0.5"), "--share has no effect without --beside"),
    ):
        tiny.one_clear_line(tiny.mlxtune(*words, *options), said)
    tiny.nothing_written(tmp_path / "made")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("forbidden: [law]", "persona is missing"),
        ("persona: Ada", "forbidden must be a list of at least one subject"),
        ("persona: Ada\nforbidden: [{subjects: law}]", "forbidden 1: unknown key subjects"),
        ("persona: Ada\nforbidden: [law, {subject: law}]", "the subject 'law' is there twice"),
        ("persona: Ada\nforbidden: [{subject: law, examples: [1]}]", "examples must be a list of texts"),
        ("persona: 3\nforbidden: [law]", "persona must be a text"),
        ("- Ada", "must be a mapping"),
    ],
)
def test_what_is_wrong_with_a_policy_is_said(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(UserError, match=said.replace("'", ".")):
        read_policy(tmp_path / "policy.yaml")

"""mlxtune make answers: each filter, the best of several, pairs, critiques, a person, and a kill."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import judges
import made
import pytest
import tiny
from judges import JudgingServer
from made import CUT, Scripted, lines, reasons
from test_made_answers import ASKED, GOOD, PLANTED

from mlxtune.data.rows import formats
from mlxtune.data.rows.sides import Side
from mlxtune.evaluate.checks.sandbox.sandbox import Programs
from mlxtune.evaluate.engines.request import Request
from mlxtune.evaluate.judging.report import Judging
from mlxtune.make.answers import WantedAnswers, expected_requests, make_answers
from mlxtune.make.given_rows import read_prompts_to_answer
from mlxtune.make.guard import Guard

REFERENCE = "It left on Monday. It arrives on Friday. Ask again if not. Number {}."


def prompts(folder: Path, *rows: dict[str, Any], system: str = "") -> WantedAnswers:
    """What is wanted of answers to these prompts."""
    found = read_prompts_to_answer(tiny.write_jsonl(folder / "prompts.jsonl", list(rows)), Programs(), system)
    return WantedAnswers(found.rows)


def run(out: Path, wanted: WantedAnswers, answers: Callable[[Request], str], **settings: Any) -> dict[str, Any]:
    """The document of a making with an engine that answers so."""
    with made.making(out, Scripted(answers), "answers", **settings) as one:
        return make_answers(one, wanted)


def by_id(answers: dict[str, str | list[str]]) -> Callable[[Request], str]:
    """An engine's answers by the id of the request; several for its samples."""

    def answer(request: Request) -> str:
        found = answers[request.id]
        return found if isinstance(found, str) else found[request.sample]

    return answer


def test_each_filter_drops_exactly_its_planted_rows(tmp_path: Path) -> None:
    planted = [(code, *(one if isinstance(one, tuple) else (ASKED, one))) for code in PLANTED for one in PLANTED[code]]
    planted += [("good", *(one if isinstance(one, tuple) else (ASKED, one))) for one in GOOD]
    rows = [{"id": f"{code} {number}", "prompt": asked} for number, (code, asked, _) in enumerate(planted)]
    answers: dict[str, Any] = {}
    for row, (code, _, text) in zip(rows, planted, strict=True):
        answers[row["id"]] = text + CUT if code == "cut" else text
    document = run(tmp_path / "made", replace(prompts(tmp_path, *rows), least_words=2), by_id(answers))
    for code, found in reasons(tmp_path / "made").items():
        assert {one["id"].rpartition(" ")[0] for one in found} == {code}, code
        assert len(found) == len(PLANTED[code])
    kept = lines(tmp_path / "made" / "train.jsonl")
    assert len(kept) == document["kept"] == len(GOOD) and document["wanted"] == len(rows)
    assert all(row["made"]["parents"][0].startswith("good ") for row in kept)
    assert kept[0]["made"]["how"] == "answers" and kept[0]["messages"][0] == {"role": "user", "content": ASKED}


def prefers_good(texts: dict[str, str]) -> str:
    """Of two good answers, and of two bad ones, it prefers none."""
    number = "".join(filter(str.isdigit, texts["Request"]))
    good = (REFERENCE.format(number), f"right: order {number} is here", "right: they are all alike")
    first, second = texts["Answer A"] in good, texts["Answer B"] in good
    if first == second:
        return "[[C]]"
    return "[[A]]" if first else "[[B]]"


def ended(*words: str | Path, status: int = 0) -> tuple[str, str]:
    """(What it prints, what it says on standard error) of a command that may ask this machine's network."""
    process = tiny.started(*words)
    out, err = process.communicate()
    assert process.returncode == status, err
    return out, err


@pytest.fixture(scope="module")
def is_conversational() -> Callable[[dict[str, Any]], bool]:
    """TRL's own test of a row, out of its file: to import it takes seconds."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("trl is not installed")
    source = (Path(found.origin).parent / "data_utils.py").read_text(encoding="utf-8")
    names = [one for one in ast.parse(source).body if isinstance(one, ast.FunctionDef)]
    (function,) = [one for one in names if one.name == "is_conversational"]
    place: dict[str, Any] = {"Any": Any}
    exec(compile(ast.Module([function], []), "data_utils.py", "exec"), place)
    checked: Callable[[dict[str, Any]], bool] = place["is_conversational"]
    assert not checked({"prompt": "a text"})
    return checked


@pytest.fixture
def asked(tmp_path: Path) -> list[str | Path]:
    """The words of a command that has eight prompts, with a reference each, answered three times; one of them always
    the same way, and one of them never well.
    """
    rows = [{"id": f"p{n}", "prompt": f"Where is order {n}?", "completion": REFERENCE.format(n)} for n in range(8)]
    file = tiny.write_jsonl(tmp_path / "prompts.jsonl", rows)
    recorded = []
    for n in range(8):
        for sample in range(3):
            text = f"right: order {n} is here" if sample == n % 3 else f"wrong {sample}: order {n} is gone"
            text = {6: "right: they are all alike", 7: f"wrong: {sample} of them"}.get(n, text)
            recorded.append({"id": f"p{n}", "sample": sample, "text": text, "finish": "stop"})
    replay = tiny.write_jsonl(tmp_path / "answers.jsonl", recorded)
    out = tmp_path / "made"
    return ["make", "answers", "--prompts", file, "--engine", f"replay:{replay}", "--best-of", "3", "--out", out]


def test_the_judge_chooses_and_pairs_hold_what_it_prefers_in_both_orders(
    asked: list[str | Path], is_conversational: Callable[[dict[str, Any]], bool], tmp_path: Path
) -> None:
    out = tmp_path / "made"
    with JudgingServer(prefers_good) as server:
        said, told = ended(*asked, "--judge", server.url, "--pairs")
    assert "the judge passed its exam: 20 of 20 right" in told
    assert "8 of 8 answers kept" in said
    # The exam; three pairs of answers to each prompt, but to the one whose answers are equal.
    assert len(server.asked) == 40 + 2 * 3 * 7
    kept = lines(out / "train.jsonl")
    assert [row["messages"][-1]["content"].startswith("right") for row in kept] == [True] * 7 + [False]
    assert kept[0]["made"]["chosen by"] == "judge" and kept[0]["made"]["scores"] == {"judge": 1.0}
    pairs = lines(out / "pairs.jsonl")
    assert [pair["made"]["parents"] for pair in pairs] == [[f"p{n}"] for n in range(6)]
    assert pairs[1] == {
        "prompt": [{"role": "user", "content": "Where is order 1?"}],
        "chosen": [{"role": "assistant", "content": "right: order 1 is here"}],
        "rejected": [{"role": "assistant", "content": "wrong 0: order 1 is gone"}],
        "made": {**pairs[1]["made"], "shown by": "judge"},
    }
    for part in ("prompt", "chosen", "rejected"):
        assert all(is_conversational({part: pair[part]}) for pair in pairs)
    read = list(formats.read(out / "pairs.jsonl"))  # as training does
    assert [record.side for record in read if isinstance(record, formats.Record)] == [Side.CHOSEN, Side.REJECTED] * 6
    assert reasons(out).keys() == {"not the best"} and len(reasons(out)["not the best"]) == 16


def test_a_judge_that_fails_its_exam_gives_no_verdicts_and_nothing_is_asked(
    asked: list[str | Path], tmp_path: Path
) -> None:
    with JudgingServer(lambda _: "[[A]]") as server:
        _, told = ended(*asked, "--judge", server.url, status=2)
        assert "cannot tell good from bad here (0 of 20 right" in told and "no verdicts" in told
        assert not (tmp_path / "made").exists()
        _, told = ended(*asked, "--judge", server.url, "--anyway", "--pairs")
    assert "it judges because of --anyway" in told
    assert lines(tmp_path / "made" / "pairs.jsonl") == []  # both orders never agree


def test_tests_and_the_majority_choose_without_a_judge(tmp_path: Path) -> None:
    add = {"id": "add", "prompt": "Write add.", "checks": [{"code": "assert add(2, 2) == 4 and add(1, 2) == 3"}]}
    rows = [add, {"id": "sum", "prompt": "How many clips?", "checks": ["number"]}]
    rows += [{"id": "lost", "prompt": "How many pins?", "checks": ["number"]}]
    file = tiny.write_jsonl(tmp_path / "prompts.jsonl", rows)
    texts = {
        "add": [f"```python\ndef add(a, b):\n    return a {sign} b\n```" for sign in "*+-"],
        "sum": ["It comes to 70.", "It comes to 72.", "The answer is 72"],
        "lost": ["1 pin", "2 pins", "3 pins"],
    }
    recorded = [{"id": id, "sample": n, "text": text} for id in texts for n, text in enumerate(texts[id])]
    replay = f"replay:{tiny.write_jsonl(tmp_path / 'answers.jsonl', recorded)}"
    words = ("make", "answers", "--prompts", file, "--engine", replay, "--best-of", "3", "--pairs")
    document = json.loads(tiny.done(*words, "--run-code", "--out", tmp_path / "made", "--json").stdout)
    assert (document["kept"], document["wanted"], document["pairs"]) == (2, 3, 1)
    program, number = lines(tmp_path / "made" / "train.jsonl")
    assert "a + b" in program["messages"][-1]["content"] and program["made"]["chosen by"] == "tests"
    assert number["messages"][-1]["content"] == "It comes to 72." and number["made"]["chosen by"] == "majority"
    (pair,) = lines(tmp_path / "made" / "pairs.jsonl")
    assert "a * b" in pair["rejected"][0]["content"] and pair["made"]["shown by"] == "checks"
    found = reasons(tmp_path / "made")
    assert {code: len(rows) for code, rows in found.items()} == {"no majority": 3, "check": 2, "not the best": 2}


def test_one_answer_alone_needs_no_majority_but_must_pass_what_is_known(tmp_path: Path) -> None:
    rows = [{"id": "unknown", "prompt": "How many clips?", "checks": ["number"]}]
    rows += [
        {"id": id, "prompt": "How many pins?", "reference": "5", "checks": ["number"]} for id in ("right", "wrong")
    ]
    answers: dict[str, str | list[str]] = {"unknown": "There are 7.", "right": "There are 5.", "wrong": "There are 6."}
    run(tmp_path / "made", prompts(tmp_path, *rows), by_id(answers))
    kept = lines(tmp_path / "made" / "train.jsonl")
    assert [row["made"]["parents"] for row in kept] == [["unknown"], ["right"]]
    assert kept[1]["made"]["scores"] == {"passed": 1, "of": 1} and "chosen by" not in kept[1]["made"]
    assert [one["id"] for one in reasons(tmp_path / "made")["check"]] == ["wrong"]


def test_what_is_criticised_is_revised_and_its_draft_stays_with_the_row(tmp_path: Path) -> None:
    wanted = replace(
        prompts(tmp_path, *({"id": id, "prompt": f"Where is {id}?"} for id in ("good", "bad", "cut", "mute"))),
        principles=["Say what to do next."],
    )
    answers = {f"{id}": f"The order {id} is on its way." for id in ("good", "bad", "mute")} | {"cut": f"Half of{CUT}"}
    answers |= {"critique of good": "Nothing.", "critique of bad": "1: no next step.", "critique of mute": f"1{CUT}"}
    answers["revision of bad"] = "It is on its way. Write to us on Friday if it is not there."
    run(tmp_path / "made", wanted, by_id({**answers}))
    good, bad = lines(tmp_path / "made" / "train.jsonl")
    assert good["messages"][-1]["content"] == answers["good"] and "draft" not in good["made"]
    assert bad["messages"][-1]["content"] == answers["revision of bad"]
    assert bad["made"]["draft"] == {"answer": answers["bad"], "critique": "1: no next step."}
    assert {code: rows[0]["id"] for code, rows in reasons(tmp_path / "made").items()} == {
        "no critique": "mute",
        "cut": "cut",
    }


def test_what_may_not_be_asked_is_not_and_no_more_is_kept_than_is_wanted(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "Find it."}], "tools": [tool]},
        {"messages": [{"role": "user", "content": "Name the largest planet of our solar system."}]},
        {"messages": [{"role": "system", "content": "Own."}, {"role": "user", "content": "What is rain made of?"}]},
        *({"messages": [{"role": "user", "content": f"What is thing {n} made of?"}]} for n in range(3)),
    ]
    wanted = replace(
        prompts(tmp_path, *rows, system="Be brief."), count=2, guard=Guard(["Name the largest planet of the system."])
    )
    asked: list[Request] = []

    def answer(request: Request) -> str:
        asked.append(request)
        return "It is made of small drops."

    document = run(tmp_path / "made", wanted, answer)
    assert [request.messages[0]["content"] for request in asked] == ["Own.", *["Be brief."] * 3]
    assert {code: rows[0]["id"] for code, rows in reasons(tmp_path / "made").items()} == {"tools": "1", "guarded": "2"}
    assert (document["kept"], document["wanted"], document["rows"]) == (2, 2, 2)
    spent = run(tmp_path / "spent", replace(wanted, count=None), answer, most_requests=3)
    assert (spent["kept"], spent["stopped"]) == (3, "--max-requests 3 is spent")
    said = run(tmp_path / "said", wanted, lambda one: f"Name the largest planet of the system {one.id}.")
    assert said["kept"] == 0 and len(reasons(tmp_path / "said")["guarded"]) == 5  # an answer may hold it too
    again = run(tmp_path / "spent", replace(wanted, count=None), answer, most_requests=4)
    assert (again["kept"], again["stopped"]) == (4, "")


def test_no_more_is_asked_for_a_small_count_than_is_promised_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    wanted = prompts(tmp_path, *({"id": f"p{n}", "prompt": f"Where is thing number {n}?"} for n in range(70)))
    for count, promised in ((1, 8), (9, 16), (40, 64), (None, 70)):
        asked = replace(wanted, count=count)
        document = run(tmp_path / "made", asked, lambda _: "It is in the shed, behind the door.")
        assert document["requests"] == expected_requests(asked) == promised
        assert document["kept"] == (count or 70)


def test_a_making_killed_while_it_revises_and_judges_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    rows = [{"id": f"p{n}", "prompt": f"Where is thing number {n}?"} for n in range(6)]
    wanted = replace(prompts(tmp_path, *rows), samples=2, principles=["Be brief."], pairs=True)
    left = [10**6]

    def dying(text: str) -> str:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return text

    def answer(request: Request) -> str:
        if request.id.startswith("critique") and request.id.endswith(("1", "3")):
            return dying("nothing")
        return dying(f"It is here, as said {len(request.id) + request.sample * 7} times.")

    def preference(first: str, second: str, request: str) -> float:
        dying("")
        return judges.by_length(first, second, request)

    judging = Judging(lambda: judges.Scripted(preference), identity="scripted")
    wanted = replace(wanted, judge=judging)
    run(tmp_path / "whole", wanted, answer)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    done = 10**6 - left[0]
    for most in (5, 17, 29, done - 3):  # answers, critiques, revisions, the judge
        left[0] = most
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / f"{most}", wanted, answer)
        left[0] = 10**6
        run(tmp_path / f"{most}", wanted, answer)
        assert 10**6 - left[0] < done  # what was there is not asked again
        found = {path.name: path.read_bytes() for path in (tmp_path / f"{most}").iterdir()}
        for name in whole:
            assert found[name].replace(f"{most}".encode(), b"") == whole[name].replace(f"{most}".encode(), b""), name


EDITOR = """import sys
from pathlib import Path
file, plan = Path(sys.argv[1]), Path({plan!r})
said, *rest = plan.read_text().splitlines()
plan.write_text("\\n".join(rest))
if said == "leave":
    sys.exit()
text = file.read_text()
file.write_text(text if said == "skip" else said + text)
"""


def test_a_person_writes_skips_leaves_and_goes_on(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    rows = [{"id": f"p{n}", "prompt": f"Where is order {n}?", "checks": ["json"]} for n in range(4)]
    file, elsewhere = tiny.write_jsonl(tmp_path / "prompts.jsonl", rows), tmp_path_factory.mktemp("person")
    plan, program = elsewhere / "plan", elsewhere / "editor.py"
    program.write_text(EDITOR.format(plan=str(plan)))
    editor = f"{sys.executable} {program}"
    words = ("make", "answers", "--prompts", file, "--by-hand", "--out", tmp_path / "made")
    plan.write_text("On its way.\nleave\n")
    said = tiny.done(*words, EDITOR=editor, VISUAL="").stdout
    assert "1 of 4 answers kept" in said and "the same command goes on" in said
    plan.write_text("skip\nTODO\nAs an AI\n")  # what a person writes is not filtered
    said = tiny.done(*words, EDITOR=editor, VISUAL="").stdout
    assert "1 skipped; 3 of 4 answers kept" in said and "stopped" not in said
    kept = lines(tmp_path / "made" / "train.jsonl")
    assert [row["messages"][-1]["content"] for row in kept] == ["On its way.", "TODO", "As an AI"]
    assert kept[0]["made"]["engine"] == "a person"
    assert "written by a person" in (tmp_path / "made" / "card.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--engine", "replay:{answers}", "--by-hand"), "--engine has no effect with --by-hand"),
        (("--by-hand", "--temperature", "0.2"), "--temperature has no effect with --by-hand"),
        ((), "nobody answers"),
        (("--engine", "replay:{answers}", "--pairs"), "--pairs has no effect without --best-of"),
        (("--engine", "replay:{answers}", "--judge", "j"), "--judge has no effect without --best-of"),
        (("--engine", "replay:{answers}", "--best-of", "3"), "prompt p0 has no check that could choose"),
        (("--engine", "replay:{answers}", "--words", "9", "2"), "the least is more than the most"),
        (("--engine", "{model}", "--best-of", "3", "--temperature", "0"), "all answers to a prompt are the same"),
        (("--engine", "replay:{answers}", "--critique", "{answers}.txt"), "No such file"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    options: tuple[str, ...], said: str, asked: list[str | Path], hf_model: Path, tmp_path: Path
) -> None:
    places = {"answers": str(tmp_path / "answers.jsonl"), "model": str(hf_model)}
    words = [option.format(**places) for option in options]
    out = tmp_path / "made"
    result = tiny.mlxtune("make", "answers", "--prompts", tmp_path / "prompts.jsonl", "--out", out, *words)
    tiny.one_clear_line(result, said)
    tiny.nothing_written(out)


def test_what_is_made_passes_the_check_and_trains(asked: list[str | Path], hf_model: Path, tmp_path: Path) -> None:
    words = [word for word in asked if word not in ("--best-of", "3")]
    tiny.done(*words, "--system", "Be brief.")
    made_rows = tmp_path / "made" / "train.jsonl"
    tiny.done("data", "check", "--model", hf_model, "--data", made_rows, "--strict")
    settings = ("train.steps=2", "train.batch_rows=2", "lora.rank=2", "data.valid_fraction=0.25")
    run_folder = tiny.trained(hf_model, made_rows, tmp_path / "run", *settings)
    assert (run_folder / "adapters.safetensors").is_file()


def test_a_model_on_this_machine_answers_and_a_dry_run_writes_nothing(hf_model: Path, tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Where is order {n}?"} for n in range(3)])
    words = (
        "make",
        "answers",
        "--prompts",
        file,
        "--engine",
        hf_model,
        "--max-tokens",
        "4",
        "--out",
        tmp_path / "made",
    )
    said = tiny.done(*words, "--dry-run").stdout
    assert "Where is order 0?" in said and "about 3 requests" in said and "measured: " in said
    assert not (tmp_path / "made").exists()
    document = json.loads(tiny.done(*words, "--json").stdout)
    assert document["requests"] == 3 and document["kept"] + sum(document["rejected"].values()) == 3


def test_a_pair_is_of_two_texts_and_checks_see_what_is_learned(tmp_path: Path) -> None:
    wanted = prompts(tmp_path, {"id": "town", "prompt": "Which town?", "checks": [{"regex": "^Paris"}]})
    wanted = replace(wanted, samples=2, pairs=True)
    run(tmp_path / "made", wanted, by_id({"town": ["\n Paris.", "Paris."]}))
    assert lines(tmp_path / "made" / "pairs.jsonl") == []
    assert lines(tmp_path / "made" / "train.jsonl")[0]["made"]["scores"] == {"passed": 2, "of": 2}

"""mlxtune eval --judge, through the installed command: recorded answers, and judges that do as they are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from fake_server import FakeServer
from judges import JudgingServer

from mlxtune.cli import judging
from mlxtune.cli.judging import OWN
from mlxtune.errors import UserError
from mlxtune.evaluate.judging.judge import CRITERIA
from mlxtune.evaluate.judging.served import ServedJudge

REFERENCE = "It left on Monday. It arrives on Friday. Ask again if not. Number {}."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of twelve prompts, and recorded answers: of a base, and of what was tuned."""
    folder = tmp_path_factory.mktemp("judged")
    rows = [
        {"id": f"p{n}", "prompt": f"Where is order {n}?", "completion": REFERENCE.format(n), "checks": ["ended"]}
        for n in range(12)
    ]
    tiny.write_jsonl(folder / "suite.jsonl", rows)
    tiny.write_jsonl(folder / "base.jsonl", [{"id": f"p{n}", "text": "bad"} for n in range(12)])
    tiny.write_jsonl(folder / "tuned.jsonl", [{"id": f"p{n}", "text": "fine" if n else "bad"} for n in range(12)])
    return folder


def test_what_eval_keeps_is_what_compare_and_rate_read(folder: Path, tmp_path: Path) -> None:
    tuned, base = f"replay:{folder / 'tuned.jsonl'}", f"replay:{folder / 'base.jsonl'}"
    outs = tmp_path / "one", tmp_path / "other"
    for out, options in zip(outs, (("--against", base), ()), strict=True):
        tiny.done("eval", "--model", tuned, "--suite", folder / "suite.jsonl", "--out", out, *options)
    summary = outs[1] / "summary.json"
    summary.write_text(summary.read_text().replace('"max_tokens": 512', '"max_tokens": 9'))
    compared = json.loads(tiny.done("compare", *outs, "--json").stdout)
    assert compared["checks"]["ended"]["verdict"] == "no difference shown" and compared["n"] == 12
    assert f"max_tokens differs: 512 in {outs[0]}, 9 in {outs[1]}" in compared["notes"]
    rated = json.loads(tiny.done("rate", outs[0], "--result", "--json").stdout)
    assert (rated["contestants"], rated["n"], rated["rated"], rated["left"]) == (["base", "tuned"], 12, 1, 11)


def is_good(answer: str, request: str) -> bool:
    number = request.removeprefix("Where is order ").removesuffix("?")
    return answer in ("fine", REFERENCE.format(number))


def prefers_good(texts: dict[str, str]) -> str:
    if "Answer" in texts:
        return "[[5]]" if is_good(texts["Answer"], texts["Request"]) else "[[2]]"
    return "[[A]]" if is_good(texts["Answer A"], texts["Request"]) else "[[B]]"


def words(folder: Path, server: JudgingServer, *options: str | Path) -> list[str | Path]:
    tuned, base = f"replay:{folder / 'tuned.jsonl'}", f"replay:{folder / 'base.jsonl'}"
    suite = folder / "suite.jsonl"
    return ["eval", "--model", tuned, "--against", base, "--suite", suite, "--judge", server.url, *options]


def ended(words: list[str | Path], status: int = 0) -> tuple[str, str]:
    """(What it prints, what it says on standard error) of a command that may ask this machine's network."""
    process = tiny.started(*words)
    out, err = process.communicate()
    assert process.returncode == status, err
    return out, err


def test_verdicts_stand_in_the_document_in_the_folder_and_on_the_terminal(folder: Path, tmp_path: Path) -> None:
    """Also where the evaluation was killed while the judge was asked: the same bytes, and few replies are asked for."""
    out = tmp_path / "evaluation"
    with JudgingServer(prefers_good) as server:
        found = json.loads(ended(words(folder, server, "--json", "--out", out))[0])["judge"]
        whole = {path.name: path.read_bytes() for path in out.iterdir()}
        asked = len(server.asked)
        (out / "judge.jsonl").write_bytes(whole["judge.jsonl"][:-300])
        for name in ("verdicts.jsonl", "summary.json", "scores.jsonl"):
            (out / name).unlink()
        said, _ = ended(words(folder, server, "--out", out))
        assert asked == 40 + 22 and len(server.asked) == asked + 22  # the portion of the exam was whole
    assert (found["wins"], found["ties"], found["losses"], found["identical"]) == (11, 1, 0, 1)
    assert (found["verdict"], found["exam"]["passed"], found["refused"]) == ("better", True, False)
    assert found["win_rate"] == pytest.approx(11.5 / 12) and found["difference"] == pytest.approx(11 / 12)
    lines = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["tie", *["win"] * 11]
    for name in ("verdicts.jsonl", "summary.json", "scores.jsonl", "answers.jsonl"):
        assert (out / name).read_bytes() == whole[name], name
    assert json.loads((out / "summary.json").read_text())["judge"] == found
    assert "11 wins, 1 ties, 0 losses of the tuned answers in 12 pairs: better" in said


@pytest.mark.parametrize(
    ("reply", "gates", "status", "said"),
    [
        (prefers_good, ("--min-better", "judge=0.5"), 0, ""),
        (prefers_good, ("--min-better", "judge=0.95"), 3, "gate not met: judge is +0.917, better"),
        (lambda _: "[[A]]", (), 0, "cannot tell good from bad here (0 of 20 right"),
        (lambda _: "[[A]]", ("--min-better", "judge=0.5"), 3, "gate not met: judge gave no verdicts"),
        (lambda _: "[[A]]", ("--max-worse", "ended=0.5"), 0, "no verdicts"),
        (lambda _: "[[A]]", ("--anyway", "--max-worse", "judge=0"), 0, "because of --anyway"),
        (lambda _: "A good one: [[A]]", ("--anyway",), 0, "11 of 12 replies of the judge could not be read"),
    ],
)
def test_a_refused_judge_claims_nothing_and_fails_the_gates_that_need_it(
    reply: Callable[[dict[str, str]], str], gates: tuple[str, ...], status: int, said: str, folder: Path
) -> None:
    with JudgingServer(reply) as server:
        out, err = ended(words(folder, server, *gates, "--json"), status)
    document: dict[str, Any] = json.loads(out)
    assert said in err + " ".join(document["judge"]["notes"])
    if document["judge"]["refused"]:
        assert not {"win_rate", "wins", "verdict", "difference"} & document["judge"].keys()


def test_ratings_go_by_criterion_and_by_the_users_own_rubric(folder: Path, tmp_path: Path) -> None:
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("Prefer what is fine.\n")
    with JudgingServer(prefers_good) as server:
        options = ("--rate", "likert", "--rubric", rubric, "--min-better", "accuracy=1")
        found = json.loads(ended(words(folder, server, *options, "--json"))[0])["judge"]
        table, _ = ended(words(folder, server, "--rate", "likert"))
        prompts = [asked["messages"][0]["content"] for asked in server.asked]
    assert list(found["criteria"]) == list(CRITERIA) and found["rubric"] == "Prefer what is fine."
    accuracy = found["criteria"]["accuracy"]
    assert (accuracy["base"], accuracy["tuned"], accuracy["verdict"]) == (2.0, 57 / 12, "better")
    assert any("Prefer what is fine." in prompt for prompt in prompts)
    assert any(line.split()[:4] == ["accuracy", "12", "2.000", "4.750"] for line in table.splitlines())


def test_a_small_model_as_its_own_judge_fails_the_exam_and_that_is_said(mlx_model: Path, folder: Path) -> None:
    suite, tuned = folder / "suite.jsonl", f"replay:{folder / 'tuned.jsonl'}"
    options = ("--against", mlx_model, "--max-tokens", "2", "--judge", mlx_model)
    said = tiny.done("eval", "--model", tuned, "--suite", suite, *options).stderr
    assert "this judge cannot tell good from bad here" in said and "the judge is one of the judged models" in said


WATCHED = """
import sys, weakref
from mlxtune.api import tuned
known = []
real = tuned.load_model
def watched(*words):
    print(len(known), "models were read,", sum(model() is not None for model in known), "are there", file=sys.stderr)
    loaded = real(*words)
    known.append(weakref.ref(loaded.model))
    return loaded
tuned.load_model = watched
"""


@pytest.mark.parametrize("other", ["its base", "a model"])
def test_the_models_that_answered_are_gone_when_the_judge_is_read(
    other: str, mlx_model: Path, run: Path, folder: Path
) -> None:
    sides = ("--adapter", run) if other == "its base" else ("--against", mlx_model)
    answering = 1 if other == "its base" else 2
    words = ("eval", "--model", mlx_model, *sides, "--suite", folder / "suite.jsonl", "--max-tokens", "1")
    process = tiny.started(*words, "--judge", mlx_model, code=WATCHED)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert f"{answering} models were read, 0 are there" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--judge", "replay:x.jsonl"), "recorded answers cannot judge"),
        (("--judge", "nowhere"), "nowhere"),
        (("--judge", "."), "--judge .: no model is there"),
        (("--judge", "http://127.0.0.1:9/v1#m", "--rubric", "none.txt"), "--rubric none.txt"),
        (("--judge", "http://192.0.2.1/v1#m"), "192.0.2.1 is another machine"),
        (("--rate", "likert"), "--rate has no effect without --judge: nobody judges"),
        (("--anyway",), "--anyway has no effect without --judge"),
        (("--judge", "MODEL", "--min-better", "jugde=1"), "Did you mean judge?"),
    ],
)
def test_what_is_wrong_with_a_judge_is_said_before_anything_is_answered(
    options: tuple[str, ...], message: str, mlx_model: Path, folder: Path
) -> None:
    answers = ("--model", f"replay:{folder / 'tuned.jsonl'}", "--against", f"replay:{folder / 'base.jsonl'}")
    given = [mlx_model if option == "MODEL" else option for option in options]
    tiny.one_clear_line(tiny.mlxtune("eval", *answers, "--suite", folder / "suite.jsonl", *given), message)


def test_a_judges_server_that_is_not_there_is_noticed_before_anything_is_answered(folder: Path, tmp_path: Path) -> None:
    with JudgingServer(prefers_good) as server:
        command = words(folder, server, "--out", tmp_path / "out")
    place = command.index(server.url)
    command[place] = f"{server.url}#m"
    _, err = ended(command, 2)
    assert f"no server answers at {server.url}" in err and not (tmp_path / "out").exists()


def test_a_judge_that_is_one_of_the_judged_is_known_by_another_name_too(
    mlx_model: Path, folder: Path, tmp_path: Path
) -> None:
    """A copy of the model's folder; a server that is named with its model or without, and this machine by its name."""
    copy = shutil.copytree(mlx_model, tmp_path / "copy")
    answers = ("--model", f"replay:{folder / 'tuned.jsonl'}", "--suite", folder / "suite.jsonl", "--max-tokens", "2")
    assert OWN in tiny.done("eval", *answers, "--against", mlx_model, "--judge", copy).stderr
    with JudgingServer(prefers_good) as server:
        for judge, is_own in ((server.url.replace("127.0.0.1", "localhost"), True), (f"{server.url}#other", False)):
            identities = [{"replay": "abc"}, {"server": f"{server.url}#tiny"}]
            judged = judging.judging(judge, "pairwise", None, False, False, "", identities)
            assert judged is not None and judged.notes == ((OWN,) if is_own else ())


@pytest.mark.parametrize(
    ("habits", "error"), [({"status": 404}, ""), ({"reply": b"Ollama"}, ""), ({"status": 401}, "401")]
)
def test_a_judges_server_need_not_list_its_models(habits: dict[str, Any], error: str) -> None:
    with FakeServer(**habits) as server:
        if error:
            with pytest.raises(UserError, match=error):
                ServedJudge(f"{server.url}#m")
        else:
            assert ServedJudge(f"{server.url}#m").model == "m"
        assert server.paths == ["/v1/models"]


@pytest.mark.parametrize(
    "options",
    [("--max-tokens", "9"), ("--temperature", "0.5"), ("--temperature", "0.5", "--samples", "2", "--seed", "1")],
)
def test_how_answers_are_made_is_no_option_where_all_are_recorded(options: tuple[str, ...], folder: Path) -> None:
    answers = ("--model", f"replay:{folder / 'tuned.jsonl'}", "--against", f"replay:{folder / 'base.jsonl'}")
    told = tiny.mlxtune("eval", *answers, "--suite", folder / "suite.jsonl", *options)
    tiny.one_clear_line(told, f"{options[-2]} has no effect here: all answers are recorded")


def test_a_judge_needs_two_sides_and_a_suite(folder: Path) -> None:
    judge = ("--judge", "http://127.0.0.1:9/v1#m")
    tuned = f"replay:{folder / 'tuned.jsonl'}"
    alone = tiny.mlxtune("eval", "--model", tuned, "--suite", folder / "suite.jsonl", *judge)
    tiny.one_clear_line(alone, "a judge needs two sides to compare")
    tiny.one_clear_line(tiny.mlxtune("eval", "--model", tuned, *judge), "--judge has no effect without --suite")

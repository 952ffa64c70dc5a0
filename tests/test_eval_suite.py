"""mlxtune eval --suite: answers of two sides to the same prompts, through the installed command."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from fake_server import FakeServer
from safetensors.numpy import load_file, save_file

from mlxtune.data.template.tokenizer_changes import Changes
from mlxtune.demo.story import data_folder
from mlxtune.evaluate.checks.suite import read_suite
from mlxtune.evaluate.comparison.overlap import overlap_notes

CHECKS: list[Any] = ["ended", {"contains": "e"}, {"contains": "\ufffd"}]  # many answers of a tiny model are no text
SMALL = ("--max-tokens", "8")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve prompts under one system prompt; two of them were trained on."""
    rows = []
    for number, row in enumerate(tiny.conversations(34)[22:]):
        messages = [{"role": "system", "content": "You count things."}, *row["messages"]]
        rows.append({"id": f"p{number}", "messages": messages})
    folder = tmp_path_factory.mktemp("suite")
    (folder / "suite.yaml").write_text(json.dumps({"checks": CHECKS}))
    return tiny.write_jsonl(folder / "suite.jsonl", rows)


def asked(model: Path | str, suite: Path, *options: Path | str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tiny.done("eval", "--model", model, "--suite", suite, "--json", *options).stdout)
    return found


def answers(folder: Path, side: str) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return {line["id"]: line["text"] for line in lines if line["side"] == side}


def passes(folder: Path, side: str) -> int:
    lines = [json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines()]
    return sum(line["passes"] for line in lines if line["side"] == side)


def test_base_and_tuned_answer_the_same_prompts_and_are_compared_check_by_check(
    mlx_model: Path, run: Path, suite: Path, tmp_path: Path
) -> None:
    """Each answer is the one that `generate` gives, of the base and of the tuned model."""
    out = tmp_path / "evaluation"
    found = asked(mlx_model, suite, "--adapter", run, "--out", out, *SMALL)
    assert found["n"] == 12 and found["smallest_difference"] > 0.4
    assert list(found["checks"]) == ["ended", "contains", "contains-2"]
    for result in found["checks"].values():
        assert result["difference"] == pytest.approx(result["tuned"] - result["base"])
        assert {"base", "tuned", "difference", "interval", "p", "verdict"} <= result.keys()
    assert found["sides"]["tuned"]["adapter"] == str(run)
    assert found == json.loads((out / "summary.json").read_text())
    asks = ("generate", "--model", mlx_model, *SMALL, "--raw", "--system", "You count things.", "--prompt")
    for number in (0, 3):
        question = tiny.conversations(34)[22 + number]["messages"][0]["content"]
        for side, options in (("base", ()), ("tuned", ("--adapter", run))):
            assert tiny.done(*asks, question, *options).stdout == answers(out, side)[f"p{number}"] + "\n"
    assert answers(out, "base") != answers(out, "tuned")


def test_rows_that_were_trained_on_or_chose_the_checkpoint_are_said(mlx_model: Path, run: Path, suite: Path) -> None:
    notes = " ".join(asked(mlx_model, suite, "--adapter", run, *SMALL)["notes"])
    assert "2 of 12 prompts were trained on (p0, p1)" in notes
    assert "6 of 12 prompts chose the checkpoint (p2, p3, p4, p5, p6, ...)" in notes
    assert "of 24 training answers 24 pass contains" in notes  # "The answer is 7." and so on


def test_a_model_against_itself_gives_the_same_bytes_from_both_sides(
    mlx_model: Path, suite: Path, tmp_path: Path
) -> None:
    """By chance too, with several answers to a prompt; both sides are really computed."""
    for options in ((), ("--temperature", "1.0", "--samples", "2", "--top-p", "0.9")):
        out = tmp_path / f"evaluation{len(options)}"
        found = asked(mlx_model, suite, "--against", mlx_model, "--out", out, *SMALL, *options)
        lines = (out / "answers.jsonl").read_text()
        base = [line for line in lines.splitlines() if '"side": "base"' in line]
        tuned = [line for line in lines.splitlines() if '"side": "tuned"' in line]
        assert [line.replace('"base"', '"tuned"', 1) for line in base] == tuned
        assert len(tuned) == (24 if options else 12)
        assert passes(out, "base") == passes(out, "tuned") >= 8
        assert {result["verdict"] for result in found["checks"].values()} == {"no difference shown"}
        assert {result["difference"] for result in found["checks"].values()} == {0.0}


def test_an_adapter_that_is_zero_changes_nothing_and_that_is_said(
    mlx_model: Path, run: Path, suite: Path, tmp_path: Path
) -> None:
    zero, out = tmp_path / "zero", tmp_path / "evaluation"
    zero.mkdir()
    shutil.copy(run / "adapter_config.json", zero)
    tensors = load_file(run / "adapters.safetensors")
    of_zero = {name: np.zeros_like(array) if name.endswith("lora_b") else array for name, array in tensors.items()}
    save_file(of_zero, zero / "adapters.safetensors")
    found = asked(mlx_model, suite, "--adapter", zero, "--out", out, *SMALL)
    assert answers(out, "base") == answers(out, "tuned")
    assert passes(out, "base") == passes(out, "tuned") >= 8
    assert {result["verdict"] for result in found["checks"].values()} == {"no difference shown"}
    assert "changes nothing: all that it trained is as it began" in " ".join(found["notes"])


NOT_LOADED = "from mlxtune.adapter import adapter_files\nadapter_files.load_adapter = lambda *_: None"
LEFT_OFF = """
from mlxtune.adapter import attach
real = attach.attach
def off(model, *others):
    keys = real(model, *others)
    for layer in attach.adapted_layers(model).values():
        layer.scale = 0.0
    return keys
attach.attach = off
"""


@pytest.mark.parametrize("planted", [NOT_LOADED, LEFT_OFF])
def test_an_adapter_that_is_not_applied_is_noticed(planted: str, mlx_model: Path, run: Path, suite: Path) -> None:
    process = tiny.started("eval", "--model", mlx_model, "--adapter", run, "--suite", suite, *SMALL, code=planted)
    _, told = process.communicate()
    assert process.returncode == 2
    assert f"error: the adapter of {run} is not applied" in told


SLOW_BATCHES_OF_2 = """
import time
from mlxtune.evaluate.engines import local, room
room.rows_at_once = lambda *_: 2
real = local.Local.answers
def slow(self, requests):
    time.sleep(0.08)
    return real(self, requests)
local.Local.answers = slow
"""


def test_an_evaluation_that_was_killed_three_times_ends_with_the_same_bytes(
    mlx_model: Path, run: Path, suite: Path, tmp_path: Path
) -> None:
    command = ("eval", "--model", mlx_model, "--adapter", run, "--suite", suite, "--temperature", "0.9", *SMALL)

    def started(out: Path) -> Any:
        return tiny.started(*command, "--out", out, code=SLOW_BATCHES_OF_2)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = started(whole)
    process.communicate()
    assert process.returncode == 0
    file = killed / "answers.jsonl"
    left = []
    for lines in (3, 11, 19):  # in both sides
        process = started(killed)
        while not file.exists() or file.read_bytes().count(b"\n") < lines:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.communicate()
        left.append(file.read_bytes().count(b"\n"))
    assert sorted(set(left)) == left and left[-1] < 24  # each time further, and never done
    process = started(killed)
    process.communicate()
    assert process.returncode == 0
    for name in ("answers.jsonl", "scores.jsonl", "summary.json", "plan.json", "prompts.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    times = [json.loads(line) for line in (killed / "times.jsonl").read_text().splitlines()]
    kept = [(line["side"], *line["ids"]) for line in times]
    assert len(set(kept)) == len(kept) >= 9  # what was kept was not computed again


@pytest.mark.parametrize("changed", ["template", "end", "tokenizer", "run"])
def test_answers_are_not_kept_where_the_files_that_decide_them_changed(
    changed: str, mlx_model: Path, run: Path, suite: Path, tmp_path: Path
) -> None:
    """The chat template, the end tokens, the tokenizer's settings; and what the run itself changed in these."""
    model, tuned, out = tmp_path / "model", tmp_path / "run", tmp_path / "evaluation"
    shutil.copytree(mlx_model, model)
    tuned.mkdir()
    for name in ("adapter_config.json", "adapters.safetensors"):
        shutil.copy(run / name, tuned)
    words = ("eval", "--model", model, "--adapter", tuned, "--suite", suite, "--out", out, "--max-tokens", "1")
    tiny.done(*words)
    (model / "README.md").write_text("No answer depends on this.")
    assert "24 answers were there already" in tiny.done(*words).stderr
    if changed == "template":
        (model / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    elif changed == "end":
        (model / "generation_config.json").write_text('{"eos_token_id": 1}')
    elif changed == "tokenizer":
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    else:
        Changes(chat_template="{{ messages[-1].content }}").save(tuned)
    tiny.one_clear_line(tiny.mlxtune(*words), str(out))


def test_ctrl_c_ends_an_evaluation_that_says_how_it_goes_on(mlx_model: Path, suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation"
    words = ("eval", "--model", mlx_model, "--suite", suite, *SMALL, "--out", out)
    process = tiny.started(*words, code=SLOW_BATCHES_OF_2)
    while not (out / "answers.jsonl").exists() or not (out / "answers.jsonl").stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130
    assert f"{out} keeps the answers so far: the same command goes on" in told and "Traceback" not in told
    assert "answers were there already" in tiny.done(*words).stderr


def test_the_demos_questions_are_no_training_rows_and_their_answers_pass_every_check() -> None:
    folder = data_folder()
    suite = read_suite(folder / "test.jsonl")
    assert (len(suite.rows), list(suite.names)) == (24, ["json", "schema", "ended", "contains"])
    assert suite.notes == []  # among them: a reference that does not pass
    splits = {}
    for name in ("train", "valid"):
        splits[name] = [row["messages"] for row in map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())]
    assert overlap_notes(suite.rows, splits["train"], splits["valid"]) == []


def test_a_gate_that_is_not_met_ends_with_status_3(mlx_model: Path, suite: Path, tmp_path: Path) -> None:
    """Against recorded answers: every prompt ended, and none."""
    for name, finish in (("good", "stop"), ("bad", "length")):
        rows = [{"id": f"p{n}", "text": "yes", "finish": finish} for n in range(12)]
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    good, bad = (f"replay:{tmp_path / name}.jsonl" for name in ("good", "bad"))
    better = ("eval", "--model", good, "--against", bad, "--suite", suite)
    worse = ("eval", "--model", bad, "--against", good, "--suite", suite)
    met = tiny.done(*better, "--min-better", "ended=0.9", "--max-worse", "contains=0", "--json")
    assert [gate["met"] for gate in json.loads(met.stdout)["gates"]] == [True, True]
    assert "base: 12 of 12 answers were cut" in json.loads(met.stdout)["notes"]  # and not after 512 tokens
    for command, gate in ((better, "--min-better contains=0"), (worse, "--max-worse ended=0.5")):
        unmet = tiny.mlxtune(*command, *gate.split(), "--json")
        assert unmet.returncode == 3
        assert "gate not met: " in unmet.stderr and "Traceback" not in unmet.stderr
        assert not json.loads(unmet.stdout)["gates"][0]["met"]


def test_verdicts_go_with_the_judge_who_gave_them(suite: Path, tmp_path: Path) -> None:
    """The same folder again without a judge: `rate` would compare a person with one who is not in the summary."""
    rows = [{"id": f"p{n}", "text": "yes"} for n in range(12)]
    recorded = f"replay:{tiny.write_jsonl(tmp_path / 'same.jsonl', rows)}"
    kept = ("--against", recorded, "--out", tmp_path / "kept")
    asked(recorded, suite, *kept)
    tiny.write_jsonl(tmp_path / "kept" / "verdicts.jsonl", [{"id": "p1", "sample": 0, "outcome": "win"}])
    assert "judge" not in asked(recorded, suite, *kept)
    assert not (tmp_path / "kept" / "verdicts.jsonl").exists()


def test_a_server_and_recorded_answers_may_stand_on_either_side(mlx_model: Path, suite: Path, tmp_path: Path) -> None:
    recorded = tiny.write_jsonl(tmp_path / "recorded.jsonl", [{"id": f"p{n}", "text": "a\ufffd"} for n in range(12)])
    with FakeServer(models=("tiny", "other")) as fake:
        words = ("eval", "--model", f"{fake.url}#tiny", "--against", f"replay:{recorded}", "--suite", suite, "--json")
        process = tiny.started(*words)
        said, told = process.communicate()
        assert process.returncode == 0, told
        found = json.loads(said)
        assert (found["checks"]["contains-2"]["base"], found["checks"]["contains-2"]["tuned"]) == (1.0, 0.0)
        assert found["sides"]["tuned"] == {"server": f"{fake.url}#tiny"}
        assert len(fake.asked) == 12
        process = tiny.started("eval", "--model", fake.url, "--suite", suite)
        _, told = process.communicate()
        assert process.returncode == 2 and "has several models" in told


def test_what_is_not_asked_and_what_is_not_known_of_a_prompt_is_said(hf_model: Path, tmp_path: Path) -> None:
    """Turns behind the first answer; a model without a chat template."""
    model = tmp_path / "model"
    shutil.copytree(hf_model, model)
    tiny.make_tokenizer(model, chat=False)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    rows = [{"question_id": 1, "turns": ["One", "And two?"]}, {"question_id": 2, "turns": ["Two"]}]
    suite = tiny.write_jsonl(tmp_path / "suite.jsonl", rows)
    tiny.one_clear_line(tiny.mlxtune("eval", "--model", model, "--suite", suite), "has no checks, and nobody judges")
    notes = " ".join(asked(model, suite, *SMALL, "--out", tmp_path / "kept")["notes"])
    assert "1 of 2 prompts have further turns, which are not asked" in notes
    assert "has no chat template: prompts are given to it as plain text" in notes


def test_a_model_alone_is_called_the_base(mlx_model: Path, suite: Path) -> None:
    found = asked(mlx_model, suite, *SMALL)
    assert list(found["sides"]) == ["base"]
    assert all("tuned" not in result and len(result["interval"]) == 2 for result in found["checks"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "SUITE", "--data", "x"), "--data has no effect with --suite"),
        (("--suite", "SUITE", "--set", "fast.head=off"), "--set has no effect with --suite"),
        (("--max-tokens", "9"), "--max-tokens has no effect without --suite"),
        (("--suite", "SUITE", "--samples", "2"), "--samples has no effect at --temperature 0"),
        (("--suite", "SUITE", "--against-adapter", "x"), "--against-adapter has no effect without --against"),
        (("--suite", "SUITE", "--min-better", "ended=0.1"), "a gate needs two sides"),
        (("--suite", "SUITE", "--against", "MODEL", "--min-better", "exact=0.1"), "the suite has no such check"),
        (("--suite", "SUITE", "--against", "MODEL", "--max-worse", "ended=2"), "a number from 0 to 1"),
        (("--suite", "SUITE", "--against", "replay:none.jsonl"), "no data file none.jsonl"),
        (("--suite", "SUITE", "--against", "http://192.0.2.1/v1#m"), "192.0.2.1 is another machine"),
        (("--suite", "SUITE", "--against", "replay:x", "--against-adapter", "y"), "takes no adapter"),
        (("--suite", "none.jsonl"), "none.jsonl"),
        (("--suite", "SUITE", "--allow-remote"), "--allow-remote has no effect here: no server is asked"),
    ],
)
def test_what_cannot_be_asked_is_one_clear_line(
    options: tuple[str, ...], message: str, mlx_model: Path, suite: Path
) -> None:
    places = {"SUITE": suite, "MODEL": mlx_model}
    tiny.one_clear_line(tiny.mlxtune("eval", "--model", mlx_model, *(places.get(one, one) for one in options)), message)


def test_answers_without_a_suite_give_no_loss(tmp_path: Path) -> None:
    tiny.one_clear_line(tiny.mlxtune("eval", "--model", "replay:answers.jsonl"), "gives answers, no loss")

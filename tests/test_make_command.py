"""mlxtune make instructions, as it is typed: killed and gone on with, with a server, a model and recorded answers."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import guard
import pytest
import tiny
from made import Scripted, Talking, lines, opened

from mlxtune.cli import main
from mlxtune.cli.make import Progress
from mlxtune.evaluate.engines.local import Local
from mlxtune.evaluate.engines.request import Request
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.make import engine as engines
from mlxtune.make.filters import Limits
from mlxtune.make.folder import OURS, Making, begun_on
from mlxtune.make.guard import Guard
from mlxtune.make.instructions import SelfInstruct
from mlxtune.make.prompts import MORE
from mlxtune.make.reasons import REASONS
from mlxtune.make.seeds import read_seeds

WORDS = re.findall(
    r"\w+",
    "river window garden winter stone letter mountain kitchen engine teacher colour market island bridge paper silver"
    " breakfast village number history weather music journey language planet forest station harbour village summer"
    " morning question answer reason feather circle shadow thunder candle pocket button ladder basket helmet",
)
TASKS = (
    *("Tell a short story of two brothers.", "Why is the sea salty at all?", "Sum up this book."),
    *(
        "List five words that rhyme with moon.",
        "What weighs more, iron or wool?",
        "Plan a weekend for a family of six.",
    ),
    *("Turn the recipe into metric units.", "Give a shorter title.", "Which of these animals lay eggs?"),
)
SEEDS = [
    {
        "id": f"s{n}",
        "instruction": task,
        "instances": [{"input": "", "output": "So it is."}],
        "is_classification": False,
    }
    for n, task in enumerate(TASKS)
]
ROUNDS = ("--count", "14", "--at-once", "3")  # two rounds: 3 prompts, 12 tasks, 12 kinds, 12 examples


def says(prompt: str) -> str:
    """What the engine of these tests answers: a function of the prompt."""
    draw = random.Random(prompt)
    if prompt.startswith(MORE):
        return "\n".join(f"{n}. How does {' '.join(draw.sample(WORDS, 7))} end?" for n in range(1, 5))
    if prompt.endswith("Classification:"):
        return draw.choice(("Yes", "No"))
    return f"Example 1\nInput: {draw.choice(WORDS)} {draw.randrange(999)}\nOutput: It ends well, I think."


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    return tiny.write_jsonl(tmp_path / "seeds.jsonl", SEEDS)


@pytest.fixture
def server() -> Iterator[Talking]:
    with Talking(says) as one:
        yield one


def words(seeds: Path, engine: str | Path, out: Path, *more: str) -> list[str]:
    return ["make", "instructions", "--seeds", str(seeds), "--engine", str(engine), "--out", str(out), *more]


def spoken(*line: str) -> str:
    """What a command that asks a server printed; it must end well."""
    process = tiny.started(*line)
    said, told = process.communicate()
    assert process.returncode == 0, told
    return said + told


def held(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_making_that_is_killed_three_times_goes_on_to_the_same_bytes(
    seeds: Path, server: Talking, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    said = spoken(*words(seeds, server.url, whole, *ROUNDS))
    assert "14 of 14 instructions kept" in said and len(lines(whole / "train.jsonl")) == 14
    once = len(server.asked)
    assert once == 2 * (3 + 12 + 12) + 2  # the first one twice more, to see what a seed does
    for later, number in ((3, signal.SIGKILL), (14, signal.SIGKILL), (9, signal.SIGINT), (7, signal.SIGKILL)):
        with tiny.started(*words(seeds, server.url, killed, *ROUNDS)) as process:
            server.ends[len(server.asked) + later] = lambda process=process, sent=number: os.kill(process.pid, sent)
            _, told = process.communicate()
            assert process.returncode == (-9 if number == signal.SIGKILL else 130)
        if number == signal.SIGINT:
            assert "stopped" in told and "keeps the answers so far: the same command goes on" in told.replace("\n", " ")
    before = len(server.asked)
    last = spoken(*words(seeds, server.url, killed, *ROUNDS))
    were_there = re.search(r"(\d+) answers were there already", last)
    assert were_there and 0 < int(were_there[1]) == once - (len(server.asked) - before)
    assert held(killed) == held(whole)


def test_engines_with_the_same_answers_make_the_same_rows_but_for_their_names(
    seeds: Path, server: Talking, tmp_path: Path
) -> None:
    spoken(*words(seeds, server.url, tmp_path / "served", *ROUNDS))
    document = json.loads(
        tiny.done(
            *words(seeds, f"replay:{tmp_path / 'served' / 'journal.jsonl'}", tmp_path / "replayed", *ROUNDS, "--json")
        ).stdout
    )
    assert document["kept"] == 14 and document["engine"] == "replay:journal.jsonl"
    identity = {"how": "instructions"}
    engine = Scripted(lambda request: says(request.messages[-1]["content"]))
    with Making(tmp_path / "scripted", identity, opened(engine)) as one:
        SelfInstruct(one, read_seeds(seeds), Limits(), Guard(), 3, 0).run(14)

    def rows(name: str) -> tuple[list[Any], set[str]]:
        found = lines(tmp_path / name / "train.jsonl")
        return found, {row["made"].pop("engine") for row in found}

    served, names = rows("served")
    assert names == {f"{server.url}#tiny"}
    assert rows("replayed") == (served, {"replay:journal.jsonl"}) and rows("scripted") == (served, {"scripted"})


def test_a_making_that_may_ask_no_more_ends_well_says_so_and_goes_on_when_it_may(seeds: Path, tmp_path: Path) -> None:
    engine = Scripted(lambda request: says(request.messages[-1]["content"]))
    with Making(tmp_path / "first", {"how": "instructions"}, opened(engine)) as one:
        SelfInstruct(one, read_seeds(seeds), Limits(), Guard(), 3, 0).run(5)
    line = words(seeds, f"replay:{tmp_path / 'first' / 'journal.jsonl'}", tmp_path / "made", "--at-once", "3")
    told = tiny.done(*line, "--count", "5", "--max-requests", "20").stdout
    assert "20 requests" in told and "5 of 5 instructions kept" in told and "stopped" not in told
    told = tiny.done(*line, "--count", "6", "--max-requests", "20").stdout
    assert "5 of 6 instructions kept" in told and "stopped: --max-requests 20 is spent" in told
    told = tiny.done(*line, "--count", "6").stdout
    assert "27 requests" in told and "6 of 6 instructions kept" in told


def test_progress_tells_the_rate_of_this_process_and_the_time_left() -> None:
    one = Progress(100, print)
    assert one.line(14, 4, 20, 8.0) == "20 of 100 kept, 14 requests, 30 a minute"
    assert one.line(40, 30, 45, 60.0) == "45 of 100 kept, 40 requests, 30 a minute, 2:12 left"
    assert Progress(None, print).line(3, 3, 1, 60.0) == "1 kept, 3 requests, 3 a minute"


def test_what_is_made_passes_the_check_of_data_and_trains(
    seeds: Path, server: Talking, mlx_model: Path, tmp_path: Path
) -> None:
    spoken(*words(seeds, server.url, tmp_path / "made", *ROUNDS))
    made = tmp_path / "made" / "train.jsonl"
    tiny.done("data", "check", "--model", mlx_model, "--data", made, "--strict")
    run = tiny.trained(mlx_model, made, tmp_path / "run", "train.steps=2", "lora.rank=2", "data.valid_fraction=0.2")
    assert (run / "adapters.safetensors").is_file()


def test_a_model_makes_rows_and_a_dry_run_writes_nothing(seeds: Path, mlx_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    few = ("--max-tokens", "5", "--at-once", "2", "--temperature", "2")
    dry = tiny.done(*words(seeds, mlx_model, out, *few, "--dry-run")).stdout
    assert dry.count("--- prompt round 1 prompt ") == 2 and len(re.findall(r"^\d\. ", dry, re.MULTILINE)) == 16
    assert re.search(r"about 4\d\d requests, [\d,]+ tokens of answers, .* \(measured: 2 answers\)", dry)
    tiny.nothing_written(out)
    told = tiny.done(*words(seeds, mlx_model, out, *few)).stdout
    assert "6 requests: 6 unparseable" in told and "stopped: the engine repeats itself" in told
    before = held(out)
    again = tiny.done(*words(seeds, mlx_model, out, *few))
    assert "6 answers were there already" in again.stderr and held(out) == before


def test_a_base_model_goes_on_with_a_list_and_another_one_where_it_is_told_to(
    seeds: Path, hf_model: Path, mlx_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        (base / name).write_bytes((hf_model / name).read_bytes())
    tiny.make_plain_tokenizer(base)
    few = ("--max-tokens", "2", "--at-once", "1", "--dry-run")
    for model, more in ((base, ()), (mlx_model, ("--completion",))):
        dry = tiny.done(*words(seeds, model, tmp_path / "out", *few, *more)).stdout
        assert "Come up with a series of tasks:\n1. " in dry and dry.splitlines()[-3] == "9."


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--words", "9..3"), ("no range of words",)),
        (("--temperature", "0.2"), ("--temperature has no effect here", "recorded")),
        (("--allow-remote",), ("--allow-remote has no effect here",)),
        (("--seeds", "text.jsonl"), ("line 1: a seed is a question with its answer",)),
        (("--seeds", "twice.jsonl"), ("several seeds have the id a",)),
        (("--seeds", "other.jsonl"), ("other.jsonl line 1: ", "A seed is a row with instruction and")),
        (("--dry-run", "--force"), ("--force has no effect with --dry-run",)),
        (("--avoid", "nothing"), ("no data file nothing",)),
        (("--completion", "--engine", "http://127.0.0.1:9/v1#m"), ("--completion needs a model here",)),
        (("--engine", "http://example.com/v1"), ("example.com is another machine", "--allow-remote")),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    seeds: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    expected: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_jsonl(tmp_path / "text.jsonl", [{"text": "Once upon a time."}])
    tiny.write_jsonl(tmp_path / "twice.jsonl", [{**seed, "id": "a"} for seed in SEEDS])
    tiny.write_jsonl(tmp_path / "other.jsonl", [{"quest": "Why?", "reply": "So."}])
    answers = tiny.write_jsonl(tmp_path / "answers.jsonl", [{"id": "round 1 prompt 1", "text": "x"}])
    with pytest.raises(SystemExit) as ended:
        main(words(seeds, f"replay:{answers}", tmp_path / "made", *more))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("rror: ") == 1 and all(text in said for text in expected), said
    tiny.nothing_written(tmp_path / "made")


def test_the_page_on_making_shows_commands_and_reasons_that_there_are() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "making.md").read_text(encoding="utf-8")
    lines_of_page = re.findall(r"^(mlxtune .*)$", page, re.MULTILINE)
    assert len(lines_of_page) == 8
    for line in lines_of_page:
        name, given = guard.parsed(line.partition(" #")[0].split())
        assert given, line  # click refuses it
        assert name
    assert set(re.findall(r"Many `(.*?)`", page)) <= set(REASONS)
    assert set(re.findall(r"`made/(\S+?)`", page)) <= set(OURS)


def test_a_making_that_goes_on_another_day_asks_what_it_asked_on_its_first_one(hf_model: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "dated", tmp_path / "made"
    shutil.copytree(hf_model, model)
    (model / "chat_template.jinja").write_text(tiny.CHATML + "{{- strftime_now('%Y-%m-%d') }}")
    file = tiny.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "What day is it?"}])
    line = ("make", "answers", "--prompts", file, "--engine", model, "--max-tokens", "4", "--out", out)
    tiny.done(*line)
    begun = out / "making.json"
    (day,) = re.findall(r'"day": ?"(20[\d-]+)"', begun.read_text())
    begun.write_text(begun.read_text().replace(day, "2024-02-29"))  # as if that had been then
    assert "1 answers were there already" in tiny.done(*line).stderr and "2024-02-29" in begun.read_text()
    engine = engines.opened(str(model), Sampling(max_tokens=4), begun_on=begun_on(out))()
    request = Request("0", [{"role": "user", "content": "What day is it?"}])
    assert isinstance(engine, engines.Patient) and isinstance(engine.engine, Local)
    ((prompt, _),) = engine.engine.tokens_of([request])
    assert engine.engine.loaded.tokenizer.decode(prompt).endswith("2024-02-29")

"""generate, chat, eval, doctor, and the demo on a tiny model, through the installed command."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import mlx.core as mx
import numpy as np
import page_readers
import pytest
import tiny

from mlxtune.adapter import adapter_files, attach
from mlxtune.cli.talk import Talk
from mlxtune.data.chat import masking
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.evaluate.generate import prompt_ids
from mlxtune.model.load import load


def test_the_answer_alone_is_on_standard_output(mlx_model: Path, run: Path) -> None:
    """Greedy decoding, against an argmax loop over full forward passes written here."""
    options = ("--model", mlx_model, "--adapter", run, "--prompt", "Question number 3?", "--max-tokens", "12")
    result = tiny.mlxtune("generate", *options)
    assert result.returncode == 0, result.stderr
    loaded = load(str(mlx_model))
    adapter_files.load_adapter(loaded.model, run)
    messages = [{"role": "user", "content": "Question number 3?"}]
    ids = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    made: list[int] = []
    while len(made) < 12 and (not made or made[-1] not in loaded.eos_ids):
        made.append(int(mx.argmax(loaded.model(mx.array([ids + made]))[0, -1]).item()))
    made = made[:-1] if made[-1] in loaded.eos_ids else made
    assert result.stdout == loaded.tokenizer.decode(made) + "\n"


def test_sampling_repeats_with_its_seed_and_changes_with_it(mlx_model: Path) -> None:
    def sample(*options: str) -> str:
        command = ("generate", "--model", mlx_model, "--prompt", "Hi", "--max-tokens", "20", "--temperature", "1.5")
        return tiny.mlxtune(*command, *options).stdout

    assert sample() == sample()
    assert sample() != sample("--seed", "1")
    assert sample("--top-p", "0.01") != sample()
    cold = ("--temperature", "0.05")  # else chance outweighs the penalty on a model of random weights
    assert sample("--repetition-penalty", "1.9", *cold) != sample(*cold)


def test_the_system_prompt_and_the_runs_template_variables_are_used(
    mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    """A template that prints a variable: recorded in the run, and there again when the run is used."""
    import shutil

    model = tmp_path / "model"
    shutil.copytree(mlx_model, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ mood | default('none') }}" + settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    out = tmp_path / "run"
    options = ("--set", "train.steps=1", "--set", "data.template_kwargs={mood: calm}")
    assert tiny.mlxtune("train", "--model", model, "--data", data, "--out", out, *options).returncode == 0
    loaded = load(str(model))
    messages = [{"role": "user", "content": "Hi"}]
    seen = loaded.tokenizer.decode(prompt_ids(loaded, messages, *Talk(loaded, out, Sampling()).settings))
    assert seen == "calm<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    answers = {
        tiny.mlxtune("generate", "--model", model, "--prompt", "Hi", "--max-tokens", "60", *extra).stdout
        for extra in ((), ("--system", "Be brief."))
    }
    assert len(answers) == 2


def test_chat_keeps_history_and_obeys_its_commands(mlx_model: Path) -> None:
    """Three lines through a pipe: the second answer depends on the first; /reset makes it the first again."""
    process = tiny.started("chat", "--model", mlx_model, "--max-tokens", "30", "--repetition-penalty", "1.5")
    said, told = process.communicate("hello\nhello\n/reset\nhello\n/system Be brief.\nhello\n/help\n")
    assert process.returncode == 0, told
    first, second, again, brief = (answer for answer in map(str.strip, said.split("> ")) if answer)
    assert first == again != second
    assert brief != first
    assert "system prompt: Be brief." in told


def test_ctrl_c_stops_the_answer_not_the_chat(mlx_model: Path) -> None:
    process = tiny.started("chat", "--model", mlx_model, "--max-tokens", "100000")
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write("hello\n")
    process.stdin.flush()
    # "> " and the answer's first bytes
    assert len(os.read(process.stdout.fileno(), 3)) > 0
    while len(os.read(process.stdout.fileno(), 64)) < 1:
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate("/quit\n", timeout=60)
    assert process.returncode == 0
    assert "[stopped]" in err
    assert "Traceback" not in err


def test_eval_scores_base_and_tuned_on_the_runs_own_rows(mlx_model: Path, run: Path, data: Path) -> None:
    """Against a loss over full logits in numpy."""
    result = tiny.mlxtune("eval", "--model", mlx_model, "--adapter", run, "--json")
    found = json.loads(result.stdout)
    loaded = load(str(mlx_model))
    adapter_files.load_adapter(loaded.model, run)
    sums, count = {"base": 0.0, "tuned": 0.0}, 0
    for line in (data / "valid.jsonl").read_text().splitlines():
        example = masking.render(loaded.tokenizer, json.loads(line)["messages"])
        mask = np.array(example.mask[1:]) == 1
        count += mask.sum()
        for name in sums:
            with attach.switched_off(loaded.model) if name == "base" else _nothing():
                logits = np.array(loaded.model(mx.array([example.ids])))[0, :-1].astype(np.float64)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            sums[name] -= log_p[np.arange(len(mask)), example.ids[1:]][mask].sum()
    assert found["rows"] == 6
    for name, total in sums.items():
        assert found[name]["tokens"] == count
        assert found[name]["loss"] == pytest.approx(total / count, rel=1e-5)
        assert found[name]["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-5)
    assert found["tuned"]["loss"] < found["base"]["loss"]
    assert "tuned" in tiny.mlxtune("eval", "--model", mlx_model, "--adapter", run).stdout


def _nothing():  # type: ignore[no-untyped-def]
    import contextlib

    return contextlib.nullcontext()


def test_doctor_tells_facts_and_what_is_missing() -> None:
    found = json.loads(tiny.mlxtune("doctor", "--json").stdout)
    assert {"python", "chip", "memory", "device", "free disk", "hub login", "hub offline", "mlx"} <= found[
        "facts"
    ].keys()
    plain = tiny.mlxtune("doctor", HF_HUB_OFFLINE="1")
    assert plain.returncode == 0
    assert "hub offline" in plain.stdout


def test_a_dry_run_prints_the_plan_and_writes_nothing(mlx_model: Path, data: Path, tmp_path: Path) -> None:
    result = tiny.mlxtune(
        "train", "-c", "qlora", "--model", mlx_model, "--data", data, "--out", tmp_path / "r", "--dry-run"
    )
    assert result.returncode == 0, result.stderr
    assert "optimizer steps: 4" in result.stdout  # 24 rows, 4 x 4 rows a step, 2 epochs: 2 steps each, the tail one too
    assert "accumulate: 4" in result.stdout
    assert not (tmp_path / "r").exists()


def test_a_dry_run_marks_its_notes_as_a_run_does(hf_model: Path, data: Path) -> None:
    settings = ("--set", "train.dtype=float16", "--set", "train.steps=1")
    result = tiny.mlxtune("train", "--model", hf_model, "--data", data, "--dry-run", *settings)
    assert result.returncode == 0, result.stderr
    assert "\nnote: float16 ends at 65,504" in result.stdout


def test_the_run_folder_holds_what_the_readme_says(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    files = {"adapters.safetensors", "adapter_config.json", "config.yaml", "events.jsonl", "report.html", ".lock"}
    assert names == {*files, "checkpoints"}
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    train = [event for event in events if event["kind"] == "train"]
    keys = {"kind", "step", "loss", "lr", "grad_norm", "tokens", "computed_tokens", "supervised_tokens", "seconds"}
    keys.add("peak_bytes")
    assert [event.keys() for event in train] == [keys] * 12
    assert [event["step"] for event in events if event["kind"] == "eval"] == [0, 6, 12]
    assert events[-1]["state"] == "finished"


def test_the_demo_tells_the_whole_story_on_any_model(hf_model: Path, tmp_path: Path) -> None:
    """Two steps on a tiny model: every chapter runs, every artefact is there and proven."""
    result = tiny.mlxtune("demo", "--model", hf_model, "--out", tmp_path / "demo", "--steps", "2")
    assert result.returncode == 0, result.stderr
    for chapter in range(1, 9):
        assert f"\n{chapter}. " in result.stderr
    for check in ("json", "schema", "ended", "contains"):
        assert re.search(rf"^ *{check} +24 .*no", result.stderr, re.MULTILINE), result.stderr
    assert "24 prompts show differences of a check from" in result.stderr
    for name in ("peft/", "hf/", "gguf/base.", "gguf/tuned."):
        report = json.loads((tmp_path / "demo" / f"{name}verification.json").read_text())
        assert report["verdict"] == "passed"
    assert re.search(r"^Observed: .*\. Likely fix: ", result.stderr, re.MULTILINE)
    page = (tmp_path / "demo" / "run" / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) <= 300_000 and page_readers.faults(page) == []
    assert "test.jsonl, 24 prompts: " in page and 'id="answers"' in page and "20 of 24 prompts" in page
    exports = {one["name"]: one["proof"]["verdict"] for one in page_readers.record(page)["exports"]}
    assert exports.keys() >= {"peft", "hf", "gguf/base.gguf", "gguf/tuned.gguf"} and set(exports.values()) == {"passed"}
    again = tiny.mlxtune("demo", "--model", hf_model, "--out", tmp_path / "demo")
    tiny.one_clear_line(again, "already exists")


def test_the_demo_begins_again_where_it_left_an_evaluation_but_not_over_what_people_rated(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "summary.json").write_text("{}")
    options = ("demo", "--model", tmp_path / "nowhere", "--out", tmp_path, "--force")
    rated = tmp_path / "evaluation" / "ratings.me.jsonl"
    rated.write_text("{}")
    tiny.one_clear_line(tiny.mlxtune(*options), "evaluation holds ratings.me.jsonl")
    assert rated.exists()
    rated.unlink()
    tiny.one_clear_line(tiny.mlxtune(*options), "nowhere")
    assert not (tmp_path / "evaluation").exists()


def test_the_demo_removes_nothing_that_it_did_not_make(hf_model: Path, tmp_path: Path) -> None:
    """--force into a folder with somebody's file, and with a source that cannot be converted."""
    (tmp_path / "model").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    broken = tmp_path / "mine.gguf"
    broken.write_text("no model")
    result = tiny.mlxtune("demo", "--model", broken, "--out", tmp_path, "--force")
    tiny.one_clear_line(result, "mine.gguf")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert broken.exists()


def test_a_file_named_by_data_counts_whole(mlx_model: Path, run: Path, tmp_path: Path) -> None:
    """Every row of it, also a single one; the run's own data is split as it was in training."""
    path = tiny.write_jsonl(tmp_path / "held.jsonl", tiny.conversations(11))
    for count in (11, 1):
        path = tiny.write_jsonl(tmp_path / "held.jsonl", tiny.conversations(count))
        found = json.loads(tiny.mlxtune("eval", "--model", mlx_model, "--data", path, "--json").stdout)
        assert (found["rows"], found["split"]) == (count, "all")


def test_a_run_can_be_used_from_another_folder(
    mlx_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained with relative paths; evaluated from elsewhere."""
    monkeypatch.chdir(data.parent)
    options = ("--out", tmp_path / "run", "--set", "train.steps=1")
    assert tiny.mlxtune("train", "--model", mlx_model, "--data", data.name, *options).returncode == 0
    monkeypatch.chdir(tmp_path)
    result = tiny.mlxtune("eval", "--model", mlx_model, "--adapter", "run", "--json")
    assert json.loads(result.stdout)["rows"] == 6

"""What the page of a run says of its settings, of what it is made of, and of exports beside it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import page_readers
import pages
import pytest
from mlxtune_convert.files import digest

from mlxtune.config import resolve
from mlxtune.report.composed import of_run
from mlxtune.report.run_record import RunRecord, read_run
from mlxtune.report.sections.configuration import command_of
from mlxtune.train.run_folder import CONFIG_FILE


def made(folder: Path, events: list[dict[str, Any]], config: dict[str, Any]) -> str:
    return page_readers.whole(of_run(read_run(pages.write(folder / "run", events, config))))


def test_secrets_in_settings_and_notes_are_hidden(tmp_path: Path) -> None:
    key = "hf_" + "aB3dE5fG7h" * 4
    events = [*pages.told(3), {"kind": "note", "text": f"the key {key} was refused"}]
    page = made(tmp_path, events, {"data.template_kwargs": {"key": key}, "train.sample_prompts": [f"is {key} good?"]})
    assert key not in page and "hf_a…" in page
    assert "A setting holds a secret" in page_readers.said(page)


def test_the_command_that_is_shown_makes_the_same_settings(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "model.path": "a model's folder",
        "data.path": "~/data; rm -rf $HOME",
        "data.template_kwargs": {"a": 'it\'s "so"\n', "b": [1, None, True]},
        "data.order": "length",
        "data.template": "yes: no # \x1b[1m",
        "lora.targets": ["q_proj", "v_proj"],
        "lora.ranks": {"down_proj": 32},
        "train.lr": 1e-5,
        "train.steps": 7,
        "train.sample_prompts": ["- one", "#two", "$(three)", "null"],
        "train.keep": "last",
        "fast.thin": "on",
    }
    config = resolve.load(None, (), values)
    words = shlex.split(command_of(config.model_dump(mode="json")).replace("\\\n", " "))
    assert words[:2] == ["mlxtune", "train"] and words[-2:] == ["--out", "NEW"]
    flags = {"model.path": words[words.index("--model") + 1], "data.path": words[words.index("--data") + 1]}
    settings = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    assert resolve.load(None, tuple(settings), flags) == config
    assert len(words) == 4 + 4 + 2 * len(settings)


def test_the_home_is_not_named_in_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home of anna"))
    place = str(tmp_path / "home of anna" / "my models" / "llama")
    (tmp_path / "home of anna" / "my models" / "llama").mkdir(parents=True)
    page = made(tmp_path, [pages.begun(3, place), pages.event(1)], {"model.path": place})
    assert "home of anna" not in page_readers.without_record(page)
    assert "--model ~/&#x27;my models/llama&#x27;" in page


def test_settings_that_differ_come_first_and_no_other_is_among_them(tmp_path: Path) -> None:
    page = made(tmp_path, pages.told(3), {"train.lr": 1e-3, "model.path": "m"})
    first, _, rest = page.partition("Settings that differ from the defaults")[2].partition("</table>")
    assert re.findall('<th scope="row">([^<]*)</th>', first) == ["model.path", "train.lr"]
    assert "lora.rank" not in first and "lora.rank" in rest


def record_of(tmp_path: Path) -> RunRecord:
    return read_run(pages.write(tmp_path / "run", pages.told(3)))


def test_exports_beside_and_inside_the_run_are_listed_with_their_proofs(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    (tmp_path / "run" / "adapters.safetensors").write_bytes(b"an adapter")
    own = digest(tmp_path / "run" / "adapters.safetensors")
    proofs = {
        "mine": ("verification.json", {"verdict": "passed", "adapter": own}),
        "of another": ("verification.json", {"verdict": "passed", "adapter": "5c1f"}),
        "base": ("verification.json", {"verdict": "passed", "adapter": ""}),
        "fused": ("verification.json", {"verdict": "passed", "candidate": "MLX", "max_difference": 1e-5, "top1": 1.0}),
        "gguf": ("tuned.verification.json", {"verdict": "lossy", "candidate": "llama.cpp", "gain_kept": 0.91}),
        "run/hf": ("verification.json", {"verdict": "read back", "tensors": 12}),
        "broken": ("verification.json", None),
    }
    for place, (name, proof) in proofs.items():
        (tmp_path / place).mkdir()
        (tmp_path / place / name).write_text("{" if proof is None else json.dumps(proof))
    (tmp_path / "gguf" / "tuned.gguf").write_bytes(b"x" * 2_000_000)
    (tmp_path / "notes").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "fused")
    page = page_readers.whole(of_run(record))
    found = {one["name"]: one for one in page_readers.record(page)["exports"]}
    assert sorted(found) == ["base", "broken", "fused", "gguf/tuned.gguf", "hf", "mine"]
    assert (found["gguf/tuned.gguf"]["bytes"], found["fused"]["proof"]["top1"]) == (2_000_000, 1.0)
    text = page_readers.said(page)
    assert "Not proven, or with loss: broken, gguf/tuned.gguf." in text
    assert "fused, gguf/tuned.gguf, hf: was proven by an earlier mlxtune" in text
    assert "1.0e-05" in text and "91.0%" in text and "cannot be read" in text


def test_the_adapter_that_is_kept_decides_whether_it_is_better(tmp_path: Path) -> None:
    events = [pages.begun(20), pages.evaluated(0, 2.5), pages.event(10), pages.evaluated(10, 2.0), pages.event(20)]
    worse = [*events, pages.evaluated(20, 3.1)]
    text = page_readers.said(made(tmp_path, worse, {"train.keep": "last"}))
    assert "Bad:" in text and "Good:" not in text
    assert "to 3.1000 nats a token at step 20: 24% higher. The adapter is worse" in text
    assert "The adapter of the last step is kept (train.keep); at step 10 the loss was 2.0000." in text
    broken = page_readers.said(made(tmp_path, [*events, pages.evaluated(20, None)], {"train.keep": "last"}))
    assert "Bad:" in broken and "the adapter is broken" in broken
    (pages.write(tmp_path / "run", worse) / CONFIG_FILE).unlink()
    unknown = page_readers.said(of_run(read_run(tmp_path / "run")))
    assert "It rose to 3.1000 until the last evaluation." in unknown and "is kept" not in unknown
    assert "Good:" not in unknown


def test_a_run_that_goes_on_shows_the_step_that_its_check_calls_the_best(tmp_path: Path) -> None:
    """By `State.is_beaten_by`: the higher check, of equal ones the lower loss; a check that applied to nothing is 0."""
    events = [pages.begun(20), pages.event(1)]
    for step, loss, checks in ((5, 1.0, {"json": 0.5}), (10, 0.9, {"json": 0.5}), (15, 0.8, {}), (20, 0.7, None)):
        events.append(pages.evaluated(step, loss, checks=checks))
    by_check = {"train.keep_by": "json", "train.sample_prompts": "suite.jsonl"}
    for settings, best in ((by_check, 10), ({}, 20)):
        found = read_run(pages.write(tmp_path / "run", events, settings)).best
        assert found is not None and found["step"] == best

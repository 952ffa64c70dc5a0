"""What tuning unlearned: drift, the loss on general text, basic questions before and after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.models.cache import make_prompt_cache

from mlxtune.adapter.attach import switched_off
from mlxtune.api import tuned
from mlxtune.errors import UserError
from mlxtune.evaluate.checks.shipped import GENERAL
from mlxtune.evaluate.checks.suite import read_suite
from mlxtune.evaluate.forgetting import report, texts
from mlxtune.evaluate.forgetting.drift import Drift, drift
from mlxtune.evaluate.forgetting.texts import Text, own_answers, texts_of
from mlxtune.evaluate.kept import Kept
from mlxtune.model.load import Loaded

PLAIN: tuple[dict[str, Any], str] = ({}, "")


@pytest.fixture(scope="module")
def loaded(mlx_model: Path, run: Path) -> Loaded:
    return tuned.load_model(str(mlx_model), run)


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four general prompts, and answers of six tokens."""
    rows = [json.loads(line) for line in GENERAL.read_text().splitlines()[:4]]
    monkeypatch.setattr(texts, "GENERAL", tiny.write_jsonl(tmp_path / "general.jsonl", rows))
    monkeypatch.setattr(texts, "ANSWER_TOKENS", 6)


def scaled(run: Path, folder: Path, factor: float) -> Path:
    """The run's adapter with every B times a number."""
    folder.mkdir()
    shutil.copy(run / "adapter_config.json", folder)
    saved = mx.load(str(run / "adapters.safetensors"))
    assert isinstance(saved, dict)
    changed = {name: array * factor if name.endswith("lora_b") else array for name, array in saved.items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), changed)
    return folder


@pytest.fixture(scope="module")
def far(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was driven far from its base."""
    return scaled(run, tmp_path_factory.mktemp("far") / "far", 20.0)


def log_p(loaded: Loaded, ids: list[int]) -> np.ndarray:
    """[N, V] in 64 bits."""
    logits = np.array(loaded.model(mx.array([ids]))[0].astype(mx.float32)).astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def test_there_are_sixty_four_general_prompts_of_eight_subjects() -> None:
    suite = read_suite(GENERAL)
    assert len(suite.rows) == len({row.messages[0]["content"] for row in suite.rows}) == 64
    subjects = [row.id.partition("-")[0] for row in suite.rows]
    assert {subjects.count(subject) for subject in subjects} == {8}


def test_drift_is_that_of_the_two_distributions(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of 3 tokens, so that borders are crossed; only what follows the prompt counts."""
    monkeypatch.setattr("mlxtune.evaluate.forgetting.drift.AT_ONCE", 3)
    ids, first = [5, 9, 17, 30, 12, 40, 7, 22, 31, 16], 3
    after = log_p(loaded, ids)[first - 1 : -1]
    with switched_off(loaded.model):
        before = log_p(loaded, ids)[first - 1 : -1]
    found = drift(loaded, Text(ids, first))
    rows = np.arange(7)
    assert found.tokens == 7
    assert found.base == pytest.approx(-before[rows, ids[first:]].sum(), rel=1e-5)
    assert found.tuned == pytest.approx(-after[rows, ids[first:]].sum(), rel=1e-5)
    assert found.kl == pytest.approx((np.exp(before) * (before - after)).sum(), rel=1e-4) and found.kl > 0.01
    assert found.agreed == (before.argmax(axis=-1) == after.argmax(axis=-1)).sum() < 7


def test_the_texts_are_what_the_base_itself_says_greedily(loaded: Loaded, run: Path, few: None) -> None:
    found, _ = own_answers(loaded, PLAIN, run, Kept(None))
    assert len(found) == 4 and all(1 <= len(text.ids) - text.first <= 6 for text in found)
    with switched_off(loaded.model):
        for text in found:
            cache = make_prompt_cache(loaded.model)
            ids = mx.array([text.ids[: text.first]])
            for token in text.ids[text.first :]:
                chosen = int(mx.argmax(loaded.model(ids, cache=cache)[0, -1]).item())
                assert chosen == token
                ids = mx.array([[chosen]])


def test_a_tuned_model_that_was_driven_far_is_flagged_with_the_keys_to_turn(
    mlx_model: Path, far: Path, few: None
) -> None:
    driven = tuned.load_model(str(mlx_model), far)
    found = report.with_flags(report.measure(driven, PLAIN, far, None), {})
    assert found["drift"]["kl"] > 0.02 and found["prompts"] == 4
    low, high = found["loss"]["interval"]
    assert 0 < low <= found["loss"]["difference"] <= high
    assert found["loss"]["rise"] == found["loss"]["difference"] / max(found["loss"]["base"], 1.0)
    (flag,) = found["flagged"]
    assert flag["value"] > flag["threshold"] == 0.05 and "the base's own answers rose" in flag["measure"]
    for key in ("data.sources", "train.lr", "train.epochs", "lora.rank"):
        assert key in found["fix"]


def test_an_adapter_that_is_zero_forgets_nothing_at_all(mlx_model: Path, run: Path, few: None, tmp_path: Path) -> None:
    zero = scaled(run, tmp_path / "zero", 0.0)
    unchanged = tuned.load_model(str(mlx_model), zero)
    found = report.with_flags(report.measure(unchanged, PLAIN, zero, None), {})
    assert found["drift"]["kl"] == 0 and found["drift"]["agreement"] == 1
    assert found["loss"]["difference"] == 0 and found["flagged"] == []


def test_a_rise_counts_by_its_part_of_the_loss_or_of_one_nat() -> None:
    """The two examples of the module, and one whose interval holds zero."""
    for base, after, interval, flags in ((2.0, 2.12, [0.1, 0.2], 1), (0.2, 0.23, [0.01, 0.04], 0), (2, 3, [-1, 2], 0)):
        rise = (after - base) / max(base, report.WHOLE)
        loss = {"of": "texts", "base": base, "tuned": after, "interval": interval, "rise": rise}
        assert len(report.with_flags({"loss": loss}, {})["flagged"]) == flags
        worse = {"base": 0.9, "tuned": 0.7, "difference": -0.2, "verdict": "worse"}
        assert len(report.with_flags({"loss": loss}, {"all": worse})["flagged"]) == flags + 1


@pytest.mark.parametrize(("base", "tuned", "rise"), [(2.0, 2.12, 0.06), (0.2, 0.23, 0.03)])
def test_the_rise_is_that_of_the_modules_two_examples(base: float, tuned: float, rise: float) -> None:
    drifts = [Drift(tokens, base * tokens, tuned * tokens, 0.0, tokens) for tokens in (10, 30)]
    assert report._loss(drifts)["rise"] == pytest.approx(rise)


def test_a_file_gives_the_texts_of_its_lines_or_rows(loaded: Loaded, tmp_path: Path) -> None:
    lines = tmp_path / "texts.txt"
    lines.write_text("The sun is hot.\n\nWater is wet.\n")
    (first, second), notes = texts_of(lines, loaded, PLAIN)
    assert first.ids == loaded.tokenizer("The sun is hot.")["input_ids"] and first.first == second.first == 1
    assert notes == []
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(2))
    found, _ = texts_of(rows, loaded, PLAIN)
    answer = tiny.conversations(2)[1]["messages"][-1]["content"]
    assert loaded.tokenizer.decode(found[1].ids[found[1].first :]) == answer
    plain = tiny.write_jsonl(tmp_path / "plain.jsonl", [{"text": "The sun is hot."}])
    assert texts_of(plain, loaded, PLAIN)[0] == [first]


def test_long_texts_and_many_are_cut_and_that_is_said(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "MOST_TOKENS", 5)
    monkeypatch.setattr(texts, "MOST_TEXTS", 2)
    file = tmp_path / "texts.txt"
    file.write_text("The sun is very hot today.\n" * 6)
    found, notes = texts_of(file, loaded, PLAIN)
    assert [len(text.ids) for text in found] == [5, 5]
    assert "6 texts are longer than 5 tokens" in notes[0] and "2 of 6 texts are taken" in notes[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n\n", "has no text of two tokens and more"),
        ("latin.txt", b"caf\xe9\n", "not a text file"),
        (
            "asked.jsonl",
            b'{"messages": [{"role": "user", "content": "Why?"}]}\n',
            "asked.jsonl line 1: it does not end with an answer",
        ),
    ],
)
def test_files_without_texts_are_refused(
    name: str, content: bytes, message: str, loaded: Loaded, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts_of(tmp_path / name, loaded, PLAIN)


FEW = """
from mlxtune.evaluate.forgetting import texts
from mlxtune.evaluate.checks import shipped
from mlxtune.cli import suites
texts.ANSWER_TOKENS = 4
suites.BASICS = texts.GENERAL = {file!r}
"""


def test_eval_says_what_was_forgotten_before_and_after(mlx_model: Path, far: Path, tmp_path: Path) -> None:
    rows = [{"id": f"q{n}", "prompt": f"What is {n}?", "checks": ["ended"]} for n in range(5)]
    file = tiny.write_jsonl(tmp_path / "few.jsonl", rows)
    code = "from pathlib import PosixPath\n" + FEW.format(file=file)
    words = ("eval", "--model", mlx_model, "--adapter", far, "--forgetting", "--max-tokens", "4")
    out, told = tiny.started(*words, "--json", "--out", tmp_path / "out", code=code).communicate()
    found = json.loads(out)
    assert found["forgetting"]["prompts"] == 5 and found["checks"]["ended"]["n"] == 5, told
    assert "narrow: it forgot" in [one["observation"] for one in found["observations"]]
    assert found == json.loads((tmp_path / "out" / "summary.json").read_text())
    out, told = tiny.started(*words, code=code).communicate()
    assert "drift KL(base || tuned)" in out and "Observed: narrow: it forgot" in out, told


def test_what_was_measured_of_what_was_forgotten_is_kept_and_goes_on_to_the_same_result(
    loaded: Loaded, run: Path, few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut within any line: what is left is used, and only the rest is computed."""
    kept = tmp_path / "forgetting.jsonl"
    whole = report.measure(loaded, PLAIN, run, None, kept)
    lines = kept.read_text().splitlines(keepends=True)
    names = [json.loads(line)["name"] for line in lines]
    assert [name.split()[0] for name in names] == ["plan", "batch", *["drift"] * 4]
    computed: list[Text] = []

    def counted(loaded: Loaded, text: Text) -> Drift:
        computed.append(text)
        return drift(loaded, text)

    monkeypatch.setattr(report, "drift", counted)
    for left, again in ((6, 0), (4, 2), (2, 4), (1, 4), (0, 4)):
        computed.clear()
        kept.write_text("".join(lines[:left]) + "".join(lines[left : left + 1])[:9])
        assert report.measure(loaded, PLAIN, run, None, kept) == whole
        assert len(computed) == again


def test_what_cannot_be_asked_together_is_refused(mlx_model: Path, run: Path, tmp_path: Path) -> None:
    eval_it = ("eval", "--model", mlx_model)
    tiny.refused(tmp_path / "a", *eval_it, "--forgetting", expected=("compares a tuned model with its base",))
    both = (*eval_it, "--adapter", run, "--forgetting", "--safety")
    tiny.refused(tmp_path / "b", *both, expected=("--forgetting and --safety ask different prompts",))
    other = (*eval_it, "--adapter", run, "--forgetting", "--against", mlx_model)
    tiny.refused(tmp_path / "c", *other, expected=("not with another", "Leave out --against"))
    missing = (*eval_it, "--adapter", run, "--forgetting", tmp_path / "none.txt")
    tiny.refused(tmp_path / "d", *missing, expected=("no such file",))
    loss = (*eval_it, "--safety", "--data", tmp_path)
    tiny.refused(tmp_path / "e", *loss, expected=("--data has no effect with --safety",))

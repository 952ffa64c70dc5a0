"""A chat template whose tokens the model did not have: added, trained, kept with the run, and shipped everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf as gguf_package
import mlx.core as mx
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from safetensors.numpy import load_file

from mlxtune.adapter import adapter_files, vocabulary
from mlxtune.api import tuned
from mlxtune.cli import cli
from mlxtune.cli.display import Display
from mlxtune.config import resolve
from mlxtune.data.template.tokenizer_changes import Changes, tokenizer_of
from mlxtune.errors import Interrupted, UserError
from mlxtune.evaluate.engines.sampling import Sampling
from mlxtune.evaluate.generate import answer
from mlxtune.model.load import load
from mlxtune.train.run import tune as train
from mlxtune.train.run_data import read_data
from mlxtune.train.run_folder import RunFolder

PLAIN = 257  # tokens of the plain tokenizer: an end token and the bytes
NEW = {"<|im_end|>": PLAIN, "<|im_start|>": PLAIN + 1}
# name -> (changes of the shape, what trains beside the adapter)
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "grown": ({"vocab_size": PLAIN}, "embeddings, head"),
    "tied": ({"vocab_size": PLAIN + 1, "tie_word_embeddings": True}, "embeddings"),
    "spare": ({"vocab_size": 320}, "embeddings, head"),
}
ENDS = [0, PLAIN]
QUESTIONS = [f"Question number {number}?" for number in (1, 3, 8)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base models with a plain tokenizer, as transformers saves them; "grown" is converted to 4 bits as well."""
    root = tmp_path_factory.mktemp("plain")
    made = {name: tiny.make_model(root / name, eos_token_id=0, **shape) for name, (shape, _) in MODELS.items()}
    for folder in made.values():
        tiny.make_plain_tokenizer(folder)
    command("convert", made["grown"], root / "4bit", "--group-size", "32")
    return {**made, "4bit": root / "4bit"}


def settings(name: str) -> list[str]:
    also = MODELS["grown" if name == "4bit" else name][1]
    common = ("train.steps=60", "train.lr=1e-2", "train.save_every=20", "train.eval_every=30", "lora.rank=3")
    return [*common, "data.template=chatml", f"lora.train_also=[{also}]"]


def run_config(models: dict[str, Path], name: str, data: Path, *more: str) -> resolve.Config:
    return resolve.load(None, (*settings(name), *more), {"model.path": str(models[name]), "data.path": str(data)})


def quiet() -> Display:
    from rich.console import Console

    return Display(Console(quiet=True))


@pytest.fixture(scope="module")
def runs(models: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on each; the one on 4 bits by the command."""
    root = tmp_path_factory.mktemp("runs")
    sets = [text for setting in settings("4bit") for text in ("--set", setting)]
    result = tiny.mlxtune("train", "--model", models["4bit"], "--data", data, "--out", root / "4bit", *sets)
    assert result.returncode == 0, result.stderr
    for name in MODELS:
        with quiet() as display:
            train(run_config(models, name, data), root / name, display)
    return {name: root / name for name in ("4bit", *MODELS)}


def command(*args: str | Path) -> str:
    """The command, run in this process."""
    done = CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def answers_of_transformers(folder: Path) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return made_by(model, AutoTokenizer.from_pretrained(folder))


def made_by(model: Any, tokenizer: Any, **stops: Any) -> list[str]:
    made = []
    for question in QUESTIONS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        out = model.eval().generate(ids, max_new_tokens=40, do_sample=False, **stops)[0, ids.shape[1] :]
        made.append(tokenizer.decode([index for index in out if index not in ENDS]))
    return made


def answers(model: Path, run: Path) -> list[str]:
    """Ours: base and adapter, greedy."""
    loaded = tuned.load_model(str(model), run)
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [answer(loaded, messages, Sampling(max_tokens=40), {}) for messages in asked]


def refusal(models: dict[str, Path], name: str, data: Path, *more: str) -> str:
    with pytest.raises(UserError) as refused:
        read_data(run_config(models, name, data, *more))
    return str(refused.value) + str(refused.value.hint)


@pytest.mark.parametrize(
    ("name", "also", "needed"),
    [
        ("grown", "[]", "lora.train_also=[embeddings, head]"),
        ("grown", "[embeddings]", "lora.train_also=[embeddings, head]"),
        ("spare", "[norms, head]", "lora.train_also=[embeddings, head]"),
        ("tied", "[norms]", "lora.train_also=[embeddings];"),
    ],
)
def test_tokens_are_not_added_where_their_rows_would_not_train(
    name: str, also: str, needed: str, models: dict[str, Path], data: Path
) -> None:
    said = refusal(models, name, data, f"lora.train_also={also}")
    assert "needs tokens that the vocabulary does not have: <|im_end|>, <|im_start|>" in said
    assert needed in said


def test_the_command_refuses_them_in_one_line(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    command = ("train", "--model", models["4bit"], "--data", data, "--out", tmp_path / "run")
    expected = ("the template chatml needs tokens", "lora.train_also=[embeddings, head]")
    tiny.refused(tmp_path / "run", *command, "--set", "data.template=chatml", expected=expected)


@pytest.mark.parametrize("name", ["grown", "tied", "spare"])
def test_new_rows_start_as_the_mean_of_the_known_ones(name: str, models: dict[str, Path], data: Path) -> None:
    """numpy on the base's own tensors; the other rows, and a model with room for the tokens, stay as they are."""
    loaded = load(str(models[name]), "float32")
    config = run_config(models, name, data)
    changes = vocabulary.run_tokenizer(models[name], config)[1]
    assert changes.tokens == NEW
    vocabulary.add_rows_for_new_tokens(loaded, config, changes)
    before = load_file(models[name] / "model.safetensors")
    for path in ("model.embed_tokens.weight", "lm_head.weight"):
        if path in before:
            now, old = np.array(dict(loaded.model.named_modules())[path[:-7]].weight), before[path]
            assert len(now) == max(len(old), PLAIN + 2) == loaded.config["vocab_size"]
            np.testing.assert_array_equal(now[:PLAIN], old[:PLAIN])
            known = old[: min(len(old), PLAIN)].astype(np.float64)
            np.testing.assert_allclose(now[[*NEW.values()]], [known.mean(0)] * 2, atol=1e-6)
            np.testing.assert_array_equal(now[PLAIN + 2 :], old[PLAIN + 2 :])


def test_what_the_command_tuned_answers_alike_wherever_it_goes(
    models: dict[str, Path], runs: dict[str, Path], tmp_path: Path
) -> None:
    """Greedy answers of `generate --adapter`, of the fused folder in mlx-lm and in transformers, and of the export."""
    import mlx_lm
    from transformers import GenerationConfig

    model, run = models["4bit"], runs["4bit"]
    wanted = answers(model, run)
    said = tiny.mlxtune("generate", "--model", model, "--adapter", run, "--prompt", QUESTIONS[0], "--max-tokens", "40")
    assert said.stdout.rstrip("\n") == wanted[0].rstrip("\n"), said.stderr
    assert wanted[0].startswith("The ")
    command("fuse", "--model", model, "--adapter", run, "--out", tmp_path / "fused")
    command("export", "--model", model, "--adapter", run, "--to", "hf", "--out", tmp_path / "hf")
    fused, tokenizer = mlx_lm.load(str(tmp_path / "fused"))[:2]
    assert fused.model.embed_tokens.weight.shape == (PLAIN + 2, 64)
    for question, answered in zip(QUESTIONS, wanted, strict=True):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        assert mlx_lm.generate(fused, tokenizer, ids, max_tokens=40) == answered
    assert answers_of_transformers(tmp_path / "fused") == wanted
    assert answers_of_transformers(tmp_path / "hf") == wanted
    for folder in ("fused", "hf"):
        report = json.loads((tmp_path / folder / "verification.json").read_text())
        assert (report["verdict"], report["max_difference"] < 1e-4) == ("passed", True)
        assert json.loads((tmp_path / folder / "config.json").read_text())["vocab_size"] == PLAIN + 2
        assert GenerationConfig.from_pretrained(tmp_path / folder).eos_token_id == ENDS


def test_the_model_learns_to_stop_at_the_new_token(models: dict[str, Path], runs: dict[str, Path], data: Path) -> None:
    """More likely than one in ten after an answer, where it began as likely as the average of 259."""
    loaded = tuned.load_model(str(models["4bit"]), runs["4bit"])
    text = loaded.tokenizer.apply_chat_template(tiny.conversations(3)[2]["messages"], tokenize=False)
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    place = len(ids) - 1 - ids[::-1].index(NEW["<|im_end|>"])
    assert ids.count(NEW["<|im_start|>"]) == 2
    assert mx.softmax(loaded.model(mx.array([ids[:place]]))[0, -1])[NEW["<|im_end|>"]].item() > 0.1


@pytest.mark.parametrize("name", ["tied", "spare"])
def test_other_models_fuse_and_export_alike(
    name: str, models: dict[str, Path], runs: dict[str, Path], tmp_path: Path
) -> None:
    wanted = answers(models[name], runs[name])
    command("export", "--model", models[name], "--adapter", runs[name], "--to", "hf", "--out", tmp_path / "hf")
    assert answers_of_transformers(tmp_path / "hf") == wanted


@pytest.mark.parametrize("name", ["4bit", "spare"])
def test_a_run_stopped_and_resumed_ends_with_the_same_bits(
    name: str, models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quiet() as display:
        train(run_config(models, name, data), tmp_path / "whole", display)
    with monkeypatch.context() as patch, pytest.raises(Interrupted), quiet() as display:
        tiny.interrupt_after(patch, 1)
        train(run_config(models, name, data), tmp_path / "cut", display)
    with quiet() as display:
        train(RunFolder(tmp_path / "cut").config(), tmp_path / "cut", display, resume=True)
    one, other = (mx.load(str(folder / adapter_files.OWN_FILE)) for folder in (tmp_path / "whole", tmp_path / "cut"))
    assert sorted(one) == sorted(other)
    for key, array in one.items():
        assert mx.array_equal(array, other[key]).item(), key


@pytest.mark.parametrize("name", ["4bit", "tied", "spare"])
def test_peft_computes_the_same_and_gives_it_back_unchanged(
    name: str, models: dict[str, Path], runs: dict[str, Path], tmp_path: Path
) -> None:
    """The command's own proof runs PEFT; here a user follows the card, then brings the adapter back."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, run, out = models[name], runs[name], tmp_path / "peft"
    command("export", "--model", model, "--adapter", run, "--to", "peft", "--out", out)
    assert json.loads((out / "verification.json").read_text())["verdict"] == "passed"
    command("export", "--model", model, "--to", "hf", "--out", tmp_path / "base", "--no-verify", "--dtype", "float32")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    resized = f"base.resize_token_embeddings({PLAIN + 2})"
    assert (resized in (out / "README.md").read_text()) == (name != "spare")
    if name != "spare":
        base.resize_token_embeddings(PLAIN + 2)
    theirs, tokenizer = PeftModel.from_pretrained(base, str(out)), AutoTokenizer.from_pretrained(out)
    assert made_by(theirs, tokenizer, eos_token_id=ENDS) == answers(model, run)
    command("convert", out, tmp_path / "back", "--base", model)
    one, other = (load_file(folder / adapter_files.OWN_FILE) for folder in (run, tmp_path / "back"))
    assert {key: array.tobytes() for key, array in one.items()} == {key: a.tobytes() for key, a in other.items()}
    assert answers(model, tmp_path / "back") == answers(model, run)


def test_an_adapter_that_others_trained_with_new_tokens_comes_in(models: dict[str, Path], tmp_path: Path) -> None:
    """PEFT beside transformers' own resizing, to a multiple of 64 rows: the same logits, the same tokens, here."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["grown"])
    tokenizer.add_tokens(list(NEW), special_tokens=True)
    tokenizer.chat_template, tokenizer.eos_token = tiny.CHATML, "<|im_end|>"
    base = AutoModelForCausalLM.from_pretrained(models["grown"], dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    settings = LoraConfig(
        r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], init_lora_weights=False
    )
    theirs = get_peft_model(base, settings).eval()
    theirs.save_pretrained(tmp_path / "peft", save_embedding_layers=False)  # they are saved as trained modules
    tokenizer.save_pretrained(tmp_path / "peft")
    command("convert", tmp_path / "peft", tmp_path / "ours", "--base", models["grown"])
    loaded = tuned.load_model(str(models["grown"]), tmp_path / "ours")
    messages = tiny.conversations(2)[1]["messages"]
    ids, wanted = (t.apply_chat_template(messages, return_dict=False) for t in (loaded.tokenizer, tokenizer))
    assert ids == wanted and set(NEW.values()) <= set(ids)
    loaded.check_ids([ids])
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(np.array(loaded.model(mx.array([ids]))), expected, atol=1e-4)
    assert expected.shape[-1] == loaded.config["vocab_size"] == 320


@pytest.mark.parametrize("name", ["4bit", "spare"])
def test_llama_cpp_knows_the_new_tokens(
    name: str, models: dict[str, Path], runs: dict[str, Path], tmp_path: Path
) -> None:
    from mlxtune.ship import llama_cpp

    out = tmp_path / "m.gguf"
    said = command(
        *("export", "--model", models[name], "--adapter", runs[name], "--to", "gguf"), "--type", "f32", "--out", out
    )
    assert "passed" in said and "run by llama.cpp" in said
    reader = gguf_package.GGUFReader(out)
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == NEW["<|im_end|>"]
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    assert [kinds[index] for index in NEW.values()] == [gguf_package.TokenType.CONTROL] * 2
    tokenizer = tokenizer_of(models[name], runs[name])
    text = tokenizer.apply_chat_template(tiny.conversations(1)[0]["messages"], tokenize=False)
    with llama_cpp.runner(out) as run:
        assert list(run.tokenize(text)) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_training_goes_on_from_such_a_run(
    models: dict[str, Path], runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """Its template and tokens are kept without naming them; other tokens are refused."""
    more = ("data.template=''", "lora.train_also=[]", f"lora.start_from={runs['4bit']}", "train.steps=1")
    with quiet() as display:
        train(run_config(models, "4bit", data, *more), tmp_path / "more", display)
    ends, starts = (
        [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        for folder in (runs["4bit"], tmp_path / "more")
    )
    losses = [event["loss"] for event in ends if event["kind"] == "eval"]
    start = next(event["loss"] for event in starts if event["kind"] == "eval")
    assert start == pytest.approx(min(losses), abs=1e-6)
    assert Changes.read(tmp_path / "more") == Changes.read(runs["4bit"])
    (tmp_path / "other.jinja").write_text("{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}")
    said = refusal(models, "4bit", data, *more[1:], f"data.template={tmp_path / 'other.jinja'}")
    assert "<|turn|>" in said and "trained without them" in said


def test_a_model_whose_tokenizer_numbers_them_otherwise_is_refused(hf_model: Path, runs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"another number for <\|im_end\|>") as refused:
        tuned.load_model(str(hf_model), runs["4bit"])
    assert "Use the model that the adapter was trained on" in str(refused.value.hint)


def test_a_vocabulary_with_gaps_takes_no_tokens(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Its next number is one that a token has: tokenizers count, they do not look."""
    for file in models["spare"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    last = max(whole["model"]["vocab"], key=whole["model"]["vocab"].get)
    whole["model"]["vocab"][last] = PLAIN
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match="has gaps"):
        vocabulary.run_tokenizer(tmp_path, run_config({"spare": tmp_path}, "spare", data))

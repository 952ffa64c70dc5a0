"""Whatever a careless user hands over ends in one clear line, exit status 2, and nothing half-written.

Everything goes through the installed command.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from gguf import GGUFWriter
from safetensors.numpy import load_file, save_file

Change = Callable[[Path], Any]

COMMAND = Path(sys.executable).with_name("mlxtune")
LINES = [json.dumps(row) for row in tiny.conversations(12)]
ASKED = {"messages": [{"role": "user", "content": "Where is my order?"}]}


def nothing_written(out: Path) -> None:
    """Neither the destination nor anything temporary beside it."""
    assert not out.exists()
    assert not [path.name for path in out.parent.glob(f".{out.name}.*")]


def refused(out: Path, *args: str | Path, expected: tuple[str, ...], **environment: str) -> str:
    """Run the command; it must refuse in one clear line and leave no trace of `out`."""
    said = tiny.one_clear_line(tiny.mlxtune(*args, **environment), *expected)
    nothing_written(out)
    return said


def with_line(number: int, text: str) -> bytes:
    """Twelve good lines of JSON, but for one."""
    return "\n".join([*LINES[: number - 1], text, *LINES[number:]]).encode()


def message(role: Any, content: Any) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": role, "content": content}]})


# name: (file name, its bytes, what the line must say)
ROWS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "bad JSON": (
        "train.jsonl",
        with_line(7, '{"messages": [}'),
        ("train.jsonl line 7: not valid JSON", "Each line of a .jsonl file is one JSON object."),
    ),
    "a list for an object": (
        "train.jsonl",
        with_line(3, "[1, 2]"),
        ("train.jsonl line 3: expected a JSON object, found list",),
    ),
    "a number of 5000 digits": ("train.jsonl", with_line(2, "1" * 5000), ("train.jsonl line 2: JSON that cannot be",)),
    "endless nesting": ("train.jsonl", with_line(2, "[" * 100_000), ("train.jsonl line 2: JSON that cannot be read",)),
    "unknown keys": (
        "train.jsonl",
        b'{"question": "a", "answer": "b"}\n',
        ("train.jsonl line 1", "has the keys question, answer", "Known: messages;", "instruction + output"),
    ),
    "another format in one row": (
        "train.jsonl",
        with_line(4, '{"text": "plain"}'),
        ("train.jsonl line 4: messages must be a non-empty list", "(format: messages)"),
    ),
    "an unknown role": (
        "train.jsonl",
        with_line(5, message("robot", "Hello")),
        ("line 5: message 2 has the role 'robot'", "allowed: system, developer, user, assistant, tool"),
    ),
    "a number for content": (
        "train.jsonl",
        with_line(6, message("assistant", 42)),
        ("train.jsonl line 6: message 2 (assistant) must have text content",),
    ),
    "a list for a ShareGPT speaker": (
        "train.jsonl",
        b'{"conversations": [{"from": ["human"], "value": "Hi"}]}',
        ("train.jsonl line 1: turn 1 is from ['human']; allowed: human,",),
    ),
    "half an emoji": (
        "train.jsonl",
        with_line(8, message("assistant", "Thanks \ud83d")),
        (r"train.jsonl line 8: the text holds half a character ('\ud83d')",),
    ),
    "an empty file": ("train.jsonl", b"", ("train.jsonl: no rows", "Each line of a .jsonl file is one example.")),
    "blank lines": ("train.jsonl", b"\n \n\n", ("train.jsonl: no rows",)),
    "a binary file": (
        "train.jsonl",
        b"\x89PNG\r\n\x1a\n\xff",
        ("train.jsonl: not a text file (invalid UTF-8 at byte 0",),
    ),
    "an unknown suffix": (
        "train.txt",
        b"hello",
        ("train.txt: unknown file type .txt", "Allowed: .jsonl, .json, .csv, .parquet."),
    ),
    "a truncated .json": (
        "train.json",
        b'[\n{"messages": [{"role": "user", ',
        ("train.json line 2: not valid JSON",),
    ),
    "a number in a .json": (
        "train.json",
        b'[{"text": "a"}, 3]',
        ("train.json row 2: expected a JSON object, found int",),
    ),
    "a broken parquet": ("train.parquet", b"PAR1 and then nothing", ("train.parquet: not a parquet file",)),
    "a CSV of other columns": (
        "train.csv",
        b"question,answer\na,b\n",
        ("train.csv row 1: no known row format has the keys question, answer", "Rename the columns."),
    ),
    "a CSV row with a comma too many": (
        "train.csv",
        b"prompt,completion\na,b\nc,d,e\n",
        ("train.csv row 2: more fields than the header has", "Quote the fields that hold a comma."),
    ),
    "a CSV quote never closed": ("train.csv", b'prompt,completion\na,"b\n', ("train.csv: not a CSV file",)),
    "one row only": ("train.jsonl", LINES[0].encode(), ("1 different row, too few to hold any out", "a valid file")),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_that_cannot_be_read_is_named_by_file_and_line(kind: str, tmp_path: Path) -> None:
    name, content, expected = ROWS[kind]
    (tmp_path / name).write_bytes(content)
    shown = tiny.mlxtune("data", "show", "--model", "model", "--data", tmp_path / name, "--split", "train")
    tiny.one_clear_line(shown, *expected)


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        ([ASKED] * 3, (), ("none of 3 rows can be used", "line 1: no assistant turn", "mlxtune data show")),
        (
            tiny.conversations(3),
            ("--set", "data.max_tokens=8"),
            ("none of 3 rows can be used", "line 1: no supervised token in the first 8 tokens"),
        ),
        ([{"messages": 3}], (), ("train.jsonl line 1: messages must be a non-empty list",)),
    ],
    ids=["questions alone", "answers past data.max_tokens", "a bad row"],
)
def test_training_without_a_usable_row_is_refused(
    rows: list[Any], settings: tuple[str, ...], expected: tuple[str, ...], mlx_model: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "data", tmp_path / "run"
    for split in ("train", "valid"):
        tiny.write_jsonl(folder / f"{split}.jsonl", rows)
    refused(out, "train", "--model", mlx_model, "--data", folder, "--out", out, *settings, expected=expected)


def test_a_missing_data_file_is_refused(tmp_path: Path) -> None:
    shown = tiny.mlxtune("data", "show", "--model", "model", "--data", tmp_path / "rows.jsonl")
    tiny.one_clear_line(shown, f"no data file or folder {tmp_path / 'rows.jsonl'}")


def test_a_folder_without_a_train_file_is_refused(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "valid.jsonl", tiny.conversations(3))
    shown = tiny.mlxtune("data", "show", "--model", "model", "--data", tmp_path)
    tiny.one_clear_line(shown, "has no train file", "Expected train.jsonl|.json|.csv|.parquet.")


def test_one_row_without_an_answer_is_counted_and_named_while_the_others_train(mlx_model: Path, tmp_path: Path) -> None:
    rows: list[Any] = tiny.conversations(8)
    tiny.write_jsonl(tmp_path / "train.jsonl", [*rows[:4], ASKED, *rows[4:]])
    tiny.write_jsonl(tmp_path / "valid.jsonl", rows[:2])
    out = tmp_path / "run"
    done = tiny.mlxtune("train", "--model", mlx_model, "--data", tmp_path, "--out", out, "--set", "train.steps=1")
    assert done.returncode == 0, done.stderr
    assert "note: train: 1 of 9 rows dropped: no assistant turn (line 5)" in done.stderr
    assert (out / "adapters.safetensors").is_file()


CONFIGS: dict[str, tuple[str | bytes | None, tuple[str, ...], tuple[str, ...]]] = {
    "an unknown key in the file": (
        "train:\n  lr: 1e-4\n  stepps: 3\n",
        (),
        ("c.yaml line 3: unknown key train.stepps", "Did you mean train.steps?"),
    ),
    "an unknown key in --set": (None, ("train.lrr=1",), ("--set train.lrr=1: unknown key", "Did you mean train.lr?")),
    "a value of the wrong type": (
        "train:\n  lr: fast\n",
        (),
        ("c.yaml line 2: train.lr: should be a valid number", "got 'fast'", "train.lr: peak learning rate."),
    ),
    "broken YAML": ("train:\n  lr: [1\nlora:\n", (), ("c.yaml line 3: not valid YAML",)),
    "a control character": ("train:\n  lr: \0\n", (), ("c.yaml", "not valid YAML")),
    "a list for a file": ("- train\n", (), ("c.yaml: expected sections such as `train:`, found list",)),
    "a binary file": (b"\xff\xfe\0", (), ("c.yaml: not a text file (invalid UTF-8 at byte 0)",)),
    "steps and epochs": ("train:\n  steps: 3\n  epochs: 1\n", (), ("set steps or epochs, not both",)),
    "no equals sign": (None, ("train.lr",), ("--set train.lr: expected section.key=value", "--set train.lr=1e-4")),
    "no section": (None, ("lr=1",), ("--set lr=1: expected section.key=value",)),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_wrong_configuration_is_named_by_line_and_key(kind: str, tmp_path: Path) -> None:
    content, settings, expected = CONFIGS[kind]
    file, out = tmp_path / "c.yaml", tmp_path / "run"
    file.write_bytes(content if isinstance(content, bytes) else (content or "").encode())
    options = [option for setting in settings for option in ("--set", setting)]
    refused(out, "train", "-c", file, "--model", "model", "--data", "data", "--out", out, *options, expected=expected)


def test_an_unknown_recipe_lists_those_there_are(tmp_path: Path) -> None:
    out = tmp_path / "run"
    expected = ("no configuration file 'qlroa', and no recipe of that name", "Shipped recipes: lora, qlora, quick.")
    refused(out, "train", "-c", "qlroa", "--model", "model", "--data", "data", "--out", out, expected=expected)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("lora.targets=[q_prj]", ("no linear layer is called 'q_prj'", "Did you mean q_proj?", "down_proj, gate_proj")),
        ("lora.layers=9", ("lora.layers 9: the model has 2 blocks", "Use 1 to 2, or all.")),
    ],
)
def test_an_adapter_that_the_model_has_no_place_for_is_refused(
    setting: str, expected: tuple[str, ...], mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    refused(out, "train", "--model", mlx_model, "--data", data, "--out", out, "--set", setting, expected=expected)


def edit_config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def remove(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def lose_a_shard(folder: Path) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (folder / "model.safetensors").rename(folder / names[0])
    index = {"weight_map": {"lm_head.weight": names[0], "model.norm.weight": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tear_the_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


MODELS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no config.json": (remove("config.json"), ("has no config.json", "Expected a model folder: config.json,")),
    "no tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        ("has no tokenizer", "Expected tokenizer.json beside the model's weights."),
    ),
    "a config.json that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{\n  model_type: llama\n}"),
        ("config.json line 2: not valid JSON",),
    ),
    "a config.json with an impossible number": (
        edit_config(num_attention_heads=0),
        ("config.json does not describe a model that mlx-lm knows",),
    ),
    "an unknown model_type": (edit_config(model_type="gpt9"), ("mlx-lm has no model of type 'gpt9'",)),
    "no weights": (remove("model.safetensors"), ("has no model*.safetensors", "A model folder holds config.json and")),
    "a missing shard": (
        lose_a_shard,
        ("1 of 2 weight files are missing, first model-00002-of-00002.safetensors", "Copy or download"),
    ),
    "half a shard": (tear_the_weights, ("model.safetensors:", "its header promises", "The file is incomplete")),
    "a missing tensor": (lose_a_tensor, ("the weights do not fit config.json (Missing 1", "model.norm.weight")),
    "pickled weights alone": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        ("only pytorch_model.bin: pickled weights are never loaded",),
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_folder_that_is_not_whole_is_refused(kind: str, hf_model: Path, tmp_path: Path) -> None:
    change, expected = MODELS[kind]
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(hf_model, folder)
    change(folder)
    said = refused(out, "convert", folder, out, expected=expected)
    assert str(folder) in said


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(
    hf_model: Path, data: Path, tmp_path: Path
) -> None:
    """MLX reads whatever lies behind the embedding, so such a run would train on noise and look fine."""
    folder, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(hf_model, folder)
    edit_config(vocab_size=100)(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].copy()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    expected = ("the tokenizer makes the token 2", "the model knows 100 tokens", "take the model's own")
    refused(out, "train", "--model", folder, "--data", data, "--out", out, expected=expected)


def write_gguf(path: Path, whole: bool = True) -> Path:
    """A small GGUF file of the llama architecture: one block, or none of the tensors its header promises."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1, 1])
    writer.add_token_merges(["a b"])
    names = ["token_embd", "output_norm", "blk.0.attn_norm", "blk.0.attn_q", "blk.0.attn_k"] if whole else []
    for name in names:
        writer.add_tensor(f"{name}.weight", np.zeros((64, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def torn_gguf(path: Path) -> None:
    whole = write_gguf(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.write_bytes(b"not a model" * 99), ("m.gguf: not a GGUF file", "Copy or download it again.")),
        (torn_gguf, ("m.gguf: not a GGUF file, or a torn one", "Copy or download it again.")),
        (lambda path: write_gguf(path, whole=False), ("m.gguf: 11 tensors are missing, first token_embd.weight",)),
    ],
    ids=["no GGUF at all", "torn", "without its tensors"],
)
def test_a_gguf_file_that_is_not_whole_is_refused(make: Change, expected: tuple[str, ...], tmp_path: Path) -> None:
    make(tmp_path / "m.gguf")
    refused(tmp_path / "out", "convert", tmp_path / "m.gguf", tmp_path / "out", expected=expected)


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(
        out, "convert", tmp_path / "no" / "model", out, expected=(f"no file or folder {tmp_path}/no/model", "hub id")
    )


def test_a_hub_id_without_a_network_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    refused(out, "convert", "owner/name", out, expected=("cannot reach the hub for owner/name",), **offline)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--bits", "16", "--group-size", "64"), ("--bits 16 means not quantized", "--group-size and --mode")),
        (("--mode", "mxfp4", "--bits", "8"), ("--mode mxfp4 always has 4 bits and groups of 32", "Leave out --bits")),
        (("--group-size", "0"), ("--group-size 0 does not exist for --mode affine", "group sizes: 32, 64, 128.")),
        (("--bits", "7"), ("'7' is not one of '1', '2', '3', '4', '5', '6', '8', '16'", "mlxtune convert --help")),
    ],
    ids=["bits 16 in groups", "mxfp4 of 8 bits", "groups of 0", "7 bits"],
)
def test_options_that_contradict_each_other_are_refused(
    options: tuple[str, ...], expected: tuple[str, ...], hf_model: Path, tmp_path: Path
) -> None:
    refused(tmp_path / "out", "convert", hf_model, tmp_path / "out", *options, expected=expected)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_existing_folder_is_replaced_only_with_force_and_only_by_something_whole(
    hf_model: Path, tmp_path: Path
) -> None:
    out, torn = tmp_path / "out", tmp_path / "torn"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    tiny.one_clear_line(tiny.mlxtune("convert", hf_model, out), f"{out} already exists", "add --force to replace it")
    shutil.copytree(hf_model, torn)
    lose_a_tensor(torn)
    tiny.one_clear_line(tiny.mlxtune("convert", torn, out, "--force"), "the weights do not fit")
    assert contents(out) == {"notes.txt": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "torn"]
    assert tiny.mlxtune("convert", hf_model, out, "--force").returncode == 0
    assert "notes.txt" not in contents(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "torn"]


@pytest.mark.parametrize("inside", ["", "model"], ids=["the source", "a folder that holds it"])
def test_force_never_replaces_what_the_result_is_made_from(inside: str, hf_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "models"
    shutil.copytree(hf_model, out / inside)
    before = contents(out)
    refusal = tiny.mlxtune("convert", out / inside, out, "--force")
    tiny.one_clear_line(refusal, "source", "Choose another folder.")
    assert contents(out) == before


def test_training_into_an_existing_run_is_refused(run: Path, mlx_model: Path, data: Path) -> None:
    before = contents(run)
    refusal = tiny.mlxtune("train", "--model", mlx_model, "--data", data, "--out", run)
    tiny.one_clear_line(refusal, f"{run} already exists", "or continue that run with --resume.")
    assert contents(run) == before


def test_resuming_without_a_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    refusal = tiny.mlxtune("train", "--resume", "--out", tmp_path / "run")
    tiny.one_clear_line(refusal, "has no checkpoint to resume from", "Start again without --resume")
    assert (tmp_path / "run" / "adapters.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--out", "run", "--set", "train.lr=1"), ("--resume goes on with the run's own configuration",)),
        ((), ("--resume needs the run to go on with", "mlxtune train --resume --out RUN")),
        (("--out", "no-such-run"), ("no-such-run is not a run of mlxtune (no config.yaml)",)),
    ],
    ids=["with --set", "without a run", "a run that is none"],
)
def test_resuming_takes_a_run_and_nothing_else(options: tuple[str, ...], expected: tuple[str, ...]) -> None:
    tiny.one_clear_line(tiny.mlxtune("train", "--resume", *options), *expected)


ADAPTERS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no tensors": (remove("adapters.safetensors"), ("has no adapters.safetensors", "train it, or resume it.")),
    "no configuration": (remove("adapter_config.json"), ("has no adapter_config.json", "Expected an adapter folder")),
    "torn tensors": (
        lambda folder: (folder / "adapters.safetensors").write_bytes(
            (folder / "adapters.safetensors").read_bytes()[:1000]
        ),
        ("adapters.safetensors: not a safetensors file, or a torn one",),
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_folder_that_is_not_whole_is_refused(kind: str, run: Path, mlx_model: Path, tmp_path: Path) -> None:
    change, expected = ADAPTERS[kind]
    shutil.copytree(run, tmp_path / "run")
    change(tmp_path / "run")
    refusal = tiny.mlxtune("generate", "--model", mlx_model, "--adapter", tmp_path / "run", "--prompt", "Hi")
    said = tiny.one_clear_line(refusal, *expected)
    assert refusal.stdout == ""
    assert str(tmp_path / "run") in said


def test_an_adapter_of_another_model_is_refused(run: Path, data: Path, tmp_path: Path) -> None:
    other, out = tiny.make_model(tmp_path / "other", hidden_size=96), tmp_path / "out"
    expected = ("adapters.safetensors does not fit this model", "Use the model that the adapter was trained on.")
    refused(out, "export", "--model", other, "--adapter", run, "--to", "hf", "--out", out, expected=expected)


def test_exporting_a_peft_adapter_with_a_dtype_is_refused(run: Path, mlx_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--to", "peft", "--dtype", "float16", "--out", out)
    expected = ("--dtype has no effect with --to peft", "The factors are exported as they are.")
    refused(out, "export", "--model", mlx_model, "--adapter", run, *options, expected=expected)


def test_exporting_a_family_that_is_not_covered_names_those_that_are(run: Path, tmp_path: Path) -> None:
    """The family is looked at before the adapter, which fits no such model."""
    model, out = tiny.make_model(tmp_path / "gemma", "gemma2"), tmp_path / "out"
    expected = ("models of type gemma2 cannot be exported yet (covered: llama, qwen2)", "mlxtune fuse")
    refused(out, "export", "--model", model, "--adapter", run, "--to", "peft", "--out", out, expected=expected)


def test_sampling_options_without_a_temperature_are_refused(mlx_model: Path) -> None:
    refusal = tiny.mlxtune("generate", "--model", mlx_model, "--prompt", "Hi", "--top-p", "0.5")
    tiny.one_clear_line(refusal, "--top-p has no effect at --temperature 0", "Add, say, --temperature 0.7.")


@pytest.fixture
def as_nobody_special() -> list[str]:
    """What to put before a command so that file modes count: root is above them."""
    if os.geteuid() != 0:
        return []
    rights = "-dac_override,-dac_read_search"
    prefix = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]
    if shutil.which("setpriv") is None or subprocess.run([*prefix, "true"], check=False).returncode != 0:
        pytest.skip("root is above file modes, and setpriv cannot change that here")
    return prefix


@pytest.mark.parametrize("verb", ["convert", "train"])
def test_a_folder_that_cannot_be_written_is_refused(
    verb: str, as_nobody_special: list[str], hf_model: Path, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    out = closed / "out"
    command = {"convert": ["convert", hf_model, out], "train": ["train", "--model", mlx_model, "--data", data]}[verb]
    options = ["--out", out] if verb == "train" else []
    refusal = subprocess.run(
        [*as_nobody_special, COMMAND, *command, *options], capture_output=True, text=True, check=False
    )
    tiny.one_clear_line(refusal, f"cannot write {out}: permission denied", "Choose a folder you may write to.")
    nothing_written(out)


def test_a_file_that_cannot_be_read_is_refused(as_nobody_special: list[str], tmp_path: Path) -> None:
    file = tiny.write_jsonl(tmp_path / "train.jsonl", tiny.conversations(3))
    file.chmod(0)
    command = [*as_nobody_special, COMMAND, "data", "show", "--model", "model", "--data", file]
    refusal = subprocess.run(command, capture_output=True, text=True, check=False)
    tiny.one_clear_line(refusal, f"{file}: permission denied")


def test_a_name_that_is_too_long_is_refused() -> None:
    """As when someone hands over the data itself instead of a path."""
    refusal = tiny.mlxtune("data", "show", "--model", "model", "--data", '{"text": "' + "x" * 300 + '"}')
    tiny.one_clear_line(refusal, "the name is too long")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no small file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def leave_free(disk: Path, size: int) -> None:
    (disk / "other-files").write_bytes(b"0" * (shutil.disk_usage(disk).free - size))


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        ("convert", ("not enough disk space for", "MiB needed, 0.0 MiB free", "Free some space")),
        ("train", ("cannot write", "the disk is full", "Free some space")),
        ("export", ("cannot write", "the disk is full", "Free some space")),
    ],
)
def test_a_full_disk_is_said_and_left_as_it_was(
    verb: str,
    expected: tuple[str, ...],
    small_disk: Path,
    hf_model: Path,
    mlx_model: Path,
    run: Path,
    data: Path,
) -> None:
    out = small_disk / "out"
    leave_free(small_disk, 8192)
    command: dict[str, list[str | Path]] = {
        "convert": ["convert", hf_model, out],
        "train": ["train", "--model", mlx_model, "--data", data, "--out", out, "--set", "train.steps=2"],
        "export": ["export", "--model", mlx_model, "--adapter", run, "--to", "peft", "--out", out, "--no-verify"],
    }
    said = refused(out, *command[verb], expected=(*expected, str(out)))
    assert ".partial" not in said
    assert [path.name for path in small_disk.iterdir()] == ["other-files"]


def test_a_disk_that_fills_up_while_training_keeps_what_was_saved(
    small_disk: Path, mlx_model: Path, data: Path
) -> None:
    """There is room for one checkpoint, not for two; with more room the run goes on from it."""
    out = small_disk / "run"
    leave_free(small_disk, 800 << 10)
    settings = ("train.steps=6", "train.save_every=2", "train.eval_every=2")
    options = [option for setting in settings for option in ("--set", setting)]
    refusal = tiny.mlxtune("train", "--model", mlx_model, "--data", data, "--out", out, *options)
    tiny.one_clear_line(refusal, f"cannot write {out}", "the disk is full")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-0000002"]
    assert (
        load_file(out / "adapters.safetensors").keys()
        == load_file(out / "checkpoints" / "step-0000002" / "adapters.safetensors").keys()
    )
    assert not list(out.glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    resumed = tiny.mlxtune("train", "--resume", "--out", out)
    assert resumed.returncode == 0, resumed.stderr
    assert f"{out}: 6 steps" in resumed.stdout


def started(*args: str | Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [str(COMMAND), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_after_a_step_that_can_be_resumed(
    number: signal.Signals, status: int, mlx_model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ("--set", "train.steps=150", "--set", "lora.rank=2", "--set", "train.eval_every=0")
    process = started("train", "--model", mlx_model, "--data", data, "--out", out, *options)
    events = out / "events.jsonl"
    wait_for(lambda: events.is_file() and events.read_text().count('"kind": "train"') > 2, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("stopped after step ")
    assert last.endswith(f"; to go on: mlxtune train --resume --out {out}")
    assert "Traceback" not in said
    step = int(last.removeprefix("stopped after step ").split(";")[0])
    assert (out / "adapters.safetensors").is_file()
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{step:07d}"]
    resumed = tiny.mlxtune("train", "--resume", "--out", out)
    assert resumed.returncode == 0, resumed.stderr
    assert f"{out}: 150 steps" in resumed.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_a_conversion_leaves_nothing(
    number: signal.Signals, status: int, hf_model: Path, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    process = started("convert", hf_model, place / "out")
    wait_for(lambda: any(place.iterdir()), process)
    process.send_signal(number)
    stdout, said = process.communicate(timeout=60)
    assert (process.returncode, stdout, said.strip()) == (status, "", "stopped")
    assert not list(place.iterdir())

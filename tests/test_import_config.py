"""`mlxtune import-config`: what mlx-lm's and Axolotl's configurations become, and what is said of the rest."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from mlxtune.config import resolve
from mlxtune.config.imported import axolotl, mlx_lm, reading
from mlxtune.config.imported.translation import Translation
from mlxtune.errors import UserError

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "imported"
# File -> (settings that it must give, keys that must be named as without a counterpart, words of what changes).
EXPECTED: dict[str, tuple[dict[str, Any], set[str], tuple[str, ...]]] = {
    "mlx-lm-1-minimal.yaml": (
        {
            "train.steps": 600,
            "train.lr": 1e-5,  # mlx-lm's default, twenty times smaller than ours
            "lora.rank": 8,
            "lora.alpha": 160.0,
            "lora.layers": 16,
            "train.schedule": "constant",
            "train.clip_norm": 0.0,
            "train.keep": "last",
            "data.max_tokens": 2048,
        },
        set(),
        ("mask_prompt false: mlx-lm learns the prompts too", "corrects no bias", "validation:"),
    ),
    "mlx-lm-2-full-length.yaml": (
        {
            "train.steps": 250,
            "train.accumulate": 8,
            "train.batch_rows": 2,
            "train.eval_every": 25,
            "train.save_every": 50,
            "lora.alpha": 32.0,
            "lora.targets": ["self_attn.q_proj", "self_attn.v_proj"],
            "lora.layers": 8,
            "train.lr": 2e-5,
            "train.warmup_steps": 20,
            "train.weight_decay": 0.05,
            "train.schedule": "cosine",
            "train.checkpoint_layers": "all",
            "train.loggers": ["wandb"],
        },
        {"report_to: swanlab", "test", "test_batches", "val_batches", "steps_per_report", "project_name"}
        | {"optimizer_config.adamw.betas", "optimizer_config.adamw.eps", "lr_schedule.warmup_init"},
        ("averages the batches' means", "falls to 1e-07 in 230 updates"),
    ),
    "mlx-lm-3-dora.yaml": (
        {"lora.variant": "dora", "lora.layers": "all", "lora.alpha": 128.0, "data.train_on": "last"},
        {"trust_remote_code", "clear_cache_threshold"},
        ("corrects no bias",),
    ),
    "mlx-lm-4-hub-data.yaml": (
        {
            "data.sources": [
                {"path": "someone/summaries", "columns": {"article": "prompt", "highlights": "completion"}},
                {"path": "someone/dialogues:english", "columns": {"dialogue": "messages"}},
            ],
            "lora.targets": ["self_attn.q_proj", "self_attn.k_proj"],
        },
        {"hf_dataset.train_split", "hf_dataset.valid_split", "lora_parameters.keys: model.embed_tokens"},
        ("first 80%",),
    ),
    "mlx-lm-5-resumed-full.yaml": (
        {"lora.start_from": "adapters", "lora.layers": 4, "train.schedule": "cosine", "train.lr": 5e-6},
        {"lora_layers"},
        ("fine_tune_type full", "optimizer adafactor", "not 0000200_adapters.safetensors", "exponential_decay"),
    ),
    "axolotl-1-qlora.yml": (
        {
            "data.path": "example-org/alpaca-small",
            "data.template": "alpaca",
            "data.valid_fraction": 0.05,
            "train.batch_tokens": 8192,
            "train.accumulate": 4,
            "train.epochs": 4.0,
            "lora.rank": 32,
            "lora.alpha": 16.0,
            "lora.targets": "all-linear",
            "train.checkpoint_layers": "all",
            "train.loggers": ["wandb"],
            "train.seed": 42,
        },
        {"pad_to_sequence_len", "flash_attention", "bf16", "special_tokens"},
        ("load_in_4bit", "sample_packing", "evals_per_epoch 4", "Axolotl drops them"),
    ),
    "axolotl-2-chat.yml": (
        {
            "data.sources": [
                {"path": "chats/first.jsonl", "columns": {"dialogue": "messages"}},
                {"path": "chats/second.jsonl", "columns": {"dialogue": "messages"}},
            ],
            "lora.targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "lora.train_also": ["embeddings", "head"],
            "train.steps": 500,
            "train.warmup_steps": 50,
            "train.save_every": 125,
            "train.eval_every": 50,
            "train.keep": "best",
            "train.patience": 4,
            "train.lr": 1e-4,
            "train.neftune_alpha": 5.0,
            "train.clip_norm": 0.3,
        },
        {"datasets.train_on_eos", "datasets.roles", "datasets.ds_type"},
        ("roles_to_train: tool", "val_set_size 200", "load_in_8bit", "chat_template llama3", "state in float32"),
    ),
    "axolotl-3-sharegpt.yml": (
        {
            "data.path": "example-org/sharegpt:cleaned",
            "data.template": "chatml",
            "lora.variant": "dora",
            "lora.b_rate": 16.0,
            "lora.ranks": {"down_proj": 32},
            "train.eval_every": 0,
            "train.schedule": "cosine",
        },
        {
            "deepspeed",
            "fsdp_config",
            "liger_rms_norm",
            "plugins",
            "lora_target_modules",
            "lora_rank_pattern",
            "use_mlflow",
        },
        ("optimizer muon", "lr_scheduler rex", "train_on_inputs", "3% of the steps"),
    ),
    "axolotl-4-own-type.yml": (
        {
            "data.sources": [
                {"path": "data/qa.jsonl", "columns": {"question": "instruction", "answer": "output"}},
                {"path": "data/books.jsonl", "columns": {"page": "text"}},
            ],
            "data.template": "templates/brief.jinja",
            "data.template_kwargs": {"enable_thinking": False},
            "data.dedup": "exact",
            "train.weight_decay": 0.1,
        },
        {"datasets.type.format", "datasets.type.system_prompt", "test_datasets", "a_key_of_some_plugin"},
        ("no adapter: Axolotl trains the matrices themselves",),
    ),
}


def translated(name: str) -> Translation:
    return reading.read(FIXTURES / name)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_configuration_becomes_ours_and_names_what_it_does_not_carry_over(name: str) -> None:
    made = translated(name)
    settings, without, changed = EXPECTED[name]
    assert {key: made.settings.get(key) for key in settings} == settings
    named = [key for key, _ in made.without]
    assert without <= set(named) and len(named) == len(set(named)), named
    for words in changed:
        assert any(words in line for line in made.changed), (words, made.changed)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_key_of_the_file_is_either_taken_over_or_named(name: str) -> None:
    """What is false or empty switches off what mlxtune does not have; a key whose value is a default is no loss."""
    made = translated(name)
    text = made.to_yaml()
    for line in (FIXTURES / name).read_text().splitlines():
        found = re.match(r"(\w+):\s*(.*)", line)
        if found and found[2] not in ("", "false", "null", '"no"'):
            assert found[1] in text or found[1] in QUIET, found[1]


# Keys that become a setting of nearly the same name, or that only say what kind of file it is.
QUIET = {"train", "model", "base_model", "data", "seed", "fine_tune_type", "optimizer", "adapter", "batch_size"}
QUIET |= {"lora_alpha", "lora_dropout", "lora_parameters", "weight_decay", "report_to", "wandb_project", "mask_prompt"}
QUIET |= {"peft_use_dora", "sequence_len", "num_epochs", "grad_checkpoint", "hf_dataset", "excess_length_strategy"}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_file_that_is_written_says_the_same_and_every_sentence_is_a_comment(name: str, tmp_path: Path) -> None:
    made = translated(name)
    (tmp_path / "made.yaml").write_text(made.to_yaml())
    assert resolve.load(tmp_path / "made.yaml") == made.config()
    for line in made.to_yaml().splitlines():
        assert len(line) <= 200 and re.match(r"#|\w+:$|  +\S|$", line), line


@pytest.mark.parametrize("name", ["mlx-lm-1-minimal.yaml", "axolotl-1-qlora.yml"])
def test_what_is_written_can_be_planned_with_a_model_and_rows(name: str, mlx_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    said = tiny.done("import-config", FIXTURES / name, "--out", out)
    assert "mean something else here" in said.stderr and "settings" in said.stdout
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.conversations(12))
    sets = ("--set", "lora.layers=all", "--set", "data.template=''", "--set", "train.loggers=[]")
    plan = tiny.done("train", "-c", out, "--model", mlx_model, "--data", rows, *sets, "--dry-run").stdout
    steps = {"mlx-lm": "optimizer steps: 600", "axolotl": "optimizer steps: "}[
        name.rpartition("-")[0].rpartition("-")[0]
    ]
    assert steps in plan


def test_the_document_for_programs_has_all_of_it() -> None:
    told = json.loads(tiny.done("import-config", FIXTURES / "mlx-lm-3-dora.yaml", "--json").stdout)
    assert told["program"] == "mlx-lm" and told["settings"]["lora.variant"] == "dora"
    assert {one["key"] for one in told["without_counterpart"]} == {"trust_remote_code", "clear_cache_threshold"}


def test_the_defaults_are_those_of_the_installed_mlx_lm() -> None:
    from mlx.optimizers import Adam, AdamW
    from mlx_lm.lora import CONFIG_DEFAULTS

    assert {key: CONFIG_DEFAULTS[key] for key in mlx_lm.DEFAULTS} == mlx_lm.DEFAULTS
    assert CONFIG_DEFAULTS["lora_parameters"] == mlx_lm.LORA_DEFAULTS
    assert CONFIG_DEFAULTS["mask_prompt"] is False and CONFIG_DEFAULTS["grad_accumulation_steps"] == 1
    assert inspect.signature(AdamW).parameters["weight_decay"].default == mlx_lm.ADAMW_DECAY
    for kind in (Adam, AdamW):
        defaults = inspect.signature(kind).parameters
        assert {name: defaults[name].default for name in mlx_lm.ADAM} == mlx_lm.ADAM
        assert defaults["bias_correction"].default is False
    known = {*mlx_lm.DEFAULTS, *mlx_lm.WITHOUT, "lora_parameters", "optimizer_config"}
    source = inspect.getsource(mlx_lm)
    assert [key for key in CONFIG_DEFAULTS if key not in known and f'"{key}"' not in source] == []


def test_the_configuration_that_a_run_of_mlx_lm_leaves_is_read_too(tmp_path: Path) -> None:
    from mlx_lm.lora import CONFIG_DEFAULTS

    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**CONFIG_DEFAULTS, "train": True, "model": "somewhere", "iters": 20}))
    made = reading.read(file)
    assert (made.program, made.settings["train.steps"], made.settings["model.path"]) == ("mlx-lm", 20, "somewhere")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rl: grpo\nbase_model: m\nlearning_rate: 1e-5\n", "rewarded"),
        ("reward_model: true\nbase_model: m\n", "reward models"),
        ("base_model: m\n", "no learning_rate"),
        ("base_model: m\nlearning_rate: fast\n", "learning_rate: expected a number"),
        ("iters: 3\ngrad_accumulation_steps: 4\n", "make no update at all"),
        ("iters: many\n", "line 1: iters: expected a whole number, got 'many'"),
        ("iters: 9\nlora_parameters: {rank: 8, alpha: 16}\n", "no dropout and no scale"),
        ("iters: 9\nmax_seq_length: 2\n", "data.max_tokens"),
        ("model_name_or_path: m\n", "LLaMA-Factory"),
        ("train: {lr: 1}\n", "mlxtune's own already"),
        ("- a\n", "no keys in it"),
        ("iters: [\n", "not valid YAML"),
    ],
)
def test_what_cannot_be_read_or_is_not_meant_is_refused_in_one_line(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        reading.read(file)
    assert "\n" not in refused.value.message and "\n" not in refused.value.hint


def test_a_text_of_the_file_begins_no_line_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    evil = '"x\\ntrain:\\n  lr: 9\\u2028model: {}\\e]0;t\\a"'
    file.write_text(
        f"base_model: {evil}\nlearning_rate: 1e-4\nadapter: {evil}\nplugin_{0}: {evil}\nchat_template: {evil}\n"
    )
    made = reading.read(file)
    (tmp_path / "made.yaml").write_text(made.to_yaml())
    read = resolve.load(tmp_path / "made.yaml")
    assert read.train.lr == 1e-4 and read == made.config() and read.model.path.startswith("x\ntrain:")
    assert "\x1b" not in made.to_yaml()


def test_a_second_file_is_not_replaced_unasked_and_options_without_effect_are_refused(tmp_path: Path) -> None:
    source, out = FIXTURES / "mlx-lm-1-minimal.yaml", tmp_path / "mine.yaml"
    out.write_text("mine")
    tiny.one_clear_line(tiny.mlxtune("import-config", source, "--out", out), "already exists", "--force")
    tiny.one_clear_line(tiny.mlxtune("import-config", source, "--force"), "--force has no effect without --out")
    tiny.one_clear_line(tiny.mlxtune("import-config", tmp_path / "none.yaml"), "no file")
    tiny.done("import-config", source, "--out", out, "--force")
    assert resolve.load(out).train.steps == 600


def test_the_objectives_that_are_known_are_those_that_generate_nothing() -> None:
    assert set(axolotl.HELD_LOSSES) == {"dpo", "ipo", "simpo", "orpo", "kto"}


def test_preferences_become_the_section_preference() -> None:
    made = translated("axolotl-5-dpo.yml")
    wanted = {"preference.loss": "dpo", "preference.beta": 0.2, "preference.label_smoothing": 0.1}
    assert {key: made.settings.get(key) for key in wanted} == wanted
    assert made.without == [] and "data.columns" not in made.settings  # chosen and rejected are called so here too


@pytest.mark.parametrize(
    ("objective", "theirs", "ours"),
    [
        ("ipo", {"rl_beta": 0.3}, {"beta": 0.3}),
        ("simpo", {"rl_beta": 2.0, "simpo_gamma": 0.5}, {"beta": 2.0, "gamma": 0.5}),
        ("simpo", {}, {"beta": 0.1}),  # ours is 2.0
        ("orpo", {"orpo_alpha": 0.2}, {"beta": 0.2}),
        ("kto", {"kto_desirable_weight": 1.2, "kto_undesirable_weight": 0.8}, {"good_weight": 1.2, "bad_weight": 0.8}),
    ],
)
def test_every_objective_gives_settings_that_its_loss_heeds(
    objective: str, theirs: dict[str, float], ours: dict[str, float], tmp_path: Path
) -> None:
    """A key of preference without effect is refused where the file is read, so a file that is read has none."""
    file = tmp_path / "theirs.yml"
    sets = [{"path": "p", "type": {"field_prompt": "question", "field_chosen": "good", "field_rejected": "bad"}}]
    tree = {"base_model": "m", "learning_rate": 1e-5, "adapter": "lora", "rl": objective, "datasets": sets, **theirs}
    file.write_text(json.dumps(tree))
    made = reading.read(file)
    assert made.settings["data.columns"] == {"question": "prompt", "good": "chosen", "bad": "rejected"}
    found = made.config().preference.model_dump()
    assert found["loss"] == objective and {key: found[key] for key in ours} == ours

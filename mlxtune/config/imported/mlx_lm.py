"""Configurations of mlx-lm (`mlx_lm.lora --config FILE`), and the adapter_config.json that its runs leave.

Worked example, with what mlx-lm 0.32.2 does (mlx_lm/lora.py, tuner/trainer.py):

    iters: 1000, grad_accumulation_steps: 4    1000 batches, 250 updates: train.steps 250, train.accumulate 4
    lora_parameters: rank 8, scale 20.0        the update is scale x B A: lora.alpha = scale x rank = 160
    mask_prompt: true                          only the last message is learned: data.train_on last
    learning_rate unset                        mlx-lm's own default, 1e-5, and not ours

A key that a file leaves out has mlx-lm's default, so the configuration that is made says it too.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from mlxtune.config.imported.given import Given
from mlxtune.config.imported.translation import Translation
from mlxtune.errors import UserError

# What mlx-lm takes where a file says nothing (CONFIG_DEFAULTS of mlx_lm/lora.py).
DEFAULTS: dict[str, Any] = {
    "model": "Qwen/Qwen3-0.6b",
    "data": "mlx-community/WikiSQL",
    "num_layers": 16,
    "batch_size": 4,
    "iters": 1000,
    "val_batches": 25,
    "learning_rate": 1e-5,
    "steps_per_eval": 200,
    "save_every": 100,
    "max_seq_length": 2048,
}
LORA_DEFAULTS: dict[str, Any] = {"rank": 8, "dropout": 0.0, "scale": 20.0}
ADAMW_DECAY = 0.01  # of MLX's AdamW where a file does not say it (mlx.optimizers.AdamW)
ADAM = {"betas": [0.9, 0.999], "eps": 1e-8}  # of MLX's Adam and AdamW, as of ours
# Keys that mlx-lm has and a run of ours has no place for, with the reason.
WITHOUT = {
    "steps_per_report": "every step is reported, in events.jsonl and on the page",
    "val_batches": "all held-out rows are scored; data.valid_fraction and data.cap decide how many there are",
    "clear_cache_threshold": "mlxtune limits MLX's cache by the device",
    "project_name": "loggers are given the name of the run's folder",
    "config": "it names the file that was read",
}
# Names of rows' columns: mlx-lm's key -> what a column of that name means to us.
COLUMNS = {
    "prompt_feature": "prompt",
    "completion_feature": "completion",
    "chat_feature": "messages",
    "text_feature": "text",
}
OLDER = {"lora_layers": "num_layers", "use_dora": "fine_tune_type: dora"}  # mlx-lm reads these no more
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings")


def translate(given: Given) -> Translation:
    """Our configuration. Raises UserError for a file that mlx-lm itself refuses."""
    made = Translation("mlx-lm", given.source)
    _model(given, made)
    _data(given, made)
    _adapter(given, made)
    _length(given, made)
    _optimizer(given, made)
    _elsewhere(given, made)
    for name in given.left():
        now = f"; it is called {OLDER[name]} now" if name in OLDER else ""
        made.leave_out(name, f"mlx-lm does not read it{now}")
    return made


def _model(given: Given, made: Translation) -> None:
    if not given.has("model"):
        made.change(f"no model is named: mlx-lm takes its default, {DEFAULTS['model']}, and so does this file")
    made.set("model.path", given.text("model", DEFAULTS["model"]))
    if given.truth("trust_remote_code"):
        made.leave_out("trust_remote_code", "mlxtune runs no code that comes with a model")


def _data(given: Given, made: Translation) -> None:
    sets = given.tables("hf_dataset")
    if sets:
        if given.value("data") is not None:
            made.leave_out("data", "mlx-lm reads hf_dataset instead where a file has both")
        _hub_sets(sets, made)
    else:
        if not given.has("data"):
            made.change(f"no data is named: mlx-lm takes its default, {DEFAULTS['data']}, and so does this file")
        made.set("data.path", given.text("data", DEFAULTS["data"]))
        if columns := _columns(given):
            made.set("data.columns", columns)
    made.change(
        "validation: where there is no valid.jsonl, mlx-lm trains on all rows; mlxtune holds data.valid_fraction of "
        "them out"
    )
    most = given.whole("max_seq_length", DEFAULTS["max_seq_length"])
    made.set("data.max_tokens", most, f"max_seq_length {most}")
    if given.truth("mask_prompt"):
        made.set("data.train_on", "last", "mask_prompt: mlx-lm learns the last message alone")
    else:
        made.change(
            "mask_prompt false: mlx-lm learns the prompts too; mlxtune learns the assistant's turns alone, and has no "
            "key for the other (rows of plain text are learned whole by both). Losses are not comparable"
        )


def _columns(given: Given) -> dict[str, str]:
    """The names of columns that differ from those that rows have by themselves: {question: prompt}."""
    named = {given.text(key, meant): meant for key, meant in COLUMNS.items()}
    return {name: meant for name, meant in named.items() if name != meant}


def _hub_sets(sets: list[Given], made: Translation) -> None:
    sources = []
    for one in sets:
        path = one.text("path")
        if not path:
            raise one.wrong("path", "the name of a dataset")
        options = one.table("config")
        if options is not None:
            subset = options.text("name")
            path = f"{path}:{subset}" if subset else path
            for name in options.left():
                made.leave_out(f"hf_dataset.config.{name}", "of a dataset only its name and a subset can be given")
        source: dict[str, object] = {"path": path}
        if columns := _columns(one):
            source["columns"] = columns
        sources.append(source)
        for name in ("train_split", "valid_split", "test_split"):
            if one.value(name) is not None:
                made.leave_out(f"hf_dataset.{name}", "a dataset's own splits are used, or data.valid_fraction and cap")
        if not one.has("train_split"):
            made.change(f"{path}: mlx-lm takes the first 80% of its split train and validates on the last 10%")
        for name in one.left():
            made.leave_out(f"hf_dataset.{name}", "mlx-lm does not read it")
    if len(sources) > 1:
        made.set("data.sources", sources, "hf_dataset")
        return
    (alone,) = sources
    made.set("data.path", alone["path"], "hf_dataset.path")
    if "columns" in alone:
        made.set("data.columns", alone["columns"], "hf_dataset: prompt_feature and its like")


def _adapter(given: Given, made: Translation) -> None:
    kind = given.text("fine_tune_type", "lora")
    if kind not in ("lora", "dora", "full"):
        raise UserError(f"{given.source}: fine_tune_type {kind} is none of mlx-lm's", "It has lora, dora and full.")
    layers = given.whole("num_layers", DEFAULTS["num_layers"])
    made.set("lora.layers", layers if layers > 0 else "all", f"num_layers {layers}")
    parameters = given.table("lora_parameters")
    start = given.text("resume_adapter_file")
    if start:
        _start_from(start, made)
    if kind == "full":
        made.change(
            "fine_tune_type full: mlx-lm trains the matrices themselves; mlxtune trains an adapter on them, here with "
            "its own rank (lora.train_also trains layers in full, by name). Rates for full training are some ten times "
            "lower than those for adapters: look at train.lr"
        )
        return
    if kind == "dora":
        made.set("lora.variant", "dora", "fine_tune_type dora")
    rank, scale, dropout = LORA_DEFAULTS["rank"], LORA_DEFAULTS["scale"], LORA_DEFAULTS["dropout"]
    if parameters is not None:
        missing = [name for name in LORA_DEFAULTS if not parameters.has(name)]
        if missing:
            alpha = " (alpha is not read: scale is alpha / rank)" if parameters.has("alpha") else ""
            raise UserError(
                f"{given.source}: lora_parameters has no {' and no '.join(missing)}: mlx-lm refuses it{alpha}",
                "A file that sets lora_parameters must say rank, scale and dropout.",
            )
        rank, scale = parameters.whole("rank", rank), parameters.number("scale", scale)
        dropout = parameters.number("dropout", dropout)
        _targets(parameters, made)
        for name in parameters.left():
            made.leave_out(f"lora_parameters.{name}", "mlx-lm does not read it")
    made.set("lora.rank", rank)
    made.set("lora.alpha", scale * rank, f"scale {scale:g} x rank {rank}: mlx-lm's scale is alpha / rank")
    made.set("lora.dropout", dropout)


def _targets(parameters: Given, made: Translation) -> None:
    keys = parameters.texts("keys")
    if not parameters.has("keys"):
        return
    of_embeddings = [key for key in keys if key.rpartition(".")[2] in EMBEDDINGS]
    for key in of_embeddings:
        made.leave_out(
            f"lora_parameters.keys: {key}",
            "mlxtune has no adapter of an embedding; lora.train_also: [embeddings] trains it in full",
        )
    made.set("lora.targets", [key for key in keys if key not in of_embeddings], "lora_parameters.keys")
    made.change(
        "lora_parameters.keys: mlx-lm leaves a name out that the model does not have, in silence; mlxtune refuses it"
    )


def _start_from(file: str, made: Translation) -> None:
    path = PurePath(file)
    made.set("lora.start_from", str(path.parent), f"resume_adapter_file {file}: the folder that it is in")
    made.change(
        "resume_adapter_file: the adapter's own settings decide its rank, scale and layers; those below have to be the "
        "same"
    )
    if path.name != "adapters.safetensors":
        made.change(f"resume_adapter_file: of that folder adapters.safetensors is read, not {path.name}")


def _length(given: Given, made: Translation) -> None:
    """How many steps, how large, and what happens between them."""
    batches = given.whole("grad_accumulation_steps", 1)
    iterations = given.whole("iters", DEFAULTS["iters"])
    if batches < 1 or iterations < batches:
        raise UserError(
            f"{given.source}: iters {iterations} and grad_accumulation_steps {batches} make no update at all",
            "mlx-lm updates after every grad_accumulation_steps batches.",
        )
    made.set("train.steps", iterations // batches, *_of_batches("iters", iterations, batches))
    made.set("train.batch_rows", given.whole("batch_size", DEFAULTS["batch_size"]), "batch_size")
    made.set("train.accumulate", batches)
    if batches > 1:
        made.change(
            "grad_accumulation_steps: mlx-lm averages the batches' means; mlxtune divides the sum over all tokens of a "
            "step once, so that every token counts alike"
        )
        if iterations % batches:
            made.change(f"iters {iterations}: the last {iterations % batches} of them change nothing in mlx-lm")
    for name, key in (("steps_per_eval", "train.eval_every"), ("save_every", "train.save_every")):
        every = given.whole(name, DEFAULTS[name])
        if every < 1:
            raise UserError(f"{given.source}: {name} {every}: mlx-lm refuses it", "It is 1 or more.")
        made.set(key, max(1, every // batches), *_of_batches(name, every, batches))
    made.set(
        "train.keep", "last", "mlx-lm keeps the adapter of the last step; best would keep the one that validates best"
    )
    if given.truth("grad_checkpoint"):
        made.set("train.checkpoint_layers", "all", "grad_checkpoint")
    seed = given.whole("seed", 0)
    made.set("train.seed", seed, "the same number, other draws: mlx-lm's order and start are not repeated")


def _of_batches(name: str, number: int, batches: int) -> list[str]:
    """Why a number of batches became another number of steps; [] where it is the same."""
    if batches == 1:
        return [f"{name} {number}"]
    return [f"{name} {number} / grad_accumulation_steps {batches}: mlx-lm counts batches, mlxtune optimizer steps"]


def _optimizer(given: Given, made: Translation) -> None:
    name = given.text("optimizer", "adam").lower()
    every = given.table("optimizer_config")
    own = every.table(name) if every is not None else None
    own = own or Given({}, given.document, given.source)
    rate = given.number("learning_rate", DEFAULTS["learning_rate"])
    made.set("train.lr", rate, "learning_rate" + ("" if given.has("learning_rate") else ": mlx-lm's default"))
    if name not in ("adam", "adamw"):
        made.change(
            f"optimizer {name}: mlxtune has AdamW alone, for which a rate of {name} is rarely right: see train.lr"
        )
    elif not own.truth("bias_correction"):
        made.change(f"optimizer {name}: mlx-lm's corrects no bias, so its first steps are up to three times larger")
    decay = own.number("weight_decay", ADAMW_DECAY if name == "adamw" else 0.0)
    made.set("train.weight_decay", decay, f"optimizer {name}")
    for setting, usual in ADAM.items():
        value = own.value(setting)
        if value is not None and value != usual:
            made.leave_out(f"optimizer_config.{name}.{setting}", f"{value}: mlxtune's AdamW has {usual}")
    for setting in own.left():
        made.leave_out(f"optimizer_config.{name}.{setting}", "mlxtune's AdamW has no such setting")
    made.set("train.clip_norm", 0.0, "mlx-lm does not clip gradients")
    _schedule(given, made)


def _schedule(given: Given, made: Translation) -> None:
    schedule = given.table("lr_schedule")
    if schedule is None:
        made.set("train.schedule", "constant", "no lr_schedule")
        made.set("train.warmup_steps", 0)
        return
    name, arguments = schedule.text("name"), schedule.numbers("arguments")
    if not arguments:
        raise schedule.wrong("arguments", "numbers, the first of them the learning rate")
    made.set("train.lr", arguments[0], "lr_schedule takes the place of learning_rate")
    made.set("train.warmup_steps", schedule.whole("warmup", 0), "lr_schedule.warmup")
    if schedule.number("warmup_init", 0.0):
        made.leave_out("lr_schedule.warmup_init", "mlxtune's warmup climbs from zero")
    for setting in schedule.left():
        made.leave_out(f"lr_schedule.{setting}", "mlx-lm does not read it")
    kinds = {"cosine_decay": "cosine", "linear_schedule": "linear"}
    if name not in kinds:
        made.set("train.schedule", "cosine", f"lr_schedule {name}")
        made.change(f"lr_schedule {name}: mlxtune has constant, linear and cosine; cosine takes its place")
        return
    made.set("train.schedule", kinds[name], f"lr_schedule {name}")
    # cosine_decay(rate, steps, end = 0), linear_schedule(rate, end, steps)
    rest = [*arguments[1:], 0.0, 0.0]
    steps, end = (rest[0], rest[1]) if name == "cosine_decay" else (rest[1], rest[0])
    made.change(
        f"lr_schedule {name}: mlx-lm falls to {end:g} in {steps:g} updates behind the warmup; mlxtune falls to 0 at "
        "the end of the run"
    )


def _elsewhere(given: Given, made: Translation) -> None:
    """What is no setting of a run here, but a command or an option."""
    if not given.truth("train"):
        made.change("train is not true: mlx-lm would train only with its flag --train; this file is one for training")
    out = given.text("adapter_path", "adapters")
    made.next.append(f"mlxtune train -c FILE --out RUN      (adapter_path {out}: a run has a folder of its own)")
    if given.truth("test"):
        made.leave_out("test", "a run does not look at test rows; see below")
        made.next.append("mlxtune eval --adapter RUN --data DATA --split test")
    if given.value("test_batches") is not None:
        made.leave_out("test_batches", "eval scores all rows")
    services = [one.strip() for text in given.texts("report_to") for one in text.split(",") if one.strip()]
    if "wandb" in services:
        made.set("train.loggers", ["wandb"], "report_to")
    for service in services:
        if service != "wandb":
            made.leave_out(f"report_to: {service}", "train.loggers has tensorboard, wandb and trackio")
    for name, why in WITHOUT.items():
        if given.value(name) is not None:
            made.leave_out(name, why)

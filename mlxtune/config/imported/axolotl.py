"""Configurations of Axolotl (`axolotl train FILE`).

Worked example (axolotl/utils/schemas says what keys mean and default to):

    micro_batch_size: 2, gradient_accumulation_steps: 4    train.batch_rows 2, train.accumulate 4
    the same with sample_packing, sequence_len: 4096       packed rows fill 2 x 4096 tokens: train.batch_tokens 8192
    num_epochs: 4, evals_per_epoch: 4                      an evaluation every 1/16 of the run, whose length the data
                                                           decide: it is not known here, which is said
    load_in_4bit: true                                     mlxtune quantizes once, by mlxtune convert

Axolotl leaves an adapter's scale at lora_alpha / lora_r, as PEFT does: lora.alpha is the same number.
"""

from __future__ import annotations

import math
import re
import shlex
from fnmatch import fnmatchcase

from mlxtune.config.imported import axolotl_data
from mlxtune.config.imported.axolotl_elsewhere import leave_out_the_rest
from mlxtune.config.imported.given import Given
from mlxtune.config.imported.translation import Translation
from mlxtune.errors import UserError

TRAINED = {"embed_tokens": "embeddings", "lm_head": "head"}  # of lora_modules_to_save -> of lora.train_also
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
HELD_LOSSES = ("dpo", "ipo", "simpo", "orpo", "kto")  # of rl: training on preferences without generating
BETA = 0.1  # of TRL's DPO, KTO, ORPO and CPO where a file says nothing
# Keys of preference tuning -> (the objectives that heed it, our key, TRL's value where an objective's own differs from
# ours and a file says nothing). TRL's trainer of SimPO adds cpo_alpha x the chosen answer's own loss.
HEEDED: dict[str, tuple[tuple[str, ...], str, float | None]] = {
    "dpo_label_smoothing": (("dpo",), "preference.label_smoothing", None),
    "rpo_alpha": (("dpo", "ipo"), "preference.sft", None),
    "simpo_gamma": (("simpo",), "preference.gamma", 0.5),
    "cpo_alpha": (("simpo",), "preference.sft", 1.0),
    "kto_desirable_weight": (("kto",), "preference.good_weight", None),
    "kto_undesirable_weight": (("kto",), "preference.bad_weight", None),
}
CLIP = 1.0  # max_grad_norm where a file says nothing, as transformers has it


def translate(given: Given) -> Translation:
    """Our configuration. Raises UserError for training that mlxtune has not."""
    made = Translation("Axolotl", given.source)
    _objective(given, made)
    _model(given, made)
    axolotl_data.data(given, made)
    _adapter(given, made)
    _length(given, made)
    _optimizer(given, made)
    _between(given, made)
    out = given.text("output_dir", "./model-out")
    made.next.append(f"mlxtune train -c FILE --out RUN      (output_dir {out}: a run has a folder of its own)")
    leave_out_the_rest(given, made)
    return made


def _objective(given: Given, made: Translation) -> None:
    objective = given.text("rl")
    for name in ("reward_model", "process_reward_model"):
        if given.truth(name):
            raise UserError(f"{given.source}: {name}: mlxtune trains no reward models", "It tunes models that answer.")
    if not objective:
        _leave_out_idle(given, made, "without rl Axolotl does not heed it")
        return
    if objective not in HELD_LOSSES:
        raise UserError(
            f"{given.source}: rl {objective}: mlxtune does not train while answers are generated and rewarded",
            f"Of rl it has {', '.join(HELD_LOSSES)}.",
        )
    made.set("preference.loss", objective, "rl")
    _beta(given, made)
    for name, (objectives, key, default) in HEEDED.items():
        if objective not in objectives:
            continue
        value = given.number(name, 0.0 if default is None else default)
        if given.has(name):
            made.set(key, value, name)
        elif default is not None:
            made.set(key, value, f"no {name}: TRL's default")
    _leave_out_idle(given, made, f"rl {objective} does not heed it in Axolotl")


def _beta(given: Given, made: Translation) -> None:
    """preference.beta, of the first of these that the file says, as Axolotl's builder of trainers takes it."""
    trainer = given.table("trl")
    beta, named = BETA, "no rl_beta: TRL's default"
    if trainer is not None and trainer.has("beta"):
        beta, named = trainer.number("beta", BETA), "trl.beta"
    elif given.has("rl_beta") or given.has("dpo_beta"):
        named = "rl_beta" if given.has("rl_beta") else "dpo_beta"
        beta = given.number(named, BETA)
    elif given.has("orpo_alpha"):
        beta, named = given.number("orpo_alpha", BETA), "orpo_alpha"
    made.set("preference.beta", beta, named)
    for name in trainer.left() if trainer is not None else ():
        made.leave_out(f"trl.{name}", "it is about TRL's trainers; see the section preference")
    for name in ("rl_beta", "dpo_beta", "orpo_alpha"):
        value = given.number(name, beta)
        if value != beta:
            made.leave_out(
                name,
                f"{value:g}: Axolotl takes {named} before it (up to its release 0.8 orpo_alpha came first: look at "
                "preference.beta)",
            )


def _leave_out_idle(given: Given, made: Translation, why: str) -> None:
    """Name the keys of preference tuning that were not asked for."""
    for name in given.left():
        if name in HEEDED or name in ("trl", "rl_beta", "dpo_beta", "orpo_alpha"):
            given.value(name)
            made.leave_out(name, why)


def _model(given: Given, made: Translation) -> None:
    model = given.text("base_model")
    made.set("model.path", model, "base_model")
    bits = 4 if given.truth("load_in_4bit") or given.text("adapter") == "qlora" else 0
    if given.truth("load_in_8bit"):
        bits = 8
    if bits:
        made.change(
            f"load_in_{bits}bit: mlxtune quantizes a model once, into a folder; as it stands, what model.path names is "
            "trained as it is"
        )
        made.next.append(f"mlxtune convert {shlex.quote(model)} model --bits {bits}      (then model.path: model)")


def _adapter(given: Given, made: Translation) -> None:
    kind = given.text("adapter")
    if kind not in ("lora", "qlora"):
        what = f"adapter {kind}: mlxtune has LoRA" if kind else "no adapter: Axolotl trains the matrices themselves"
        made.change(f"{what}; mlxtune trains an adapter on them (lora.train_also trains layers in full, by name)")
    rank = given.whole("lora_r", 8 if kind else 16)
    made.set("lora.rank", rank, "lora_r" if given.has("lora_r") else "no lora_r")
    made.set(
        "lora.alpha", given.number("lora_alpha", 2.0 * rank), "lora_alpha" if given.has("lora_alpha") else "2 x rank"
    )
    made.set("lora.dropout", given.number("lora_dropout", 0.0))
    variants = [name for name in ("dora", "rslora") if given.truth(f"peft_use_{name}")]
    if variants:
        made.set("lora.variant", variants[0], f"peft_use_{variants[0]}")
    if len(variants) > 1:
        made.change("peft_use_dora and peft_use_rslora: mlxtune has one of them at a time; DoRA is taken")
    _targets(given, made)
    _ranks(given, made)
    saved = given.texts("lora_modules_to_save")
    if saved:
        made.set("lora.train_also", [TRAINED.get(name, name) for name in saved], "lora_modules_to_save")
    if given.has("loraplus_lr_ratio"):
        made.set("lora.b_rate", given.number("loraplus_lr_ratio", 1.0), "loraplus_lr_ratio")
    if start := given.text("lora_model_dir"):
        made.set("lora.start_from", start, "lora_model_dir")
        made.change("lora_model_dir: an adapter of PEFT is brought over first, by mlxtune convert")


def _ranks(given: Given, made: Translation) -> None:
    """Ranks of single layers."""
    pattern = given.table("lora_rank_pattern")
    ranks: dict[str, int] = {}
    for name in pattern.tree if pattern is not None else ():
        assert pattern is not None
        if re.fullmatch(r"[\w.]+", name):
            ranks[name] = pattern.whole(name, 0)
        else:
            made.leave_out("lora_rank_pattern", f"{name}: mlxtune names layers, and knows no patterns")
    if ranks:
        made.set("lora.ranks", ranks, "lora_rank_pattern")


def _targets(given: Given, made: Translation) -> None:
    value = given.value("lora_target_modules")
    names = given.texts("lora_target_modules") if isinstance(value, list) else []
    everything = given.truth("lora_target_linear") or value == "all-linear"
    if everything:
        made.set("lora.targets", "all-linear", "lora_target_linear")
        return
    plain = [name for name in names if re.fullmatch(r"[\w.]+", name)]
    others = [name for name in names if name not in plain] or ([value] if isinstance(value, str) else [])
    for name in others:
        made.leave_out("lora_target_modules", f"{name}: mlxtune names layers, and knows no patterns")
    if plain:
        made.set("lora.targets", plain, "lora_target_modules")
    elif given.has("adapter"):
        made.change("lora_target_modules: none that can be taken over; all linear layers of the blocks get the adapter")


def _length(given: Given, made: Translation) -> None:
    """How many steps, and how large."""
    rows = given.whole("micro_batch_size", 1, least=1)
    batches = given.whole("gradient_accumulation_steps", 1, least=1)
    total = given.whole("batch_size", 0)
    if total and not given.has("gradient_accumulation_steps"):
        batches = max(1, total // rows)
    if given.truth("sample_packing"):
        tokens = rows * given.whole("sequence_len", 512)
        made.set("train.batch_tokens", tokens, f"micro_batch_size {rows} x sequence_len: what packed rows fill")
        made.change(
            "sample_packing: Axolotl fills long rows with several short ones; mlxtune takes as many tokens into a "
            "batch, in rows of their own (see train.batch_tokens), which comes to about the same step"
        )
    else:
        made.set("train.batch_rows", rows, "micro_batch_size")
    made.set("train.accumulate", batches, "gradient_accumulation_steps; several GPUs made a step as many times larger")
    steps = given.whole("max_steps", 0)
    epochs = given.number("num_epochs", 1.0, above=0)
    if steps > 0:
        made.set("train.steps", steps, "max_steps, which comes before num_epochs")
    else:
        made.set("train.epochs", epochs, "num_epochs")
    if given.value("gradient_checkpointing"):
        made.set("train.checkpoint_layers", "all", f"gradient_checkpointing {given.value('gradient_checkpointing')}")
    made.set("train.seed", given.whole("seed", 42), "the same number, other draws: Axolotl's run is not repeated")


def _optimizer(given: Given, made: Translation) -> None:
    rate = given.value("learning_rate")
    if isinstance(rate, str):  # Axolotl takes a number in quotes
        try:
            rate = float(rate)
        except ValueError:
            raise given.wrong("learning_rate", "a number") from None
        if not math.isfinite(rate):
            raise given.wrong("learning_rate", "a number")
        made.set("train.lr", rate, "learning_rate")
    elif rate is None:
        raise UserError(
            f"{given.source}: no learning_rate, without which Axolotl refuses a file",
            "Add it there, and import the file again.",
        )
    else:
        made.set("train.lr", given.number("learning_rate", 0.0), "learning_rate")
    name = given.text("optimizer", "adamw_torch_fused")
    if not fnmatchcase(name, "*adamw*"):
        made.change(
            f"optimizer {name}: mlxtune has AdamW alone, for which a rate of {name} is rarely right: see train.lr"
        )
    elif "8bit" in name or "4bit" in name or "fp8" in name:
        made.change(f"optimizer {name}: mlxtune's AdamW keeps its state in float32, of an adapter a few megabytes")
    made.set("train.weight_decay", given.number("weight_decay", 0.0))
    made.set("train.clip_norm", given.number("max_grad_norm", CLIP), "max_grad_norm")
    if given.has("neftune_noise_alpha"):
        made.set("train.neftune_alpha", given.number("neftune_noise_alpha", 0.0), "neftune_noise_alpha")
    schedule = given.text("lr_scheduler", "cosine")
    made.set("train.schedule", SCHEDULES.get(schedule, "cosine"), f"lr_scheduler {schedule}")
    if schedule not in SCHEDULES:
        made.change(f"lr_scheduler {schedule}: mlxtune has constant, linear and cosine; cosine takes its place")
    _warmup(given, made)


def _warmup(given: Given, made: Translation) -> None:
    if given.has("warmup_steps"):
        made.set("train.warmup_steps", given.whole("warmup_steps", 0), "warmup_steps")
        if given.value("warmup_ratio") is not None:
            made.leave_out("warmup_ratio", "Axolotl takes warmup_steps before it")
        return
    share = given.number("warmup_ratio", 0.03)
    what = f"warmup_ratio {share:g}" if given.has("warmup_ratio") else "no warmup: Axolotl takes 3% of the steps"
    steps = given.whole("max_steps", 0)
    if steps > 0 or share == 0:
        made.set("train.warmup_steps", int(share * steps), what)
    else:
        made.change(f"{what}: how many steps that is the data decide; see train --dry-run, then set train.warmup_steps")


def _between(given: Given, made: Translation) -> None:
    """Evaluations, checkpoints and loggers."""
    for verb, key in (("eval", "train.eval_every"), ("save", "train.save_every")):
        _every(given, made, verb, key)
    made.set("train.keep_last", given.whole("save_total_limit", 4) or 4, "save_total_limit")
    best = given.truth("load_best_model_at_end")
    made.set("train.keep", "best" if best else "last", f"load_best_model_at_end {str(best).lower()}")
    if given.has("early_stopping_patience"):
        made.set("train.patience", given.whole("early_stopping_patience", 0), "early_stopping_patience")
    loggers = [name for name in ("tensorboard", "wandb", "trackio") if given.truth(f"use_{name}")]
    if given.text("wandb_project") and "wandb" not in loggers:
        loggers.append("wandb")
    if loggers:
        made.set("train.loggers", loggers)
    for name in ("mlflow", "comet"):
        if given.truth(f"use_{name}"):
            made.leave_out(f"use_{name}", "train.loggers has tensorboard, wandb and trackio")


def _every(given: Given, made: Translation, verb: str, key: str) -> None:
    """{verb}_steps, {verb}s_per_epoch and {verb}_strategy. verb: eval or save."""
    older = given.text("evaluation_strategy") if verb == "eval" else ""  # as it was called once
    strategy = given.text(f"{verb}_strategy") or older
    steps = given.number(f"{verb}_steps", 0.0)
    per_epoch = given.number(f"{verb}s_per_epoch", 0.0)
    total = given.whole("max_steps", 0)
    if per_epoch:
        steps = 1.0 / (per_epoch * given.number("num_epochs", 1.0, above=0))
    if strategy == "no":
        made.set(key, 0, f"{verb}_strategy no")
    elif steps >= 1:
        made.set(key, int(steps), f"{verb}_steps")
    elif steps > 0 and total > 0:
        named = f"{verb}s_per_epoch" if per_epoch else f"{verb}_steps"
        made.set(key, max(1, int(steps * total)), f"{named}: every {steps:.3g} of {total} steps")
    elif per_epoch:
        made.change(
            f"{verb}s_per_epoch {per_epoch:g}: how many steps an epoch has the data decide; see train --dry-run, then "
            f"set {key}"
        )
    else:
        share = f"{verb}_steps {steps:g} of the run" if steps else f"no {verb}_steps: Axolotl does it after each epoch"
        made.change(f"{share}; here it is {key}, in steps")

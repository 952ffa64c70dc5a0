"""The sections of a run's configuration: every default, unit and meaning, stated once."""

from __future__ import annotations

import os
from datetime import date as day
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        # Python, and so pydantic, counts True as 1; nobody who writes `lr: true` means a rate of 1.
        allowed = cls.model_fields[str(info.field_name)].annotation
        kinds = {allowed, *get_args(allowed)}
        values = value.values() if isinstance(value, dict) else [value]
        if (int in kinds or float in kinds) and any(isinstance(one, bool) for one in values):
            raise ValueError("should not be true or false")
        return value


class ModelSection(Section):
    path: str = Field("", description="MLX folder, 16-bit Hugging Face folder, or hub id (owner/name)")


class SourceSection(Section):
    path: str = Field(min_length=1, description="folder, file, or hub dataset id")
    weight: float | None = Field(
        None, gt=0, description="share of a batch, relative to the others' (1); none set: every row once per epoch"
    )
    cap: int | None = Field(None, ge=1, description="at most this many rows, chosen by the seed")
    columns: dict[str, str] = Field(default_factory=dict, description="column names of this source -> names meant")


ACCURACY = "accuracy"  # train.keep_by: how many held-out pairs are told apart

# A key of the data section -> the earlier key that excludes it, and what to say then.
EXCLUDED = {
    "sources": ("path", "set path or sources, not both"),
    "cap": ("sources", "has no effect with sources: each of them has a cap of its own"),
}


class DataSection(Section):
    path: str = Field("", description="folder with train.jsonl, one data file, or hub dataset id")
    sources: list[SourceSection] | None = Field(
        None, min_length=1, description="a mixture (instead of path): a list of path, weight, cap, columns"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="column names of the data -> names meant, such as {question: prompt}"
    )
    cap: int | None = Field(None, ge=1, description="at most this many rows of path, chosen by the seed")
    hub: Literal["download", "stream"] = Field(
        "download", description="a hub dataset as a whole, or row by row up to cap"
    )
    max_tokens: int = Field(
        2048,
        ge=8,
        description="longest example in tokens; longer ones keep their start, but answers of preferences are never cut",
    )
    valid_fraction: float = Field(0.1, gt=0, lt=1, description="share of rows held out when there is no valid file")
    dedup: Literal["none", "exact", "near"] = Field(
        "none", description="training rows left out: none, equal ones, or those that share most of their words too"
    )
    order: str = Field(
        "shuffled", description="shuffled; length: short rows first; or the column of numbers to go up by"
    )
    train_on: Literal["all", "last"] = Field("all", description="supervise every assistant turn, or only the last")
    expand_turns: Literal["auto", "all", "none"] = Field(
        "auto",
        description="auto: turns share an example where each stands in it as it is asked for; "
        "all: every turn has its own; none: a row is rendered once, and earlier turns may stand behind other prompts",
    )
    on_damage: Literal["error", "drop", "keep"] = Field(
        "error", description="rows of which the template drops something: stop, leave them out, or train on the rest"
    )
    template: str = Field("", description="chatml, alpaca, or a file (default: the tokenizer's own chat template)")
    group_by_prefix: bool = Field(
        True,
        description="true: examples that begin alike (turns of a conversation, questions on a document) meet, so that "
        "it is computed once; false: only lengths decide what meets",
    )
    template_kwargs: dict[str, Any] = Field(default_factory=dict, description="extra variables of the chat template")
    date: str = Field(
        "", pattern=r"^(\d{4}-\d\d-\d\d)?$", description="the day for templates that print it (default: today's)"
    )
    cache: str = Field("auto", description="folder for tokenized rows; auto: the user's cache; off: none is kept")

    @field_validator("path", mode="before")
    @classmethod
    def _unset(cls, value: Any) -> Any:
        return "" if value is None else value

    @field_validator("sources", "cap")
    @classmethod
    def _either(cls, value: Any, info: ValidationInfo) -> Any:
        other, reason = EXCLUDED[str(info.field_name)]
        if value is not None and info.data.get(other):
            raise ValueError(reason)
        return value

    @field_validator("date")
    @classmethod
    def _a_day(cls, value: str) -> str:
        return value and day.fromisoformat(value).isoformat()

    def mixture(self) -> list[SourceSection]:
        """The sources, with the columns that all of them share; `path` alone is one of them."""
        alone = SourceSection.model_construct(path=self.path, weight=None, cap=self.cap, columns={})
        own = self.sources or [alone]
        return [source.model_copy(update={"columns": {**self.columns, **source.columns}}) for source in own]


class LoraSection(Section):
    rank: int = Field(16, ge=1, description="rank r of the update B A")
    alpha: float = Field(32.0, gt=0, description="scale of the update = alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the adapter's inputs zeroed in training")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="every linear layer in the blocks, or names such as [q_proj, v_proj]"
    )
    ranks: dict[str, int] = Field(default_factory=dict, description="other ranks for some targets: {down_proj: 32}")
    layers: Literal["all"] | int = Field("all", description="all blocks, or only the last n")
    variant: Literal["lora", "rslora", "dora"] = Field(
        "lora", description="rslora: scale = alpha / sqrt(rank); dora: trains the length of W's rows as well"
    )
    b_rate: float = Field(
        1.0, gt=0, description="LoRA+: learning rate of the factors B over train.lr, which is that of all the rest"
    )
    train_also: list[str] = Field(
        default_factory=list,
        description="layers trained in full: norms, embeddings, head, or module paths such as layers.11",
    )
    start_from: str = Field(
        "", description="adapter folder to go on from; it decides all but lora.dropout and lora.b_rate"
    )

    @field_validator("layers", "targets")
    @classmethod
    def _something(cls, value: Any) -> Any:
        if value == [] or (isinstance(value, int) and value < 1):
            raise ValueError("nothing would be trained")
        return value

    @field_validator("ranks")
    @classmethod
    def _whole(cls, value: dict[str, int]) -> dict[str, int]:
        if any(rank < 1 for rank in value.values()):
            raise ValueError("a rank is at least 1")
        return value


class TrainSection(Section):
    steps: int | None = Field(None, ge=1, description="optimizer steps (instead of epochs)")
    epochs: float | None = Field(None, gt=0, description="passes over the data (default 1 when steps is not set)")
    batch_rows: int | None = Field(
        None, ge=1, description="rows per batch, whatever each gives of examples (default 4 unless batch_tokens)"
    )
    batch_tokens: int | None = Field(
        None,
        ge=16,
        description="at most so many padded tokens per batch (one row at least) and micro-batch, those that rows share "
        "counted once; instead of batch_rows",
    )
    accumulate: int = Field(1, ge=1, description="batches of rows per optimizer step")
    lr: float = Field(2e-4, gt=0, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="after warmup: flat, or down to 0")
    warmup_steps: int = Field(10, ge=0, description="optimizer steps of linear warmup")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of AdamW")
    neftune_alpha: float = Field(
        0.0, ge=0, description="NEFTune: embeddings get uniform noise of up to alpha / sqrt(tokens x width); 0: none"
    )
    clip_norm: float = Field(1.0, ge=0, description="global gradient norm is clipped to this; 0: never")
    seed: int = Field(0, ge=0, lt=2**31, description="decides every random draw")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="activations; auto: float32 on the CPU and for float16 models, else the model's own type"
    )
    checkpoint_layers: Literal["none", "all", "pieces", "nested"] | int = Field(
        "none",
        description="blocks whose activations are computed again instead of kept: none, all, or every n-th; for long "
        "rows all in pieces of up to 512 tokens, or nested: in pieces, and of several blocks one input is kept",
    )
    memory_limit: Literal["auto", "off"] | int = Field(
        "auto", description="bytes that the predicted peak must fit; auto: 80% of the device's working set; off: any"
    )
    trunk_cache: Literal["auto", "off"] | int = Field(
        "auto",
        description="bytes, in memory and then on the disk, for what blocks below the lowest trained one give for each "
        "row, so that later epochs leave them out; auto: half of the memory that is left, a quarter of the free disk; "
        "off: they are computed in each epoch",
    )
    eval_every: int = Field(50, ge=0, description="optimizer steps between evaluations; 0: only at the end")
    save_every: int = Field(100, ge=0, description="optimizer steps between checkpoints; 0: none by count")
    save_minutes: float = Field(10.0, ge=0, description="minutes between checkpoints at most; 0: none by time")
    keep: Literal["best", "last"] = Field("best", description="which adapter RUN/adapters.safetensors holds at the end")
    keep_last: int = Field(2, ge=1, description="how many checkpoints stay")
    patience: int = Field(
        0, ge=0, description="evaluations in a row that are not better (train.keep_by) and end the run; 0: none do"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="a loss or gradient that is no number: stop, or leave the step out (at most 10 of a run)"
    )
    on_oom: Literal["stop", "smaller"] = Field(
        "stop", description="out of memory in a step: save and stop, or compute it, and those to come, in smaller parts"
    )
    sample_prompts: list[str] | str = Field(
        default_factory=list,
        description="answered greedily at each evaluation and kept in events.jsonl: prompts, or the file of a suite, "
        "whose checks are then asked too",
    )
    keep_by: str = Field(
        "loss",
        description="what the best adapter is best in: loss, a check of the suite that sample_prompts names, or with "
        "preference.loss accuracy (of equals the one with the lower loss)",
    )
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="where the numbers go as well: tensorboard, wandb, trackio"
    )
    report: Literal["end", "evaluations", "off"] = Field(
        "end",
        description="when RUN/report.html, the page of the run, is written: at the end, however the run ends; after "
        "evaluations too, for 5% of the time at most; or never",
    )
    keep_awake: Literal["auto", "off"] = Field("auto", description="auto: a Mac does not go to sleep while training")
    rank_minutes: float = Field(
        10.0,
        gt=0,
        description="minutes that one of several processes waits for the others before it ends the run; "
        "more where steps are long (20 times its own work, 3 times the longest wait so far)",
    )

    @field_validator("checkpoint_layers", "memory_limit", "trunk_cache")
    @classmethod
    def _some(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, int) and value < 1:
            words = {
                "checkpoint_layers": "none, all, pieces, nested, or n for every n-th block",
                "memory_limit": "auto, off, or bytes",
                "trunk_cache": "auto, off, or bytes",
            }
            raise ValueError(f"use {words[str(info.field_name)]}")
        return value

    @field_validator("keep_by")
    @classmethod
    def _asked(cls, value: str, info: ValidationInfo) -> str:
        if value not in ("loss", ACCURACY) and not isinstance(info.data.get("sample_prompts", ""), str):
            raise ValueError("use loss, or name a suite in sample_prompts and one of its checks here")
        return value

    @field_validator("epochs", "batch_tokens")
    @classmethod
    def _one_of_two(cls, value: Any, info: ValidationInfo) -> Any:
        other = {"epochs": "steps", "batch_tokens": "batch_rows"}[str(info.field_name)]
        if value is not None and info.data.get(other) is not None:
            raise ValueError(f"set {other} or {info.field_name}, not both")
        return value


class FastSection(Section):
    head: Literal["auto", "off"] = Field(
        "auto", description="auto: the head only sees supervised tokens; off: all of them"
    )

    prefix: Literal["auto", "off"] = Field(
        "auto", description="auto: what rows of a micro-batch begin with alike is computed once; off: in every row"
    )

    attention: Literal["auto", "off"] = Field(
        "auto", description="auto: of long rows the scores of attention are computed again, not kept; off: MLX's own"
    )

    gated_delta: Literal["auto", "off"] = Field(
        "auto", description="auto: gated delta layers (Qwen3.5, Kimi) go in chunks; off: token by token, as in mlx-lm"
    )

    activations: Literal["auto", "off"] = Field(
        "auto", description="auto: gated activations are computed again in the backward pass; off: kept"
    )

    last_block: Literal["auto", "off"] = Field(
        "auto", description="auto: behind its attention the last block computes supervised tokens only; off: all"
    )

    kernels: Literal["auto", "off"] = Field(
        "auto",
        description="auto: on a GPU MLX's kernels for cross-entropy and gated delta layers; off: plain operations",
    )

    thin: Literal["on", "off"] = Field(
        "off", description="on: query, key and value, gate and up have one product for the A of their adapters"
    )


class ExportSection(Section):
    to: Literal["peft", "hf", "gguf", "gguf-lora"] = Field(description="as export --to")
    out: str = Field(min_length=1, description="where it is written, as export --out")
    type: str = Field("", description="gguf: how weights are stored, as export --type (default: keep)")

    @field_validator("type")
    @classmethod
    def _of_gguf(cls, value: str, info: ValidationInfo) -> str:
        if value and info.data.get("to", "gguf") != "gguf":
            raise ValueError(f"type has no effect with to: {info.data['to']}")
        return value


class ProjectSection(Section):
    """What commands do in the folder of mlxtune.yaml, beside the configuration of its run. No setting of a run."""

    out: str = Field("run", min_length=1, description="the run's folder: train makes it, the other commands use it")
    suite: str = Field("", description="prompts with checks, which eval asks")
    export: list[ExportSection] = Field(
        default_factory=list, description="what export makes where --to is not given: a list of to, out, type"
    )

    @field_validator("export")
    @classmethod
    def _each_in_its_place(cls, value: list[ExportSection]) -> list[ExportSection]:
        places = [os.path.normpath(one.out) for one in value]
        for number, place in enumerate(places, 1):
            first = places.index(place) + 1
            if first != number:
                raise ValueError(f"export {number} has the same out as export {first}: {value[number - 1].out}")
        return value

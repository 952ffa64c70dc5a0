"""Tokens that a model did not have: chosen with the template, given rows in the embedding and the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlxtune_convert.adapters import OWN_FILE
from mlxtune_convert.hf.model_folder import resize, vocabulary
from mlxtune_convert.tensors import read_header

from mlxtune.adapter.layers import EMBEDDING, LINEAR, dense_copy, own_parameters
from mlxtune.adapter.plan import AdapterPlan, heads, outside_blocks
from mlxtune.config.resolve import Config
from mlxtune.data.template.choice import missing, use
from mlxtune.data.template.tokenizer_changes import Changes, add
from mlxtune.machine import backend
from mlxtune.model.load import Loaded, model_dtype, open_model


def matrices(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Paths of the embedding and, where it is not tied to it, the head: the layers with a row for each token."""
    modules, known = dict(model.named_modules()), vocabulary(config)
    return [path for path in outside_blocks(model, EMBEDDING + LINEAR) if len(modules[path].weight) == known]


def set_run_tokenizer(tokenizer: Any, folder: Path, config: Config) -> Changes:
    """Give the tokenizer the template of a run; return what changed. folder: of the model.

    Tokens are added only where every row of embedding and head trains; else UserError, as `template_choice.use` raises
    it.
    """
    known, start = tokenizer.get_vocab(), config.lora.start_from
    changes = Changes.read(Path(start) if start else None)
    changes.apply(tokenizer, folder)
    choice, hint = config.data.template, ""
    if choice:
        lacking = missing(tokenizer, choice)
        if lacking and start:
            hint = "The adapter of lora.start_from was trained without them: begin a new one."
        elif lacking:
            backend.prepare()
            model, settings = open_model(folder)
            rows = matrices(model, settings)
            if rows and set(rows) <= set(AdapterPlan.of(model, config.lora).trained):
                add(tokenizer, lacking, folder)
            head = ", head" if heads(model) else ""
            hint = f"Train them: lora.train_also=[embeddings{head}]; data.template=alpaca needs no new tokens."
        use(tokenizer, folder, choice, hint)
    elif changes == Changes():
        return changes
    tokens = {t: index for index, t in sorted((i, t) for t, i in tokenizer.get_vocab().items() if t not in known)}
    return Changes(tokenizer.chat_template or "", tokenizer.eos_token or "", tokens)


def add_rows_for_new_tokens(loaded: Loaded, config: Config) -> Changes:
    """The same for a model to be trained, whose matrices get the rows; return what the run must keep."""
    changes = set_run_tokenizer(loaded.tokenizer, loaded.path, config)
    if config.lora.start_from:
        add_rows_of_adapter(loaded.model, Path(config.lora.start_from), loaded.config)
    elif changes.tokens:
        ids = list(changes.tokens.values())
        append_rows(loaded.model, loaded.config, max(vocabulary(loaded.config) or 0, max(ids) + 1), ids)
    return changes


def add_rows_of_adapter(model: nn.Module, adapter: Path, config: dict[str, Any]) -> None:
    """Give a base, and its config.json, the rows for the tokens that an adapter was trained with."""
    file = adapter / OWN_FILE
    saved = read_header(file) if Changes.read(adapter).tokens and file.is_file() else {}
    rows = max((saved[f"{p}.weight"]["shape"][0] for p in matrices(model, config) if f"{p}.weight" in saved), default=0)
    if rows > (vocabulary(config) or 0):
        append_rows(model, config, rows)


def append_rows(model: nn.Module, config: dict[str, Any], rows: int, fresh: Sequence[int] = ()) -> None:
    """Give embedding and head so many rows; the new ones, and those in `fresh`, are the mean of the rows before them.

    At the mean a new token's logit is an average of the others', which bounds how far it moves what the model says;
    rows near zero can be the most likely of all (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language
    Models", nlp.stanford.edu/~johnhew/vocab-expansion.html). Quantized layers become dense.
    """
    modules, dtype = dict(model.named_modules()), model_dtype(model)
    for path in matrices(model, config):
        layer = dense_copy(modules[path])
        for name, value in own_parameters(layer).items():
            value = value.astype(mx.float32)
            mean = value[: min([len(value), *fresh])].mean(axis=0, keepdims=True)
            value = mx.concatenate([value, mx.repeat(mean, rows - len(value), axis=0)])
            if fresh:
                value[mx.array(list(fresh))] = mean
            layer[name] = value.astype(dtype)
        model.update_modules(tree_unflatten([(path, layer)]))
    resize(config, rows)

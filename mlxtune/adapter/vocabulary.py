"""Tokens that a model did not have: chosen with the template, given rows in the embedding and the head.

Example: a base model knows 257 tokens, `data.template: chatml` needs <|im_start|> and <|im_end|>, and
`lora.train_also: [embeddings, head]` trains every row. The tokenizer then makes 257 and 258, and both matrices get the
rows 257 and 258, at the mean of the others.

Who does what, when:

    a run reads its data    run_tokenizer             puts the tokens into the tokenizer, or refuses
    a run loads its model   add_rows_for_new_tokens   decides on the rows; a run that starts from an adapter gets its
    an adapter is loaded    add_rows_of_adapter       as many rows as the adapter's matrices have
    both of these           append_rows               the rows themselves
"""

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
from mlxtune.data.template.choice import missing, set_template
from mlxtune.data.template.tokenizer import load_tokenizer
from mlxtune.data.template.tokenizer_changes import Changes, add
from mlxtune.machine import backend
from mlxtune.model.load import Loaded, model_dtype, open_model


def matrices(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Paths of the embedding and, where it is not tied to it, the head: the layers with a row for each token."""
    modules, known = dict(model.named_modules()), vocabulary(config)
    return [path for path in outside_blocks(model, EMBEDDING + LINEAR) if len(modules[path].weight) == known]


def run_tokenizer(folder: Path, config: Config) -> tuple[Any, Changes]:
    """(The tokenizer that a run uses from here on, what it changes in that of the model folder and must keep).

    It is set up here, once: with the template, end token and new tokens of lora.start_from, and then with those of
    data.template. Tokens are added only where every row of embedding and head trains; else UserError, as
    `set_template` raises it.
    """
    tokenizer = load_tokenizer(folder)
    known, start = tokenizer.get_vocab(), config.lora.start_from
    of_start = Changes.read(Path(start) if start else None)
    of_start.apply(tokenizer, folder)
    template = config.data.template
    if not template and of_start == Changes():
        return tokenizer, of_start
    if template:
        hint = _add_missing(tokenizer, folder, config)
        set_template(tokenizer, folder, template, hint)
    new = sorted((index, token) for token, index in tokenizer.get_vocab().items() if token not in known)
    tokens = {token: index for index, token in new}
    return tokenizer, Changes(tokenizer.chat_template or "", tokenizer.eos_token or "", tokens)


def _add_missing(tokenizer: Any, folder: Path, config: Config) -> str:
    """Add the tokens that the template needs, where their rows would train; return what to do where they would not."""
    lacking = missing(tokenizer, config.data.template)
    if not lacking:
        return ""
    if config.lora.start_from:
        return "The adapter of lora.start_from was trained without them: begin a new one."
    backend.prepare()
    model, settings = open_model(folder)
    rows = matrices(model, settings)
    if rows and set(rows) <= set(AdapterPlan.of(model, config.lora).trained):
        add(tokenizer, lacking, folder)
    head = ", head" if heads(model) else ""
    return f"Train them: lora.train_also=[embeddings{head}]; data.template=alpaca needs no new tokens."


def add_rows_for_new_tokens(loaded: Loaded, config: Config, changes: Changes) -> None:
    """Give a model that is to be trained rows for the tokens of its run. changes: as `run_tokenizer` tells them."""
    if config.lora.start_from:
        add_rows_of_adapter(loaded.model, Path(config.lora.start_from), loaded.config)
    elif changes.tokens:
        ids = list(changes.tokens.values())
        append_rows(loaded.model, loaded.config, max(vocabulary(loaded.config) or 0, max(ids) + 1), ids)


def add_rows_of_adapter(model: nn.Module, adapter: Path, config: dict[str, Any]) -> None:
    """Give a base, and its config.json, the rows for the tokens that an adapter was trained with."""
    file = adapter / OWN_FILE
    if not Changes.read(adapter).tokens or not file.is_file():
        return
    saved, rows = read_header(file), 0
    for path in matrices(model, config):
        if f"{path}.weight" in saved:
            rows = max(rows, saved[f"{path}.weight"]["shape"][0])
    if rows > (vocabulary(config) or 0):
        append_rows(model, config, rows)


def append_rows(model: nn.Module, config: dict[str, Any], rows: int, fresh: Sequence[int] = ()) -> None:
    """Give embedding and head so many rows; the new ones, and those in `fresh`, are the mean of the rows before them.

    fresh: ids of tokens; a model may have rows for them already, as padding. Quantized layers become dense.

    At the mean a new token's logit is an average of the others', which bounds how far it moves what the model says;
    rows near zero can be the most likely of all (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language
    Models", nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    modules, dtype = dict(model.named_modules()), model_dtype(model)
    for path in matrices(model, config):
        layer = dense_copy(modules[path])
        for name, value in own_parameters(layer).items():
            value = value.astype(mx.float32)
            mean = value[: min([len(value), *fresh])].mean(axis=0, keepdims=True)  # [1, width]; [1] of a head's bias
            value = mx.concatenate([value, mx.repeat(mean, rows - len(value), axis=0)])
            if fresh:
                value[mx.array(list(fresh))] = mean
            layer[name] = value.astype(dtype)
        model.update_modules(tree_unflatten([(path, layer)]))
    resize(config, rows)

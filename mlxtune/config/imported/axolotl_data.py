"""The data sets of an Axolotl configuration, and how their rows are printed."""

from __future__ import annotations

from typing import Any

from mlxtune.config.imported.given import Given
from mlxtune.config.imported.translation import Translation

LOCAL_KINDS = ("json", "csv", "parquet", "text", "arrow")  # paths of `datasets` that mean: the files of data_files
# A key of a set that names a column -> what a column of that name means to us.
COLUMNS = {"field_messages": "messages", "field_tools": "tools", "field": "text"}
COLUMNS |= {"field_chosen": "chosen", "field_rejected": "rejected"}
# The same, of a set whose type is a table of its own.
OWN_COLUMNS = {
    "field_system": "system",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_prompt": "prompt",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_completion": "completion",
    "field_label": "label",
}
OPENAI, SHAREGPT = {"role": "role", "content": "content"}, {"role": "from", "content": "value"}
ASSISTANT = {"assistant", "gpt", "model"}  # names of roles that are trained on anyway
KNOWN_ROLES = {"user", "human", "assistant", "gpt", "system", "tool"}
# Of a set: what has no counterpart, with the reason.
WITHOUT = {
    "train_on_eos": "the end of every learned turn is learned: a model that does not learn it does not stop",
    "train_on_eot": "the end of every learned turn is learned: a model that does not learn it does not stop",
    "message_field_training_detail": "a message is learned as a whole or not at all",
    "drop_system_message": "rows keep their system prompts",
    "split_thinking": "thoughts in <think> are read where the model's template has a place for them",
    "template_thinking_key": "the template says where a thought goes",
    "field_thinking": "a thought is read from reasoning_content",
    "shards": "data.cap takes a part of a set",
    "shards_idx": "data.cap takes a part of a set",
    "preprocess_shards": "rows are read one after the other",
    "revision": "the newest revision is read",
    "trust_remote_code": "no code of a dataset is run",
    "ds_type": "a file's ending says what it is",
    "chat_template": "a run has one template (data.template)",
    "chat_template_jinja": "a run has one template (data.template)",
}


def data(given: Given, made: Translation) -> None:
    """Sources, columns, the template, and what is held out."""
    sets = given.tables("datasets")
    if given.has("pretraining_dataset"):
        sets += given.tables("pretraining_dataset")
        made.change("pretraining_dataset: it is read as any other set is, not streamed without an end")
    sources = [source for one in sets for source in _sources(one, made)]
    if len(sources) == 1:
        made.set("data.path", sources[0]["path"], "datasets")
        if "columns" in sources[0]:
            made.set("data.columns", sources[0]["columns"], "names of columns")
    elif sources:
        made.set("data.sources", sources, "datasets: every row of each once per epoch, as Axolotl joins them")
    else:
        made.change("datasets: none is named; give --data, or data.path")
    _template(given, sets, made)
    _held_out(given, made)
    if given.truth("train_on_inputs"):
        made.change("train_on_inputs: mlxtune learns the assistant's turns alone, and has no key for the other")
    if given.truth("dataset_exact_deduplication"):
        made.set("data.dedup", "exact", "dataset_exact_deduplication")
    most = given.whole("sequence_len", 512)
    made.set("data.max_tokens", most, "sequence_len")
    if given.text("excess_length_strategy", "drop") == "drop":
        made.change("rows longer than sequence_len: Axolotl drops them; mlxtune keeps their start, and says how many")


def _sources(one: Given, made: Translation) -> list[dict[str, Any]]:
    """What a set becomes: one source, or one for each of its files."""
    path, files = one.text("path"), one.texts("data_files")
    if path in LOCAL_KINDS and files:
        paths = files
    elif files:
        paths = [f"{path}/{file}" for file in files]
        made.change(f"datasets: data_files of {path} are read as files of this machine: fetch them first")
    else:
        subset = one.text("name")
        paths = [f"{path}:{subset}" if subset else path]
    if not path:
        raise one.wrong("path", "the name of a dataset, or a file")
    if "://" in path:
        made.change(f"datasets: {path} is in a cloud store; mlxtune reads files of this machine and the hub's datasets")
    if one.text("split", "train") != "train":
        made.leave_out("datasets.split", f"{one.text('split')}: a dataset's own splits train, valid and test are used")
    columns = _columns(one, made)
    _learned(one, made)
    for name, why in WITHOUT.items():
        if one.value(name) not in (None, False, "turn", "tokenizer_default"):
            made.leave_out(f"datasets.{name}", why)
    for name in one.left():
        made.leave_out(f"datasets.{name}", "mlxtune reads rows by their columns")
    return [{"path": place, **({"columns": columns} if columns else {})} for place in paths]


def _columns(one: Given, made: Translation) -> dict[str, str]:
    """The names of columns that differ from those that rows have by themselves: {dialogue: messages}."""
    found = {one.text(key): meant for key, meant in COLUMNS.items() if one.has(key)}
    if isinstance(one.value("type"), dict):
        own = one.table("type")
        assert own is not None
        found |= {own.text(key): meant for key, meant in OWN_COLUMNS.items() if own.has(key)}
        for name in own.left():
            made.leave_out(
                f"datasets.type.{name}", "rows are printed by a chat template: write this one as Jinja (data.template)"
            )
    mapping = one.value("message_property_mappings") or OPENAI
    if one.has("message_field_role") or one.has("message_field_content"):
        mapping = {
            "role": one.text("message_field_role", "role"),
            "content": one.text("message_field_content", "content"),
        }
    kept = {key: mapping.get(key) for key in OPENAI} if isinstance(mapping, dict) else {}
    if kept == SHAREGPT:
        found = {name: "conversations" if meant == "messages" else meant for name, meant in found.items()}
    elif kept != OPENAI:
        made.leave_out(
            "datasets.message_property_mappings", "messages have role and content, or from and value: rename them first"
        )
    if one.value("message_field_training") not in (None, "weight", "train", "training", "trainable"):
        made.leave_out(
            "datasets.message_field_training", "a message that is not to be learned has weight: 0 or train: false"
        )
    # A column of that name is read as what it holds, whoever names it.
    return {name: meant for name, meant in found.items() if name != meant and name != "conversations"}


def _learned(one: Given, made: Translation) -> None:
    """Whose turns are learned, and what roles are called."""
    roles = one.value("roles")
    if isinstance(roles, dict):
        named = {str(name) for names in roles.values() for name in (names if isinstance(names, list) else [names])}
        if unknown := sorted(named - KNOWN_ROLES):
            made.leave_out(
                "datasets.roles", f"{', '.join(unknown)}: rename them in the rows; data check names such rows"
            )
    others = set(one.texts("roles_to_train")) - ASSISTANT
    if others:
        made.change(
            f"roles_to_train: {', '.join(sorted(others))} would be learned too; mlxtune learns the assistant's turns"
        )


def _template(given: Given, sets: list[Given], made: Translation) -> None:
    """chat_template, and the type alpaca, which is a template of its own."""
    options = given.value("chat_template_kwargs")
    kinds = [one.value("type") for one in sets]
    of_alpaca = [kind for kind in kinds if kind in ("alpaca", "alpaca:instruct")]
    chosen, text = given.text("chat_template"), given.text("chat_template_jinja")
    if of_alpaca and len(of_alpaca) == len(kinds):
        made.set(
            "data.template", "alpaca", "datasets of type alpaca: Axolotl prints them so, whatever the model's template"
        )
        if chosen:
            made.leave_out("chat_template", "Axolotl does not use it for rows of type alpaca")
        if options:
            made.leave_out("chat_template_kwargs", "Axolotl does not use it for rows of type alpaca")
        return
    if of_alpaca:
        made.change("datasets of type alpaca are printed by the run's one template, as the other sets are")
    for kind in kinds:
        if isinstance(kind, str) and kind.partition(".")[0] not in (
            "chat_template",
            "alpaca",
            "alpaca:instruct",
            "completion",
        ):
            made.change(
                f"datasets of type {kind}: rows are read by their columns and printed by the model's chat template"
            )
        if isinstance(kind, str) and kind.startswith("input_output"):
            made.change("type input_output: its segments are no rows for mlxtune; write them as messages")
    if chosen in ("chatml", "alpaca"):
        made.set("data.template", chosen, "chat_template")
    elif text and "{" not in text:
        made.set("data.template", text, "chat_template_jinja")
    elif text:
        made.leave_out("chat_template_jinja", "write it into a file, and name that: data.template")
    elif chosen and not chosen.startswith("tokenizer_default"):
        made.change(f"chat_template {chosen}: the model's own template is used; look with mlxtune data show")
    if options:
        made.set("data.template_kwargs", options, "chat_template_kwargs")


def _held_out(given: Given, made: Translation) -> None:
    share = given.number("val_set_size", 0.0)
    if given.tables("test_datasets"):
        made.leave_out("test_datasets", "put train.jsonl and valid.jsonl into one folder, and name it: data.path")
    if 0 < share < 1:
        made.set("data.valid_fraction", share, "val_set_size, chosen by the rows' content")
    elif share >= 1:
        made.change(f"val_set_size {share:g} rows: mlxtune holds a share out, data.valid_fraction")
    else:
        said = "val_set_size 0" if given.has("val_set_size") else "no val_set_size"
        made.change(f"{said}: mlxtune holds data.valid_fraction of the rows out; a valid.jsonl takes their place")

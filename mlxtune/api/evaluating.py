"""`mlxtune.evaluate`: the loss of a model and of what was tuned of it, on held-out rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxtune.api import tuned
from mlxtune.api.arguments import SCORING, in_python
from mlxtune.api.tuned import Note, to_nobody
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from mlxtune.api.tuning import Run
    from mlxtune.config.resolve import Config
    from mlxtune.data.dataset.examples import Examples
    from mlxtune.evaluate.score import Score
    from mlxtune.model.load import Loaded


@dataclass(frozen=True)
class Evaluation:
    """What both sides lose on the same rows. A Score has loss (nats a token), perplexity, accuracy and tokens."""

    split: str  # "valid", "test", "train"; "all": every row of one file
    rows: int  # that were scored
    examples: int  # that they gave
    also: str  # how many examples, in words, where they are not as many as the rows: " (12 examples)"
    base: Score  # of the model without the adapter
    tuned: Score | None  # of the model with it; None: there is no adapter


def evaluate(
    model: Run | str | Path,
    adapter: Run | str | Path | None = None,
    *,
    data: str | Path | None = None,
    split: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> Evaluation:
    """Score a model, and what was tuned of it, on held-out rows, as `mlxtune eval` does.

    model: a run or its folder, with the model that it was trained on; or an MLX folder, a 16-bit Hugging Face folder or
    a hub id. adapter: a run, or any MLX adapter folder. data: a folder, a file, or a dataset of the hub; None: the
    run's own. split: of a folder. settings: keys that are stronger than the run's own ({"data.max_tokens": 512}).

    Raises UserError for what is missing or does not fit.

    >>> scores = mlxtune.evaluate(run)
    >>> scores.tuned.tokens == scores.base.tokens
    True
    """
    with in_python(SCORING):
        of_model, of_adapter = model_and_adapter(model, adapter)
        path = None if data is None else str(data)
        rows = opened(of_model, of_adapter, path, split, _as_typed(settings))
        if rows.examples.kind != "supervised":
            raise UserError("these rows say which answers are preferred", "Call mlxtune.evaluate_preferences.")
        return scores_of(rows)


def evaluate_preferences(
    model: Run | str | Path,
    adapter: Run | str | Path | None = None,
    *,
    data: str | Path | None = None,
    split: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Score a model, and what was tuned of it, on held-out pairs or rated answers, as `mlxtune eval --json` prints it.

    The arguments are those of `evaluate`; with the settings {"preference.loss": "kto"} labels are ratings, as they are
    by themselves where the run learned from them. Raises UserError for what is missing or does not fit, and for rows
    that are answers to learn.
    """
    with in_python(SCORING):
        of_model, of_adapter = model_and_adapter(model, adapter)
        path = None if data is None else str(data)
        rows = opened(of_model, of_adapter, path, split, _as_typed(settings))
    if rows.examples.kind == "supervised":
        raise UserError(
            "these rows are answers to learn, none is preferred",
            'Call mlxtune.evaluate; or, where labels rate them, give settings={"preference.loss": "kto"}.',
        )
    return preferences_of(rows)


def _as_typed(settings: Mapping[str, object] | None) -> tuple[str, ...]:
    """Settings as --set has them: JSON is YAML too."""
    return tuple(f"{key}={json.dumps(value, default=str)}" for key, value in (settings or {}).items())


def model_and_adapter(model: Run | str | Path, adapter: Run | str | Path | None) -> tuple[str, Path | None]:
    """(The model, the adapter's folder) of what a caller names: of a run, or of a run's folder, both are its own."""
    named, run = tuned.model_and_run(model)
    return named, run if adapter is None else tuned.folder_of(adapter)


@dataclass(frozen=True)
class Opened:
    """A model and the rows that it is to be scored on."""

    model: str  # as it was named
    adapter: Path | None  # what was tuned of it
    loaded: Loaded  # both
    config: Config  # by which the rows were read
    examples: Examples  # the rows
    split: str  # "valid", "test", "train"; "all": every row of one file


def opened(
    model: str,
    adapter: Path | None,
    data: str | None,
    split: str | None = None,
    settings: tuple[str, ...] = (),
    note: Note = to_nobody,
    before_model: Callable[[Config], None] = lambda config: None,
) -> Opened:
    """Read a model, and the rows to score it on.

    settings: of --set; note: hears what is said of the rows; before_model: is given the settings before the model is
    read, and may refuse them.
    """
    from mlxtune.data.dataset import holdout

    if adapter is None and data is None and not any(setting.startswith("data.") for setting in settings):
        raise UserError("no rows to score", "Name them: --data PATH; or --adapter RUN, whose held-out rows are taken.")
    before_model(tuned.run_settings(adapter, data, settings))  # a typing error is said before the model is read
    loaded = tuned.load_model(model, adapter)
    examples, config = tuned.held_out(loaded.tokenizer, loaded.path, adapter, data, settings, split, note)
    is_whole = data is not None and holdout.is_whole_file(data, split)
    label = split or ("all" if is_whole else "valid")
    for line in examples.notes(label, config.data.max_tokens):
        note(line)
    return Opened(model, adapter, loaded, config, examples, label)


def scores_of(rows: Opened) -> Evaluation:
    """The loss of both sides on rows of answers to learn."""
    from mlxtune.adapter.attach import switched_off
    from mlxtune.evaluate.score import score_examples

    examples = rows.examples
    with switched_off(rows.loaded.model):
        base = score_examples(rows.loaded, rows.config, examples)
    with_adapter = None if rows.adapter is None else score_examples(rows.loaded, rows.config, examples)
    return Evaluation(rows.split, examples.rows, len(examples), examples.also, base, with_adapter)


def preferences_of(rows: Opened) -> dict[str, Any]:
    """The split, and what `evaluate.preferences.report` says of the base and, with an adapter, of the tuned model. Of a
    run that began with an adapter the base is the model with that one: it was the reference.
    """
    from mlxtune.adapter.attach import switched_off
    from mlxtune.evaluate.observations.preference_remedies import Remedies
    from mlxtune.evaluate.preferences import Answers, log_probabilities, report

    loaded, config, examples = rows.loaded, rows.config, rows.examples
    answers = Answers.of(examples)
    tuned_log_p = log_probabilities(loaded, config, examples, answers)
    if rows.adapter is None:
        return {"split": rows.split, **report(answers, tuned_log_p)}
    start, note = _start_of(config, loaded, rows.adapter)
    if start is None:
        with switched_off(loaded.model):
            base = log_probabilities(loaded, config, examples, answers)
    else:
        with _adapter_of(loaded, start, rows.adapter):
            base = log_probabilities(loaded, config, examples, answers)
    notes = tuple(said for said in (note, _other_rewards(config)) if said)
    section = config.preference
    remedies = Remedies(section.loss, examples.kind == "pairs", section.sft)
    return {"split": rows.split, **report(answers, base, tuned_log_p, _beta_of(config), notes, remedies)}


@contextmanager
def _adapter_of(loaded: Loaded, other: Path, own: Path) -> Iterator[None]:
    """Another adapter in the place of a model's own, of the same kind and layers, as that of a run and the one that it
    began with are: the weights are in memory once.
    """
    from mlxtune_convert.adapters import AdapterConfig

    from mlxtune.adapter.adapter_files import load_tensors

    load_tensors(loaded.model, other / AdapterConfig.read(other).file)
    try:
        yield
    finally:
        load_tensors(loaded.model, own / AdapterConfig.read(own).file)


def _start_of(config: Config, loaded: Loaded, run: Path) -> tuple[Path | None, str]:
    """(The adapter that a run began with; None: it began with none, or that one is gone or another now, what is said of
    it). loaded: the model with the run's own; run: its folder, whose reference keeps the digest of that adapter.
    """
    from mlxtune_convert.adapters import AdapterConfig
    from mlxtune_convert.files import digest

    from mlxtune.adapter.adapter_files import require_fit
    from mlxtune.train.preference.reference_file import began_from

    if not config.lora.start_from:
        return None, ""
    start = Path(config.lora.start_from).expanduser()
    has_reference = config.preference.has_reference
    was = ", which was its reference," if has_reference else ""
    bare = "the base here is the model without any adapter"
    try:
        file = start / AdapterConfig.read(start).file
        require_fit(loaded.model, file)
    except UserError as error:
        said = f"the run began with the adapter {start}{was or ','} and that is gone or another now"
        return None, f"{said} ({error.message}): {bare}"
    used = f"the base here is the model with the adapter that the run began with, {start}"
    if not has_reference:
        return start, f"{used}, as it is now"
    kept = began_from(run)
    if kept is None:
        return start, f"{used}, as it is now: whether it is still what the reference was made of, {run} does not say"
    if digest(file) != kept:
        return None, f"the run began with the adapter {start}{was} and that is another now: {bare}"
    return start, f"{used}: it was the reference"


def _beta_of(config: Config) -> float:
    """By which rewards are multiplied: that of the run, where its objective has rewards of this kind."""
    from mlxtune.evaluate.preferences import BETA

    preference = config.preference
    return preference.resolved_beta if preference.has_reference else BETA


def _other_rewards(config: Config) -> str:
    """That the rewards of an evaluation are not those of the run's own events; "": they are."""
    from mlxtune.evaluate.preferences import BETA

    preference = config.preference
    if not preference.loss or preference.has_reference:
        return ""
    return (
        f"rewards here are {BETA:g} times how much likelier an answer is than under the base; those in the run's "
        f"events and on its page are {preference.loss}'s own: {preference.resolved_beta:g} times the answer's "
        "log-probability per token"
    )

"""A new project, made of what was chosen: rows are divided, and looked at with the model's tokenizer; settings are
searched; and all files are written into a folder that gets its name at the end (`folder.new_project`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from mlxtune_convert.sizes import size

from mlxtune.config import resolve
from mlxtune.config.resolve import Config
from mlxtune.data.chat.renderer import Renderer
from mlxtune.data.dataset.store_writing import untold
from mlxtune.data.rows import formats
from mlxtune.data.survey import sampling, survey
from mlxtune.data.template.tokenizer_changes import preview_tokenizer
from mlxtune.errors import UserError
from mlxtune.machine.backend import Machine
from mlxtune.presets import rules
from mlxtune.presets.search import DoesNotFit, Preset, find
from mlxtune.presets.wanted import GOALS, Goal, Wanted
from mlxtune.project import rows, suite, texts
from mlxtune.project.file import PROJECT_FILE
from mlxtune.project.folder import DATA, IGNORED, README
from mlxtune.project.picked import CONVERTED, Picked
from mlxtune.project.rows import Given

LOOKED_AT = 2_000  # rows whose lengths are measured, and that are looked at for what is wrong
REASONS = 2  # why rows cannot be used, that are told
# Where no tokenizer is here to tell, on the high side: bytes of a token, and tokens that a template adds to a message.
BYTES, BESIDE = 3, 16


class Unfit(UserError):
    """The model needs more memory than there is."""


@dataclass(frozen=True)
class Wish:
    """What is to be made a project of."""

    goal: Goal  # what for
    given: Given  # the rows
    model: Picked  # to be tuned
    machine: Machine  # that will train
    exports: Sequence[str]  # words of `export --to`
    settings: tuple[str, ...] = ()  # `section.key=value`, stronger than what is found


@dataclass(frozen=True)
class Made:
    """A project that was written, for who tells of it."""

    chosen: texts.Chosen  # what is in it
    findings: Sequence[Mapping[str, Any]]  # of the survey, as `data.survey.report` makes them
    notes: Sequence[str] = field(default_factory=list)  # what a person must know beside them


def write(wish: Wish, work: Path) -> Made:
    """Write a project into a temporary folder. Raises UserError for rows, settings or a model that will not do."""
    own = resolve.load(None, wish.settings)
    _refuse_places(own)
    seed = own.train.seed
    counts = rows.write(wish.given, rows.divided(wish.given, seed), work / DATA)
    config = resolve.load(None, wish.settings, {"data.path": str(work / DATA)})
    findings: Sequence[Mapping[str, Any]] = []
    notes = list(wish.given.notes)
    lengths, renderer = [], None
    if wish.model.folder is not None:
        renderer = Renderer(preview_tokenizer(wish.model.folder, config), config.data)
        lengths = _lengths(work / DATA / "train.jsonl", seed, renderer)
    else:
        notes.append(
            "the model is not on this machine as a folder: lengths of rows are guessed, and how its "
            "chat template renders them is not known yet (mlxtune data check, once it is)"
        )
    lengths = lengths or _guessed(work / DATA / "train.jsonl", seed)
    by_hand = _by_hand(wish.settings, own)
    preset = _preset(wish, Wanted(wish.goal, counts["train"], lengths), by_hand)
    prompts, of_suite = suite.write(work, seed) if not wish.given.is_text else (0, [])
    notes += of_suite
    chosen = _chosen(wish, preset, counts, prompts, by_hand)
    (work / PROJECT_FILE).write_text(texts.project_yaml(chosen, date.today().isoformat()), encoding="utf-8")
    # As train will have it; what was set by hand may not go with what was found.
    config = resolve.load(work / PROJECT_FILE, (), {"data.path": str(work / DATA)})
    if renderer is not None:
        seen = survey.survey(config, Renderer(renderer.tokenizer, config.data), untold, most=LOOKED_AT)
        _require_trainable(seen, config, wish.given.source.path)
        findings = seen["findings"]
    (work / README).write_text(texts.readme(chosen), encoding="utf-8")
    (work / IGNORED).write_text(texts.ignored(chosen), encoding="utf-8")
    return Made(chosen, findings, notes)


def _require_trainable(seen: Mapping[str, Any], config: Config, path: str) -> None:
    """Raise UserError for what `train` would stop at: a split of which no row can be used, or rows that the chat
    template damages. seen: a survey; path: of the rows that were given.
    """
    for split, facts in seen["splits"].items():
        outcomes = facts["outcomes"]
        total, damaged = sum(outcomes.values()), outcomes.get(survey.DAMAGED, 0)
        if damaged and config.data.on_damage == "error":
            found = [one for one in seen["findings"] if one["code"] == "damaged" and one["split"] == split]
            said = "; ".join([*found[0]["reasons"]][:REASONS])
            drop = "" if damaged == total else "data.on_damage=drop leaves them out, "
            raise UserError(
                f"{path}: the chat template damages {damaged:,} of {total:,} {split} rows, and train stops at them: "
                f"{said}",
                f"Mend the rows, or add --set: {drop}data.on_damage=keep learns what is left, data.template takes "
                "another template.",
            )
        if total and not any(outcomes.get(name) for name in (survey.USED, survey.SHORTENED)):
            said = ", ".join(f"{name} ({count:,})" for name, count in outcomes.items())
            raise UserError(
                f"{path}: none of {total:,} {split} rows can be used: {said}",
                "Give the rows an answer to learn, or set what is in the way; mlxtune data show --model MODEL --data "
                "DATA prints what the model would see.",
            )


def _refuse_places(own: Config) -> None:
    """Raise UserError for settings that say what the project says itself."""
    if own.model.path or own.data.path or own.data.sources:
        raise UserError("--set names a model or data", "Use --model and --data.")


def _lengths(file: Path, seed: int, renderer: Renderer) -> list[int]:
    """Tokens of the examples of a sample of the rows, uncut; none where no row gives one."""
    chosen = sampling.sample(formats.read(file), LOOKED_AT, seed)
    found = renderer.uncut().stream([row for row in chosen.rows if isinstance(row, formats.Record)])
    return [len(row.example.ids) for row in found if row.example is not None]


def _guessed(file: Path, seed: int) -> list[int]:
    """The same, by the bytes of the rows."""
    chosen = sampling.sample(formats.read(file), LOOKED_AT, seed)
    lengths = []
    for row in chosen.rows:
        if isinstance(row, formats.Record):
            texts = [row.text, *(message["content"] for message in row.messages or [])]
            said = sum(len(str(text or "").encode(errors="replace")) for text in texts)
            lengths.append(said // BYTES + BESIDE * len(texts))
    return lengths


def _by_hand(settings: Sequence[str], own: Config) -> dict[str, Any]:
    """section.key -> value of what --set sets."""
    dumped = own.model_dump(mode="json")
    found = {}
    for setting in settings:
        section, _, name = setting.partition("=")[0].strip().partition(".")
        name = name.partition(".")[0]  # of a table, such as data.template_kwargs.a, all of it
        found[f"{section}.{name}"] = dumped[section][name]
    return found


def _preset(wish: Wish, wanted: Wanted, by_hand: Mapping[str, Any]) -> Preset:
    """The settings to begin with, of which some are set by hand. Raises Unfit where the model does not fit."""
    by_hand = {key: value for key, value in by_hand.items() if value is not None}
    shape = wish.model.shape
    if shape is None:
        advice = rules.advice(wanted, 0, bool(by_hand.get("lora.train_also")), by_hand)
        warning = (
            f"{wish.model.named} is taken for a model of the hub, of which nothing is known here: no memory was "
            "predicted (mlxtune train --dry-run does it)."
        )
        settings = rules.differing({**advice.settings, "data.max_tokens": wanted.covering(0.99)})
        return Preset(settings, None, None, 0, 1.0, advice.why, [*advice.warnings, warning])
    found = find(shape, wish.machine, wanted, wish.model.bits, wish.model.named, by_hand)
    if isinstance(found, DoesNotFit):
        hint = "Leave out --set of them, or name a smaller model" if found.held else "Name a smaller model"
        raise Unfit(f"{wish.model.named} {found}", f"{hint}: --model MODEL.")
    return found


def _chosen(
    wish: Wish, preset: Preset, counts: Mapping[str, int], prompts: int, by_hand: Mapping[str, Any]
) -> texts.Chosen:
    is_converted = wish.model.is_gguf or (preset.bits is not None and wish.model.bits is None)
    settings = dict(preset.settings)
    for one, other in resolve.EITHER:
        if by_hand.get(one) is not None:
            settings.pop(other, None)
        if by_hand.get(other) is not None:
            settings.pop(one, None)
    settings.update(by_hand)
    why = {key: text for key, text in preset.why.items() if key not in by_hand}
    notes = list(preset.warnings)
    if preset.peak_bytes is not None:
        peak, budget = size(preset.peak_bytes), size(preset.budget_bytes)
        notes.insert(0, f"Memory: {peak} predicted at the peak, of {budget} that may be used.")
    return texts.Chosen(
        goal=wish.goal,
        meaning=GOALS[wish.goal],
        model=CONVERTED if is_converted else wish.model.named,
        source=wish.model.named if is_converted else "",
        bits=None if wish.model.is_gguf else preset.bits,
        rows=counts,
        given=wish.given.source.path,
        prompts=prompts,
        exports=wish.exports,
        settings=settings,
        why=why,
        notes=notes,
    )

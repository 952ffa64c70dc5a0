"""Rows against the objective: pairs, rated answers and ordinary rows each need another one, and say so."""

from __future__ import annotations

from mlxtune.config.preference import OF_PAIRS, OF_RATED, PreferenceSection
from mlxtune.data.dataset.examples import Examples
from mlxtune.errors import UserError

IN_WORDS = {
    "pairs": "pairs of a chosen and a rejected answer",
    "rated": "rated answers",
    "supervised": "rows to learn as they are",
}
LEAST_ROWS = 2  # of kto's, in each split: a row's baseline is another row's answer


def require_fitting(section: PreferenceSection, splits: dict[str, Examples]) -> None:
    """Raise UserError for rows that the objective cannot be trained with, or that are of another kind than those held
    out. splits: "train" and "valid".
    """
    for split, examples in splits.items():
        _require_fitting(section, split, examples)
    if section.loss == "kto":
        _require_others(splits)
    if section.loss == "apo" and splits["train"].kind != splits["valid"].kind:
        one, other = (IN_WORDS[splits[split].kind] for split in ("train", "valid"))
        raise UserError(f"the training rows are {one}, the held-out ones {other}", "Both must be of one kind.")


def _require_others(splits: dict[str, Examples]) -> None:
    """Raise UserError for a split in which a row has no other one. Its own answer would be its baseline: the loss would
    be 1/2 whatever is learned.
    """
    for split, words, more in (
        ("train", "training", "Add rows"),
        ("valid", "held-out", "Add rows to the valid file, or where there is none raise data.valid_fraction"),
    ):
        rows = splits[split].rows
        if rows < LEAST_ROWS:
            raise UserError(
                f"kto needs {LEAST_ROWS} {words} rows at least, for it compares each with another one's answer; there "
                f"is {rows}",
                f"{more}, or use preference.loss apo, which compares none.",
            )


def _require_fitting(section: PreferenceSection, split: str, examples: Examples) -> None:
    kind = examples.kind
    where = f"{examples.stores[0].facts.file} ({split})"
    if not section.loss:
        if kind == "pairs":
            raise UserError(
                f"{where} holds {IN_WORDS[kind]}, which need an objective",
                "Train with one: mlxtune train -c dpo (or preference.loss: dpo, ipo, apo, simpo, orpo). To use the "
                "chosen answers alone, convert them: mlxtune data convert.",
            )
        return
    if kind == "supervised":
        recipe = "kto" if section.loss == "kto" else "dpo"
        needs = IN_WORDS["rated"] if section.loss == "kto" else IN_WORDS["pairs"]
        raise UserError(
            f"{where} holds {IN_WORDS[kind]}; preference.loss {section.loss} needs {needs}",
            f"Leave out -c {recipe} and preference.loss, or name a file of preferences.",
        )
    if kind == "pairs" and section.loss not in OF_PAIRS:
        raise UserError(
            f"{where} holds {IN_WORDS[kind]}; preference.loss {section.loss} needs {IN_WORDS['rated']}",
            "Use -c dpo (or preference.loss: ipo, apo, simpo, orpo).",
        )
    if kind == "rated" and section.loss not in OF_RATED:
        raise UserError(
            f"{where} holds {IN_WORDS[kind]}; preference.loss {section.loss} needs {IN_WORDS['pairs']}",
            "Use -c kto (or preference.loss: apo).",
        )
    _refuse_useless_keys(section, kind)


def _refuse_useless_keys(section: PreferenceSection, kind: str) -> None:
    """Raise UserError for keys of apo, which is for rows of both kinds, that have no effect on this one."""
    if section.loss != "apo":
        return
    given = {"sft": section.sft} if kind == "rated" else {}
    if kind == "pairs":
        weights = {"good_weight": section.good_weight, "bad_weight": section.bad_weight}
        given = {key: weight for key, weight in weights.items() if weight != 1}
    for key, value in given.items():
        if value:
            raise UserError(f"preference.{key} has no effect on {IN_WORDS[kind]}", "Leave it out.")

"""What a run on preferences says of itself before it begins."""

from __future__ import annotations

from mlxtune.compute.counted import Epoch
from mlxtune.config.preference import PreferenceSection
from mlxtune.data.dataset.examples import Examples
from mlxtune.data.rows.sides import Side
from mlxtune.data.survey.lint import KINDS
from mlxtune.data.survey.preferences import one_sided

COUNTED = {"pairs": "pairs", "rated": "rated rows", "supervised": "rows"}


def objective_in_words(section: PreferenceSection) -> str:
    """ "dpo, beta 0.1, label_smoothing 0.1, compared with the model at step 0"."""
    parts = [section.loss, f"beta {section.resolved_beta:g}"]
    if section.loss == "simpo":
        parts.append(f"gamma {section.resolved_gamma:g}")
    for key in ("label_smoothing", "sft"):
        if value := getattr(section, key):
            parts.append(f"{key} {value:g}")
    if section.length_normalised:
        parts.append("length_normalised")
    for key in ("good_weight", "bad_weight"):
        if (value := getattr(section, key)) != 1:
            parts.append(f"{key} {value:g}")
    parts.append("compared with the model at step 0" if section.has_reference else "without a reference")
    return ", ".join(parts)


def rows_in_words(train: Examples, valid: Examples) -> tuple[str, str]:
    """("18 training pairs", "6 held out"); of ordinary rows with their examples, where these are more."""
    if train.kind == "supervised":
        return f"{train.rows} training rows{train.also}", f"{valid.rows} held out{valid.also}"
    return f"{train.rows} training {COUNTED[train.kind]}", f"{valid.rows} held out"


def of_thumbs(section: PreferenceSection, train: Examples) -> list[str]:
    """A note where all training rows have the same rating, in the words of `mlxtune data check`."""
    if not section.loss or train.kind != "rated":
        return []
    good = int((train.of_rows("side") == Side.GOOD).sum())
    said = one_sided(good, train.rows - good)
    finding = KINDS["one-sided"]
    return [f"{train.rows} {finding.what}: {said}; {finding.fix}"] if said else []


def without_gradients(section: PreferenceSection, epoch: Epoch, passes: float) -> list[str]:
    """Lines on what an objective computes beside the rows, without gradients. passes: epochs that the run takes."""
    about = "" if epoch.exact else "about "
    lines = []
    if epoch.beside:
        share = f"{epoch.beside / epoch.tokens:.2f} of the rows' tokens"
        lines.append(
            f"and for the baseline: {about}{epoch.beside:,}, {share}, without gradients: each prompt with another "
            "row's answer"
        )
    if section.has_reference:
        all_of_it = epoch.computed + epoch.beside
        most = f"{all_of_it:,}" if passes >= 1 else f"at most {all_of_it:,}"
        lines.append(
            f"computed before the first step: {about}{most} tokens of the training rows, and the held-out rows, "
            "without gradients: the reference"
        )
    return lines

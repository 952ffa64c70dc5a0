"""What a run on preferences says of itself before it begins."""

from __future__ import annotations

from mlxtune.config.preference import PreferenceSection
from mlxtune.data.dataset.examples import Examples

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

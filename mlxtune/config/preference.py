"""The section of preference tuning: which of two answers is better (pairs), or whether one is good (rated rows).

Its keys depend on the objective and on other sections, so that they are judged together (`refuse_without_effect`):

    preference.loss    keys that have an effect beside it
    dpo                beta, label_smoothing, length_normalised, sft
    ipo                beta, sft
    apo                beta, sft (pairs), good_weight and bad_weight (rated rows)
    simpo              beta, gamma, sft
    orpo               beta; the chosen answer's own loss has the weight 1 by definition
    kto                beta, good_weight, bad_weight
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field, field_validator

from mlxtune.config.schema import ACCURACY, Section
from mlxtune.errors import UserError, nearest

if TYPE_CHECKING:
    from mlxtune.config.resolve import Config

Loss = Literal["", "dpo", "ipo", "apo", "simpo", "orpo", "kto"]
OBJECTIVES = tuple(name for name in get_args(Loss) if name)
OF_PAIRS = ("dpo", "ipo", "apo", "simpo", "orpo")  # what rows with a chosen and a rejected answer can be trained with
OF_RATED = ("kto", "apo")  # what rows with one answer and its label can be
WITHOUT_REFERENCE = ("simpo", "orpo")  # these ask only how likely the model itself finds the answers

# Methods that other programs have. Whoever looks for one is told why it is not here, and what comes nearest.
ONLINE = (
    *("grpo", "gspo", "dapo", "dr_grpo", "ppo", "rloo", "reinforce", "reinforce_pp", "remax"),
    *("online_dpo", "xpo", "nash_md", "klpo"),
)
STEPWISE = ("prm", "reward")  # these train a model that judges, not one that answers
OTHERS = {
    "sigmoid": "dpo",
    "robust": "dpo with preference.label_smoothing, which is near it but not the same formula",
    "cdpo": "dpo with preference.label_smoothing",
    "sigmoid_norm": "dpo with preference.length_normalised",
    "rpo": "dpo with preference.sft",
    "apo_zero": "apo",
    "apo_zero_unpaired": "apo",
    "hinge": "ipo",
    "slic": "ipo",
    "cpo": "simpo with preference.sft",
}
# Betas that the papers recommend, where they differ from 0.1. SimPO's is on log-probabilities per token: Meng et al.
# 2024 (arXiv 2405.14734) take 2.0 to 2.5, and a margin of half of it.
BETA = 0.1
BETAS = {"simpo": 2.0}
GAMMA = 1.0
# Key -> the objectives with which it has an effect.
EFFECTIVE: dict[str, tuple[str, ...]] = {
    "gamma": ("simpo",),
    "label_smoothing": ("dpo",),
    "length_normalised": ("dpo",),
    "sft": ("dpo", "ipo", "apo", "simpo"),
    "good_weight": OF_RATED,
    "bad_weight": OF_RATED,
}


class PreferenceSection(Section):
    loss: Loss = Field(
        "",
        description="objective: dpo, ipo, apo, simpo or orpo on pairs, kto or apo on rated answers; none: rows are "
        "learned as they are",
    )
    beta: float | None = Field(
        None,
        gt=0,
        description="how strongly the model is held to what it was at step 0; of orpo the weight of the odds (0.1; "
        "simpo 2.0)",
    )
    gamma: float | None = Field(
        None, ge=0, description="simpo: by how much the chosen answer's reward shall be ahead (1.0)"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo: share of pairs that are taken to be labelled the wrong way round"
    )
    length_normalised: bool = Field(
        False, description="dpo: rewards per token, so that an answer wins nothing by its length alone"
    )
    sft: float = Field(
        0.0, ge=0, description="weight of the chosen answers' own loss, a mean over their tokens (orpo: always 1)"
    )
    good_weight: float = Field(1.0, gt=0, description="rated answers: weight of the loss of good ones")
    bad_weight: float = Field(1.0, gt=0, description="rated answers: weight of the loss of bad ones")

    @field_validator("loss", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if value is None:
            return ""
        if isinstance(value, str) and value and value not in OBJECTIVES:
            raise ValueError(_why_not(value))
        return value

    @property
    def resolved_beta(self) -> float:
        """beta, or what it is where nobody sets it."""
        return BETAS.get(self.loss, BETA) if self.beta is None else self.beta

    @property
    def resolved_gamma(self) -> float:
        """gamma, or what it is where nobody sets it; 0 where it has no effect."""
        if self.loss != "simpo":
            return 0.0
        return GAMMA if self.gamma is None else self.gamma

    @property
    def has_reference(self) -> bool:
        """Whether the objective compares with the model at step 0."""
        return bool(self.loss) and self.loss not in WITHOUT_REFERENCE


def _why_not(name: str) -> str:
    """Why there is no objective of that name, and which comes nearest."""
    spelled = name.lower().replace("-", "_").replace(" ", "_")
    if spelled in ONLINE:
        return (
            f"{name} lets the model answer inside the training loop and scores the answers with reward code; here "
            "rows are trained on that are there. Make pairs of the model's own answers (mlxtune make answers "
            "--best-of 4 --pairs), then use dpo"
        )
    if spelled in STEPWISE:
        return f"{name} trains a model that judges answers; here one is trained that gives them. Use dpo or kto"
    known = ", ".join(OBJECTIVES)
    near = OTHERS.get(spelled) or nearest(spelled, OBJECTIVES)
    return f"{name} is not known; " + (f"nearest is {near}; " if near else "") + f"there are {known}"


def refuse_without_effect(config: Config, lines: Mapping[str, str]) -> None:
    """Raise UserError for a key that could have no effect with the objective, or that would spoil it.

    lines: where each key stands, of those that a file or --set holds.
    """
    preference = config.preference
    for key, field in PreferenceSection.model_fields.items():
        if key == "loss" or getattr(preference, key) == field.default:
            continue
        name = f"preference.{key}"
        where = f"{lines[name]}: " if name in lines else ""
        if not preference.loss:
            raise UserError(
                f"{where}{name} has no effect without preference.loss",
                f"Set preference.loss ({', '.join(OBJECTIVES)}), or leave {name} out.",
            )
        if preference.loss not in EFFECTIVE.get(key, OBJECTIVES):
            own = "orpo's own loss of the chosen answer has the weight 1" if preference.loss == "orpo" else ""
            has = f"It has one with {' and '.join(EFFECTIVE[key])}."
            raise UserError(
                f"{where}{name} has no effect with preference.loss {preference.loss}",
                f"{own}. Leave it out." if own and key == "sft" else f"{has} Leave it out.",
            )
    if config.train.keep_by == ACCURACY and not preference.loss and isinstance(config.train.sample_prompts, list):
        where = f"{lines['train.keep_by']}: " if "train.keep_by" in lines else ""
        raise UserError(
            f"{where}train.keep_by: accuracy is how many pairs are told apart: it needs preference.loss",
            "Use loss, or name a suite in train.sample_prompts and one of its checks here.",
        )
    if preference.loss:
        _refuse_noise(config, lines)


def _refuse_noise(config: Config, lines: Mapping[str, str]) -> None:
    """Raise UserError for what is drawn by chance in a step: the reference knows nothing of it, so that the model would
    differ from itself before it has learned anything.
    """
    for key, value in (("lora.dropout", config.lora.dropout), ("train.neftune_alpha", config.train.neftune_alpha)):
        if value:
            where = f"{lines[key]}: " if key in lines else ""
            raise UserError(
                f"{where}{key} {value:g} does not go with preference.loss {config.preference.loss}: its noise would "
                "count as a difference from the reference",
                f"Leave it out, or set {key}=0.",
            )


def is_kept_by_check(config: Config) -> bool:
    """Whether a check of a suite chooses the adapter (train.keep_by): not the loss, nor the accuracy on pairs."""
    by = config.train.keep_by
    return by != "loss" and not (by == ACCURACY and config.preference.loss)

"""What preference tuning minimizes, as functions of each answer's log-probability.

Of each answer three numbers are known: its log-probability under the model (the sum over its tokens), the same under
the reference (the model at step 0), and how many tokens it has. A pair has two answers, c (chosen) and r (rejected):

    margin   d = (c - c_ref) - (r - r_ref)

    dpo      -(1 - e) log s(b d) - e log s(-b d)        Rafailov et al. 2023, arXiv 2305.18290, equation 7; e:
                                                        `label_smoothing`, as in conservative DPO (Mitchell 2023,
                                                        "A note on DPO with noisy preferences")
    ipo      (d per token - 1 / (2 b)) ** 2             Azar et al. 2023, arXiv 2310.12036, equation 17; each answer's
                                                        ratio over its tokens, as TRL has it from the authors
    apo      1 - s(b (c - c_ref)) + s(b (r - r_ref))    APO-zero: D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7
    simpo    -log s(b (c per token - r per token) - g)  Meng et al. 2024, arXiv 2405.14734, equation 6; no reference
    orpo     -b log s(log odds of c - log odds of r)    Hong et al. 2024, arXiv 2403.07691, equations 4 and 7: of
                                                        probabilities per token, beside the chosen answer's own loss; no
                                                        reference
    kto      1 - s(b (x - z)) of a good answer,         Ethayarajh et al. 2024, arXiv 2402.01306, equation 7; x: its own
             1 - s(b (z - x)) of a bad one              ratio, z: how much likelier answers became, one number a step

s: the logistic function, b: `beta`, g: `gamma`. With `length_normalised` the margin of dpo is one of ratios per token
(TRL's sigmoid_norm; Meng et al., table 3). At step 0 the model is the reference, so every margin is 0, and the losses
are known: dpo log 2, ipo 1 / (4 b ** 2), apo 1 (a rated answer: 1/2), kto 1/2. A proof rests on that.

Smoothing is not what TRL calls `robust` (Chowdhury et al. 2024, arXiv 2403.00409), which takes the wrong labels' part
away instead of allowing for it. As -log s(-x) = x - log s(x), the two are one formula: robust with e is dpo with
-e / (1 - 2 e). A test compares them so.

Legend: P pairs, K rated answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxtune.config.preference import WITHOUT_REFERENCE

Objective = Literal["dpo", "ipo", "apo", "simpo", "orpo", "kto"]
LOG_HALF = -0.6931471805599453


@dataclass(frozen=True)
class Answers:
    """P answers, as numbers."""

    policy: mx.array  # [P] log-probability under the model that trains, float32
    reference: mx.array  # [P] under the model at step 0; zeros where an objective needs none
    tokens: mx.array  # [P] float32: how many of its tokens are supervised

    @property
    def ratio(self) -> mx.array:
        """[P] how much likelier it became: 0 at step 0."""
        return self.policy - self.reference

    @property
    def ratio_per_token(self) -> mx.array:
        """[P] of its tokens, on average."""
        return self.ratio / self.tokens

    @property
    def per_token(self) -> mx.array:
        """[P] the mean log-probability of its tokens."""
        return self.policy / self.tokens


@dataclass(frozen=True)
class Settings:
    """What an objective is given beside the answers."""

    objective: Objective  # which one
    beta: float  # how strongly the model is held to the reference; of orpo the weight of the odds
    gamma: float = 0.0  # simpo: by how much the chosen answer shall be ahead, after beta
    label_smoothing: float = 0.0  # dpo: share of pairs that are taken to be labelled the wrong way round, below 1/2
    length_normalised: bool = False  # dpo: of ratios per token, so that length alone wins nothing
    good_weight: float = 1.0  # rated answers: of the loss of a good one
    bad_weight: float = 1.0  # and of a bad one
    sft: float = 0.0  # pairs: of the chosen answers' own loss, a mean over their tokens

    @property
    def needs_reference(self) -> bool:
        """Whether the loss is compared with the model's at step 0."""
        return self.objective not in WITHOUT_REFERENCE

    @property
    def weight_of_own_loss(self) -> float:
        """Of the chosen answers' own loss: `sft`; of orpo 1 by its definition."""
        return 1.0 if self.objective == "orpo" else self.sft


def pair_losses(settings: Settings, chosen: Answers, rejected: Answers) -> mx.array:
    """[P] the loss of each pair, without the chosen answers' own loss. Raises ValueError for kto."""
    beta = settings.beta
    if settings.objective == "dpo":
        margin = chosen.ratio - rejected.ratio
        if settings.length_normalised:
            margin = chosen.ratio_per_token - rejected.ratio_per_token
        wrong = settings.label_smoothing
        return -(1 - wrong) * nn.log_sigmoid(beta * margin) - wrong * nn.log_sigmoid(-beta * margin)
    if settings.objective == "ipo":
        return (chosen.ratio_per_token - rejected.ratio_per_token - 1 / (2 * beta)) ** 2
    if settings.objective == "apo":
        return 1 - mx.sigmoid(beta * chosen.ratio) + mx.sigmoid(beta * rejected.ratio)
    if settings.objective == "simpo":
        return -nn.log_sigmoid(beta * (chosen.per_token - rejected.per_token) - settings.gamma)
    if settings.objective == "orpo":
        return -beta * nn.log_sigmoid(_log_odds(chosen.per_token) - _log_odds(rejected.per_token))
    raise ValueError(f"{settings.objective} is of rated answers, not of pairs")


def rated_losses(settings: Settings, good: mx.array, answers: Answers, baseline: float) -> mx.array:
    """[K] the loss of each rated answer, times its weight; apo is APO-zero's half for its side.

    good: [K] bool; baseline: z of kto, at least 0. Raises ValueError for objectives of pairs.
    """
    weight = mx.where(good, settings.good_weight, settings.bad_weight)
    ahead = settings.beta * answers.ratio
    if settings.objective == "kto":
        ahead = settings.beta * (answers.ratio - baseline)
    elif settings.objective != "apo":
        raise ValueError(f"{settings.objective} is of pairs, not of rated answers")
    return weight * (1 - mx.sigmoid(mx.where(good, ahead, -ahead)))


def _log_odds(log_p: mx.array) -> mx.array:
    """log(p / (1 - p)) of a log-probability below 0, exact near both ends (Mächler 2012, log1mexp)."""
    # `where` asks for both gradients and multiplies one by 0, which of an infinite one makes no number: so each of
    # the two is given a number that it is fit for.
    near_0 = log_p > LOG_HALF
    of_likely = mx.log(-mx.expm1(mx.where(near_0, log_p, LOG_HALF)))
    of_unlikely = mx.log1p(-mx.exp(mx.where(near_0, LOG_HALF, log_p)))
    return log_p - mx.where(near_0, of_likely, of_unlikely)

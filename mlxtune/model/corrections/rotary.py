"""How transformers rotates queries and keys, from a configuration alone: its formulas, in numpy.

They are those of `transformers.modeling_rope_utils`, in float32 and in its order of operations. A family differs in
one thing: whether an unscaled rotation heeds `partial_rotary_factor`.

Example: a head with D = 4 and rope_theta 10000 has two pairs, with 1 and 0.01 radians per position. At position 3 the
first is turned by 3 radians, the second by 0.03. Linear scaling by 2 makes these 1.5 and 0.015; YaRN leaves the fast
first pair and slows the second down; longrope has a factor for each pair, and other ones for long rows.

Legend: D numbers of a head that are rotated, D/2 pairs of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxtune.model.arrays import scalar
from mlxtune.model.corrections.families import family_of

Settings = dict[str, Any]  # a set of rotary settings, as in config.json's rope_parameters
Frequencies = tuple[np.ndarray, float]  # [D/2] radians per position, and the scale of what is rotated


@dataclass(frozen=True)
class Rotation:
    """How the D rotated numbers of a head turn with their position."""

    # [D/2] float32, radians per position of each pair.
    frequencies: np.ndarray
    # What is rotated is multiplied by it.
    scale: float = 1.0
    # The longest row, in tokens, for which the two hold; None: any.
    limit: int | None = None
    # Length of a longer row, in tokens -> its frequencies and scale.
    beyond: Callable[[int], Frequencies] | None = None

    def of_length(self, tokens: int) -> Frequencies:
        """Frequencies and scale for a row that ends after so many tokens."""
        if self.limit is None or self.beyond is None or tokens <= self.limit:
            return self.frequencies, self.scale
        return self.beyond(tokens)


def rotation(config: Any, layer: int) -> Rotation | None:
    """What a layer of a model rotates by. config: transformers' configuration object, of the text part.

    None where it does not rotate, or by no rule that is known here.
    """
    sets = getattr(config, "rope_parameters", None)
    if not sets or not _rotates(config, layer):
        return None
    settings, of_layer = sets, config
    nested = config.nested_rope_parameter_keys(sets)
    if nested:
        kind = config.layer_types[layer]
        settings = sets.get(kind)
        if not settings:
            return None
        of_layer = config.per_layer_config[kind] if config.is_heterogeneous else config
    rule = RULES.get(_kind(config, settings))
    if rule is None or not settings.get("rope_theta"):
        return None
    width = getattr(of_layer, "head_dim", None) or config.hidden_size // config.num_attention_heads
    part = settings.get("partial_rotary_factor", 1.0)
    if rule is _default and not family_of(config.model_type).rotates_part:
        part = 1.0
    truncated = sets.get("truncate", True)  # not of the layer's set, there too
    return rule({**settings, "truncate": truncated}, config, width if rule is _proportional else int(width * part))


def _kind(config: Any, settings: Settings) -> str:
    """The rule of a set of rotary settings: its rope_type, or that of the two families with rules of their own."""
    kind = str(settings.get("rope_type", "default"))
    if config.model_type == "hunyuan_v1_dense" and kind == "dynamic" and settings.get("alpha"):
        return "alpha"
    return "phimoe" if config.model_type == "phimoe" and kind != "default" else kind


def _rotates(config: Any, layer: int) -> bool:
    """Whether a layer rotates at all, by the settings that some families have for it."""
    rotated = family_of(config.model_type).rotated
    if rotated == "no_rope_layers":
        return bool(config.no_rope_layers[layer])  # 1 where a layer rotates, in spite of its name
    if rotated == "windowed" and config.sliding_window:
        return bool(config.layer_types[layer] == "sliding_attention")
    return True


def _powers(base: float, width: int) -> np.ndarray:
    """[D/2] positions per radian, unscaled."""
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return (np.float32(base) ** exponents).astype(np.float32)


def _default(settings: Settings, config: Any, width: int) -> Rotation:
    return Rotation(1 / _powers(settings["rope_theta"], width))


def _linear(settings: Settings, config: Any, width: int) -> Rotation:
    return Rotation(1 / _powers(settings["rope_theta"], width) / np.float32(settings["factor"]))


def _proportional(settings: Settings, config: Any, width: int) -> Rotation:
    """A part of the pairs is turned, at the frequencies that they have in a whole head."""
    angles = int(settings.get("partial_rotary_factor", 1.0) * width // 2)
    frequencies = 1 / _powers(settings["rope_theta"], width)
    frequencies[angles:] = 0
    return Rotation(frequencies / np.float32(settings.get("factor", 1.0)))


def _dynamic(settings: Settings, config: Any, width: int) -> Rotation:
    """A base that grows with what a row has beyond the context."""
    known, factor, base = config.max_position_embeddings, settings["factor"], settings["rope_theta"]

    def of(tokens: int) -> Frequencies:
        grown = base * ((factor * max(tokens, known) / known) - (factor - 1)) ** (width / (width - 2))
        return 1 / _powers(grown, width), 1.0

    return Rotation(of(known)[0], 1.0, known, of)


def _alpha(settings: Settings, config: Any, width: int) -> Rotation:
    return Rotation(1 / _powers(settings["rope_theta"] * settings["alpha"] ** (width / (width - 2)), width))


def _yarn(settings: Settings, config: Any, width: int) -> Rotation:
    """High frequencies stay, low ones are divided by `factor`, those between are mixed."""
    base, known = settings["rope_theta"], settings["original_max_position_embeddings"]
    factor = settings["factor"] or config.max_position_embeddings / known

    def pair_of(rotations: float) -> float:
        """Which pair turns so often within the original context."""
        return (width * math.log(known / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = pair_of(settings.get("beta_fast") or 32), pair_of(settings.get("beta_slow") or 1)
    if settings["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if low == high else 0
    ramp = (np.arange(width // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    mixed = np.clip(ramp, 0, 1)
    positions = _powers(base, width)
    return Rotation(
        (1 / (np.float32(factor) * positions)) * mixed + (1 / positions) * (1 - mixed), _yarn_scale(settings, factor)
    )


def _yarn_scale(settings: Settings, factor: float) -> float:
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])

    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    over, under = settings.get("mscale"), settings.get("mscale_all_dim")
    return of(over) / of(under) if over and under else of(1.0)


def _llama3(settings: Settings, config: Any, width: int) -> Rotation:
    """High frequencies stay, low ones are divided by `factor`, those between are mixed by their wavelengths."""
    known, factor = settings["original_max_position_embeddings"], np.float32(settings["factor"])
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    plain = 1 / _powers(settings["rope_theta"], width)
    lengths = np.float32(2 * math.pi) / plain  # positions for a whole turn
    is_low, is_high = lengths > known / low, lengths < known / high
    divided = np.where(is_low, plain / factor, plain)
    part = (np.float32(known) / lengths - np.float32(low)) / np.float32(high - low)  # 0 at low, 1 at high
    mixed = (1 - part) * divided / factor + part * divided
    return Rotation(np.where(~is_low & ~is_high, mixed, divided).astype(np.float32))


def _longrope(settings: Settings, config: Any, width: int) -> Rotation:
    """Factors for each pair: one list up to the original context, another for longer rows."""
    known = settings["original_max_position_embeddings"]
    factor = settings.get("factor") or config.max_position_embeddings / known
    scale = settings.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(known))
    short, long = (_by_pair(settings, f"{side}_factor", width) for side in ("short", "long"))
    return Rotation(short, float(scale), known, lambda tokens: (long, float(scale)))


def _phimoe(settings: Settings, config: Any, width: int) -> Rotation:
    """The short list for rows of any length; only the scale heeds it."""
    known, short = settings["original_max_position_embeddings"], _by_pair(settings, "short_factor", width)
    near, far = float(settings["short_mscale"]), float(settings["long_mscale"])
    return Rotation(short, near, known, lambda tokens: (short, far))


def _by_pair(settings: Settings, name: str, width: int) -> np.ndarray:
    return 1 / (np.array(settings[name], np.float32) * _powers(settings["rope_theta"], width))


RULES: dict[str, Callable[[Settings, Any, int], Rotation]] = {
    "default": _default,
    "linear": _linear,
    "proportional": _proportional,
    "dynamic": _dynamic,
    "alpha": _alpha,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "phimoe": _phimoe,
}


class Rotary(nn.Module):
    """A `Rotation` in place of a family's own module. interleaved: pairs are neighbours (2i, 2i + 1), else halves of
    the rotated part (i, i + D/2).
    """

    def __init__(self, rotation: Rotation, interleaved: bool) -> None:
        super().__init__()
        self.rotation = rotation
        self.dims = 2 * len(rotation.frequencies)
        self.traditional = interleaved
        self._periods = _periods(rotation.frequencies)

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """x: [B, heads, T, width]; offset: position of the first token, or [B] of them."""
        periods, scale = self._periods, self.rotation.scale
        if self.rotation.limit is not None:
            first = offset if isinstance(offset, int) else int(scalar(mx.max(mx.array(offset))))
            if first + x.shape[-2] > self.rotation.limit:
                frequencies, scale = self.rotation.of_length(first + x.shape[-2])
                periods = _periods(frequencies)
        if scale != 1.0:
            x = x.at[..., : self.dims].multiply(scale)
        return mx.fast.rope(
            x, self.dims, traditional=self.traditional, base=None, scale=1.0, offset=offset, freqs=periods
        )


def _periods(frequencies: np.ndarray) -> mx.array:
    """What `mx.fast.rope` divides positions by; infinite for what is not turned."""
    with np.errstate(divide="ignore"):
        return mx.array((1 / frequencies).astype(np.float32))

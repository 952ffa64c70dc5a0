"""Correspondences between Hugging Face's tensors and MLX's, read in both directions and applied to tensor streams.

A rule says how one tensor (or a few that belong together) looks on either side; what no rule names is the same on both.
`{n}` is a layer, `{e}` an expert, `{s}` a rest.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlxtune_convert.errors import UserError

Array = Any  # numpy's or MLX's: both have the methods used here


@dataclass(frozen=True)
class Rule:
    """One correspondence. `do`: move (rename, with `axes` transposed and `plus` added), stack (`count` experts {e} into
    one), halves or interleaved (one, transposed by `axes`, into two along `axis`), kv_b (DeepSeek's: `heads`, `nope`).
    """

    hf: str
    mlx: tuple[str, ...]
    do: str = "move"
    axes: tuple[int, ...] = ()
    axis: int = 1
    plus: float = 0.0
    count: int = 1
    heads: int = 0
    nope: int = 0

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], tuple[re.Pattern[str], ...]]:
        return _pattern(self.hf), tuple(_pattern(name) for name in self.mlx)

    def forward(self, arrays: list[Array], xp: Any) -> list[Array]:
        """HF's arrays -> MLX's."""
        if self.do == "stack":
            return [xp.stack(arrays)]
        array = xp.transpose(arrays[0], self.axes) if self.axes else arrays[0]
        if self.do == "halves":
            return list(xp.split(array, 2, axis=self.axis))
        if self.do == "interleaved":
            index: list[Any] = [slice(None)] * array.ndim
            return [array[(*index[: self.axis], slice(start, None, 2))] for start in (0, 1)]
        if self.do == "kv_b":
            array = array.reshape(self.heads, -1, array.shape[-1])
            return [xp.swapaxes(array[:, : self.nope], 1, 2), array[:, self.nope :]]
        return [array + self.plus if self.plus else array]

    def backward(self, arrays: list[Array], xp: Any) -> list[Array]:
        """MLX's arrays -> HF's."""
        if self.do == "stack":
            return list(arrays[0])
        array = arrays[0]
        if self.do == "halves":
            array = xp.concatenate(arrays, axis=self.axis)
        elif self.do == "interleaved":
            array = xp.stack(arrays, axis=self.axis + 1)
            array = array.reshape(*array.shape[: self.axis], -1, *array.shape[self.axis + 2 :])
        elif self.do == "kv_b":
            array = xp.concatenate([xp.swapaxes(arrays[0], 1, 2), arrays[1]], axis=1).reshape(-1, arrays[1].shape[-1])
        elif self.plus:
            array = array - self.plus
        # Every permutation of axes in the tables is its own inverse.
        return [xp.transpose(array, self.axes) if self.axes else array]


def _pattern(name: str) -> re.Pattern[str]:
    text = re.escape(name)
    for mark, expression in (("n", r"(\d+)"), ("e", r"(?P<e>\d+)"), ("s", r"(.+)")):
        text = text.replace(re.escape(f"{{{mark}}}"), expression)
    return re.compile(text)


def _fill(name: str, values: tuple[str, ...], expert: int = 0) -> str:
    rest = iter(values)
    return re.sub(r"\{([nse])\}", lambda mark: str(expert) if mark[1] == "e" else next(rest), name)


@dataclass(frozen=True)
class Layout:
    """A family. rules: first match wins; modules: (MLX path, PEFT target) pairs; dropped: parts of the names of HF
    tensors that MLX does not load, which an export takes from the base; early: rules to apply before mlx-lm reads the
    tensors, whose own renaming does not know what transformers saves."""

    rules: tuple[Rule, ...] = ()
    modules: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()
    early: tuple[Rule, ...] = ()
    needs_dropped: bool = False  # transformers would draw the missing tensors at random
    not_in_peft: tuple[str, ...] = ()  # last names of layers that PEFT refuses (fused kernels go around them)

    def to_mlx(self, tensors: Iterable[tuple[str, Array]], xp: Any, early: bool = False) -> Iterator[tuple[str, Array]]:
        """HF tensors -> MLX's. xp: numpy or mlx.core, whichever the arrays are of; early: only what mlx-lm cannot."""
        yield from _apply(self.early if early else self.rules, tensors, xp, to_hf=False)

    def to_hf(self, tensors: Iterable[tuple[str, Array]], xp: Any) -> Iterator[tuple[str, Array]]:
        """MLX tensors -> HF's. Raises UserError when a tensor has lost its partner."""
        yield from _apply(self.rules, tensors, xp, to_hf=True)

    def is_dropped(self, name: str) -> bool:
        """Whether an HF tensor is one that MLX does not load."""
        return any(part in name for part in self.dropped)

    def peft_target(self, path: str, whole: bool = False) -> str:
        """Where PEFT finds an MLX layer; whole: to replace it, not to add to it.

        Raises UserError when transformers has no such layer, or another one.
        """
        if path.endswith(self.not_in_peft):
            raise UserError(f"PEFT cannot adapt {path} in this family", "`--to hf` exports the merged model.")
        for ours, theirs in self.modules:
            match = _pattern(ours).fullmatch(path)
            if match:
                return _fill(theirs, match.groups())
        for rule in self.rules:
            for pattern in rule.patterns[1]:
                match = pattern.fullmatch(f"{path}.weight")
                if match and (rule.do != "move" or rule.plus or len(rule.axes) > (0 if whole else 2)):
                    raise UserError(f"{path} is another matrix in transformers", "`--to hf` exports the merged model.")
                if match:
                    return _fill(rule.hf, match.groups()).removesuffix(".weight")
        return path

    def peft_targets(self, paths: Iterable[str]) -> dict[str, str]:
        """PEFT's name -> MLX path, for those of `paths` that transformers has."""
        out = {}
        for path in paths:
            with contextlib.suppress(UserError):
                out[self.peft_target(path)] = path
        return out


def _apply(
    rules: Iterable[Rule], tensors: Iterable[tuple[str, Array]], xp: Any, to_hf: bool
) -> Iterator[tuple[str, Array]]:
    waiting: dict[tuple[int, tuple[str, ...]], dict[int, Array]] = {}
    rules = tuple(rules)
    for name, array in tensors:
        for number, rule in enumerate(rules):
            hf, mlx = rule.patterns
            found = next(((i, m) for i, p in enumerate(mlx if to_hf else (hf,)) if (m := p.fullmatch(name))), None)
            if found is None:
                continue
            place, match = found
            expert = match.groupdict().get("e")
            values = tuple(value for i, value in enumerate(match.groups(), 1) if i != match.re.groupindex.get("e"))
            slots = waiting.setdefault((number, values), {})
            slots[int(expert or place)] = array
            if len(slots) == (len(mlx) if to_hf else rule.count):
                del waiting[number, values]
                ordered = [slots[key] for key in sorted(slots)]
                made = rule.backward(ordered, xp) if to_hf else rule.forward(ordered, xp)
                names = [rule.hf] * len(made) if to_hf else list(rule.mlx)
                yield from (
                    (_fill(one, values, e), part) for e, (one, part) in enumerate(zip(names, made, strict=True))
                )
            break
        else:
            yield name, array
    if waiting:
        number, values = next(iter(waiting))
        raise UserError(f"{_fill(rules[number].hf, values)}: some of its parts are missing", "The model is incomplete.")

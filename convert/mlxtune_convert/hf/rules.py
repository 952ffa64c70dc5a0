"""Correspondences between Hugging Face's tensors and MLX's, applied to tensor streams.

mlx-lm itself reads most of Hugging Face's files; a rule says how to get back, and how to get in where mlx-lm cannot.
What no rule names is the same on both sides. `{n}` is a layer, `{e}` an expert, `{s}` a rest.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from mlxtune_convert.errors import UserError

MERGED = "`mlxtune export --to hf` exports the merged model."
Array = Any  # numpy's or MLX's: both have the methods used here


@dataclass(frozen=True)
class Rule:
    """One correspondence: a tensor in HF, its parts in MLX. `do`: move (rename, with `axes` transposed and `plus` added
    in MLX), stack (experts {e} into one), halves or interleaved (transposed by `axes`, then in two along the rows),
    kv_b (DeepSeek's), number (a vector of length 1 in HF). width_axis: on the way in, `axes` are those of tensors that
    are not as wide as the model there.
    """

    hf: str
    mlx: tuple[str, ...]
    do: str = "move"
    axes: tuple[int, ...] = ()
    plus: float = 0.0
    width_axis: int = 0

    @property
    def changes(self) -> bool:
        """Whether a low-rank update of the one is none of the other: more than names and the axes of a matrix."""
        return self.do not in ("move", "stack") or bool(self.plus) or len(self.axes) > 2

    def split(self, array: Array, xp: Any, width: int = 0) -> list[Array]:
        """HF's tensor -> MLX's, for the rules that may come before mlx-lm: move, halves, interleaved. width: the
        model's hidden size, for `width_axis`.
        """
        if self.axes and not (self.width_axis and array.shape[self.width_axis] == width):
            array = xp.transpose(array, self.axes)
        if self.do == "halves":
            return list(xp.split(array, 2, axis=-2))
        return [array[:, 0::2], array[:, 1::2]] if self.do == "interleaved" else [array]

    def join(self, arrays: list[Array], xp: Any) -> list[Array]:
        """MLX's tensors -> HF's."""
        array = arrays[0]
        if self.do == "stack":
            return list(array)
        if self.do == "halves":
            array = xp.concatenate(arrays, axis=-2)
        elif self.do == "interleaved":
            array = xp.stack(arrays, axis=2).reshape(len(array), -1, *array.shape[2:])
        elif self.do == "kv_b":
            array = xp.concatenate([xp.swapaxes(array, 1, 2), arrays[1]], axis=1).reshape(-1, arrays[1].shape[-1])
        elif self.do == "number":
            array = array.reshape(1)
        elif self.plus:
            array = array - self.plus
        # Every permutation of axes in the tables is its own inverse.
        return [xp.transpose(array, self.axes) if self.axes else array]


@cache
def _pattern(name: str) -> re.Pattern[str]:
    escaped = re.escape(name)
    for mark, pattern in ((r"\{n\}", r"(\d+)"), (r"\{e\}", r"(?P<expert>\d+)"), (r"\{s\}", "(.+)")):
        escaped = escaped.replace(mark, pattern)
    return re.compile(escaped)


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
    tower: str = ""  # part of the names of dropped tensors that an export must have: transformers would draw them
    not_in_peft: tuple[str, ...] = ()  # last names of layers that PEFT refuses (fused kernels go around them)

    def for_mlx_lm(self, tensors: Iterable[tuple[str, Array]], xp: Any, width: int = 0) -> Iterator[tuple[str, Array]]:
        """HF tensors as mlx-lm can read them, without those of towers. xp: numpy or mlx.core, whichever the arrays are
        of; width: the model's hidden size.
        """
        experts: dict[str, dict[int, Array]] = {}
        for name, array in tensors:
            if self.tower and self.is_dropped(name):
                continue
            rule = next((rule for rule in self.early if _pattern(rule.hf).fullmatch(name)), None)
            match = _pattern(rule.hf).fullmatch(name) if rule else None
            if rule is None or match is None:
                yield name, array
                continue
            if rule.do == "stack":
                experts.setdefault(_fill(rule.mlx[0], match.groups()), {})[int(match["expert"])] = array
                continue
            parts = zip(rule.mlx, rule.split(array, xp, width), strict=True)
            yield from ((_fill(to, match.groups()), part) for to, part in parts)
        for name, single in experts.items():
            yield name, xp.stack([single[expert] for expert in range(len(single))])

    def to_hf(self, tensors: Iterable[tuple[str, Array]], xp: Any) -> Iterator[tuple[str, Array]]:
        """MLX tensors -> HF's. Raises UserError when a tensor has lost its partner."""
        waiting: dict[tuple[str, tuple[str, ...]], dict[str, Array]] = {}
        for name, array in tensors:
            found = self._rule(name)
            if found is None:
                yield name, array
                continue
            rule, part, values = found
            parts = waiting.setdefault((rule.hf, values), {})
            parts[part] = array
            if len(parts) == len(rule.mlx):
                del waiting[rule.hf, values]
                whole = rule.join([parts[part] for part in rule.mlx], xp)
                yield from ((_fill(rule.hf, values, expert), one) for expert, one in enumerate(whole))
        for hf, values in waiting:
            raise UserError(f"{_fill(hf, values)}: some of its parts are missing", "The model is incomplete.")

    def _rule(self, name: str) -> tuple[Rule, str, tuple[str, ...]] | None:
        """The rule of an MLX tensor, which of its parts that is, and what its marks stand for."""
        for rule in self.rules:
            for part in rule.mlx:
                match = _pattern(part).fullmatch(name)
                if match:
                    return rule, part, match.groups()
        return None

    def is_dropped(self, name: str) -> bool:
        """Whether an HF tensor is one that MLX does not load."""
        return any(part in name for part in self.dropped)

    def peft_target(self, path: str, whole: bool = False) -> str:
        """Where PEFT finds an MLX layer; whole: to replace it, not to add to it.

        Raises UserError when transformers has no such layer, or another one.
        """
        if path.endswith(self.not_in_peft):
            raise UserError(f"PEFT cannot adapt {path} in this family", MERGED)
        for ours, theirs in self.modules:
            match = _pattern(ours).fullmatch(path)
            if match:
                return _fill(theirs, match.groups())
        found = self._rule(f"{path}.weight")
        if found is None:
            return path
        rule, _, values = found
        if rule.do == "stack" or rule.changes or (whole and rule.axes):
            raise UserError(f"{path} is another matrix in transformers", MERGED)
        return _fill(rule.hf, values).removesuffix(".weight")

    def peft_targets(self, paths: Iterable[str]) -> dict[str, str]:
        """PEFT's name -> MLX path, for those of `paths` that transformers has."""
        out = {}
        for path in paths:
            with contextlib.suppress(UserError):
                out[self.peft_target(path)] = path
        return out

    def mlx_path(self, target: str) -> str | None:
        """The inverse of `peft_target` from the tables alone, where the model's own paths are not at hand. None means
        that the family has no such layer.
        """
        module, names = target.partition(":")[0], (target, f"{target}:weight")
        found = []
        for ours, theirs in self.modules:
            match = next(filter(None, map(_pattern(theirs).fullmatch, names)), None)
            found += [_fill(ours, match.groups())] if match else []
        for rule in self.rules:
            match = _pattern(rule.hf).fullmatch(f"{module}.weight") if rule.do == "move" else None
            found += [_fill(rule.mlx[0], match.groups()).removesuffix(".weight")] if match else []
        return next((path for path in (*found, module) if self.peft_targets([path]).keys() & set(names)), None)

    @property
    def alternate(self) -> bool:
        """Whether rows of gate and up alternate in HF's experts."""
        return any(rule.do == "interleaved" for rule in self.rules)

    def file_name(self, path: str) -> str:
        """The module of an MLX layer in HF's files, `{e}` for each of its experts; "" where it is another there."""
        found = self._rule(f"{path}.weight")
        if found is None:
            return path
        rule, _, values = found
        marks = iter(values)
        name = re.sub(r"\{([ns])\}", lambda _: next(marks), rule.hf).removesuffix(".weight")
        return "" if rule.changes else name

    def is_another(self, module: str) -> bool:
        """Whether a module of HF's files has other numbers in MLX."""
        name = f"{module}.weight"
        return any(rule.changes and _pattern(rule.hf).fullmatch(name) for rule in self.rules)

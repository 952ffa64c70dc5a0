"""Correspondences between Hugging Face's tensors and MLX's, applied to tensor streams.

mlx-lm itself reads most of Hugging Face's files; a rule says how to get back, and how to get in where mlx-lm cannot.
What no rule names is the same on both sides.

**Names with marks.** `{n}` stands for the number of a layer, `{e}` for that of an expert, `{s}` for any rest, and what
they stood for on one side is put in on the other:

    hf   model.layers.{n}.mlp.experts.{e}.up_proj.weight    model.layers.3.mlp.experts.0.up_proj.weight, ... experts.7
    mlx  model.layers.{n}.mlp.switch_mlp.up_proj.weight     model.layers.3.mlp.switch_mlp.up_proj.weight, all 8 of them

**What a rule does** (`do`), with f the width of an expert, H of the model, E experts:

    move         one tensor under another name; `axes` transposes it, `plus` is added to it in MLX
    stack        hf [f, H] for each expert           <->  mlx [E, f, H]
    halves       hf [.., 2f, H], gate before up      <->  mlx gate [.., f, H] and up [.., f, H]
    interleaved  hf [E, 2f, H], rows of gate and up alternate  <->  mlx gate [E, f, H] and up [E, f, H] (biases [E, 2f])
    kv_b         DeepSeek's kv_b_proj, hf [heads * (k + v), rank]  <->  mlx [heads, rank, k] and [heads, v, rank]
    number       hf [1]                              <->  mlx a number

With `axes` hf's tensor is transposed before it is taken apart: gate_up_proj [E, H, 2f] with axes (0, 2, 1) is halves.
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
    """One correspondence: a tensor in HF, its parts in MLX."""

    hf: str  # name in HF's files, with marks
    mlx: tuple[str, ...]  # names of its parts in MLX, with marks
    do: str = "move"  # what is done; see the module
    axes: tuple[int, ...] = ()  # how HF's tensor is transposed; its own inverse
    plus: float = 0.0  # added in MLX
    # On the way in: a tensor is transposed only if this axis of it is not as long as the model is wide. 0: always.
    width_axis: int = 0

    @property
    def changes(self) -> bool:
        """Whether a low-rank update of the one is none of the other: more than names and the axes of a matrix."""
        return self.do not in ("move", "stack") or bool(self.plus) or len(self.axes) > 2

    def split(self, array: Array, xp: Any, width: int = 0) -> list[Array]:
        """HF's tensor -> MLX's, for the rules that may come before mlx-lm: move, halves, interleaved. width: the
        model's hidden size, for `width_axis`.
        """
        in_mlx_order = self.width_axis and array.shape[self.width_axis] == width
        if self.axes and not in_mlx_order:
            array = xp.transpose(array, self.axes)
        if self.do == "halves":
            return list(xp.split(array, 2, axis=-2))
        if self.do == "interleaved":
            return [array[:, 0::2], array[:, 1::2]]
        return [array]

    def join(self, arrays: list[Array], xp: Any) -> list[Array]:
        """MLX's tensors, the parts of `mlx` in order -> HF's: one, or one for each expert."""
        array = arrays[0]
        if self.do == "stack":
            return list(array)
        if self.do == "halves":
            array = xp.concatenate(arrays, axis=-2)
        elif self.do == "interleaved":
            pairs = xp.stack(arrays, axis=2)  # [E, f, 2, H]
            array = pairs.reshape(len(array), -1, *array.shape[2:])  # [E, 2f, H]
        elif self.do == "kv_b":
            keys = xp.swapaxes(array, 1, 2)  # [heads, k, rank]
            values = arrays[1]  # [heads, v, rank]
            array = xp.concatenate([keys, values], axis=1).reshape(-1, values.shape[-1])
        elif self.do == "number":
            array = array.reshape(1)
        elif self.plus:
            array = array - self.plus
        if self.axes:  # every permutation of axes in the tables is its own inverse
            array = xp.transpose(array, self.axes)
        return [array]


@cache
def _pattern(name: str) -> re.Pattern[str]:
    """What finds the names that a name with marks stands for; its groups are what the marks stand for."""
    escaped = re.escape(name)
    for mark, pattern in ((r"\{n\}", r"(\d+)"), (r"\{e\}", r"(?P<expert>\d+)"), (r"\{s\}", "(.+)")):
        escaped = escaped.replace(mark, pattern)
    return re.compile(escaped)


def _fill(name: str, values: tuple[str, ...], expert: int = 0) -> str:
    """A name with marks, filled in. values: of {n} and {s}, in their order; more of them are left over."""
    rest = iter(values)
    return re.sub(r"\{([nse])\}", lambda mark: str(expert) if mark[1] == "e" else next(rest), name)


@dataclass(frozen=True)
class Layout:
    """How the tensors of one family lie in HF's files and in MLX."""

    rules: tuple[Rule, ...] = ()  # the first that matches a name counts
    # (MLX path, PEFT target), with marks, where they are not the names of the files: transformers has another layer in
    # memory there. `peft/adapter_folder.py` explains targets such as "mlp.experts:gate_up_proj#gate".
    modules: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()  # parts of the names of HF tensors that MLX does not load; an export takes the base's
    # Rules for before mlx-lm reads the tensors, whose own renaming does not know what transformers saves.
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
            found = self._early_rule(name)
            if found is None:
                yield name, array
                continue
            rule, match = found
            if rule.do == "stack":
                experts.setdefault(_fill(rule.mlx[0], match.groups()), {})[int(match["expert"])] = array
                continue
            for to, part in zip(rule.mlx, rule.split(array, xp, width), strict=True):
                yield _fill(to, match.groups()), part
        for name, single in experts.items():
            yield name, xp.stack([single[expert] for expert in range(len(single))])

    def _early_rule(self, name: str) -> tuple[Rule, re.Match[str]] | None:
        for rule in self.early:
            match = _pattern(rule.hf).fullmatch(name)
            if match:
                return rule, match
        return None

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
                for expert, one in enumerate(whole):
                    yield _fill(rule.hf, values, expert), one
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
        candidates = []
        for ours, theirs in self.modules:
            match = _pattern(theirs).fullmatch(names[0]) or _pattern(theirs).fullmatch(names[1])
            if match:
                candidates.append(_fill(ours, match.groups()))
        for rule in self.rules:
            match = _pattern(rule.hf).fullmatch(f"{module}.weight")
            if match and rule.do == "move":
                candidates.append(_fill(rule.mlx[0], match.groups()).removesuffix(".weight"))
        for path in (*candidates, module):
            if self.peft_targets([path]).keys() & set(names):  # the way there again must lead to the target
                return path
        return None

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

"""The configuration of a run: every default, unit and meaning, stated once.

A run is described by five sections (`model`, `data`, `lora`, `train`, `fast`). Values come, strongest first, from
command-line flags, then `--set section.key=value`, then a YAML file, then the defaults below. Of two keys that exclude
each other (steps, epochs), the one on the command line replaces the one in the file. An unknown key is an error that
names its nearest neighbour; a key whose value could have no effect is one too.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from mlxtune.errors import UserError

EITHER = (("train.steps", "train.epochs"), ("train.batch_rows", "train.batch_tokens"))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        # Python counts True as 1; nobody who writes `lr: yes` means a rate of 1.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("expected a value, not true or false (yes, no, on, off)")
        return value


class ModelSection(Section):
    path: str = Field("", description="MLX folder, 16-bit Hugging Face folder, or hub id (owner/name)")


class DataSection(Section):
    path: str = Field("", description="folder with train.jsonl, one data file, or hub dataset id")
    max_tokens: int = Field(2048, ge=8, description="longest row in tokens; longer rows keep their start")
    valid_fraction: float = Field(0.1, gt=0, lt=1, description="share of rows held out when there is no valid file")
    train_on: Literal["all", "last"] = Field("all", description="supervise every assistant turn, or only the last")
    group_by_prefix: bool = Field(
        False, description="true: rows that share a long beginning (one document, several questions) share a batch"
    )
    template_kwargs: dict[str, Any] = Field(default_factory=dict, description="extra variables of the chat template")


class LoraSection(Section):
    rank: int = Field(16, ge=1, description="rank r of the update B A")
    alpha: float = Field(32.0, gt=0, description="scale of the update = alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the adapter's inputs zeroed in training")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="every linear layer in the blocks, or names such as [q_proj, v_proj]"
    )
    layers: Literal["all"] | int = Field("all", description="all blocks, or only the last n")
    variant: Literal["lora"] = Field("lora", description="the kind of adapter")

    @field_validator("layers", "targets")
    @classmethod
    def _something(cls, value: Any) -> Any:
        if value == [] or (isinstance(value, int) and value < 1):
            raise ValueError("nothing would be trained")
        return value


def _yaml_off(value: Any) -> Any:
    """YAML reads `off` as false."""
    return {False: "off", True: "on"}[value] if isinstance(value, bool) else value


class TrainSection(Section):
    steps: int | None = Field(None, ge=1, description="optimizer steps (instead of epochs)")
    epochs: float | None = Field(None, gt=0, description="passes over the data (default 1 when steps is not set)")
    batch_rows: int | None = Field(None, ge=1, description="rows per micro-batch (default 4 unless batch_tokens)")
    batch_tokens: int | None = Field(None, ge=16, description="padded tokens per micro-batch (instead of batch_rows)")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimizer step")
    lr: float = Field(2e-4, gt=0, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="after warmup: flat, or down to 0")
    warmup_steps: int = Field(10, ge=0, description="optimizer steps of linear warmup")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of AdamW")
    clip_norm: float = Field(1.0, ge=0, description="global gradient norm is clipped to this; 0: never")
    seed: int = Field(0, ge=0, lt=2**31, description="decides every random draw")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="activations; auto: float32 on the CPU, else the model's own type"
    )
    checkpoint_layers: Literal["none", "all"] | int = Field(
        "none", description="blocks whose activations are computed again instead of kept: none, all, or every n-th"
    )
    memory_limit: Literal["auto", "off"] | int = Field(
        "auto", description="bytes that the predicted peak must fit; auto: 80% of the device's working set; off: any"
    )
    eval_every: int = Field(50, ge=0, description="optimizer steps between evaluations; 0: only at the end")
    save_every: int = Field(100, ge=0, description="optimizer steps between checkpoints; 0: never")
    keep: Literal["best", "last"] = Field("best", description="which adapter RUN/adapters.safetensors holds at the end")
    keep_last: int = Field(2, ge=1, description="how many checkpoints stay")

    @field_validator("checkpoint_layers")
    @classmethod
    def _every(cls, value: Any) -> Any:
        if isinstance(value, int) and value < 1:
            raise ValueError("use none, all, or n for every n-th block")
        return value

    _limit_off = field_validator("memory_limit", mode="before")(_yaml_off)

    @field_validator("memory_limit")
    @classmethod
    def _some(cls, value: Any) -> Any:
        if isinstance(value, int) and value < 1:
            raise ValueError("use auto, off, or bytes")
        return value

    @field_validator("epochs", "batch_tokens")
    @classmethod
    def _one_of_two(cls, value: Any, info: ValidationInfo) -> Any:
        other = {"epochs": "steps", "batch_tokens": "batch_rows"}[str(info.field_name)]
        if value is not None and info.data.get(other) is not None:
            raise ValueError(f"set {other} or {info.field_name}, not both")
        return value


class FastSection(Section):
    head: Literal["auto", "off"] = Field(
        "auto", description="auto: the head only sees supervised tokens; off: all of them"
    )

    prefix: Literal["auto", "off"] = Field(
        "auto", description="auto: tokens that all rows of a batch begin with are computed once; off: in every row"
    )

    _off = field_validator("head", "prefix", mode="before")(_yaml_off)


class Config(Section):
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    fast: FastSection = FastSection()

    def to_yaml(self) -> str:
        """The resolved configuration, every key written out, as the run folder keeps it."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-5` as text and `2025-01-31` as a date; people who write them mean a number and text."""


class _Dumper(yaml.SafeDumper):
    """Quotes whatever text _Loader would read as a number."""


_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:timestamp"]
    for first, rules in _Loader.yaml_implicit_resolvers.items()
}
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?\d*[eE][-+]?\d+|\.\d+([eE][-+]?\d+)?)$"),
        list("-+.0123456789"),
    )


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML; `source` names the file or flag in the error."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source} line {mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not valid YAML ({problem})") from error


def recipe_folder() -> Path:
    """Where the shipped recipes are: inside the wheel, else in the checkout."""
    packaged = Path(str(resources.files("mlxtune"))) / "configs"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parent.parent / "configs"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def find_config(name: str) -> Path:
    """A path to a YAML file, or the name of a shipped recipe."""
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return Path(path)
    if name in recipe_names():
        return recipe_folder() / f"{name}.yaml"
    raise UserError(
        f"no configuration file {name!r}, and no recipe of that name",
        f"Shipped recipes: {', '.join(recipe_names())}.",
    )


def load(
    file: str | Path | None = None, settings: tuple[str, ...] = (), flags: Mapping[str, Any] | None = None
) -> Config:
    """Resolve a configuration.

    file: YAML path or recipe name; settings: `section.key=value` strings; flags: dotted keys to values, the
    strongest of all. Raises UserError naming file, line and key of whatever is wrong.
    """
    tree, lines = _read(find_config(str(file))) if file is not None else ({}, {})
    given: list[tuple[str, Any]] = []
    for setting in settings:
        key, _, value = setting.partition("=")
        key = key.strip()
        if "=" not in setting or not all(key.partition(".")):
            raise UserError(f"--set {setting}: expected section.key=value", "Example: --set train.lr=1e-4")
        given.append((key, parse_yaml(value, f"--set {key}")))
        lines[key] = f"--set {setting}"
        lines.setdefault(key.partition(".")[0], f"--set {setting}")
    for key, value in (flags or {}).items():
        if value is not None:
            given.append((key, value))
            lines.pop(key, None)
    for key, value in given:
        _put(tree, key, value)
    named = {key for key, value in given if value is not None}
    for one, other in (*EITHER, *(pair[::-1] for pair in EITHER)):
        if one in named and other not in named:
            _put(tree, other, None)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(*_explain(error, lines)) from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's sections, and where each of its keys stands."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (invalid UTF-8 at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    tree = parse_yaml(text, str(path))
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as `train:`, found {type(tree).__name__}")
    lines: dict[str, str] = {}
    for key, line in _key_lines(yaml.compose(text, _Loader)):
        where = f"{path} line {line}"
        if key in lines:
            raise UserError(f"{where}: {key} is already set in {lines[key]}", "Keep one of the two.")
        lines[key] = where
    # A section whose keys are all commented out means the defaults.
    return {key: {} if value is None else value for key, value in (tree or {}).items()}, lines


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"{key}: {parent} is not a section")
        node = child
    node[last] = value


def _key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode) and prefix.count(".") < 3:
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _key_lines(value, f"{name}.")


def _explain(error: ValidationError, lines: Mapping[str, str]) -> tuple[str, str]:
    """One line on the first problem, with where it stands and what is allowed."""
    problems: dict[str, list[Any]] = {}
    for problem in error.errors():
        # pydantic adds the branch of a union to the location; our own keys are the first two parts.
        problems.setdefault(".".join(str(part) for part in problem["loc"][:2]), []).append(problem)
    key, same = next(iter(problems.items()))
    where = f"{lines[key]}: " if key in lines else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    first, messages = same[0], dict.fromkeys(problem["msg"] for problem in same)
    if first["type"] in ("extra_forbidden", "invalid_key"):
        nearest = nearest_key(key)
        hint = f"Did you mean {nearest}?" if nearest else f"Sections: {', '.join(Config.model_fields)}."
        return f"{where}unknown key {key}{more}", hint
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
    elif first["type"] == "model_type":
        message = f"expected a section with its keys indented below it, got {first['input']!r}"
    else:
        allowed = " or ".join(text.removeprefix("Input should be ") for text in messages)
        got = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
        message = f"should be {allowed}{got}"
    return f"{where}{key}: {message}{more}", describe(key)


def nearest_key(key: str) -> str:
    """The known key most like an unknown one, or an empty string.

    First the same name in another section, then a description with its words (learning_rate), then the spelling.
    """
    name, known = key.rpartition(".")[2], known_keys()
    moved = [other for other in known if other.endswith(f".{name}")]
    meant = [other for other in known if "_" in name and name.replace("_", " ") in describe(other)]
    return next(iter(moved or meant or difflib.get_close_matches(key, known, n=1, cutoff=0.5)), "")


def known_keys() -> list[str]:
    keys = list(Config.model_fields)
    for section, field in Config.model_fields.items():
        kind = field.annotation
        assert isinstance(kind, type) and issubclass(kind, BaseModel)
        keys += [f"{section}.{name}" for name in kind.model_fields]
    return keys


def describe(key: str) -> str:
    """What a dotted key means, or an empty string for an unknown one."""
    section, _, name = key.partition(".")
    field = Config.model_fields.get(section)
    kind = field.annotation if field else None
    if isinstance(kind, type) and issubclass(kind, BaseModel) and name in kind.model_fields:
        return f"{key}: {kind.model_fields[name].description}."
    return ""

"""The local paths of a configuration, made independent of the folder in which the command was typed."""

from __future__ import annotations

from pathlib import Path

from mlxtune.config.resolve import Config

# The values of data.template that name a template of ours and not a file; its text is in data/template/choice.py.
SHIPPED_TEMPLATES = ("chatml", "alpaca")


def with_absolute_paths(config: Config) -> Config:
    """The configuration with absolute paths, so that the run can be used and resumed from any folder. A hub id, or
    whatever else is not here, stays as it is.
    """
    data = config.data
    template = data.template
    if template not in SHIPPED_TEMPLATES:  # a file of that name is not meant
        template = _absolute(template)
    sources = [source.model_copy(update={"path": _absolute(source.path)}) for source in data.sources or []]
    data = data.model_copy(update={"path": _absolute(data.path), "sources": sources or None, "template": template})
    model = config.model.model_copy(update={"path": _absolute(config.model.path)})
    lora = config.lora.model_copy(update={"start_from": _absolute(config.lora.start_from)})
    prompts = config.train.sample_prompts
    if isinstance(prompts, str):
        prompts = _absolute(prompts)
    train = config.train.model_copy(update={"sample_prompts": prompts})
    return config.model_copy(update={"model": model, "data": data, "lora": lora, "train": train})


def paths_read(config: Config) -> list[Path]:
    """What is here of what a run reads: its model, rows, template, adapter to start from, and suite."""
    data, prompts = config.data, config.train.sample_prompts
    named = [config.model.path, config.lora.start_from, *(source.path for source in data.mixture())]
    named += [data.template] if data.template not in SHIPPED_TEMPLATES else []
    named += [prompts] if isinstance(prompts, str) else []
    found = [Path(path).expanduser() for path in named if path]
    return [path for path in found if path.exists()]


def _absolute(path: str) -> str:
    """The same path from the root, where something is there."""
    here = Path(path).expanduser()
    if path and here.exists():
        return str(here.resolve())
    return path

"""What `mlxtune init` writes for people: mlxtune.yaml with its comments, the README, and what git leaves alone.

Names and values of strangers stand in all of them: in YAML as `write_yaml` quotes them, elsewhere on their line,
without what commands a terminal or ends a code span.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxtune_convert.shown import brief, shown_name

from mlxtune.config.described import all_keys
from mlxtune.config.yaml_text import write_yaml

WIDTH = 100  # columns of a comment
COMMENTS = {
    "out": "train makes this folder; eval, report, export, chat and generate use it",
    "suite": "eval asks it; its checks are in suite.yaml",
    "export": "mlxtune export makes these: peft, hf, gguf or gguf-lora, each with a place of its own",
}


@dataclass(frozen=True)
class Chosen:
    """All that was chosen for a project."""

    goal: str  # what for, in a word
    meaning: str  # of that word
    model: str  # model.path, as the configuration names it
    source: str  # what is to be converted into that folder first; "": nothing
    bits: int | None  # that it is then quantized to; None: as `convert` does by itself
    rows: Mapping[str, int]  # by split
    given: str  # where the rows are from
    prompts: int  # of the suite; 0: there is none
    exports: Sequence[str]  # words of `export --to`
    settings: Mapping[str, Any]  # section.key -> value, beside the model and the data
    why: Mapping[str, str]  # section.key -> a sentence on its value
    notes: Sequence[str]  # a sentence each: what was predicted, what to mind


def place_of(to: str) -> str:
    """Where an export goes. to: a word of `export --to`."""
    return f"exports/{to}.gguf" if to.startswith("gguf") else f"exports/{to}"


def project_yaml(chosen: Chosen, day: str) -> str:
    """mlxtune.yaml. day: when it is written."""
    project: dict[str, Any] = {"out": "run"}
    if chosen.prompts:
        project["suite"] = "suite.jsonl"
    project["export"] = [{"to": to, "out": place_of(to)} for to in chosen.exports]
    lines = [
        *_comment(f"Written by mlxtune init on {day}, for {chosen.goal}: {chosen.meaning}."),
        *_comment(
            "Commands that run in this folder take from here what they are not told: mlxtune train, eval, report, "
            "export, chat, generate, data check. Flags and --set are stronger; -c FILE takes its place."
        ),
        *_comment("mlxtune config explains every key; those that are not here have their defaults."),
        "",
        *_section("project", project, COMMENTS),
    ]
    if chosen.notes:
        lines.append("")
        for note in chosen.notes:
            lines += _comment(note)
    meanings = {key.full: key.meaning for key in all_keys()}
    sections: dict[str, dict[str, Any]] = {"model": {"path": chosen.model}, "data": {"path": "data"}}
    for key, value in chosen.settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    of_model = f"Made by: {_convert(chosen)}" if chosen.source else ""
    reasons = {"model.path": of_model, **chosen.why}
    for section, values in sections.items():
        why = {name: reasons.get(f"{section}.{name}") or meanings[f"{section}.{name}"] for name in values}
        lines += ["", *_section(section, values, why)]
    return "\n".join(lines) + "\n"


def _section(section: str, values: Mapping[str, Any], why: Mapping[str, str]) -> list[str]:
    """YAML in which each key stands below what is said of it."""
    lines = [f"{section}:"]
    for name, value in values.items():
        lines += [f"  {line}" for line in _comment(why[name])]
        lines += textwrap.indent(write_yaml({name: value}).rstrip("\n"), "  ").split("\n")
    return lines


def _comment(text: str) -> list[str]:
    """Lines of a comment; what others wrote begins none of its own."""
    return [f"# {line}" for line in textwrap.wrap(shown_name(text), WIDTH - 4, break_long_words=False)]


def commands(chosen: Chosen) -> list[tuple[str, str]]:
    """(A command, what it is for), in the order in which they are run in the project's folder."""
    found = []
    if chosen.source:
        found.append((_convert(chosen), "the model, as MLX trains it"))
    found += [
        ("mlxtune data check", "what will be learned, and what looks wrong"),
        ("mlxtune train --dry-run", "the plan: steps, tokens, memory"),
        ("mlxtune train", "the run, in the folder run"),
    ]
    is_asked = f"{chosen.prompts} test prompts, before and after, checked"
    found.append(
        ("mlxtune eval --out evals/first", is_asked) if chosen.prompts else ("mlxtune eval", "the held-out loss")
    )
    if chosen.prompts and chosen.goal in ("style", "chat"):
        found.append(("mlxtune eval --forgetting", "what the model lost by it"))
    found += [
        ("mlxtune report", "run/report.html: the run, and evaluations of it"),
        ("mlxtune chat", "talk with it"),
        ("mlxtune export", f"make {', '.join(place_of(to) for to in chosen.exports)}"),
    ]
    return found


def _convert(chosen: Chosen) -> str:
    """The command that makes the model."""
    bits = f" --bits {chosen.bits}" if chosen.bits is not None else ""
    return f"mlxtune convert {shlex.quote(chosen.source)} {shlex.quote(chosen.model)}{bits}"


def readme(chosen: Chosen) -> str:
    """README.md of the project."""
    rows = ", ".join(f"{count:,} in data/{split}.jsonl" for split, count in chosen.rows.items() if count)
    files = {
        "mlxtune.yaml": "the settings; every command here reads them",
        "data/": "the rows: train.jsonl to learn from, valid.jsonl to stop at the best, test.jsonl for the suite alone",
    }
    if chosen.prompts:
        files["suite.jsonl"] = "prompts out of data/test.jsonl, which no training sees"
        files["suite.yaml"] = "the checks on every answer to them"
    lines = [
        f"# {chosen.goal}: {chosen.meaning}",
        "",
        f"Model: {_code(chosen.source or chosen.model)}. Rows: {rows}; they came from {_code(chosen.given)}, which was "
        "left as it is.",
        "",
        "## Commands",
        "",
        "Run here, one after the other; `mlxtune COMMAND --help` says more.",
        "",
        "```",
        *_aligned(commands(chosen)),
        "```",
        "",
        "## Files",
        "",
        *(f"- `{name}`: {what}" for name, what in files.items()),
    ]
    if chosen.notes:
        lines += ["", "## To mind", "", *(f"- {_plain(note)}" for note in chosen.notes)]
    return "\n".join(lines) + "\n"


def _aligned(found: Iterable[tuple[str, str]]) -> list[str]:
    """Commands with their comments; a long one has its comment on the line before."""
    lines = []
    for command, what in found:
        if len(command) > 40:
            lines += [f"# {what}", shown_name(command)]
        else:
            lines.append(f"{shown_name(command):40}  # {what}")
    return lines


def _code(text: str) -> str:
    """A stranger's name as a code span of Markdown."""
    return f"`{brief(shown_name(text)).replace('`', chr(39))}`"


def _plain(text: str) -> str:
    """A sentence in which nothing is Markdown or HTML."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|" else letter for letter in shown_name(text))


def ignored(chosen: Chosen) -> str:
    """.gitignore of the project."""
    lines = ["# What mlxtune makes out of the rest.", "/run*/", "/runs/", "/evals/", "/exports/", ".*.partial-*"]
    if chosen.source:
        lines.append("/model/")
    return "\n".join(lines) + "\n"

"""mlxtune.yaml: the configuration of a run, with a section on what the commands do in its folder.

    project:
      out: run                    # train writes it; eval, report, export, chat and generate use it
      suite: suite.jsonl          # eval asks it
      export:                     # export makes these, where --to is not given
        - to: peft
          out: adapter
    model:
      path: model                 # from here on as in any file for `train -c`
    data:
      path: data

It is looked for in the folder where a command runs, and in no other, not in those above it: what a command takes never
depends on a file that one does not see. So its paths, which are relative to it, are relative to that folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from mlxtune.config.resolve import PROJECT, explained, read_sections
from mlxtune.config.schema import ExportSection, ProjectSection, Section
from mlxtune.errors import UserError, did_you_mean

PROJECT_FILE = "mlxtune.yaml"


class _File(Section):
    """What is read of the file here; the rest is a run's configuration, and read as one where a run is meant."""

    project: ProjectSection = ProjectSection()


@dataclass(frozen=True)
class Project:
    """What a project's file says of its folder."""

    file: Path  # mlxtune.yaml itself, as `train -c` takes it
    out: Path  # the folder of its run, which may not be there yet
    suite: Path | None  # of prompts; None: it names none
    exports: Sequence[ExportSection]  # their `out` is relative to the folder of the file


def found(folder: Path = Path()) -> Project | None:
    """The project of a folder (that where the command runs); None: it has no file PROJECT_FILE. Raises UserError for
    what is wrong with the section `project`, naming the line.
    """
    file = folder / PROJECT_FILE
    if not file.is_file():
        return None
    tree, lines = read_sections(file)
    own = tree.get(PROJECT, {})
    for name in own if isinstance(own, dict) else ():
        if name not in ProjectSection.model_fields:
            key = f"{PROJECT}.{name}"
            hint = did_you_mean(str(name), ProjectSection.model_fields, f"{PROJECT_FILE} has in `{PROJECT}`")
            raise UserError(f"{lines[key]}: unknown key {key}", hint)
    try:
        section = _File.model_validate({PROJECT: own}).project
    except ValidationError as error:
        raise UserError(*explained(error, lines)) from None
    suite = folder / section.suite if section.suite else None
    exports = [one.model_copy(update={"out": str(folder / one.out)}) for one in section.export]
    return Project(file, folder / section.out, suite, exports)

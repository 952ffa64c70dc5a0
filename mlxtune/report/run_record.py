"""What is known of a run from its folder alone, however damaged that is.

A page is wanted most where something went wrong: a run that was killed, a disk that was full, a file that somebody
changed. So nothing but a folder that is no run is refused here: what cannot be read is missing in the record, and its
`warnings` say so.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mlxtune.config.yaml_text import parse_yaml
from mlxtune.errors import UserError
from mlxtune.report.drawing.thinning import Point
from mlxtune.report.secrets import without_home
from mlxtune.train import runs
from mlxtune.train.events import Event, Following, History
from mlxtune.train.run_folder import CONFIG_FILE, EVENTS_FILE, RunFolder

NAMED_LINES = 5  # lines that a warning names


@dataclass(frozen=True)
class RunRecord:
    """A run, as its folder tells."""

    folder: Path  # of the run, as it was named
    config: dict[str, Any]  # section -> key -> value, resolved; {}: config.yaml cannot be read
    events: list[Event]  # those that still count, in their order
    state: str  # running, finished, interrupted, failed, killed, or unreadable, as in `runs.RunSummary`
    warnings: list[str]  # what a reader of the page must know of the record: what is missing or damaged
    # (step where the run went on, the last one that it had taken before), of each time that steps were done again
    taken_back: list[tuple[int, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the run is called: its folder's name."""
        return self.folder.resolve().name

    @cached_property
    def begun(self) -> Event:
        """The last `begin`: a run that went on may have another plan than before; {}: none was written."""
        return next((event for event in reversed(self.events) if event["kind"] == "begin"), {})

    @cached_property
    def end(self) -> Event:
        """The `end` of the last process; {}: it ended without a word, or goes on."""
        return self.events[-1] if self.events and self.events[-1]["kind"] == "end" else {}

    @cached_property
    def train(self) -> list[Event]:
        """The events of optimizer steps."""
        return self.of_kind("train")

    @cached_property
    def evaluations(self) -> list[Event]:
        """The events of evaluations during the run, the one before the first step (step 0) among them."""
        return self.of_kind("eval")

    @property
    def step(self) -> int:
        """The last step that was taken; 0: none."""
        return max((int(event["step"]) for event in self.train), default=0)

    @property
    def steps(self) -> int:
        """Of the whole plan; 0: unknown."""
        return int(self.begun.get("steps", 0))

    @property
    def model(self) -> str:
        """The base model, as the run was told; "": unknown."""
        return str(self.begun.get("model") or self.setting("model.path") or "")

    @cached_property
    def base_loss(self) -> float | None:
        """Validation loss before the first step, nats a token; None: it was not measured."""
        first = next((event for event in self.evaluations if event["step"] == 0), None)
        return None if first is None else number_of(first, "loss")

    @cached_property
    def best(self) -> Event | None:
        """The evaluation of the adapter that the run calls the best; None: nothing was evaluated after a step."""
        later = [event for event in self.evaluations if event["step"] > 0 and number_of(event, "loss") is not None]
        named = self.end.get("best_step")  # decides where a check chose the adapter (train.keep_by)
        for event in later:
            if event["step"] == named:
                return event
        by = self.setting("train.keep_by")
        if by is None or by == "loss":
            return min(later, key=lambda event: float(event["loss"]), default=None)
        # As `State.is_beaten_by` chose so far: the higher score, of equal ones the lower loss.
        return max(later, key=lambda event: (score_of(event, str(by)), -float(event["loss"])), default=None)

    @cached_property
    def is_preference(self) -> bool:
        """Whether it learned which answer is preferred, and not the answers."""
        if self.setting("preference.loss"):
            return True
        return any(number_of(event, "margin") is not None for event in (*self.train, *self.evaluations))

    @property
    def loss_unit(self) -> str:
        """What its losses are counted in."""
        return "nats a row" if self.is_preference else "nats a token"

    def of_kind(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["kind"] == kind]

    def notes(self) -> list[str]:
        """What the run said that a person must know, each once."""
        return list(dict.fromkeys(str(event.get("text", "")) for event in self.of_kind("note")))

    def setting(self, key: str) -> Any:
        """A value of the configuration by its dotted key; None: unknown."""
        section, _, name = key.partition(".")
        keys = self.config.get(section)
        return keys.get(name) if isinstance(keys, dict) else None


def read_run(folder: Path, following: Following | None = None) -> RunRecord:
    """What the folder of a run tells. following: of a run that is read again and again, which knows its events so far.
    Raises UserError only where the folder is no run at all.
    """
    run = RunFolder(folder)
    if not run.is_run() and not run.events.is_file():
        raise UserError(
            f"{folder} is not a run of mlxtune (neither {CONFIG_FILE} nor {EVENTS_FILE})",
            "Name the folder that `mlxtune train` wrote; `mlxtune runs` lists them.",
        )
    warnings: list[str] = []
    config = _config(run, warnings)
    history = _history(following or Following(folder), warnings)
    try:
        state = runs.state_of(run, history.events)
    except KeyError:
        state = "unreadable"
        warnings.append(f"The last event of {EVENTS_FILE} does not say how the run ended.")
    record = RunRecord(folder, config, history.events, state, warnings, history.taken_back)
    warnings += _missing_places(record)
    return record


def number_of(event: Event, name: str) -> float | None:
    """A number of an event; None: it has none of that name, or none that a float holds."""
    value = event.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value) if isinstance(value, float) else abs(value) >= sys.float_info.max:
        return None
    return float(value)


def score_of(evaluation: Event, check: str) -> float:
    """The mean score of a check in an evaluation during the run; 0: it applied to no answer, as the run counts it."""
    checks = evaluation.get("checks")
    if check == "accuracy" and number_of(evaluation, check) is not None:
        return number_of(evaluation, check) or 0.0  # of a preference run
    return (number_of(checks, check) if isinstance(checks, dict) else None) or 0.0


def points_of(happened: list[Event], name: str) -> list[Point]:
    """(step, number of that name) of events; None in its place where it is none."""
    return [(event["step"], number_of(event, name)) for event in happened]


def _config(run: RunFolder, warnings: list[str]) -> dict[str, Any]:
    """The resolved configuration; of a file that this version cannot resolve what it says itself."""
    if not run.is_run():
        warnings.append(f"{CONFIG_FILE} is missing: the settings of the run are not known.")
        return {}
    try:
        return run.config().model_dump(mode="json")
    except UserError as error:
        warnings.append(f"{CONFIG_FILE} is not as this version of mlxtune writes it: {error.message}.")
    except OSError as error:
        warnings.append(f"{CONFIG_FILE} cannot be read ({error.strerror}): the settings of the run are not known.")
        return {}
    try:
        written = parse_yaml(run.config_file.read_text(encoding="utf-8"), CONFIG_FILE).value
    except (UserError, ValueError):
        return {}
    return written if isinstance(written, dict) else {}


def _history(following: Following, warnings: list[str]) -> History:
    try:
        history = following.history()
    except FileNotFoundError:
        warnings.append(f"{EVENTS_FILE} is missing: what happened in the run is not known.")
        return History([], [], [])
    except OSError as error:
        warnings.append(f"{EVENTS_FILE} cannot be read ({error.strerror}): what happened in the run is not known.")
        return History([], [], [])
    if history.damaged:
        some = ", ".join(map(str, history.damaged[:NAMED_LINES]))
        more = "" if len(history.damaged) <= NAMED_LINES else ", ..."
        count = len(history.damaged)
        lines = f"line {some} is" if count == 1 else f"{count} lines ({some}{more}) are"
        warnings.append(f"{EVENTS_FILE} is damaged: {lines} left out. Numbers may be missing or wrong.")
    if not history.events:
        warnings.append(f"{EVENTS_FILE} holds no event: what happened in the run is not known.")
    return history


def _missing_places(record: RunRecord) -> list[str]:
    """What the run was made of and what is not there any more. A hub id is no place on this machine."""
    out = []
    named = [("model", record.setting("model.path")), ("data", record.setting("data.path"))]
    sources = record.setting("data.sources")
    for source in sources if isinstance(sources, list) else ():
        named.append(("data", source.get("path") if isinstance(source, dict) else None))
    for what, place in named:
        if isinstance(place, str) and os.path.isabs(place) and not os.path.exists(place):
            out.append(f"The {what} of the run ({without_home(place)}) is not there any more.")
    return out

"""lm_eval's tasks with rows of this machine laid under them, and what differs from the tasks as they are.

A task is a YAML file: which set of the hub, how a row becomes a text, what is measured. All but the set is taken as it
is. Its own index reads 14,000 files first, which takes ten seconds; the one file is found by its name instead.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxtune.errors import UserError, did_you_mean
from mlxtune.evaluate.benchmarks.package import quiet, task_files
from mlxtune.evaluate.benchmarks.rows import Rows, download

OFTEN = (
    "arc_challenge",
    "arc_easy",
    "gsm8k",
    "hellaswag",
    "mmlu",
    "openbookqa",
    "piqa",
    "truthfulqa_mc2",
    "winogrande",
)
MMLU = "mmlu"  # 57 tasks, one for each subject
KINDS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
SHOTS_SEED = 1234  # lm_eval's: which examples are shown


@dataclass(frozen=True)
class Wanted:
    """What of a benchmark is asked."""

    limit: int | None  # rows of a benchmark, drawn by the seed; None: all
    shots: int | None  # examples before each question; None: as many as the task has
    seed: int  # of the rows that are drawn


@dataclass(frozen=True)
class Part:
    """One task of a benchmark: all of it, or one subject."""

    benchmark: str  # as it was asked for
    subject: str | None  # None: the whole of it
    task: Any  # lm_eval's, its requests built
    numbers: list[int]  # the rows that are asked, as they stand in the set, from 0

    @property
    def name(self) -> str:
        return self.benchmark if self.subject is None else f"{self.benchmark}/{self.subject}"

    def id_of(self, place: int) -> str:
        """Of the prompt at a place among those that are asked."""
        return f"{self.name}/{self.numbers[place] + 1}"


@dataclass
class Loading:
    """Benchmarks that were read."""

    parts: list[Part] = field(default_factory=list)  # in the order in which they were asked for
    settings: dict[str, Any] = field(default_factory=dict)  # of each benchmark, for the record
    notes: list[str] = field(default_factory=list)  # what differs from the tasks as they are


def load(names: list[str], rows: Rows, wanted: Wanted) -> Loading:
    """Raises UserError for an unknown name, rows that are missing or do not fit, and shots that there are not."""
    loading = Loading()
    for name in names:
        with quiet():
            tasks = []
            for subject, file in files_of(name, rows):
                tasks.append((subject, _task(name, subject, _settings(file), rows, wanted)))
            sizes = [len(task.eval_docs) for _, task in tasks]
        chosen = _chosen(sizes, wanted)
        for (subject, task), numbers in zip(tasks, chosen, strict=True):
            if numbers:
                with quiet():
                    task.set_fewshot_seed(seed=SHOTS_SEED)
                    task.build_all_requests(samples=numbers)
                loading.parts.append(Part(name, subject, task, numbers))
        _record(loading, name, [task for _, task in tasks], sum(sizes), wanted)
    return loading


def files_of(name: str, rows: Rows | None = None) -> list[tuple[str | None, Path]]:
    """(The subject, its YAML file) of each task of a benchmark. rows: where the subjects that are here are looked for;
    None: all subjects. Raises UserError for an unknown name, or none of its subjects here.
    """
    if name == MMLU:
        return _subjects(rows)
    found = sorted(task_files().rglob(f"{name}.yaml"))
    found += [file for file in sorted(task_files().glob(f"{name}/*.yaml")) if file.name == "default.yaml"]
    for file in found:
        if _settings(file, with_functions=False).get("task") == name:
            return [(None, file)]
    raise UserError(
        f"no benchmark {name}", did_you_mean(name, [*OFTEN, "humaneval"]) or f"Among others: {', '.join(OFTEN)}."
    )


def fetch(names: list[str], folder: Path) -> int:
    """Download what the folder has not; how many files that are. Raises UserError where it cannot be had."""
    count = 0
    for name in names:
        for subject, file in files_of(name):
            settings = _settings(file, with_functions=False)
            with quiet():
                count += download(folder, name, subject, settings["dataset_path"], settings.get("dataset_name"))
    return count


def _subjects(rows: Rows | None) -> list[tuple[str | None, Path]]:
    files = sorted((task_files() / MMLU / "default").glob("mmlu_*.yaml"))
    every: list[tuple[str | None, Path]] = [(file.stem.removeprefix("mmlu_"), file) for file in files]
    if rows is None:
        return every
    here = [(subject, file) for subject, file in every if rows.has(MMLU, subject, "test")]
    if not here:
        raise UserError(
            f"{rows.folder} has no rows of {MMLU}: expected {MMLU}/test.jsonl, each row with its subject",
            "Or a folder for each subject, as in mmlu/anatomy/test.jsonl; or download it: --fetch.",
        )
    return here


def _settings(file: Path, with_functions: bool = True) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    found: dict[str, Any] = load_yaml(file, resolve_func=with_functions)
    return found


def _task(name: str, subject: str | None, settings: dict[str, Any], rows: Rows, wanted: Wanted) -> Any:
    """A task with our rows under it. Raises UserError where they do not fit."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    if settings.get("output_type") not in KINDS or "class" in settings:
        raise UserError(
            f"the benchmark {name} is a program of its own, which is not run here", f"Take {', '.join(OFTEN)}."
        )
    config = {
        key: value for key, value in settings.items() if key not in ("tag", "group", "task_list", "dataset_kwargs")
    }
    own = config.get("num_fewshot")
    shots = own or 0
    if wanted.shots is not None:
        if own == 0 and wanted.shots:
            raise UserError(
                f"{name} shows no examples, or has its own in each text: --shots {wanted.shots}", "Leave it out."
            )
        shots = wanted.shots
    config["num_fewshot"] = shots
    asked = config.get("test_split") or config.get("validation_split")
    named = [config.get(key) for key in ("fewshot_split", "training_split", "validation_split")]
    shown = next((split for split in (*named, asked) if split), None)  # where examples come from
    given = (config.get("fewshot_config") or {}).get("samples") is not None
    if asked is None:
        raise UserError(f"the benchmark {name} names no rows to ask", f"Take {', '.join(OFTEN)}.")
    splits = rows.splits(name, subject, asked, [split for split in named if split])
    if shots and not given and len(splits.get(shown or "", [])) < shots:
        there = len(splits.get(shown or "", []))
        raise UserError(
            f"{name} shows {shots} examples of its split {shown}, and {rows.folder} has {there} rows of it",
            f"Add {name}/{shown}.jsonl, or show fewer: --shots {there}.",
        )
    if not shots:
        config["fewshot_split"] = None
    for key in ("training_split", "validation_split", "test_split"):
        if config.get(key) not in splits:
            config[key] = None
    config["custom_dataset"] = lambda **_: datasets.DatasetDict(
        {split: datasets.Dataset.from_list(some) for split, some in splits.items()}
    )
    try:
        return ConfigurableTask(config=config)
    except ImportError as error:
        raise UserError(f"the benchmark {name} needs a package that is not here: {error}", "Install it.") from error
    except Exception as error:  # whatever a task's own code raises at rows of another form
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the rows of {name} in {rows.folder} do not fit its task: {type(error).__name__}: {reason}",
            f"They must have the columns of {settings.get('dataset_path')} on the hub.",
        ) from error


def _chosen(sizes: list[int], wanted: Wanted) -> list[list[int]]:
    """Of each task the rows that are asked: all, or so many of all tasks together."""
    every = [(task, number) for task, size in enumerate(sizes) for number in range(size)]
    if wanted.limit is not None and wanted.limit < len(every):
        every = random.Random(wanted.seed).sample(every, wanted.limit)
    found: list[list[int]] = [[] for _ in sizes]
    for task, number in sorted(every):
        found[task].append(number)
    return found


def _record(loading: Loading, name: str, tasks: list[Any], size: int, wanted: Wanted) -> None:
    """Say what is asked, and what of it is not as the task has it."""
    from lm_eval.api.task import ConfigurableTask

    task: ConfigurableTask = tasks[0]
    standard = _settings(files_of(name)[0][1], with_functions=False).get("num_fewshot") or 0
    shots = task.config.num_fewshot
    asked = size if wanted.limit is None else min(size, wanted.limit)
    loading.settings[name] = {"shots": shots, "rows": asked, "of": size, "version": str(task.VERSION)}
    if shots != standard:
        loading.notes.append(f"{name}: {shots} examples before each question; its task has {standard}")
    if asked < size:
        loading.notes.append(f"{name}: {asked} of {size:,} rows, drawn by the seed {wanted.seed}")
    if name == MMLU and len(tasks) < len(_subjects(None)):
        loading.notes.append(f"{name}: {len(tasks)} of its {len(_subjects(None))} subjects are here")

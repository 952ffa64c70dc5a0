"""What a model learns from: its rows, what they ask for, what is odd about them, how long they are, and one of them as
it is trained on. For the page of a run, and for `mlxtune data check --html`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxtune.data.survey import lint, subjects
from mlxtune.data.survey.preferences import preference_lines
from mlxtune.errors import UserError
from mlxtune.report import surveyed
from mlxtune.report.drawing.figure import Mark
from mlxtune.report.drawing.plots import histogram
from mlxtune.report.html import Child, Html, joined, tag
from mlxtune.report.page import Section
from mlxtune.report.run_record import RunRecord
from mlxtune.report.secrets import masked
from mlxtune.report.sections.trained_row import row_of
from mlxtune.report.surveyed import Surveyed
from mlxtune.report.tables import callout, facts, folded, table

SPLITS = ("train: ", "valid: ", "test: ")  # how notes on the rows of a split begin
NAMED = 12  # rows that a finding names
REASONS = 8  # that a finding lists
FAR = 1.25  # a limit beyond so many times the drawn lengths is told, not drawn: the bars would be one line
NOTED = {  # what a run notes of its rows (`begin`, field `data`) -> how it is said
    "rows": "rows",
    "shortened": "rows cut at data.max_tokens",
    "too_long": "rows of which data.max_tokens leaves nothing to learn",
    "repeated": "rows equal to an earlier one",
    "trained": "rows that are training rows too",
}
TASKS = {"answer": "answer a question", "other": "something without a word that is known"}  # what is said of these
SAMPLED = "In a sample there are fewer equal rows and leaks than in the whole: `mlxtune data check` counts those."


def section(record: RunRecord) -> Section | None:
    """The data of a run: read again, or, where that cannot be, as the run noted it."""
    counted = counts_of(record)
    data, reason = _read_again(record)
    if data is not None:
        warned = [callout("warning", masked(line)) for line in surveyed.changed_since(record.folder)]
        return Section("data", "The data", joined(warned, counted, of_survey(data)))
    notes = _notes_of(record)
    noted = joined(counted, notes) if counted or notes else None
    if not record.config and noted is None:
        return None
    said = f"The data cannot be read again: {masked(reason)}. "
    rest = "What follows is what the run noted." if noted else "The run noted nothing of it."
    return Section("data", "The data", joined(callout("warning", said, rest), noted))


def for_programs(record: RunRecord) -> dict[str, Any] | None:
    """The survey of a run's data, as `mlxtune data check --json` prints it; None where it cannot be read again."""
    data, _ = _read_again(record)
    return None if data is None else data.told


def _read_again(record: RunRecord) -> tuple[Surveyed | None, str]:
    """The data of a run; where it cannot be read None, and why."""
    try:
        return surveyed.of_run(record.folder), ""
    except UserError as error:
        return None, error.message
    except Exception as error:  # whatever became of the files, the page is made
        return None, f"{type(error).__name__}: {error}"


def counts_of(record: RunRecord) -> Html | None:
    """What the run counted of its rows when it began; None where it counted nothing."""
    values: dict[str, Child] = {}
    noted = record.begun.get("data")
    for split in ("train", "valid"):
        counts = noted.get(split) if isinstance(noted, dict) else None
        for key, what in NOTED.items():
            count = counts.get(key) if isinstance(counts, dict) else None
            if isinstance(count, int) and (count or key == "rows"):
                values[f"{split}: {what}"] = f"{count:,}"
    return facts("What the run noted of its rows", values) if values else None


def _notes_of(record: RunRecord) -> Html | None:
    """What the run said of its rows, among all that it said."""
    notes = [note for note in record.notes() if note.startswith(SPLITS) or " training rows" in note]
    return tag("ul", [tag("li", masked(note)) for note in notes]) if notes else None


def of_survey(data: Surveyed) -> Html:
    """All that is known of a data set."""
    told = data.told
    splits: Mapping[str, dict[str, Any]] = told["splits"]
    samples = [f"{name}: {split['sample']}." for name, split in splits.items() if split["sample"]]
    parts: list[Child] = [callout("neutral", "A sample was looked at. ", " ".join([*samples, SAMPLED]))] * bool(samples)
    parts += [sizes(splits), findings(told["findings"])]
    for name, split in splits.items():
        shown = [tag("h3", masked(name)), contents(name, split, told["findings"]), lengths(name, split["lengths"])]
        parts += shown if name.startswith("train") else [folded(f"The rows of {masked(name)}", shown)]
    parts.append(row_of(data.row))
    return joined(parts)


def sizes(splits: Mapping[str, dict[str, Any]]) -> Html:
    """How much there is of each split."""
    columns = ("split", "file", "rows", "that give examples", "examples", "tokens of an epoch", "trained on", "steps")
    rows = []
    for name, split in splits.items():
        used = sum(split["outcomes"].get(outcome, 0) for outcome in ("used", "shortened"))
        counts = [split["rows"], used, split["examples"], split["tokens"]]
        share = _share(split["supervised_tokens"], split["tokens"])
        cells = [masked(name), masked(Path(split["file"]).name), *(f"{count:,}" for count in counts), share]
        rows.append([*cells, f"{split['steps_per_epoch']:,}"])
    return table("Rows and tokens; examples are cut at data.max_tokens", columns, rows, numbers=range(2, len(columns)))


def findings(found: Sequence[dict[str, Any]]) -> Html:
    """What looks wrong, the gravest first."""
    if not found:
        return callout("good", "Nothing looks wrong in these rows.")
    rows = []
    for finding in found:
        reasons = list(finding.get("reasons", {}).items())[:REASONS]
        said = [tag("li", f"{count:,} x {masked(reason)}") for reason, count in reasons]
        cells: list[Child] = [tag("strong", finding["severity"]), masked(finding["split"])]
        cells += [
            joined(lint.counted(finding["count"], finding["what"]), tag("ul", said) if said else None),
            _named(finding["rows"]),
        ]
        rows.append([*cells, finding["fix"]])
    return table("What looks wrong", ("how grave", "split", "what", "rows", "what to do"), rows)


def contents(name: str, split: Mapping[str, Any], found: Sequence[dict[str, Any]]) -> Html:
    """What the rows of one split hold, whatever becomes of them."""
    talks = sum(split["tasks"].values())
    parts: list[Child] = []
    if split["tasks"]:
        asked = [[TASKS.get(task, task), f"{n:,}", _share(n, talks)] for task, n in split["tasks"].items()]
        caption = f"What the first questions of {masked(name)} ask for"
        parts.append(table(caption, ("to", "conversations", "share"), asked, numbers=(1, 2)))
    if split["kinds"]:
        kinds = [[kind, f"{n:,}", _share(n, talks), subjects.KINDS[kind]] for kind, n in split["kinds"].items()]
        caption = "Kinds of conversation; one may be of several"
        parts.append(table(caption, ("kind", "conversations", "share", "counts as that"), kinds, numbers=(1, 2)))
    systems = split["system_prompts"]
    values: dict[str, Child] = {
        "formats": _listed(split["formats"]),
        "roles": _listed(split["roles"]),
        "answers in a row": _listed({f"{many}:": count for many, count in split["answers_per_row"].items()}),
        "system prompts": f"{systems['distinct']:,} different; {systems['rows_without']:,} rows without"
        if talks
        else "",
        "hardly any asks to": ", ".join(split["tasks_missing"]),
        "scripts": _listed(split["scripts"]),
        "equal rows": _repeated(name, found),
        "made rows": f"{sum(split['made'].values()):,} ({_listed(split['made'])})" if split["made"] else "",
        **_style(split["style"]),
        **preference_lines(split["preferences"]),
        "shared beginning": f"{split['shared_prefix_tokens']:,} tokens begin every example",
    }
    parts.append(facts(f"The rows of {masked(name)}", {key: value for key, value in values.items() if value}))
    return joined(parts)


def lengths(name: str, told: Mapping[str, Any]) -> Html | None:
    """How long the examples are before data.max_tokens cuts them. told: of a survey."""
    counted: list[list[int]] = told["histogram"]
    if not counted:
        return None
    limit = told["max_tokens"]
    width = counted[0][1] - counted[0][0] + 1
    # The last bin holds the few that are far longer. It is drawn as wide as the others, and that is said.
    bins = [(float(low), float(low + width), count) for low, _, count in counted]
    end = bins[-1][1]
    marks = [Mark(f"data.max_tokens {limit:,}", float(limit), None)] if limit <= FAR * end else []
    quantiles = told["quantiles"]
    said = (
        f"Half of the examples have at most {quantiles['50']:,} tokens, 95% at most {quantiles['95']:,}; the longest "
        f"has {told['longest']:,}. {told['cut_share']:.1%} are longer than data.max_tokens {limit:,}."
    )
    if counted[-1][1] - counted[-1][0] >= width:
        said += f" The last bar holds all from {counted[-1][0]:,} tokens on."
    return joined(histogram(f"How long the examples of {masked(name)} are", "tokens", bins, marks), tag("p", said))


def _style(style: Mapping[str, Any]) -> dict[str, Child]:
    """How the conversations are written; nothing where there are none."""
    if not style:
        return {}
    words = style["answer_words"]
    return {
        "begin with a question": f"{style['questions']:.0%}; the others order or state",
        "answers with Markdown": f"{style['markdown']:.0%}",
        "words of an answer": f"{words['50']:,}; half of the answers have {words['25']:,} to {words['75']:,}",
    }


def _repeated(name: str, found: Sequence[dict[str, Any]]) -> str:
    """How many rows of a split repeat others."""
    codes = ("duplicate", "near duplicate", "leak", "question leak")
    said = []
    for finding in found:
        if finding["split"] == name and finding["code"] in codes:
            said.append(f"{finding['count']:,} {lint.KINDS[finding['code']].what}")
    return "; ".join(said) or "none"


def _named(rows: Sequence[int | str]) -> str:
    more = ", ..." if len(rows) > NAMED else ""
    return masked(", ".join(map(str, rows[:NAMED]))) + more


def _listed(counts: Mapping[str, int]) -> str:
    return masked(", ".join(f"{name} {count:,}" for name, count in counts.items()))


def _share(count: int, of: int) -> str:
    if not of:
        return "-"
    return "below 1%" if 0 < count < 0.01 * of else f"{count / of:.0%}"

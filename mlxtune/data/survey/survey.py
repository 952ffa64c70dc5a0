"""A survey of training data, one pass in bounded memory: what will be trained on, and what looks wrong with it."""

from __future__ import annotations

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune.config.resolve import Config
from mlxtune.data.chat.renderer import NO_TARGET, Renderer, Row
from mlxtune.data.chat.turn_kinds import Expansion, Kinds
from mlxtune.data.dataset import duplicates
from mlxtune.data.dataset.batches import DEFAULT_ROWS, common
from mlxtune.data.rows.formats import Record, chunks
from mlxtune.data.rows.readers import Bad
from mlxtune.data.survey import lint

LISTED = 200  # rows that a finding names
TRAINED = ("used", "shortened")  # outcomes of a row that gives examples
FEW = 0.01  # a kind of task below this share of the rows counts as missing
SEVERITIES = ("error", "warning", "note")


@dataclass
class Finding:
    """Rows of one split with the same trouble. rows: the first LISTED of them; reasons: what is said of them."""

    code: str
    split: str
    count: int = 0
    rows: list[int | str] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    last: int | str = ""

    def add(self, row: int | str, reason: str = "") -> None:
        if row != self.last:  # rows come in order; one with several faults counts once
            self.count += 1
            if len(self.rows) < LISTED:
                self.rows.append(row)
        self.last = row
        if reason and (reason in self.reasons or len(self.reasons) < LISTED):
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def as_json(self) -> dict[str, Any]:
        severity, what, fix = lint.KINDS[self.code]
        shared = {"severity": severity, "code": self.code, "split": self.split, "count": self.count}
        said = {"reasons": self.reasons} if self.reasons else {}
        return {**shared, "what": what, "fix": fix, "rows": self.rows, **said}


@dataclass
class Split:
    """What one split holds. several: it has more than one file; used: rows that give examples; counts: of formats,
    outcomes (of rows), roles, turns (answers per row), tasks, scripts, systems (by hash; None: rows without one),
    lengths (examples by tokens); prefix: token ids that every example begins with; names, hashes, questions,
    signatures: of each row that could be read; expansion, kinds: how turns are trained.
    """

    name: str
    file: str
    several: bool = False
    counts: dict[str, Counter[Any]] = field(default_factory=lambda: defaultdict(Counter))
    rows: int = 0
    used: int = 0
    examples: int = 0
    tokens: int = 0
    targets: int = 0
    prefix: np.ndarray | None = None
    names: list[int | str] = field(default_factory=list)
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    questions: array[int] = field(default_factory=lambda: array("Q"))
    signatures: list[np.ndarray] = field(default_factory=list)
    findings: dict[str, Finding] = field(default_factory=dict)
    expansion: Expansion = field(default_factory=Expansion)
    kinds: Kinds = field(default_factory=Kinds)

    def find_unused(self, names: Sequence[str]) -> None:
        """names: of data files or splits that stand beside this one and that nothing reads."""
        for name in names:
            self.find("unused", name)

    def name_of(self, row: Record | Bad) -> int | str:
        return f"{Path(row.file).name}:{row.row}" if self.several else row.row

    def find(self, code: str, row: int | str, reason: str = "") -> None:
        self.findings.setdefault(code, Finding(code, self.name)).add(row, reason)

    def find_all(self, code: str, rows: np.ndarray) -> None:
        """rows: [N] bool, of those that could be read."""
        for place in np.flatnonzero(rows).tolist():
            self.find(code, self.names[place])


def survey(out: Split, records: Iterator[Record | Bad], renderer: Renderer, progress: Callable[[int], None]) -> None:
    """Read one split whole. Rows are measured before they are cut: max_tokens only decides what counts as shortened."""
    limit = renderer.section.max_tokens
    uncut = renderer.uncut()
    for chunk in chunks(records):
        good = []
        for item in chunk:
            if isinstance(item, Bad):
                out.counts["outcomes"]["unreadable"] += 1
                out.find("bad", out.name_of(item), item.reason)
            else:
                good.append(item)
                _count(out, item)
        if good:
            markup = lint.Markup(renderer.tokenizer)  # known once a conversation came: rows choose the template
            for record in good:
                for code, reason in markup.codes(record):
                    out.find(code, out.name_of(record), reason)
        for _, parts in groupby(uncut.stream(good), key=lambda row: id(row.record)):
            made = list(parts)
            out.expansion.add(made, limit)
            out.kinds.add(made, out.name_of(made[0].record), limit)
            left = any(row.example is not None and row.example.mask[1:limit].any() for row in made)
            found = [_measure(out, row, limit, left) for row in made]
            trained = [outcome for outcome in found if outcome in TRAINED]
            out.counts["outcomes"][max(trained, key=TRAINED.index) if trained else found[0]] += 1
            out.used += bool(trained)
        if good:
            out.signatures.append(np.array([duplicates.signature(duplicates.words_of(record)) for record in good]))
        out.rows += len(chunk)
        progress(out.rows)
    if out.names:
        equal = np.ones(len(out.names), bool)
        equal[np.unique(np.array(out.hashes), return_index=True)[1]] = False
        near = duplicates.near(np.concatenate(out.signatures)) != np.arange(len(equal))
        out.find_all("duplicate", equal)
        out.find_all("near duplicate", near & ~equal)
        out.signatures.clear()
    systems = out.counts["systems"]
    if len(systems) > 1 and systems[None]:
        out.findings["system"] = Finding("system", out.name, systems[None])
    if out.counts["turns"] and not renderer.template.ends_answers(renderer.section.expand_turns == "none"):
        out.findings["no end"] = Finding("no end", out.name, out.counts["turns"].total())


def _count(out: Split, record: Record) -> None:
    """What the row holds, whatever becomes of it."""
    name, messages = out.name_of(record), record.messages or []
    out.names.append(name)
    out.hashes.append(duplicates.content_hash(record))
    asked = [message["content"] for message in takewhile(lambda message: message["role"] != "assistant", messages)]
    out.questions.append(duplicates.hash_of(json.dumps(asked)) if asked else 0)
    out.counts["formats"][record.format] += 1
    out.counts["roles"].update(message["role"] for message in messages)
    if messages:
        out.counts["turns"][sum(message["role"] == "assistant" for message in messages)] += 1
        out.counts["tasks"][lint.task_of(record)] += 1
        system = next((m["content"] for m in messages if m["role"] in ("system", "developer")), None)
        out.counts["systems"][None if system is None else duplicates.hash_of(system)] += 1
    said = " ".join([record.text or "", *(str(message["content"]) for message in messages)])
    out.counts["scripts"].update(lint.scripts_of(said))
    for code in lint.codes(record):
        out.find(code, name)


def _measure(out: Split, row: Row, limit: int, left: bool) -> str:
    """What becomes of an example: one of TRAINED, or why it is dropped. left: some example of its row is not."""
    name, dropped, example = out.name_of(row.record), row.dropped, row.example
    code = "refused" if dropped.startswith("the chat template") else "dropped"
    for damage in row.damage:
        out.find("damaged", name, damage.text)
    if example is not None:
        length, supervised = len(example.ids), np.flatnonzero(example.mask)
        targets = int(((supervised > 0) & (supervised < limit)).sum())
        out.counts["lengths"][length] += 1
        if targets:
            out.examples += 1
            out.tokens += min(length, limit)
            out.targets += targets
            ids = np.asarray(example.ids[:limit], np.int32)
            known = ids if out.prefix is None else out.prefix
            out.prefix = known[: common(known, ids)].copy()
            if length > limit:
                out.find("shortened", name)
        else:
            dropped, code = NO_TARGET.format(limit), "shortened" if left else "too long"
    if dropped:
        out.find(code, name, dropped)
        return f"dropped: {dropped}"
    return TRAINED[example is not None and len(example.ids) > limit]


def leaks(train: Split, valid: Split) -> None:
    """Rows, and questions, of valid that are also in train."""
    same = np.isin(np.array(valid.hashes), np.array(train.hashes))
    asked = np.array(valid.questions)
    known = np.isin(asked, np.array(train.questions)) & (asked != 0)
    valid.find_all("leak", same)
    valid.find_all("question leak", known & ~same)


def report(splits: dict[str, Split], config: Config) -> dict[str, Any]:
    """Everything as one JSON document. The findings come first the errors, then warnings, then notes."""
    found = [finding.as_json() for split in splits.values() for finding in split.findings.values()]
    found.sort(key=lambda finding: (SEVERITIES.index(finding["severity"]), -finding["count"]))
    return {"splits": {name: _facts(split, config) for name, split in splits.items()}, "findings": found}


def _facts(split: Split, config: Config) -> dict[str, Any]:
    section, limit = config.train, config.data.max_tokens
    counts = {name: dict(split.counts[name].most_common()) for name in ("outcomes", "roles", "tasks", "scripts")}
    known = sorted(split.counts["lengths"].items())
    lengths = np.repeat(np.array([at for at, _ in known], np.int64), [count for _, count in known])
    quantiles = {str(q): int(np.quantile(lengths, q / 100)) for q in (5, 25, 50, 75, 95, 99)} if known else {}
    batch = section.batch_rows or DEFAULT_ROWS
    if section.batch_tokens:
        steps = -(-split.tokens // (section.batch_tokens * section.accumulate))
    else:
        steps = -(-split.used // (batch * section.accumulate))
    prefix = len(split.prefix) if split.prefix is not None and split.examples > 1 else 0
    saved = prefix * split.examples * (batch - 1) / batch / split.tokens if split.tokens else 0.0
    tasks = counts["tasks"]
    few = sum(tasks.values()) * FEW
    missing = [name for name in lint.TASKS if tasks.get(name, 0) < few] if few >= 1 else []  # few rows say nothing
    systems = split.counts["systems"]
    return {
        "file": split.file,
        "rows": split.rows,
        "formats": dict(split.counts["formats"]),
        "outcomes": counts["outcomes"],
        "examples": split.examples,
        "tokens": split.tokens,
        "supervised_tokens": split.targets,
        "conversations": asdict(split.expansion) if split.expansion.rows else {},
        "turns": {
            kind: {"count": split.kinds.counts[kind], "rows": split.kinds.rows[kind]} for kind in split.kinds.counts
        },
        "lengths": {
            "quantiles": quantiles,
            "longest": int(lengths.max(initial=0)),
            "cut_share": float((lengths > limit).mean()) if known else 0.0,
            "max_tokens": limit,
            "histogram": _histogram(lengths),
        },
        "roles": counts["roles"],
        "answers_per_row": {str(turns): count for turns, count in sorted(split.counts["turns"].items())[:20]},
        "system_prompts": {"distinct": len(systems.keys() - {None}), "rows_without": systems[None]},
        "tasks": tasks,
        "tasks_missing": missing,
        "scripts": counts["scripts"],
        "shared_prefix_tokens": prefix,
        "shared_prefix_saves": round(saved, 4),
        "steps_per_epoch": steps,
    }


def _histogram(lengths: np.ndarray, bars: int = 12) -> list[list[int]]:
    """[from, to, rows] of equally wide bins of tokens; the last one holds the few rows that are far longer."""
    if not len(lengths):
        return []
    usual = int(min(lengths.max(), 1.3 * np.quantile(lengths, 0.99)))
    step = next(
        size for power in range(9) for size in (10**power, 2 * 10**power, 5 * 10**power) if usual // size < bars
    )
    starts = list(range(0, usual + 1, step))
    ends = [*(start - 1 for start in starts[1:]), max(int(lengths.max()), starts[-1] + step - 1)]
    return [[at, to, int(((lengths >= at) & (lengths <= to)).sum())] for at, to in zip(starts, ends, strict=True)]

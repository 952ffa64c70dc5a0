"""A survey of training data, one pass in bounded memory: what will be trained on, and what looks wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mlxtune.config import Config
from mlxtune.data import duplicates, lint
from mlxtune.data.batches import DEFAULT_ROWS, common
from mlxtune.data.examples import Renderer, Row
from mlxtune.data.files import Bad
from mlxtune.data.records import Record

CHUNK = 512
LISTED = 200  # rows that a finding names
FILE = 1 << 40  # more than the lines of any file
FEW = 0.01  # a kind of task below this share of the rows counts as missing
SEVERITIES = ("error", "warning", "note")


@dataclass
class Finding:
    """Rows of one split with the same trouble. rows: the first LISTED line numbers; examples: what is said of them."""

    code: str
    split: str
    count: int = 0
    rows: list[int | str] = field(default_factory=list)
    examples: dict[str, int] = field(default_factory=dict)
    last: int | str = ""

    def add(self, row: int | str, said: str = "") -> None:
        if row != self.last:  # rows come in order; one with several faults counts once
            self.count += 1
            if len(self.rows) < LISTED:
                self.rows.append(row)
        self.last = row
        if said and (said in self.examples or len(self.examples) < LISTED):
            self.examples[said] = self.examples.get(said, 0) + 1

    def as_json(self) -> dict[str, Any]:
        kind = lint.KINDS[self.code]
        said = {"reasons": self.examples} if self.examples else {}
        shared = {"severity": kind.severity, "code": self.code, "split": self.split, "count": self.count}
        return {**shared, "what": kind.what, "fix": kind.fix, "rows": self.rows, **said}


@dataclass
class Split:
    """What one split holds. lengths: examples by number of tokens; prefix: token ids that every example begins with."""

    name: str
    file: str
    formats: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    systems: Counter[int] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    targets: int = 0
    prefix: np.ndarray | None = None
    hashes: list[np.ndarray] = field(default_factory=list)
    questions: list[np.ndarray] = field(default_factory=list)
    signatures: list[np.ndarray] = field(default_factory=list)
    numbers: list[np.ndarray] = field(default_factory=list)
    findings: dict[str, Finding] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def find(self, code: str, row: Record | Bad, said: str = "") -> None:
        self.find_number(code, self.number(row), said)

    def find_number(self, code: str, number: int, said: str = "") -> None:
        file, row = divmod(number, FILE)
        shown = row if len(self.files) < 2 else f"{Path(self.files[file]).name}:{row}"
        self.findings.setdefault(code, Finding(code, self.name)).add(shown, said)

    def number(self, row: Record | Bad) -> int:
        """A row's line, and which file it is in, as one number."""
        if row.file not in self.files[-1:]:
            self.files.append(row.file)
        return (len(self.files) - 1) * FILE + row.row


def survey(
    name: str,
    file: str,
    records: Iterator[Record | Bad],
    renderer: Renderer,
    progress: Callable[[int], None] = lambda rows: None,
) -> Split:
    """Read one split whole. Rows are measured before they are cut: max_tokens only decides what counts as shortened."""
    limit = renderer.section.max_tokens
    uncut = Renderer(renderer.tokenizer, renderer.section.model_copy(update={"max_tokens": 1 << 31}))
    out = Split(name, file)
    while chunk := list(islice(records, CHUNK)):
        for item in chunk:
            out.rows += 1
            if isinstance(item, Bad):
                out.outcomes["unreadable"] += 1
                out.find("bad", item, item.reason)
        good = [record for record in chunk if isinstance(record, Record)]
        for record in good:
            _count(out, record)
        for row in uncut.rows(good):
            _measure(out, row, limit)
        if good:
            out.hashes.append(np.array([duplicates.content_hash(record) for record in good], np.uint64))
            out.questions.append(np.array([_question(record) for record in good], np.uint64))
            out.numbers.append(np.array([out.number(record) for record in good], np.int64))
            out.signatures.append(np.stack([duplicates.signature(duplicates.words_of(record)) for record in good]))
        progress(out.rows)
    _repeated(out)
    if len(out.systems) > 1 and out.systems.get(0):
        out.findings["system"] = Finding("system", name, out.systems[0])
    if out.turns and not renderer.template.end_of_turn:
        out.findings["no end"] = Finding("no end", name, sum(out.turns.values()))
    return out


def _count(out: Split, record: Record) -> None:
    """What the row holds, whatever becomes of it."""
    out.formats[record.format] += 1
    messages = record.messages or []
    out.roles.update(message["role"] for message in messages)
    if messages:
        out.turns[sum(message["role"] == "assistant" for message in messages)] += 1
        out.tasks[lint.task_of(record)] += 1
        system = next((m["content"] for m in messages if m["role"] in ("system", "developer")), None)
        out.systems[0 if system is None else _hash(system)] += 1
    out.scripts.update(lint.scripts_of(" ".join([record.text or "", *(str(m["content"]) for m in messages)])))
    for code in lint.codes(record):
        out.find(code, record)


def _measure(out: Split, row: Row, limit: int) -> None:
    """What becomes of the row."""
    for damage in row.damage:
        out.find("damaged", row.record, damage.text)
    if row.example is None:
        out.outcomes[f"dropped: {row.dropped}"] += 1
        out.find("dropped", row.record, row.dropped)
        return
    length, supervised = len(row.example.ids), np.flatnonzero(row.example.mask)
    targets = int(((supervised > 0) & (supervised < limit)).sum())
    if length > limit and not targets:
        out.outcomes[f"dropped: no supervised token in the first {limit} tokens"] += 1
        out.find("dropped", row.record, f"no supervised token in the first {limit} tokens")
    elif length > limit:
        out.find("shortened", row.record)
    if targets:
        out.outcomes["shortened" if length > limit else "used"] += 1
        out.examples += 1
        out.tokens += min(length, limit)
        out.targets += targets
        ids = np.asarray(row.example.ids[:limit], np.int32)
        known = ids if out.prefix is None else out.prefix
        out.prefix = known[: common(known, ids)].copy()
    out.lengths[length] += 1


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) | 1


def _question(record: Record) -> int:
    """What comes before the first answer."""
    asked = []
    for message in record.messages or []:
        if message["role"] == "assistant":
            break
        asked.append(message["content"])
    return _hash(json.dumps(asked)) if asked else 0


def _repeated(out: Split) -> None:
    """Equal and nearly equal rows."""
    if not out.hashes:
        return
    hashes, numbers = np.concatenate(out.hashes), np.concatenate(out.numbers)
    _, first = np.unique(hashes, return_index=True)
    equal = np.ones(len(hashes), bool)
    equal[first] = False
    near = duplicates.near(np.concatenate(out.signatures)) != np.arange(len(hashes))
    for code, rows in (("duplicate", equal), ("near duplicate", near & ~equal)):
        for number in numbers[rows].tolist():
            out.find_number(code, number)
    out.signatures.clear()


def leaks(train: Split, valid: Split) -> None:
    """Rows, and questions, of valid that are also in train."""
    if not train.hashes or not valid.hashes:
        return
    numbers = np.concatenate(valid.numbers)
    same = np.isin(np.concatenate(valid.hashes), np.concatenate(train.hashes))
    asked = np.concatenate(valid.questions)
    known = np.isin(asked, np.concatenate(train.questions)) & (asked != 0)
    for code, rows in (("leak", same), ("question leak", known & ~same)):
        for number in numbers[rows].tolist():
            valid.find_number(code, number)


def report(splits: dict[str, Split], config: Config) -> dict[str, Any]:
    """Everything as one JSON document. The findings come first the errors, then warnings, then notes."""
    found = [finding.as_json() for split in splits.values() for finding in split.findings.values()]
    found.sort(key=lambda finding: (SEVERITIES.index(finding["severity"]), -finding["count"]))
    return {"splits": {name: _facts(split, config) for name, split in splits.items()}, "findings": found}


def _facts(split: Split, config: Config) -> dict[str, Any]:
    section = config.train
    lengths = (
        np.repeat(*(np.array(part, np.int64) for part in zip(*sorted(split.lengths.items()), strict=True)))
        if split.lengths
        else np.zeros(0, np.int64)
    )
    limit = config.data.max_tokens
    rows_per_step = (section.batch_rows or DEFAULT_ROWS) * section.accumulate
    per_step = section.batch_tokens * section.accumulate if section.batch_tokens else 0
    steps = -(-split.tokens // per_step) if per_step else -(-split.examples // rows_per_step)
    prefix = len(split.prefix) if split.prefix is not None and split.examples > 1 else 0
    batch = section.batch_rows or DEFAULT_ROWS
    saved = prefix * split.examples * (batch - 1) / batch / split.tokens if split.tokens else 0.0
    named = dict(split.tasks.most_common())
    total = max(1, sum(named.values()))
    enough = total * FEW >= 1  # among fewer rows the lack of a kind says nothing
    missing = [name for name in lint.TASKS if named.get(name, 0) / total < FEW] if enough else []
    systems = {"distinct": len([key for key in split.systems if key]), "rows_without": split.systems.get(0, 0)}
    return {
        "file": split.file,
        "rows": split.rows,
        "formats": dict(split.formats),
        "outcomes": dict(split.outcomes.most_common()),
        "examples": split.examples,
        "tokens": split.tokens,
        "supervised_tokens": split.targets,
        "lengths": {
            "quantiles": {str(q): int(np.quantile(lengths, q / 100)) for q in (5, 25, 50, 75, 95, 99)}
            if len(lengths)
            else {},
            "longest": int(lengths.max(initial=0)),
            "cut_share": float((lengths > limit).mean()) if len(lengths) else 0.0,
            "max_tokens": limit,
            "histogram": _histogram(lengths),
        },
        "roles": dict(split.roles.most_common()),
        "answers_per_row": {str(turns): count for turns, count in sorted(split.turns.items())[:20]},
        "system_prompts": systems,
        "tasks": named,
        "tasks_missing": missing,
        "scripts": dict(split.scripts.most_common()),
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

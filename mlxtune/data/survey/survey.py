"""A survey of training data: what will be trained on, and what looks wrong with it.

Each split is read once, a chunk of rows at a time. Of each row are counted what it holds, whatever becomes of it
(format, roles, tasks, scripts), and what training would make of it (examples, tokens, targets, or why there are none).
Rows are rendered whole, and cut only in the counting: so it is known how long they are and what max_tokens would keep.
What is kept of a row does not depend on its length (`SplitSurvey`); a chunk is bounded by `formats.chunks`. When all
rows are read, equal and nearly equal ones are looked for, and rows that two splits share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from textwrap import shorten
from typing import Any

import numpy as np

from mlxtune.config.preference import OF_PAIRS, OF_RATED
from mlxtune.config.resolve import Config
from mlxtune.data.chat.by_row import by_row
from mlxtune.data.chat.renderer import NO_TARGET, Renderer, Row, by_record
from mlxtune.data.dataset import duplicates, holdout, sources
from mlxtune.data.dataset.beginnings import common
from mlxtune.data.dataset.store_writing import Progress
from mlxtune.data.rows.formats import Record, chunks
from mlxtune.data.rows.rated import RATED_BAD, UNRATED
from mlxtune.data.rows.readers import Bad
from mlxtune.data.rows.two_sides import TwoSides, records_of, together
from mlxtune.data.survey import consistency, lint, report, sampling, subjects
from mlxtune.data.survey.markup import Markup
from mlxtune.data.survey.preferences import PAIRS, RATED
from mlxtune.data.survey.split_survey import SplitSurvey

USED, SHORTENED = "used", "shortened"  # outcomes of a row that gives examples
LONGEST_PROMPT = 200  # letters of the chat template's own system prompt that are told
DAMAGED = "damaged by the chat template"  # as training names them: it stops for them, or leaves them out; kept: used
CUT = "no answer of a preference is cut, and it ends after data.max_tokens"


def survey(
    config: Config, renderer: Renderer, progress: Progress, most: int | None = None, local_only: str = ""
) -> dict[str, Any]:
    """The report on all splits of all sources of a configuration, as `report.report` makes it.

    progress: called with the name of a split's first file, and how many of the split's rows were read; most: of a split
    that has more rows a sample of so many is looked at; local_only: as `sources.files_by_split`.
    """
    splits: dict[str, SplitSurvey] = {}
    for number, source in enumerate(config.data.mixture(), 1):
        found = sources.files_by_split(source, config.data.hub == "stream", local_only, bool(config.preference.loss))
        for split, files in found.items():
            name = split if config.data.sources is None else f"{split} {number}"
            out = SplitSurvey(name, files[0].name, several=len(files) > 1)
            records: Iterator[Record | Bad] = chain.from_iterable(file.read() for file in files)
            if most is not None:
                chosen = sampling.sample(records, most, config.train.seed)
                records, out.sample = iter(chosen.rows), chosen.line(config.train.seed)
            read_split(out, records, renderer, progress)
            _find_untrained(out, config.preference.loss)
            if split == "train":
                out.find_unused(sources.unused(found))
            splits[name] = out
    _hold_out(splits, config)
    _find_few(splits)
    _find_styles(splits)
    for name, other in splits.items():
        for trained, train in splits.items():
            if trained.startswith("train") and not name.startswith("train"):
                _find_leaks(train, other)
    return report.report(splits, config)


def _hold_out(splits: dict[str, SplitSurvey], config: Config) -> None:
    """Count the rows that training would hold out of the train files of sources without a valid file."""
    for name, split in splits.items():
        if name.startswith("train") and name.replace("train", "valid", 1) not in splits:
            hashes = np.array(split.used_hashes, np.uint64)
            highest = holdout.limit(hashes, config.data.valid_fraction, config.train.seed)
            if highest is not None:
                split.held_out = int((holdout.seeded(hashes, config.train.seed) <= highest).sum())


def read_split(out: SplitSurvey, records: Iterator[Record | Bad], renderer: Renderer, progress: Progress) -> None:
    """Read one split whole, and fill in what is known of it."""
    limit = renderer.section.max_tokens
    uncut = renderer.uncut()
    markup = Markup(renderer.tokenizer)
    for chunk in chunks(records):
        good: list[Record | TwoSides] = []
        for row in together(chunk):
            out.rows += 1
            if isinstance(row, Bad):
                out.outcomes["unreadable"] += 1
                out.find("bad", out.name_of(row), row.reason)
            else:
                good.append(row)
                _count(out, row)
        for row in good:
            for record in records_of(row):
                for code, reason in markup.codes(record):
                    out.find(code, out.name_of(record), reason)
        made = by_row(uncut.stream(record for row in good for record in records_of(row)))
        for row, parts in zip(good, made, strict=True):
            record = records_of(row)[0]
            damaged = any(part.damage for part in parts) and renderer.section.on_damage != "keep"
            count = _count_preference if record.side else _count_row
            is_used = count(out, parts, limit, damaged)
            if is_used:
                out.used_hashes.append(duplicates.asked_hash(record))
        if good:
            out.signatures.append(np.array([_signature(row) for row in good]))
        progress(out.file, out.rows)
    _find_duplicates(out)
    _find_preferences(out)
    if len(out.systems) > 1 and out.systems[None]:
        out.find_many("system", out.systems[None])
    if out.systems[None] and renderer.template.own_system:
        said = shorten(renderer.template.own_system, LONGEST_PROMPT, placeholder=" ...")
        out.find_many("own system", out.systems[None], [said])
    if out.answers and not renderer.template.ends_answers(renderer.section.expand_turns == "none"):
        out.find_many("no end", out.answers.total())


def _signature(row: Record | TwoSides) -> np.ndarray:
    """By which nearly equal rows are found; of a pair that of all it says."""
    words: list[str] = []
    for record in records_of(row):
        words += duplicates.words_of(record)
    return duplicates.signature(words)


def _count(out: SplitSurvey, row: Record | TwoSides) -> None:
    """What the row holds, whatever becomes of it. What is said of conversations is said of a pair's chosen side."""
    record = records_of(row)[0]
    name, messages = out.name_of(record), record.messages or []
    out.preferences.add(row, len(out.names))
    out.names.append(name)
    out.hashes.append(duplicates.hash_of_row(records_of(row)))
    out.questions.append(_question_hash(record))
    out.formats[record.format] += 1
    out.roles.update(message["role"] for message in messages)
    if messages:
        out.answers[sum(message["role"] == "assistant" for message in messages)] += 1
        out.tasks[subjects.task_of(record)] += 1
        out.english += subjects.is_english(subjects.first_question(record))
        out.talks.update(subjects.kinds_of(record))
        out.style.add(record)
        out.systems[_system_hash(record)] += 1
    texts = [record.text or "", *(str(message["content"]) for message in messages)]
    out.scripts.update(subjects.scripts_of(" ".join(texts)))
    made = record.fields.get("made")
    if isinstance(made, dict):
        out.made[str(made.get("how") or "not said")] += 1
    if record.may_be_rated:
        out.find("label", name)
    for code in lint.codes_of_pair(row) if isinstance(row, TwoSides) else lint.codes(row):
        out.find(code, name)
        out.talks["refusal"] += code == "refusal"


def _question_hash(record: Record) -> int:
    """Of what is said before the first answer; 0 where nothing is."""
    asked = []
    for message in record.messages or []:
        if message["role"] == "assistant":
            break
        asked.append(message["content"])
    return duplicates.hash_of(json.dumps(asked)) if asked else 0


def _system_hash(record: Record) -> int | None:
    """Of the first system prompt; None where there is none."""
    for message in record.messages or []:
        if message["role"] in ("system", "developer"):
            return duplicates.hash_of(message["content"])
    return None


def _count_row(out: SplitSurvey, parts: list[Row], limit: int, damaged: bool) -> bool:
    """Count what training would make of a row, and say whether it would train on it. parts: all that was made of it,
    uncut; limit: data.max_tokens; damaged: the template loses some of it, so that training does not take it.
    """
    out.expansion.add(parts, limit)
    out.kinds.add(parts, out.name_of(parts[0].record), limit)
    gives_examples = any(part.example is not None and part.example.mask[1:limit].any() for part in parts)
    outcomes = [_count_part(out, part, limit, gives_examples) for part in parts]
    if damaged:
        outcome = DAMAGED
    elif SHORTENED in outcomes:
        outcome = SHORTENED
    elif USED in outcomes:
        outcome = USED
    else:
        outcome = outcomes[0]
    out.outcomes[outcome] += 1
    return outcome in (USED, SHORTENED)


def _count_preference(out: SplitSurvey, parts: list[Row], limit: int, damaged: bool) -> bool:
    """Count what training would make of a pair or a rated answer, all of it or nothing, and say whether it would train
    on it. parts: all its examples, uncut; limit, damaged: as in `_count_row`.
    """
    name = out.name_of(parts[0].record)
    for side in by_record(parts):
        out.expansion.add(side, limit)
        out.kinds.add(side, name, limit)
    for row in parts:
        for damage in row.damage:
            out.find("damaged", name, damage.text)
        if row.example is not None:
            out.lengths[len(row.example.ids)] += 1
    code, reason = _why_no_preference(parts, limit)
    if reason:
        out.find(code, name, reason)
        out.outcomes[f"dropped: {reason}"] += 1
        return False
    if damaged:
        out.outcomes[DAMAGED] += 1
        return False
    out.outcomes[USED] += 1
    out.preferences.add_used(parts)
    for row in parts:
        assert row.example is not None
        _add_example(out, row.example.ids[:limit])
        out.targets += int(np.asarray(row.example.mask[1:]).sum())
    return True


def _why_no_preference(parts: list[Row], limit: int) -> tuple[str, str]:
    """(Code of a finding, the reason) why a row of preferences is dropped; ("", "") for one that is used."""
    for row in parts:
        if row.example is None:
            return "refused" if row.dropped.startswith("the chat template") else "dropped", row.dropped
    for row in parts:
        if any(end > limit for _, end in row.ends):
            return "too long", f"{CUT} {limit}"
    return "", ""


def _count_part(out: SplitSurvey, part: Row, limit: int, gives_examples: bool) -> str:
    """What becomes of one example: USED, SHORTENED, or why it is dropped. gives_examples: the row, this or others."""
    name = out.name_of(part.record)
    for damage in part.damage:
        out.find("damaged", name, damage.text)
    if part.example is None:
        code = {RATED_BAD: "rated", UNRATED: "unrated"}.get(part.dropped, "dropped")
        if part.dropped.startswith("the chat template"):
            code = "refused"
        out.find(code, name, part.dropped)
        return f"dropped: {part.dropped}"
    length = len(part.example.ids)
    out.lengths[length] += 1
    supervised = np.flatnonzero(part.example.mask)
    targets = int(((supervised > 0) & (supervised < limit)).sum())
    if not targets:
        reason = NO_TARGET.format(limit)
        out.find("shortened" if gives_examples else "too long", name, reason)
        return f"dropped: {reason}"
    out.targets += targets
    _add_example(out, part.example.ids[:limit])
    if length <= limit:
        return USED
    out.find("shortened", name)
    return SHORTENED


def _add_example(out: SplitSurvey, tokens: Any) -> None:
    """Count an example that is trained on. tokens: [T] its ids, as they are cut."""
    ids = np.asarray(tokens, np.int32)
    out.examples += 1
    out.tokens += len(ids)
    prefix = ids if out.prefix is None else out.prefix
    out.prefix = prefix[: common(prefix, ids)].copy()


def _find_duplicates(out: SplitSurvey) -> None:
    """Rows equal, or nearly equal, to an earlier one."""
    if not out.names:
        return
    is_equal = np.ones(len(out.names), bool)
    is_equal[np.unique(np.array(out.hashes), return_index=True)[1]] = False
    is_near = duplicates.near(np.concatenate(out.signatures)) != np.arange(len(out.names))
    out.find_all("duplicate", is_equal)
    out.find_all("near duplicate", is_near & ~is_equal)
    out.signatures.clear()


def _find_preferences(out: SplitSurvey) -> None:
    """What pairs and rated answers show together."""
    known = out.preferences
    contradicted, both_ways = known.contradicted()
    for code, places in (("contradiction", contradicted), ("both ways", both_ways)):
        for place in sorted(places):
            out.find(code, out.names[place])
    bias = known.length_bias()
    if bias is not None:
        code, said = bias
        out.find_many(code, known.used, [said])
    one_sided = known.one_sided()
    if one_sided:
        out.find_many("one-sided", known.good + known.bad, [one_sided])
    most = known.kinds.most_common(1)[0][1] if known.kinds else 0
    others = known.kinds.total() - most
    if others:
        out.find_many("mixed", others, [f"{kind}: {count:,}" for kind, count in known.kinds.most_common()])


def _find_untrained(out: SplitSurvey, objective: str) -> None:
    """Rows that the objective is not for. objective: preference.loss; "": none is set."""
    if not objective:
        return
    trained = [kind for kind, losses in ((PAIRS, OF_PAIRS), (RATED, OF_RATED)) if objective in losses]
    others = {kind: count for kind, count in out.preferences.kinds.items() if kind not in trained}
    if others:
        reasons = [f"{objective} is not for {kind}" for kind in others]
        out.find_many("objective", sum(others.values()), reasons)


def _find_few(splits: dict[str, SplitSurvey]) -> None:
    """Too few conversations to train on, in all sources together; of texts the tokens count, not the rows."""
    trained = [split for name, split in splits.items() if name.startswith("train")]
    conversations = sum(split.answers.total() for split in trained)
    is_sample = any(split.sample for split in trained)
    if 0 < conversations < lint.FEW_ROWS and not is_sample:
        trained[0].find_many("few", conversations)


def _find_styles(splits: dict[str, SplitSurvey]) -> None:
    """Sources whose conversations are written otherwise than those of the first."""
    styles = {name: split.style for name, split in splits.items() if name.startswith("train")}
    for name, said in consistency.differences(styles).items():
        splits[name].find_many("style", splits[name].style.conversations, said)


def _find_leaks(train: SplitSurvey, other: SplitSurvey) -> None:
    """Rows, and questions, of another split that are also in train."""
    is_same = np.isin(np.array(other.hashes), np.array(train.hashes))
    questions = np.array(other.questions)
    is_asked = np.isin(questions, np.array(train.questions)) & (questions != 0)
    other.find_all("leak", is_same)
    other.find_all("question leak", is_asked & ~is_same)

"""The page of a run from its folder alone: what it says of runs that went well, went wrong, or were damaged."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import hostile
import page_readers
import pages
import pytest

from mlxtune.report import series
from mlxtune.report.composed import as_json, of_run
from mlxtune.report.run_record import read_run
from mlxtune.train.events import EVENTS_FILE
from mlxtune.train.run_folder import CONFIG_FILE

Events = list[dict[str, Any]]


def made(folder: Path, events: Events, config: dict[str, Any] | None = None) -> str:
    """The page of a run of these events. Every page is whole, and leads nowhere."""
    return page_readers.whole(of_run(read_run(pages.write(folder / "run", events, config))))


def test_a_run_that_went_well_is_told_in_a_sentence_with_numbers(tmp_path: Path) -> None:
    page = made(tmp_path, pages.told(20))
    assert not re.search(r"https?:|src=|url\(|style=", page)
    text = page_readers.said(page)
    assert "Good: model was tuned for 20 steps." in text
    assert "the loss went from 3.5000 before the first step to 0.3429 nats a token at step 20: 90% lower." in text
    for heading in ("Curves", "Memory and time", "Configuration"):
        assert heading in text
    assert "No evaluation of its answers was found" in text


def test_the_page_is_the_same_for_the_same_folder(tmp_path: Path) -> None:
    first = made(tmp_path, pages.told(30))
    time.sleep(0.01)
    assert of_run(read_run(tmp_path / "run")) == first


def test_the_record_holds_every_number_of_the_events_with_all_digits(tmp_path: Path) -> None:
    rng = random.Random(1)
    events = [pages.begun(300)]
    for step in range(1, 301):
        events.append(
            pages.event(step, rng.random(), lr=rng.random(), grad_norm=rng.random(), tokens=rng.randrange(999))
        )
        if step % 50 == 0:
            events.append(pages.evaluated(step, rng.random()))
    page = made(tmp_path, events)
    curves = page_readers.record(page)["curves"]
    for name in ("loss", "lr", "grad_norm", "peak_bytes"):
        assert curves[name] == [[one["step"], one[name]] for one in events if one["kind"] == "train"]
    assert curves["validation"] == [[one["step"], one["loss"]] for one in events if one["kind"] == "eval"]
    assert curves["tokens_per_second"] == [[e["step"], e["tokens"] / 0.5] for e in events if e["kind"] == "train"]
    assert as_json(read_run(tmp_path / "run")) == page_readers.record(page)


def test_a_step_that_is_missing_is_a_gap(tmp_path: Path) -> None:
    page = made(tmp_path, [pages.begun(6), *[pages.event(step, 2.0) for step in (1, 2, 5, 6)]])
    gap = [[1, 2.0], [2, 2.0], [3, None], [5, 2.0], [6, 2.0]]
    assert page_readers.record(page)["curves"]["loss"] == page_readers.record(page)["curves"]["smoothed_loss"] == gap


def test_the_running_mean_is_as_its_formula_says() -> None:
    assert series.smoothed([(1, 4.0), (2, 1.0), (3, None), (4, 1.0)], 1) == [
        (1, 4.0),
        (2, 2.0),
        (3, None),
        (4, pytest.approx((4 / 8 + 1 / 4 + 1) / (1 / 8 + 1 / 4 + 1))),
    ]


def of(steps: int, *more: dict[str, Any], without: tuple[str, ...] = (), **begin: Any) -> Events:
    events = [one for one in pages.told(steps) if one["kind"] not in without]
    return [{**events[0], **begin}, *events[1:], *more]


WENT_ON = {"kind": "begin", "step": 5, "steps": 12, "model": "model", "computed": "the plain way"}
# What happened -> (the events, what the page must say of it, what it must not say).
STORIES: dict[str, tuple[Events, tuple[str, ...], tuple[str, ...]]] = {
    "no evaluation": (
        of(9, without=("eval",)),
        ("Nothing was measured on held-out rows after a step: whether it is better is not known.",),
        ("Good:", "Bad:"),
    ),
    "killed": (
        of(9, without=("end",)),
        ("It ended without a word: it was killed, or the machine stopped; it left no checkpoint.",),
        ("It was interrupted",),
    ),
    "killed before the end": (
        [pages.begun(40), *[pages.event(step) for step in range(1, 8)]],
        ("model was tuned for 7 of 40 steps.",),
        (),
    ),
    "interrupted": (
        [*of(9, without=("end",)), {"kind": "end", "step": 9, "state": "interrupted"}],
        ("It was interrupted; it left no checkpoint.",),
        ("without a word",),
    ),
    "its GPU failed": (
        [*of(9, without=("end",)), {"kind": "end", "step": 9, "state": "interrupted", "reason": "out of memory"}],
        ("It was interrupted (out of memory); it left no checkpoint.",),
        (),
    ),
    "failed": (
        [*of(9, without=("end",)), {"kind": "end", "step": 9, "state": "failed"}],
        ("It failed.",),
        ("Good: It",),
    ),
    "no step": ([pages.begun(9)], ("No step was taken", "is not known"), ("Good:",)),
    "steps taken back": (
        [*of(8, without=("end",)), WENT_ON, *[pages.event(step) for step in range(6, 13)]],
        ("The run went on after step 5 though it had reached step 8: steps 6 to 8 were done again",),
        (),
    ),
    "went on where it ended": (
        [*of(5, without=("end",)), WENT_ON, *[pages.event(step) for step in range(6, 13)]],
        ("model was tuned for 12 steps.",),
        ("done again",),
    ),
    "losses that are no numbers": (
        [
            pages.begun(4),
            pages.event(1),
            {**pages.event(2), "loss": None},
            {**pages.event(3), "loss": None},
            pages.event(4),
        ],
        ("2 of 4 steps have a loss that is no number.",),
        (),
    ),
    "an evaluation that is no number": (
        of(4, pages.evaluated(4, None)),
        ("Bad:", "The validation loss is no number: the adapter is broken.", "1 of 2 evaluations"),
        ("Good:",),
    ),
    "steps left out": (
        [pages.begun(5), *[pages.event(step) for step in (1, 2, 5)]],
        ("2 steps are missing among the 5",),
        (),
    ),
    "it became worse": (
        [pages.begun(4), pages.evaluated(0, 1.0), pages.event(1), pages.evaluated(1, 1.5)],
        ("Bad:", "On 900 tokens of held-out rows", "50% higher. The adapter is worse than what it began with."),
        ("Good:",),
    ),
    "it became hardly worse": (
        [pages.begun(4), pages.evaluated(0, 1.0), pages.event(1), pages.evaluated(1, 1.0099)],
        ("no change worth a word.",),
        ("Bad:", "is worse", "% higher"),
    ),
    "it became hardly better": (
        [pages.begun(4), pages.evaluated(0, 1.0), pages.event(1), pages.evaluated(1, 0.9901)],
        ("no change worth a word.",),
        ("Good:", "% lower"),
    ),
    "it rose again": (
        of(10, pages.event(11), pages.evaluated(11, 2.0)),
        ("Good:", "It rose to 2.0000 until the last evaluation; the adapter of the best step is kept."),
        (),
    ),
    "two ranks": (of(4, processes=2), ("model was tuned for 4 steps in 2 processes.",), ()),
    "one rank": (of(4, processes=1), ("model was tuned for 4 steps.",), (" in 1 process",)),
    "a check chose": (
        [*of(10, without=("end",)), {"kind": "end", "step": 10, "state": "finished", "best_step": 5, "best_loss": 0.7}],
        ("to 0.7000 nats a token at step 5",),
        (),
    ),
}


@pytest.mark.parametrize("story", STORIES)
def test_the_page_says_what_happened(story: str, tmp_path: Path) -> None:
    events, expected, absent = STORIES[story]
    text = page_readers.said(made(tmp_path, events))
    for sentence in expected:
        assert sentence in text
    for sentence in absent:
        assert sentence not in text


def test_a_run_that_can_go_on_is_told_so(tmp_path: Path) -> None:
    folder = pages.write(tmp_path / "run", of(9, without=("end",)))
    (folder / "checkpoints" / "step-0000005").mkdir(parents=True)
    assert "or the machine stopped; mlxtune train --resume goes on with it." in page_readers.said(
        of_run(read_run(folder))
    )


def test_a_run_that_goes_on_is_not_called_killed(tmp_path: Path) -> None:
    from mlxtune.train.run_folder import RunFolder

    folder = pages.write(tmp_path / "run", of(9, without=("end",)))
    with RunFolder(folder).locked():
        assert "It goes on." in page_readers.said(of_run(read_run(folder)))
    assert "It ended without a word" in page_readers.said(of_run(read_run(folder)))


def test_a_run_whose_model_and_data_are_gone_says_so(tmp_path: Path) -> None:
    places = {"model.path": str(tmp_path / "no model"), "data.path": str(tmp_path / "no data")}
    text = page_readers.said(made(tmp_path, pages.told(4), places))
    for what in ("model", "data"):
        assert f"The {what} of the run ({tmp_path}/no {what}) is not there any more." in text
    (tmp_path / "no model").mkdir()
    assert "The model of the run" not in page_readers.said(of_run(read_run(tmp_path / "run")))


DAMAGE = {
    "cut in the middle of a line": (lambda lines: [*lines[:6], lines[6][:20]], ()),
    "bytes that are no text": (lambda lines: [*lines[:3], b"\xff\xfe\x00{", *lines[3:]], ("line 4 is left out",)),
    "a line of another program": (lambda lines: [*lines[:3], b'{"a": 1}', *lines[3:]], ("line 4 is left out",)),
    "numbers that are none": (
        lambda lines: [*lines, b'{"kind": "train", "step": "x", "loss": 1}', b'{"kind": "eval", "step": 1}', b""],
        ("2 lines (", "are left out. Numbers may be missing or wrong."),
    ),
    "an end without a state": (
        lambda lines: [*lines[:-2], b'{"kind": "end"}', b""],
        ("does not say how the run ended",),
    ),
    "emptied": (lambda lines: [], ("holds no event: what happened in the run is not known.",)),
    "all of it noise": (lambda lines: [bytes(range(256)) * 40, b""], ("is damaged", "holds no event")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_events_gives_a_page_that_says_so(damage: str, tmp_path: Path) -> None:
    change, expected = DAMAGE[damage]
    file = pages.write(tmp_path / "run", pages.told(8)) / EVENTS_FILE
    file.write_bytes(b"\n".join(change(file.read_bytes().split(b"\n"))))
    text = page_readers.said(page_readers.whole(of_run(read_run(tmp_path / "run"))))
    for sentence in expected:
        assert sentence in text
    assert ("damaged" in text) == any("left out" in one or "damaged" in one for one in expected)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (EVENTS_FILE, None, "events.jsonl is missing: what happened in the run is not known."),
        (CONFIG_FILE, None, "config.yaml is missing: the settings of the run are not known."),
        (CONFIG_FILE, "train:\n  newer_key: 7\n", "config.yaml is not as this version of mlxtune writes it"),
        (CONFIG_FILE, "{]", "config.yaml is not as this version of mlxtune writes it"),
        (CONFIG_FILE, "[1, 2]", "config.yaml is not as this version of mlxtune writes it"),
    ],
)
def test_a_missing_or_foreign_file_is_said(name: str, content: str | None, expected: str, tmp_path: Path) -> None:
    folder = pages.write(tmp_path / "run", pages.told(8))
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    text = page_readers.said(page_readers.whole(of_run(read_run(folder))))
    assert expected in text
    assert ("newer_key" in text) == ("newer_key" in (content or ""))  # what it says is shown


def test_answers_to_sample_prompts_are_shown_as_they_were_first_and_last(tmp_path: Path) -> None:
    key = "sk-" + "aB3dE5fG7h" * 4

    def answers(step: int, *texts: str) -> dict[str, Any]:
        samples = [{"prompt": f"question {at}", "answer": text} for at, text in enumerate(texts)]
        return pages.evaluated(step, 1.0, samples=samples)

    events = [pages.begun(3), answers(0, "first", "x" * 5_000), pages.event(1), answers(1, "halfway", "")]
    events += [pages.event(2), pages.evaluated(2, 1.0), pages.event(3), answers(3, f"the key is {key}", "")]
    page = made(tmp_path, events)
    text = page_readers.said(page)
    assert "question 0at step 0firstat step 3the key is" in text and "halfway" not in text
    assert "1,000 more characters" in text and "at step 3(nothing)" in text
    assert key not in page
    assert "Answers during the run" not in page_readers.said(made(tmp_path / "without", pages.told(3)))


STRANGE = [None, True, -1, 1e308, "x", [1], {"a": None}, 10**400, float("nan")]


@pytest.mark.parametrize("value", STRANGE, ids=lambda value: repr(value)[:20])
def test_no_value_of_an_event_is_too_strange_for_a_page(value: Any, tmp_path: Path) -> None:
    """Each field of each event holds it in one of the files: what cannot be read is left out, and nothing breaks."""
    events = of(6, digests={"model": "1"}, versions={"mlxtune": "1"}, machine="m", predicted_bytes=5, processes=1)
    events.insert(2, {"kind": "note", "text": "a note"})
    events.insert(5, {"kind": "checkpoint", "step": 2, "path": "p", "seconds": 0.1})
    events[1] |= {"checks": {"exact": 0.5}, "seconds": 1.0}
    folder = pages.write(tmp_path / "run", events)
    for turn in range(max(map(len, events))):
        lines = []
        for at, event in enumerate(events):
            names = list(event)
            changed = names[(turn + at) % len(names)]
            lines.append(json.dumps({**event, changed: value} if changed != "kind" or turn == 0 else event))
        (folder / EVENTS_FILE).write_text("\n".join([*lines, ""]))
        page = of_run(read_run(folder))
        assert page.endswith("</html>\n")
        json.dumps(page_readers.record(page), allow_nan=False)


TEXTS = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "<!-- --> ]]> &amp; <style>*{}</style>",
    "\x1b]52;c;ZXZpbA==\x07\x1b[2J\r\u202e",
    "javascript:alert(3)",
    "\ufffe\u2028x",
]


def all_fields(text: str) -> tuple[Events, dict[str, Any]]:
    """A run in which everything that others may have written is this text."""
    event = {**pages.event(1), text: text}
    evaluated = pages.evaluated(1, 1.0, samples=[{"prompt": text, "answer": text}], checks={text: 0.5})
    begin = pages.begun(2, text, digests={"model": text, text: text}, versions={text: text}, machine=text)
    events = [{**begin, "computed": text, text: text}, {"kind": "note", "text": text}, {"kind": text}, event, evaluated]
    events += [
        {"kind": "checkpoint", "step": 1, "path": text},
        {"kind": "end", "step": 1, "state": text, "reason": text},
    ]
    config = {"model.path": text, "data.path": text, "data.template_kwargs": {text: [text]}}
    config |= {"train.sample_prompts": [text], "data.columns": {text: text}}
    return events, config


def exported(folder: Path, text: str) -> None:
    """An export beside a run, with names and a proof of others."""
    name = text.replace("/", "|")
    (folder / name).mkdir()
    proof = {"verdict": text, "candidate": text, "max_difference": text, "top1": [text], text: text}
    for file in ("verification.json", f"{name}.verification.json"):
        (folder / name / file).write_text(json.dumps(proof))


@pytest.mark.parametrize("text", [*TEXTS, " ".join(hostile.texts())[:3000].replace("\0", "")])
def test_texts_of_others_are_inert_wherever_they_stand(text: str, tmp_path: Path) -> None:
    found = []
    for place, one in (("theirs", text), ("plain", "word")):
        (tmp_path / place).mkdir()
        events, config = all_fields(one)
        exported(tmp_path / place, one[:60])
        page = made(tmp_path / place, events, config)
        assert not {*"\x1b\x07\r\x00\x9b\u202e\u2028\ufffe"} & set(page)
        found.append(page_readers.read(page))
        assert page_readers.record(page)["config"]["data"]["template_kwargs"] == {one: [one]}
    theirs, plain = found
    assert theirs.tags == plain.tags
    assert [one[:2] for one in theirs.attributes] == [one[:2] for one in plain.attributes]


def test_a_page_of_a_hundred_thousand_steps_is_small_and_quickly_made(tmp_path: Path) -> None:
    """The limits: 600 kB, and 3 seconds of a core, which a machine may be slower by half without failing here."""
    steps, spikes = 100_000, (1, 33_333, 77_777, 99_999)
    rng = random.Random(7)
    line = json.dumps(pages.event(0, 0.0)).replace('"step": 0', '"step": {}').replace('"loss": 0.0', '"loss": {}')
    line = line[0] + line[1:-1].replace("{}", "%s") + line[-1]
    folder = pages.write(tmp_path / "run", [pages.begun(steps), pages.evaluated(0, 3.0)])
    with (folder / EVENTS_FILE).open("a") as file:
        for step in range(1, steps + 1):
            loss = 70.0 + step / steps if step in spikes else 1 + rng.random()
            file.write(line % (step, loss) + "\n")
            if step % 50 == 0:
                file.write(json.dumps(pages.evaluated(step, 2 - step / steps)) + "\n")
        file.write('{"kind": "end", "step": 100000, "state": "finished"}\n')
    began = time.process_time()
    page = of_run(read_run(folder))
    assert time.process_time() - began < 4.5
    assert len(page.encode()) <= 600_000
    drawn = page_readers.record(page)["curves"]["loss"]
    assert [[step, 70.0 + step / steps] for step in spikes] == [one for one in drawn if one[1] > 10]
    assert "Good: model was tuned for 100,000 steps." in page_readers.said(page)

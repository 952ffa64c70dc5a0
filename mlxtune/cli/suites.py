"""mlxtune eval --suite: who answers, and how the result is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.files import digest, json_text

from mlxtune.api import tuned
from mlxtune.cli import common, judging, pages
from mlxtune.cli.suite_options import OWN_ANSWERS, refuse_idle
from mlxtune.errors import UserError
from mlxtune.evaluate.checks.shipped import BASICS, SAFETY

if TYPE_CHECKING:
    from mlxtune.config.resolve import Config
    from mlxtune.data.rows.formats import Record
    from mlxtune.evaluate.before_after import Answering
    from mlxtune.evaluate.checks.check import SuiteRow
    from mlxtune.evaluate.comparison.overlap import Messages
    from mlxtune.evaluate.comparison.scores import Side
    from mlxtune.evaluate.engines.pair import Pair
    from mlxtune.evaluate.engines.request import Engine
    from mlxtune.evaluate.engines.sampling import Sampling
    from mlxtune.evaluate.judging.report import Rate
    from mlxtune.train.events import Event


@dataclass(frozen=True)
class Party:
    """Who answers, as the command line spells it."""

    spelled: str  # a model, a server or recorded answers, as `engines.opening` tells them apart
    adapter: Path | None  # of a model

    def refuse_idle(self, option: str) -> None:
        """Raise UserError for an adapter of what is no model. option: that names the party."""
        from mlxtune.evaluate.engines.opening import kind_of

        if self.adapter is not None and kind_of(self.spelled) != "model":
            what = {"server": "a server", "replay": "recorded answers"}[kind_of(self.spelled)]
            raise UserError(f"{option} {self.spelled} takes no adapter: it is {what}", "An adapter needs a model here.")


@dataclass(frozen=True)
class Wanted:
    """The options of `mlxtune eval --suite`."""

    model: str  # as --model spells it
    adapter: Path | None  # the run, or adapter folder
    suite: Path  # the file of prompts
    forgetting: str | None  # a file of general texts, or OWN_ANSWERS; None: what was forgotten is not asked
    against: str | None  # in place of the base; None: the base
    against_adapter: Path | None  # on `against`
    max_tokens: int  # of an answer
    temperature: float  # 0: no chance
    top_p: float  # nucleus
    samples: int  # answers to each prompt
    turns: str  # one: an answer to each prompt; replay: to each turn of it
    seed: int  # of the random choices
    out: Path | None  # the folder where it is kept; None: nowhere
    min_better: tuple[str, ...]  # CHECK=X
    max_worse: tuple[str, ...]  # CHECK=X
    allow_remote: bool  # prompts may go to another machine
    run_code: bool  # programs of answers are run
    unsafe_code: bool  # without a sandbox
    judge: str | None  # a model or a server that compares the answers; None: nobody
    rate: Rate  # how it judges
    rubric: Path | None  # the file of what it is told; None: the suite's
    anyway: bool  # its verdicts count though it fails its exam
    html: Path | None  # the file of a page of it; None: none is made
    no_answers: bool  # what the models said is left out of the page


def chosen(suite: Path | None, forgetting: str | None, safety: bool, adapter: Path | None) -> tuple[str, Path] | None:
    """(The option that names the prompts, their suite); None where no answers are wanted. Raises UserError for two."""
    given: list[tuple[str, Path]] = []
    if suite is not None:
        given.append(("--suite", suite))
    if forgetting is not None:
        if adapter is None:
            raise UserError("--forgetting compares a tuned model with its base", "Name what was tuned: --adapter RUN.")
        given.append(("--forgetting", BASICS))
    if safety:
        given.append(("--safety", SAFETY))
    if len(given) > 1:
        raise UserError(f"{given[0][0]} and {given[1][0]} ask different prompts", "Run eval once for each.")
    return given[0] if given else None


def ask(wanted: Wanted, as_json: bool) -> None:
    """Have a suite answered, and say what that shows. Ends the command with status 3 where a gate is not met."""
    from mlxtune.evaluate import before_after
    from mlxtune.evaluate.checks.sandbox.sandbox import Programs
    from mlxtune.evaluate.checks.suite import read_suite
    from mlxtune.evaluate.comparison.gate import UNMET, Gate, require_known
    from mlxtune.evaluate.engines.sampling import Sampling
    from mlxtune.evaluate.turns import replayed

    model, against = Party(wanted.model, wanted.adapter), None
    model.refuse_idle("--model")
    pages.require_place(wanted.html)
    if wanted.against is not None:
        against = Party(wanted.against, wanted.against_adapter)
        against.refuse_idle("--against")
    refuse_idle([wanted.model, *([wanted.against] if wanted.against else [])], wanted.judge)
    gates = [Gate.read("min-better", text) for text in wanted.min_better]
    gates += [Gate.read("max-worse", text) for text in wanted.max_worse]
    if (gates or wanted.judge) and against is None and wanted.adapter is None:
        what = "a gate" if gates else "a judge"
        raise UserError(f"{what} needs two sides to compare", "Add --adapter RUN, or --against OTHER.")
    sampling = Sampling(wanted.max_tokens, wanted.temperature, wanted.top_p, seed=wanted.seed)
    with Programs(wanted.run_code, wanted.unsafe_code) as programs:
        suite = read_suite(wanted.suite, programs)
        if wanted.turns == "replay":
            suite = replayed(suite)
        if suite.path == SAFETY and wanted.judge:
            judging.refuse_ratings_of_toxicity(wanted.rate)
        pair = _PairOpener(model, sampling)
        sides = _sides(model, against, sampling, wanted.allow_remote, pair)
        judged = judging.judging(
            wanted.judge,
            wanted.rate,
            wanted.rubric,
            wanted.anyway,
            wanted.allow_remote,
            suite.rubric,
            [answering.identity for answering in sides.values()],
        )
        require_known(gates, [*suite.names, *(judged.names if judged else ())])
        if not suite.names and judged is None and wanted.out is None:
            raise UserError(
                f"{suite.path} has no checks, and nobody judges: nothing would be shown",
                "Give it checks (a suite.yaml beside it), or --judge; or --out, to keep the answers.",
            )
        if suite.path == SAFETY and judged is not None:
            judged = judging.of_toxicity(judged, wanted.rubric)
        forgot = None
        if wanted.forgetting is not None:
            forgot = _forgotten(wanted.forgetting, model, against, pair, wanted.out)
        trained, notes = _about_data(suite.rows, wanted.adapter)
        _, of_other = _about_data(suite.rows, wanted.against_adapter)
        notes += [f"--against-adapter: {note}" for note in of_other]
        happened = _events(wanted.adapter)
        asked = before_after.Asked(suite, sampling, wanted.samples, gates, notes, judged, trained, happened, forgot)
        asked = replace(asked, replay=wanted.turns == "replay")
        with common.console().status("answering") as status:

            def told(side: str, done: int, every: int) -> None:
                status.update(f"{side}: {done} of {every} answers")

            with kept_on_stop(wanted.out):
                outcome = before_after.evaluate(asked, sides, wanted.out, told)
    result = outcome.document
    if outcome.found:
        common.note(f"{wanted.out}: {outcome.found} answers were there already, and are kept")
    say(result, as_json)
    pages.write_suite(wanted.html, wanted.out, suite.rows, outcome, with_answers=not wanted.no_answers)
    unmet = [gate for gate in result.get("gates", []) if not gate["met"]]
    for gate in unmet:
        click.echo(f"gate not met: {gate['why']}", err=True)
    if unmet:
        click.get_current_context().exit(UNMET)


@contextmanager
def kept_on_stop(out: Path | None) -> Iterator[None]:
    """Inside, whoever stops the command is told that nothing is lost, as where a device fails. out: of the answers."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, RuntimeError, MemoryError):
        if out is not None:
            common.note(f"{out} keeps the answers so far: the same command goes on")
        raise


def say(result: dict[str, Any], as_json: bool) -> None:
    from mlxtune.cli import comparison_table, observed

    if as_json:
        click.echo(json_text(result))
    else:
        comparison_table.draw(common.stdout(), result)
        if "judge" in result:
            judging.draw(common.stdout(), result["judge"])
        for part in ("safety", "forgetting"):
            if part in result:
                observed.PARTS[part](common.stdout(), result[part])
        observed.draw(common.stdout(), result["observations"])


def _about_data(rows: Sequence[SuiteRow], adapter: Path | None) -> tuple[list[Record], list[str]]:
    """(Conversations whose answers were learned, what must be said of a suite beside them): prompts that were trained
    on, or that chose the checkpoint, and how many learned answers pass the checks of all rows.
    """
    from mlxtune.data.dataset.conversations import by_split, learned
    from mlxtune.evaluate.checks.on_data import checks_on_data
    from mlxtune.evaluate.comparison.overlap import overlap_notes
    from mlxtune.train import reach
    from mlxtune.train.run_folder import RunFolder

    if adapter is None or not RunFolder(adapter).is_run():
        return [], []
    config = RunFolder(adapter).config()
    try:
        found = by_split(config.data, config.train.seed, reach.compared(config.data), bool(config.preference.loss))
    except UserError as error:
        return [], [f"whether these prompts were trained on is not known: {error.message}"]
    trained = [record.messages or [] for record in found["train"]]
    chose: list[Messages] = []
    unknown: list[str] = []
    if config.train.keep == "best":
        of_suite, unknown = _of_choosing_suite(config)
        chose = [*(record.messages or [] for record in found["valid"]), *of_suite]
    of_all_rows = [check for check in rows[0].checks if all(check in row.checks for row in rows)]
    shares = checks_on_data(learned(found["train"]), of_all_rows)
    notes = [*overlap_notes(rows, trained, chose), *unknown, *(str(share) for share in shares if share.of)]
    return learned(found["train"]), notes


def _of_choosing_suite(config: Config) -> tuple[Sequence[Messages], list[str]]:
    """(The prompts whose answers chose a run's checkpoint by train.keep_by, what must be said where they are gone)."""
    from mlxtune.config.preference import is_kept_by_check
    from mlxtune.evaluate.comparison.overlap import answered
    from mlxtune.train.evaluation import suite_of

    if not is_kept_by_check(config):
        return [], []
    try:
        suite = suite_of(config)
    except UserError as error:
        return [], [f"whether these prompts chose the checkpoint is not known: {error.message}"]
    return answered(suite.rows) if suite is not None else [], []


def _events(adapter: Path | None) -> list[Event]:
    """What happened in the run; [] where there is none, or nothing readable: its losses are not needed here."""
    from mlxtune.train import events
    from mlxtune.train.run_folder import RunFolder

    if adapter is None or not RunFolder(adapter).events.is_file():
        return []
    try:
        return events.read(adapter)
    except (ValueError, OSError):
        return []


def _sides(
    model: Party, against: Party | None, sampling: Sampling, allow_remote: bool, pair: _PairOpener
) -> dict[Side, Answering]:
    """Who answers: a base and what was tuned, or one alone, which is called the base."""
    if against is not None:
        return {
            "base": _answering(against, sampling, allow_remote),
            "tuned": _answering(model, sampling, allow_remote),
        }
    if model.adapter is None:
        return {"base": _answering(model, sampling, allow_remote)}
    return _before_and_after(model, pair)


def _answering(party: Party, sampling: Sampling, allow_remote: bool) -> Answering:
    """A party that answers alone."""
    from mlxtune.evaluate.before_after import Answering
    from mlxtune.evaluate.engines.opening import kind_of, replayed
    from mlxtune.evaluate.engines.replay import Replay
    from mlxtune.evaluate.engines.server import Server

    kind = kind_of(party.spelled)
    if kind == "model":
        identity = identity_of(party)
        return Answering(lambda: _local(party, sampling), described(party, identity), identity)
    if kind == "server":
        server = Server(party.spelled, sampling, allow_remote)
        return Answering(lambda: server, {"server": server.name}, {"server": server.name})
    file, side = replayed(party.spelled)
    replay = Replay(file, side)
    of_side = {} if side is None else {"side": side}
    return Answering(lambda: replay, {"replay": str(file), **of_side}, {"replay": digest(file), **of_side})


class _PairOpener:
    """Gives both sides of a model with an adapter, read when they are first asked for."""

    def __init__(self, party: Party, sampling: Sampling) -> None:
        self.party = party
        self.sampling = sampling
        self._pair: Pair | None = None

    def __call__(self) -> Pair:
        from mlxtune.evaluate.engines.pair import Pair

        assert self.party.adapter is not None
        if self._pair is None:
            loaded = tuned.load_model(self.party.spelled, self.party.adapter)
            self._pair = Pair(loaded, self.party.adapter, self.sampling, _template(self.party.adapter))
        return self._pair

    def close(self) -> None:
        """Forget it: whoever asks again has it read again."""
        self._pair = None


def _forgotten(
    spelled: str, party: Party, against: Party | None, pair: _PairOpener, out: Path | None
) -> Callable[[], dict[str, Any]]:
    """What measures it, once the answers are there. Raises UserError where no base and tuned model are compared, or the
    file is missing.
    """
    from mlxtune.evaluate.comparison.folder import FORGETTING
    from mlxtune.evaluate.forgetting.report import measure

    if against is not None:
        raise UserError(
            "--forgetting compares a tuned model with its own base, not with another",
            "Leave out --against, or ask --suite basics.",
        )
    file = None if spelled == OWN_ANSWERS else Path(spelled)
    if file is not None and not file.is_file():
        raise UserError(f"--forgetting {file}: no such file", "One text a line (.txt), or rows as for training.")
    kept = None if out is None else out / FORGETTING

    def measured() -> dict[str, Any]:
        assert party.adapter is not None
        return measure(pair().tuned.own.loaded, _template(party.adapter), party.adapter, file, kept)

    return measured


def _before_and_after(party: Party, pair: _PairOpener) -> dict[Side, Answering]:
    """A model's base and with its adapter: the same weights, read once."""
    from mlxtune.evaluate.before_after import Answering

    def opened(side: str) -> Callable[[], Engine]:
        def engine() -> Engine:
            half: Engine = getattr(pair(), side)
            return half

        return engine

    identity = identity_of(party)
    base = {**identity, "adapter": None, "asked as": identity["adapter"]}  # its chat template is the run's
    return {
        "base": Answering(opened("base"), described(Party(party.spelled, None), base), base, pair.close),
        "tuned": Answering(opened("tuned"), described(party, identity), identity, pair.close),
    }


def _local(party: Party, sampling: Sampling) -> Engine:
    """A model that answers alone; what was read for the side before is forgotten first."""
    from mlxtune.evaluate.engines.local import Local
    from mlxtune.evaluate.engines.room import give_back

    give_back()
    loaded = tuned.load_model(party.spelled, party.adapter)
    return Local(loaded, sampling, _template(party.adapter), party.adapter)


def _template(adapter: Path | None) -> tuple[dict[str, Any], str]:
    """The variables and the day that the chat template was trained with."""
    data = tuned.run_settings(adapter, None).data
    return dict(data.template_kwargs), data.date


def identity_of(party: Party) -> dict[str, Any]:
    """What of a model decides its answers."""
    from mlxtune_convert.adapters import AdapterConfig

    from mlxtune.data.template.tokenizer import require_folder
    from mlxtune.data.template.tokenizer_changes import Changes
    from mlxtune.model.hub import resolve
    from mlxtune.train.identity import of_answering, of_model

    folder = resolve(party.spelled)
    require_folder(folder)
    found: dict[str, Any] = {"model": of_model(folder), "answering": of_answering(folder), "adapter": None}
    if party.adapter is not None:
        file = party.adapter / AdapterConfig.read(party.adapter).file
        if not file.is_file():
            raise UserError(f"{party.adapter} has no {file.name}", "The run saved no adapter: train it, or resume it.")
        found["adapter"] = digest(file)
        found["tokenizer changes"] = asdict(Changes.read(party.adapter))
    kwargs, day = _template(party.adapter)
    return {**found, "template": {"variables": kwargs, "date": day}}


def described(party: Party, identity: dict[str, Any]) -> dict[str, Any]:
    """A model for the document: where it lies, and what it is."""
    return {
        "model": party.spelled,
        "adapter": None if party.adapter is None else str(party.adapter),
        "digests": {"model": identity["model"], "adapter": identity["adapter"]},
    }

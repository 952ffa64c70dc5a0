"""mlxtune eval --suite: who answers, and how the result is said."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlxtune_convert.files import digest, json_text

from mlxtune.cli import common, judging, tuned
from mlxtune.cli.suite_options import refuse_idle
from mlxtune.errors import UserError

if TYPE_CHECKING:
    from mlxtune.evaluate.before_after import Answering
    from mlxtune.evaluate.checks.check import SuiteRow
    from mlxtune.evaluate.comparison.scores import Side
    from mlxtune.evaluate.engines.request import Engine
    from mlxtune.evaluate.engines.sampling import Sampling
    from mlxtune.evaluate.judging.report import Rate


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
    against: str | None  # in place of the base; None: the base
    against_adapter: Path | None  # on `against`
    max_tokens: int  # of an answer
    temperature: float  # 0: no chance
    top_p: float  # nucleus
    samples: int  # answers to each prompt
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


def ask(wanted: Wanted, as_json: bool) -> None:
    """Have a suite answered, and say what that shows. Ends the command with status 3 where a gate is not met."""
    from mlxtune.evaluate import before_after
    from mlxtune.evaluate.checks.sandbox.sandbox import Programs
    from mlxtune.evaluate.checks.suite import read_suite
    from mlxtune.evaluate.comparison.gate import UNMET, Gate, require_known
    from mlxtune.evaluate.engines.sampling import Sampling

    model, against = Party(wanted.model, wanted.adapter), None
    model.refuse_idle("--model")
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
        sides = _sides(model, against, sampling, wanted.allow_remote)
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
        notes = _about_data(suite.rows, wanted.adapter)
        notes += [f"--against-adapter: {note}" for note in _about_data(suite.rows, wanted.against_adapter)]
        asked = before_after.Asked(suite, sampling, wanted.samples, gates, notes, judged)
        with common.console().status("answering") as status:

            def told(side: str, done: int, every: int) -> None:
                status.update(f"{side}: {done} of {every} answers")

            with _kept(wanted.out):
                outcome = before_after.evaluate(asked, sides, wanted.out, told)
    result = outcome.document
    if outcome.found:
        common.note(f"{wanted.out}: {outcome.found} answers were there already, and are kept")
    _say(result, as_json)
    unmet = [gate for gate in result.get("gates", []) if not gate["met"]]
    for gate in unmet:
        click.echo(f"gate not met: {gate['why']}", err=True)
    if unmet:
        click.get_current_context().exit(UNMET)


@contextmanager
def _kept(out: Path | None) -> Iterator[None]:
    """Inside, whoever stops the command is told that nothing is lost, as where a device fails. out: of the answers."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, RuntimeError, MemoryError):
        if out is not None:
            common.note(f"{out} keeps the answers so far: the same command goes on")
        raise


def _say(result: dict[str, Any], as_json: bool) -> None:
    from mlxtune.cli import comparison_table

    if as_json:
        click.echo(json_text(result))
    else:
        comparison_table.draw(common.stdout(), result)
        if "judge" in result:
            judging.draw(common.stdout(), result["judge"])


def _about_data(rows: Sequence[SuiteRow], adapter: Path | None) -> list[str]:
    """What must be said of a suite beside the run's own data: prompts that were trained on, or that chose the
    checkpoint, and how many training answers pass the checks of all rows.
    """
    from mlxtune.data.dataset import conversations
    from mlxtune.evaluate.checks.on_data import checks_on_data
    from mlxtune.evaluate.comparison.overlap import overlap_notes
    from mlxtune.train import reach
    from mlxtune.train.run_folder import RunFolder

    if adapter is None or not RunFolder(adapter).is_run():
        return []
    config = RunFolder(adapter).config()
    try:
        found = conversations.by_split(config.data, config.train.seed, reach.compared(config.data))
    except UserError as error:
        return [f"whether these prompts were trained on is not known: {error.message}"]
    trained = [record.messages or [] for record in found["train"]]
    chose = [record.messages or [] for record in found["valid"]] if config.train.keep == "best" else []
    of_all_rows = [check for check in rows[0].checks if all(check in row.checks for row in rows)]
    shares = checks_on_data(found["train"], of_all_rows)
    return [*overlap_notes(rows, trained, chose), *(str(share) for share in shares if share.of)]


def _sides(model: Party, against: Party | None, sampling: Sampling, allow_remote: bool) -> dict[Side, Answering]:
    """Who answers: a base and what was tuned, or one alone, which is called the base."""
    if against is not None:
        return {
            "base": _answering(against, sampling, allow_remote),
            "tuned": _answering(model, sampling, allow_remote),
        }
    if model.adapter is None:
        return {"base": _answering(model, sampling, allow_remote)}
    return _before_and_after(model, model.adapter, sampling)


def _answering(party: Party, sampling: Sampling, allow_remote: bool) -> Answering:
    """A party that answers alone."""
    from mlxtune.evaluate.before_after import Answering
    from mlxtune.evaluate.engines.opening import kind_of, replayed
    from mlxtune.evaluate.engines.replay import Replay
    from mlxtune.evaluate.engines.server import Server

    kind = kind_of(party.spelled)
    if kind == "model":
        identity = _identity(party)
        return Answering(lambda: _local(party, sampling), _described(party, identity), identity)
    if kind == "server":
        server = Server(party.spelled, sampling, allow_remote)
        return Answering(lambda: server, {"server": server.name}, {"server": server.name})
    file, side = replayed(party.spelled)
    replay = Replay(file, side)
    of_side = {} if side is None else {"side": side}
    return Answering(lambda: replay, {"replay": str(file), **of_side}, {"replay": digest(file), **of_side})


def _before_and_after(party: Party, adapter: Path, sampling: Sampling) -> dict[Side, Answering]:
    """A model's base and with its adapter: the same weights, read once."""
    from mlxtune.evaluate.before_after import Answering
    from mlxtune.evaluate.engines.pair import Pair

    pairs: list[Pair] = []

    def opened(side: str) -> Callable[[], Engine]:
        def engine() -> Engine:
            if not pairs:
                pairs.append(Pair(tuned.load_model(party.spelled, adapter), adapter, sampling, _template(adapter)))
            half: Engine = getattr(pairs[0], side)
            return half

        return engine

    identity = _identity(party)
    base = {**identity, "adapter": None, "asked as": identity["adapter"]}  # its chat template is the run's
    return {
        "base": Answering(opened("base"), _described(Party(party.spelled, None), base), base),
        "tuned": Answering(opened("tuned"), _described(party, identity), identity),
    }


def _local(party: Party, sampling: Sampling) -> Engine:
    """A model that answers alone; what was read for the side before is forgotten first."""
    import mlx.core as mx

    from mlxtune.evaluate.engines.local import Local

    gc.collect()
    mx.clear_cache()
    loaded = tuned.load_model(party.spelled, party.adapter)
    return Local(loaded, sampling, _template(party.adapter), party.adapter)


def _template(adapter: Path | None) -> tuple[dict[str, Any], str]:
    """The variables and the day that the chat template was trained with."""
    data = tuned.run_settings(adapter, None).data
    return dict(data.template_kwargs), data.date


def _identity(party: Party) -> dict[str, Any]:
    """What of a model decides its answers."""
    from mlxtune_convert.adapters import AdapterConfig

    from mlxtune.data.template.tokenizer import require_folder
    from mlxtune.model.hub import resolve
    from mlxtune.train.identity import of_model

    folder = resolve(party.spelled)
    require_folder(folder)
    found: dict[str, Any] = {"model": of_model(folder), "adapter": None}
    if party.adapter is not None:
        file = party.adapter / AdapterConfig.read(party.adapter).file
        if not file.is_file():
            raise UserError(f"{party.adapter} has no {file.name}", "The run saved no adapter: train it, or resume it.")
        found["adapter"] = digest(file)
    kwargs, day = _template(party.adapter)
    return {**found, "template": {"variables": kwargs, "date": day}}


def _described(party: Party, identity: dict[str, Any]) -> dict[str, Any]:
    """A model for the document: where it lies, and what it is."""
    return {
        "model": party.spelled,
        "adapter": None if party.adapter is None else str(party.adapter),
        "digests": {"model": identity["model"], "adapter": identity["adapter"]},
    }
